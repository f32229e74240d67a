"""Build models and processors, from a vision tower and a language model, or from a complete VLM."""

from mmcoconut.build.models import composed_from_vlm, from_backbones
from mmcoconut.build.processors import (
    check_image_options,
    composed_processor_from_vlm,
    processor_from_backbones,
    processor_from_vlm,
    set_image_options,
    set_tiles,
)
from mmcoconut.build.vlms import from_vlm, reason_against


__all__ = ["check_image_options", "composed_from_vlm", "composed_processor_from_vlm", "from_backbones", "from_vlm"]
__all__ += ["processor_from_backbones", "processor_from_vlm", "reason_against", "set_image_options"]
__all__ += ["set_tiles"]
