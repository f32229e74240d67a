"""Rows that stop thinking before their last latent, and the head that tells them to.

A latent whose attention mask is 0 is skipped: no state is fed back into it, nobody attends to it, positions pass over
it, and the state of the column before stands for its own. A row that stops after two of four thoughts,

    q q <start> L L L L <end> a        mask   1 1 1 1 1 0 0 1 1        positions   0 1 2 3 4 4 4 5 6

is so the row with two latents, and the answer may follow the last latent directly. The rows of a batch stop where they
like, and share their columns all the same.

The stop head looks at the state that would be fed back next: with p = σ(w · h + b) a row stops if p > threshold. A
threshold drawn uniformly from [0, 1) for each latent stops it with probability p, which is how RL explores.

Shapes: B batch, T tokens, N latents, D hidden.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache

from .compat_mmcoconut import CACHE
from .latent_mmcoconut import (
    ThinkOutput,
    gather_thoughts,
    join_outputs,
    positions_from_mask,
    take_columns,
    think,
)


# Of a head that has learnt nothing: rows then think on with probability 0.88, whatever the state.
INITIAL_BIAS = -2.0


class StopHead(nn.Linear):
    """Logits (…) of stopping here instead of thinking once more, from states (…, D): w · h + b."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(states)[..., 0]


