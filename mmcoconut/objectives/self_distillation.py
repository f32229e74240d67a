"""Distil states of the row with written steps into the row with thoughts, in the same model (CODI).

Shapes: B rows, T tokens, L layers, D hidden, V vocabulary.
"""

import math
from typing import ClassVar

import torch
from torch import nn

from mmcoconut.data.targets import IGNORED, RowPlan, answer_columns, predicted
from mmcoconut.objectives.base import Objective, RowsOfBatch, mean_by_row


WRITTEN = RowPlan(skipped_steps=0, num_latents=0)


def distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the distance (B,) of states (B, L, D) from a teacher's: the mean over layers of mean |s - t| / std(t).

    >>> distance(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[0.0, 2.0]]]))  # 1 / std(0, 2), which is √2
    tensor([0.7071])
    """
    student, teacher = student.float(), teacher.float()
    spread = teacher.std(dim=-1).clamp(min=torch.finfo(teacher.dtype).eps)  # (B, L)
    return ((student - teacher).abs().mean(dim=-1) / spread).mean(dim=-1)


class SelfDistillation(Objective):
    """Train the thinking row towards the states before the answer of the same row with written steps.

        L = teacher_weight · CE(written row) + mean over layers l:  mean |h_l - sg(t_l)| / std(t_l)

    h_l and t_l are the states after layer l at the token before the answer's text, of the thinking and of the written
    row; sg stops the gradient, so that the written row learns only from its own cross-entropy.

    Here std is over the D numbers of a row's own state, so that a row's loss does not depend on its batch. The paper
    takes it over the teacher's states of a layer in the whole batch. Its code does so too, with the smooth L1 distance
    (quadratic below 1) and the embeddings as an additional layer; its scripts weight the distance by 20 and the
    written row's loss by 1, which is `weight: 20, teacher_weight: 0.05` here.

    A row without latents is itself a written row: its loss is 0, and a batch of such rows takes no second forward.

    Args:
        teacher_weight: weight of the written row's cross-entropy.

    Source: CODI, https://arxiv.org/abs/2502.21074.

    >>> SelfDistillation(teacher_weight=0.5).settings
    {'teacher_weight': 0.5}
    """

    name: ClassVar[str] = "self_distillation"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.21074"
    fields: ClassVar[tuple[str, ...]] = ("steps",)
    needs_hidden_states: ClassVar[bool] = True
    forwards: ClassVar[int] = 1

    def __init__(self, weight=None, *, teacher_weight: float = 1.0):
        super().__init__(weight)
        if isinstance(teacher_weight, bool) or not 0 <= teacher_weight < math.inf:
            raise ValueError(
                f"objectives.self_distillation.teacher_weight={teacher_weight} must be a finite number of at least 0."
            )
        self.teacher_weight = teacher_weight

    @property
    def settings(self) -> dict:
        return {"teacher_weight": self.teacher_weight}

    def plans(self, plan: RowPlan, num_steps: int) -> list[RowPlan]:
        return [WRITTEN] * (plan != WRITTEN)

    def encode(self, batch: RowsOfBatch) -> dict:
        written = dict(batch.labelled(lambda row: WRITTEN))
        targets = predicted(written.pop("labels"), batch.processor)  # (B, T)
        columns = answer_columns(batch.rows, targets, batch.processor)
        return {"written": written, "targets": targets, "answer_column": columns}

    def loss(self, view, inputs, run) -> torch.Tensor:
        thinks = view.mask.any(dim=1)  # (B,)
        if not thinks.any():
            return torch.zeros(thinks.shape, device=thinks.device)
        asked = {"output_view": True, "output_hidden_states": True, **run.without_logits}
        teacher = run({**inputs["written"], **asked}).view
        teacher.answer_column = inputs["answer_column"]
        # Without the embeddings, which are of the same token in both rows.
        drawn = distance(view.answer_states()[:, 1:], teacher.answer_states()[:, 1:].detach())  # (B,)
        known = inputs["targets"] != IGNORED  # (B, T)
        logits = teacher.head(teacher.states[known]).float()  # (labelled, V)
        said = nn.functional.cross_entropy(logits, inputs["targets"][known], reduction="none")
        said = mean_by_row(said.new_zeros(known.shape).masked_scatter(known, said), known)  # (B,)
        return torch.where(thinks, self.teacher_weight * said + drawn, 0.0)
