"""Schedules other than sequential thinking, for `Thoughts.schedule`.

    ThinkTogether   updates all latents of a row together, a given number of times (parallel thoughts)
    StopEarly       lets a row stop before its last latent when the stop head says so

Each is called with the passes and the thoughts of a call, as `think` is, and sets the same fields. Each names the
reference that it must equal: `think` itself, or an uncached definition.

Shapes: B batch, T tokens, T' columns of another layout, L columns from the first to the last latent, S pieces, N
latents, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel

from .caches_mmcoconut import ThoughtState
from .compat_mmcoconut import assert_without_waiting, is_sharded, keep_cache_in_checkpoints, whole_tensor
from .configuration_mmcoconut import TOKEN_ID_FIELDS, check_schedule
from .passes_mmcoconut import Passes, check_thoughts_matter, is_two_dimensional, packed, states_before
from .thinking_mmcoconut import CHOOSE_SCHEDULE, ThoughtFeed, Thoughts, put_first, think
from .views_mmcoconut import ThoughtView


# --- parallel thoughts -----------------------------------------------------------------------------------------------
def _put_thoughts(inputs_embeds: torch.Tensor, latents: torch.Tensor, thoughts: torch.Tensor) -> torch.Tensor:
    """Return inputs_embeds (B, T, D) with thoughts (B, T, D) at the latents (B, T)."""
    return torch.where(latents[..., None], thoughts.to(inputs_embeds.dtype), inputs_embeds)


@dataclass
class ThinkTogether:
    """Update all latents of a row together, num_iterations times, each from the previous values of the others.

    Every thought starts as the latent token's own embedding. An update runs the decoder once over the latents:

        thought_t[c] = feed(decoder(embeds with thought_{t-1}).last_hidden_state[c - 1])        t = 1 … num_iterations

    A row's i-th thought is final after i updates. N updates therefore equal sequential thinking, in values and
    gradients; fewer updates are a different model, with num_iterations passes over the latents instead of N.

    Source: Wu et al. 2025, Parallel Continuous Chain-of-Thought with Jacobi Iteration,
    https://arxiv.org/abs/2506.18582.
    """

    num_iterations: int
    reads_again: ClassVar[bool] = True

    def __call__(self, passes: Passes, thoughts: Thoughts) -> None:
        """Run the text before the first latent once, the latents once per update, then everything after the text.

        After N updates, one per latent of the longest row, nothing changes any more, so no further update is run.
        """
        first, last = thoughts.columns[0], thoughts.columns[-1]
        check_can_update(passes.cache, thoughts.sharded)
        inputs_embeds, state = passes.inputs["inputs_embeds"], thoughts.state_before  # (B, T, D), (B, D)
        if first > 0:
            state = passes.run_cut(inputs_embeds[:, :first], 0, thoughts.cuts)
        columns = slice(first, last + 1)
        block, latents = inputs_embeds[:, columns], thoughts.latents[:, columns]  # (B, L, D), (B, L)
        for _ in range(min(self.num_iterations, int(latents.sum(dim=1).max()))):
            states = state[:, None]  # (B, 1, D)
            if last > first:
                states = torch.cat([states, passes.states_of(block[:, :-1], first)], dim=1)  # (B, L, D)
            block = _put_thoughts(block, latents, thoughts.from_states(states, columns))
        passes.run_cut(torch.cat([block, inputs_embeds[:, last + 1 :]], dim=1), first, thoughts.cuts)
        if passes.keeps_cache:
            end = int(passes.cache.get_seq_length()) - (passes.length - last - 1)
            ThoughtState.within(passes.cache).thoughts_end = end


def think_together_uncached(
    decoder, inputs_embeds: torch.Tensor, thoughts: Thoughts, *, num_iterations: int, **kwargs
):
    """Define what `ThinkTogether` must equal: num_iterations times, run the sequence and replace all thoughts.

    Return the last hidden states and the embeddings read, both (B, T, D). kwargs: for every decoder call.
    """
    columns = slice(0, inputs_embeds.shape[1])
    for _ in range(num_iterations):
        states = decoder(inputs_embeds=inputs_embeds, use_cache=False, **kwargs).last_hidden_state  # (B, T, D)
        before = torch.cat([states[:, :1], states[:, :-1]], dim=1)  # (B, T, D); nobody thinks in the first column
        inputs_embeds = _put_thoughts(inputs_embeds, thoughts.latents, thoughts.from_states(before, columns))
    states = decoder(inputs_embeds=inputs_embeds, use_cache=False, **kwargs).last_hidden_state  # (B, T, D)
    return states, inputs_embeds


def check_can_update(past_key_values: Cache, sharded: bool) -> None:
    """Raise ValueError under FSDP, in every process, and for a cache with thoughts of an earlier call (final)."""
    if sharded:
        raise ValueError(
            "thought_schedule='jacobi' does not work with FSDP, where all processes must run equally many passes: "
            "use DDP, or thought_schedule='sequential'."
        )
    end = ThoughtState.of(past_key_values).thoughts_end
    if end is not None and int(past_key_values.get_seq_length()) >= end:
        raise ValueError(
            f"past_key_values hold thoughts up to column {end - 1}, but thought_schedule='jacobi' updates all "
            "thoughts of a sequence together: pass the whole sequence in one call, without past_key_values and "
            "without prefill_chunk_size, or use thought_schedule='sequential'."
        )


# --- rows that stop --------------------------------------------------------------------------------------------------

# Initial bias of the stop head: an untrained head continues with probability 0.88, whatever the state.
INITIAL_BIAS = -2.0


class StopHead(nn.Linear):
    """Stop head: logits (…) of stopping instead of thinking once more, from states (…, D): w · h + b."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(states)[..., 0]


