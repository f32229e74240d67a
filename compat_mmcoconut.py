"""Names of transformers and torch that moved between supported releases, or have no public equivalent.

A checkpoint runs on whatever release its reader has installed. The rest of the files that ship with it use names that
are public and unchanged since transformers 5.18; the exceptions are here, each with its reason. tests/test_compat.py
fails by name when one of them moves.
"""

import inspect
from contextlib import contextmanager
from dataclasses import fields
from functools import cache, wraps

import torch
import torch.distributed as dist
import transformers
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel


# The keyword for the cache in decoders, outputs and `generate`: `past_key_values` to transformers 5.23, `cache` from
# 5.24 on. This code says `past_key_values` inside; `CACHE` is the name that transformers has.
CACHE_NAMES = ("past_key_values", "cache")
CACHE = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in CACHE_NAMES)
OTHER_CACHE_NAME = next(name for name in CACHE_NAMES if name != CACHE)

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])

# Private names of transformers that classes here override or set, with the reason for each.
OVERRIDDEN_METHODS = {
    # The hook that every PreTrainedModel implements for the weights of its own modules.
    "_init_weights": "there is no public hook for initializing a module's weights",
    # Serving engines look for a processor's count of image tokens under this name.
    "_get_num_multimodal_tokens": "transformers has no public name for it",
    # Called by gradient_checkpointing_enable() (to 5.22) and activation_checkpointing_enable() (from 5.23) alike.
    "_set_gradient_checkpointing": "the public method that calls it was renamed",
    # Between choosing a cache's kind and size and the first forward pass, `generate` calls nothing public.
    "_prepare_cache_for_generation": "a prefix is copied in where the kind and size of the cache are known",
}
# Class attributes that PreTrainedModel reads; they are documented, and the underscore is part of the names.
CLASS_ATTRIBUTES = (
    "_tied_weights_keys",
    "_skip_keys_device_placement",
    "_tp_plan",
    "_can_compile_fullgraph",
)
CLASS_ATTRIBUTES += ("_supports_flash_attn", "_supports_sdpa", "_supports_flex_attn", "_supports_attention_backend")


def rename_cache(kwargs: dict, name: str = CACHE) -> dict:
    """Move a cache under either name in kwargs to `name`; change kwargs in place and return them.

    Raises:
        ValueError: caches under both names.
    """
    given = [key for key in CACHE_NAMES if kwargs.get(key) is not None]
    if len(given) == 2:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: give only one of them.")
    values = [kwargs.pop(key) for key in CACHE_NAMES if key in kwargs]
    if values:
        kwargs[name] = next((value for value in values if value is not None), None)
    return kwargs


def takes_cache_by_either_name(function):
    """Let a function with the parameter `past_key_values` also take it as `cache`; show transformers' name."""

    @wraps(function)
    def call(*args, **kwargs):
        if "cache" in kwargs:
            rename_cache(kwargs, "past_key_values")
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    parameters = [
        parameter.replace(name=CACHE) if name == "past_key_values" else parameter
        for name, parameter in signature.parameters.items()
    ]
    call.__signature__ = signature.replace(parameters=parameters)
    return call


def takes_arguments_of(base_forward):
    """Show the arguments of both in the signature of a forward that passes its kwargs to base_forward."""

    def decorate(function):
        @wraps(function)
        def call(self, *args, **kwargs):
            named = dict(zip([*call.__signature__.parameters][1:], args))
            return function(self, **named, **rename_cache(kwargs))

        own, base = (dict(inspect.signature(each).parameters) for each in (function, base_forward))
        others = [value for value in (base | own).values() if value.kind is inspect.Parameter.VAR_KEYWORD][:1]
        base, own = (
            {name: value for name, value in each.items() if value.kind is not inspect.Parameter.VAR_KEYWORD}
            for each in (base, own)
        )
        added = [value for name, value in own.items() if name not in base]
        keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in added]
        call.__signature__ = inspect.Signature([*base.values(), *keyword_only, *others])
        return call

    return decorate


class CacheByEitherName:
    """Mixin for outputs: read the cache under both names; the dataclass has one as a field."""


