"""Zero-shot accuracy by domain: images with their own labels, and as the released code pairs them.

python scripts/released_indexing.py [--seeds 0 1 2]

The paper's released code gives a client the labels of its images, but the domain's first paths
(`paths[i]` beside `labels[rows[i]]`), and takes class names from a Python set, in whose order
they change from process to process. Both are re-enacted here on emoji-domains: the test images of
the default partition, the same CLIP, features and sentence in all columns.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from pfedmoap_flwr.clip.features import Reading, read_images
from pfedmoap_flwr.clip.load import load_clip
from pfedmoap_flwr.clip.settings import ClipSettings
from pfedmoap_flwr.data.images import ImageData, load_images
from pfedmoap_flwr.data.partition import ClientRows, partition
from pfedmoap_flwr.data.settings import DataSettings
from pfedmoap_flwr.randomness import numpy_generator

WAYS = ("here", "released: paths", "released: class order", "released: both")


def main(seeds: Sequence[int]) -> None:
    """Print a Markdown table: domains by ways, in percent, mean over clients and seeds."""
    images, clip = load_images("emoji-domains"), load_clip(ClipSettings(), "cpu")
    features = read_images(clip, images.splits["test"], Reading())
    text = clip.zeroshot(images.classnames, images.template)
    predicted = (features @ text.t()).argmax(dim=1).numpy()
    rows: dict[str, list[list[float]]] = {domain: [] for domain in images.domains}
    for seed in seeds:
        # The order in which a set gives the names: what stands at label c is another class
        order = numpy_generator(seed, "set").permutation(len(images.classnames))
        for client in partition(images, DataSettings(), seed):
            rows[client.domain].append(accuracies(images, client, predicted, order))
    print(f"| domain | {' | '.join(WAYS)} |\n|---{'|---' * len(WAYS)}|")
    means = {domain: np.mean(found, axis=0) for domain, found in rows.items()}
    for domain, values in {**means, "mean": np.mean(list(means.values()), axis=0)}.items():
        print(f"| {domain} | {' | '.join(f'{100 * value:.1f}' for value in values)} |")
    print(f"\nchance: {100 / len(images.classnames):.1f}")


def accuracies(
    images: ImageData, client: ClientRows, predicted: np.ndarray, order: np.ndarray
) -> list[float]:
    """Return one client's accuracy in each of WAYS from the predicted class of each test image."""
    labels, domains = images.column("test", "label"), images.column("test", "domain")
    own = client.rows["test"]
    of_domain = np.flatnonzero(domains == domains[own[0]])
    shown = of_domain[: len(own)]
    # A classifier with shuffled names answers with the place at which the right name now stands
    place = np.argsort(order)
    pairs = [
        (predicted[own], labels[own]),
        (predicted[shown], labels[own]),
        (place[predicted[own]], labels[own]),
        (place[predicted[shown]], labels[own]),
    ]
    return [float((answer == label).mean()) for answer, label in pairs]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    main(parser.parse_args().seeds)