def first_latents(latents: torch.Tensor) -> torch.Tensor:
    """Return (B, T), True at latents that follow no latent, where a row begins to think."""
    before = nn.functional.pad(latents, (1, 0))[:, :-1]
    return latents & ~before


class StopEarly:
    """`think` with early exit: a row stops before the first latent of a run where the stop head says so.

    A left-out latent has attention mask 0: no state is fed back into it, no column attends to it, positions skip it,
    and it takes the previous column's state. For example, a row that stops after two of four latents,

        q q <start> L L L L <end> a        mask   1 1 1 1 1 0 0 1 1        positions   0 1 2 3 4 4 4 5 6

    equals the row with two latents; the answer may also follow the last latent directly. Rows stop at different
    latents and still share columns. The head reads the state that would be fed back next: with p = σ(w · h + b), a
    row stops if p > threshold. A threshold drawn uniformly from [0, 1) stops it with probability p, which is how RL
    explores.

    threshold: a number, or (B, N), one per latent of each row.
    """

    def __init__(self, head: StopHead, threshold: float | torch.Tensor):
        self.head, self.threshold = head, threshold

    def __call__(self, passes: Passes, thoughts: Thoughts) -> None:
        """Think until all rows have stopped; after that column no further pass is run for thoughts."""
        latents = thoughts.latents  # (B, T)
        _check_thresholds(self.threshold, latents)
        begins, order = first_latents(latents), (latents.long().cumsum(dim=1) - 1).clamp(min=0)  # (B, T) each
        left_out, stopped = torch.zeros_like(latents), torch.zeros_like(latents[:, 0])
        whole = _whole_mask(passes, latents)  # (B, past + T)
        positions = _whole_positions(passes, whole)  # (…, B or 1, T)
        leave_out(passes, left_out, whole, positions)  # give the first pass a mask too, as the later ones have one
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
            leave_out(passes, left_out, whole, positions)
        self.run(passes, thoughts, start, passes.length, thinks, state)
        thoughts.left_out = left_out if thoughts.left_out is None else thoughts.left_out | left_out
        thoughts.attention_mask = passes.inputs["attention_mask"]

    def run(self, passes: Passes, thoughts: Thoughts, start: int, end: int, thinks, state) -> torch.Tensor:
        """Run columns start … end - 1; rows in thinks (B,) read a thought first; return the last state (B, D)."""
        embeds = passes.inputs["inputs_embeds"][:, start:end]  # (B, t, D)
        if thinks is not None:
            embeds = put_first(embeds, thinks, thoughts.from_states(state, start))
        return passes.run(embeds, start)

    def stops(self, states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Return (B,), True where a row stops, from states (B, D) before its latent number `order` (B,), from 0."""
        threshold = self.threshold
        if isinstance(threshold, torch.Tensor):
            threshold = threshold.gather(1, order.clamp(max=threshold.shape[1] - 1)[:, None])[:, 0]  # (B,)
        return self.head(states).sigmoid() > threshold


def _whole_mask(passes: Passes, latents: torch.Tensor) -> torch.Tensor:
    """Return the attention mask (B, past + T) of a call; ones if there was none."""
    attention_mask = passes.inputs.get("attention_mask")
    if attention_mask is None:
        length = int(passes.cache.get_seq_length()) + passes.length
        return latents.new_ones(len(latents), length, dtype=torch.long)
    if not is_two_dimensional(attention_mask):
        problem = "but this model prepares its decoder's masks itself, or was given a mask made for a single pass"
        remedy = "pass a 2-D mask, or stop_threshold=None to think at all latents"
        raise ValueError(f"stop_threshold needs a 2-D attention_mask (B, T), {problem}: {remedy}.")
    return attention_mask


def _whole_positions(passes: Passes, whole: torch.Tensor) -> torch.Tensor:
    """Return the positions (…, B or 1, T) of a call with a mask (B, past + T); column indices by default."""
    positions = passes.inputs.get("position_ids")
    if positions is None:
        positions = torch.arange(whole.shape[1], device=whole.device)[None, -passes.length :]  # (1, T)
    return positions


def leave_out(passes: Passes, left_out: torch.Tensor, whole: torch.Tensor, positions: torch.Tensor) -> None:
    """Make the next passes ignore the latents of left_out (B, T) and skip their positions.

    whole (B, past + T), positions (…, B or 1, T): mask and positions of the call with all latents.
    """
    past_length = whole.shape[1] - left_out.shape[1]
    mask = whole.masked_fill(nn.functional.pad(left_out, (past_length, 0)), 0)  # (B, past + T)
    passes.inputs["attention_mask"] = mask
    passes.inputs["position_ids"] = positions - left_out.cumsum(dim=1)  # (…, B, T)


def _check_thresholds(threshold: float | torch.Tensor, latents: torch.Tensor) -> None:
    """Raise ValueError for thresholds (B, N) with another number of rows, or fewer latents than a row has."""
    rows, most = latents.shape[0], int(latents.sum(dim=1).max())
    if isinstance(threshold, torch.Tensor) and (threshold.shape[0] != rows or threshold.shape[1] < most):
        raise ValueError(
            f"stop_threshold has {threshold.shape[0]} rows with {threshold.shape[1]} latents, but this call has "
            f"{rows} rows with up to {most}: pass one number for all, or (B, N)."
        )


def check_can_stop(config, decoder: nn.Module) -> None:
    """Raise ValueError unless early exit is possible: a stop head, eval mode, weights not sharded."""
    if not config.stop_head:
        raise ValueError(
            "stop_threshold needs a model with a stop head, but config.stop_head is False: leave it out, or train one "
            "(a recipe with `stop_head: true` and `objective: grpo` or `distill_stops`)."
        )
    if decoder.training or is_sharded(decoder):
        raise ValueError(
            "Rows cannot stop early in training, or while weights are sharded: call model.eval(), or set "
            "attention_mask to 0 at the latents to leave out."
        )


def check_sees_all(config) -> None:
    """Raise ValueError if rows may stop early, so that their last latent is not known in advance."""
    if config.answer_sees != "all":
        raise ValueError(
            f"answer_sees={config.answer_sees!r} hides columns after a row's last latent, but with a stop_threshold "
            "that latent is not known in advance: pass stop_threshold=None, or set answer_sees='all'."
        )


# --- the model around the decoder ------------------------------------------------------------------------------------
def _setting_of_decoder(name: str) -> property:
    """Return a property that reads and writes a setting of the thinking decoder."""
    return property(
        lambda self: getattr(self.get_decoder(), name), lambda self, value: setattr(self.get_decoder(), name, value)
    )


# Thought fields that a call may be asked to return.
RETURNED = ("output_thoughts", "output_view", "output_stop_logits")


class MakesThoughts:
    """Mixin that builds the `Thoughts` of a call from the configuration and the call's arguments."""

    bptt_thoughts = _setting_of_decoder("bptt_thoughts")  # both are per run and not saved; see ThinkingDecoder
    checkpointed_passes = _setting_of_decoder("checkpointed_passes")

    def add_thought_modules(self, hidden_size: int) -> None:
        """Add the modules between states and thoughts that the configuration asks for; none by default."""
        self.thought_feed = ThoughtFeed(hidden_size, self.config.thought_norm)
        if self.config.stop_head:
            self.stop_head = StopHead(hidden_size)

    def _init_weights(self, module):
        """Initialize weights; the stop head starts biased towards not stopping."""
        if isinstance(module, StopHead):
            init.zeros_(module.weight)
            init.constant_(module.bias, INITIAL_BIAS)
        else:
            super()._init_weights(module)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=None, **kwargs):
        """Checkpoint layer by layer; the decoder's layers keep the cache that thoughts are computed with.

        Decoders drop the cache if their own flag is set; with only the layers' flags, `PassCache` handles it.
        """
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and options.get("use_reentrant"):
            raise ValueError(
                "Gradient checkpointing with use_reentrant=True loses the gradients through thoughts: set "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)
        for module in self.get_decoder().modules():
            if isinstance(module, GradientCheckpointingLayer):
                keep_cache_in_checkpoints(module, enable)
            elif isinstance(module, PreTrainedModel):
                module.gradient_checkpointing = False

    def get_token_mask(self, token_id: int, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor):
        """Return (B, T), True at the token; found by its embedding if there are no ids.

        Raises:
            ValueError: no ids, and special tokens with equal embeddings.
        """
        if input_ids is not None:
            return input_ids == token_id
        # Not the rows of the weight: Gemma scales embeddings.
        ids = [token_id, *(getattr(self.config, field) for field in TOKEN_ID_FIELDS)]
        wanted, *special = self.get_input_embeddings()(torch.tensor(ids, device=inputs_embeds.device))  # (D,) each
        token_mask = (inputs_embeds == wanted).all(-1)  # (B, T)
        if token_mask.any() and sum(torch.equal(each, wanted) for each in special) > 1:
            raise ValueError(
                "Special tokens have equal embeddings, as new tokens have before training, so images and latents "
                "cannot be found in inputs_embeds: pass input_ids."
            )
        return token_mask

    def mean_embedding_norm(self) -> torch.Tensor | None:
        """Return the mean norm () of the token embeddings; None if thoughts are not scaled to it."""
        if self.config.thought_norm != "embedding":
            return None
        embeddings = self.get_input_embeddings()
        norms = embeddings.weight.detach().norm(dim=-1)  # (V,)
        return whole_tensor(norms).mean() * getattr(embeddings, "embed_scale", 1.0)  # Gemma's times √D

    def feed_of_call(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the function from states to thoughts of one call; it computes the embedding norm at most once."""
        norm = cache(self.mean_embedding_norm)
        return lambda states: self.thought_feed(states, norm())

    def schedule_of_call(self, stop_threshold: float | torch.Tensor | None) -> Callable:
        """Return the schedule of a call: with early exit, all latents together, or sequential."""
        if stop_threshold is not None:
            check_can_stop(self.config, self.get_decoder())
            check_sees_all(self.config)
            return StopEarly(self.stop_head, stop_threshold)
        if self.config.thought_schedule == "jacobi":
            check_schedule(self.config)
            return ThinkTogether(self.config.jacobi_iterations)
        chosen = (choose(self.get_decoder()) for choose in CHOOSE_SCHEDULE)
        return next((schedule for schedule in chosen if schedule is not None), think)

    def targets_of(self, labels, shift_labels, input_ids, attention_mask) -> torch.Tensor | None:
        """Return the targets (B, T): shift_labels, or labels shifted by one; None without either."""
        targets = shift_labels  # (B, T)
        if targets is None and labels is not None:
            targets = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]  # (B, T)
        if targets is not None and input_ids is not None:
            first = targets.new_full((len(targets), 1), -100) if labels is None else labels[:, :1]  # (B, 1)
            labelled = torch.cat([first, targets], dim=1) != -100  # (B, T + 1), with the column after the last
            check_thoughts_matter(input_ids == self.config.latent_token_id, attention_mask, labelled)
        return targets

    def thoughts_of_call(
        self,
        latents: torch.Tensor,
        image_mask: torch.Tensor | None = None,
        *,
        stop_threshold=None,
        thought_noise=None,
        given_thoughts=None,
        beside=None,
        row_mask=None,
        schedule=None,
    ) -> Thoughts:
        """Return the Thoughts of a call with these latents and images (B, T); other arguments as in `forward`."""
        return Thoughts(
            latents,
            self.feed_of_call(),
            schedule=schedule or self.schedule_of_call(stop_threshold),
            is_paused=self.config.thought_mode == "pause",
            noise=thought_noise,
            given=given_thoughts,
            image_mask=image_mask,
            answer_sees=self.config.answer_sees,
            beside=beside,
            row_mask=row_mask,
        )

    def fields_of(
        self, thoughts: Thoughts, *, output_thoughts=False, output_view=False, output_stop_logits=False
    ) -> dict:
        """Return the thought fields of a call's output."""
        fields = {"attention_mask": thoughts.attention_mask}
        if output_view:
            fields["view"] = ThoughtView.of(thoughts)
        if output_thoughts:
            fields |= thoughts.gathered()
        if output_stop_logits:
            before = states_before(thoughts.states, thoughts.state_before)  # (B, T, D)
            latents = thoughts.latents if thoughts.left_out is None else thoughts.latents | thoughts.left_out  # (B, T)
            fields["stop_logits"] = packed(self.stop_head(before), latents)  # (B, N)
        return fields


def check_none_missed(latents: torch.Tensor, past_key_values: Cache | None) -> None:
    """Raise on the device for a latent (B, T) if `takes_no_thoughts` holds."""
    message = "A compiled step of one token, or an exported program, cannot read a thought."
    assert_without_waiting(~latents.any(), message)
    ThoughtState.of(past_key_values).last_state = None  # the next replay would overwrite its memory
