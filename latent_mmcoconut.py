"""The recurrence of Coconut over any Hugging Face decoder: hidden states fed back as the next input embeddings.

A row of the batch may hold latent placeholders anywhere after its first token. At a latent column c of row b the
decoder reads, instead of a token's embedding, the thought

    thought[b] = feed(last_hidden_state[b, c - 1])

that is, the state (after the final norm) which the decoder itself computed one column earlier. `think` cuts the
sequence at the columns where any row has a latent and runs each piece once over the KV cache; `think_uncached` is the
definition it must equal, recomputing the whole prefix for every thought.

Shapes: B batch, T tokens, N latents, D hidden, H heads, V vocabulary.
Source: Hao et al. 2024, Training Large Language Models to Reason in a Continuous Latent Space,
https://arxiv.org/abs/2412.06769.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import nn
from transformers.cache_utils import Cache

from .caches_mmcoconut import ReplayCache, ReplayCrossCache


@dataclass
class ThinkOutput:
    """What one run of the loop leaves behind.

    last_hidden_state (B, T, D): the decoder's output at every column.
    inputs_embeds (B, T, D): what the decoder read, thoughts included.
    past_key_values: the cache after the last column.
    hidden_states, attentions, cross_attentions: as the decoder gives them, joined over the pieces; None where not
        asked for.
    skipped (B, T): latents at which nothing was thought; None where there are none.
    attention_mask (B, past + T): 0 at those too; None where there are none.
    stop_logits (B, N): the stop head's, before each latent; None where not asked for.
    """

    last_hidden_state: torch.Tensor
    inputs_embeds: torch.Tensor
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    skipped: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    stop_logits: torch.Tensor | None = None


class ThoughtFeed(nn.Module):
    """What a hidden state goes through before it is read as an embedding; (B, D) → (B, D).

    `none`: h. `embedding`: h · r / ‖h‖ with r the mean norm of the token embeddings (no gradient through r).
    `projection`: LayerNorm(W₂ gelu(W₁ h)). A forward hook on this module sees, and may replace, every thought.
    """

    def __init__(self, hidden_size: int, thought_norm: str):
        super().__init__()
        self.thought_norm = thought_norm
        if thought_norm == "projection":
            self.linear_1 = nn.Linear(hidden_size, hidden_size)
            self.linear_2 = nn.Linear(hidden_size, hidden_size)
            self.norm = nn.LayerNorm(hidden_size)

    def forward(self, hidden_state: torch.Tensor, embedding_norm: torch.Tensor | None = None) -> torch.Tensor:
        if self.thought_norm == "embedding":
            norms = hidden_state.norm(dim=-1, keepdim=True)  # (B, 1)
            norms = norms.clamp(min=torch.finfo(norms.dtype).eps)  # 0 at padding, whose gradients would be NaN
            return hidden_state * (embedding_norm / norms).to(hidden_state.dtype)
        if self.thought_norm == "projection":
            return self.norm(self.linear_2(nn.functional.gelu(self.linear_1(hidden_state))))
        return hidden_state


def positions_from_mask(attention_mask: torch.Tensor, num_columns: int) -> torch.Tensor:
    """Positions (B, num_columns) that count real tokens from 0; padding on the left gets position 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_columns:]


