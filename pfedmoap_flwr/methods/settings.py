"""What a method reads of a run's settings, besides its own section."""

from typing import Literal

from pydantic import ValidationInfo, field_validator

from pfedmoap_flwr.clip.settings import Position
from pfedmoap_flwr.clip.template import Count, Template, coop, parse
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.parts.schedules import cosine
from pfedmoap_flwr.settings import FilePath, Section, key_of, setting

REPLACED = ("n_ctx", "ctx_init", "class_token_position")
"""What a template says in their place."""


class PromptSettings(Section):
    """CoOp's prompt options, or a template in their place."""

    n_ctx: int = setting(16, "context tokens M", low=1)
    ctx_init: str = setting("", "words to start from instead of N(0, 0.02); sets n-ctx")
    class_specific: bool = setting(False, "one context per class")
    class_token_position: Position = setting("end", "class name's place")
    template: str = setting(
        "", "as '{soft:4} {class}, a {soft:2}.'; instead of n-ctx, ctx-init, class-token-position"
    )
    names: FilePath = setting("", "TOML or JSON file of several names of a class; empty: its own")
    verbalizer: Literal["mean", "max", "weights"] = setting(
        "mean", "what a class makes of its names: their mean, the best, or by learned weights"
    )
    reparametrise: Literal["none", "mlp", "lstm"] = setting(
        "none", "a network that writes the learned vectors (P-tuning)"
    )
    calibrate: bool = setting(
        False, "measure with the log probabilities of an image without content taken off"
    )
    depth: int = setting(1, "text layers that vectors enter anew; 1: the input alone", low=1)

    @field_validator("template")
    @classmethod
    def _it_is_one_and_the_only_one(cls, text: str, info: ValidationInfo) -> str:
        if text:
            parse(text, lambda words: len(words.split()))
            for name in REPLACED:
                default = cls.model_fields[name].default
                if info.data.get(name, default) != default:
                    key = key_of(name)
                    raise ValueError(f"says what prompt.{key} says; leave that at {default!r}")
        return text

    @field_validator("verbalizer")
    @classmethod
    def _it_has_names(cls, verbalizer: str, info: ValidationInfo) -> str:
        if verbalizer != "mean" and not info.data.get("names"):
            raise ValueError("it is about the names of prompt.names; give that file too")
        return verbalizer

    @property
    def beyond_ctx(self) -> str:
        """The setting that gives a prompt more parameters than `ctx`, as it is written; or ""."""
        if self.reparametrise != "none":
            return f"prompt.reparametrise={self.reparametrise!r}"
        return "prompt.verbalizer='weights'" if self.verbalizer == "weights" else ""

    def layout(self, count: Count, n_ctx: int = 0) -> Template:
        """Return the template that these settings mean, or that of a shorter prompt of n_ctx.

        `count` says how many tokens words have.

        Raises UsageError where the words to start from have no token.
        """
        try:
            if not self.template:
                words = "" if n_ctx else self.ctx_init
                return coop(n_ctx or self.n_ctx, words, self.class_token_position, count)
            template = parse(self.template, count)
            return template.first(n_ctx) if n_ctx else template
        except ValueError as error:
            raise UsageError(f"settings prompt: {error}") from error


class OptimizerSettings(Section):
    """What moves a head in local training, where a method does not say so itself."""

    name: Literal["method", "amsgrad"] = setting(
        "method", "of local training; method: its own, SGD for most"
    )
    momentum: float = setting(-1.0, "of SGD; below 0: the method's own", low=-1, high=1)
    weight_decay: float = setting(-1.0, "of SGD; below 0: the method's own", low=-1)
    lr_schedule: Literal["constant", "cosine", "step"] = setting(
        "constant", "all rates of local training from round to round; cosine: towards 0 at the end"
    )
    lr_step: int = setting(10, "step: rounds after which rates fall", low=1)
    lr_gamma: float = setting(0.1, "step: what they are multiplied by", above=0, high=1)
    beta1: float = setting(0.9, "amsgrad: of the first moment m", low=0, high=1)
    beta2: float = setting(0.995, "amsgrad: of the second moment v", low=0, high=1)
    eps: float = setting(1e-8, "amsgrad: v-hat starts at its square", above=0)

    def of_sgd(self) -> dict[str, float]:
        """Return what is said of SGD, in its words."""
        known = {"momentum": self.momentum, "weight_decay": self.weight_decay}
        return {name: value for name, value in known.items() if value >= 0}

    def rate(self, round: int, rounds: int) -> float:
        """Return what rates are multiplied by in a round, from 1, of so many."""
        if self.lr_schedule == "cosine":
            return cosine(1.0, round - 1, rounds)
        return self.lr_gamma ** ((round - 1) // self.lr_step) if self.lr_schedule == "step" else 1.0


class PrivacySettings(Section):
    """Differential privacy of what clients upload, for every method that it suits."""

    unit: Literal["none", "client", "example"] = setting(
        "none", "whose absence nobody may notice: all of a client, or one image of it"
    )
    where: Literal["client", "server"] = setting(
        "client", "unit=client: who adds the noise; server: once to the mean, and it is trusted"
    )
    clip_norm: float = setting(1.0, "longest update C, or longest gradient of an image", above=0)
    noise: float = setting(1.0, "standard deviation of the noise, in clip norms", low=0)
    neighbours: Literal["left-out", "replaced"] = setting(
        "left-out", "what epsilon compares with: no data, or any other data"
    )
    delta: float = setting(1e-5, "for which epsilon is said", above=0, high=0.5)
    budget: float = setting(0.0, "largest epsilon that a run may spend; 0: any", low=0)
    secret_noise: bool = setting(
        False, "draw noise from the operating system, not from the seed, which others know"
    )

    @property
    def at_server(self) -> bool:
        """Whether the server adds the noise, once, to the mean of all uploads."""
        return self.unit == "client" and self.where == "server"


class LearningSettings(Section):
    """What every method learns with."""

    seed: int = setting(0, "everything random follows from it", low=0)
    compat: Literal["paper", "released"] = setting(
        "paper", "where the released code contradicts its paper, follow"
    )
    num_server_rounds: int = setting(10, "rounds T", low=1)
    local_epochs: int = setting(5, "epochs E of a client in a round", low=1)
    batch_size: int = setting(32, "images in a training step", low=1)
    lr: float = setting(0.002, "learning rate of the prompt", above=0)
    prompt: PromptSettings = PromptSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    privacy: PrivacySettings = PrivacySettings()
