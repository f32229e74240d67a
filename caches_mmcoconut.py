"""Caches of a decoder that runs several times in one forward pass: replayable ones, and one for encoder states.

`throwaway` gives a pass of its own keys over those of another cache, which stays as it is.

Shapes: B batch, T tokens, E encoder states, H heads, K head dim, D hidden.
"""

from collections.abc import Callable

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    EncoderDecoderCache,
    StaticLayer,
)


def held_by(layer: CacheLayerMixin) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (B, H, T, K) of all T tokens that a layer has read.

    Raises:
        ValueError: a layer that does not keep them all as they are (a sliding window, a quantized cache, …).
    """
    if type(layer) in (DynamicLayer, ReplayLayer):
        return layer.keys, layer.values
    if type(layer) is StaticLayer:
        length = int(layer.get_seq_length())
        return layer.keys[:, :, :length], layer.values[:, :, :length]  # the rest is still empty
    raise ValueError(
        f"The keys of the text before cannot be read again from a {type(layer).__name__}: use "
        "thought_schedule='sequential', or full attention with a dynamic or static cache."
    )


def remember_state(past_key_values: Cache, state: torch.Tensor) -> Cache:
    """The cache with the state (B, D) of its last column, which a latent in the first column after it reads."""
    past_key_values.last_hidden_state = state
    past_key_values.last_hidden_length = torch.as_tensor(past_key_values.get_seq_length()).clone()
    return past_key_values


class ReplayLayer(CacheLayerMixin):
    """Keys and values of one layer for one pass: update(k, v) = [before, k], the same however often it is called.

    Gradient checkpointing runs a layer again in the backward pass; a cache that appends would then hold its keys
    twice. `before` never changes, so a replay sees what the first run saw.
    """

    is_sliding = False

    def __init__(self, before: CacheLayerMixin | None = None):
        super().__init__()
        self.before = held_by(before) if before is not None else None
        self.length = self.before[0].shape[-2] if before is not None else 0
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states):
        return None

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = key_states, value_states
        if self.before is not None:
            keys = torch.cat([self.before[0], keys], dim=-2)  # (B, H, T, K)
            values = torch.cat([self.before[1], values], dim=-2)  # (B, H, T, K)
        if self.keys is None:
            self.keys, self.values = keys, values
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class ReplayCache(Cache):
    """The cache of one pass under gradient checkpointing; `next_pass` gives the one that holds this pass too."""

    def __init__(self, before: Cache | None = None):
        if before is None:
            super().__init__(layer_class_to_replicate=ReplayLayer)
        else:
            super().__init__(layers=[ReplayLayer(layer) for layer in before.layers])

    def next_pass(self) -> "ReplayCache":
        self.check_written()
        return ReplayCache(self)

    def check_written(self) -> None:
        if not self.layers:
            raise ValueError(
                "The decoder wrote no keys into its cache, because gradient checkpointing was switched on for the "
                "language model alone: call gradient_checkpointing_enable() on the whole model."
            )


class FirstPassCache(ReplayCache):
    """ReplayCache of a first pass that alone is replayed: the passes after it write into one cache, as without.

    follow: makes that cache of the keys and values of all layers, pairs of (B, H, P, K).
    """

    def __init__(self, follow: Callable[[list[tuple[torch.Tensor, torch.Tensor]]], Cache]):
        super().__init__()
        self.follow = follow

    def next_pass(self) -> Cache:
        self.check_written()
        return self.follow([(layer.keys, layer.values) for layer in self.layers])


class CrossAttentionCache(EncoderDecoderCache):
    """The cache of a decoder that reads encoder states: their keys and values are computed once, in the first pass.

    encoder_inputs: the states (B, E, D) and their mask (B, E), which every later call is to be given again.
    """

    def __init__(self, past_key_values: Cache, states: torch.Tensor, mask: torch.Tensor):
        super().__init__(past_key_values, DynamicCache())
        self.encoder_inputs = {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the text only: the beams of a row read the same states."""
        self.self_attention_cache.reorder_cache(beam_idx)


def growing_after(states: list[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """The library's growing cache that begins with these keys and values (B, H, P, K) of all layers."""
    cache = DynamicCache()
    for index, (keys, values) in enumerate(states):
        cache.update(keys, values, index)
    return cache


class FixedFlags(dict):
    """A dictionary whose values stay as they are."""

    def __setitem__(self, key, value):
        return None


class ReplayCrossCache(EncoderDecoderCache):
    """CrossAttentionCache of one pass under gradient checkpointing, of which a replay does what the first run did.

    The first pass computes keys and values of the encoder states, in a replay too; later passes read them.
    """

    def __init__(self, past_key_values: ReplayCache, before: EncoderDecoderCache | None = None):
        cross = ReplayCache() if before is None else before.cross_attention_cache
        super().__init__(past_key_values, cross)
        self.is_updated = FixedFlags(dict.fromkeys(range(len(cross.layers)), before is not None))

    def next_pass(self) -> "ReplayCrossCache":
        own = self.self_attention_cache
        return ReplayCrossCache(own.next_pass() if isinstance(own, ReplayCache) else own, self)


def throwaway(past_key_values: Cache) -> Cache:
    """A cache for one pass over what past_key_values hold; they do not change, however often it is done.

    Raises:
        ValueError: keys that are not kept whole, or not on the decoder's device.
    """
    if isinstance(past_key_values, (ReplayCache, ReplayCrossCache)):
        return past_key_values.next_pass()
    if isinstance(past_key_values, EncoderDecoderCache):
        return ReplayCrossCache(throwaway(past_key_values.self_attention_cache), past_key_values)
    if past_key_values.offloading:
        raise ValueError(
            "The keys of the text before cannot be read again from an offloaded cache: use "
            "thought_schedule='sequential', or a cache that stays on the device."
        )
    return ReplayCache(past_key_values)


def text_cache(past_key_values: Cache) -> Cache:
    """The cache of the text alone, where there is another of encoder states beside it."""
    is_pair = isinstance(past_key_values, EncoderDecoderCache)
    return past_key_values.self_attention_cache if is_pair else past_key_values
