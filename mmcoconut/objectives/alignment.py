"""What a run minimises beside the loss of the answer's tokens: the alignment of pictures with texts (JEPA).

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


# What a picture may be aligned with; of a captioning data set the answer is the caption.
ALIGNMENT_TARGETS = {
    "question": question_text,
    "answer": lambda row: row["answers"][0],
    "text": all_text,
}


@dataclass(frozen=True)
class Alignment:
    """Weights and schedule of the alignment, and what it aligns pictures with.

    Args:
        align_weight, ce_weight: of the two losses.
        warmup_epochs: epochs of alignment alone, before the answer is learnt; none of their checkpoints is a best one.
        targets: names in ALIGNMENT_TARGETS by priority; the first whose text is not empty is taken.
    """

    align_weight: float
    ce_weight: float = 1.0
    warmup_epochs: int = 0
    targets: tuple[str, ...] = ("question", "answer")

    def warms_up(self, epoch: int) -> bool:
        """Return True if an epoch, counted from 0, is one of alignment alone."""
        return epoch < self.warmup_epochs

    def text(self, row: Mapping) -> str:
        """Return what a row's pictures are aligned with.

        Raises:
            ValueError: a row in which none of the targets has text.
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
        """The loss; a term that is None, as in the warm-up or in a batch without pictures, is left out."""
        terms = [(self.ce_weight, ce_loss), (self.align_weight, align_loss)]
        return sum(weight * loss for weight, loss in terms if loss is not None)
