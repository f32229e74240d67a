"""Latent attention: the few queries of a latent step read a long prefix and a short tail of keys, unjoined.

The thinking loop runs the decoder once over the text before the thoughts, then once more for each thought. A cache
that appends copies all keys and values in each of these passes, and autograd keeps every copy. `SplitCache` leaves
those of the first pass where they are and writes later ones into a tail. The attention function "latent" reads both:

    softmax([q · prefix_keys, q · tail_keys]) = [p, t]        output = p · prefix_values + t · tail_values

A step keeps nothing of the keys but the log-sum-exp of its scores. The backward pass computes the scores again, and
forms the gradients of the keys that one pass wrote at once, from the queries of all steps that read them:

    p = exp(s - logsumexp)    δ = do · output    ds = p (do · values - δ)    dq = ds · keys
    dkeys = Σ_steps ds · q    dvalues = Σ_steps p · do

In this file: the definition, the arithmetic of the fast path (on a GPU that of triton_kernels.py), its
autograd functions, the cache, what transformers calls, and where latent attention is used by default.

Shapes: B batch, H query heads, H' key and value heads (H = G · H'), Q queries of one step, N of several, P prefix,
T tail, K head dim. Source: FlashAttention (recomputation), Dao et al. 2022, https://arxiv.org/abs/2205.14135.
"""

from collections import namedtuple
from collections.abc import Callable
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import logging

from mmcoconut.caches_mmcoconut import CHOOSE_CACHE, ChosenCache
from mmcoconut.compat_mmcoconut import CACHE
from mmcoconut.kernels.private import attention_of, current_backward_pass
from mmcoconut.kernels.triton_kernels import attention_forward as triton_attention_forward
from mmcoconut.kernels.triton_kernels import key_backward as triton_key_backward
from mmcoconut.kernels.triton_kernels import query_backward as triton_query_backward
from mmcoconut.kernels.triton_kernels import reason_against


logger = logging.get_logger(__name__)

# Default implementation of decoders: latent attention in the calls for which it is chosen.
LATENT_WHERE_LEANER = "latent_where_leaner"
# Minimum columns of the first pass to choose it, in decoders of at least this width, and in narrower ones.
LEAST_PREFIX, WIDE, LEAST_PREFIX_IF_NARROW = 128, 512, 256  # benchmarks/LOG.md, 2026-11-30
# More queries, as in a long answer's pass, read one joined copy: without it a step with 256 takes 1.2 times as long.
MAX_QUERIES = 16


class Split(NamedTuple):
    """Keys or values: prefix (B, H', P, K) and tail (B, H', T, K)."""

    prefix: torch.Tensor
    tail: torch.Tensor

    def joined(self) -> torch.Tensor:
        return torch.cat(self, dim=-2)  # (B, H', P + T, K)


class Step(NamedTuple):
    """The queries of one latent step, and the parameters of their attention.

    query (B, H, Q, K). scaling: factor of the scores. mask (B, 1, Q, P + T): True where a query may look; None:
    everywhere. kept (B, H, Q, P + T): dropout's factors of the weights, 0 or 1 / (1 - rate); None: no dropout.
    """

    query: torch.Tensor
    scaling: float
    mask: torch.Tensor | None = None
    kept: torch.Tensor | None = None


def latent_attention_reference(step: Step, key: Split, value: Split) -> torch.Tensor:
    """Return softmax(scaling · query · [keys]ᵀ) · [values], (B, H, Q, K): the definition of `latent_attention`."""
    groups = step.query.shape[1] // key.prefix.shape[1]
    keys, values = (split.joined().repeat_interleave(groups, dim=1) for split in (key, value))  # (B, H, P + T, K)
    scores = step.query @ keys.transpose(-1, -2) * step.scaling  # (B, H, Q, P + T)
    if step.mask is not None:
        scores = scores.masked_fill(~step.mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)  # (B, H, Q, P + T)
    if step.kept is not None:
        weights = weights * step.kept
    return weights @ values  # (B, H, Q, K)


def latent_attention(step: Step, key: Split, value: Split) -> torch.Tensor:
    """Return the attention of few queries over split keys and values, (B, H, Q, K), without copying the prefix.

    Key and value heads serve H / H' query heads each, unrepeated. A query that may look nowhere gets finite numbers
    without meaning.
    """
    states = SplitStates(key.prefix, value.prefix)
    token = Write.apply(Write.apply(None, *states.prefix, states), key.tail, value.tail, states)
    return Attend.apply(token, step.query, states, step)


