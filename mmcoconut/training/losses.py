"""Parts of a loss: by token, by row, and their running means."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


def token_losses(logits: torch.Tensor, labels, *, shift_labels: torch.Tensor, **kwargs) -> torch.Tensor:
    """Return the cross-entropy per labelled token (n,); a model's own loss function returns the mean ()."""
    return nn.functional.cross_entropy(logits.float(), shift_labels, reduction="none")


@contextmanager
def loss_per_token(model) -> Iterator[None]:
    """Within this context a model's loss is a vector with one entry per labelled token of the batch, row by row."""
    mean = model.loss_function
    model.loss_function = token_losses
    try:
        yield
    finally:
        model.loss_function = mean


def mean_losses(sums, objectives: Sequence[str] = ()) -> dict[str, float]:
    """Return ce_loss per labelled token, align_loss per picture, and the mean over rows of each objective.

    sums (n, 4 + objectives): one row each; ce_loss or align_loss is left out if there are no tokens or pictures.

    >>> mean_losses([[2.0, 4, 0.0, 0, 0.5], [1.0, 2, 0.0, 0, 0.0]], ["step_tokens"])
    {'ce_loss': 0.5, 'step_tokens_loss': 0.25}
    """
    ce_sum, num_tokens, align_sum, num_images, *others = (float(sum(column)) for column in zip(*sums, strict=True))
    pairs = {"ce_loss": (ce_sum, num_tokens), "align_loss": (align_sum, num_images)}
    pairs |= {name_of_term(name): (total, len(sums)) for name, total in zip(objectives, others, strict=True)}
    return {name: total / count for name, (total, count) in pairs.items() if count}


def name_of_term(objective: str) -> str:
    """Return the name under which an objective's term is logged."""
    return f"{objective}_loss"


class Terms:
    """Running means of the parts of the training loss, over all processes.

    Args:
        names: of all parts that a batch of any process may have.
    """

    def __init__(self, names: Sequence[str]):
        self.names, self.sums = tuple(names), {}

    def add(self, **losses: torch.Tensor | None) -> None:
        """Add the losses () of a batch; None for a part that it lacks."""
        for name, loss in losses.items():
            if loss is not None:
                total, count = self.sums.get(name, (0.0, 0.0))
                self.sums[name] = (total + loss.detach().float(), count + 1)

    def means(self, accelerator) -> dict[str, float]:
        """Return the means since the last call; call this in every process at the same time."""
        sums, self.sums = self.sums, {}
        local = [float(number) for name in self.names for number in sums.get(name, (0.0, 0.0))]
        totals = accelerator.reduce(torch.tensor(local, device=accelerator.device), reduction="sum").tolist()
        pairs = zip(self.names, totals[::2], totals[1::2])
        return {name: total / count for name, total, count in pairs if count}
