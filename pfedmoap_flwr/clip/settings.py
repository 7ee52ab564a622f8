"""What can be set of the frozen CLIP."""

from typing import Literal

from pfedmoap_flwr.settings import FilePath, Section, setting

Position = Literal["end", "middle", "front"]
"""Where a class's name stands in a prompt: after the context, between its halves, or before it."""


class ClipSettings(Section):
    """The frozen model."""

    model: str = setting("mini", "an open_clip model name")
    pretrained: FilePath = setting("mini", "bundled name, published tag, or path of a checkpoint")
    features_dtype: Literal["float32", "float16"] = setting("float32", "image features on disk")
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of the text tower's products; auto: bfloat16 on CUDA, float32 on the CPU"
    )
