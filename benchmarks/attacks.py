"""What an uploaded prompt tells about its client: two attacks, with and without noise.

`python -m benchmarks.attacks [--quick]`: PromptFL and pFedMoAP on emoji-domains with mini CLIP,
5 clients with 11 of the 55 classes each and 4 images of a class, 3 rounds, seeds 0, 1, 2. The
attacker is whoever sees an upload P' and the prompt P that was sent for it (the server; of
pFedMoAP's pool, other clients). Scores are of the last round.

prior       which classes a client trains on. CLIP's own sentence features stand for images, so that
            the attacker needs none: score of class c = mean change of log p(c) over all of them.
own         the same with class c's own sentence alone.
membership  which images a client trained on: score = loss under P - loss under P', of its training
            images against its own validation and test images.

AUC by ranks, of each client by itself, mean over clients; chance is 0.5. Noise is at the client, of
std z C, with C the setting privacy.clip-norm.
"""

import argparse
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import report
from pfedmoap_flwr import config, methods
from pfedmoap_flwr.federation.privacy import noised_upload
from pfedmoap_flwr.methods.base import Method, PromptHead, Split, Upload
from pfedmoap_flwr.methods.parts.privacy import epsilon_after
from pfedmoap_flwr.training import local
from pfedmoap_flwr.training.exchange import make_work
from pfedmoap_flwr.training.node import Node, node_of

CLIP_NORM = 0.1
NOISES = (None, 0.05, 1.0)
CLIENTS, ROUNDS, SEEDS = 5, 3, 3
DATA: dict[str, Any] = {
    "data.partition": "pathological",
    "data.num-clients": CLIENTS,
    "data.shots": 4,
}
SPLITS = ("train", "validation", "test")


def auc(positive: Tensor, negative: Tensor) -> float:
    """Return how often a positive score (n,) is above a negative one (m,); a tie counts half."""
    apart = positive.double()[:, None] - negative.double()[None, :]
    return float((apart > 0).double().mean() + (apart == 0).double().mean() / 2)


@torch.no_grad()
def log_probabilities(head: PromptHead, ctx: Tensor, features: Tensor) -> Tensor:
    """Return log p (n, C) of images (n, d) under a prompt."""
    head.load({"ctx": ctx})
    return head.predict(features, head.encode()).log_softmax(dim=-1)


def attacks(
    head: PromptHead, sentences: Tensor, before: Tensor, after: Tensor, splits: Mapping[str, Split]
) -> dict[str, float]:
    """Return each attack's AUC on one client."""

    def changes(features: Tensor) -> Tensor:
        old = log_probabilities(head, before, features)
        return log_probabilities(head, after, features) - old

    held = splits["train"].labels.bincount(minlength=len(sentences)) > 0
    change = changes(sentences)
    found = {}
    for name, score in (("prior", change.mean(0)), ("own", change.diagonal())):
        found[name] = auc(score[held], score[~held])
    # The change of log p at an image's label is by how much its loss fell
    gains = {
        name: changes(data.features).gather(1, data.labels[:, None])[:, 0]
        for name, data in splits.items()
    }
    others = torch.cat([gains["validation"], gains["test"]])
    return found | {"membership": auc(gains["train"], others)}


def run(name: str, noise: float | None, seed: int, rounds: int) -> dict[str, float]:
    """Return what the attacks find in the last round of a run, and the accuracy it ends with."""
    flat: dict[str, Any] = {**DATA, "method": name, "seed": seed}
    if noise is not None:
        flat |= {"privacy.unit": "client", "privacy.noise": noise, "privacy.clip-norm": CLIP_NORM}
    settings = config.parse(flat)
    kind = methods.load(name)
    reading = kind.reads(settings.own)
    node = node_of(settings.clip, settings.data, seed, "cpu", reading)
    method = methods.make(name, settings, settings.own, node.clip, node.federated.task)
    return _attacked(method, node, noise, rounds)


def _attacked(
    method: Method[Any, Any], node: Node, noise: float | None, rounds: int
) -> dict[str, float]:
    task = node.federated.task
    plain: Any = PromptHead(method)
    sentences = node.clip.zeroshot(task.classnames, task.template)
    state, kept = method.start(), dict[int, dict[str, Tensor]]()
    cells: list[dict[str, float]] = []
    for number in range(1, rounds + 1):
        sent, uploads = method.send(state, range(CLIENTS), train=True), {}
        for i in range(CLIENTS):
            splits = {split: node.split(i, split) for split in SPLITS}
            work = make_work(
                method, i, number, splits.__getitem__, sent[i], kept.get(i, {}), sent[i]
            )
            local.train(method, [work])
            kept[i], tensors = work.head.state(), method.upload(work)
            moved = float((tensors["ctx"] - sent[i]["ctx"]).norm())
            if noise is not None:
                tensors = noised_upload(method, work, tensors)
            uploads[i] = Upload(tensors, len(work.images))
            if number == rounds:
                cell = attacks(plain, sentences, sent[i]["ctx"], tensors["ctx"], splits)
                cell |= {"held": float(splits["train"].labels.unique().numel()), "moved": moved}
                right = local.accuracies(work.head, {"test": splits["test"]})["test"]
                cells.append(cell | {"personal": right, "images": float(len(splits["train"]))})
        method.merge(state, uploads)
        state.round = number
    plain.load(state.shared)
    for i, cell in enumerate(cells):
        cell["global"] = local.accuracies(plain, {"test": node.split(i, "test")})["test"]
    return {key: statistics.fmean(cell[key] for cell in cells) for key in cells[0]}


def measure(name: str, noise: float | None, seeds: int, rounds: int) -> dict[str, Any]:
    """Return one cell: means over seeds, and standard deviations of the AUCs."""
    runs = [run(name, noise, seed, rounds) for seed in range(seeds)]
    cell: dict[str, Any] = {"cell": "attack", "method": name}
    cell["noise"] = "none" if noise is None else noise
    cell["epsilon"] = epsilon_after(rounds, noise, 1e-5) if noise else "-"
    for key in runs[0]:
        values = [found[key] for found in runs]
        cell[key] = round(statistics.fmean(values), 4)
        if key in ("prior", "own", "membership") and seeds > 1:
            cell[f"{key}_std"] = round(statistics.stdev(values), 4)
    return cell


def main() -> None:
    """Measure all cells and report them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, one round")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    noises, size = ((None,), (1, 1)) if quick else (NOISES, (SEEDS, ROUNDS))
    cells = []
    for name in ("promptfl", "pfedmoap"):
        for noise in noises:
            cells.append(measure(name, noise, *size))
            print(cells[-1], flush=True)
    report("attacks", torch.device("cpu"), cells)


if __name__ == "__main__":
    main()
