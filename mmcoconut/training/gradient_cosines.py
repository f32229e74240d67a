"""Compute the cosine between the gradient of each objective and the gradient of the answer's loss.

Near 1 an objective helps the answer, near 0 it is unrelated, below 0 it conflicts. The gradients are those of a
whole update, over all batches and processes, for the trained weights of the model; weights of the objectives are
excluded, since the answer does not depend on them. The run is unchanged: these are additional backward passes
over the same graph, and their results are stored separately.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn


ANSWER = "answer"


class GradientCosines:
    """Sum the gradients of an update's terms, each as one vector over all trained weights.

    Args:
        weights: of the model, without those of its objectives.
    """

    def __init__(self, weights: Sequence[nn.Parameter]):
        self.weights = [weight for weight in weights if weight.requires_grad]
        self.update: int | None = None
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, update: int, ce_loss: torch.Tensor, terms: Mapping[str, torch.Tensor]) -> None:
        """Add the gradients of a batch's losses (); a new update resets those of the previous one."""
        if update != self.update:
            self.update, self.sums = update, {}
        for name, loss in {ANSWER: ce_loss, **terms}.items():
            gradient = self.gradient_of(loss)  # (W,)
            self.sums[name] = self.sums[name] + gradient if name in self.sums else gradient

    def gradient_of(self, loss: torch.Tensor) -> torch.Tensor:
        """Return a loss's gradient as one vector (W,); zeros where it depends on no weight."""
        found = [None] * len(self.weights)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, self.weights, retain_graph=True, allow_unused=True)
        pairs = zip(found, self.weights)
        return torch.cat([(torch.zeros_like(weight) if each is None else each).flatten() for each, weight in pairs])

    def cosines(self, accelerator) -> dict[str, float]:
        """Return the cosine of each term's gradient with the answer's, by term, for the last update; then reset.

        A term without a gradient, as at a stage without latents, is left out. Call this in every process at the same
        time.
        """
        sums, self.sums = self.sums, {}
        sums = {name: accelerator.reduce(gradient, reduction="mean") for name, gradient in sums.items()}
        answer = sums.pop(ANSWER, None)
        found = {}
        for name, gradient in sums.items():
            norms = float(gradient.float().norm() * answer.float().norm())
            if norms > 0:
                found[name] = float(gradient.float() @ answer.float()) / norms
        return found
