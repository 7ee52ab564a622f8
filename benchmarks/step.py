"""One local training step against the form of CoOp, PromptFL and pFedMoAP's released code.

    python -m benchmarks.step [--models ...] [--classes ...] [--experts ...] [--quick]

A step is forward, backward and SGD update of prompt and gate on 32 images, in float32. The
reference encodes the images anew and passes C sequences of 77 tokens through the text tower; ours
has the image features cached and reads shared tokens once. Experts' text features are fixed in
both (their encoding is the cell "delivery"), and gate and loss are the same code. Models have
random weights. Keys of the last line are of ViT-B-16 and C = 102 (ratio_memory: C = 1000;
ratio_peak: the largest C that both forms fit), without experts; with 9 where they end in "_moe".
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import Any

import open_clip
import psutil
import torch
from torch import Tensor

from benchmarks.common import in_fresh_process, peak_bytes, report, seconds
from benchmarks.forms import BATCH, Step, random_clip
from pfedmoap_flwr.clip.load import FrozenClip

Cell = dict[str, Any]

MAIN = "ViT-B-16"
TOLERANCE = 1e-4
ROOM = 1.7
"""The reference's measured peak is up to 1.7 times what it saves for backward."""


def main() -> None:
    """Measure what the command line asks for and report it."""
    options = _options()
    device = torch.device(options.device)
    cells = []
    for name in options.models:
        clip = random_clip(name, device)
        images = _images_cell(clip, options.repeats)
        cells.append(images)
        for classes in options.classes:
            print(f"{name}: {classes} classes", file=sys.stderr)
            cells += _cells(clip, classes, options, images["reference s"])
        if name == options.models[0] and (variants := [c for c in options.classes if c <= 102]):
            cells += _variant_cells(clip, max(variants), options.repeats)
    report("step", device, cells, **_ratios(cells))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step")
    parser.add_argument("--models", nargs="+", default=[MAIN, "RN50"])
    parser.add_argument("--classes", nargs="+", type=int, default=[10, 47, 102, 1000])
    parser.add_argument("--experts", nargs="+", type=int, default=[0, 9, 19])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3, help="at most 2 beyond 50 classes")
    parser.add_argument("--quick", action="store_true", help="10 seconds, on the bundled mini")
    options = parser.parse_args()
    if options.quick:
        options.models, options.classes, options.experts = ["mini"], [10], [0, 9]
        options.repeats = 1
    return options


def _images_cell(clip: FrozenClip, repeats: int) -> Cell:
    """The image tower on a batch: work of every step in the reference, done once in ours."""
    size = open_clip.get_model_config(clip.name)["vision_cfg"]["image_size"]
    pixels = torch.randn(BATCH, 3, size, size, device=clip.device)
    with torch.no_grad():
        time = seconds(lambda: clip.model.encode_image(pixels), clip.device, min(repeats, 2))
    return {"cell": "images", "model": clip.name, "B": BATCH, "reference s": time}


def _cells(clip: FrozenClip, classes: int, options: Any, images: float) -> list[Cell]:
    """All cells of one model and number of classes."""
    plain = Step(clip, classes, 0)
    repeats = options.repeats if classes <= 50 else min(options.repeats, 2)
    needed = ROOM * _reference_counts(clip, classes, 0)[0]
    fits = needed < _free_memory(clip.device)
    cells = [_names_cell(plain)]
    time: float | None = None
    if fits:
        cells.append(_agreement_cell(clip, classes, max(options.experts)))
        time = seconds(plain.by(plain.full_length()), clip.device, repeats)
    gateless = seconds(plain.by(plain.given), clip.device, options.repeats)
    for experts in options.experts:
        step = Step(clip, classes, experts)
        cell = {"cell": "step", "model": clip.name, "C": classes, "K": experts}
        ours = seconds(step.by(step.ours), clip.device, repeats)
        cell["ours s"] = ours
        if time is None:
            cell["reference s"] = f"does not fit (needs {needed / 1e9:.0f} GB)"
        else:
            # The gate is the same code in both, so for the reference it is timed apart.
            gate = seconds(step.by(step.given), clip.device, options.repeats) - gateless
            reference = time + gate
            cell |= {"reference s": reference, "ratio text": reference / ours}
            cell |= {
                "with images s": reference + images,
                "ratio whole": (reference + images) / ours,
            }
        cells.append(cell | _count_entries(step, experts))
        if fits and experts:
            cells.append(_delivery_cell(step, experts, repeats))
    cells.append(_peak_cell(clip, classes, fits))
    return cells


