"""How the gradient of each objective agrees with that of the answer's loss: the cosine of the two.

Near 1 a term helps the answer, near 0 it asks for something else, below 0 it works against it. Gradients are those of
a whole update, of all its batches and processes, over the weights of the model that are trained; an objective's own
are not among them, since the answer does not depend on them. Nothing of the run changes: these are further backward
passes over the same graph, whose results are kept aside.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn


ANSWER = "answer"


class GradientCosines:
    """Sums the gradients of an update's terms, each in one vector as long as all trained weights.

    Args:
        weights: of the model, without those of its objectives.
    """

    def __init__(self, weights: Sequence[nn.Parameter]):
        self.weights = [weight for weight in weights if weight.requires_grad]
        self.update: int | None = None
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, update: int, ce_loss: torch.Tensor, terms: Mapping[str, torch.Tensor]) -> None:
        """Add the gradients of a batch's losses (); a new update forgets those of the one before."""
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
        """Return the cosine of each term's gradient and the answer's by term, of the last update, and forget it.

        A term without a gradient, as at a stage without latents, has none. Every process must call it at the same
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
