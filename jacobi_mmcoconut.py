"""Parallel thoughts: all latents of a row updated together, T times, instead of one after the other.

Every thought starts as the latent token's own embedding. An update runs the decoder once over the latents with what
they were before it, and each becomes the state of the column before:

    thought_t[c] = feed(decoder(embeds with thought_{t-1}).last_hidden_state[c - 1])        t = 1 … T

The i-th thought of a row is final after i updates, so that T ≥ n updates of n thoughts are the sequential ones, values
and gradients; fewer are another model, with T decoder passes over the latents in the place of n. `think_jacobi` keeps
the keys of the text before the first latent; `think_jacobi_uncached` is the definition it must equal.

Shapes: B batch, T tokens, L columns from the first to the last latent, D hidden.
Source: Wu et al. 2025, Parallel Continuous Chain-of-Thought with Jacobi Iteration, https://arxiv.org/abs/2506.18582.
"""

import torch
from transformers.cache_utils import Cache

from .caches_mmcoconut import ReplayCache, ReplayCrossCache, throwaway
from .latent_mmcoconut import ThinkOutput, cut_links, join_outputs, perturb, seen_until


def put_thoughts(inputs_embeds: torch.Tensor, latent_mask: torch.Tensor, thoughts: torch.Tensor) -> torch.Tensor:
    """(B, T, D) with the columns of (B, T, D) in the places of (B, T) that are latents."""
    return torch.where(latent_mask[..., None], thoughts.to(inputs_embeds.dtype), inputs_embeds)


def check_one_block(past_key_values: Cache | None) -> None:
    """Thoughts that are updated together must stand in one call.

    Raises:
        ValueError: a cache that holds thoughts of an earlier call, which could not be updated any more.
    """
    end = getattr(past_key_values, "last_thought_end", None)
    if end is not None and int(past_key_values.get_seq_length()) >= end:
        raise ValueError(
            f"past_key_values hold thoughts up to column {end - 1}, and thought_schedule='jacobi' updates all of a "
            "sequence together: pass the whole sequence in one call, without past_key_values and without "
            "prefill_chunk_size, or use thought_schedule='sequential'."
        )


def check_not_sharded(sharded: bool) -> None:
    """Every process must raise, or the others would wait for it.

    Raises:
        ValueError: a decoder under FSDP.
    """
    if sharded:
        raise ValueError(
            "thought_schedule='jacobi' does not work with FSDP, where all processes must make as many passes: use "
            "DDP, or thought_schedule='sequential'."
        )


def think_jacobi(
    decoder,
    inputs_embeds: torch.Tensor,
    latent_mask: torch.Tensor,
    *,
    columns: list[int],
    feed,
    num_iterations: int,
    past_key_values: Cache,
    previous: torch.Tensor | None = None,
    linked: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs,
) -> ThinkOutput:
    """Run the decoder over (B, T, D) with thoughts at the True columns of (B, T), updated together.

    A pass for the text before the first latent, one an update for the columns from the first latent up to the last,
    whose keys are thrown away, and one from the first latent to the end. After as many updates as a row has latents
    nothing changes any more, so there are no further ones.

    Args:
        columns: where thoughts are read, from `latent_columns(latent_mask)`; at least one.
        feed: (B, L, D) hidden states → (B, L, D) embeddings, once an update.
        The rest as in `think`, whose results these are.
    """
    first, last, length = columns[0], columns[-1], inputs_embeds.shape[1]
    past_length = int(past_key_values.get_seq_length())

    def run(embeds, start: int, cache: Cache):
        end = start + embeds.shape[1]
        return decoder(
            inputs_embeds=embeds,
            attention_mask=seen_until(attention_mask, end - length),
            position_ids=position_ids[..., start:end] if position_ids is not None else None,
            past_key_values=cache,
            **kwargs,
        )

    outputs, read = [], []
    if first > 0:
        read.append(inputs_embeds[:, :first])
        outputs.append(run(read[0], 0, past_key_values))
        previous = outputs[0].last_hidden_state[:, -1]  # (B, D)
    block, is_latent = inputs_embeds[:, first : last + 1], latent_mask[:, first : last + 1]  # (B, L, D), (B, L)
    links = linked[:, first : last + 1] if linked is not None else None  # (B, L)
    of_block = noise[:, first : last + 1] if noise is not None else None  # (B, L, D)
    for _ in range(min(num_iterations, int(latent_mask.sum(dim=1).max()))):
        states = previous[:, None]  # (B, 1, D)
        if last > first:
            output = run(block[:, :-1], first, throwaway(past_key_values))
            states = torch.cat([states, output.last_hidden_state], dim=1)  # (B, L, D), of the column before each
        block = put_thoughts(block, is_latent, perturb(feed(cut_links(states, links)), of_block))
    if isinstance(past_key_values, (ReplayCache, ReplayCrossCache)) and first > 0:
        past_key_values = past_key_values.next_pass()
    read.append(torch.cat([block, inputs_embeds[:, last + 1 :]], dim=1))  # (B, T - first, D)
    outputs.append(run(read[-1], first, past_key_values))
    past_key_values.last_thought_end = past_length + last + 1
    return join_outputs(outputs, read, past_key_values, past_length=past_length)


def think_jacobi_uncached(
    decoder,
    inputs_embeds,
    latent_mask,
    *,
    feed,
    num_iterations: int,
    linked=None,
    noise=None,
    attention_mask=None,
    position_ids=None,
) -> ThinkOutput:
    """The definition of `think_jacobi`: num_iterations times, run the whole sequence and replace all thoughts.

    embeds[rows, columns] = feed(decoder(embeds).last_hidden_state[rows, columns - 1])
    """
    inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}
    for _ in range(num_iterations):
        hidden = decoder(inputs_embeds=inputs_embeds, **inputs).last_hidden_state  # (B, T, D)
        before = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)  # (B, T, D); nobody thinks in the first column
        inputs_embeds = put_thoughts(inputs_embeds, latent_mask, perturb(feed(cut_links(before, linked)), noise))
    hidden = decoder(inputs_embeds=inputs_embeds, **inputs).last_hidden_state  # (B, T, D)
    return ThinkOutput(last_hidden_state=hidden, inputs_embeds=inputs_embeds)
