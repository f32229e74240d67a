"""Private names of transformers and torch that only this package uses, each with its reason.

tests/test_compat.py fails by name when one of them moves.
"""

import torch
from transformers.configuration_utils import PreTrainedConfig


def attention_of(config: PreTrainedConfig) -> str | None:
    """Return the attention implementation of a model; `set_attn_implementation` is public, reading it is not."""
    return config._attn_implementation


def current_backward_pass() -> int:
    """Return a number that tells backward passes apart; torch's own checkpointing uses this private name."""
    return torch._C._current_graph_task_id()
