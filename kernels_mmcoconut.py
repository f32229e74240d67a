"""Attention of a latent step: a few queries over a long prefix and a short tail whose keys are never joined.

The loop of latent_mmcoconut.py runs the decoder once for the text before the thoughts, and then once more a thought. A
cache that appends copies all keys and values in each of these passes, and autograd keeps every copy. `SplitCache`
leaves those of the first pass where they are and gives the later ones as `Split(prefix, tail)`; the attention function
`latent` reads both:

    softmax([q · prefix_keys, q · tail_keys]) = [p, t]        output = p · prefix_values + t · tail_values

so only the scores, of few queries, stand side by side. `attn_implementation="latent"` selects it; what is not split
goes to the library's `sdpa`.

Shapes: B batch, H heads of the queries, H' of keys and values (H = G · H'), Q queries, P prefix, T tail, K head dim.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask


# More queries than this, as in the pass that holds the answer, are worth one joined copy: scores grow with them.
MAX_QUERIES = 16


class Split(NamedTuple):
    """Keys or values: prefix (B, H', P, K) and tail (B, H', T, K)."""

    prefix: torch.Tensor
    tail: torch.Tensor

    def joined(self) -> torch.Tensor:
        return torch.cat(self, dim=-2)  # (B, H', P + T, K)


class SplitLayer(CacheLayerMixin):
    """Keys and values of one layer: those of the first pass as they are, all later ones in a tail of their own."""

    is_sliding = False

    def __init__(self):
        super().__init__()
        self.is_initialized = True
        self.prefix: tuple[torch.Tensor, torch.Tensor] | None = None
        self.tail: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states, value_states):
        return None

    def update(self, key_states, value_states, *args, **kwargs):
        """The first pass's own keys and values; later (Split, Split), or joined (B, H', P + T, K) for many queries."""
        if self.prefix is None:
            self.prefix = (key_states, value_states)
            return key_states, value_states
        if self.tail is None:  # heads apart, once: matrix products would copy them in every pass
            self.prefix = tuple(states.contiguous() for states in self.prefix)
            self.tail = (key_states, value_states)
        else:
            self.tail = tuple(torch.cat([old, new], dim=-2) for old, new in zip(self.tail, (key_states, value_states)))
        keys, values = (Split(*parts) for parts in zip(self.prefix, self.tail))
        if key_states.shape[-2] <= MAX_QUERIES:
            return keys, values
        return keys.joined(), values.joined()

    def get_seq_length(self) -> int:
        parts = [part[0].shape[-2] for part in (self.prefix, self.tail) if part is not None]
        return sum(parts)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class SplitCache(Cache):
    """A cache for one forward pass with thoughts; it cannot be cropped, reordered or kept for decoding."""

    def __init__(self):
        super().__init__(layer_class_to_replicate=SplitLayer)


def latent_attention_reference(query, key: Split, value: Split, *, mask, scaling: float) -> torch.Tensor:
    """The definition of `latent_attention`: softmax(q · [keys]ᵀ · scaling) · [values], keys and values joined."""
    groups = query.shape[1] // key.prefix.shape[1]
    keys, values = (split.joined().repeat_interleave(groups, dim=1) for split in (key, value))  # (B, H, P + T, K)
    scores = query @ keys.transpose(-1, -2) * scaling  # (B, H, Q, P + T)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1) @ values  # (B, H, Q, K)


def latent_attention(
    query: torch.Tensor, key: Split, value: Split, *, mask=None, scaling: float, dropout: float = 0.0
) -> torch.Tensor:
    """Attention of few queries over split keys and values, without copying either.

    Args:
        query (B, H, Q, K).
        key, value: of H' heads, each of which serves H / H' heads of the queries in turn, unrepeated.
        mask (B, 1, Q, P + T) or None: True where a query may look.
        scaling: of the scores.
        dropout: of the probabilities.

    Returns:
        (B, H, Q, K). A query that may look nowhere gets finite numbers without meaning.
    """
    batch, num_heads, num_queries, head_dim = query.shape
    num_kv_heads, prefix_length = key.prefix.shape[1], key.prefix.shape[2]
    grouped = (query * scaling).reshape(batch, num_kv_heads, -1, head_dim)  # (B, H', G · Q, K)
    scores = torch.cat([grouped @ part.transpose(-1, -2) for part in key], dim=-1)  # (B, H', G · Q, P + T)
    if mask is not None:
        shape = (batch, num_kv_heads, num_heads // num_kv_heads, num_queries, -1)
        scores = scores.view(shape).masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min).flatten(2, 3)
    weights = scores.softmax(dim=-1)  # (B, H', G · Q, P + T)
    if dropout > 0:  # even of nothing it would keep a mask
        weights = nn.functional.dropout(weights, dropout)
    of_prefix, of_tail = weights[..., :prefix_length], weights[..., prefix_length:]
    output = of_prefix @ value.prefix + of_tail @ value.tail  # (B, H', G · Q, K)
    return output.view(batch, num_heads, num_queries, head_dim)


def latent_attention_forward(
    module, query, key, value, attention_mask, dropout: float = 0.0, scaling: float | None = None, **kwargs
):
    """`latent` as the library's attention interface calls it; (B, Q, H, K) and no weights."""
    if not isinstance(key, Split):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = latent_attention(query, key, value, mask=attention_mask, scaling=scaling, dropout=dropout)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("latent", latent_attention_forward)
AttentionMaskInterface.register("latent", sdpa_mask)
