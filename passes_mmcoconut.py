"""Run a decoder in passes over pieces of a sequence: latents, masks and positions by column.

`Passes` holds the arguments of one call, slices them by column for each pass, and joins the outputs. COLUMN_AXES says
which argument is sliced along which axis; `PreparedMasks` slices masks that a model made for all columns.

Shapes: B batch, T tokens of a call, t of a piece, N latents, F features, H heads, D hidden.
"""

from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise, zip_longest

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .caches_mmcoconut import ThoughtState, next_pass, text_cache, throwaway
from .compat_mmcoconut import CACHE
from .hiding_mmcoconut import Hiding


# Arguments with one entry per token, and the axis of these entries; all others go to every pass unchanged.
COLUMN_AXES = {"inputs_embeds": 1, "position_ids": -1, "token_type_ids": 1, "visual_pos_masks": 1}
COLUMN_AXES |= {"per_layer_inputs": 1, "cross_attention_mask": 2, "full_text_row_masked_out_mask": 2}
# Lists of features with one row for each True in a mask of columns.
ROWS_OF_MASKS = {"deepstack_visual_embeds": "visual_pos_masks"}
# Read only by the first pass, which stores their keys in the cache.
READ_ONCE = ("cross_attention_states",)


# --- latents ---------------------------------------------------------------------------------------------------------
def split_latents(latents: torch.Tensor, attention_mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the latents (B, T) at which a row thinks, and those that a 2-D mask (B, past + T) leaves out."""
    if not is_two_dimensional(attention_mask):
        return latents, torch.zeros_like(latents)
    real = attention_mask.bool()[:, -latents.shape[1] :]  # (B, T)
    return latents & real, latents & ~real


def column_lists(*masks: torch.Tensor) -> list[list[int]]:
    """Return for each mask (B, T) the columns where any row is True; the only device synchronization of a call."""
    any_row = torch.stack([mask.any(dim=0) for mask in masks]).tolist()
    return [[column for column, is_set in enumerate(row) if is_set] for row in any_row]


def take_columns(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return values (B, T, …) at columns (B, N): (B, N, …)."""
    shape = (*columns.shape, *values.shape[2:])
    return values.gather(1, columns.view(*columns.shape, *[1] * (values.ndim - 2)).expand(shape))


def columns_of(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns of each row's latents (B, T), packed to the left, (B, N), and a mask (B, N) of real ones."""
    counts = latents.sum(dim=1)  # (B,)
    num_latents = int(counts.max())
    columns = torch.argsort(~latents, dim=1, stable=True)[:, :num_latents]  # (B, N)
    return columns, torch.arange(num_latents, device=counts.device) < counts[:, None]


def gather_thoughts(inputs_embeds: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the vectors read at each row's latents, packed left, (B, N, D), and a mask (B, N) of real ones."""
    columns, mask = columns_of(latents)  # (B, N) each
    return take_columns(inputs_embeds, columns) * mask[..., None], mask


def spread(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Return values (B, N, …) of each row's latents at their columns: (B, T, …); other columns are arbitrary."""
    order = (latents.long().cumsum(dim=1) - 1).clamp(min=0)  # (B, T)
    return take_columns(values, order)


def packed(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return values (B, T) at the True columns of (B, T), packed to the left: (B, N), 0 where a row has fewer."""
    return gather_thoughts(values[..., None], mask)[0][..., 0]


def noise_by_column(noise: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Return noise (B, N, D) of each row's latents, in their order, at their columns: (B, T, D), elsewhere 0."""
    rows, most = latents.shape[0], int(latents.sum(dim=1).max())
    if noise.shape[:2] != (rows, most):
        raise ValueError(
            f"thought_noise has {noise.shape[0]} rows with {noise.shape[1]} thoughts, but this call has {rows} rows "
            f"with up to {most} latents: pass noise (B, N, D) of the whole prompts, without prefill_chunk_size."
        )
    return spread(noise, latents) * latents[..., None]  # (B, T, D)


def carry_states(states: torch.Tensor, skipped: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """Return states (B, T, D), each skipped column (B, T) filled with the state of the last column not skipped.

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
            f"bptt_thoughts={num_linked} is less than 0: set it to the number of last thoughts of a row that "
            "gradients flow back through, or to None for all."
        )
    return latents.flip(1).cumsum(1).flip(1) <= num_linked  # (B, T), latents from here to the row's end


def check_has_predecessor(latents: torch.Tensor, attention_mask: torch.Tensor | None, has_past: bool) -> None:
    """Raise ValueError for a latent (B, T) with no token before it: in the first column, or after padding.

    attention_mask (B, past + T) or None.
    """
    orphan = latents[:, 0] & (not has_past)  # (B,)
    if attention_mask is not None:
        follows = nn.functional.pad(attention_mask.bool(), (1, 0), value=True)[:, :-1]  # (B, past + T)
        orphan = orphan | (latents & ~follows[:, -latents.shape[1] :]).any(dim=1)
    if orphan.any():
        row = orphan.nonzero()[0].item()
        raise ValueError(
            f"Row {row} of the batch has a latent token with no token before it, but a thought is the state of the "
            "previous token: put the question or <|start-latent|> before it, or pass the past_key_values of the "
            "earlier text."
        )


def check_thoughts_matter(latents: torch.Tensor, attention_mask, labelled: torch.Tensor) -> None:
    """Raise ValueError for a thought after a row's last labelled token, where it could not change the loss.

    latents (B, T); attention_mask (B, past + T): nothing is thought where it is 0; labelled (B, T), or longer.
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
    """Return each column's previous state, (B, T, D); for the first, `before` (B, D), or else its own."""
    first = states[:, :1] if before is None else before[:, None].to(states.dtype)
    return torch.cat([first, states[:, :-1]], dim=1)


# --- pieces of a sequence --------------------------------------------------------------------------------------------
def join_columns(pieces: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Return pieces (…, t, D) joined to (…, T, D); None for a layer that was not requested."""
    return pieces[0] if len(pieces) == 1 or pieces[0] is None else torch.cat(pieces, dim=-2)


def join_tokens(pieces: list[torch.Tensor], num_rows: int) -> torch.Tensor:
    """Return the router logits (B · t, E) of the pieces as (B · T, E), in the order of a single pass."""
    return torch.cat([piece.unflatten(0, (num_rows, -1)) for piece in pieces], dim=1).flatten(0, 1)


def cut_by_mask(values: list[torch.Tensor], mask: torch.Tensor, start: int, end: int) -> list[torch.Tensor]:
    """Return those of values (F, D), one row for each True of mask (B, T), in columns start … end - 1."""
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)[mask]  # (F,)
    kept = (columns >= start) & (columns < end)  # (F,)
    return [value[kept] for value in values]


def join_attentions(
    pieces: list[tuple[torch.Tensor, ...]], past_length: int, reads_images: bool = False
) -> tuple[torch.Tensor, ...]:
    """Return attention maps (B, H, t, keys) of the pieces as (B, H, T, all keys).

    Zeros fill in for keys that a piece does not see: later keys, and earlier ones that a sliding window has dropped.
    An attention implementation without maps, such as sdpa, gives (). reads_images: some layers attend to images by
    cross-attention (mllama), and their keys are the same in every piece.
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
    """Return True for a 2-D mask of columns, not one prepared for a single pass (4-D or per kind of layer)."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2


class PreparedMasks:
    """Masks that a model made for all columns of a call, sliced for each pass.

    masks: a tensor (B, 1 or H, T, keys), True or 0 where a query sees a key; or a dict by the kind of layer of such
        tensors, padding masks (B, past + T), or None where sdpa needs no mask.
    make: called with the embeddings of a pass and its cache, remakes these masks where one is None.
    hiding: what columns after a row's last latent do not see; None: nothing is hidden.
    """

    def __init__(self, masks, cache: Cache, length: int, make: Callable[[torch.Tensor, Cache], dict], hiding=None):
        self.masks, self.make, self.length = masks if isinstance(masks, dict) else {None: masks}, make, length
        self.hiding: Hiding | None = hiding
        unknown = [type(mask).__name__ for mask in self.masks.values() if not isinstance(mask, torch.Tensor | None)]
        if unknown:
            raise ValueError(
                f"Thoughts need an attention mask that can be sliced, but this call has a {unknown[0]}: load the "
                "model with attn_implementation='sdpa' or 'eager'."
            )
        self.past_length = int(cache.get_seq_length())
        self.offsets = {kind: self.sizes(kind, cache, length)[1] for kind in self.masks}

    def sizes(self, kind: str | None, cache: Cache, length: int) -> tuple[int, int]:
        """Return how many keys a pass of `length` columns sees in layers of this kind, and the first key's index."""
        slides = any(word in (kind or "") for word in ("sliding", "chunked"))
        cache = text_cache(cache)
        layers = [isinstance(layer, CacheLayerMixin) and layer.is_sliding == slides for layer in cache.layers]
        return cache.get_mask_sizes(length, layers.index(True) if True in layers else 0)

    def of_columns(self, embeds: torch.Tensor, start: int, cache: Cache):
        """Return the masks of a pass over embeds (B, t, D) that begin at column start."""
        end, made = start + embeds.shape[1], None
        cut = {}
        for kind, mask in self.masks.items():
            if mask is not None and mask.ndim == 2:
                cut[kind] = mask[:, mask.shape[1] - self.length :][:, start:end]
                continue
            num_keys, offset = self.sizes(kind, cache, end - start)
            if mask is not None:
                first = offset - self.offsets[kind]
                cut[kind] = mask[:, :, start:end, first : first + num_keys]
            elif self.hiding is None:
                made = self.make(embeds, cache) if made is None else made
                cut[kind] = made[kind] if isinstance(made, dict) else made
            if self.hiding is not None:
                columns = (self.past_length + start, self.past_length + end)
                cut[kind] = self.hiding.prepared_mask(cut.get(kind), *columns, offset, num_keys)
        return cut.get(None) if None in cut else cut

    def safe_ends(self, latents: torch.Tensor) -> list[int]:
        """Return for each column 0 … T the first column, at or after it, before which the call may be split.

        A split is unsafe where a row has bidirectional attention across it, as within an image in Gemma 3.

        Raises:
            ValueError: a row has one of its latents (B, T) inside a block of bidirectional attention.
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
                f"Row {row} of the batch has a latent in a block of bidirectional attention, but a thought is the "
                "previous token's state, which would see it: end images and prefixes before latents (token_type_ids)."
            )
        ends, unsafe = [self.length], crosses.any(dim=0).tolist()
        for column in range(self.length - 1, -1, -1):
            ends.append(ends[-1] if column and unsafe[column - 1] else column)
        return ends[::-1]


def positions_from_mask(attention_mask: torch.Tensor, num_columns: int) -> torch.Tensor:
    """Return positions (B, num_columns) that count real tokens from 0, with 0 at padding on the left."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_columns:]


def check_positions(position_ids: torch.Tensor | None, num_columns: int) -> None:
    """Raise ValueError for positions (…, T) whose number of columns is not that of the call."""
    if position_ids is not None and position_ids.shape[-1] != num_columns:
        raise ValueError(
            f"position_ids have {position_ids.shape[-1]} columns, but this call has {num_columns}. Some models, such "
            "as Qwen2.5-VL, make them from the attention_mask (B, past + T) of a call over past_key_values: pass "
            "position_ids (…, B, T) of only these columns, or use generate()."
        )


def position_limit(decoder: nn.Module) -> int | None:
    """Return the number of rows in a decoder's position-embedding table; None if it has no such table.

    A table is an embedding, not that of the tokens, with one row for each of `max_position_embeddings`; OPT and BART
    keep a few more rows.
    """
    limit = getattr(decoder.config, "max_position_embeddings", None)
    if limit is None:
        return None
    tokens = decoder.get_input_embeddings()
    tables = (module for module in decoder.modules() if isinstance(module, nn.Embedding) and module is not tokens)
    return limit if any(limit <= table.num_embeddings <= limit + 2 for table in tables) else None


def masks_of_call(decoder: nn.Module, num_columns: int, attention_mask, position_ids, past_key_values) -> dict:
    """Return the attention_mask and position_ids of a thinking decoder's call of num_columns columns.

    The mask is also 0 at latents that rows left out earlier; by default positions count its real tokens.

    Raises:
        ValueError: no mask although rows left latents out; more tokens than the decoder has positions.
        NotImplementedError: the cache of continuous batching.
    """
    if not isinstance(past_key_values, Cache | None):
        raise NotImplementedError(
            f"The cache is a {type(past_key_values).__name__}, with which continuous batching packs requests into one "
            "pass, but each thought needs its own pass: use generate()."
        )
    attention_mask = with_mask_of_left_out(attention_mask, past_key_values)
    if position_ids is None and is_two_dimensional(attention_mask):
        position_ids = positions_from_mask(attention_mask, num_columns)  # (B, T)
    check_length(decoder, num_columns, position_ids, past_key_values)
    return {"attention_mask": attention_mask, "position_ids": position_ids}


def check_length(decoder: nn.Module, num_columns: int, position_ids: torch.Tensor | None, past_key_values) -> None:
    """Raise ValueError if a call would read past the end of the position table; single steps are not checked."""
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


def with_mask_of_left_out(attention_mask: torch.Tensor | None, past_key_values: Cache | None) -> torch.Tensor | None:
    """Return a mask (B, length) with 0 also at the latents that rows left out when the cache was filled.

    A mask prepared for a single pass (4-D) is returned unchanged: it was made from one. None or other rows raise.
    """
    known = ThoughtState.of(past_key_values).attention_mask  # (B, filled)
    if known is None or not (attention_mask is None or is_two_dimensional(attention_mask)):
        return attention_mask
    if attention_mask is None:
        raise ValueError(
            "Rows of past_key_values stopped thinking early, but there is no attention_mask to leave out their "
            "latents: pass the attention_mask (B, past + T) of all columns."
        )
    if len(known) != len(attention_mask):
        raise ValueError(
            f"past_key_values hold {len(known)} rows that stopped thinking early, but the attention_mask has "
            f"{len(attention_mask)} rows: use a fresh cache for other rows."
        )
    rest = attention_mask.new_ones(len(attention_mask), attention_mask.shape[1] - known.shape[1])
    return attention_mask * torch.cat([known.to(attention_mask), rest], dim=1)


# --- passes ----------------------------------------------------------------------------------------------------------
class Passes:
    """The arguments of one decoder call, sliced by column, and the outputs of its passes.

    call_decoder: called with a cache and the arguments of one pass. cache: read and written by the passes.
    inputs: keyword arguments of the call, including inputs_embeds (B, T, D).
    keeps_cache: True if the cache outlives the call. may_move: True if the column layout may change.
    ends: for each pass, the column (B,) of every row's last token in it; None: the last column, whose state is unused
        in rows that have padding there, because no latent follows.
    hiding: what columns after a row's last latent do not see; None: nothing is hidden.
    masks: set if the outer model prepared masks for all columns. safe_ends: for each column, the first at or after it
        before which the call may be split; empty if it may be split anywhere. held: a piece that ended elsewhere.
    embeds_run: what each pass read, (B, t, D).
    """

    def __init__(self, call_decoder: Callable, cache: Cache | None, inputs: dict, *, keeps_cache: bool):
        self.call_decoder, self.cache, self.inputs, self.keeps_cache = call_decoder, cache, inputs, keeps_cache
        self.may_move, self.ends, self.hiding = False, None, None
        self.masks, self.safe_ends, self.held = None, [], None
        self.length = inputs["inputs_embeds"].shape[1]
        self.outputs, self.embeds_run = [], []

    def pieces(self, columns: list[int], cuts: list[int] = ()) -> Iterator[tuple[int, torch.Tensor, bool]]:
        """Yield each piece's first column, the piece (B, t, D), and True if it begins at a column, not just a cut."""
        # Not `start in columns` over `sorted({0, *columns})`: torch.compile takes it for False in later calls.
        begins = [(0, False)]
        for start, is_column in sorted([*((cut, False) for cut in cuts), *((column, True) for column in columns)]):
            if start == begins[-1][0]:
                begins.pop()
            begins.append((start, is_column))
        sizes = [end - start for start, end in pairwise([*(start for start, _ in begins), self.length])]
        pieces = self.inputs["inputs_embeds"].split(sizes, dim=1)  # slices would each be a copy
        for (start, is_column), embeds in zip(begins, pieces):
            yield start, embeds, is_column

    def run_cut(self, embeds: torch.Tensor, start: int, cuts: list[int]) -> torch.Tensor:
        """Run columns (B, t, D) from start on, with a pass at each cut among them too; see `run`."""
        end = start + embeds.shape[1]
        starts = [start, *(cut for cut in cuts if start < cut < end), end]
        for piece, (begin, _) in zip(embeds.split([b - a for a, b in pairwise(starts)], dim=1), pairwise(starts)):
            state = self.run(piece, begin)
        return state

    def arguments_of(self, embeds: torch.Tensor, start: int, cache: Cache | None) -> dict:
        """Return the arguments of a pass over embeds (B, t, D) from column start on, without the cache."""
        end = start + embeds.shape[1]
        given = {name: value for name, value in self.inputs.items() if value is not None}
        by_column = given.keys() & COLUMN_AXES.keys() - {"inputs_embeds"}
        cut = {name: given[name].narrow(COLUMN_AXES[name], start, end - start) for name in by_column}
        for name, mask in ROWS_OF_MASKS.items():
            if name in given:
                cut[name] = cut_by_mask(given[name], given[mask], start, end)
        if self.outputs:
            cut |= dict.fromkeys(given.keys() & READ_ONCE)
        if self.hiding is not None:
            past_length = self.hiding.kinds.shape[1] - self.length
            cut |= self.hiding.encoder_inputs(given, past_length + start)
        if self.masks is not None:
            cut["attention_mask"] = self.masks.of_columns(embeds, start, cache)
        elif self.hiding is not None:
            of_call = given.get("attention_mask")
            cut["attention_mask"] = self.hiding.mask_of(of_call, past_length + start, past_length + end)
        elif "attention_mask" in given and end < self.length:
            cut["attention_mask"] = given["attention_mask"][:, : end - self.length]  # (B, past + end)
        return {**self.inputs, **cut, "inputs_embeds": embeds}

    def run(self, embeds: torch.Tensor, start: int) -> torch.Tensor:
        """Run the decoder over a piece (B, t, D) and keep its output; return each row's last state (B, D).

        A piece that ends where the call may not be split is held back, tried with the columns that it needs, and run
        together with the next piece.
        """
        if self.held is not None:
            (start, before), self.held = self.held, None
            embeds = torch.cat([before, embeds], dim=1)
        if self.safe_ends and self.safe_ends[start + embeds.shape[1]] > start + embeds.shape[1]:
            state = self.states_of(embeds, start)[:, -1]
            self.held = start, embeds
            return state
        if self.outputs:
            self.cache = next_pass(self.cache)
        output = self.call_decoder(self.cache, **self.arguments_of(embeds, start, self.cache))
        states = output.last_hidden_state  # (B, t, D)
        self.outputs.append(output)
        self.embeds_run.append(embeds)
        if self.ends is None:
            return states[:, -1]
        rows = torch.arange(len(states), device=states.device)  # (B,)
        return states[rows, self.ends[len(self.outputs) - 1]]

    def states_of(self, embeds: torch.Tensor, start: int) -> torch.Tensor:
        """Return the states (B, t, D) of a piece that will be run again; the cache does not change."""
        length, end = embeds.shape[1], start + embeds.shape[1]
        if self.held is not None:  # not in the cache yet
            start, before = self.held
            embeds = torch.cat([before, embeds], dim=1)
        if self.safe_ends:
            embeds = torch.cat([embeds, self.inputs["inputs_embeds"][:, end : self.safe_ends[end]]], dim=1)
        cache = throwaway(self.cache)  # for a static cache, as long as its filled part
        states = self.call_decoder(cache, **self.arguments_of(embeds, start, cache)).last_hidden_state
        return states[:, end - start - length : end - start]

    def join_states(self, pieces: tuple) -> torch.Tensor | None:
        """Return a layer's hidden states (B, T, D); with several streams (S, B, T, D) or (B, T, S, D)."""
        columns = [embeds.shape[1] for embeds in self.embeds_run]
        has_streams_last = pieces[0] is not None and [piece.shape[-2] for piece in pieces] != columns
        return torch.cat(pieces, dim=1) if has_streams_last else join_columns(pieces)

    def join_maps_beside(self, pieces: tuple) -> torch.Tensor:
        """Return cross-attention maps (B, H, t, E) as (B, H, T, E), zeros for passes without encoder states."""
        zeros = torch.zeros_like(pieces[0][:, :, :1]).expand  # (B, H, 1, E)
        pairs = zip(pieces, self.embeds_run)
        return torch.cat([zeros(-1, -1, e.shape[1], -1) if piece is None else piece for piece, e in pairs], dim=2)

    def joined(self):
        """Return the output for all columns, in the decoder's own output class."""
        first, joined = self.outputs[0], {CACHE: self.cache if self.keeps_cache else None}
        if len(self.outputs) == 1:
            return type(first)(**{**first, **joined})
        joined["last_hidden_state"] = join_columns([output.last_hidden_state for output in self.outputs])
        if first.get("hidden_states") is not None:
            layers = zip(*(output.hidden_states for output in self.outputs))
            joined["hidden_states"] = tuple(self.join_states(layer) for layer in layers)
        if first.get("attentions") is not None:
            past_length = int(self.cache.get_seq_length()) - self.length
            reads_images = not self.inputs.keys().isdisjoint(READ_ONCE)
            joined["attentions"] = join_attentions([out.attentions for out in self.outputs], past_length, reads_images)
        if first.get("router_logits") is not None:
            layers, rows = zip(*(output.router_logits for output in self.outputs)), self.embeds_run[0].shape[0]
            joined["router_logits"] = tuple(join_tokens(layer, rows) for layer in layers)
        if first.get("cross_attentions") is not None:
            layers = zip_longest(*(output.cross_attentions for output in self.outputs))
            joined["cross_attentions"] = tuple(self.join_maps_beside(layer) for layer in layers)
        return type(first)(**joined)
