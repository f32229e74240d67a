"""What maps a vision tower's features to the decoder's width, by the configuration's `projector_type`.

Shapes: I images or tiles, patches and P tokens of one before and after, W width of the tower (of all layers that are
read, joined), D hidden of the decoder.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_mmcoconut import (
    PREFIX_PROJECTORS,
    READ_BY_CROSS_ATTENTION,
    MMCoconutConfig,
    shuffle_factor,
)


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
