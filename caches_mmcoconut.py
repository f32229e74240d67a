"""Caches of a decoder that runs in passes, and the state that it keeps in them for later calls.

`PassCache` is the cache of one pass over another cache, which does not change. `ThoughtState` is the state that a
thinking decoder keeps in a cache; it is cropped, reordered, repeated, reset and copied together with the cache.

Shapes: B batch, E encoder states, H heads, K head dim, D hidden.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionLayer,
    StaticLayer,
)

from .compat_mmcoconut import PutInFront, in_front
from .hiding_mmcoconut import Hiding


def text_cache(past_key_values: Cache) -> Cache:
    """Return the cache of the text, without that of encoder states."""
    is_pair = isinstance(past_key_values, EncoderDecoderCache)
    return past_key_values.self_attention_cache if is_pair else past_key_values


def length_of(past_key_values: Cache | None) -> int:
    """Return the number of columns in a cache."""
    return 0 if past_key_values is None else int(past_key_values.get_seq_length())


@dataclass
class ThoughtState:
    """The state that a call keeps in its cache for later calls.

    last_state (B, D): of the last column, read by a latent in the next column; None if unknown.
    length (): the number of columns in the cache at that time.
    attention_mask (B, length): 0 also at latents that rows left out; None if they left out none.
    encoder_inputs: the states (B, E, D) and mask (B, E) whose keys a cache of encoder states holds.
    thoughts_end: the column after the last thought of a parallel update; None if there was none.
    hiding: the kinds of the columns, if later columns must not see some of them; else None.
    """

    last_state: torch.Tensor | None = None
    length: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    encoder_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    thoughts_end: int | None = None
    hiding: Hiding | None = None

    @classmethod
    def of(cls, past_key_values: Cache | None) -> "ThoughtState":
        """Return the state of a cache; a new empty one, not attached to it, if the cache has none."""
        own = None if past_key_values is None else text_cache(past_key_values)
        return own.thought_state if isinstance(own, RemembersThoughts) else cls()

    @classmethod
    def within(cls, past_key_values: Cache) -> "ThoughtState":
        """Return the state of a cache, attached to it, so that it follows the cache's rows."""
        own = text_cache(past_key_values)
        if not isinstance(own, RemembersThoughts):
            own.__class__ = in_front(RemembersThoughts, type(own))
            own.thought_state = cls()
        return own.thought_state

    def remember(self, last_state: torch.Tensor | None, past_key_values: Cache) -> None:
        """Keep the state (B, D) of the last column that is in the cache now."""
        length = past_key_values.get_seq_length()  # a static cache returns a tensor that it changes in place
        self.last_state, self.length = last_state, torch.as_tensor(length).clone()

    def state_after(self, past_key_values: Cache | None) -> torch.Tensor | None:
        """Return the state (B, D) of the cache's last column; None if the cache was cropped or filled by others."""
        is_last = self.last_state is not None and int(self.length) == int(past_key_values.get_seq_length())
        return self.last_state if is_last else None

    def cropped(self, length: int) -> "ThoughtState":
        """Return the state of a cache that was cropped to `length` columns."""
        mask = None if self.attention_mask is None else self.attention_mask[:, :length]
        is_cut = self.thoughts_end is not None and self.thoughts_end > length
        hiding = None if self.hiding is None else self.hiding.cropped(length)
        return replace(self, attention_mask=mask, thoughts_end=None if is_cut else self.thoughts_end, hiding=hiding)

    def of_rows(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> "ThoughtState":
        """Return the state with other rows; `pick` selects them from each tensor."""
        picked = {name: None if (value := getattr(self, name)) is None else pick(value) for name in OF_ROWS}
        encoder_inputs = {name: pick(value) for name, value in self.encoder_inputs.items()}
        hiding = None if self.hiding is None else self.hiding.of_rows(pick)
        return replace(self, **picked, encoder_inputs=encoder_inputs, hiding=hiding)


OF_ROWS = ("last_state", "attention_mask")


class RemembersThoughts(PutInFront):
    """A cache whose `thought_state` is reordered and cropped with it."""

    def crop(self, *args, **kwargs) -> None:
        super().crop(*args, **kwargs)
        self.thought_state = self.thought_state.cropped(int(self.get_seq_length()))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.thought_state = self.thought_state.of_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.thought_state = self.thought_state.of_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.thought_state = self.thought_state.of_rows(lambda rows: rows[indices])

    def reset(self) -> None:
        super().reset()
        self.thought_state = ThoughtState()


def _copied_layer(layer: CacheLayerMixin) -> CacheLayerMixin:
    """Return a layer with the same keys and values whose updates do not change the given one.

    Raise ValueError for a layer that writes into its tensors (a quantized cache, …).
    """
    is_kept = not isinstance(layer, (CacheLayerMixin, LinearAttentionLayer))  # a layer that reads another layer's keys
    if is_kept or type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        return copy.copy(layer)  # an update replaces its tensors by longer ones
    if type(layer) is LinearAttentionLayer:
        copied = copy.copy(layer)
        for name, value in vars(layer).items():
            if isinstance(value, dict):  # of its states, and what is known of each
                setattr(copied, name, dict(value))
        copied.activate_past_recording()  # its convolution then replaces its state instead of writing into it
        return copied
    if type(layer) is not StaticLayer:
        raise ValueError(
            f"The keys of the text before cannot be read again from a {type(layer).__name__}. "
            "thought_schedule='jacobi' needs that, and so do latents in columns of another row's bidirectional "
            "image: use full attention with a dynamic or static cache; or thought_schedule='sequential', and a "
            "dynamic cache or prompts one at a time."
        )
    if not layer.is_initialized:  # nothing has been written
        return DynamicLayer()
    copied, length = DynamicLayer(), int(layer.get_seq_length())
    copied.lazy_initialization(layer.keys, layer.values)
    copied.keys, copied.values = layer.keys[:, :, :length], layer.values[:, :, :length]  # the rest is still empty
    return copied


class PassCache(Cache):
    """The cache of one pass over another cache, which does not change.

    Gradient checkpointing runs a layer again in the backward pass; an appending cache would then hold its keys
    twice. Here every update starts from the state before the pass, so a replay sees what the first run saw.

    follow: makes the cache of all later passes from copies of this one's layers; None: a new PassCache per pass.
    """

    def __init__(self, before: Cache, follow: Callable[[list[CacheLayerMixin]], Cache] | None = None):
        if before.offloading:
            raise ValueError(
                "The keys of the text before cannot be read again from an offloaded cache: use "
                "thought_schedule='sequential', or a cache that stays on the device."
            )
        self.before, self.follow = [_copied_layer(layer) for layer in before.layers], follow
        own = (_copied_layer(layer) if type(layer) is LinearAttentionLayer else layer for layer in self.before)
        super().__init__(layers=list(own))
        self.states_read: set[tuple] = set()

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        layer = _copied_layer(self.before[layer_idx])
        keys_and_values = layer.update(key_states, value_states, *args, **kwargs)
        if self.layers[layer_idx] is self.before[layer_idx]:
            self.layers[layer_idx] = layer
        return keys_and_values

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        if layer_idx is not None:  # access to states in transformers 5.18
            self._reads("any", layer_idx, state_idx)
        return super().has_previous_state(layer_idx, state_idx)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0):
        self._reads("conv", layer_idx, state_idx)
        return super().get_conv_state(layer_idx, state_idx)

    def update_recurrent_state(self, recurrent_states, layer_idx: int, state_idx: int = 0, **kwargs):
        states = self.layers[layer_idx].recurrent_states
        if states[state_idx] is not None:  # the backward pass needs it unchanged
            states[state_idx] = torch.empty_like(states[state_idx])
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)

    def _reads(self, kind: str, layer_idx: int, state_idx: int | None) -> None:
        """Reset a recurrent layer to the start of the pass in a replay, which reads a state again."""
        if (kind, layer_idx, state_idx) in self.states_read:
            self.layers[layer_idx] = _copied_layer(self.before[layer_idx])
            self.states_read = {key for key in self.states_read if key[1] != layer_idx}
        self.states_read.add((kind, layer_idx, state_idx))

    def next_pass(self) -> Cache:
        """Return the cache of the next pass, which also reads what this pass has written."""
        kept = [layer is before for layer, before in zip(self.layers, self.before)]
        if kept and sum(kept) == sum(type(layer) is not LinearAttentionLayer for layer in self.before):
            raise ValueError(
                "The decoder wrote no keys into its cache, because gradient checkpointing was enabled for the "
                "language model alone: call gradient_checkpointing_enable() on the whole model."
            )
        return PassCache(self) if self.follow is None else self.follow([_copied_layer(layer) for layer in self.layers])


