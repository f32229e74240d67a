"""Other ways to think than one column after the other: schedules for `Thoughts.schedule`.

    ThinkTogether   all latents of a row are updated together, so many times (parallel thoughts)
    StopEarly       rows stop before their last latent where a head says so

Each is called with the passes of a call and its thoughts, as `think` is, and leaves as much behind. What a schedule
equals stands beside it: `think` itself, or its definition.

Shapes: B batch, T tokens, T' columns of another layout, L columns from the first to the last latent, S pieces, N
latents, D hidden.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers.cache_utils import Cache

from .compat_mmcoconut import is_sharded
from .passes_mmcoconut import (
    ThoughtState,
    is_two_dimensional,
    positions_from_mask,
)
from .thinking_mmcoconut import Passes, Thoughts, put_first


# --- parallel thoughts -----------------------------------------------------------------------------------------------
def _put_thoughts(inputs_embeds: torch.Tensor, latents: torch.Tensor, thoughts: torch.Tensor) -> torch.Tensor:
    """Return (B, T, D) with the columns of (B, T, D) in the places of (B, T) that are latents."""
    return torch.where(latents[..., None], thoughts.to(inputs_embeds.dtype), inputs_embeds)


@dataclass
class ThinkTogether:
    """All latents of a row updated together, num_iterations times, each from what the others were before.

    Every thought starts as the latent token's own embedding. An update runs the decoder once over the latents:

        thought_t[c] = feed(decoder(embeds with thought_{t-1}).last_hidden_state[c - 1])        t = 1 … num_iterations

    The i-th thought of a row is final after i updates, so that as many updates as thoughts give the sequential ones,
    values and gradients; fewer are another model, with so many passes over the latents in the place of N.

    Source: Wu et al. 2025, Parallel Continuous Chain-of-Thought with Jacobi Iteration,
    https://arxiv.org/abs/2506.18582.
    """

    num_iterations: int
    reads_again: ClassVar[bool] = True

    def __call__(self, passes: Passes, thoughts: Thoughts) -> None:
        """Run the text before the first latent once, the latents once an update, and then all from there to the end.

        After as many updates as a row has latents nothing changes any more, so there are no further ones.
        """
        first, last = thoughts.columns[0], thoughts.columns[-1]
        check_can_update(passes.cache, thoughts.sharded)
        inputs_embeds, state = passes.inputs["inputs_embeds"], thoughts.state_before  # (B, T, D), (B, D)
        if first > 0:
            state = passes.run(inputs_embeds[:, :first], 0)
        columns = slice(first, last + 1)
        block, latents = inputs_embeds[:, columns], thoughts.latents[:, columns]  # (B, L, D), (B, L)
        for _ in range(min(self.num_iterations, int(latents.sum(dim=1).max()))):
            states = state[:, None]  # (B, 1, D)
            if last > first:
                states = torch.cat([states, passes.states_of(block[:, :-1], first)], dim=1)  # (B, L, D)
            block = _put_thoughts(block, latents, thoughts.from_states(states, columns))
        passes.run(torch.cat([block, inputs_embeds[:, last + 1 :]], dim=1), first)
        if passes.keeps_cache:
            end = int(passes.cache.get_seq_length()) - (passes.length - last - 1)
            ThoughtState.within(passes.cache).thoughts_end = end


def think_together_uncached(
    decoder, inputs_embeds: torch.Tensor, thoughts: Thoughts, *, num_iterations: int, **kwargs
):
    """The definition of `ThinkTogether`: num_iterations times, run the whole sequence and replace all thoughts.

    Return the last hidden states and what was read, both (B, T, D). kwargs: for every call of the decoder.
    """
    columns = slice(0, inputs_embeds.shape[1])
    for _ in range(num_iterations):
        states = decoder(inputs_embeds=inputs_embeds, use_cache=False, **kwargs).last_hidden_state  # (B, T, D)
        before = torch.cat([states[:, :1], states[:, :-1]], dim=1)  # (B, T, D); nobody thinks in the first column
        inputs_embeds = _put_thoughts(inputs_embeds, thoughts.latents, thoughts.from_states(before, columns))
    states = decoder(inputs_embeds=inputs_embeds, use_cache=False, **kwargs).last_hidden_state  # (B, T, D)
    return states, inputs_embeds


def check_can_update(past_key_values: Cache, sharded: bool) -> None:
    """Raise under FSDP, in every process, and for a cache that holds thoughts of an earlier call, which are final."""
    if sharded:
        raise ValueError(
            "thought_schedule='jacobi' does not work with FSDP, where all processes must make as many passes: use "
            "DDP, or thought_schedule='sequential'."
        )
    end = ThoughtState.of(past_key_values).thoughts_end
    if end is not None and int(past_key_values.get_seq_length()) >= end:
        raise ValueError(
            f"past_key_values hold thoughts up to column {end - 1}, and thought_schedule='jacobi' updates all of a "
            "sequence together: pass the whole sequence in one call, without past_key_values and without "
            "prefill_chunk_size, or use thought_schedule='sequential'."
        )


# --- rows that stop --------------------------------------------------------------------------------------------------

# Of a head that has learnt nothing: rows then think on with probability 0.88, whatever the state.
INITIAL_BIAS = -2.0


class StopHead(nn.Linear):
    """Logits (…) of stopping here instead of thinking once more, from states (…, D): w · h + b."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(states)[..., 0]


def first_latents(latents: torch.Tensor) -> torch.Tensor:
    """Return (B, T), True at the latents that follow no latent, where a row begins to think."""
    before = nn.functional.pad(latents, (1, 0))[:, :-1]
    return latents & ~before


