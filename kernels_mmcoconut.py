"""Attention of a latent step: a few queries over a long prefix and a short tail whose keys are never joined.

The loop of thinking_mmcoconut.py runs the decoder once for the text before the thoughts, then once more a thought. A
cache that appends copies all keys and values in each of these passes, and autograd keeps every copy. `SplitCache`
leaves those of the first pass where they are and writes the later ones into a tail; the attention function `latent`
reads both:

    softmax([q · prefix_keys, q · tail_keys]) = [p, t]        output = p · prefix_values + t · tail_values

Nothing of the prefix is kept for a latent step but the log-sum-exp of its scores. In the backward pass they are
computed again, and the gradients of the prefix are formed once, from the queries of all steps together:

    p = exp(s - logsumexp)    δ = do · output    ds = p (do · values - δ)    dq = ds · keys
    dkeys = Σ_steps ds · q    dvalues = Σ_steps p · do

`attn_implementation="latent"` selects it; what is not split goes to the library's `sdpa`. The three functions that do
the arithmetic are here for any device; on a GPU those of triton_mmcoconut.py take their place.

Shapes: B batch, H heads of the queries, H' of keys and values (H = G · H'), Q queries, P prefix, T tail, K head dim.
Source: the recomputation is FlashAttention's, Dao et al. 2022, https://arxiv.org/abs/2205.14135.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.generation import GenerationMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import logging

from .caches_mmcoconut import text_cache
from .compat_mmcoconut import CACHE, current_backward_pass
from .triton_mmcoconut import attention_backward as triton_attention_backward
from .triton_mmcoconut import attention_forward as triton_attention_forward
from .triton_mmcoconut import prefix_backward as triton_prefix_backward
from .triton_mmcoconut import reason_against


logger = logging.get_logger(__name__)


# More queries than this, as in the pass that holds the answer, are worth one joined copy: scores grow with them.
MAX_QUERIES = 16


class Split(NamedTuple):
    """Keys or values: prefix (B, H', P, K) and tail (B, H', T, K)."""

    prefix: torch.Tensor
    tail: torch.Tensor

    def joined(self) -> torch.Tensor:
        return torch.cat(self, dim=-2)  # (B, H', P + T, K)


class Dropped(NamedTuple):
    """Which attention weights survive dropout, (B, H, Q, P + T), and what they are multiplied by."""

    kept: torch.Tensor
    scale: float

    def of(self, weights: torch.Tensor) -> torch.Tensor:
        return weights * by_kv_head(self.kept, weights.shape[1]) * self.scale


def latent_attention_reference(query, key: Split, value: Split, *, mask, scaling: float) -> torch.Tensor:
    """The definition of `latent_attention`: softmax(q · [keys]ᵀ · scaling) · [values], keys and values joined."""
    groups = query.shape[1] // key.prefix.shape[1]
    keys, values = (split.joined().repeat_interleave(groups, dim=1) for split in (key, value))  # (B, H, P + T, K)
    scores = query @ keys.transpose(-1, -2) * scaling  # (B, H, Q, P + T)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1) @ values  # (B, H, Q, K)


def by_kv_head(states: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """(B, H, Q, …) as (B, H', G · Q, …): the rows that read the same keys stand together."""
    return states.reshape(states.shape[0], num_kv_heads, -1, *states.shape[3:])


def latent_scores(query: torch.Tensor, keys: tuple[torch.Tensor, ...], mask, scaling: float) -> torch.Tensor:
    """Scaled scores of (B, H, Q, K) over all keys (B, H', ·, K) in turn: (B, H', G · Q, all), in float32 at least."""
    batch, num_heads, num_queries, _ = query.shape
    num_kv_heads = keys[0].shape[1]
    grouped = by_kv_head(query * scaling, num_kv_heads)  # (B, H', G · Q, K)
    scores = torch.cat([grouped @ key.transpose(-1, -2) for key in keys], dim=-1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is None:
        return scores
    shape = (batch, num_kv_heads, num_heads // num_kv_heads, num_queries, -1)
    return scores.view(shape).masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min).flatten(2, 3)


def weighted_sum(weights: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Weights (B, H', R, all) times the parts (B, H', ·, K) in turn: (B, H', R, K)."""
    pieces = weights.to(parts[0].dtype).split([part.shape[2] for part in parts], dim=-1)
    return sum(piece @ part for piece, part in zip(pieces, parts))


def attention_forward(
    query, prefix_key, prefix_value, tail_key, tail_value, *, mask, scaling: float, dropped: Dropped | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, Q, K) of queries over prefix and tail, and the log-sum-exp (B, H, Q) of their scores."""
    scores = latent_scores(query, (prefix_key, tail_key), mask, scaling)  # (B, H', G · Q, P + T)
    logsumexp = scores.logsumexp(dim=-1, keepdim=True)
    weights = (scores - logsumexp).exp()
    if dropped is not None:
        weights = dropped.of(weights)
    output = weighted_sum(weights, (prefix_value, tail_value))  # (B, H', G · Q, K)
    return output.reshape(query.shape), logsumexp.reshape(query.shape[:3])


def weights_and_score_gradients(grad_output, query, keys, values, *, mask, scaling, logsumexp, delta, dropped=None):
    """Attention weights as they met the values, and the gradients of the scores before scaling; (B, H', R, all)."""
    num_kv_heads = keys[0].shape[1]
    scores = latent_scores(query, keys, mask, scaling)
    weights = (scores - by_kv_head(logsumexp, num_kv_heads)[..., None]).exp()
    grouped = by_kv_head(grad_output, num_kv_heads)  # (B, H', R, K)
    grad_weights = torch.cat([grouped @ value.transpose(-1, -2) for value in values], dim=-1)
    if dropped is not None:
        grad_weights = dropped.of(grad_weights)
    grad_scores = weights * (grad_weights - by_kv_head(delta, num_kv_heads)[..., None]) * scaling
    return weights if dropped is None else dropped.of(weights), grad_scores


def attention_backward(
    grad_output,
    query,
    prefix_key,
    prefix_value,
    tail_key,
    tail_value,
    *,
    mask,
    scaling: float,
    output,
    logsumexp,
    dropped: Dropped | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the queries (B, H, Q, K) and of the tail's keys and values (B, H', T, K), and δ (B, H, Q)."""
    num_kv_heads, prefix_length = prefix_key.shape[1:3]
    delta = (grad_output.to(logsumexp.dtype) * output).sum(dim=-1)  # (B, H, Q)
    weights, grad_scores = weights_and_score_gradients(
        grad_output,
        query,
        (prefix_key, tail_key),
        (prefix_value, tail_value),
        mask=mask,
        scaling=scaling,
        logsumexp=logsumexp,
        delta=delta,
        dropped=dropped,
    )
    grad_query = weighted_sum(grad_scores, (prefix_key, tail_key)).reshape(query.shape)
    of_tail = (part[..., prefix_length:].transpose(-1, -2) for part in (grad_scores, weights))  # (B, H', T, G · Q)
    rows = (by_kv_head(states, num_kv_heads).to(delta.dtype) for states in (query, grad_output))
    grad_tail_key, grad_tail_value = (part @ states for part, states in zip(of_tail, rows))
    return grad_query, grad_tail_key, grad_tail_value, delta


def prefix_backward(
    grad_output, query, prefix_key, prefix_value, *, mask, scaling, logsumexp, delta, dropped=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the prefix's keys and values from the queries of all latent steps, (B, H, N, K), in one pass."""
    num_kv_heads = prefix_key.shape[1]
    weights, grad_scores = weights_and_score_gradients(
        grad_output,
        query,
        (prefix_key,),
        (prefix_value,),
        mask=mask,
        scaling=scaling,
        logsumexp=logsumexp,
        delta=delta,
        dropped=dropped,
    )
    rows = (by_kv_head(states, num_kv_heads) for states in (query, grad_output))  # (B, H', G · N, K)
    return tuple(
        part.transpose(-1, -2).to(states.dtype) @ states for part, states in zip((grad_scores, weights), rows)
    )


class Kernels(NamedTuple):
    """The three functions that do the arithmetic."""

    attention_forward: Callable
    attention_backward: Callable
    prefix_backward: Callable


PYTORCH = Kernels(attention_forward, attention_backward, prefix_backward)
TRITON = Kernels(triton_attention_forward, triton_attention_backward, triton_prefix_backward)


def kernels_for(query, prefix_key, prefix_value, tail_key, tail_value, *, dropped: Dropped | None = None) -> Kernels:
    """Triton's on a GPU where they can serve these tensors; otherwise PyTorch's, on a GPU with a warning."""
    if query.device.type == "cpu":
        return PYTORCH
    reason = "they have no dropout"
    if dropped is None:
        reason = reason_against(query, prefix_key, prefix_value, tail_key, tail_value)
    if reason is not None:
        logger.warning_once(f"Latent attention runs in PyTorch and not in Triton's kernels, for {reason}.")
    return TRITON if reason is None else PYTORCH


def prefix_mask(mask: torch.Tensor | None, query: torch.Tensor, length: int) -> torch.Tensor:
    """The prefix's columns of a step's mask, (B, 1, Q, P); a step without a mask sees all of them."""
    if mask is None:
        return query.new_ones(query.shape[0], 1, query.shape[2], length, dtype=torch.bool)
    return mask[..., :length]


class SplitStates:
    """Keys and values of one layer in one forward pass, and what their gradients are gathered from.

    The tail stands in buffers (B, H', capacity, K) that are written in place, unseen by autograd. The functions below
    pass an empty tensor, the token, from one to the next instead, so that every attention which reads a key has given
    its gradient when the backward pass comes to the key.
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor):
        self.prefix = (key, value)
        self.needs_prefix_gradient = key.requires_grad or value.requires_grad
        self.length = 0
        self.buffers: tuple[torch.Tensor, ...] = ()
        self.tail_gradients: tuple[torch.Tensor, ...] = ()
        self.steps: list[tuple] = []
        self.backward_pass: int | None = None

    def enter(self) -> "SplitStates":
        """Itself, without what another backward pass left, one for some gradients only, which did not come to all."""
        if self.backward_pass != current_backward_pass():
            self.tail_gradients, self.steps = (), []
            self.backward_pass = current_backward_pass()
        return self

    def tail(self, length: int) -> tuple[torch.Tensor, ...]:
        """The first keys and values of the tail, (B, H', length, K), of whatever length it is by now."""
        return tuple(buffer[:, :, :length] for buffer in self.buffers)

    def split(self, length: int) -> tuple[torch.Tensor, ...]:
        """Keys and values of the prefix, then of the tail's first columns, unseen by autograd."""
        return *(states.detach() for states in self.prefix), *self.tail(length)

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Append (B, H', t, K) to the tail; a full buffer is replaced by a larger one, and stays as it is."""
        end = self.length + key.shape[2]
        if not self.buffers or end > self.buffers[0].shape[2]:
            capacity = end if key.shape[2] > MAX_QUERIES else max(8, 2 * end)
            buffers = tuple(states.new_empty(*states.shape[:2], capacity, states.shape[3]) for states in (key, value))
            for buffer, old in zip(buffers, self.tail(self.length)):
                buffer[:, :, : self.length] = old
            self.buffers = buffers
        for buffer, states in zip(self.buffers, (key, value)):
            buffer[:, :, self.length : end] = states
        self.length = end

    def add_tail_gradients(self, *gradients: torch.Tensor) -> None:
        """Add (B, H', T, K) to the gradients of the first T keys and values."""
        if not self.tail_gradients:
            dtype = torch.promote_types(gradients[0].dtype, torch.float32)
            self.tail_gradients = tuple(
                gradient.new_zeros(*gradient.shape[:2], self.length, gradient.shape[3], dtype=dtype)
                for gradient in gradients
            )
        for total, gradient in zip(self.tail_gradients, gradients):
            total[:, :, : gradient.shape[2]] += gradient

    def take_tail_gradients(self, start: int, end: int) -> tuple[torch.Tensor | None, ...]:
        """The gradients of some columns, to which this backward pass will add no more."""
        if not self.tail_gradients:
            return None, None
        columns = [total[:, :, start:end] for total in self.tail_gradients]
        taken = tuple(column.to(self.buffers[0].dtype, copy=True) for column in columns)
        for column in columns:
            column.zero_()
        return taken

    def take_prefix_gradients(self) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the prefix, from all steps that this backward pass went through."""
        steps, self.steps = self.steps, []
        if not steps:
            return None, None
        *rows, masks, drops, scalings = zip(*steps)
        grad_output, query, logsumexp, delta = (torch.cat(parts, dim=2) for parts in rows)
        length = self.prefix[0].shape[2]
        options = {"scaling": scalings[0], "logsumexp": logsumexp, "delta": delta, "mask": None}
        if any(mask is not None for mask in masks):
            seen = [prefix_mask(mask, states, length) for mask, states in zip(masks, rows[1])]
            options["mask"] = torch.cat(seen, dim=2)  # (B, 1, N, P)
        if drops[0] is not None:
            kept = torch.cat([dropped.kept[..., :length] for dropped in drops], dim=2)  # (B, H, N, P)
            options["dropped"] = drops[0]._replace(kept=kept)
        parts = self.split(self.length)
        return kernels_for(query, *parts, dropped=drops[0]).prefix_backward(grad_output, query, *parts[:2], **options)


class OpenPrefix(torch.autograd.Function):
    """The first token, which the gradients of the prefix come back through."""

    @staticmethod
    def forward(ctx, key, value, states):
        ctx.states = states
        return key.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_token):
        return *ctx.states.enter().take_prefix_gradients(), None


class AppendTail(torch.autograd.Function):
    """Keys and values (B, H', t, K) written into the tail; the token of those that may read them."""

    @staticmethod
    def forward(ctx, token, key, value, states):
        ctx.states, ctx.start, ctx.end = states, states.length, states.length + key.shape[2]
        states.write(key, value)
        return token.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_token):
        return grad_token, *ctx.states.enter().take_tail_gradients(ctx.start, ctx.end), None


class ReadTail(torch.autograd.Function):
    """The whole tail (B, H', T, K), for an attention that autograd sees; what is appended later stands behind it."""

    @staticmethod
    def forward(ctx, token, states):
        ctx.states = states
        return states.tail(states.length)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_key, grad_value):
        ctx.states.enter().add_tail_gradients(grad_key, grad_value)
        return grad_key.new_empty(0), None


class Attend(torch.autograd.Function):
    """Output (B, H, Q, K) of few queries over the prefix and the tail as it is now."""

    @staticmethod
    def forward(ctx, token, query, states, mask, scaling, dropped):
        ctx.states, ctx.length = states, states.length
        ctx.options = {"mask": mask, "scaling": scaling} | ({} if dropped is None else {"dropped": dropped})
        parts = states.split(states.length)
        ctx.kernels = kernels_for(query, *parts, dropped=dropped)
        output, logsumexp = ctx.kernels.attention_forward(query, *parts, **ctx.options)
        ctx.save_for_backward(query, output, logsumexp)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, output, logsumexp = ctx.saved_tensors
        known = {**ctx.options, "output": output, "logsumexp": logsumexp}
        parts = ctx.states.split(ctx.length)
        grad_query, *grad_tail, delta = ctx.kernels.attention_backward(grad_output, query, *parts, **known)
        ctx.states.enter().add_tail_gradients(*grad_tail)
        if ctx.states.needs_prefix_gradient:
            options = (ctx.options["mask"], ctx.options.get("dropped"), ctx.options["scaling"])
            ctx.states.steps.append((grad_output, query, logsumexp, delta, *options))
        return delta.new_empty(0, dtype=grad_output.dtype), grad_query, None, None, None, None


class SplitKeys(NamedTuple):
    """What an attention finds in the place of keys or values: all of both, and the token that allows to read them."""

    states: SplitStates
    token: torch.Tensor


def split_attention(query, keys: SplitKeys, *, mask=None, scaling: float, dropout: float = 0.0) -> torch.Tensor:
    """Attention of few queries (B, H, Q, K) over split keys and values; see `latent_attention`."""
    dropped = None
    if dropout > 0:
        num_keys = keys.states.prefix[0].shape[2] + keys.states.length
        kept = torch.rand(*query.shape[:3], num_keys, device=query.device) >= dropout  # (B, H, Q, P + T)
        dropped = Dropped(kept, 1 / (1 - dropout))
    return Attend.apply(keys.token, query, keys.states, mask, scaling, dropped)


def latent_attention(
    query: torch.Tensor, key: Split, value: Split, *, mask=None, scaling: float, dropout: float = 0.0
) -> torch.Tensor:
    """Attention of few queries over split keys and values, without copying the prefix.

    Args:
        query (B, H, Q, K).
        key, value: of H' heads, each of which serves H / H' heads of the queries in turn, unrepeated.
        mask (B, 1, Q, P + T) or None: True where a query may look.
        scaling: of the scores.
        dropout: of the probabilities.

    Returns:
        (B, H, Q, K). A query that may look nowhere gets finite numbers without meaning.
    """
    states = SplitStates(key.prefix, value.prefix)
    token = AppendTail.apply(OpenPrefix.apply(*states.prefix, states), key.tail, value.tail, states)
    return split_attention(query, SplitKeys(states, token), mask=mask, scaling=scaling, dropout=dropout)


def joined_attention(attend, query, prefix_key, prefix_value, tail_key, tail_value, mask) -> torch.Tensor:
    """`attend` with the keys and the values joined."""
    key, value = Split(prefix_key, tail_key).joined(), Split(prefix_value, tail_value).joined()
    return attend(query, key, value, mask)[0]


def latent_attention_forward(
    module, query, key, value, attention_mask, dropout: float = 0.0, scaling: float | None = None, **kwargs
):
    """`latent` as the library's attention interface calls it; (B, Q, H, K) and no weights."""
    if not isinstance(key, SplitKeys):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if query.shape[2] <= MAX_QUERIES:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = split_attention(query, key, mask=attention_mask, scaling=scaling, dropout=dropout)
        return output.transpose(1, 2).contiguous(), None
    # The joined copy is made again in the backward pass rather than kept.
    attend = partial(sdpa_attention_forward, module, dropout=dropout, scaling=scaling, **kwargs)
    tail = ReadTail.apply(key.token, key.states)
    states = (query, *key.states.prefix, *tail, attention_mask)
    return checkpoint(joined_attention, attend, *states, use_reentrant=False, preserve_rng_state=dropout > 0), None


class SplitLayer(CacheLayerMixin):
    """Keys and values of one layer: those of the first pass as they are, all later ones in a tail of their own."""

    is_sliding = False
    is_croppable = True

    def __init__(self):
        super().__init__()
        self.is_initialized = True
        self.states: SplitStates | None = None
        self.token: torch.Tensor | None = None

    def lazy_initialization(self, key_states, value_states):
        return None

    def update(self, key_states, value_states, *args, **kwargs):
        """The first pass's own keys and values (B, H', P, K); later `SplitKeys` in the place of both."""
        if self.states is None:
            return self.open(key_states, value_states)
        self.token = AppendTail.apply(self.token, key_states, value_states, self.states)
        return SplitKeys(self.states, self.token), None

    def open(self, key_states, value_states):
        """Begin with the first pass's keys and values (B, H', P, K), and give what it reads."""
        if kernels_for(key_states, *[key_states, value_states] * 2) is PYTORCH:
            # Heads apart, once: matrix products would copy them in every pass.
            key_states, value_states = key_states.contiguous(), value_states.contiguous()
        self.states = SplitStates(key_states, value_states)
        self.token = OpenPrefix.apply(key_states, value_states, self.states)
        return key_states, value_states

    def joined(self) -> tuple[torch.Tensor, ...]:
        """Keys and values (B, H', P + T, K) of all that the layer has read."""
        if not self.states.length:
            return self.states.prefix
        parts = self.states.split(self.states.length)
        return tuple(Split(prefix, tail).joined() for prefix, tail in zip(parts[:2], parts[2:]))

    def of_rows(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Hold other rows, `pick` of keys or values (B, H', ·, K), in the place of these; between decoding steps."""
        states = SplitStates(*map(pick, self.states.prefix))
        states.buffers = tuple(map(pick, self.states.buffers))
        states.length = self.states.length
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
        return 0 if self.states is None else self.states.prefix[0].shape[2] + self.states.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class SplitCache(Cache):
    """A cache whose later keys are not joined to those of the first pass, in training and in generation."""

    def __init__(self):
        super().__init__(layer_class_to_replicate=SplitLayer)

    @classmethod
    def after(cls, states: list[tuple[torch.Tensor, torch.Tensor]]) -> "SplitCache":
        """The cache that begins with these keys and values (B, H', P, K) of all layers."""
        cache = cls()
        cache.layers = [SplitLayer() for _ in states]
        for layer, (key_states, value_states) in zip(cache.layers, states):
            layer.open(key_states, value_states)
        return cache


def latent_mask(batch_size, q_length, kv_length, *args, attention_mask=None, allow_is_causal_skip=True, **kwargs):
    """The library's mask for sdpa; always made of a latent step, as seeing if it is needed waits for the device."""
    skips = allow_is_causal_skip and (q_length > 1 or attention_mask is None)
    options = {"attention_mask": attention_mask, "allow_is_causal_skip": skips, **kwargs}
    return sdpa_mask(batch_size, q_length, kv_length, *args, **options)


class GenerationOverSplitKeys:
    """The part of a model with a head that gives `generate` a SplitCache where that can be read."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, num_read):
        """Put a SplitCache in the place of a growing cache that transformers makes."""
        is_given = model_kwargs.get(CACHE) is not None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, batch_size, num_read)
        own = None if is_given else text_cache(model_kwargs.get(CACHE))
        is_assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        if type(own) is not DynamicCache or own.offloading or is_assisted or not self.model.reads_split_keys():
            return
        if own is model_kwargs[CACHE]:
            model_kwargs[CACHE] = SplitCache()
        else:
            model_kwargs[CACHE].self_attention_cache = SplitCache()


AttentionInterface.register("latent", latent_attention_forward)
AttentionMaskInterface.register("latent", latent_mask)