class ChosenCache(Cache):
    """Base class of a cache that replaces the growing one for a call; it keeps the keys of all columns.

    It is created empty, or by `after(layers)` from the keys and values of these layers. `move(move)` replaces the keys
    and values (B, H, T, K) of each layer by `move` of them.
    """


# Functions of a thinking decoder and the columns before a call's first latent (0 in generation). Each returns a
# subclass of ChosenCache or None; the first that returns one is used. mmcoconut.kernels adds latent attention's.
CHOOSE_CACHE: list[Callable[[object, int], type[ChosenCache] | None]] = []


def chosen_cache(decoder, prefix_length: int = 0) -> type[ChosenCache] | None:
    """Return the cache class for a call with prefix_length columns before its first latent; None: a growing one."""
    kinds = (choose(decoder, prefix_length) for choose in CHOOSE_CACHE)
    return next((kind for kind in kinds if kind is not None), None) if decoder.sees_all_columns else None


class _FixedFlags(dict):
    """A dictionary whose values do not change."""

    def __setitem__(self, key, value):
        return None


class _PassCrossCache(EncoderDecoderCache):
    """PassCache of a decoder that reads encoder states; a replay does what the first run did.

    The first pass computes keys and values of the encoder states, in a replay too; later passes read them.
    """

    def __init__(self, text: Cache, cross: Cache, *, is_first: bool):
        super().__init__(text, cross)
        self.is_updated = _FixedFlags(dict.fromkeys(range(len(cross.layers)), not is_first))

    def next_pass(self) -> "_PassCrossCache":
        return _PassCrossCache(next_pass(self.self_attention_cache), self.cross_attention_cache, is_first=False)


