"""The tables and figures of pFedMoAP's paper, each as one comparison.

What the paper leaves open is chosen in the file of conf/ and said in docs/reproduce.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pfedmoap_flwr import config
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.settings import Value

FIVE = ("flowers102", "oxford-pets", "food101", "caltech101", "dtd")
FEW = ("pfedmoap", "zeroshot", "coop", "promptfl", "fedprox")
TRAINED = ("pfedmoap", "promptfl", "fedprox")
OURS = ("pfedmoap",)


@dataclass(frozen=True)
class Experiment:
    """what: in words. conf: its file. sweeps: over its settings, besides the data sets."""

    what: str
    conf: str
    methods: Sequence[str]
    sets: Sequence[str]
    sweeps: Mapping[str, Sequence[Value]] = field(default_factory=dict)

    def swept(self, only: Sequence[str] = ()) -> dict[str, Sequence[Value]]:
        """Return what is swept, the data sets first; `only`: of them these alone.

        Raises UsageError for a data set that the experiment does not have.
        """
        if unknown := [name for name in only if name not in self.sets]:
            raise UsageError(f"--only {unknown[0]}: must be one of {', '.join(self.sets)}")
        return {"data.name": only or self.sets, **self.sweeps}

    def path(self) -> Path:
        """Return the file of settings. Raises UsageError where it is not there."""
        ours = config.shipped()
        if self.conf not in ours:
            raise UsageError(f"{self.conf}.toml did not come with this package; run in a clone")
        return ours[self.conf]


EXPERIMENTS = {
    "table1": Experiment(
        "pathological clients, RN50",
        "table1",
        (*FEW, "promptfl_ft", "fedper", "fedamp", "pfedprompt", "fedotp"),
        FIVE,
        {"pfedmoap.lambda": (0.5, 0.0)},
    ),
    "table2": Experiment("CIFAR, Dir(0.5)", "table2", FEW, ("cifar10", "cifar100")),
    "table3": Experiment("DomainNet", "table3", FEW, ("domainnet",)),
    "table4": Experiment("Office-Caltech10", "table4", FEW, ("office-caltech10",)),
    "table6": Experiment(
        "differential privacy, epsilon 50 and 25",
        "table6",
        TRAINED,
        FIVE,
        {"privacy.noise": (0.369, 0.552)},
    ),
    "table7": Experiment(
        "the gate local or averaged",
        "table7",
        OURS,
        FIVE,
        {"pfedmoap.gate-shared": (False, True)},
    ),
    "table8": Experiment(
        "experts on DomainNet",
        "table8",
        OURS,
        ("domainnet",),
        {"pfedmoap.num-experts": (4, 9, 14, 19, 24, 29)},
    ),
    "table9": Experiment(
        "the gate's width",
        "table9",
        OURS,
        FIVE,
        {"pfedmoap.d-gating": (32, 64, 128, 256, 512, 1024)},
    ),
    "figure3": Experiment("shots", "figure3", TRAINED, FIVE, {"data.shots": (1, 2, 4, 8, 16)}),
    "figure4": Experiment(
        "the weight of the local logits",
        "figure4",
        OURS,
        FIVE,
        {"pfedmoap.lambda": (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)},
    ),
    "figure5": Experiment(
        "experts on CIFAR-10",
        "figure5",
        OURS,
        ("cifar10",),
        {"pfedmoap.num-experts": (4, 9, 14, 19, 24, 29, 34, 39)},
    ),
    "figure6": Experiment("whom the gates listen to", "figure6", OURS, FIVE),
}


def find(name: str) -> Experiment:
    """Return an experiment. Raises UsageError where the paper has no such one."""
    if name not in EXPERIMENTS:
        raise UsageError(f"reproduce {name}: there are {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]
