"""Train the "mini" CLIP from scratch on the pairs of `mini_clip_pairs` and save it for open_clip.

The loss is CLIP's, with every image of a batch that carries the same caption counted as a match.
"""

import argparse
import json
import math
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
from datasets import load_dataset
from mini_clip_pairs import SOURCES, captions, collect, disguised, distances, on_white
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

ASSETS = Path("pfedmoap_flwr/assets")
CONTEXT = 32
CONTROL_STEP = 10  # every tenth federated drawing tests the check that keeps them out
# How often a source is drawn per epoch: emoji are few and closest to what will be asked.
REPEATS = {"emojione": 4, "fxemoji": 4, "streamline": 3, "tuxpaint": 2}


class Pairs(NamedTuple):
    """Drawings N x 4 x S x S (uint8), captions N x V (rows of `tokens` U x 32), draws per epoch."""

    drawings: Tensor
    captions: Tensor
    tokens: Tensor
    repeats: Tensor


def prepare(args: argparse.Namespace) -> Path:
    """Decode all pairs, drop those that look like a federated drawing, write one file in `work`."""
    key = f"{args.seed}-{args.variants}-{args.closest:g}" + "-readable" * args.readable
    out = args.work / f"pairs-{key}.npz"
    if out.exists():
        return out
    pairs = collect(args.work)
    drawings = np.stack([pair.drawing for pair in pairs])
    files = [str(args.federated / f"{split}.parquet") for split in ("train", "validation", "test")]
    rows = load_dataset("parquet", data_files=files, split="train")
    theirs = np.stack([np.asarray(image) for image in rows["image"]])
    caught = (distances(disguised(theirs[::CONTROL_STEP]), theirs) < args.closest).mean()
    print(f"{caught:.1%} of disguised federated drawings are caught")
    assert caught > 0.95, "the check that keeps federated drawings out is too weak"
    keep = distances(on_white(drawings), theirs) >= args.closest
    found = Counter(pair.source for pair in pairs)
    kept = Counter(pair.source for pair, ok in zip(pairs, keep, strict=True) if ok)
    for source in SOURCES:
        print(f"{source:>18}: {kept[source]} of {found[source]} pairs kept")

    chance = random.Random(args.seed)
    pairs = [pair for pair, ok in zip(pairs, keep, strict=True) if ok]
    texts = [captions(pair, args.variants, chance, args.readable) for pair in pairs]
    distinct = dict.fromkeys(text for group in texts for text in group)
    row_of = {text: row for row, text in enumerate(distinct)}
    np.savez(
        out,
        drawings=drawings[keep].transpose(0, 3, 1, 2),
        captions=np.array([[row_of[text] for text in group] for group in texts]),
        tokens=open_clip.tokenize(list(row_of), context_length=CONTEXT).numpy(),
        repeats=np.array([REPEATS.get(pair.source, 1) for pair in pairs]),
    )
    return out


def load_pairs(path: Path) -> Pairs:
    with np.load(path) as arrays:
        return Pairs(*(torch.from_numpy(arrays[name]) for name in Pairs._fields))