class StopEarly:
    """`think` with rows that stop: each before the first latent of a run of them at which the head says so.

    A latent that is left out is one whose attention mask is 0: no state is fed back into it, nobody attends to it,
    positions pass over it, and the state of the column before stands for its own. A row that stops after two of four,

        q q <start> L L L L <end> a        mask   1 1 1 1 1 0 0 1 1        positions   0 1 2 3 4 4 4 5 6

    is so the row with two latents, and the answer may follow the last latent directly. Rows stop where they like, and
    share their columns all the same. The head looks at the state that would be fed back next: with p = σ(w · h + b) a
    row stops if p > threshold. A threshold drawn uniformly from [0, 1) stops it with probability p, which is how RL
    explores.

    threshold: a number, or (B, N) one for each latent of each row.
    """

    def __init__(self, head: StopHead, threshold: float | torch.Tensor):
        self.head, self.threshold = head, threshold

    def __call__(self, passes: Passes, thoughts: Thoughts) -> None:
        """Think until all rows have stopped; behind that column there is no further pass for thoughts."""
        latents = thoughts.latents  # (B, T)
        _check_thresholds(self.threshold, latents)
        begins, order = first_latents(latents), (latents.long().cumsum(dim=1) - 1).clamp(min=0)  # (B, T) each
        left_out, stopped = torch.zeros_like(latents), torch.zeros_like(latents[:, 0])
        whole = _whole_mask(passes, latents)  # (B, past + T)
        leave_out(passes, left_out, whole)  # positions count its real tokens in every pass
        start, thinks, state = 0, None, thoughts.state_before
        for column in thoughts.columns:
            is_latent, stopped = latents[:, column], stopped & ~begins[:, column]
            decides = is_latent & ~stopped  # (B,)
            if decides.any():
                if column > start:
                    state = self.run(passes, thoughts, start, column, thinks, state)  # (B, D)
                stopped = stopped | (decides & self.stops(state, order[:, column]))
                start, thinks = column, is_latent & ~stopped
            left_out[:, column] = is_latent & stopped
            leave_out(passes, left_out, whole)
        self.run(passes, thoughts, start, passes.length, thinks, state)
        thoughts.left_out = left_out if thoughts.left_out is None else thoughts.left_out | left_out
        thoughts.attention_mask = passes.inputs["attention_mask"]

    def run(self, passes: Passes, thoughts: Thoughts, start: int, end: int, thinks, state) -> torch.Tensor:
        """Run columns start … end - 1, the first a thought in rows of thinks (B,); return the last state (B, D)."""
        embeds = passes.inputs["inputs_embeds"][:, start:end]  # (B, t, D)
        if thinks is not None:
            embeds = put_first(embeds, thinks, thoughts.from_states(state, start))
        return passes.run(embeds, start)

    def stops(self, states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Return (B,) for states (B, D) before the latent of each row that has `order` (B,) latents before it."""
        threshold = self.threshold
        if isinstance(threshold, torch.Tensor):
            threshold = threshold.gather(1, order.clamp(max=threshold.shape[1] - 1)[:, None])[:, 0]  # (B,)
        return self.head(states).sigmoid() > threshold


def _whole_mask(passes: Passes, latents: torch.Tensor) -> torch.Tensor:
    """Return the attention mask (B, past + T) of a call, made where there was none."""
    attention_mask = passes.inputs.get("attention_mask")
    if attention_mask is None:
        length = int(passes.cache.get_seq_length()) + passes.length
        return latents.new_ones(len(latents), length, dtype=torch.long)
    if not is_two_dimensional(attention_mask):
        raise ValueError("stop_threshold needs a 2-D attention_mask (B, T), not one made for a single pass.")
    return attention_mask


def leave_out(passes: Passes, left_out: torch.Tensor, whole: torch.Tensor) -> None:
    """Let the next passes attend to no latent of left_out (B, T) and pass over its position; whole (B, past + T)."""
    past_length = whole.shape[1] - left_out.shape[1]
    mask = whole.masked_fill(nn.functional.pad(left_out, (past_length, 0)), 0)  # (B, past + T)
    passes.inputs["attention_mask"] = mask
    passes.inputs["position_ids"] = positions_from_mask(mask, left_out.shape[1])  # (B, T)


def _check_thresholds(threshold: float | torch.Tensor, latents: torch.Tensor) -> None:
    """Raise for thresholds (B, N) of another number of rows, or of fewer latents than a row has."""
    rows, most = latents.shape[0], int(latents.sum(dim=1).max())
    if isinstance(threshold, torch.Tensor) and (threshold.shape[0] != rows or threshold.shape[1] < most):
        raise ValueError(
            f"stop_threshold is of {threshold.shape[0]} rows with {threshold.shape[1]} latents, and this call has "
            f"{rows} rows with up to {most}: give one number for all, or (B, N)."
        )


def check_can_stop(config, decoder: nn.Module) -> None:
    """Raise unless rows can stop by themselves: with a stop head, not in training, weights not in shards."""
    if not config.stop_head:
        raise ValueError(
            "stop_threshold needs a model with a stop head, and config.stop_head is False: leave it out, or train one "
            "(a recipe with `stop_head: true` and `objective: grpo` or `distill_stops`)."
        )
    if decoder.training or is_sharded(decoder):
        raise ValueError(
            "Rows cannot stop by themselves in training, or while weights are sharded: call model.eval(), or give the "
            "latents that they leave out an attention_mask of 0 instead."
        )
