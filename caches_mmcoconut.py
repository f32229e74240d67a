"""Caches of a decoder that runs several times in one call, and what a cache remembers beside keys and values.

`PassCache` is the cache of one pass over another one, which stays as it is. `ThoughtState` stands behind a cache's own
layers, so that whatever crops, reorders, repeats, resets or copies the cache does the same to it.

Shapes: B batch, T tokens, E encoder states, H heads, K head dim, D hidden.
"""

import copy
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

from .columns_mmcoconut import is_two_dimensional


def text_cache(past_key_values: Cache) -> Cache:
    """Return the cache of the text alone, where there is another of encoder states beside it."""
    is_pair = isinstance(past_key_values, EncoderDecoderCache)
    return past_key_values.self_attention_cache if is_pair else past_key_values


def check_cache(past_key_values) -> None:
    """Raise for what is no cache of keys in the order of the columns.

    Raises:
        NotImplementedError: the cache of continuous batching.
    """
    if not isinstance(past_key_values, Cache | None):
        raise NotImplementedError(
            f"The cache is a {type(past_key_values).__name__}, as continuous batching makes to pack requests into one "
            "pass, and thoughts need a pass each: use generate()."
        )


def key_layers(past_key_values: Cache) -> list[CacheLayerMixin]:
    """Return the layers of the text's cache that hold keys and values."""
    return [layer for layer in text_cache(past_key_values).layers if not isinstance(layer, ThoughtState)]