def take_columns(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """values (B, T, …) at columns (B, N): (B, N, …)."""
    shape = (*columns.shape, *values.shape[2:])
    return values.gather(1, columns.view(*columns.shape, *[1] * (values.ndim - 2)).expand(shape))


def column_lists(*masks: torch.Tensor) -> list[list[int]]:
    """For each mask (B, T) the columns in which any row is True; the one time the loop waits for the device."""
    any_row = torch.stack([mask.any(dim=0) for mask in masks]).tolist()
    return [[column for column, is_set in enumerate(row) if is_set] for row in any_row]


def latent_columns(latent_mask: torch.Tensor) -> list[int]:
    """The columns in which any row of (B, T) has a latent."""
    return column_lists(latent_mask)[0]


def is_sharded(decoder: nn.Module) -> bool:
    """Whether FSDP2 gathers the decoder's weights at every pass, so that all processes must make as many passes."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule  # not in a build of torch without torch.distributed

    return any(isinstance(module, FSDPModule) for module in decoder.modules())


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or the whole of one that FSDP2 has cut into shards; every process must call this."""
    if not dist.is_available():
        return tensor
    from torch.distributed.tensor import DTensor  # not in a build of torch without torch.distributed

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def agreed_columns(columns: list[int], num_columns: int, device: torch.device) -> list[int]:
    """The columns, and as many more as the process with the most decoder passes needs; every process must call this.

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


def check_has_predecessor(latent_mask: torch.Tensor, attention_mask: torch.Tensor | None, has_past: bool) -> None:
    """A thought is the state of the column before it, which must be a token of the same row.

    attention_mask (B, past + T) or None.

    Raises:
        ValueError: a latent at the first column of a sequence without a past, or directly after padding.
    """
    orphan = latent_mask[:, 0] & (not has_past)  # (B,)
    if attention_mask is not None:
        follows = nn.functional.pad(attention_mask.bool(), (1, 0), value=True)[:, :-1]  # (B, past + T)
        orphan = orphan | (latent_mask & ~follows[:, -latent_mask.shape[1] :]).any(dim=1)
    if orphan.any():
        row = orphan.nonzero()[0].item()
        raise ValueError(
            f"Row {row} of the batch has a latent token with no token before it, and a thought is the state of the "
            "token before: put the question or <|start-latent|> in front, or pass the past_key_values of the text "
            "before."
        )


def check_thoughts_matter(latent_mask: torch.Tensor, labelled: torch.Tensor) -> None:
    """A thought after the last labelled token (both masks (B, T)) could not change the loss.

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


def linked_thoughts(latent_mask: torch.Tensor, bptt_thoughts: int | None) -> torch.Tensor | None:
    """(B, T), True where a thought sends its gradient on to the state that it was: at each row's last latents.

    bptt_thoughts: how many of a row, counted from its last one; None, for all of them, gives None.

    Raises:
        ValueError: a negative number.
    """
    if bptt_thoughts is None:
        return None
    if bptt_thoughts < 0:
        raise ValueError(
            f"bptt_thoughts={bptt_thoughts} is less than 0: set it to how many thoughts of a row, from its last one, "
            "gradients flow back through, or to None for all."
        )
    return latent_mask.flip(1).cumsum(1).flip(1) <= bptt_thoughts  # (B, T), latents from here to the row's end


def cut_links(states: torch.Tensor, linked: torch.Tensor | None) -> torch.Tensor:
    """States (…, D) without their gradient where linked (…) is False; as they are for None."""
    return states if linked is None else torch.where(linked[..., None], states, states.detach())


def noise_by_column(noise: torch.Tensor, latent_mask: torch.Tensor) -> torch.Tensor:
    """Noise (B, N, D) of each row's latents, in their order, at their columns of (B, T): (B, T, D), elsewhere 0.

    Raises:
        ValueError: another N than the most latents that a row of this call has, or other rows.
    """
    rows, most = latent_mask.shape[0], int(latent_mask.sum(dim=1).max())
    if noise.shape[:2] != (rows, most):
        raise ValueError(
            f"thought_noise is of {noise.shape[0]} rows with {noise.shape[1]} thoughts, and this call has {rows} rows "
            f"with up to {most} latents: give noise (B, N, D) of the whole prompts, without prefill_chunk_size."
        )
    order = (latent_mask.long().cumsum(dim=1) - 1).clamp(min=0)  # (B, T)
    return take_columns(noise, order) * latent_mask[..., None]  # (B, T, D)


def perturb(thought: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """Thoughts (…, D) + noise (…, D) in units of their own root mean square, through which no gradient flows."""
    if noise is None:
        return thought
    size = thought.detach().float().square().mean(dim=-1, keepdim=True).sqrt()  # (…, 1)
    return thought + (size * noise).to(thought.dtype)


def put_thought(piece: torch.Tensor, is_latent: torch.Tensor, thought: torch.Tensor) -> torch.Tensor:
    """(B, t, D) with the first column replaced by (B, D) in the rows of (B,) that have a latent there."""
    first = torch.where(is_latent[:, None], thought.to(piece.dtype), piece[:, 0])  # (B, D)
    return torch.cat([first[:, None], piece[:, 1:]], dim=1)  # (B, t, D)


def seen_until(attention_mask: torch.Tensor | None, end: int):
    """The mask (B, keys) without its last -end columns; as it is, in whatever form, for the last piece (end = 0)."""
    return attention_mask if attention_mask is None or end == 0 else attention_mask[:, :end]


def join_columns(pieces: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Pieces (B, t, D) as (B, T, D); a single one as it is, not copied; None for a layer that was not asked for."""
    return pieces[0] if len(pieces) == 1 or pieces[0] is None else torch.cat(pieces, dim=1)


def join_attentions(pieces: list[tuple[torch.Tensor, ...]], past_length: int) -> tuple[torch.Tensor, ...]:
    """Attention maps (B, H, t, keys) of the pieces as (B, H, T, all keys); a single piece is returned as it is.

    Zeros stand for what a piece does not see: later keys, and earlier ones that a sliding window has let go. An
    attention implementation that makes no maps, as sdpa, leaves () of them.
    """
    if len(pieces) == 1 or not pieces[0]:
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


def think(
    decoder,
    inputs_embeds: torch.Tensor,
    latent_mask: torch.Tensor,
    *,
    columns: list[int],
    feed,
    past_key_values: Cache | None = None,
    previous: torch.Tensor | None = None,
    linked: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    ends: list[torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs,
) -> ThinkOutput:
    """Run the decoder over (B, T, D) with thoughts at the True columns of (B, T); every token passes once.

    Args:
        decoder: called as a Hugging Face base model; must write `past_key_values`.
        columns: where thoughts are read, from `latent_columns(latent_mask)`; empty where nothing is fed back. At one
            where no row has a latent the sequence is cut, and nothing else.
        feed: (B, D) hidden states → (B, D) embeddings.
        previous (B, D): the hidden state of the column before the first; needed only if that is a latent column.
        linked (B, T): where thoughts keep the gradient to the state before, from `linked_thoughts`; None: everywhere.
        noise (B, T, D): added to the thoughts, see `perturb`; None: nothing.
        ends: of every piece, the column (B,) in it of each row's last token; None: the last, as there is no padding.
        attention_mask (B, past + T) or None; position_ids (B, T) or None.
        kwargs: handed to every call of the decoder.
    """
    length = inputs_embeds.shape[1]
    past_length = int(past_key_values.get_seq_length()) if columns else 0
    outputs, read = [], []
    row = torch.arange(inputs_embeds.shape[0], device=inputs_embeds.device)  # (B,)
    # Not `start in columns` over `sorted({0, *columns, length})`: torch.compile takes it for False in later calls.
    starts = [0, *(column for column in columns if column > 0)]
    cuts = list(pairwise([*starts, length]))
    pieces = inputs_embeds.split([end - start for start, end in cuts], dim=1)  # of which slices would each be a copy
    for (start, end), piece in zip(cuts, pieces):  # (B, t, D)
        if start > 0 or len(starts) == len(columns):
            state = previous if linked is None else cut_links(previous, linked[:, start])
            thought = perturb(feed(state), None if noise is None else noise[:, start])  # (B, D)
            piece = put_thought(piece, latent_mask[:, start], thought)
        if isinstance(past_key_values, (ReplayCache, ReplayCrossCache)) and start > 0:
            past_key_values = past_key_values.next_pass()
        output = decoder(
            inputs_embeds=piece,
            attention_mask=seen_until(attention_mask, end - length),
            position_ids=position_ids[..., start:end] if position_ids is not None else None,
            past_key_values=past_key_values,
            **kwargs,
        )
        states = output.last_hidden_state  # (B, t, D)
        previous = states[:, -1] if ends is None else states[row, ends[len(outputs)]]  # (B, D)
        outputs.append(output)
        read.append(piece)
    return join_outputs(outputs, read, past_key_values, past_length=past_length)


def join_outputs(outputs: list, read: list[torch.Tensor], past_key_values: Cache, *, past_length: int) -> ThinkOutput:
    hidden_states = attentions = cross_attentions = None
    if getattr(outputs[0], "hidden_states", None) is not None:
        hidden_states = tuple(join_columns(layer) for layer in zip(*(o.hidden_states for o in outputs)))
    if getattr(outputs[0], "attentions", None) is not None:
        attentions = join_attentions([o.attentions for o in outputs], past_length)
    if getattr(outputs[0], "cross_attentions", None) is not None:
        cross_attentions = tuple(torch.cat(layer, dim=2) for layer in zip(*(o.cross_attentions for o in outputs)))
    return ThinkOutput(
        last_hidden_state=join_columns([o.last_hidden_state for o in outputs]),  # (B, T, D)
        inputs_embeds=join_columns(read),  # (B, T, D)
        past_key_values=past_key_values,
        hidden_states=hidden_states,
        attentions=attentions,
        cross_attentions=cross_attentions,
    )


def think_uncached(
    decoder, inputs_embeds, latent_mask, *, feed, linked=None, noise=None, attention_mask=None, position_ids=None
) -> ThinkOutput:
    """The definition of `think`: for each latent column from left to right, run the whole sequence again.

    for c in columns:  embeds[rows, c] = feed(decoder(embeds).last_hidden_state[rows, c - 1])

    with the state detached where `linked` is given and False, and with `noise` added where it is given.
    """
    inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}
    for column in latent_columns(latent_mask):
        hidden = decoder(inputs_embeds=inputs_embeds, **inputs).last_hidden_state  # (B, T, D)
        state = cut_links(hidden[:, column - 1], None if linked is None else linked[:, column])  # (B, D)
        thought = perturb(feed(state), None if noise is None else noise[:, column])  # (B, D)
        tail = put_thought(inputs_embeds[:, column:], latent_mask[:, column], thought)
        inputs_embeds = torch.cat([inputs_embeds[:, :column], tail], dim=1)  # (B, T, D)
    hidden = decoder(inputs_embeds=inputs_embeds, **inputs).last_hidden_state  # (B, T, D)
    return ThinkOutput(last_hidden_state=hidden, inputs_embeds=inputs_embeds)


def gather_thoughts(inputs_embeds: torch.Tensor, latent_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What was read at each row's latents, packed to the left: (B, N, D) and the mask (B, N) of real ones."""
    counts = latent_mask.sum(dim=1)  # (B,)
    num_latents = int(counts.max())
    columns = torch.argsort(~latent_mask, dim=1, stable=True)[:, :num_latents]  # (B, N)
    thoughts = take_columns(inputs_embeds, columns)  # (B, N, D)
    mask = torch.arange(num_latents, device=counts.device) < counts[:, None]  # (B, N)
    return thoughts * mask[..., None], mask