def by_kv_head(states: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Return (B, H, Q, …) as (B, H', R, …), R = G · Q: the rows that read the same keys stand together."""
    return states.reshape(states.shape[0], num_kv_heads, -1, *states.shape[3:])


def scores_over(step: Step, keys: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return scaled scores over all keys (B, H', ·, K) in turn, (B, H', R, all), in float32 at least."""
    num_kv_heads = keys[0].shape[1]
    rows = by_kv_head(step.query * step.scaling, num_kv_heads)  # (B, H', R, K)
    scores = torch.cat([rows @ key.transpose(-1, -2) for key in keys], dim=-1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if step.mask is None:
        return scores
    by_query = scores.unflatten(2, (-1, step.query.shape[2]))  # (B, H', G, Q, all)
    return by_query.masked_fill(~step.mask[:, :, None], torch.finfo(scores.dtype).min).flatten(2, 3)


def drop(step: Step, weights: torch.Tensor) -> torch.Tensor:
    """Return weights (B, H', R, all) times dropout's factors."""
    return weights if step.kept is None else weights * by_kv_head(step.kept, weights.shape[1])


def weighted_sum(weights: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return weights (B, H', R, all) times the parts (B, H', ·, K) in turn, (B, H', R, K)."""
    pieces = weights.to(parts[0].dtype).split([part.shape[2] for part in parts], dim=-1)
    return sum(piece @ part for piece, part in zip(pieces, parts))


def attention_forward(step: Step, key: Split, value: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output (B, H, Q, K) and the log-sum-exp (B, H, Q) of the scores."""
    scores = scores_over(step, key)  # (B, H', R, P + T)
    logsumexp = scores.logsumexp(dim=-1, keepdim=True)  # (B, H', R, 1)
    weights = drop(step, (scores - logsumexp).exp())
    return weighted_sum(weights, value).reshape(step.query.shape), logsumexp.reshape(step.query.shape[:3])


def weights_and_score_gradients(step: Step, keys, values, grad_output, logsumexp, delta):
    """Return the weights that met the values and the gradients of the scores before scaling, (B, H', R, all)."""
    num_kv_heads = keys[0].shape[1]
    grad_rows, logsumexp, delta = (by_kv_head(part, num_kv_heads) for part in (grad_output, logsumexp, delta))
    weights = (scores_over(step, keys) - logsumexp[..., None]).exp()
    grad_weights = torch.cat([grad_rows @ value.transpose(-1, -2) for value in values], dim=-1)
    grad_scores = weights * (drop(step, grad_weights) - delta[..., None]) * step.scaling
    return drop(step, weights), grad_scores


def query_backward(step: Step, key: Split, value: Split, grad_output, output, logsumexp) -> tuple:
    """Return the gradient of the queries (B, H, Q, K), and δ (B, H, Q).

    grad_output, output (B, H, Q, K) and logsumexp (B, H, Q): of `attention_forward`.
    """
    delta = (grad_output.to(logsumexp.dtype) * output).sum(dim=-1)  # (B, H, Q)
    _, grad_scores = weights_and_score_gradients(step, key, value, grad_output, logsumexp, delta)
    return weighted_sum(grad_scores, key).reshape(step.query.shape), delta


def key_backward(step: Step, key, value, grad_output, logsumexp, delta) -> tuple:
    """Return the gradients of some keys and values (B, H', L, K) from the queries (B, H, N, K) of several steps.

    step: the steps as one, with these keys' columns of mask and kept. grad_output (B, H, N, K), logsumexp, delta
    (B, H, N): of `attention_forward` and `query_backward`, joined.
    """
    parts = weights_and_score_gradients(step, (key,), (value,), grad_output, logsumexp, delta)
    weights, grad_scores = (part.transpose(-1, -2).to(key.dtype) for part in parts)  # (B, H', L, R)
    query, grad_output = (by_kv_head(states, key.shape[1]) for states in (step.query, grad_output))
    return grad_scores @ query, weights @ grad_output


Kernels = namedtuple("Kernels", ("attention_forward", "query_backward", "key_backward"))
PYTORCH = Kernels(attention_forward, query_backward, key_backward)
TRITON = Kernels(triton_attention_forward, triton_query_backward, triton_key_backward)


def kernels_for(*tensors: torch.Tensor, has_dropout: bool = False) -> Kernels:
    """Return Triton's kernels on a GPU where they can serve these tensors; else PyTorch's, with a warning there."""
    if tensors[0].device.type == "cpu":
        return PYTORCH
    reason = "they have no dropout" if has_dropout else reason_against(*tensors)
    if reason is not None:
        logger.warning_once(f"Latent attention runs in PyTorch and not in Triton's kernels, for {reason}.")
    return TRITON if reason is None else PYTORCH


# Autograd. The tail is written in place, which autograd does not see. An empty tensor, the token, is passed from one
# function to the next instead: when the backward pass comes to the one that wrote some keys, all that read them are
# done.


def joined_steps(steps: list[Step], columns: slice) -> Step:
    """Return the steps as one, with queries (B, H, N, K), over these columns of the keys."""
    query, kept = torch.cat([step.query for step in steps], dim=2), None
    mask = query.new_ones(query.shape[0], 1, query.shape[2], columns.stop - columns.start, dtype=torch.bool)
    for step, rows in zip(steps, mask.split([step.query.shape[2] for step in steps], dim=2)):
        if step.mask is not None:
            rows.copy_(step.mask[..., columns])
    if steps[0].kept is not None:
        kept = torch.cat([step.kept[..., columns] for step in steps], dim=2)  # (B, H, N, L)
    return Step(query, steps[0].scaling, mask, kept)


class SplitStates:
    """Keys and values of one layer in one forward pass, and the inputs of their gradients.

    prefix (B, H', P, K): the first pass's. buffers (B, H', capacity, K): their first `length` columns are the tail.
    steps: of this backward pass, each with its number of keys, grad_output, logsumexp and δ. of_tail: gradients of the
    tail (B, H', T, K) that autograd gave.
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor):
        self.prefix, self.length = (key, value), 0
        self.buffers = (key[:, :, :0].detach(), value[:, :, :0].detach())
        self.backward_pass, self.steps, self.of_tail = None, [], []

    @property
    def num_keys(self) -> int:
        return self.prefix[0].shape[2] + self.length

    def enter(self) -> "SplitStates":
        """Return itself, without what an earlier backward pass left."""
        if self.backward_pass != current_backward_pass():
            self.backward_pass, self.steps, self.of_tail = current_backward_pass(), [], []
        return self

    def split(self, num_keys: int) -> tuple[Split, Split]:
        """Return the first keys and values, unseen by autograd."""
        end = num_keys - self.prefix[0].shape[2]
        key, value = (Split(one.detach(), buffer[:, :, :end]) for one, buffer in zip(self.prefix, self.buffers))
        return key, value

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Append (B, H', t, K) to the tail, in larger buffers where these are full."""
        end, capacity = self.length + key.shape[2], self.buffers[0].shape[2]
        if end > capacity:
            more = (end if key.shape[2] > MAX_QUERIES else max(8, 2 * end)) - capacity
            self.buffers = tuple(nn.functional.pad(buffer, (0, 0, 0, more)) for buffer in self.buffers)
        for buffer, states in zip(self.buffers, (key, value)):
            buffer[:, :, self.length : end] = states
        self.length = end

    def gradients(self, columns: slice) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the keys and values that one pass wrote into these columns."""
        prefix_length = self.prefix[0].shape[2]
        in_tail = slice(columns.start - prefix_length, columns.stop - prefix_length)
        states, found = [part.detach() for part in self.prefix], []
        if columns.start >= prefix_length:
            states = [buffer[:, :, in_tail] for buffer in self.buffers]
            read = (parts for parts in self.of_tail if parts[0].shape[2] >= in_tail.stop)
            found = [[part[:, :, in_tail] for part in parts] for parts in read]
        reading = [rest for num_keys, *rest in self.steps if num_keys >= columns.stop]
        if reading:
            steps, *rows = zip(*reading)
            step, rows = joined_steps(steps, columns), [torch.cat(parts, dim=2) for parts in rows]  # (B, H, N, …)
            kernels = kernels_for(step.query, *states, has_dropout=step.kept is not None)
            found.append(kernels.key_backward(step, *states, *rows))
        return tuple(reduce(torch.add, parts) for parts in zip(*found)) or (None, None)


class Write(torch.autograd.Function):
    """Note that a pass wrote keys and values (B, H', t, K), the first of them, without a token before, as the prefix.

    Returns the token of those that may read them.
    """

    @staticmethod
    def forward(ctx, token, key, value, states):
        start = 0 if token is None else states.num_keys
        if token is not None:
            states.write(key, value)
        ctx.states, ctx.columns, ctx.is_prefix = states, slice(start, states.num_keys), token is None
        return key.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_token):
        return None if ctx.is_prefix else grad_token, *ctx.states.enter().gradients(ctx.columns), None


class ReadTail(torch.autograd.Function):
    """The whole tail (B, H', T, K), for an attention that autograd sees."""

    @staticmethod
    def forward(ctx, token, states):
        ctx.states = states
        key, value = states.split(states.num_keys)
        return key.tail, value.tail

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        ctx.states.enter().of_tail.append(gradients)
        return gradients[0].new_empty(0), None


class Attend(torch.autograd.Function):
    """The output (B, H, Q, K) of a step over the prefix and the tail as it is now; `query` is the step's own."""

    @staticmethod
    def forward(ctx, token, query, states, step):
        ctx.states, ctx.num_keys, ctx.how = states, states.num_keys, step[1:]
        key, value = states.split(states.num_keys)
        ctx.kernels = kernels_for(query, *key, *value, has_dropout=step.kept is not None)
        output, logsumexp = ctx.kernels.attention_forward(step, key, value)
        ctx.save_for_backward(query, output, logsumexp)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, output, logsumexp = ctx.saved_tensors
        step, states = Step(query.detach(), *ctx.how), ctx.states.enter()  # else the states would hold their own graph
        split = states.split(ctx.num_keys)
        grad_query, delta = ctx.kernels.query_backward(step, *split, grad_output, output, logsumexp)
        states.steps.append((ctx.num_keys, step, grad_output, logsumexp, delta))
        return grad_output.new_empty(0), grad_query, None, None


def as_autocast(*states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast float32 to the dtype of a running autocast, as sdpa does; rotary embeddings leave float32."""
    device = states[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return states
    return tuple(one.to(torch.get_autocast_dtype(device)) if one.dtype == torch.float32 else one for one in states)


class SplitKeys(NamedTuple):
    """The replacement of keys and values in attention: all of both, and the token that allows reading them."""

    states: SplitStates
    token: torch.Tensor


class SplitLayer(DynamicLayer):
    """Keys and values of one layer: those of the first pass as they are, all later ones in a tail of their own."""

    def __init__(self):
        super().__init__()
        self.is_initialized = True
        self.reset()

    def reset(self) -> None:
        self.states: SplitStates | None = None
        self.token: torch.Tensor | None = None

    def update(self, key_states, value_states, *args, **kwargs):
        """Return the first pass's own keys and values (B, H', P, K); in later passes `SplitKeys` in place of both."""
        if self.states is None:
            return self.open(key_states, value_states)
        self.token = Write.apply(self.token, *as_autocast(key_states, value_states), self.states)
        return SplitKeys(self.states, self.token), None

    def open(self, key_states, value_states):
        """Begin with the first pass's keys and values (B, H', P, K), and return what it reads."""
        key_states, value_states = as_autocast(key_states, value_states)
        if kernels_for(key_states, value_states) is PYTORCH:
            # Heads apart, once: matrix products would copy them in every pass.
            key_states, value_states = key_states.contiguous(), value_states.contiguous()
        self.states = SplitStates(key_states, value_states)
        self.token = Write.apply(None, key_states, value_states, self.states)
        return key_states, value_states

    def joined(self) -> tuple[torch.Tensor, ...]:
        """Return keys and values (B, H', P + T, K) of all that the layer has read."""
        return tuple(split.joined() for split in self.states.split(self.states.num_keys))

    def of_rows(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Hold other rows, `pick` of keys or values (B, H', ·, K), in place of these; between decoding steps."""
        states = SplitStates(*map(pick, self.states.prefix))
        states.buffers, states.length = tuple(map(pick, self.states.buffers)), self.states.length
        self.states = states

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.of_rows(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.of_rows(lambda states: states[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.of_rows(lambda states: states.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        length = self.get_seq_length() - abs(tokens_to_remove)
        self.open(*(states[:, :, :length] for states in self.joined()))

    def get_seq_length(self) -> int:
        return 0 if self.states is None else self.states.num_keys


class SplitCache(ChosenCache):
    """A cache whose later keys are not joined to those of the first pass, in training and in generation."""

    def __init__(self):
        super().__init__(layer_class_to_replicate=SplitLayer)

    @classmethod
    def after(cls, layers: list[DynamicLayer]) -> "SplitCache":
        """Return the cache that leaves the keys and values (B, H', P, K) of these layers in place."""
        cache = cls()
        cache.layers = [SplitLayer() for _ in layers]
        for layer, first in zip(cache.layers, layers):
            layer.open(first.keys, first.values)
        return cache

    def move(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for layer in self.layers:
            layer.open(*map(move, layer.joined()))


def joined_attention(attend, query, prefix_key, prefix_value, tail_key, tail_value, mask) -> torch.Tensor:
    """Return `attend` with the keys and the values joined."""
    key, value = Split(prefix_key, tail_key).joined(), Split(prefix_value, tail_value).joined()
    return attend(query, key, value, mask)[0]


def latent_attention_forward(
    module, query, key, value, attention_mask, dropout: float = 0.0, scaling: float | None = None, **kwargs
):
    """Return (B, Q, H, K) and no weights, as transformers calls it; keys that are not split go to its `sdpa`."""
    attend = partial(sdpa_attention_forward, module, dropout=dropout, scaling=scaling, **kwargs)
    if not isinstance(key, SplitKeys):
        return attend(query, key, value, attention_mask)
    states, token = key
    if query.shape[2] > MAX_QUERIES:  # the joined copy is made again in the backward pass rather than kept
        inputs = (query, *states.prefix, *ReadTail.apply(token, states), attention_mask)
        return checkpoint(joined_attention, attend, *inputs, use_reentrant=False, preserve_rng_state=dropout > 0), None
    (query,) = as_autocast(query)
    step = Step(query, query.shape[-1] ** -0.5 if scaling is None else scaling, attention_mask)
    if dropout > 0:
        kept = torch.rand(*query.shape[:3], states.num_keys, device=query.device) >= dropout
        step = step._replace(kept=kept / (1 - dropout))  # (B, H, Q, P + T)
    return Attend.apply(token, query, states, step).transpose(1, 2).contiguous(), None


def latent_mask(batch_size, q_length, kv_length, *args, attention_mask=None, allow_is_causal_skip=True, **kwargs):
    """Return sdpa's mask; never None for a latent step, because testing if it is needed synchronizes the device."""
    skips = allow_is_causal_skip and (q_length > 1 or attention_mask is None)
    options = {"attention_mask": attention_mask, "allow_is_causal_skip": skips, **kwargs}
    return sdpa_mask(batch_size, q_length, kv_length, *args, **options)


for name, mask_function in (("latent", latent_mask), (LATENT_WHERE_LEANER, sdpa_mask)):
    AttentionInterface.register(name, latent_attention_forward)
    AttentionMaskInterface.register(name, mask_function)


def choose_attention(model) -> None:
    """Let a decoder without a configured implementation use latent attention in the calls where it saves memory.

    A decoder with another attention than sdpa, with windows or with thoughts that are updated together stays as it is.
    """
    decoder, is_sequential = model.get_decoder(), model.config.thought_schedule == "sequential"
    if is_sequential and attention_of(decoder.config) == "sdpa" and decoder.sees_all_columns:
        decoder.set_attn_implementation(LATENT_WHERE_LEANER)
        if not reads_split_keys(decoder):
            decoder.set_attn_implementation("sdpa")


@torch.no_grad()
def reads_split_keys(decoder: PreTrainedModel) -> bool:
    """Return True if a decoder uses the keys from its cache unchanged; found by running two tokens, then one.

    Attention that changes keys behind the cache (DeepSeek-V3, JetMoe, DiffLlama) fails on a SplitCache.
    """
    embeds = torch.zeros(1, 3, decoder.config.hidden_size, dtype=decoder.dtype, device=decoder.device)  # (1, 3, D)
    cache = SplitCache()
    try:
        for piece in embeds.split([2, 1], dim=1):
            decoder(inputs_embeds=piece, use_cache=True, **{CACHE: cache})
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    return True


def chooses_latent_attention(decoder: PreTrainedModel, prefix_length: int = 0) -> bool:
    """Return True if a call uses a SplitCache: "latent" is configured, or it saves memory and is not slower.

    prefix_length: columns of the first pass of a training step; 0 in generation, where it was no faster. Only asked
    for, never chosen, on a GPU, where it was not measured.
    """
    least = LEAST_PREFIX if decoder.config.hidden_size >= WIDE else LEAST_PREFIX_IF_NARROW
    trains = decoder.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    is_leaner = trains and decoder.device.type == "cpu" and prefix_length >= least
    if attention_of(decoder.config) != LATENT_WHERE_LEANER or not is_leaner:
        return attention_of(decoder.config) == "latent"
    logger.info_once(
        f"Training steps with {least} or more columns before the first thought use latent attention, which keeps less "
        "memory. Set attn_implementation='sdpa' to do without it, or 'latent' to use it everywhere."
    )
    return True


def split_cache(decoder: PreTrainedModel, prefix_length: int) -> type[SplitCache] | None:
    """Return SplitCache if a call uses it, else None; see `chooses_latent_attention`."""
    return SplitCache if chooses_latent_attention(decoder, prefix_length) else None


CHOOSE_CACHE.append(split_cache)
