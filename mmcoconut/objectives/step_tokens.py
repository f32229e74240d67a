"""Predict tokens of a step from the state at its latents, with the model's own head (LOTUS)."""

from typing import ClassVar

import torch

from mmcoconut.data.targets import IGNORED, encode_step
from mmcoconut.objectives.base import Objective, RowsOfBatch, mean_by_row


TOKENS = ("in_order", "bag")


def tokens_of_latents(batch: RowsOfBatch, tokens: str) -> torch.Tensor:
    """Return the target tokens of each latent, (B, N, K), with IGNORED after its last one.

    `in_order`: the i-th latent of a step with ids t₁ t₂ …, as the model would write it, has the target tᵢ, or none if
    the step has fewer tokens. `bag`: each latent of the step has all its tokens as targets, once each.
    """
    found = []
    for row, steps, places in zip(batch.rows, batch.steps.tolist(), batch.places.tolist()):
        ids = [encode_step(batch.processor, step) for step in row["steps"]]
        of_row = [ids[step] if step >= 0 else () for step in steps]
        if tokens == "bag":
            found.append([[*dict.fromkeys(step)] for step in of_row])
        else:
            found.append([[*step[place : place + 1]] for step, place in zip(of_row, places)])
    most = max((len(each) for row in found for each in row), default=0)
    padded = [[each + [IGNORED] * (most - len(each)) for each in row] for row in found]
    return torch.tensor(padded, dtype=torch.long).reshape(*batch.steps.shape, most)


class StepTokens(Objective):
    """Cross-entropy of the model's own head on the state at latent j against tokens of its step.

        L = mean over latents j, mean over their tokens t:  -log softmax(head(after[j]))[t]

    Latents without a step, in rows with fewer steps than the stage, are not supervised.

    With `markers: start` or `none` the answer's loss also supervises the state at the last latent: it predicts the
    next written token, while this objective trains it on its step's token. With `markers: both` the state at
    `<|end-latent|>` predicts the next written token, and a latent's state only its step.

    Args:
        tokens: `in_order`: of c_thought latents per step, the i-th predicts the step's i-th token. `bag`: each
            predicts all tokens of its step, for steps whose first tokens carry little information.

    Source: LOTUS, https://arxiv.org/abs/2606.31779; the bag is ours.

    >>> from mmcoconut.views_mmcoconut import ThoughtView
    >>> view = ThoughtView(*[None] * 7, head=lambda states: states)
    >>> view.after = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
    >>> StepTokens().loss(view, {"targets": torch.tensor([[[0], [IGNORED]]])}, None)  # log(1 + e^-2)
    tensor([0.1269])
    """

    name: ClassVar[str] = "step_tokens"
    paper: ClassVar[str] = "https://arxiv.org/abs/2606.31779"
    fields: ClassVar[tuple[str, ...]] = ("steps",)
    default_weight: ClassVar[float] = 0.05

    def __init__(self, weight=None, *, tokens: str = "in_order"):
        super().__init__(weight)
        if tokens not in TOKENS:
            raise ValueError(f"objectives.step_tokens.tokens={tokens!r} is not one of {', '.join(TOKENS)}.")
        self.tokens = tokens

    def encode(self, batch: RowsOfBatch) -> dict:
        return {"targets": tokens_of_latents(batch, self.tokens)}

    def loss(self, view, inputs, run) -> torch.Tensor:
        targets = inputs["targets"]  # (B, N, K)
        known = targets != IGNORED  # (B, N, K)
        supervised = known.any(dim=-1)  # (B, N)
        log_probs = view.head(view.after[supervised]).float().log_softmax(dim=-1)  # (n, V)
        wanted, real = targets[supervised], known[supervised]  # (n, K)
        losses = mean_by_row(-log_probs.gather(1, wanted.clamp(min=0)), real)  # (n,)
        return mean_by_row(losses.new_zeros(supervised.shape).masked_scatter(supervised, losses), supervised)
