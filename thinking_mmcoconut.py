"""The thinking decoder: a `forward` that feeds the decoder's own last hidden state back at latent columns.

At a latent column c of row b, a thinking decoder reads this thought instead of a token's embedding:

    thought[b, c] = feed(last_hidden_state[b, c - 1])

It is the decoder's output, after the final norm, one column earlier. A column is an index along T, padding included;
a position is an entry of position_ids. `think` splits the sequence at the columns where any row has a latent and runs
each piece once over the key-value cache. `think_uncached` is the reference that it must equal: it reruns the whole
sequence for each thought. Attention is causal: changing column c changes no state and no key to its left.

`think` is a schedule. Every schedule is a function of the same two objects:

    passes     the call's arguments, split by column; `passes.run` sends a piece through the decoder's own forward
    thoughts   where the latents are, and what their thoughts are

A schedule gives each column to `passes.run` exactly once, from left to right. `passes.states_of` tries columns that
will be run again; a schedule that uses it sets the attribute `reads_again`.

`give_thoughts` adds the mixin `ThinkingDecoder` to the class of any decoder and keeps its name and parameters. The
outer model passes the latents through a context manager, because keywords would also reach its vision tower:

    with thinking(Thoughts(latents, feed)):
        outputs = decoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids)

Shapes: B batch, T tokens of a call, t of a piece, N latents, D hidden, H heads.
Source: Hao et al. 2024, Training Large Language Models to Reason in a Continuous Latent Space,
https://arxiv.org/abs/2412.06769.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .caches_mmcoconut import (
    PassCache,
    ThoughtState,
    check_window,
    chosen_cache,
    length_of,
    text_cache,
    with_cross_attention,
    writes_in_place,
)
from .compat_mmcoconut import (
    CACHE,
    PutInFront,
    agreed_columns,
    in_front,
    is_checkpointing,
    is_sharded,
    not_checkpointed,
    rename_cache,
    takes_no_thoughts,
)
from .hiding_mmcoconut import ENCODER_INPUTS, Hiding, check_can_hide, hidden_in_step, numbers_by_mask
from .passes_mmcoconut import (
    READ_ONCE,
    Passes,
    PreparedMasks,
    carry_states,
    check_has_predecessor,
    check_positions,
    column_lists,
    gather_thoughts,
    is_two_dimensional,
    join_columns,
    linked_thoughts,
    noise_by_column,
    positions_from_mask,
    split_latents,
    spread,
)


# Layers that keep a recurrent state instead of keys, by their names in transformers' `config.layer_types`.
RECURRENT_KINDS = ("linear_attention", "conv")
CHECKPOINTED_PASSES = ("all", "first")
# Functions of a thinking decoder that return a replacement for `think`, or None; mmcoconut.kernels adds one.
CHOOSE_SCHEDULE: list[Callable] = []
THOUGHTS: ContextVar = ContextVar("THOUGHTS", default=None)


# --- the loop and its definition -------------------------------------------------------------------------------------
def think(passes: Passes, thoughts: "Thoughts") -> None:
    """Run every column once: one pass up to each latent column, which then reads the last state of that pass."""
    state = thoughts.state_before  # (B, D)
    for start, embeds, starts_at_latent in passes.pieces(thoughts.columns, thoughts.cuts):  # (B, t, D)
        if starts_at_latent:
            thought = thoughts.from_states(state, start)  # (B, D)
            embeds = put_first(embeds, thoughts.latents[:, start], thought)  # (B, t, D)
        state = passes.run(embeds, start)  # (B, D)


def think_uncached(
    decoder: Callable, inputs_embeds: torch.Tensor, thoughts: "Thoughts", **kwargs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Define what `think` must equal: rerun the whole sequence for each latent column, from left to right.

    Return the last hidden states and the embeddings read, both (B, T, D). thoughts: after `locate`, without a past
    cache. kwargs: passed to every call of the decoder.
    """
    for column in thoughts.columns:
        states = decoder(inputs_embeds=inputs_embeds, use_cache=False, **kwargs).last_hidden_state  # (B, T, D)
        thought = thoughts.from_states(states[:, column - 1], column)  # (B, D)
        tail = put_first(inputs_embeds[:, column:], thoughts.latents[:, column], thought)  # (B, T - column, D)
        inputs_embeds = torch.cat([inputs_embeds[:, :column], tail], dim=1)  # (B, T, D)
    states = decoder(inputs_embeds=inputs_embeds, use_cache=False, **kwargs).last_hidden_state  # (B, T, D)
    return states, inputs_embeds