class ThoughtState(CacheLayerMixin):
    """What a call leaves in its cache for later ones.

    last_state (B, D): of the last column, which a latent in the column behind it reads; None where it is not known.
    attention_mask (B, length): 0 also at latents that rows left out; None where they left out none.
    encoder_inputs: the states (B, E, D) and mask (B, E) whose keys a cache of encoder states holds.
    thoughts_end: the column behind the last thought that was updated together with others; None where none was.
    """

    # As the first layer of keys has it: masks are made for the first layer of each kind.
    is_sliding = False
    is_compileable = True
    is_croppable = True
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.reset()

    @classmethod
    def of(cls, past_key_values: Cache | None) -> "ThoughtState":
        """Return the state of a cache; an empty one that belongs to none where the cache has none."""
        layers = [] if past_key_values is None else text_cache(past_key_values).layers
        return layers[-1] if layers and isinstance(layers[-1], cls) else cls()

    @classmethod
    def within(cls, past_key_values: Cache) -> "ThoughtState":
        """Return the state of a cache that has been written to, put behind its layers where it had none."""
        layers, state = text_cache(past_key_values).layers, cls.of(past_key_values)
        if layers[-1] is not state:
            state.is_sliding = layers[0].is_sliding
            layers.append(state)
        return state

    def reset(self) -> None:
        """Forget everything, as a cache that is emptied does."""
        self.last_state = self.attention_mask = self.thoughts_end = self.length = None
        self.encoder_inputs: dict[str, torch.Tensor] = {}

    def remember(self, last_state: torch.Tensor | None, past_key_values: Cache) -> None:
        """Keep the state (B, D) of the last column that is in the cache now."""
        self.last_state = last_state
        # A static cache counts in a tensor that it changes in place.
        self.length = torch.as_tensor(past_key_values.get_seq_length()).clone()

    def state_after(self, past_key_values: Cache | None) -> torch.Tensor | None:
        """Return the state (B, D) of the cache's last column; None where it was cut since, or filled by others."""
        if self.last_state is None or int(self.length) != int(past_key_values.get_seq_length()):
            return None
        return self.last_state

    def known_mask(self, past_key_values: Cache | None) -> torch.Tensor | None:
        """Return the mask (B, length) with 0 at latents left out, as far as the cache is still filled."""
        if self.attention_mask is None:
            return None
        return self.attention_mask[:, : int(past_key_values.get_seq_length())]

    def of_rows(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Hold `pick` of each tensor's rows in its place."""
        for name in ("last_state", "attention_mask"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else pick(value))
        self.encoder_inputs = {name: pick(value) for name, value in self.encoder_inputs.items()}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.of_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.of_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.of_rows(lambda rows: rows[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing to do: `state_after` and `known_mask` look at how long the cache is."""

    def lazy_initialization(self, key_states, value_states) -> None:
        """Nothing to do: there are no keys."""

    def offload(self) -> None:
        """Nothing to do: a state is small."""

    def prefetch(self) -> None:
        """Nothing to do, as it never left."""

    def update(self, key_states, value_states, *args, **kwargs):
        raise RuntimeError("No layer of a decoder writes here.")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def with_mask_of_left_out(attention_mask: torch.Tensor | None, past_key_values: Cache | None) -> torch.Tensor | None:
    """Return a mask (B, length) with 0 also at the latents that rows left out when the cache was filled.

    One that was made for a single pass, 4-D, stays what it is: it was made of such a mask.

    Raises:
        ValueError: no mask, though rows left latents out; a mask of other rows.
    """
    known = ThoughtState.of(past_key_values).known_mask(past_key_values)  # (B, filled)
    if known is None or not (attention_mask is None or is_two_dimensional(attention_mask)):
        return attention_mask
    if attention_mask is None:
        raise ValueError(
            "Rows of past_key_values stopped thinking early, and there is no attention_mask to leave their latents "
            "out of: pass the attention_mask (B, past + T) of all columns."
        )
    if len(known) != len(attention_mask):
        raise ValueError(
            f"past_key_values hold {len(known)} rows that stopped thinking early, and the attention_mask is of "
            f"{len(attention_mask)}: use a fresh cache for other rows."
        )
    rest = attention_mask.new_ones(len(attention_mask), attention_mask.shape[1] - known.shape[1])
    return attention_mask * torch.cat([known.to(attention_mask), rest], dim=1)


def copied_layer(layer: CacheLayerMixin) -> CacheLayerMixin:
    """Return a layer with the same keys and values whose updates leave the given one as it is.

    Raises:
        ValueError: a layer that writes into its tensors (a quantized cache, …).
    """
    if isinstance(layer, DynamicLayer):
        return copy.copy(layer)  # an update replaces its tensors by longer ones
    if type(layer) is not StaticLayer:
        raise ValueError(
            f"The keys of the text before cannot be read again from a {type(layer).__name__}: use "
            "thought_schedule='sequential', or full attention with a dynamic or static cache."
        )
    copied, length = DynamicLayer(), int(layer.get_seq_length())
    copied.lazy_initialization(layer.keys, layer.values)
    copied.keys, copied.values = layer.keys[:, :, :length], layer.values[:, :, :length]  # the rest is still empty
    return copied


class PassCache(Cache):
    """The cache of one pass over another cache, which stays as it is.

    Gradient checkpointing runs a layer again in the backward pass; a cache that appends would then hold its keys
    twice. Here every update starts from what was there before the pass, so that a replay sees what the first run saw.
    """

    def __init__(self, before: Cache):
        if before.offloading:
            raise ValueError(
                "The keys of the text before cannot be read again from an offloaded cache: use "
                "thought_schedule='sequential', or a cache that stays on the device."
            )
        self.before = [copied_layer(layer) for layer in key_layers(before)]
        super().__init__(layers=list(self.before))

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        layer = copied_layer(self.before[layer_idx])
        keys_and_values = layer.update(key_states, value_states, *args, **kwargs)
        if self.layers[layer_idx] is self.before[layer_idx]:
            self.layers[layer_idx] = layer
        return keys_and_values

    def next_pass(self) -> Cache:
        """Return the cache of a pass over what this pass has written too."""
        self.check_written()
        return PassCache(self)

    def check_written(self) -> None:
        if any(layer is before for layer, before in zip(self.layers, self.before)):
            raise ValueError(
                "The decoder wrote no keys into its cache, because gradient checkpointing was switched on for the "
                "language model alone: call gradient_checkpointing_enable() on the whole model."
            )


class FirstPassCache(PassCache):
    """PassCache of a first pass that alone is replayed: the passes after it write into one cache, as without.

    follow: makes that cache of the keys and values of all layers, pairs of (B, H, P, K).
    """

    def __init__(self, before: Cache, follow: Callable[[list[tuple[torch.Tensor, torch.Tensor]]], Cache]):
        super().__init__(before)
        self.follow = follow

    def next_pass(self) -> Cache:
        self.check_written()
        return self.follow([(layer.keys, layer.values) for layer in self.layers])


def growing_after(states: list[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """Return a growing cache that begins with these keys and values (B, H, P, K) of all layers."""
    cache = DynamicCache()
    for index, (keys, values) in enumerate(states):
        cache.update(keys, values, index)
    return cache


class FixedFlags(dict):
    """A dictionary whose values stay as they are."""

    def __setitem__(self, key, value):
        return None


class PassCrossCache(EncoderDecoderCache):
    """PassCache of a decoder that reads encoder states; a replay does what the first run did.

    The first pass computes keys and values of the encoder states, in a replay too; later passes read them.
    """

    def __init__(self, text: Cache, cross: Cache, *, is_first: bool):
        super().__init__(text, cross)
        self.is_updated = FixedFlags(dict.fromkeys(range(len(cross.layers)), not is_first))

    def next_pass(self) -> "PassCrossCache":
        return PassCrossCache(next_pass(self.self_attention_cache), self.cross_attention_cache, is_first=False)


def is_replayed(past_key_values: Cache) -> bool:
    """Return True for the cache of a pass that gradient checkpointing may run again, or that is thrown away."""
    return isinstance(text_cache(past_key_values), PassCache)


def next_pass(past_key_values: Cache) -> Cache:
    """Return the cache of the next pass: the same one, unless it is of a single pass."""
    is_of_one = isinstance(past_key_values, (PassCache, PassCrossCache))
    return past_key_values.next_pass() if is_of_one else past_key_values


def throwaway(past_key_values: Cache) -> Cache:
    """Return a cache for one pass over what past_key_values hold; they do not change, however often it is done.

    Raises:
        ValueError: keys that are not kept whole, or not on the decoder's device.
    """
    if isinstance(past_key_values, (PassCache, PassCrossCache)):
        return past_key_values.next_pass()
    if isinstance(past_key_values, EncoderDecoderCache):
        text, cross = past_key_values.self_attention_cache, past_key_values.cross_attention_cache
        return PassCrossCache(throwaway(text), cross, is_first=False)
    return PassCache(past_key_values)


def with_cross_attention(past_key_values: Cache, config=None) -> EncoderDecoderCache:
    """Return the cache with a place for keys of encoder states, in which the first pass computes them once.

    config: the decoder's, for the cache of a pass.
    """
    if isinstance(past_key_values, EncoderDecoderCache):
        return past_key_values
    if isinstance(past_key_values, PassCache):
        return PassCrossCache(past_key_values, PassCache(DynamicCache(config=config)), is_first=True)
    return EncoderDecoderCache(past_key_values, DynamicCache())