def augment(drawings: Tensor, size: int) -> Tensor:
    """B x 4 x S x S uint8 -> B x 3 x size x size, normalised.

    Random crop, mirror and tilt; colours turned, faded, greyed; a random background half the time.
    """
    b = len(drawings)
    rgba = drawings.float() / 255
    rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)  # premultiplied: no dark fringes

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(b, *shape).uniform_(low, high)

    scale, stretch, angle = uniform(0.65, 1.45), uniform(0.88, 1.13), uniform(-0.25, 0.25)
    flip = torch.where(torch.rand(b) < 0.5, -1.0, 1.0)
    shift = (1 - scale).abs().unsqueeze(1) * uniform(-1, 1, 2)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [
        torch.stack([cos * stretch * flip, -sin, shift[:, 0]], 1),
        torch.stack([sin * flip * stretch, cos, shift[:, 1]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [b, 4, size, size], align_corners=False)
    rgba = F.grid_sample(rgba, grid, align_corners=False)

    def mask(share: float) -> Tensor:
        return (torch.rand(b, 1, 1, 1) < share).float()

    ground = torch.lerp(torch.ones(b, 3, 1, 1), uniform(0, 1, 3, 1, 1), mask(0.5))
    rgb = rgba[:, :3] + ground * (1 - rgba[:, 3:])

    # Hue turns about the grey axis (Rodrigues); the pull towards grey sets saturation.
    hue = uniform(-0.5, 0.5) * (torch.rand(b) < 0.6)
    axis = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    cos, sin = hue.cos().view(b, 1, 1), hue.sin().view(b, 1, 1)
    turn = cos * torch.eye(3) + sin * cross + (1 - cos) * axis
    rgb = torch.einsum("bij,bjhw->bihw", turn, rgb)
    saturation = uniform(0.5, 1.5, 1, 1, 1) * (1 - mask(0.12))
    rgb = torch.lerp(rgb.mean(1, keepdim=True), rgb, saturation)
    middle = rgb.mean((1, 2, 3), keepdim=True)
    rgb = (rgb - middle) * uniform(0.6, 1.3, 1, 1, 1) + middle + uniform(-0.12, 0.12, 1, 1, 1)
    mean = torch.tensor(OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(OPENAI_DATASET_STD).view(3, 1, 1)
    return ((rgb.clamp(0, 1) - mean) / std).contiguous(memory_format=torch.channels_last)


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
    """Symmetric cross entropy of B x D unit features; equal caption rows share the target."""
    logits = scale * images @ texts.T
    same = (rows.unsqueeze(1) == rows).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def new_model(config: Path, init: Path | None) -> Any:
    """An open_clip model of the JSON config, untrained or with the weights of `init`."""
    open_clip.add_model_config(config)
    model = open_clip.create_model(config.stem, pretrained=init and str(init))
    return model.to(memory_format=torch.channels_last)


def text_features(model: Any, tokens: Tensor) -> Tensor:
    """B x 32 tokens -> B x D unit features, as `encode_text` does, but without the empty tail.

    The mask is causal, so what follows the end token cannot change it; captions are short.
    """
    ends = tokens.argmax(1)
    length = int(ends.max()) + 1
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)[torch.arange(len(x)), ends] @ model.text_projection
    return F.normalize(x, dim=-1)


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential average of weights and buffers that forgets the start sooner."""

    def update(averages: Any, values: Any, count: Any) -> None:
        warm = (1 + int(count)) / (10 + int(count))
        get_ema_multi_avg_fn(min(decay, warm))(averages, values, count)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


def optimizer_for(model: nn.Module, lr: float, decay: float) -> torch.optim.AdamW:
    """AdamW; gains, biases, the scale and the token table are not decayed."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_free = parameter.ndim < 2 or "embedding" in name
        (free if is_free else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


def save(state: dict[str, Tensor], path: Path, note: dict[str, str]) -> None:
    """fp16 safetensors, renamed into place so that readers never see half a file."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in state.items()}, partial, metadata=note)
    partial.chmod(0o644)
    partial.rename(path)


def train(args: argparse.Namespace) -> None:
    """Train, keeping an exponential average of the weights, which is what is saved."""
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    pairs = load_pairs(prepare(args))
    model = new_model(args.config, args.init).train()
    size = open_clip.get_model_config(args.config.stem)["vision_cfg"]["image_size"]
    # Captions use a few thousand of the 49,408 tokens: only those rows of the table take part. They
    # keep their order, so the end token is still the largest.
    table = model.token_embedding.weight.detach().clone()
    used, tokens = pairs.tokens.unique(return_inverse=True)
    model.token_embedding = nn.Embedding.from_pretrained(table[used], freeze=False)
    average = moving_average(model, args.ema)
    optimizer = optimizer_for(model, args.lr, args.decay)
    order = torch.arange(len(pairs.repeats)).repeat_interleave(pairs.repeats)
    per_epoch = len(order) // args.batch
    steps, warmup = args.epochs * per_epoch, per_epoch
    print(f"{len(pairs.repeats)} pairs, {len(order)} draws an epoch, {steps} steps")
    started, step, losses = time.monotonic(), 0, []
    for epoch in range(args.epochs):
        for batch in order[torch.randperm(len(order))].split(args.batch)[:per_epoch]:
            warm, done = step / warmup, (step - warmup) / max(1, steps - warmup)
            rate = args.lr * (warm if warm < 1 else 0.5 * (1 + math.cos(math.pi * done)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            chosen = torch.randint(pairs.captions.shape[1], (len(batch), 1))
            rows = pairs.captions[batch].gather(1, chosen).squeeze(1)
            images = augment(pairs.drawings[batch], size)
            with torch.autocast("cpu", torch.bfloat16):
                ours = model.encode_image(images, normalize=True)
                theirs = text_features(model, tokens[rows])
            scale = model.logit_scale.exp()
            loss = contrastive_loss(ours.float(), theirs.float(), scale, rows)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            average.update_parameters(model)
            losses.append(loss.item())
            step += 1
        minutes = (time.monotonic() - started) / 60
        print(f"epoch {epoch + 1} loss {np.mean(losses):.3f} {minutes:.1f} min", flush=True)
        losses.clear()
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            note = {"epochs": f"{epoch + 1}/{args.epochs}", "seed": str(args.seed)}
            state = average.module.state_dict()
            rows_learned = state["token_embedding.weight"]
            state["token_embedding.weight"] = table.index_copy(0, used, rows_learned)
            save(state, args.out, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for downloads, reused")
    add("--federated", type=Path, default=ASSETS / "emoji-domains", help="drawings to keep out")
    add("--config", type=Path, default=ASSETS / "clip" / "mini.json")
    add("--out", type=Path, default=ASSETS / "clip" / "mini.safetensors")
    add("--init", type=Path, help="weights to go on from")
    add("--readable", action="store_true", help="word half of the subgroups as one would say them")
    add("--epochs", type=int, default=40)
    add("--batch", type=int, default=128)
    add("--lr", type=float, default=6e-4)
    add("--decay", type=float, default=0.1)
    add("--ema", type=float, default=0.998)
    add("--variants", type=int, default=24, help="captions per drawing")
    add("--closest", type=float, default=15.0, help="smallest pixel difference kept")
    add("--save-every", type=int, default=4, help="epochs between checkpoints")
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    settings = {k: str(v) for k, v in vars(args).items() if not isinstance(v, Path)}
    print(json.dumps(settings))
    train(args)


if __name__ == "__main__":
    main()
