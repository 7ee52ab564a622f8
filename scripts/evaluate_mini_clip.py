"""Measure a CLIP on `emoji-domains`: zero-shot accuracy per domain, and linear probes beside it.

`--split validation` compares prompt templates; the test split is for the chosen one only.
"""

import argparse
import platform
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from datasets import Dataset, load_dataset
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

ASSETS = Path("pfedmoap_flwr/assets")
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Features(NamedTuple):
    """Unit image features N x D, labels N and domains N of one split."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    domain: NDArray[np.int64]

    def of(self, domain: int) -> "Features":
        here = self.domain == domain
        return Features(self.x[here], self.y[here], self.domain[here])


class Clip:
    """An open_clip model with its own preprocessing and tokenizer."""

    def __init__(self, config: Path, weights: Path) -> None:
        open_clip.add_model_config(config)
        name = config.stem
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(
            name, pretrained=str(weights)
        )
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(name)

    @torch.no_grad()
    def images(self, rows: Dataset) -> Features:
        chunks = []
        for start in range(0, len(rows), 256):
            batch = rows[start : start + 256]["image"]
            pixels = torch.stack([self.preprocess(image) for image in batch])
            chunks.append(self.model.encode_image(pixels, normalize=True))
        return Features(
            torch.cat(chunks).numpy(), np.array(rows["label"]), np.array(rows["domain"])
        )

    @torch.no_grad()
    def texts(self, classnames: list[str], template: str) -> NDArray[np.float32]:
        """C x D unit features of the filled template."""
        tokens = self.tokenizer([template.format(name) for name in classnames])
        return F.normalize(self.model.encode_text(tokens), dim=-1).numpy()


def accuracy(predicted: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    return float((predicted == truth).mean())


def probe(train: Features, tune: Features, asked: list[Features]) -> tuple[list[float], float]:
    """Accuracies of the logistic regression whose C does best on `tune`, and that C."""
    fits = [LogisticRegression(C=c, max_iter=2000).fit(train.x, train.y) for c in STRENGTHS]
    best = max(fits, key=lambda fit: accuracy(fit.predict(tune.x), tune.y))
    return [accuracy(best.predict(part.x), part.y) for part in asked], best.C


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ASSETS / "emoji-domains")
    parser.add_argument("--config", type=Path, default=ASSETS / "clip" / "mini.json")
    parser.add_argument("--weights", type=Path, default=ASSETS / "clip" / "mini.safetensors")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--template", nargs="+", default=["a drawing of {}."])
    parser.add_argument("--no-probe", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.split == "test" and len(args.template) > 1:
        parser.error("templates are compared on the validation split, never on test")

    torch.set_num_threads(args.threads)
    names = ("train", "validation", "test")
    files = {name: str(args.data / f"{name}.parquet") for name in names}
    data = load_dataset("parquet", data_files=files)
    classnames = data["train"].features["label"].names
    domains = data["train"].features["domain"].names
    clip = Clip(args.config, args.weights)
    asked = clip.images(data[args.split])
    parts = [asked.of(domain) for domain in range(len(domains))]
    chance = 1 / len(classnames)
    print(f"{args.split} split, {len(classnames)} classes, chance {chance:.2%}")
    print(f"torch {torch.__version__}, {args.threads} threads, {platform.machine()}\n")

    zero_shot: list[float] = []
    for template in args.template:
        text = clip.texts(classnames, template)
        zero_shot = [accuracy((part.x @ text.T).argmax(1), part.y) for part in parts]
        shares = " ".join(f"{value:.2%}" for value in zero_shot)
        print(f"{template!r}: mean {np.mean(zero_shot):.2%}, by domain {shares}")
    if args.no_probe:
        return

    train, tune = clip.images(data["train"]), clip.images(data["validation"])
    joint, strength = probe(train, tune, parts)
    print(f"\nprobe on all domains: C = {strength:g}\n")
    print(
        "| domain | images | zero-shot | ratio to chance | probe, all domains | probe, own domain |"
    )
    print("|---|---|---|---|---|---|")
    for number, domain in enumerate(domains):
        (own,), _ = probe(train.of(number), tune.of(number), [parts[number]])
        shot = zero_shot[number]
        cells = f"{len(parts[number].y)} | {shot:.1%} | {shot / chance:.1f} | {joint[number]:.1%}"
        print(f"| {domain} | {cells} | {own:.1%} |")


if __name__ == "__main__":
    main()