def put_first(embeds: torch.Tensor, is_latent: torch.Tensor, thought: torch.Tensor) -> torch.Tensor:
    """Return (B, t, D) with thoughts (B, D) in the first column of the rows (B,) that have a latent there."""
    first = torch.where(is_latent[:, None], thought.to(embeds.dtype), embeds[:, 0])  # (B, D)
    return torch.cat([first[:, None], embeds[:, 1:]], dim=1)  # (B, t, D)


class ThoughtFeed(nn.Module):
    """Map a hidden state to the embedding that the next latent reads; (…, D) → (…, D).

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
            norms = hidden_state.norm(dim=-1, keepdim=True)  # (…, 1)
            norms = norms.clamp(min=torch.finfo(norms.dtype).eps)  # 0 at padding, whose gradients would be NaN
            return hidden_state * (embedding_norm / norms).to(hidden_state.dtype)
        if self.thought_norm == "projection":
            return self.norm(self.linear_2(nn.functional.gelu(self.linear_1(hidden_state))))
        return hidden_state


# --- where the latents are -------------------------------------------------------------------------------------------
@dataclass
class Thoughts:
    """The latents of one call, what they read, and, after the call, what they have read.

    Args:
        latents (B, T): True where a row has a latent.
        feed: states (…, D) → thoughts (…, D).
        schedule: the function of passes and thoughts that runs the decoder, such as `think`.
        is_paused: latents keep the embedding of their token, and nothing is fed back.
        noise (B, N, D): added to each row's thoughts, in units of a thought's root mean square; becomes (B, T, D), by
            column, once the columns are known; None: no noise.
        given: teacher forcing: called with the inputs_embeds (B, T, D) and the image mask (B, T) or None, returns
            vectors (B, N, D) and a mask (B, N) of the latents that read these vectors instead of a state.
        image_mask (B, T): True at image features among the inputs_embeds; None if images are not read there.
        answer_sees: what columns after a row's last latent attend to, as in MMCoconutConfig.
        beside (B, E): True at image features among the encoder states; None: all of them, if there are any.

    Set by the decoder:
        row_mask (B, past + T): the 2-D mask, if the decoder gets masks that the outer model prepared; else None.
        columns: columns where any row thinks. state_before (B, D): of the column before the first, from the cache.
        cuts: columns where an extra pass begins, because a row sees less from there. hiding: what it does not see.
        linked (B, T): where gradients flow back to the previous state; None: everywhere.
        sharded: True if all processes must run the same number of passes (FSDP).
        inputs_embeds (B, T, D): what the decoder read. states (B, T, D): its last hidden states.
        is_given (B, T): latents that read a given vector; they are removed from `latents`.
        left_out (B, T): latents with attention mask 0, where nothing is thought; None if there are none.
        attention_mask (B, past + T): with 0 at those too; None if there are none.
    """

    latents: torch.Tensor
    feed: Callable[[torch.Tensor], torch.Tensor]
    schedule: Callable[[Passes, "Thoughts"], None] = think
    is_paused: bool = False
    noise: torch.Tensor | None = None
    given: Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]] | None = None
    image_mask: torch.Tensor | None = None
    answer_sees: str = "all"
    beside: torch.Tensor | None = None
    row_mask: torch.Tensor | None = None
    columns: list[int] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    hiding: Hiding | None = None
    state_before: torch.Tensor | None = None
    linked: torch.Tensor | None = None
    sharded: bool = False
    inputs_embeds: torch.Tensor | None = None
    states: torch.Tensor | None = None
    is_given: torch.Tensor | None = None
    left_out: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None

    @property
    def thought_mask(self) -> torch.Tensor:
        """Return (B, T), True where a thought was read instead of a token's embedding."""
        latents = self.latents if self.is_given is None else self.latents | self.is_given
        return latents if self.left_out is None else latents & ~self.left_out

    def put_given(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Return the inputs_embeds (B, T, D) with the given vectors at their latents."""
        vectors, where = self.given(inputs_embeds, self.image_mask)  # (B, N, D), (B, N)
        most = int(self.latents.sum(dim=1).max())
        if where.shape != (len(self.latents), most) or vectors.shape[:2] != where.shape:
            raise ValueError(
                f"given_thoughts returned vectors {(*vectors.shape,)} and a mask {(*where.shape,)}, but this call has "
                f"{len(self.latents)} rows with up to {most} latents: return (B, N, D) and (B, N)."
            )
        if most == 0:
            return inputs_embeds
        self.is_given = spread(where, self.latents) & self.latents  # (B, T)
        vectors = spread(vectors, self.latents).to(inputs_embeds.dtype)  # (B, T, D)
        self.latents = self.latents & ~self.is_given
        return torch.where(self.is_given[..., None], vectors, inputs_embeds)

    def from_states(self, states: torch.Tensor, columns: int | slice) -> torch.Tensor:
        """Return the thoughts of states (B, D) at a column, or of states (B, t, D) at a slice of columns."""
        if self.linked is not None:
            states = torch.where(self.linked[:, columns][..., None], states, states.detach())
        thoughts = self.feed(states)
        if self.noise is None:
            return thoughts
        size = thoughts.detach().float().square().mean(dim=-1, keepdim=True).sqrt()
        return thoughts + (size * self.noise[:, columns]).to(thoughts.dtype)

    def gathered(self) -> dict[str, torch.Tensor]:
        """Return each row's thoughts (B, N, D), packed to the left, and the thought_mask (B, N) of real ones."""
        return dict(zip(("thoughts", "thought_mask"), gather_thoughts(self.inputs_embeds, self.thought_mask)))

    def locate(self, inputs: dict, past_key_values: Cache | None, decoder: "ThinkingDecoder") -> None:
        """Find the columns of the thoughts in a call of the decoder; latents with attention mask 0 are left out."""
        self.sharded, given, attention_mask = is_sharded(decoder), self.latents, inputs.get("attention_mask")
        if not is_two_dimensional(attention_mask):
            attention_mask = self.row_mask
        self.latents, left_out = split_latents(self.latents, attention_mask)
        of_hiding = () if self.answer_sees == "all" else self.hide(inputs, attention_mask, left_out, past_key_values)
        columns, columns_left_out, *of_hiding = column_lists(self.latents, left_out, *of_hiding)
        self.cuts, columns_read = of_hiding or ([], [])
        if columns_read:
            check_can_hide(decoder, self.answer_sees)
        if columns_left_out:
            self.left_out, self.attention_mask = left_out, attention_mask
        if columns or columns_left_out:
            self.state_before = ThoughtState.of(past_key_values).state_after(past_key_values)
        self.columns = [] if self.is_paused else columns
        if self.sharded and (self.hiding is not None or not self.is_paused):  # else all is one pass
            self.agree()
        if not self.columns:
            return
        check_has_predecessor(self.latents, attention_mask, self.state_before is not None)
        self.linked = linked_thoughts(self.latents, decoder.bptt_thoughts)
        if self.noise is not None:
            self.noise = noise_by_column(self.noise, given)  # (B, T, D)

    def hide(self, inputs: dict, attention_mask, left_out: torch.Tensor, past_key_values: Cache | None) -> tuple:
        """Record what the call hides; return where rows begin to see less and where thoughts are read, (B, T) each."""
        read, not_read = split_latents(self.thought_mask, attention_mask)  # (B, T) each
        of_call = (read, left_out | not_read, self.image_mask, self.beside)
        known = ThoughtState.of(past_key_values).hiding
        self.hiding = Hiding.of_call(self.answer_sees, *of_call, known, length_of(past_key_values))
        return self.hiding.cuts(read.shape[1], reads_beside=inputs.get(ENCODER_INPUTS[0]) is not None), read

    def agree(self) -> None:
        """Make all processes run the same number of passes; extra passes begin where no row has a latent."""
        starts = agreed_columns(sorted({*self.columns, *self.cuts}), self.latents.shape[1], self.latents.device)
        self.columns, self.cuts = ([], starts) if self.is_paused else (starts, [])


@contextmanager
def thinking(thoughts: Thoughts) -> Iterator[Thoughts]:
    """Tell a thinking decoder that is called inside this context where its latents are."""
    token = THOUGHTS.set(thoughts)
    try:
        yield thoughts
    finally:
        THOUGHTS.reset(token)


# --- the decoder -----------------------------------------------------------------------------------------------------
class ThinkingDecoder(PutInFront):
    """The mixin that `give_thoughts` adds to a decoder's class; outside `thinking`, `forward` is the decoder's own.

    own_arguments: the argument names of the decoder's own forward, in order.
    counts_columns: True if the decoder numbers positions by column and takes no position_ids (Marian, BART).
    bptt_thoughts: each row's last bptt_thoughts thoughts pass gradients to the states that they were made from;
        earlier thoughts are detached. None: all thoughts pass gradients.
    checkpointed_passes: the passes that gradient checkpointing recomputes: `all`, or the `first`, before the thoughts.
    around_passes: factory, called once per training call, of a reusable context manager around each pass; mmcoconut's
        trainer uses it to compute the weight gradients of all passes together.

    The last three belong to a run or a machine and are not saved.
    """

    own_arguments: tuple[str, ...]
    counts_columns: bool
    bptt_thoughts: int | None = None
    checkpointed_passes: str = "all"
    around_passes: Callable[[], AbstractContextManager] = nullcontext

    @can_return_tuple
    def forward(self, *args, **kwargs):
        """Run the decoder; at the latents given by `thinking` it reads its own states."""
        inputs = {**dict(zip(self.own_arguments, args)), **kwargs} if args else kwargs
        read = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        thoughts = None if read is None or takes_no_thoughts(read.shape[1]) else THOUGHTS.get()
        if thoughts is None:
            return self.own_forward(**hidden_in_step(inputs, ThoughtState.of(inputs.get(CACHE)).hiding))
        if inputs.get("inputs_embeds") is None:
            inputs["inputs_embeds"] = self.get_input_embeddings()(inputs.pop("input_ids"))  # (B, T, D)
        return self.forward_with_thoughts(thoughts, **rename_cache(inputs, "past_key_values"))

    def own_forward(self, *, position_ids: torch.Tensor | None = None, **inputs):
        """Run the decoder's own forward, with each row's positions also if it counts columns (Marian, BART).

        Such a decoder adds position embeddings E by column, so it gets inputs_embeds + E[position] - E[column].
        """
        inputs["return_dict"] = True
        if position_ids is None or not self.counts_columns:
            return super().forward(**inputs, **({} if position_ids is None else {"position_ids": position_ids}))
        embeds, cache = inputs["inputs_embeds"], inputs.get(CACHE)
        past_length = 0 if cache is None else cache.get_seq_length()
        columns = torch.arange(embeds.shape[1], device=embeds.device) + past_length  # (T,)
        of_rows = self.embed_positions(None, position_ids=position_ids.flatten())  # (1, B · T, D) or without 1
        of_columns = self.embed_positions(None, position_ids=columns)  # (1, T, D) or without 1
        shift = of_rows.view(embeds.shape) - of_columns.view(1, *embeds.shape[1:])  # (B, T, D)
        return super().forward(**{**inputs, "inputs_embeds": embeds + shift})

    def forward_with_thoughts(
        self, thoughts: Thoughts, *, past_key_values: Cache | None = None, use_cache=None, **inputs
    ):
        """Run the decoder as often as the thoughts need, and record in `thoughts` what was read."""
        replays = self.training and is_checkpointing(self)
        if replays and past_key_values is not None and past_key_values.get_seq_length() == 0:
            past_key_values = None  # SmolVLM makes one beforehand
        if replays and past_key_values is not None:
            raise ValueError(
                "Gradient checkpointing in training cannot continue past_key_values: call model.eval(), turn "
                "gradient_checkpointing off, or pass the whole sequence."
            )
        if use_cache is None:  # an unused cache would copy all keys and values in training
            use_cache = getattr(self.config, "use_cache", False) and not torch.is_grad_enabled()
        keeps_cache = past_key_values is not None or bool(use_cache and not replays)
        check_positions(inputs.get("position_ids"), thoughts.latents.shape[1])
        if thoughts.given is not None:
            inputs["inputs_embeds"] = thoughts.put_given(inputs["inputs_embeds"])  # (B, T, D)
        thoughts.locate(inputs, past_key_values, self)
        if thoughts.left_out is not None and inputs.get("position_ids") is None:  # which pass over what is left out
            inputs["position_ids"] = positions_from_mask(thoughts.attention_mask, thoughts.latents.shape[1])  # (B, T)
        if past_key_values is None and (keeps_cache or thoughts.columns or thoughts.cuts):
            past_key_values = self.fresh_cache(thoughts, keeps_cache=keeps_cache, replays=replays)
        if any(thoughts.columns) and keeps_cache and self.is_recurrent and torch.is_grad_enabled():
            raise ValueError(
                f"use_cache={use_cache} with gradients does not work: the recurrent layers of {type(self).__name__} "
                "overwrite states that the backward pass needs. Pass use_cache=False and no past_key_values, "
                "or call it under torch.no_grad()."
            )
        if past_key_values is not None and inputs.get("encoder_hidden_states") is not None:
            past_key_values = with_cross_attention(past_key_values, self.config)
        # With use_cache=True, checkpointed layers would warn that they ignore it; they get the cache itself.
        inputs["use_cache"] = past_key_values is not None and not replays
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = 0  # Gemma 4's decoder would leave out the columns before
        passes = Passes(self.pass_runner(thoughts), past_key_values, inputs, keeps_cache=keeps_cache)
        self.hide(passes, thoughts)
        makes_maps = inputs.get("output_attentions") or self.config.output_attentions  # which have an axis of columns
        passes.may_move = not (thoughts.sharded or makes_maps or passes.masks) and self.sees_all_columns
        schedule = thoughts.schedule if thoughts.columns else think
        schedule(passes, thoughts)
        outputs = passes.joined()
        thoughts.inputs_embeds = join_columns(passes.embeds_run)  # (B, T, D)
        if thoughts.left_out is not None:
            self.leave_out(outputs, thoughts)
        thoughts.states = outputs.last_hidden_state
        if keeps_cache:
            remember(past_key_values, thoughts, outputs.last_hidden_state[:, -1], inputs)
        return outputs

    def hide(self, passes: Passes, thoughts: Thoughts) -> None:
        """Tell the passes what to hide, and how to split masks that the outer model prepared for all columns."""
        inputs, hiding, passes.hiding = passes.inputs, thoughts.hiding, thoughts.hiding
        mask, is_cut = inputs.get("attention_mask"), bool(thoughts.columns) or hiding is not None
        if is_cut and passes.cache is not None and mask is not None and not is_two_dimensional(mask):
            passes.masks = PreparedMasks(mask, passes.cache, passes.length, partial(self.masks_of_pass, None), hiding)
            passes.safe_ends = passes.masks.safe_ends(thoughts.latents)
        elif hiding is not None and numbers_by_mask(self) and inputs.get("position_ids") is None:
            whole = torch.ones_like(hiding.kinds) if mask is None else mask  # without what is hidden
            inputs["position_ids"] = positions_from_mask(whole, passes.length)  # (B, T)

    @cached_property
    def sees_all_columns(self) -> bool:
        """Return True if all layers attend to all columns, and none to images by cross-attention."""
        return self.keeps_all_keys and {*READ_ONCE}.isdisjoint(self.own_arguments)

    @cached_property
    def keeps_all_keys(self) -> bool:
        """Return True if no layer drops keys, as a sliding window does; read off the cache that transformers makes."""
        return all(type(layer) is DynamicLayer for layer in DynamicCache(config=self.config).layers)

    @cached_property
    def is_recurrent(self) -> bool:
        """Return True if some layers keep a recurrent state instead of keys."""
        return writes_in_place(DynamicCache(config=self.config))

    def masks_of_pass(self, attention_mask: torch.Tensor | None, embeds: torch.Tensor, past_key_values: Cache):
        """Return the masks that the decoder makes from a mask (B, past + t) for a pass over embeds (B, t, D)."""
        return create_masks_for_generate(self.config, embeds, attention_mask, past_key_values)

    def with_padding(self, inputs: dict, past_key_values: Cache) -> dict:
        """Return the arguments of a single-column pass with its padding mask for recurrent layers.

        They would take the column for a generated token, which has no padding, and let padding into their state.
        """
        attention_mask, embeds = inputs.get("attention_mask"), inputs["inputs_embeds"]
        if not (self.is_recurrent and embeds.shape[1] == 1 and is_two_dimensional(attention_mask)):
            return inputs
        masks = self.masks_of_pass(attention_mask, embeds, past_key_values)
        padding = {kind: attention_mask[:, -1:] for kind in RECURRENT_KINDS if kind in masks}
        return {**inputs, "attention_mask": {**masks, **padding}}

    def fresh_cache(self, thoughts: Thoughts, *, keeps_cache: bool, replays: bool) -> Cache:
        """Return an empty cache: a growing one, the kind chosen for this call, or one that can be replayed.

        A later call gets no gradients through a chosen kind.
        """
        prefix_length = thoughts.columns[0] if thoughts.columns else 0
        reads_again = getattr(thoughts.schedule, "reads_again", False)
        may_choose = not reads_again and (replays or not (keeps_cache and torch.is_grad_enabled()))
        kind = chosen_cache(self, prefix_length) if may_choose else None
        if not replays and self.is_recurrent and torch.is_grad_enabled() and not keeps_cache:
            return PassCache(DynamicCache(config=self.config))
        if not replays:
            return DynamicCache(config=self.config) if kind is None else kind()
        if self.checkpointed_passes not in CHECKPOINTED_PASSES:
            raise ValueError(
                f"checkpointed_passes={self.checkpointed_passes!r} is unknown: choose one of {CHECKPOINTED_PASSES}."
            )
        follow = None if self.checkpointed_passes == "all" else Cache if kind is None else kind.after
        return PassCache(DynamicCache(config=self.config), follow)

    def pass_runner(self, thoughts: Thoughts) -> Callable:
        """Return the function that `Passes` calls with a cache and the arguments of one pass.

        Under gradient checkpointing a replayed pass (PassCache) skips around_passes.
        """

        def call(past_key_values, **inputs):
            return self.own_forward(**{CACHE: past_key_values}, **self.with_padding(inputs, past_key_values))

        if not (self.training and (thoughts.columns or thoughts.cuts)):
            return call
        layers = [module for module in self.modules() if isinstance(module, GradientCheckpointingLayer)]
        around = self.around_passes()

        def call_in_training(past_key_values, **inputs):
            if isinstance(text_cache(past_key_values), PassCache):
                return call(past_key_values, **inputs)
            with not_checkpointed(layers), around:
                return call(past_key_values, **inputs)

        return call_in_training

    def leave_out(self, outputs, thoughts: Thoughts) -> None:
        """Copy the previous column's state into each latent that was left out."""
        states = carry_states(outputs.last_hidden_state, thoughts.left_out, thoughts.state_before)
        outputs.last_hidden_state = states  # (B, T, D)
        window = getattr(self.config, "sliding_window", None)
        check_window(self.keeps_all_keys, window, thoughts.attention_mask.shape[1])


def remember(past_key_values: Cache, thoughts: Thoughts, last_state: torch.Tensor, inputs: dict) -> None:
    """Record in a cache what later calls need: the state (B, D) of its last column, masks and hidden columns."""
    state = ThoughtState.within(past_key_values)
    state.remember(last_state, past_key_values)
    if thoughts.left_out is not None:
        state.attention_mask = thoughts.attention_mask
    state.encoder_inputs = {name: inputs[name] for name in ENCODER_INPUTS if inputs.get(name) is not None}
    state.hiding = thoughts.hiding and thoughts.hiding.noted(reads_beside=bool(state.encoder_inputs))


def give_thoughts(decoder: PreTrainedModel) -> PreTrainedModel:
    """Give a decoder thoughts in place and return it; parameters and their names do not change."""
    if not isinstance(decoder, ThinkingDecoder):
        decoder.own_arguments = tuple(inspect.signature(decoder.forward).parameters)
        decoder.counts_columns = "position_ids" not in decoder.own_arguments
        decoder.__class__ = in_front(ThinkingDecoder, type(decoder))
    return decoder
