"""Caches of a decoder that runs several times in one call, and what a cache remembers beside keys and values.

`PassCache` is the cache of one pass over another one, which stays as it is. `ThoughtState` is what a thinking decoder
leaves in a cache for later calls; whatever crops, reorders, repeats, resets or copies the cache does the same to it.

Shapes: B batch, T tokens, E encoder states, H heads, K head dim, D hidden.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
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


@cache
def in_front(mixin: type, own_class: type) -> type:
    """Return a class with the mixin in front of another class, under whose name transformers goes on to know it."""
    body = {name: getattr(own_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(own_class.__name__, (mixin, own_class), {**body, "mixed_of": (mixin, own_class)})


class PutInFront:
    """A mixin that `in_front` makes classes with."""

    def __reduce_ex__(self, protocol):
        """Pickle by the two classes, as the made one cannot be found by its name."""
        _, _, *state = super().__reduce_ex__(protocol)
        return new_instance, self.mixed_of, *state


def new_instance(mixin: type, own_class: type):
    """Return an empty instance of a class that `in_front` makes, for pickle."""
    made = in_front(mixin, own_class)
    return made.__new__(made)


@dataclass
class ThoughtState:
    """What a call leaves in its cache for later ones.

    last_state (B, D): of the last column, which a latent in the column behind it reads; None where it is not known.
    length (): how many columns the cache had then.
    attention_mask (B, length): 0 also at latents that rows left out; None where they left out none.
    encoder_inputs: the states (B, E, D) and mask (B, E) whose keys a cache of encoder states holds.
    thoughts_end: the column behind the last thought that was updated together with others; None where none was.
    """

    last_state: torch.Tensor | None = None
    length: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    encoder_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    thoughts_end: int | None = None

    @classmethod
    def of(cls, past_key_values: Cache | None) -> "ThoughtState":
        """Return the state of a cache; an empty one that belongs to none where the cache has none."""
        own = None if past_key_values is None else text_cache(past_key_values)
        return own.thought_state if isinstance(own, RemembersThoughts) else cls()

    @classmethod
    def within(cls, past_key_values: Cache) -> "ThoughtState":
        """Return the state of a cache, which from now on goes where the cache's rows go."""
        own = text_cache(past_key_values)
        if not isinstance(own, RemembersThoughts):
            own.__class__ = in_front(RemembersThoughts, type(own))
            own.thought_state = cls()
        return own.thought_state

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

    def of_rows(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> "ThoughtState":
        """Return the state of other rows, `pick` of each tensor's."""
        picked = {name: None if (value := getattr(self, name)) is None else pick(value) for name in OF_ROWS}
        encoder_inputs = {name: pick(value) for name, value in self.encoder_inputs.items()}
        return replace(self, **picked, encoder_inputs=encoder_inputs)


OF_ROWS = ("last_state", "attention_mask")


class RemembersThoughts(PutInFront):
    """A cache whose `thought_state` goes where its rows go; cropped columns the state notices by the length."""

    thought_state: ThoughtState

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
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
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
        self.before = [copied_layer(layer) for layer in before.layers]
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

    follow: makes that cache of copies of this pass's layers.
    """

    def __init__(self, before: Cache, follow: Callable[[list[CacheLayerMixin]], Cache]):
        super().__init__(before)
        self.follow = follow

    def next_pass(self) -> Cache:
        self.check_written()
        return self.follow([copied_layer(layer) for layer in self.layers])


class ChosenCache(Cache):
    """The base of another kind of cache than the growing one, chosen for a call by a function of `CHOOSE_CACHE`.

    It is made empty without arguments, or by `after`, and keeps the keys of all columns.
    """

    @classmethod
    def after(cls, layers: list[CacheLayerMixin]) -> "ChosenCache":
        """Return the cache that begins with the keys and values of these layers."""
        raise NotImplementedError

    def move(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put `move` of the keys and values (B, H, T, K) of each layer in their place."""
        raise NotImplementedError


# Functions of a thinking decoder and the columns before a call's first latent (0 in generation) that return a kind of
# ChosenCache, or None; the first that returns one is followed. mmcoconut.kernels adds latent attention's.
CHOOSE_CACHE: list[Callable[[object, int], type[ChosenCache] | None]] = []


def chosen_cache(decoder, prefix_length: int = 0) -> type[ChosenCache] | None:
    """Return the kind of cache for a call with so many columns before its first latent; None: a growing one."""
    kinds = (choose(decoder, prefix_length) for choose in CHOOSE_CACHE)
    return next((kind for kind in kinds if kind is not None), None) if decoder.sees_all_columns else None


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
