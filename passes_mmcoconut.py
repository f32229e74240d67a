"""What a decoder that runs in passes over pieces of a sequence needs: latents, masks and positions by column, caches.

`PassCache` is the cache of one pass over another one, which stays as it is. `ThoughtState` is what a thinking decoder
leaves in a cache for later calls; whatever crops, reorders, repeats, resets or copies the cache does the same to it.

Shapes: B batch, T tokens of a call, t of a piece, N latents, E encoder states, H heads, K head dim, D hidden.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import nn
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


# --- latents ---------------------------------------------------------------------------------------------------------
def split_latents(latents: torch.Tensor, attention_mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the latents (B, T) at which a row thinks, and those that a 2-D mask (B, past + T) leaves out."""
    if not is_two_dimensional(attention_mask):
        return latents, torch.zeros_like(latents)
    real = attention_mask.bool()[:, -latents.shape[1] :]  # (B, T)
    return latents & real, latents & ~real


def column_lists(*masks: torch.Tensor) -> list[list[int]]:
    """Return for each mask (B, T) the columns in which any row is True; the one time a call waits for the device."""
    any_row = torch.stack([mask.any(dim=0) for mask in masks]).tolist()
    return [[column for column, is_set in enumerate(row) if is_set] for row in any_row]


def take_columns(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return values (B, T, …) at columns (B, N): (B, N, …)."""
    shape = (*columns.shape, *values.shape[2:])
    return values.gather(1, columns.view(*columns.shape, *[1] * (values.ndim - 2)).expand(shape))


def gather_thoughts(inputs_embeds: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what was read at each row's latents, packed to the left, (B, N, D), and the mask (B, N) of real ones."""
    counts = latents.sum(dim=1)  # (B,)
    num_latents = int(counts.max())
    columns = torch.argsort(~latents, dim=1, stable=True)[:, :num_latents]  # (B, N)
    thoughts = take_columns(inputs_embeds, columns)  # (B, N, D)
    mask = torch.arange(num_latents, device=counts.device) < counts[:, None]  # (B, N)
    return thoughts * mask[..., None], mask


def packed(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return values (B, T) at the True columns of (B, T), packed to the left: (B, N), 0 where a row has fewer."""
    return gather_thoughts(values[..., None], mask)[0][..., 0]


def noise_by_column(noise: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Return noise (B, N, D) of each row's latents, in their order, at their columns: (B, T, D), elsewhere 0."""
    rows, most = latents.shape[0], int(latents.sum(dim=1).max())
    if noise.shape[:2] != (rows, most):
        raise ValueError(
            f"thought_noise is of {noise.shape[0]} rows with {noise.shape[1]} thoughts, and this call has {rows} rows "
            f"with up to {most} latents: give noise (B, N, D) of the whole prompts, without prefill_chunk_size."
        )
    order = (latents.long().cumsum(dim=1) - 1).clamp(min=0)  # (B, T)
    return take_columns(noise, order) * latents[..., None]  # (B, T, D)


def carry_states(states: torch.Tensor, skipped: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """Return states (B, T, D) with that of the last column which was not skipped in each place of (B, T) that was.

    before (B, D): the state of the column before the first, for rows whose first columns are skipped.
    """
    if before is None:
        before = states[:, 0]
    columns = torch.arange(1, skipped.shape[1] + 1, device=skipped.device)  # (T,), 0 is the column before the first
    source = torch.where(skipped, 0, columns).cummax(dim=1).values  # (B, T)
    all_states = torch.cat([before[:, None].to(states.dtype), states], dim=1)  # (B, 1 + T, D)
    return take_columns(all_states, source)


def linked_thoughts(latents: torch.Tensor, num_linked: int | None) -> torch.Tensor | None:
    """Return (B, T), True from each row's num_linked-th last latent on; None for all of them."""
    if num_linked is None:
        return None
    if num_linked < 0:
        raise ValueError(
            f"bptt_thoughts={num_linked} is less than 0: set it to how many thoughts of a row, from its last one, "
            "gradients flow back through, or to None for all."
        )
    return latents.flip(1).cumsum(1).flip(1) <= num_linked  # (B, T), latents from here to the row's end


def check_has_predecessor(latents: torch.Tensor, attention_mask: torch.Tensor | None, has_past: bool) -> None:
    """Raise for a latent (B, T) without a token of its row before it: in a first column, or behind padding.

    attention_mask (B, past + T) or None.
    """
    orphan = latents[:, 0] & (not has_past)  # (B,)
    if attention_mask is not None:
        follows = nn.functional.pad(attention_mask.bool(), (1, 0), value=True)[:, :-1]  # (B, past + T)
        orphan = orphan | (latents & ~follows[:, -latents.shape[1] :]).any(dim=1)
    if orphan.any():
        row = orphan.nonzero()[0].item()
        raise ValueError(
            f"Row {row} of the batch has a latent token with no token before it, and a thought is the state of the "
            "token before: put the question or <|start-latent|> in front, or pass the past_key_values of the text "
            "before."
        )


def check_thoughts_matter(latents: torch.Tensor, attention_mask, labelled: torch.Tensor) -> None:
    """Raise for a thought after the last labelled token of a row that has labels, where it could not change the loss.

    latents (B, T); attention_mask (B, past + T), where it is 0 nothing is thought; labelled (B, T), or longer.
    """
    thinks, _ = split_latents(latents, attention_mask)  # (B, T)
    labels_ahead = labelled.flip(1).cumsum(1).flip(1)[:, : thinks.shape[1]]  # (B, T), labels from here on
    useless = (thinks & (labels_ahead == 0)).any(dim=1) & labelled.any(dim=1)  # (B,)
    if useless.any():
        row = useless.nonzero()[0].item()
        raise ValueError(
            f"Row {row} of the batch has a latent token after its last labelled token (column "
            f"{labelled[row].nonzero().max().item()}), where it cannot change the answer: put the latents between the "
            "question and the answer."
        )


def states_before(states: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """Return of each column of (B, T, D) the state of the column before; of the first `before` (B, D), or its own."""
    first = states[:, :1] if before is None else before[:, None].to(states.dtype)
    return torch.cat([first, states[:, :-1]], dim=1)


# --- pieces of a sequence --------------------------------------------------------------------------------------------
def join_columns(pieces: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Return pieces (…, t, D) as (…, T, D); a single one as it is; None for a layer that was not asked for."""
    return pieces[0] if len(pieces) == 1 or pieces[0] is None else torch.cat(pieces, dim=-2)


def join_tokens(pieces: list[torch.Tensor], num_rows: int) -> torch.Tensor:
    """Return what routers say of the tokens of pieces, (B · t, E), as (B · T, E) in the order of one pass."""
    return torch.cat([piece.unflatten(0, (num_rows, -1)) for piece in pieces], dim=1).flatten(0, 1)


def cut_by_mask(values: list[torch.Tensor], mask: torch.Tensor, start: int, end: int) -> list[torch.Tensor]:
    """Return of values (F, D), a row for each True of mask (B, T), those of columns start … end - 1."""
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)[mask]  # (F,)
    kept = (columns >= start) & (columns < end)  # (F,)
    return [value[kept] for value in values]


def join_attentions(
    pieces: list[tuple[torch.Tensor, ...]], past_length: int, reads_images: bool = False
) -> tuple[torch.Tensor, ...]:
    """Return attention maps (B, H, t, keys) of the pieces as (B, H, T, all keys).

    Zeros stand for what a piece does not see: later keys, and earlier ones that a sliding window has let go. An
    attention implementation that makes no maps, as sdpa, leaves () of them. reads_images: some layers look at images
    beside the text (mllama), and their keys are the same in every piece.
    """
    if not pieces[0]:
        return pieces[0]
    ends = list(accumulate((piece[0].shape[2] for piece in pieces), initial=past_length))[1:]
    layers = list(zip(*pieces))
    beside = [reads_images and len({attention.shape[-1] for attention in layer}) == 1 for layer in layers]
    num_keys = max(ends[-1], *(layer[-1].shape[-1] for layer, apart in zip(layers, beside) if not apart))
    joined = []
    for layer, apart in zip(layers, beside):
        if not apart:
            gone = [max(0, end - attention.shape[-1]) for end, attention in zip(ends, layer)]
            rest = [num_keys - left - attention.shape[-1] for left, attention in zip(gone, layer)]
            layer = [nn.functional.pad(attention, sides) for attention, *sides in zip(layer, gone, rest)]
        joined.append(torch.cat(layer, dim=2))  # (B, H, T, keys)
    return tuple(joined)


# --- masks and positions ---------------------------------------------------------------------------------------------
def is_two_dimensional(attention_mask) -> bool:
    """Return True for a mask of columns, and not one that was made for a single pass, 4-D or by the kind of layer."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2


class PreparedMasks:
    """Masks that a model made for all columns of a call, cut for each pass of it.

    masks: a tensor (B, 1 or H, T, keys), True or 0 where a query sees a key; or by the kind of layer such tensors,
        paddings (B, past + T), or None where sdpa needs no mask.
    make: called with the embeddings of a pass and its cache, makes these masks anew, where one is None.
    """

    def __init__(self, masks, cache: Cache, length: int, make: Callable[[torch.Tensor, Cache], dict]):
        self.masks, self.make, self.length = masks if isinstance(masks, dict) else {None: masks}, make, length
        unknown = [type(mask).__name__ for mask in self.masks.values() if not isinstance(mask, torch.Tensor | None)]
        if unknown:
            raise ValueError(
                f"Thoughts need an attention mask that can be cut, and this call has a {unknown[0]}: load the model "
                "with attn_implementation='sdpa' or 'eager'."
            )
        self.past_length = int(cache.get_seq_length())
        self.offsets = {kind: self.sizes(kind, cache, length)[1] for kind in self.masks}

    def sizes(self, kind: str | None, cache: Cache, length: int) -> tuple[int, int]:
        """Return how many keys a pass of so many columns sees in layers of a kind, and which is the first."""
        slides = any(word in (kind or "") for word in ("sliding", "chunked"))
        layers = [isinstance(layer, CacheLayerMixin) and layer.is_sliding == slides for layer in cache.layers]
        return cache.get_mask_sizes(length, layers.index(True) if True in layers else 0)

    def of_columns(self, embeds: torch.Tensor, start: int, cache: Cache):
        """Return the masks of a pass over embeds (B, t, D) that begin at column start."""
        end, made = start + embeds.shape[1], None
        cut = {}
        for kind, mask in self.masks.items():
            if mask is None:
                made = self.make(embeds, cache) if made is None else made
                cut[kind] = made[kind] if isinstance(made, dict) else made
            elif mask.ndim == 2:
                cut[kind] = mask[:, mask.shape[1] - self.length :][:, start:end]
            else:
                num_keys, offset = self.sizes(kind, cache, end - start)
                first = offset - self.offsets[kind]
                cut[kind] = mask[:, :, start:end, first : first + num_keys]
        return cut.get(None) if None in cut else cut

    def safe_ends(self, latents: torch.Tensor) -> list[int]:
        """Return for each column 0 … T the first one from it on before which the call may be cut.

        A cut is not safe where a row sees both ways across it, as among the tokens of an image in Gemma 3.

        Raises:
            ValueError: a row that thinks at one of its latents (B, T) inside such a block of its own.
        """
        reach = torch.arange(self.length, device=latents.device).expand_as(latents)  # (B, T)
        for kind, mask in self.masks.items():
            if mask is not None and mask.ndim == 4:
                visible = (mask if mask.dtype == torch.bool else mask > -1).any(dim=1)  # (B, T, keys)
                keys = torch.arange(mask.shape[-1], device=mask.device) + self.offsets[kind] - self.past_length
                reach = torch.maximum(reach, torch.where(visible, keys, 0).amax(dim=-1))
        crosses = reach.cummax(dim=1).values[:, :-1] > torch.arange(self.length - 1, device=reach.device)  # (B, T - 1)
        if (crosses & latents[:, 1:]).any():
            row = (crosses & latents[:, 1:]).any(dim=1).nonzero()[0].item()
            raise ValueError(
                f"Row {row} of the batch has a latent among tokens that see both ways, and a thought is the state of "
                "the token before, which would see it: let no image or prefix reach over the latents (token_type_ids)."
            )
        ends, unsafe = [self.length], crosses.any(dim=0).tolist()
        for column in range(self.length - 1, -1, -1):
            ends.append(ends[-1] if column and unsafe[column - 1] else column)
        return ends[::-1]


def positions_from_mask(attention_mask: torch.Tensor, num_columns: int) -> torch.Tensor:
    """Return positions (B, num_columns) that count real tokens from 0, with 0 at padding on the left."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_columns:]


def position_limit(decoder: nn.Module) -> int | None:
    """Return how many positions a decoder's table of positions has; None where there is no such table.

    A table is an embedding, not that of the tokens, with a row for each of `max_position_embeddings`; OPT and BART
    keep a few rows more.
    """
    limit = getattr(decoder.config, "max_position_embeddings", None)
    if limit is None:
        return None
    tokens = decoder.get_input_embeddings()
    tables = (module for module in decoder.modules() if isinstance(module, nn.Embedding) and module is not tokens)
    return limit if any(limit <= table.num_embeddings <= limit + 2 for table in tables) else None


def masks_of_call(decoder: nn.Module, num_columns: int, attention_mask, position_ids, past_key_values) -> dict:
    """Return the attention_mask and position_ids of a call of so many columns of a thinking decoder.

    The mask is 0 also at latents that rows left out earlier; positions that are not given count its real tokens.

    Raises:
        ValueError: no mask where rows left latents out; more tokens than the decoder has positions.
        NotImplementedError: the cache of continuous batching.
    """
    if not isinstance(past_key_values, Cache | None):
        raise NotImplementedError(
            f"The cache is a {type(past_key_values).__name__}, as continuous batching makes to pack requests into one "
            "pass, and thoughts need a pass each: use generate()."
        )
    attention_mask = with_mask_of_left_out(attention_mask, past_key_values)
    if position_ids is None and is_two_dimensional(attention_mask):
        position_ids = positions_from_mask(attention_mask, num_columns)  # (B, T)
    check_length(decoder, num_columns, position_ids, past_key_values)
    return {"attention_mask": attention_mask, "position_ids": position_ids}


def check_length(decoder: nn.Module, num_columns: int, position_ids: torch.Tensor | None, past_key_values) -> None:
    """Raise before a thinking decoder's table of positions is read past its end; single steps are not looked at."""
    limit = None if num_columns == 1 else position_limit(decoder)
    if limit is None:
        return
    length = num_columns + (past_key_values.get_seq_length() if past_key_values is not None else 0)
    if length > limit and position_ids is not None and not decoder.counts_columns:
        length = int(position_ids.max()) + 1
    if length > limit:
        raise ValueError(
            f"The sequence has {length} tokens, images and latents included, but the language model has {limit} "
            "positions: shorten the question or the steps, use fewer latents or image tokens, or take a language "
            "model with more positions."
        )


def check_window(keeps_all_keys: bool, window: int | None, num_columns: int) -> None:
    """Raise where latents that are left out would push columns of a longer sequence out of a sliding window."""
    if not keeps_all_keys and (window is None or num_columns > window):
        what = (
            "go into what some layers keep in the place of keys"
            if window is None
            else f"stand in a window of {window}"
        )
        raise ValueError(
            f"Rows leave latents out, whose columns would {what}, and the sequence has {num_columns} columns: take a "
            "decoder with full attention, or leave the latents out of the prompt."
        )


# --- caches ----------------------------------------------------------------------------------------------------------
def text_cache(past_key_values: Cache) -> Cache:
    """Return the cache of the text alone, where there is another of encoder states beside it."""
    is_pair = isinstance(past_key_values, EncoderDecoderCache)
    return past_key_values.self_attention_cache if is_pair else past_key_values


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
        length = past_key_values.get_seq_length()  # of a static cache a tensor that it changes in place
        self.last_state, self.length = last_state, torch.as_tensor(length).clone()

    def state_after(self, past_key_values: Cache | None) -> torch.Tensor | None:
        """Return the state (B, D) of the cache's last column; None where it was cut since, or filled by others."""
        is_last = self.last_state is not None and int(self.length) == int(past_key_values.get_seq_length())
        return self.last_state if is_last else None

    def cropped(self, length: int) -> "ThoughtState":
        """Return the state of a cache that was cut to so many columns."""
        mask = None if self.attention_mask is None else self.attention_mask[:, :length]
        is_cut = self.thoughts_end is not None and self.thoughts_end > length
        return replace(self, attention_mask=mask, thoughts_end=None if is_cut else self.thoughts_end)

    def of_rows(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> "ThoughtState":
        """Return the state of other rows, `pick` of each tensor's."""
        picked = {name: None if (value := getattr(self, name)) is None else pick(value) for name in OF_ROWS}
        encoder_inputs = {name: pick(value) for name, value in self.encoder_inputs.items()}
        return replace(self, **picked, encoder_inputs=encoder_inputs)


OF_ROWS = ("last_state", "attention_mask")


class RemembersThoughts(PutInFront):
    """A cache whose `thought_state` goes where its rows go, and is cropped with it."""

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


def with_mask_of_left_out(attention_mask: torch.Tensor | None, past_key_values: Cache | None) -> torch.Tensor | None:
    """Return a mask (B, length) with 0 also at the latents that rows left out when the cache was filled.

    One that was made for a single pass, 4-D, stays what it is: it was made of such a mask. None or other rows raise.
    """
    known = ThoughtState.of(past_key_values).attention_mask  # (B, filled)
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


def _copied_layer(layer: CacheLayerMixin) -> CacheLayerMixin:
    """Return a layer with the same keys and values whose updates leave the given one as it is.

    A layer that writes into its tensors (a quantized cache, …) raises.
    """
    is_kept = not isinstance(layer, (CacheLayerMixin, LinearAttentionLayer))  # of a layer that reads another's keys
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

    follow: makes the cache of all later passes, of copies of this one's layers; None: each is of a single pass too.
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
        if layer_idx is not None:  # the way to states in transformers 5.18
            self._reads("any", layer_idx, state_idx)
        return super().has_previous_state(layer_idx, state_idx)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0):
        self._reads("conv", layer_idx, state_idx)
        return super().get_conv_state(layer_idx, state_idx)

    def update_recurrent_state(self, recurrent_states, layer_idx: int, state_idx: int = 0, **kwargs):
        states = self.layers[layer_idx].recurrent_states
        if states[state_idx] is not None:  # which the backward pass needs as it is
            states[state_idx] = torch.empty_like(states[state_idx])
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)

    def _reads(self, kind: str, layer_idx: int, state_idx: int | None) -> None:
        """Put a recurrent layer back to where the pass began if this is a replay, which reads a state again."""
        if (kind, layer_idx, state_idx) in self.states_read:
            self.layers[layer_idx] = _copied_layer(self.before[layer_idx])
            self.states_read = {key for key in self.states_read if key[1] != layer_idx}
        self.states_read.add((kind, layer_idx, state_idx))

    def next_pass(self) -> Cache:
        """Return the cache of a pass over what this pass has written too."""
        kept = [layer is before for layer, before in zip(self.layers, self.before)]
        if kept and sum(kept) == sum(type(layer) is not LinearAttentionLayer for layer in self.before):
            raise ValueError(
                "The decoder wrote no keys into its cache, because gradient checkpointing was switched on for the "
                "language model alone: call gradient_checkpointing_enable() on the whole model."
            )
        return PassCache(self) if self.follow is None else self.follow([_copied_layer(layer) for layer in self.layers])


class ChosenCache(Cache):
    """Another kind of cache than the growing one, chosen for a call; it keeps the keys of all columns.

    It is made empty, or by its `after(layers)` of the keys and values of these layers. `move(move)` puts `move` of the
    keys and values (B, H, T, K) of each layer in their place.
    """


# Functions of a thinking decoder and the columns before a call's first latent (0 in generation) that return a kind of
# ChosenCache, or None; the first that returns one is followed. mmcoconut.kernels adds latent attention's.
CHOOSE_CACHE: list[Callable[[object, int], type[ChosenCache] | None]] = []


def chosen_cache(decoder, prefix_length: int = 0) -> type[ChosenCache] | None:
    """Return the kind of cache for a call with so many columns before its first latent; None: a growing one."""
    kinds = (choose(decoder, prefix_length) for choose in CHOOSE_CACHE)
    return next((kind for kind in kinds if kind is not None), None) if decoder.sees_all_columns else None


class _FixedFlags(dict):
    """A dictionary whose values stay as they are."""

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
    """Return the cache of the next pass: the same one, unless it is of a single pass."""
    is_of_one = isinstance(past_key_values, (PassCache, _PassCrossCache))
    return past_key_values.next_pass() if is_of_one else past_key_values


def writes_in_place(past_key_values: Cache) -> bool:
    """Return True for a cache of recurrent layers, which a backward pass would find overwritten by a later pass."""
    return any(type(layer) is LinearAttentionLayer for layer in text_cache(past_key_values).layers)


def throwaway(past_key_values: Cache) -> Cache:
    """Return a cache for one pass over what past_key_values hold; they do not change, however often it is done."""
    if isinstance(past_key_values, _PassCrossCache):
        return past_key_values.next_pass()
    if isinstance(past_key_values, EncoderDecoderCache):
        text, cross = past_key_values.self_attention_cache, past_key_values.cross_attention_cache
        return _PassCrossCache(throwaway(text), cross, is_first=False)
    return PassCache(past_key_values)


def with_cross_attention(past_key_values: Cache, config=None) -> EncoderDecoderCache:
    """Return the cache with a place for keys of encoder states, which a first pass computes once."""
    if isinstance(past_key_values, EncoderDecoderCache):
        return past_key_values
    if isinstance(past_key_values, PassCache):
        return _PassCrossCache(past_key_values, PassCache(DynamicCache(config=config)), is_first=True)
    return EncoderDecoderCache(past_key_values, DynamicCache())
