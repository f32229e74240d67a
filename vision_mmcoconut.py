"""From a vision tower's output to what the decoder reads: selected features, projectors, fusions, and their checks.

    hidden states of the tower → select_features → projector → fusion with the text's embeddings

A projector is chosen by `config.projector_type`, a fusion by `config.image_fusion`; all fusions have one signature:

    fuse(inputs_embeds (B, T, D), image_features (F, D), image_mask (B, T), attention_mask (B, T)) → dict

`image_mask` is True at the F `<image>` placeholders, `image_features` has a row for each of them in reading order, and
the dict is what the decoder is called with. For cross-attention an image is one placeholder, whose row holds all its
features, (F, P · D); where a fusion returns `encoder_hidden_states` (B, E, D), the decoder reads them so.

Shapes: I images or tiles, patches and P tokens of one before and after the projector, W width of the tower (of all
layers that are read, joined), B batch, T tokens, F placeholders, E features and states that a row reads, D hidden of
the decoder.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, torch_compilable_check
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from .compat_mmcoconut import hidden_states_to_return
from .configuration_mmcoconut import (
    PREFIX_PROJECTORS,
    READ_BY_CROSS_ATTENTION,
    MMCoconutConfig,
    shuffle_factor,
)


# --- features of the tower -------------------------------------------------------------------------------------------


def select_features(image_outputs, layers: int | list[int], select_strategy: str, *, last_norm: bool) -> torch.Tensor:
    """The hidden states of a tower's output that the projector reads, layers joined: (I, patches, W).

    With last_norm layer -1 is what the tower itself returns.
    """
    layers = [layers] if isinstance(layers, int) else layers
    states = [
        image_outputs.last_hidden_state if last_norm and layer == -1 else image_outputs.hidden_states[layer]
        for layer in layers
    ]
    first = 1 if select_strategy == "default" else 0
    return torch.cat([state[:, first:] for state in states], dim=-1)  # (I, patches, W)


def vision_width_of(config: MMCoconutConfig) -> int:
    """The joined width of the layers that are read."""
    layers = config.vision_feature_layer
    return config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))


def num_patches_read(config: MMCoconutConfig) -> int | None:
    """Patches of an image that make its placeholders; None where the decoder reads as many as there are."""
    if config.image_fusion in READ_BY_CROSS_ATTENTION or config.projector_type in PREFIX_PROJECTORS:
        return None
    shuffles = config.projector_type == "pixel_shuffle"
    return config.image_seq_length * (shuffle_factor(config.downsample_ratio) ** 2 if shuffles else 1)


def check_image_features(image_features: torch.Tensor, config: MMCoconutConfig) -> None:
    """Precomputed features must be (I, patches, W), as the tower would give them.

    Raises:
        ValueError: another shape; the message has both.
    """
    num_patches, width = num_patches_read(config), vision_width_of(config)
    wrong = image_features.ndim != 3 or image_features.shape[2] != width
    if wrong or num_patches not in (None, image_features.shape[1]):
        raise ValueError(
            f"image_features is {tuple(image_features.shape)}, and the projector reads (images or tiles, "
            f"{num_patches or 'patches'}, {width}): pass what get_vision_features of this model gives."
        )


def check_one_source(**sources) -> None:
    """The batch's images must not be given twice."""
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} both hold the images of the batch: pass one of them.")


def check_num_tiles(num_tiles: torch.Tensor | None, **images: torch.Tensor | None) -> None:
    """The tiles of all images (images,) must be as many as the pixels or the features (I, …), given by their name."""
    for name, tensor in images.items():
        if num_tiles is not None and tensor is not None and int(num_tiles.sum()) != tensor.shape[0]:
            raise ValueError(
                f"num_tiles counts {int(num_tiles.sum())} tiles ({num_tiles.tolist()} an image), but {name} holds "
                f"{tensor.shape[0]}: pass both as MMCoconutProcessor returns them."
            )


def check_num_features(image_mask: torch.Tensor, image_features: torch.Tensor, config: MMCoconutConfig) -> None:
    """Raise where placeholders (B, T) and image features (F, D) differ in number.

    Raises:
        ValueError: with both numbers.
    """
    if torch.compiler.is_exporting():  # a program checks it when it runs, and cannot say the numbers
        torch_compilable_check(image_mask.sum() == image_features.shape[0], "placeholders and features differ")
        return
    num_placeholders, num_features = int(image_mask.sum()), image_features.shape[0]
    if num_placeholders != num_features:
        raise ValueError(
            f"The batch holds {num_placeholders} <image> placeholders ({image_mask.sum(-1).tolist()} a row) but "
            f"{num_features} image features ({config.image_seq_length} an image or tile): give each row "
            f"{config.image_seq_length} placeholders an image or tile, as MMCoconutProcessor does, and do not "
            "truncate them."
        )