def _names_cell(step: Step) -> Cell:
    """How many tokens the class names have, SOS and EOT not counted."""
    lengths = step.clip.tokenizer(list(step.names)).count_nonzero(dim=1) - 2
    tokens = {"min": int(lengths.min()), "max": int(lengths.max())}
    mean = float(lengths.float().mean())
    return {"cell": "names", "model": step.clip.name, "C": len(lengths), "mean": mean, **tokens}


def _agreement_cell(clip: FrozenClip, classes: int, experts: int) -> Cell:
    """Show that both forms compute the same logits and the same gradient of the context.

    Raises:
        RuntimeError: they do not.
    """
    step = Step(clip, classes, experts)
    ours, reference = step.outcome(step.ours), step.outcome(step.full_length())
    logits, gradient = (_difference(a, b) for a, b in zip(ours, reference, strict=True))
    cell = {"cell": "agreement", "model": clip.name, "C": classes, "K": experts}
    if not max(logits, gradient) <= TOLERANCE:
        raise RuntimeError(f"the forms disagree: logits by {logits}, gradient by {gradient}")
    return cell | {"logits": logits, "gradient": gradient}


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest entry."""
    return float((a - b).abs().max() / b.abs().max())


def _count_entries(step: Step, experts: int) -> Cell:
    """Bytes saved for backward and FLOPs of a step, in both forms."""
    memory, flops = step.count(step.ours)
    full_memory, full_flops = _reference_counts(step.clip, len(step.names), experts)
    return {
        "ours saved MB": memory / 1e6,
        "reference saved MB": full_memory / 1e6,
        "ratio memory": full_memory / memory,
        "ours GFLOP": flops / 1e9,
        "reference GFLOP": full_flops / 1e9,
        "ratio flops": full_flops / flops,
    }


@functools.cache
def _reference_counts(clip: FrozenClip, classes: int, experts: int) -> tuple[int, int]:
    """Exact bytes and FLOPs of the reference: linear in C, so from those at C = 2 and C = 4."""
    steps = [Step(clip, few, experts) for few in (2, 4)]
    at_2, at_4 = (step.count(step.full_length()) for step in steps)
    memory, flops = (a + (b - a) // 2 * (classes - 2) for a, b in zip(at_2, at_4, strict=True))
    return memory, flops


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


@torch.no_grad()
def _delivery_cell(step: Step, experts: int, repeats: int) -> Cell:
    """Encoding K experts, which happens once per round: together, or one after another."""
    device, full = step.clip.device, step.full_length()
    prompts = step.head.experts
    ours = seconds(lambda: step.ours(prompts), device, repeats)
    one = seconds(lambda: full(prompts[:1]), device, repeats)
    cell = {"cell": "delivery", "model": step.clip.name, "C": len(step.names), "K": experts}
    return cell | {"ours s": ours, "reference s": experts * one, "ratio": experts * one / ours}


def _peak_cell(clip: FrozenClip, classes: int, fits: bool) -> Cell:
    """By how much one step raises the peak of memory in a process that did nothing before."""
    cell = {"cell": "peak", "model": clip.name, "C": classes, "K": 0}
    ours = in_fresh_process(_peak, clip.name, str(clip.device), classes, False)
    cell["ours MB"] = ours / 1e6
    if fits:
        reference = in_fresh_process(_peak, clip.name, str(clip.device), classes, True)
        cell |= {"reference MB": reference / 1e6, "ratio": reference / ours}
    return cell


def _peak(model: str, device: str, classes: int, full_length: bool) -> int:
    clip = random_clip(model, torch.device(device))
    step = Step(clip, classes, 0)
    encoder = step.full_length() if full_length else step.ours
    return peak_bytes(step.by(encoder), clip.device)


def _variant_cells(clip: FrozenClip, classes: int, repeats: int) -> list[Cell]:
    """Our step with other layouts of the prompt, and several prompts in one call."""
    repeats = min(repeats, 2)
    variants: dict[str, dict[str, Any]] = {
        "middle": {"prompt.class-token-position": "middle"},
        "front": {"prompt.class-token-position": "front"},
        "class-specific": {"prompt.class-specific": True},
    }
    cells = []
    for name, prompt in variants.items():
        step = Step(clip, classes, 0, **prompt)
        time = seconds(step.by(step.ours), clip.device, repeats)
        cells.append({"cell": name, "model": clip.name, "C": classes, "ours s": time})
    cells.append(_template_cell(clip, classes, repeats))

    step = Step(clip, classes, 0)
    prompts = step.head.ctx.detach().expand(10, -1, -1).clone().requires_grad_()

    def encode(parts: Sequence[Tensor]) -> None:
        for part in parts:
            step.ours(part).sum().backward()

    together = seconds(lambda: encode([prompts]), clip.device, repeats)
    apart = seconds(lambda: encode(prompts.unbind()), clip.device, repeats)
    ten = {"cell": "10 prompts", "model": clip.name, "C": classes}
    return [*cells, ten | {"one call s": together, "10 calls s": apart, "ratio": apart / together}]


def _template_cell(clip: FrozenClip, classes: int, repeats: int) -> Cell:
    """Our step with vectors before or after the name; any template costs the reference the same."""
    cell: Cell = {"cell": "template", "model": clip.name, "C": classes}
    full = _reference_counts(clip, classes, 0)[1]
    for name, template in {
        "vectors first": "{soft:16} {class}, drawn as an emoji.",
        "name first": "{class}, {soft:16} drawn as an emoji.",
    }.items():
        step = Step(clip, classes, 0, **{"prompt.template": template})
        cell[f"{name}, s"] = seconds(step.by(step.ours), clip.device, repeats)
        cell[f"ratio flops, {name}"] = full / step.count(step.ours)[1]
    cell["reference s"] = seconds(step.by(step.full_length()), clip.device, 1)
    return cell | {"ratio": cell["reference s"] / cell["vectors first, s"]}


def _ratios(cells: list[Cell]) -> dict[str, float]:
    """The keys of the last line, as far as their cells are in this run."""
    sought = {
        "ratio_text": ("ratio text", 102, 0),
        "ratio_text_moe": ("ratio text", 102, 9),
        "ratio_whole": ("ratio whole", 102, 0),
        "ratio_whole_moe": ("ratio whole", 102, 9),
        "ratio_memory": ("ratio memory", 1000, 0),
        "ratio_memory_moe": ("ratio memory", 1000, 9),
        "ratio_flops": ("ratio flops", 102, 0),
    }
    steps = {(c["C"], c["K"]): c for c in cells if c["cell"] == "step" and c["model"] == MAIN}
    found = {
        key: steps[classes, experts][column]
        for key, (column, classes, experts) in sought.items()
        if column in steps.get((classes, experts), {})
    }
    peaks = [c for c in cells if c["cell"] == "peak" and c["model"] == MAIN and "ratio" in c]
    if peaks:
        found["ratio_peak"] = max(peaks, key=lambda cell: cell["C"])["ratio"]
    return found


if __name__ == "__main__":
    main()