def next_pass(past_key_values: Cache) -> Cache:
    """Return the cache of the next pass: the same one, unless it is for a single pass."""
    is_of_one = isinstance(past_key_values, (PassCache, _PassCrossCache))
    return past_key_values.next_pass() if is_of_one else past_key_values


def writes_in_place(past_key_values: Cache) -> bool:
    """Return True for a cache of recurrent layers: later passes overwrite states that the backward pass needs."""
    return any(type(layer) is LinearAttentionLayer for layer in text_cache(past_key_values).layers)


def throwaway(past_key_values: Cache) -> Cache:
    """Return a cache for one pass over past_key_values, which do not change."""
    if isinstance(past_key_values, _PassCrossCache):
        return past_key_values.next_pass()
    if isinstance(past_key_values, EncoderDecoderCache):
        text, cross = past_key_values.self_attention_cache, past_key_values.cross_attention_cache
        return _PassCrossCache(throwaway(text), cross, is_first=False)
    return PassCache(past_key_values)


def with_cross_attention(past_key_values: Cache, config=None) -> EncoderDecoderCache:
    """Return the cache with an added cache for keys of encoder states, which the first pass computes."""
    if isinstance(past_key_values, EncoderDecoderCache):
        return past_key_values
    if isinstance(past_key_values, PassCache):
        return _PassCrossCache(past_key_values, PassCache(DynamicCache(config=config)), is_first=True)
    return EncoderDecoderCache(past_key_values, DynamicCache())


def check_window(keeps_all_keys: bool, window: int | None, num_columns: int) -> None:
    """Raise ValueError if left-out latents would push columns of a longer sequence out of a sliding window."""
    if not keeps_all_keys and (window is None or num_columns > window):
        what = (
            "enter the state that some layers keep instead of keys"
            if window is None
            else f"take up places in a window of {window}"
        )
        raise ValueError(
            f"Rows leave latents out, whose columns would {what}, and the sequence has {num_columns} columns: use a "
            "decoder with full attention, or leave the latents out of the prompt."
        )
