"""New models and their processors: out of a vision tower and a language model, or out of a whole VLM."""

from mmcoconut.build.models import from_backbones, from_vlm
from mmcoconut.build.processors import (
    composed_processor_from_vlm,
    processor_from_backbones,
    processor_from_vlm,
    set_tiles,
)


__all__ = [
    "composed_processor_from_vlm",
    "from_backbones",
    "from_vlm",
    "processor_from_backbones",
    "processor_from_vlm",
    "set_tiles",
]
