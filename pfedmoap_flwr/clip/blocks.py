"""A CLIP whose text tower ends early: for a client that cannot hold all of it."""

from typing import Any

from open_clip.transformer import Transformer
from torch import nn

from pfedmoap_flwr.clip.twin import twin


def first_blocks(model: nn.Module, count: int) -> nn.Module:
    """Return a twin of an open_clip model with the first `count` blocks of its text tower.

    All of them where it has fewer. What stands before and after the blocks stays: embeddings, the
    last layer norm, the projection. Twins share their weights.

    Raises ValueError for a text tower that is not built from open_clip's own blocks.
    """
    text: Any = getattr(model, "text", model)
    transformer = getattr(text, "transformer", None)
    if not isinstance(transformer, Transformer):
        raise ValueError(f"its text tower, {type(text).__name__}, has no blocks to leave out")
    path = "transformer.resblocks" if text is model else "text.transformer.resblocks"
    return twin(model, path, nn.ModuleList(list(transformer.resblocks)[:count]))
