"""From a vision tower's output to the decoder's inputs: feature selection, projectors, fusions, and their checks.

    hidden states of the tower → read_tower → projector → fusion with the text's embeddings

Shapes: I images or tiles, patches and P tokens per image before and after the projector, W joined width of the layers
that are read, B batch, T tokens, F `<image>` placeholders, E encoder states and features of a row, D hidden.
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import torch_compilable_check
from transformers.utils.generic import can_return_tuple

from .caches_mmcoconut import ThoughtState
from .compat_mmcoconut import hidden_states_to_return
from .configuration_mmcoconut import (
    PREFIX_PROJECTORS,
    READ_BY_CROSS_ATTENTION,
    MMCoconutConfig,
    shuffle_factor,
)


def _vision_width_of(config: MMCoconutConfig) -> int:
    """Return the joined width of the layers that are read."""
    layers = config.vision_feature_layer
    return config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))


def _check_image_features(image_features: torch.Tensor, config: MMCoconutConfig) -> None:
    """Raise ValueError unless precomputed features are (I, patches, W), with patches that fit the placeholders."""
    expected = ["patches", _vision_width_of(config)]
    if config.image_fusion not in READ_BY_CROSS_ATTENTION and config.projector_type not in PREFIX_PROJECTORS:
        shuffles = config.projector_type == "pixel_shuffle"
        expected[0] = config.image_seq_length * (shuffle_factor(config.downsample_ratio) ** 2 if shuffles else 1)
    shape = tuple(image_features.shape)
    if len(shape) != 3 or any(size not in ("patches", found) for size, found in zip(expected, shape[1:])):
        reads = f"the projector reads (images or tiles, {expected[0]}, {expected[1]})"
        raise ValueError(f"image_features is {shape}, but {reads}: pass what this model's get_vision_features gives.")


def check_one_source(**sources) -> None:
    """Raise ValueError if the batch's images are given twice."""
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} both hold the images of the batch: pass one of them.")


def check_num_tiles(num_tiles: torch.Tensor | None, **images: torch.Tensor | None) -> None:
    """Raise ValueError unless the images' tiles (images,) add up to those of the named pixels or features (I, …)."""
    for name, tensor in images.items():
        if num_tiles is not None and tensor is not None and int(num_tiles.sum()) != len(tensor):
            counted = f"{int(num_tiles.sum())} tiles ({num_tiles.tolist()} an image)"
            raise ValueError(f"num_tiles counts {counted}, but {name} holds {len(tensor)}: pass one for each tile.")


def check_num_features(image_mask: torch.Tensor, image_features: torch.Tensor, config: MMCoconutConfig) -> None:
    """Raise ValueError if the numbers of placeholders (B, T) and image features (F, D) differ."""
    length, num_features = config.image_seq_length, image_features.shape[0]
    torch_compilable_check(
        image_mask.sum() == num_features,
        lambda: (
            f"The batch holds {int(image_mask.sum())} <image> placeholders ({image_mask.sum(-1).tolist()} per row) "
            f"but {num_features} image features: give each image or tile {length} placeholders, not truncated."
        ),
    )