setattr(CacheByEitherName, OTHER_CACHE_NAME, property(lambda self: self.get(CACHE)))


def hidden_states_to_return(layers: int | list[int], wanted: bool | int | list[int] | None = None):
    """Return the `output_hidden_states` that a tower needs to return the layers read and the other wanted ones.

    From transformers 5.23 on, a tower returns only the named layers; before, all or none.
    """
    if RELEASE < (5, 23) or wanted is True:
        return True
    layers, wanted = ([value] if type(value) is int else value or [] for value in (layers, wanted))
    return [*layers, *wanted]


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Return True if any layer is checkpointed; the property's name changed with transformers 5.23."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def takes_no_thoughts(num_columns: int) -> bool:
    """Return True in a compiled step of one token and in `torch.export`, where passes cannot follow the ids."""
    return torch.compiler.is_exporting() or (num_columns == 1 and torch.compiler.is_compiling())


@contextmanager
def not_checkpointed(layers: list[GradientCheckpointingLayer]):
    """Let these layers keep their activations inside this context."""
    before = [layer.gradient_checkpointing for layer in layers]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer, flag in zip(layers, before):
            layer.gradient_checkpointing = flag


def keep_cache_in_checkpoints(layer: GradientCheckpointingLayer, keep: bool) -> None:
    """Let a checkpointed layer keep its cache; by default it drops it, and no public setting says otherwise."""
    layer._can_checkpoint_with_cache = keep


def assert_without_waiting(condition: torch.Tensor, message: str) -> None:
    """Raise on the device if a condition () is False, without a graph break; torch has no public spelling of it."""
    torch._assert_async(condition, message)


def slice_columns(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Return the columns of states (B, T, D) that `logits_to_keep` asks for; transformers has this from 5.21 on.

    logits_to_keep: the last so many columns, 0 for all; indices (n,) of columns; indices (B, n) of each row; or a
    boolean mask (B, T), which gives (kept, D).
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)


@cache
def in_front(mixin: type, own_class: type) -> type:
    """Return a class with the mixin in front of own_class, under own_class's name, by which transformers knows it."""
    body = {name: getattr(own_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(own_class.__name__, (mixin, own_class), {**body, "mixed_of": (mixin, own_class)})


class PutInFront:
    """Base class of the mixins that `in_front` makes classes with."""

    def __reduce_ex__(self, protocol):
        """Pickle by the two classes, as the made one cannot be found by its name."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _new_instance, self.mixed_of, *state


def _new_instance(mixin: type, own_class: type):
    """Return an empty instance of a class that `in_front` makes, for pickle."""
    made = in_front(mixin, own_class)
    return made.__new__(made)


def is_sharded(decoder: nn.Module) -> bool:
    """Return True if FSDP2 shards the decoder: all processes must then run the same number of passes."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule  # not in a build of torch without torch.distributed

    return any(isinstance(module, FSDPModule) for module in decoder.modules())


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full tensor, gathered if FSDP2 has sharded it; every process must call this."""
    if not dist.is_available():
        return tensor
    from torch.distributed.tensor import DTensor  # not in a build of torch without torch.distributed

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def agreed_columns(columns: list[int], num_columns: int, device: torch.device) -> list[int]:
    """Return the columns, padded to the number of passes of the process with most; every process must call this.

    No row has a latent at an added column, so the sequence is only split there: the same keys and values in two
    passes. The added columns come first, where a pass has the fewest keys to attend to.

    Raises:
        ValueError: in every process, if one of them has fewer columns than another has passes.
    """
    num_passes = len({0, *columns})
    most = torch.tensor([num_passes, -num_columns], device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    most_passes, least_columns = most[0].item(), -most[1].item()
    if most_passes > least_columns:
        raise ValueError(
            f"With FSDP every process runs the decoder {most_passes} times in this step, the most that any process "
            f"needs, but the sequence of one has only {least_columns} columns to split at: batch rows of similar "
            "lengths, or use fewer latents."
        )
    free = [column for column in range(1, num_columns) if column not in columns]
    return sorted([*columns, *free[: most_passes - num_passes]])
