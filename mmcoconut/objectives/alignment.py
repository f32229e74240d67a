"""Image–text alignment (JEPA), a loss in addition to that of the answer's tokens.

    loss = align_weight · L_align + ce_weight · L_ce        L_align alone for the first warmup_epochs

L_ce is the cross-entropy of the labelled tokens, L_align 1 - cosine of a picture's vector and its text's.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mmcoconut.data import question_text
from mmcoconut.errors import UsageError


def all_text(row: Mapping) -> str:
    return " ".join([question_text(row), *row["steps"], row["answers"][0]])


# Alignment targets of a picture; in a captioning data set the answer is the caption.
ALIGNMENT_TARGETS = {
    "question": question_text,
    "answer": lambda row: row["answers"][0],
    "text": all_text,
}


@dataclass(frozen=True)
class Alignment:
    """Weights, schedule and targets of the image–text alignment.

    Args:
        align_weight, ce_weight: weights of the two losses.
        warmup_epochs: first epochs, with the alignment loss alone; their checkpoints are never the best one.
        targets: names in ALIGNMENT_TARGETS by priority; the first whose text is not empty is taken.
    """

    align_weight: float
    ce_weight: float = 1.0
    warmup_epochs: int = 0
    targets: tuple[str, ...] = ("question", "answer")

    def warms_up(self, epoch: int) -> bool:
        """Return True if an epoch, counted from 0, trains with the alignment loss alone."""
        return epoch < self.warmup_epochs

    def text(self, row: Mapping) -> str:
        """Return the text that a row's pictures are aligned with.

        Raises:
            ValueError: none of the targets has text in this row.
        """
        for target in self.targets:
            text = ALIGNMENT_TARGETS[target](row)
            if text.strip():
                return text
        raise UsageError(
            f"{row['row_id']}: nothing to align its pictures with among {', '.join(self.targets)}: add a target to "
            "alignment_target, or leave the row out."
        )

    def total(self, ce_loss: torch.Tensor | None, align_loss: torch.Tensor | None) -> torch.Tensor:
        """Return the total loss, without terms that are None (warm-up, or a batch without pictures)."""
        terms = [(self.ce_weight, ce_loss), (self.align_weight, align_loss)]
        return sum(weight * loss for weight, loss in terms if loss is not None)
