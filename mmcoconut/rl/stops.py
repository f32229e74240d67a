"""Log-probabilities of stopping, where the latents at which a row thinks are an action.

Shapes: B batch, T tokens, N latents.
"""

import torch
from torch import nn

from mmcoconut.errors import UsageError
from mmcoconut.passes_mmcoconut import packed
from mmcoconut.schedules_mmcoconut import first_latents


def first_thoughts(latents: torch.Tensor, num_thoughts: torch.Tensor) -> torch.Tensor:
    """Return a mask (B, T), True at the first num_thoughts (B,) latents of each run of latents (B, T)."""
    order = latents.long().cumsum(dim=1)  # (B, T), from 1
    before_run = torch.where(first_latents(latents), order - 1, 0).cummax(dim=1).values  # (B, T)
    return latents & (order - before_run <= num_thoughts[:, None])


def stop_log_probs(stop_logits: torch.Tensor, kept: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Return log P (B,) that rows think at the latents `kept` (B, T) of their latents (B, T) and at no others.

    stop_logits (B, N): the head's, before each latent. A row decides before the first latent of a run and after each
    thought: Σ log(1 - p), and log p where the row stops. There is no decision after a stop.
    """
    begins, thought, real = (packed(mask.float(), latents).bool() for mask in (first_latents(latents), kept, latents))
    decides = (begins | nn.functional.pad(thought, (1, 0))[:, :-1]) & real  # (B, N)
    thinks = nn.functional.logsigmoid(-stop_logits) * (decides & thought)
    stops = nn.functional.logsigmoid(stop_logits) * (decides & ~thought)
    return (thinks + stops).sum(dim=1)


@torch.no_grad()
def check_can_stop(model, processor) -> None:
    """Raise unless rows of a vision-language model can stop thinking, tested with a short text that stops at once.

    Raises:
        UsageError: the decoder keeps a state of all columns, or its masks cover the whole sequence.
    """
    inputs = processor(text=["a"], num_latents=2, return_tensors="pt").to(model.device)
    training = model.training
    try:
        model.eval()(**inputs, stop_threshold=0.0)
    except ValueError as error:
        remedy = "remove `stop_head`, and train with a fixed number of thoughts"
        raise UsageError(
            f"stop_head: true does not work with a {model.config.model_type}: {remedy}. {error}"
        ) from error
    finally:
        model.train(training)
