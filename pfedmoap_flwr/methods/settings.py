"""What a method reads of a run's settings, besides its own section."""

from typing import Literal

from pfedmoap_flwr.clip.settings import Position
from pfedmoap_flwr.settings import Section, setting


class PromptSettings(Section):
    """CoOp's prompt options."""

    n_ctx: int = setting(16, "context tokens M", low=1)
    ctx_init: str = setting("", "words to start from instead of N(0, 0.02); sets n-ctx")
    class_specific: bool = setting(False, "one context per class")
    class_token_position: Position = setting("end", "class name's place")


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
