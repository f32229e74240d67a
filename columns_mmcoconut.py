"""Masks, positions and latents as tensors of rows and columns, and checks of them.

Shapes: B batch, T tokens of a call, N latents, D hidden, P tokens of prompts.
"""

from itertools import accumulate

import torch
import torch.distributed as dist
from torch import nn


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
    """Return noise (B, N, D) of each row's latents, in their order, at their columns of (B, T): (B, T, D), or 0.

    Raises:
        ValueError: another N than the most latents that a row of this call has, or other rows.
    """
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
    """Return (B, T), True from each row's num_linked-th last latent on; None for all of them.

    Raises:
        ValueError: a negative number.
    """
    if num_linked is None:
        return None
    if num_linked < 0:
        raise ValueError(
            f"bptt_thoughts={num_linked} is less than 0: set it to how many thoughts of a row, from its last one, "
            "gradients flow back through, or to None for all."
        )
    return latents.flip(1).cumsum(1).flip(1) <= num_linked  # (B, T), latents from here to the row's end


def check_has_predecessor(latents: torch.Tensor, attention_mask: torch.Tensor | None, has_past: bool) -> None:
    """Raise for a latent (B, T) whose column before is no token of the same row, as its state is the thought.

    attention_mask (B, past + T) or None.

    Raises:
        ValueError: a latent at the first column of a sequence without a past, or directly after padding.
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


def check_thoughts_matter(latent_mask: torch.Tensor, labelled: torch.Tensor) -> None:
    """Raise for a thought after the last labelled token (both masks (B, T)), which could not change the loss.

    Raises:
        ValueError: such a latent in a row that has labels.
    """
    labels_ahead = labelled.flip(1).cumsum(1).flip(1)  # (B, T), labels from here on
    useless = (latent_mask & (labels_ahead == 0)).any(dim=1) & labelled.any(dim=1)  # (B,)
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
    """Return pieces (B, t, D) as (B, T, D); a single one as it is; None for a layer that was not asked for."""
    return pieces[0] if len(pieces) == 1 or pieces[0] is None else torch.cat(pieces, dim=1)


def join_attentions(pieces: list[tuple[torch.Tensor, ...]], past_length: int) -> tuple[torch.Tensor, ...]:
    """Return attention maps (B, H, t, keys) of the pieces as (B, H, T, all keys).

    Zeros stand for what a piece does not see: later keys, and earlier ones that a sliding window has let go. An
    attention implementation that makes no maps, as sdpa, leaves () of them.
    """
    if not pieces[0]:
        return pieces[0]
    ends = list(accumulate((piece[0].shape[2] for piece in pieces), initial=past_length))[1:]
    num_keys = max(ends[-1], *(attention.shape[-1] for attention in pieces[-1]))
    layers = []
    for layer in zip(*pieces):
        gone = [max(0, end - attention.shape[-1]) for end, attention in zip(ends, layer)]
        rest = [num_keys - left - attention.shape[-1] for left, attention in zip(gone, layer)]
        padded = [nn.functional.pad(attention, sides) for attention, *sides in zip(layer, gone, rest)]
        layers.append(torch.cat(padded, dim=2))  # (B, H, T, keys)
    return tuple(layers)


# --- masks and positions ---------------------------------------------------------------------------------------------


def is_two_dimensional(attention_mask) -> bool:
    """Return True for a mask of columns, and not one that was made for a single pass, 4-D or by the kind of layer."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2


def positions_from_mask(attention_mask: torch.Tensor, num_columns: int) -> torch.Tensor:
    """Return positions (B, num_columns) that count real tokens from 0; padding on the left gets position 0."""
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


def check_length(decoder: nn.Module, num_columns: int, position_ids: torch.Tensor | None, past_key_values) -> None:
    """Raise before a thinking decoder's table of positions is read past its end; single steps are not looked at.

    Raises:
        ValueError: with the sequence's length and the table's.
    """
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


def check_new_positions(limit: int | None, attention_mask: torch.Tensor | None, *, num_columns: int, num_new: int):
    """Raise before `generate` would read a position behind the last one.

    Args:
        limit: of `position_limit`.
        attention_mask (B, P): of the prompts, where padding takes no positions; None where it does.
        num_columns: P.
        num_new: the most tokens that may be generated; the last of them is not read and needs no position.

    Raises:
        ValueError: with the length of the longest prompt, max_new_tokens, the limit and what to change.
    """
    length = num_columns if attention_mask is None else int(attention_mask.sum(dim=-1).max())
    if limit is None or length + num_new - 1 <= limit:
        return
    room = limit - length + 1
    remedy = f"lower max_new_tokens to at most {room}, or " if room > 0 else ""
    raise ValueError(
        f"The longest prompt has {length} tokens, images and latents included, and max_new_tokens={num_new} may "
        f"follow, but the language model has {limit} positions: {remedy}shorten the question, leave out earlier "
        "turns, or take a language model with more positions."
    )


def check_window(sees_all_columns: bool, window: int | None, num_columns: int) -> None:
    """Raise where a latent that is left out would take the place of a column in a sliding window.

    Raises:
        ValueError: such a decoder, where the sequence of so many columns is longer than its window.
    """
    if not sees_all_columns and (window is None or num_columns > window):
        raise ValueError(
            f"Rows leave latents out, whose columns would stand in a window of {window}, and the sequence has "
            f"{num_columns} columns: take a decoder with full attention, or leave the latents out of the prompt."
        )


# --- weights in shards -----------------------------------------------------------------------------------------------


def is_sharded(decoder: nn.Module) -> bool:
    """Return True if FSDP2 gathers the decoder's weights at every pass: all processes must make as many passes."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule  # not in a build of torch without torch.distributed

    return any(isinstance(module, FSDPModule) for module in decoder.modules())


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself, or the whole of one that FSDP2 has cut into shards; every process must call this."""
    if not dist.is_available():
        return tensor
    from torch.distributed.tensor import DTensor  # not in a build of torch without torch.distributed

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def agreed_columns(columns: list[int], num_columns: int, device: torch.device) -> list[int]:
    """Return the columns, and as many more as the process with the most passes needs; every process must call this.

    At an additional column no row has a latent, so the sequence is only cut there: the same keys and values in two
    passes. They come first, where a pass has the fewest keys to attend to.

    Raises:
        ValueError: in every process, if one of them has fewer columns than another has passes.
    """
    num_passes = len({0, *columns})
    most = torch.tensor([num_passes, -num_columns], device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    most_passes, least_columns = most[0].item(), -most[1].item()
    if most_passes > least_columns:
        raise ValueError(
            f"With FSDP every process runs the decoder {most_passes} times in this step, as one of them has so many "
            f"latents, but the sequence of another has {least_columns} columns to be cut into: batch rows of similar "
            "lengths, or use fewer latents."
        )
    free = [column for column in range(1, num_columns) if column not in columns]
    return sorted([*columns, *free[: most_passes - num_passes]])