def carry_states(states: torch.Tensor, skipped: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """States (B, T, D) with that of the last column which was not skipped in each place of (B, T) that was.

    before (B, D): the state of the column before the first, for rows whose first columns are skipped.
    """
    if before is None:
        before = states[:, 0]
    columns = torch.arange(1, skipped.shape[1] + 1, device=skipped.device)  # (T,), 0 is the column before the first
    source = torch.where(skipped, 0, columns).cummax(dim=1).values  # (B, T)
    all_states = torch.cat([before[:, None].to(states.dtype), states], dim=1)  # (B, 1 + T, D)
    return take_columns(all_states, source)


def states_before(states: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """Of each column of (B, T, D) the state of the column before; of the first `before` (B, D), or its own."""
    first = states[:, :1] if before is None else before[:, None].to(states.dtype)
    return torch.cat([first, states[:, :-1]], dim=1)


def packed(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values (B, T) at the True columns of (B, T), packed to the left: (B, N), 0 where a row has fewer."""
    return gather_thoughts(values[..., None], mask)[0][..., 0]


def first_latents(latent_mask: torch.Tensor) -> torch.Tensor:
    """(B, T), True at the latents that follow no latent, where a row begins to think."""
    before = nn.functional.pad(latent_mask, (1, 0))[:, :-1]
    return latent_mask & ~before


def first_thoughts(latent_mask: torch.Tensor, num_thoughts: torch.Tensor) -> torch.Tensor:
    """(B, T), True at the first num_thoughts (B,) latents of each run of latents (B, T)."""
    order = latent_mask.long().cumsum(dim=1)  # (B, T), from 1
    before_run = torch.where(first_latents(latent_mask), order - 1, 0).cummax(dim=1).values  # (B, T)
    return latent_mask & (order - before_run <= num_thoughts[:, None])


def stop_log_probs(stop_logits: torch.Tensor, kept: torch.Tensor, latent_mask: torch.Tensor) -> torch.Tensor:
    """log P (B,) that rows think at the latents `kept` (B, T) of their latents (B, T) and at no others.

    stop_logits (B, N): the head's, before each latent. At the first of a run, and behind each that was thought, it is
    decided whether to think: Σ log(1 - p), and log p where a row stops. Behind a stop nothing is decided.
    """
    begins, thought, real = (
        packed(mask.float(), latent_mask).bool() for mask in (first_latents(latent_mask), kept, latent_mask)
    )
    decides = (begins | nn.functional.pad(thought, (1, 0))[:, :-1]) & real  # (B, N)
    thinks = nn.functional.logsigmoid(-stop_logits) * (decides & thought)
    stops = nn.functional.logsigmoid(stop_logits) * (decides & ~thought)
    return (thinks + stops).sum(dim=1)


def is_two_dimensional(attention_mask) -> bool:
    """Whether a mask is of columns, and not one that was made for a single pass, 4-D or by the kind of layer."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2


def mask_without(skipped: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None):
    """The mask (B, past + T) of a call, made where there was none, with 0 at its skipped latents (B, T)."""
    if attention_mask is None:
        length = skipped.shape[1] if past_key_values is None else int(past_key_values.get_seq_length())
        attention_mask = torch.ones(len(skipped), length, dtype=torch.long, device=skipped.device)
    past_length = attention_mask.shape[1] - skipped.shape[1]
    return attention_mask.masked_fill(nn.functional.pad(skipped, (past_length, 0)), 0)


def remember_skipped(past_key_values: Cache, attention_mask: torch.Tensor | None) -> None:
    """Note in a cache the mask (B, length) of a call in which latents were left out, for later calls."""
    if attention_mask is not None:
        past_key_values.mask_of_stopped = attention_mask


def known_mask(past_key_values: Cache | None) -> torch.Tensor | None:
    """The mask (B, length) that was noted in a cache, as far as the cache is still filled: it may have been cropped.

    Rows that were put in another order since are not noticed.
    """
    known = getattr(past_key_values, "mask_of_stopped", None)  # (B, filled then)
    if known is None:
        return None
    filled = int(past_key_values.get_seq_length())
    if filled < known.shape[1]:
        known = past_key_values.mask_of_stopped = known[:, :filled]
    return known


def without_skipped(attention_mask: torch.Tensor | None, past_key_values: Cache | None) -> torch.Tensor | None:
    """A mask (B, length) with 0 also at the latents that rows left out when the cache was filled.

    One that was made for a single pass, 4-D, stays what it is: it was made of such a mask.

    Raises:
        ValueError: no mask, though rows left latents out; a mask of other rows.
    """
    known = known_mask(past_key_values)  # (B, filled)
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


def check_window(sees_all_columns: bool, window: int | None, num_columns: int) -> None:
    """A latent that is left out still takes a column, and so a place in a sliding window.

    Raises:
        ValueError: such a decoder, where the sequence of so many columns is longer than its window.
    """
    if not sees_all_columns and (window is None or num_columns > window):
        raise ValueError(
            f"Rows leave latents out, whose columns would stand in a window of {window}, and the sequence has "
            f"{num_columns} columns: take a decoder with full attention, or leave the latents out of the prompt."
        )


def check_can_stop(config, attention_mask: torch.Tensor | None, *, training: bool, fixed_passes: bool) -> None:
    """Whether rows of a call can stop by themselves.

    fixed_passes: the number of decoder passes must be known before, as under FSDP.

    Raises:
        ValueError: what does not fit, and what to do instead.
    """
    if not config.stop_head:
        raise ValueError(
            "stop_threshold needs a model with a stop head, and config.stop_head is False: leave it out, or train one "
            "(a recipe with `stop_head: true` and `objective: grpo` or `distill_stops`)."
        )
    if training or fixed_passes:
        raise ValueError(
            "Rows cannot stop by themselves in training, or while weights are sharded: call model.eval(), or give the "
            "latents that they leave out an attention_mask of 0 instead."
        )
    if not (attention_mask is None or is_two_dimensional(attention_mask)):
        raise ValueError("stop_threshold needs a 2-D attention_mask (B, T), not one made for a single pass.")


class Stops:
    """Whether rows stop: the head's probability for a state (B, D) against a threshold.

    threshold: a number, or (B, N) one for each latent of each row.

    Raises:
        ValueError: thresholds (B, N) of another number of rows, or of fewer latents than a row has.
    """

    def __init__(self, head: StopHead, threshold: float | torch.Tensor, latent_mask: torch.Tensor):
        self.head, self.threshold = head, threshold
        rows, most = latent_mask.shape[0], int(latent_mask.sum(dim=1).max())
        if isinstance(threshold, torch.Tensor) and (threshold.shape[0] != rows or threshold.shape[1] < most):
            raise ValueError(
                f"stop_threshold is of {threshold.shape[0]} rows with {threshold.shape[1]} latents, and this call has "
                f"{rows} rows with up to {most}: give one number for all, or (B, N)."
            )

    def __call__(self, states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """(B,) for states (B, D) before the latent of each row that has `order` (B,) latents before it."""
        threshold = self.threshold
        if isinstance(threshold, torch.Tensor):
            threshold = threshold.gather(1, order.clamp(max=threshold.shape[1] - 1)[:, None])[:, 0]  # (B,)
        return self.head(states).sigmoid() > threshold


def run_piece(
    decoder,
    inputs_embeds: torch.Tensor,
    *,
    start: int,
    end: int,
    thinks: torch.Tensor | None,
    skipped: torch.Tensor,
    attention_mask: torch.Tensor,
    noise: torch.Tensor | None = None,
    **kwargs,
) -> ThinkOutput:
    """`think` over columns start … end - 1 of (B, T, D), of which the first is a thought in the rows of thinks (B,).

    attention_mask (B, past + T), in which the latents skipped (B, T) so far are still 1.
    """
    columns = slice(start, end)
    mask = attention_mask[:, : attention_mask.shape[1] - skipped.shape[1] + end]  # (B, past + end)
    left_out = nn.functional.pad(skipped[:, :end], (mask.shape[1] - end, 0))  # (B, past + end)
    mask = mask.masked_fill(left_out, 0)
    is_thought = torch.zeros_like(skipped[:, columns])
    if thinks is not None:
        is_thought = nn.functional.pad(thinks[:, None], (0, end - start - 1))  # (B, end - start)
    return think(
        decoder,
        inputs_embeds[:, columns],
        is_thought,
        columns=[] if thinks is None else [0],
        attention_mask=mask,
        position_ids=positions_from_mask(mask, end - start),
        noise=None if noise is None else noise[:, columns],
        **kwargs,
    )


def think_until_stopped(
    decoder,
    inputs_embeds: torch.Tensor,
    latent_mask: torch.Tensor,
    *,
    columns: list[int],
    stops: Stops,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache,
    previous: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    linked: torch.Tensor | None = None,
    **kwargs,
) -> ThinkOutput:
    """`think` with rows that stop: each before the first latent of a run of them at which `stops` says so.

    Behind the column at which the last row stops there is no further pass for thoughts. Arguments and results are
    those of `think`, but positions are counted from the mask, whatever position_ids says, and `linked` is not looked
    at, as this is no training; `skipped` (B, T) says which latents were left out.
    """
    length, past_length = inputs_embeds.shape[1], int(past_key_values.get_seq_length())
    if attention_mask is None:
        attention_mask = latent_mask.new_ones(len(latent_mask), past_length + length, dtype=torch.long)
    kwargs |= {"attention_mask": attention_mask, "past_key_values": past_key_values}
    begins, order = first_latents(latent_mask), latent_mask.long().cumsum(dim=1) - 1  # (B, T) each
    skipped, stopped = torch.zeros_like(latent_mask), torch.zeros_like(latent_mask[:, 0])
    outputs, start, thinks = [], 0, None
    for column in columns:
        is_latent, stopped = latent_mask[:, column], stopped & ~begins[:, column]
        decides = is_latent & ~stopped  # (B,)
        if decides.any():
            if column > start:
                piece = {"start": start, "end": column, "thinks": thinks, "previous": previous}
                outputs.append(run_piece(decoder, inputs_embeds, skipped=skipped, **piece, **kwargs))
                previous = outputs[-1].last_hidden_state[:, -1]  # (B, D)
            stopped = stopped | (decides & stops(previous, order[:, column].clamp(min=0)))
            start, thinks = column, is_latent & ~stopped
        skipped[:, column] = is_latent & stopped
    piece = {"start": start, "end": length, "thinks": thinks, "previous": previous}
    outputs.append(run_piece(decoder, inputs_embeds, skipped=skipped, **piece, **kwargs))
    joined = join_outputs(outputs, [o.inputs_embeds for o in outputs], past_key_values, past_length=past_length)
    joined.skipped = skipped
    return joined


class GenerationThatStops:
    """The part of a model with a head that lets `generate` go on behind rows which stopped; before GenerationMixin."""

    def settle_stopping(self, kwargs: dict) -> None:
        """Set in the arguments of `generate` the threshold above which rows stop, and the mask of those that did.

        stop_threshold: 0.5 by default where there is a stop head; 1.0 thinks all thoughts.

        Raises:
            ValueError: ways of generation that run the prompt in other pieces than the loop does.
        """
        name = "decoder_attention_mask" if self.config.is_encoder_decoder else "attention_mask"
        mask = without_skipped(kwargs.get(name), kwargs.get(CACHE))
        if mask is not None:
            kwargs[name] = mask
        if self.config.stop_head:
            kwargs.setdefault("stop_threshold", 0.5)
        if kwargs.get("stop_threshold") is None:
            return
        given = kwargs.get("generation_config") or self.generation_config
        for name in ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model"):
            if kwargs.get(name, getattr(given, name, None)) is not None:
                raise ValueError(
                    f"{name} runs the prompt in pieces of its own, and rows of this model stop thinking by "
                    "themselves: leave it out, or pass stop_threshold=None to think at all latents."
                )

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict:
        """Prepare a step, behind a prefill in which latents were left out with mask and positions that say so."""
        prefix = "decoder_" if self.config.is_encoder_decoder else ""
        past_key_values, mask = kwargs.get(CACHE), kwargs.get(f"{prefix}attention_mask")
        known = known_mask(past_key_values)
        if known is not None:
            if mask is None:  # as long as what is in the cache and the columns of this step
                length = int(past_key_values.get_seq_length()) + (kwargs.get("next_sequence_length") or 1)
                mask = known.new_ones(len(known), length)
            mask = without_skipped(mask, past_key_values)
            kwargs[f"{prefix}attention_mask"] = mask
            if kwargs.get(f"{prefix}position_ids") is not None:
                kwargs[f"{prefix}position_ids"] = positions_from_mask(mask, mask.shape[1])
        return super().prepare_inputs_for_generation(*args, **kwargs)
