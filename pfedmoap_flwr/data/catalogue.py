"""Every data set that has a name: where it lies, what its columns and classes are called.

Facts and their sources are in docs/data.md. Class names are files of assets/classnames, in label
order: they are the published ones in readable words, and in CoOp's order where CoOp has the set.
"""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pfedmoap_flwr.assets import asset
from pfedmoap_flwr.errors import UsageError

PHOTO = "a photo of a {}."
FOLDER = "folder"
BUNDLED = "emoji-domains"
HUB = "hub:"
"""How the name of any other data set of the hub begins: hub:ORG/NAME."""


@dataclass(frozen=True)
class CoopLayout:
    """Where CoOp's DATASETS.md puts a data set: `<folder>/<images>/...` and a file of the split."""

    folder: str
    images: str
    split: str


@dataclass(frozen=True)
class Source:
    """One data set; `hub` is its name on the hub, "" where it is not there.

    `holdout` says where splits come from. "published": the hub's; what is missing is held out of
    train. "coop": all images together, divided 50/20/30 by class. "coop-test": the published test
    images, and 20% of the others for validation. `subset`: published classes that are not in our
    list are left out, as are those `dropped`. `size` and `num_domains` count the images and domains
    that are used; 0: not known. `partition` and `clients` are the paper's; "" and 0 where it does
    not use the set.
    """

    name: str
    hub: str = ""
    template: str = PHOTO
    image: str = "image"
    label: str = "label"
    domain: str = ""
    splits: tuple[str, ...] = ("train", "test")
    holdout: Literal["published", "coop", "coop-test"] = "published"
    fixes: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    subset: bool = False
    coop: CoopLayout | None = None
    licence: str = "unknown"
    size: int = 0
    num_domains: int = 1
    partition: str = ""
    clients: int = 0

    @property
    def is_open(self) -> bool:
        """Whether its classes are whatever its images have."""
        return self.name == FOLDER or self.name.startswith(HUB)

    @property
    def classnames(self) -> tuple[str, ...]:
        """The published names in readable words, in label order; () where any will do."""
        if self.is_open or self.name == BUNDLED:
            return ()
        return tuple(json.loads(asset(f"classnames/{self.name}.json").read_text()))

    def readable(self, name: str) -> str:
        """Return a published class name as words: "T - shirt / top" -> "t-shirt or top"."""
        return self.fixes.get(name) or name.replace("_", " ").strip(" ?")


_CALTECH_FIXES = {
    "airplanes": "airplane",
    "faces": "face",
    "leopards": "leopard",
    "motorbikes": "motorbike",
    # Raw folder names, as in the original archive
    "Faces": "face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "water_lilly": "water lily",
}
_FASHION_FIXES = {"T - shirt / top": "t-shirt or top", "T-shirt/top": "t-shirt or top"}

_SOURCES = (
    Source(BUNDLED, template="a drawing of {}.", licence="see its README"),
    Source(FOLDER, domain="domain", splits=("train",), licence="your own"),
    Source(
        "flowers102",
        hub="dpdl-benchmark/oxford_flowers102",
        size=8_189,
        template="a photo of a {}, a type of flower.",
        splits=("train", "validation", "test"),
        holdout="coop",
        coop=CoopLayout("oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json"),
        partition="pathological",
        clients=10,
    ),
    Source(
        "oxford-pets",
        hub="timm/oxford-iiit-pet",
        size=7_349,
        template="a photo of a {}, a type of pet.",
        holdout="coop-test",
        coop=CoopLayout("oxford_pets", "images", "split_zhou_OxfordPets.json"),
        licence="CC BY-SA 4.0",
        partition="pathological",
        clients=10,
    ),
    Source(
        "food101",
        hub="ethz/food101",
        size=101_000,
        template="a photo of {}, a type of food.",
        splits=("train", "validation"),
        holdout="coop",
        coop=CoopLayout("food-101", "images", "split_zhou_Food101.json"),
        licence="scientific fair use",
        partition="pathological",
        clients=10,
    ),
    Source(
        "caltech101",
        hub="flwrlabs/caltech101",
        size=8_242,
        splits=("train",),
        holdout="coop",
        fixes=_CALTECH_FIXES,
        dropped=("faces_easy", "Faces_easy", "background_google", "BACKGROUND_Google"),
        coop=CoopLayout("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json"),
        licence="CC BY 4.0",
        partition="pathological",
        clients=10,
    ),
    Source(
        "dtd",
        hub="tanganke/dtd",
        size=5_640,
        template="{} texture.",
        holdout="coop",
        coop=CoopLayout("dtd", "images", "split_zhou_DescribableTextures.json"),
        licence="for research",
        partition="pathological",
        clients=10,
    ),
    Source(
        "cifar10",
        hub="uoft-cs/cifar10",
        size=60_000,
        image="img",
        partition="dirichlet",
        clients=100,
    ),
    Source(
        "cifar100",
        hub="uoft-cs/cifar100",
        size=60_000,
        image="img",
        label="fine_label",
        # The hub's class 26 has lost its last letter
        fixes={"cra": "crab"},
        partition="dirichlet",
        clients=100,
    ),
    Source(
        "domainnet",
        hub="wltjr1007/DomainNet",
        num_domains=6,
        domain="domain",
        subset=True,
        licence="other",
        partition="dirichlet-domain",
        clients=30,
    ),
    Source(
        "office-caltech10",
        size=2_533,
        num_domains=4,
        domain="domain",
        splits=("train",),
        fixes={"back_pack": "backpack"},
        partition="dirichlet-domain",
        clients=20,
    ),
    Source(
        "fashion-mnist",
        hub="zalando-datasets/fashion_mnist",
        size=70_000,
        fixes={**_FASHION_FIXES, "Trouser": "trousers"},
        licence="MIT",
    ),
    Source(
        "office-home",
        hub="flwrlabs/office-home",
        size=15_588,
        num_domains=4,
        domain="domain",
        splits=("train",),
        fixes={"Flipflops": "flip-flops", "Postit_Notes": "post-it notes"},
        licence="fair-use notice",
    ),
    Source(
        "pacs", hub="flwrlabs/pacs", size=9_991, num_domains=4, domain="domain", splits=("train",)
    ),
)
CATALOGUE = {source.name: source for source in _SOURCES}


def find_source(name: str) -> Source:
    """Return a data set's entry. Raises UsageError with the nearest names where there is none."""
    if name in CATALOGUE:
        return CATALOGUE[name]
    if name.startswith(HUB):
        repository = name.removeprefix(HUB)
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
            raise UsageError(f"setting data.name={name!r}: must be hub:ORG/NAME, as the hub has it")
        return Source(name, hub=repository, splits=("train",), licence="see its card")
    near = difflib.get_close_matches(name, CATALOGUE, n=3, cutoff=0.4)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(
        f"setting data.name={name!r}: unknown data set; {meant}there are {', '.join(CATALOGUE)}, "
        "and hub:ORG/NAME"
    )
