"""What a method reads of a run's settings, besides its own section."""

from typing import Literal

from pydantic import ValidationInfo, field_validator

from pfedmoap_flwr.clip.settings import Position
from pfedmoap_flwr.clip.template import Count, Template, coop, parse
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.settings import Section, key_of, setting

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
    names: str = setting("", "TOML or JSON file of several names of a class; empty: its own")
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


class LearningSettings(Section):
    """What every method learns with."""

    seed: int = setting(0, "everything random follows from it", low=0)
    compat: Literal["paper", "released"] = setting(
        "paper", "where the released code contradicts its paper, follow"
    )
    num_server_rounds: int = setting(10, "rounds T", low=1)
    local_epochs: int = setting(5, "epochs E of a client in a round", low=1)
    batch_size: int = setting(32, "images in a training step", low=1)
    lr: float = setting(0.002, "learning rate of the prompt (SGD)", above=0)
    prompt: PromptSettings = PromptSettings()
