"""The state at a latent predicts, through the model's own head, a token of the step that it stands for (LOTUS)."""

from typing import ClassVar

import torch
from torch import nn

from mmcoconut.objectives.base import Objective, RowsOfBatch, mean_by_row


IGNORED = -100


def tokens_of_latents(batch: RowsOfBatch) -> torch.Tensor:
    """Return the token that each latent is to predict, (B, N): the i-th of its step for the i-th latent of that.

    IGNORED where a latent stands for no step, or its step has fewer tokens.
    """
    targets = torch.full_like(batch.steps, IGNORED)
    for index, row in enumerate(batch.rows):
        steps = [batch.processor.encode_text(step) for step in row["steps"]]
        for latent, (step, place) in enumerate(zip(batch.steps[index].tolist(), batch.places[index].tolist())):
            if step >= 0 and place < len(steps[step]):
                targets[index, latent] = steps[step][place]
    return targets


class StepTokens(Objective):
    """Cross-entropy of the model's own head on the state at latent j against a token of the step it stands for.

    With c_thought latents a step, the i-th of them predicts the step's i-th token; further tokens are not supervised.
    Latents without a step, as of rows with fewer steps than the stage, are left alone.

    Source: LOTUS, https://arxiv.org/abs/2606.31779.

    >>> from mmcoconut.views_mmcoconut import ThoughtView
    >>> view = ThoughtView(*[None] * 7, head=lambda states: states)
    >>> view.after = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
    >>> StepTokens().loss(view, {"targets": torch.tensor([[0, IGNORED]])}, None)  # log(1 + e^-2)
    tensor([0.1269])
    """

    name: ClassVar[str] = "step_tokens"
    paper: ClassVar[str] = "https://arxiv.org/abs/2606.31779"
    fields: ClassVar[tuple[str, ...]] = ("steps",)
    default_weight: ClassVar[float] = 0.05

    def encode(self, batch: RowsOfBatch) -> dict:
        return {"targets": tokens_of_latents(batch)}

    def loss(self, view, inputs, run) -> torch.Tensor:
        targets = inputs["targets"]  # (B, N)
        known = targets != IGNORED  # (B, N)
        losses = torch.zeros_like(targets, dtype=torch.float32)
        logits = view.head(view.after[known]).float()  # (known, V)
        losses[known] = nn.functional.cross_entropy(logits, targets[known], reduction="none")
        return mean_by_row(losses, known)