def check_whole_images(image_mask: torch.Tensor, num_tiles: torch.Tensor | None, config: MMCoconutConfig) -> None:
    """Raise unless every row of (B, T) holds all placeholders of its images: it would read parts of another row's.

    num_tiles (images,): the tiles of each image; None: every image is one.

    Raises:
        ValueError: the first row that ends inside an image, with the numbers.
    """
    counts, length = image_mask.sum(-1), config.image_seq_length  # (B,)
    broken = counts % length != 0
    if torch.compiler.is_exporting():
        torch_compilable_check(~broken.any(), "a row has a part of an image")
        return
    if broken.any():
        row = broken.nonzero()[0].item()
        raise ValueError(
            f"Row {row} of the batch holds {counts[row].item()} <image> placeholders, which is no multiple of the "
            f"{length} of an image: do not truncate rows with images."
        )
    if num_tiles is None:
        return
    tiles = (counts // length).tolist()  # (B,)
    ends = {0, *accumulate(num_tiles.tolist())}
    for row, end in enumerate(accumulate(tiles)):
        if end not in ends:
            raise ValueError(
                f"Row {row} of the batch holds placeholders of {tiles[row]} tiles and ends inside an image: the "
                f"rows have {tiles} tiles and the images {num_tiles.tolist()}. Give each row all the tiles of its "
                "images, as MMCoconutProcessor does."
            )


# --- projectors ------------------------------------------------------------------------------------------------------


class TransformerProjector(nn.Module):
    """Linear → LayerNorm → one transformer encoder layer over the tokens of an image; (I, P, W) → (I, P, D)."""

    def __init__(self, vision_width: int, hidden_size: int, num_heads: int):
        super().__init__()
        self.linear = nn.Linear(vision_width, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.layer = nn.TransformerEncoderLayer(hidden_size, num_heads, 4 * hidden_size, batch_first=True)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        image_features = self.norm(self.linear(image_features))  # (I, P, D)
        return self.layer(image_features)  # (I, P, D)


class MlpProjector(nn.Module):
    """Linear → activation → linear; (I, P, W) → (I, P, D)."""

    def __init__(self, vision_width: int, hidden_size: int, *, hidden_act: str, bias: bool):
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, hidden_size, bias=bias)
        self.act = ACT2FN[hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(image_features)))  # (I, P, D)


