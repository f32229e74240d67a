"""The parts of a loss: by token, by row, and their running means."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def token_losses(logits: torch.Tensor, labels, *, shift_labels: torch.Tensor, **kwargs) -> torch.Tensor:
    """Return the cross-entropy of each labelled token (n,), where a model's loss function returns their mean ()."""
    return nn.functional.cross_entropy(logits.float(), shift_labels, reduction="none")


@contextmanager
def loss_per_token(model) -> Iterator[None]:
    """Inside, the loss of a model is a vector with one entry for each labelled token of the batch, row by row."""
    mean = model.loss_function
    model.loss_function = token_losses
    try:
        yield
    finally:
        model.loss_function = mean


def mean_losses(sums) -> dict[str, float]:
    """Return ce_loss per labelled token and align_loss per picture from the sums (n, 4) of rows; without any, neither.

    >>> mean_losses([[2.0, 4, 0.0, 0], [1.0, 2, 0.0, 0]])
    {'ce_loss': 0.5}
    """
    ce_sum, num_tokens, align_sum, num_images = (float(sum(column)) for column in zip(*sums, strict=True))
    pairs = {"ce_loss": (ce_sum, num_tokens), "align_loss": (align_sum, num_images)}
    return {name: total / count for name, (total, count) in pairs.items() if count}


class Terms:
    """Running means of the parts of the training loss, over all processes; empty where there is one part only."""

    NAMES = ("ce_loss", "align_loss")

    def __init__(self):
        self.sums = {}

    def add(self, *, ce_loss=None, align_loss=None, steps: int = 1) -> None:
        """Count the losses () of a batch; ce_loss is that batch's part of an update of so many steps."""
        losses = {"ce_loss": None if ce_loss is None else ce_loss * steps, "align_loss": align_loss}
        for name, loss in losses.items():
            if loss is not None:
                total, count = self.sums.get(name, (0.0, 0.0))
                self.sums[name] = (total + loss.detach().float(), count + 1)

    def means(self, accelerator) -> dict[str, float]:
        """Means since the last call; every process must call it at the same time."""
        sums, self.sums = self.sums, {}
        local = [float(number) for name in self.NAMES for number in sums.get(name, (0.0, 0.0))]
        totals = accelerator.reduce(torch.tensor(local, device=accelerator.device), reduction="sum").tolist()
        pairs = zip(self.NAMES, totals[::2], totals[1::2])
        return {name: total / count for name, total, count in pairs if count}
