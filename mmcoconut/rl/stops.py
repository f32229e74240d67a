"""Where rows stop thinking, as an action: which latents they thought at, and how likely that was.

Shapes: B batch, T tokens, N latents.
"""

import torch
from torch import nn

from mmcoconut.passes_mmcoconut import packed
from mmcoconut.schedules_mmcoconut import first_latents


def first_thoughts(latents: torch.Tensor, num_thoughts: torch.Tensor) -> torch.Tensor:
    """Return (B, T), True at the first num_thoughts (B,) latents of each run of latents (B, T)."""
    order = latents.long().cumsum(dim=1)  # (B, T), from 1
    before_run = torch.where(first_latents(latents), order - 1, 0).cummax(dim=1).values  # (B, T)
    return latents & (order - before_run <= num_thoughts[:, None])


def stop_log_probs(stop_logits: torch.Tensor, kept: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Return log P (B,) that rows think at the latents `kept` (B, T) of their latents (B, T) and at no others.

    stop_logits (B, N): the head's, before each latent. At the first of a run, and behind each that was thought, it is
    decided whether to think: Σ log(1 - p), and log p where a row stops. Behind a stop nothing is decided.
    """
    begins, thought, real = (packed(mask.float(), latents).bool() for mask in (first_latents(latents), kept, latents))
    decides = (begins | nn.functional.pad(thought, (1, 0))[:, :-1]) & real  # (B, N)
    thinks = nn.functional.logsigmoid(-stop_logits) * (decides & thought)
    stops = nn.functional.logsigmoid(stop_logits) * (decides & ~thought)
    return (thinks + stops).sum(dim=1)