def pixel_shuffle(image_features: torch.Tensor, factor: int) -> torch.Tensor:
    """Join each square of factor² neighbouring tokens into one: (I, P, W) → (I, P / factor², factor² · W)."""
    num_images, num_patches, width = image_features.shape
    side = round(num_patches**0.5)
    grid = image_features.reshape(num_images, side // factor, factor, side // factor, factor, width)
    return grid.transpose(2, 3).reshape(num_images, (side // factor) ** 2, factor**2 * width)


class PixelShuffleProjector(MlpProjector):
    """Pixel shuffle → LayerNorm → linear → activation → linear; (I, patches, W) → (I, P, D), as in InternVL."""

    def __init__(self, vision_width: int, hidden_size: int, *, factor: int, **mlp):
        super().__init__(factor**2 * vision_width, hidden_size, **mlp)
        self.factor = factor
        self.layer_norm = nn.LayerNorm(factor**2 * vision_width)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        image_features = pixel_shuffle(image_features, self.factor)  # (I, P, factor² · W)
        return super().forward(self.layer_norm(image_features))  # (I, P, D)


class ImageEmbedding(nn.Module):
    """One vector an image: pooled, L2-normalised, through the adapter; (I, patches, W) → (I, D)."""

    def __init__(self, vision_width: int, hidden_size: int, *, pooling: str, adapter: bool):
        super().__init__()
        self.pooling = pooling
        self.adapter = nn.Linear(vision_width, hidden_size) if adapter else nn.Identity()

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        pooled = image_features[:, 0] if self.pooling == "cls" else image_features.mean(dim=1)  # (I, W)
        return self.adapter(nn.functional.normalize(pooled, dim=-1))  # (I, D)


class PooledPrefixProjector(nn.Module):
    """Visual tokens out of the image's embedding: linear → LayerNorm; (I, patches, W) → (I, P, D)."""

    def __init__(self, vision_width: int, hidden_size: int, *, num_tokens: int, **embedding):
        super().__init__()
        self.num_tokens = num_tokens
        self.embedding = ImageEmbedding(vision_width, hidden_size, **embedding)
        self.linear = nn.Linear(hidden_size, num_tokens * hidden_size)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        tokens = self.linear(self.embedding(image_features))  # (I, P · D)
        return self.norm(tokens.unflatten(-1, (self.num_tokens, -1)))  # (I, P, D)


class AttentionPrefixProjector(nn.Module):
    """Visual tokens out of all patches: learnt queries attend to them → LayerNorm; (I, patches, W) → (I, P, D).

    Unlike a pooled vector it keeps where things are.
    """

    def __init__(self, vision_width: int, hidden_size: int, *, num_tokens: int, num_heads: int, **embedding):
        super().__init__()
        self.embedding = ImageEmbedding(vision_width, hidden_size, **embedding)
        self.queries = nn.Embedding(num_tokens, hidden_size)
        self.linear = nn.Linear(vision_width, hidden_size)
        self.attention = nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        queries = self.queries.weight.expand(image_features.shape[0], -1, -1)  # (I, P, D)
        patches = self.linear(image_features)  # (I, patches, D)
        tokens, _ = self.attention(queries, patches, patches, need_weights=False)  # (I, P, D)
        return self.norm(tokens)  # (I, P, D)


def build_prefix_projector(config: MMCoconutConfig, vision_width: int) -> nn.Module:
    hidden_size, num_tokens = config.text_config.hidden_size, config.num_visual_tokens
    embedding = {"pooling": config.image_pooling, "adapter": config.alignment_adapter}
    if config.projector_type == "pooled_prefix":
        return PooledPrefixProjector(vision_width, hidden_size, num_tokens=num_tokens, **embedding)
    num_heads = config.projector_num_heads
    return AttentionPrefixProjector(vision_width, hidden_size, num_tokens=num_tokens, num_heads=num_heads, **embedding)


def build_projector(config: MMCoconutConfig) -> nn.Module:
    """The projector that the configuration names."""
    vision_width = vision_width_of(config)
    hidden_size = config.text_config.hidden_size
    if config.projector_type in PREFIX_PROJECTORS:
        return build_prefix_projector(config, vision_width)
    if config.projector_type == "transformer":
        return TransformerProjector(vision_width, hidden_size, config.projector_num_heads)
    mlp = {"hidden_act": config.projector_hidden_act, "bias": config.projector_bias}
    if config.projector_type == "mlp":
        return MlpProjector(vision_width, hidden_size, **mlp)
    if config.projector_type == "pixel_shuffle":
        return PixelShuffleProjector(vision_width, hidden_size, factor=shuffle_factor(config.downsample_ratio), **mlp)
    return nn.Linear(vision_width, hidden_size)


# --- fusions ---------------------------------------------------------------------------------------------------------


def replace_fusion(inputs_embeds, image_features, image_mask, attention_mask=None) -> dict:
    """Image features take the place of the placeholders' embeddings, as in LLaVA."""
    mask = image_mask[..., None].expand_as(inputs_embeds)  # (B, T, D)
    return {"inputs_embeds": inputs_embeds.masked_scatter(mask, image_features)}


def add_fusion(inputs_embeds, image_features, image_mask, attention_mask=None) -> dict:
    """Image features are added to the placeholders' embeddings."""
    mask = image_mask[..., None].expand_as(inputs_embeds)  # (B, T, D)
    added = torch.zeros_like(inputs_embeds).masked_scatter(mask, image_features)  # (B, T, D)
    return {"inputs_embeds": inputs_embeds + added}


def features_by_row(image_features, image_mask, hidden_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (F, P · D) of each row's images as (B, E, D), zeros behind them, and the mask (B, E) of real ones."""
    counts = image_mask.sum(dim=1)  # (B,)
    visible = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]  # (B, images)
    features = image_features.new_zeros(*visible.shape, image_features.shape[-1])  # (B, images, P · D)
    features = features.masked_scatter(visible[..., None], image_features)  # (B, images, P · D)
    num_features = image_features.shape[-1] // hidden_size
    features = features.reshape(counts.shape[0], visible.shape[1] * num_features, hidden_size)  # (B, E, D)
    return features, visible.repeat_interleave(num_features, dim=1)


def cross_attention_fusion(inputs_embeds, image_features, image_mask, attention_mask=None) -> dict:
    """Image features are what the decoder's cross-attention reads; it does not see in which order the images stand.

    A row without images reads one feature of zeros, whatever the other rows of its batch have.
    """
    features, visible = features_by_row(image_features, image_mask, inputs_embeds.shape[-1])  # (B, E, D), (B, E)
    if features.shape[1] == 0:
        features = features.new_zeros(features.shape[0], 1, features.shape[-1])  # (B, 1, D)
        visible = visible.new_zeros(features.shape[:2])  # (B, 1)
    visible = torch.cat([visible[:, :1] | ~visible.any(dim=1, keepdim=True), visible[:, 1:]], dim=1)  # (B, E)
    return {
        "inputs_embeds": inputs_embeds,
        "encoder_hidden_states": features,
        "encoder_attention_mask": visible.long(),
    }


def encoder_fusion(inputs_embeds, image_features, image_mask, attention_mask=None) -> dict:
    """Image features in front of the text encoder's states (`inputs_embeds`) are what cross-attention reads."""
    features, visible = features_by_row(image_features, image_mask, inputs_embeds.shape[-1])  # (B, E - T, D)
    attention_mask = torch.ones_like(image_mask) if attention_mask is None else attention_mask.bool()  # (B, T)
    return {
        "encoder_hidden_states": torch.cat([features, inputs_embeds], dim=1),  # (B, E, D)
        "encoder_attention_mask": torch.cat([visible, attention_mask & ~image_mask], dim=1).long(),  # (B, E)
    }


IMAGE_FUSIONS = {
    "replace": replace_fusion,
    "add": add_fusion,
    "cross_attention": cross_attention_fusion,
    "encoder": encoder_fusion,
}


# --- tower and projector ---------------------------------------------------------------------------------------------


@dataclass
class MMCoconutImageOutput(BaseModelOutputWithPooling):
    """The vision tower's output, with pooler_output a list of what the decoder reads of each image.

    image_embeds (I, D): one vector an image, where the projector makes one.
    """

    image_embeds: torch.Tensor | None = None


class ReadsImages:
    """The part of a model that runs its `vision_tower` and `multi_modal_projector`; before PreTrainedModel."""

    def run_vision_tower(self, pixel_values: torch.Tensor, layers: int | list[int], **kwargs):
        """Run the tower and keep the hidden states that the projector reads, and those that kwargs ask for."""
        kwargs["output_hidden_states"] = hidden_states_to_return(layers, kwargs.get("output_hidden_states"))
        return self.vision_tower(pixel_values, return_dict=True, **kwargs)

    def selected_features(self, image_outputs, layers: int | list[int], select_strategy: str) -> torch.Tensor:
        """Return what the projector reads of the tower's output, (I, patches, W)."""
        return select_features(image_outputs, layers, select_strategy, last_norm=self.config.vision_last_norm)

    @merge_with_config_defaults
    def get_vision_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Return what the projector reads of (I, channels, height, width) pixels: (I, patches, W).

        It may be kept while the tower is frozen, and be passed as `image_features` in the place of the pixels.
        """
        image_outputs = self.run_vision_tower(pixel_values, vision_feature_layer, **kwargs)
        return self.selected_features(image_outputs, vision_feature_layer, vision_feature_select_strategy)

    @merge_with_config_defaults
    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        num_tiles: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MMCoconutImageOutput:
        """Return features of (I, channels, height, width) pixels; `pooler_output` is a list of I tensors (P, D).

        image_features (I, patches, W) of get_vision_features may stand in the place of the pixels.
        With num_tiles (images,) these are tiles, and the list holds an image's tiles joined: (num_tiles · P, D).
        Each row of them belongs to a placeholder; for cross-attention that is one of all features, (1, P · D).
        """
        check_one_source(pixel_values=pixel_values, image_features=image_features)
        check_num_tiles(num_tiles, pixel_values=pixel_values, image_features=image_features)
        outputs = MMCoconutImageOutput()
        if image_features is None:
            outputs = MMCoconutImageOutput(**self.run_vision_tower(pixel_values, vision_feature_layer, **kwargs))
            image_features = self.selected_features(outputs, vision_feature_layer, vision_feature_select_strategy)
        else:
            check_image_features(image_features, self.config)
            image_features = image_features.to(self.dtype)
        outputs.pooler_output = self.project(image_features, num_tiles)
        if self.config.projector_type in PREFIX_PROJECTORS:
            outputs.image_embeds = self.multi_modal_projector.embedding(image_features)  # (I, D)
        return outputs

    def project(self, image_features: torch.Tensor, num_tiles: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Return what the decoder reads of each image, (P, D) or (tiles · P, D), of features (I, patches, W)."""
        projected = self.multi_modal_projector(image_features)  # (I, P, D)
        if self.cross_attends:
            projected = projected.flatten(1)[:, None]  # (I, 1, P · D)
        if torch.compiler.is_exporting():  # a list of images would fix their number
            return [projected.flatten(0, 1)]
        if num_tiles is None:
            return list(projected)
        return [tiles.flatten(0, 1) for tiles in projected.split(num_tiles.tolist())]

    def returned_of_tower(self, image_outputs, kwargs: dict):
        """Return `image_outputs` without the states that only the projector asked for."""
        wanted = kwargs.get("output_hidden_states") or self.vision_tower.config.output_hidden_states
        if wanted or image_outputs is None:
            return image_outputs
        return type(image_outputs)(**{name: value for name, value in image_outputs.items() if name != "hidden_states"})


def asked_of_tower(kwargs: dict) -> dict:
    """Return the outputs asked of the vision tower; a list of layers is meant for the decoder."""
    return {name: True for name in ("output_hidden_states", "output_attentions") if kwargs.get(name) is True}
