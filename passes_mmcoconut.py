"""What differs between the decoder passes of one forward pass: which are checkpointed, and which defer gradients.

The first pass holds the text before the thoughts and by far the most tokens; those after it hold a token a row, but
for the last. Shapes: B batch, t tokens of one pass, D hidden.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .caches_mmcoconut import ReplayCache, text_cache
from .deferred_mmcoconut import DeferredWeightGradients


CHECKPOINTED_PASSES = ("all", "first")


def check_checkpointed_passes(value: str) -> str:
    """The value itself.

    Raises:
        ValueError: an unknown name.
    """
    if value not in CHECKPOINTED_PASSES:
        raise ValueError(f"checkpointed_passes={value!r} is not known: choose one of {CHECKPOINTED_PASSES}.")
    return value


@contextmanager
def not_checkpointed(layers: list[GradientCheckpointingLayer]):
    """Inside, these layers keep their activations."""
    before = [layer.gradient_checkpointing for layer in layers]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer, flag in zip(layers, before):
            layer.gradient_checkpointing = flag


class Passes:
    """A decoder's call for all passes of one forward pass.

    call: runs the decoder. defers: whether weight gradients are formed once. A pass that is replayed forms its own, as
    its replay does not come through here.
    """

    def __init__(self, decoder: nn.Module, call, *, defers: bool):
        self.call = call
        self.layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.deferred = DeferredWeightGradients() if defers else nullcontext()

    def __call__(self, *, inputs_embeds: torch.Tensor, past_key_values: Cache, **kwargs):
        """One pass over (B, t, D)."""
        inputs = {"inputs_embeds": inputs_embeds, "past_key_values": past_key_values, **kwargs}
        if isinstance(text_cache(past_key_values), ReplayCache):
            return self.call(**inputs)
        with not_checkpointed(self.layers), self.deferred:
            return self.call(**inputs)
