"""timm backbones as vision towers, through transformers' wrapper: completes its configuration and processor.

Shapes: tokens of an image (prefix and patches), W their width.
"""

import math

import torch
from transformers import CLIPImageProcessorPil
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import is_timm_available

from mmcoconut.errors import UsageError


MODEL_TYPE = "timm_wrapper"
# What timm takes where a checkpoint does not say.
INPUT_SIZE, CROP_PCT = (3, 224, 224), 0.875
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # Pillow's numbers


def check_timm(name: str) -> None:
    """Raise a ValueError that says what to install, unless timm can be used; name: of the tower that needs it."""
    if not is_timm_available():
        raise UsageError(f"{name} is a timm backbone, which needs timm and torchvision: pip install timm torchvision.")


def input_size_of(config) -> tuple[int, int, int]:
    """Return channels, height and width of what a timm tower reads, by its `model_args` or its checkpoint."""
    channels, *size = (getattr(config, "pretrained_cfg", None) or {}).get("input_size", INPUT_SIZE)
    arguments = config.model_args or {}
    size = arguments.get("img_size", size)
    height, width = (size, size) if isinstance(size, int) else size
    return arguments.get("in_chans", channels), height, width


@torch.no_grad()
def settle_timm(tower: PreTrainedModel, config_kwargs: dict) -> None:
    """Complete a timm tower's configuration with the fields that a model reads, by running a blank image.

    Only its output after the last norm can be read: vision_last_norm is set in config_kwargs.

    Raises:
        ValueError: another layer than -1; features that are no row of tokens, as of convolutional networks.
    """
    layer, strategy = (config_kwargs.get(name) for name in ("vision_feature_layer", "vision_feature_select_strategy"))
    if layer not in (None, -1):
        raise UsageError(f"vision_feature_layer={layer}, and a timm backbone gives its last layer alone: set -1.")
    config, name = tower.config, tower.config.architecture
    channels, height, width = input_size_of(config)
    pixels = torch.zeros(1, channels, height, width, dtype=tower.dtype, device=tower.device)
    features = tower.eval()(pixels, do_pooling=False).last_hidden_state  # (1, tokens, W)
    if features.dim() != 3:
        raise UsageError(
            f"The timm backbone {name} gives features of shape {tuple(features.shape)}, not (images, tokens, width): "
            "take a vision transformer (vit_…, deit_…, eva…) in the place of a convolutional network."
        )
    has_prefix = getattr(tower.timm_model, "num_prefix_tokens", 0) > 0  # models without such tokens lack the name
    if not has_prefix and strategy in (None, "default"):
        raise UsageError(
            f"vision_feature_select_strategy='default' leaves out the class token, and the timm backbone {name} has "
            "none: set vision_feature_select_strategy='full'."
        )
    config.hidden_size, config.num_hidden_layers = features.shape[2], len(tower.timm_model.feature_info)
    config.num_channels, config.image_size = channels, height if height == width else [height, width]
    config.do_pooling = False
    config_kwargs["vision_last_norm"] = True


def timm_image_processor(config) -> CLIPImageProcessorPil:
    """Return an image processor that does what timm does in evaluation; transformers' own for timm cannot be saved.

    Raises:
        ValueError: a tower without the settings of a checkpoint, or with settings that have no counterpart.
    """
    settings = getattr(config, "pretrained_cfg", None)
    if settings is None:
        raise UsageError(f"The timm backbone {config.architecture} is from no checkpoint: give image_processor=….")
    _, height, width = input_size_of(config)
    crop_mode, interpolation = settings.get("crop_mode") or "center", settings.get("interpolation") or "bicubic"
    if crop_mode not in ("center", "squash") or height != width or interpolation not in RESAMPLE:
        raise UsageError(
            f"The timm backbone {config.architecture} wants crop_mode {crop_mode!r}, interpolation {interpolation!r} "
            f"and {height} × {width} pixels, which no image processor here does: give image_processor=…."
        )
    scaled = math.floor(height / (settings.get("crop_pct") or CROP_PCT))
    sides = {"height": scaled, "width": scaled}
    return CLIPImageProcessorPil(
        size={"shortest_edge": scaled} if crop_mode == "center" else sides,
        crop_size={"height": height, "width": width},
        resample=RESAMPLE[interpolation],
        image_mean=list(settings.get("mean") or MEAN),
        image_std=list(settings.get("std") or STD),
    )