def check_whole_images(image_mask: torch.Tensor, num_tiles: torch.Tensor | None, config: MMCoconutConfig) -> None:
    """Raise ValueError unless each row of (B, T) holds all placeholders of its own images.

    num_tiles (images,): tiles per image; None: one each.
    """
    counts, length = image_mask.sum(-1), config.image_seq_length  # (B,)
    broken = counts % length != 0  # (B,)
    torch_compilable_check(
        ~broken.any(),
        lambda: (
            f"Row {int(broken.nonzero()[0])} of the batch holds {int(counts[broken][0])} <image> placeholders, which "
            f"is no multiple of the {length} per image: do not truncate rows with images."
        ),
    )
    if num_tiles is None or torch.compiler.is_exporting():
        return
    tiles, ends = (counts // length).tolist(), {0, *accumulate(num_tiles.tolist())}
    for row, end in enumerate(accumulate(tiles)):
        if end not in ends:
            holds = f"holds placeholders of {tiles[row]} tiles and ends inside an image"
            counted = f"the rows have {tiles} tiles and the images {num_tiles.tolist()}"
            raise ValueError(f"Row {row} {holds}: {counted}. Give each row all tiles of its images.")


class PixelShuffle(nn.Module):
    """Join each square of factor² neighbouring tokens into one: (I, P, W) → (I, P / factor², factor² · W)."""

    def __init__(self, factor: int):
        super().__init__()
        self.factor = factor

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        num_images, num_patches, width = image_features.shape
        factor, side = self.factor, round(num_patches**0.5) // self.factor
        grid = image_features.reshape(num_images, side, factor, side, factor, width)
        return grid.transpose(2, 3).reshape(num_images, side**2, factor**2 * width)


class ImageEmbedding(nn.Module):
    """One vector per image: pooled, L2-normalised, through the adapter; (I, patches, W) → (I, D)."""

    def __init__(self, config: MMCoconutConfig):
        super().__init__()
        self.pooling = config.image_pooling
        self.adapter = linear_projector(config) if config.alignment_adapter else nn.Identity()

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        pooled = image_features[:, 0] if self.pooling == "cls" else image_features.mean(dim=1)  # (I, W)
        return self.adapter(nn.functional.normalize(pooled, dim=-1))  # (I, D)


class AttentionPrefixProjector(nn.Module):
    """Learnt queries that attend to all patches → LayerNorm; (I, patches, W) → (I, P, D)."""

    def __init__(self, config: MMCoconutConfig):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.embedding = ImageEmbedding(config)
        self.queries = nn.Embedding(config.num_visual_tokens, hidden_size)
        self.linear = linear_projector(config)
        self.attention = nn.MultiheadAttention(hidden_size, config.projector_num_heads, batch_first=True)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        queries = self.queries.weight.expand(image_features.shape[0], -1, -1)  # (I, P, D)
        patches = self.linear(image_features)  # (I, patches, D)
        tokens, _ = self.attention(queries, patches, patches, need_weights=False)  # (I, P, D)
        return self.norm(tokens)  # (I, P, D)


def linear_projector(config: MMCoconutConfig) -> nn.Linear:
    """Return one linear layer; (I, P, W) → (I, P, D)."""
    return nn.Linear(_vision_width_of(config), config.text_config.hidden_size)


def transformer_projector(config: MMCoconutConfig) -> nn.Sequential:
    """Return linear → LayerNorm → a transformer encoder layer over an image's tokens; (I, P, W) → (I, P, D)."""
    size = config.text_config.hidden_size
    layer = nn.TransformerEncoderLayer(size, config.projector_num_heads, 4 * size, batch_first=True)
    return nn.Sequential(OrderedDict(linear=linear_projector(config), norm=nn.LayerNorm(size), layer=layer))


def mlp_projector(config: MMCoconutConfig, num_joined: int = 1) -> nn.Sequential:
    """Return linear → activation → linear; (I, P, joined · W) → (I, P, D)."""
    size, bias = config.text_config.hidden_size, config.projector_bias
    first = nn.Linear(num_joined * _vision_width_of(config), size, bias=bias)
    second = nn.Linear(size, size, bias=bias)
    return nn.Sequential(OrderedDict(linear_1=first, act=ACT2FN[config.projector_hidden_act], linear_2=second))


def pixel_shuffle_projector(config: MMCoconutConfig) -> nn.Sequential:
    """Return pixel shuffle → LayerNorm → linear → activation → linear; (I, patches, W) → (I, P, D), as in InternVL."""
    factor = shuffle_factor(config.downsample_ratio)
    norm = nn.LayerNorm(factor**2 * _vision_width_of(config))
    mlp = dict(mlp_projector(config, num_joined=factor**2).named_children())
    return nn.Sequential(OrderedDict(shuffle=PixelShuffle(factor), layer_norm=norm, **mlp))


def pooled_prefix_projector(config: MMCoconutConfig) -> nn.Sequential:
    """Return visual tokens from the image's embedding: linear → LayerNorm; (I, patches, W) → (I, P, D)."""
    size, num_tokens = config.text_config.hidden_size, config.num_visual_tokens
    layers = {"embedding": ImageEmbedding(config), "linear": nn.Linear(size, num_tokens * size)}
    layers |= {"tokens": nn.Unflatten(-1, (num_tokens, size)), "norm": nn.LayerNorm(size)}
    return nn.Sequential(OrderedDict(layers))


PROJECTORS = {"linear": linear_projector, "mlp": mlp_projector, "transformer": transformer_projector}
PROJECTORS |= {"pixel_shuffle": pixel_shuffle_projector, "pooled_prefix": pooled_prefix_projector}
PROJECTORS |= {"attention_prefix": AttentionPrefixProjector}


def build_projector(config: MMCoconutConfig) -> nn.Module:
    """Return the projector named in the configuration."""
    return PROJECTORS[config.projector_type](config)


# A fusion takes (inputs_embeds (B, T, D), image_features (F, D), image_mask (B, T), attention_mask (B, T) or None) and
# returns the decoder's arguments. image_mask is True at the placeholders, and image_features has one row per
# placeholder in reading order; for cross-attention each image is one row with all its features, (F, P · D).


def replace_fusion(inputs_embeds, image_features, image_mask, attention_mask=None) -> dict:
    """Replace the placeholders' embeddings by image features, as in LLaVA."""
    mask = image_mask[..., None].expand_as(inputs_embeds)  # (B, T, D)
    return {"inputs_embeds": inputs_embeds.masked_scatter(mask, image_features)}


def add_fusion(inputs_embeds, image_features, image_mask, attention_mask=None) -> dict:
    """Add image features to the placeholders' embeddings."""
    added = replace_fusion(torch.zeros_like(inputs_embeds), image_features, image_mask)["inputs_embeds"]  # (B, T, D)
    return {"inputs_embeds": inputs_embeds + added}


def features_by_row(image_features, image_mask, hidden_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the features (F, P · D) of each row's images as (B, E, D), zero-padded, and their mask (B, E)."""
    counts = image_mask.sum(dim=1)  # (B,)
    features = pad_sequence(image_features.split(counts.tolist()), batch_first=True)  # (B, images, P · D)
    visible = torch.arange(features.shape[1], device=counts.device) < counts[:, None]  # (B, images)
    num_features = image_features.shape[-1] // hidden_size
    features = features.unflatten(-1, (num_features, hidden_size)).flatten(1, 2)  # (B, E, D)
    return features, visible.repeat_interleave(num_features, dim=1)


def cross_attention_fusion(inputs_embeds, image_features, image_mask, attention_mask=None) -> dict:
    """Let the decoder's cross-attention read image features, without positions; rows without images read zeros."""
    features, visible = features_by_row(image_features, image_mask, inputs_embeds.shape[-1])  # (B, E, D), (B, E)
    if features.shape[1] == 0:
        features, visible = torch.zeros_like(inputs_embeds[:, :1]), torch.zeros_like(image_mask[:, :1])
    visible[:, 0] = True
    read = {"encoder_hidden_states": features, "encoder_attention_mask": visible.long()}
    return {"inputs_embeds": inputs_embeds, **read}


def encoder_fusion(inputs_embeds, image_features, image_mask, attention_mask=None) -> dict:
    """Put image features in front of the text encoder's states, `inputs_embeds`, for cross-attention to read."""
    features, visible = features_by_row(image_features, image_mask, inputs_embeds.shape[-1])  # (B, E - T, D)
    attention_mask = torch.ones_like(image_mask) if attention_mask is None else attention_mask.bool()  # (B, T)
    return {
        "encoder_hidden_states": torch.cat([features, inputs_embeds], dim=1),  # (B, E, D)
        "encoder_attention_mask": torch.cat([visible, attention_mask & ~image_mask], dim=1).long(),  # (B, E)
    }


IMAGE_FUSIONS = {"replace": replace_fusion, "add": add_fusion}
IMAGE_FUSIONS |= {"cross_attention": cross_attention_fusion, "encoder": encoder_fusion}


@dataclass
class MMCoconutImageOutput(BaseModelOutputWithPooling):
    """The tower's output; pooler_output, each image's features for the decoder; image_embeds (I, D), if any."""

    image_embeds: torch.Tensor | None = None


def asked_outputs(settings: dict) -> dict:
    """Return the output settings for a tower or an encoder; a list of layers is meant for the decoder."""
    return {name: True for name in ("output_hidden_states", "output_attentions") if settings.get(name) is True}


class ReadsImages:
    """Mixin that runs `vision_tower` and `multi_modal_projector`, and fuses their features with the text."""

    def read_tower(self, pixel_values: torch.Tensor, **kwargs) -> tuple[dict, torch.Tensor]:
        """Run the tower; return the requested outputs, and the projector's input (I, patches, W).

        vision_feature_layer and vision_feature_select_strategy in kwargs override the configuration's.
        """
        names = ("vision_feature_layer", "vision_feature_select_strategy")
        given = {name: kwargs.pop(name, None) for name in names}
        layers, strategy = (getattr(self.config, name) if value is None else value for name, value in given.items())
        last_norm = self.config.vision_last_norm
        asked = kwargs.pop("output_hidden_states", self.vision_tower.config.output_hidden_states)
        layers = [layers] if isinstance(layers, int) else layers
        hidden = [layer for layer in layers if layer != -1 or not last_norm]
        is_asked = asked is not None and asked is not False  # 0 is a layer
        returned = hidden_states_to_return(hidden, asked) if hidden or is_asked else False
        outputs = self.vision_tower(pixel_values, output_hidden_states=returned, return_dict=True, **kwargs)
        states = {layer: outputs.hidden_states[layer] for layer in hidden}
        read = torch.cat([states.get(layer, outputs.last_hidden_state) for layer in layers], dim=-1)
        unasked = ("pooler_output",) if is_asked else ("pooler_output", "hidden_states")
        outputs = {name: value for name, value in outputs.items() if name not in unasked}
        return outputs, read[:, 1:] if strategy == "default" else read

    def get_vision_features(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        """Return (I, patches, W) from pixels (I, channels, height, width), to pass as `image_features` instead."""
        return self.read_tower(pixel_values, **kwargs)[1]

    @can_return_tuple
    def get_image_features(self, pixel_values=None, num_tiles=None, image_features=None, **kwargs):
        """Return features of (I, channels, height, width) pixels; `pooler_output` is a list of I tensors (P, D).

        image_features (I, patches, W) of get_vision_features can replace the pixels. With num_tiles (images,) these
        are tiles, and the list holds each image's joined tiles: (num_tiles · P, D). Each row belongs to one
        placeholder; for cross-attention there is one row with all features, (1, P · D).
        """
        check_one_source(pixel_values=pixel_values, image_features=image_features)
        check_num_tiles(num_tiles, pixel_values=pixel_values, image_features=image_features)
        outputs = {}
        if image_features is None:
            outputs, image_features = self.read_tower(pixel_values, **kwargs)
        else:
            _check_image_features(image_features, self.config)
            image_features = image_features.to(self.dtype)
        if self.config.projector_type in PREFIX_PROJECTORS:
            outputs["image_embeds"] = self.multi_modal_projector.embedding(image_features)  # (I, D)
        projected = self.multi_modal_projector(image_features)  # (I, P, D)
        if self.cross_attends:
            projected = projected.flatten(1)[:, None]  # (I, 1, P · D)
        if torch.compiler.is_exporting():  # a list of images would fix their number
            projected = [projected.flatten(0, 1)]
        elif num_tiles is not None:
            projected = [tiles.flatten(0, 1) for tiles in projected.split(num_tiles.tolist())]
        return MMCoconutImageOutput(pooler_output=list(projected), **outputs)

    def get_placeholder_mask(self, input_ids, inputs_embeds: torch.Tensor, image_features: torch.Tensor):
        """Return (B, T), True at the `<image>` placeholders; raise ValueError if there are not as many features."""
        image_mask = self.get_token_mask(self.config.image_token_id, input_ids, inputs_embeds)
        check_num_features(image_mask, image_features, self.config)
        return image_mask

    def fuse_images(self, input_ids, inputs_embeds: torch.Tensor, image_outputs, past_key_values=None) -> dict:
        """Return the decoder's inputs: embeddings and image features joined by the configured fusion.

        Raises:
            ValueError: unequal numbers of placeholders and features; an image after a cache with other images' keys.
        """
        known = ThoughtState.of(past_key_values).encoder_inputs if self.cross_attends else {}
        if known and image_outputs is not None:
            raise ValueError(
                "past_key_values already hold the keys of cross-attention, so new images would not be seen: pass all "
                "images in the first call, and no prefill_chunk_size that would split between them."
            )
        decodes = inputs_embeds.shape[1] == 1 and image_outputs is None and not self.cross_attends
        if known and inputs_embeds.shape[1] > 1:  # placeholders without an image
            self.get_placeholder_mask(input_ids, inputs_embeds, inputs_embeds[0, :0])
        if known or decodes:  # a step that looks for no images
            return {"inputs_embeds": inputs_embeds, **known}
        image_features = inputs_embeds[0, :0]  # (0, D)
        if image_outputs is not None:
            image_features = torch.cat(list(image_outputs.pooler_output), dim=0).to(inputs_embeds)  # (F, D)
        image_mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)  # (B, T)
        return self.fuse(inputs_embeds, image_features, image_mask)

    def image_outputs_of(self, images: dict, num_tiles, mm_encoder_outputs: dict | None, **asked):
        """Return the output of `get_image_features` for a call's images, or the given one; None without images."""
        check_one_source(**images, mm_encoder_outputs=mm_encoder_outputs)
        if all(image is None for image in images.values()):
            return (mm_encoder_outputs or {}).get("image")
        return self.get_image_features(**images, num_tiles=num_tiles, **asked, return_dict=True)
