"""Train a stop head on the model's own answers: stop after the fewest thoughts with a right answer.

Every training row is answered with 0, 1, … N thoughts. The target is the first number of thoughts with which the
answer is right and comes at once; N if there is none. (With fewer thoughts a model of the curriculum writes the
steps that it has not thought.) Nothing else is trained: a row that continues thinking answers as before.

    loss = -mean over rows of log P(the row stops after its number)

Shapes: B rows, N latents.
"""

from collections.abc import Mapping, Sequence

import torch
from accelerate.utils import gather_object

from mmcoconut.chat_template_mmcoconut import ANSWER_MARKER
from mmcoconut.data.scoring import score
from mmcoconut.evaluation.answering import Answerer
from mmcoconut.rl.stops import first_thoughts, stop_log_probs
from mmcoconut.training.collator import CurriculumCollator
from mmcoconut.training.generating import keeping
from mmcoconut.training.trainer import CurriculumTrainer


TARGET = "num_thoughts"


def fewest_right(right: Sequence[Sequence[bool]]) -> list[int]:
    """Return per row the first number of thoughts with a right answer, or the last; input: right[number][row].

    >>> fewest_right([[False, True, False], [True, True, False], [True, False, False]])
    [1, 0, 2]
    """
    last = len(right) - 1
    return [next((number for number, is_right in enumerate(row) if is_right), last) for row in zip(*right)]


def right_with(answerer: Answerer, rows: Sequence[Mapping], metric: str) -> list[bool]:
    """Return per row whether the answer is fully right and without a written step, with the answerer's thoughts."""
    answers = answerer.answer(rows)
    outputs, given = [answer["output"] for answer in answers], [answer["answer"] for answer in answers]
    scores = score(metric, outputs, given, rows=rows)["scores"]
    return [value == 1.0 and text.startswith(ANSWER_MARKER) for value, text in zip(scores, outputs)]


def stopping_points(trainer: "StopDistiller", rows, *, batch_size: int) -> list[int]:
    """Return the number of thoughts after which each row should stop; each process answers its share of the rows."""
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    collator = trainer.curriculum_collator
    num_latents = collator.curriculum.num_latents(collator.stage)
    options = {"max_new_tokens": collator.max_new_tokens, "num_beams": trainer.num_beams, "stop_threshold": None}
    answerers = [
        Answerer(model, trainer.processing_class, num_latents=number, **options) for number in range(num_latents + 1)
    ]
    with trainer.accelerator.split_between_processes(list(range(len(rows)))) as indices:
        points = []
        for start in range(0, len(indices), batch_size):
            batch = list(rows.select(indices[start : start + batch_size]))
            points += fewest_right([right_with(answerer, batch, trainer.metric) for answerer in answerers])
    return gather_object(points)


class StopCollator:
    """The prompts of the last stage, with the target `num_thoughts` (B,) per row.

    Args:
        collator: of the run.
    """

    def __init__(self, collator: CurriculumCollator):
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping]) -> dict:
        batch = self.collator.prompts(rows)
        del batch["supervised"], batch["index"]
        return {**batch, TARGET: torch.tensor([row[TARGET] for row in rows])}


class StopDistiller(CurriculumTrainer):
    """CurriculumTrainer that trains only the stop head of a model that already answers."""

    def __init__(self, *, model, **kwargs):
        model.requires_grad_(False)
        model.base_model.stop_head.requires_grad_(True)
        super().__init__(model=model, **kwargs)
        self.data_collator = StopCollator(self.curriculum_collator)

    def train(self, *args, **kwargs):
        """Answer the rows with every number of thoughts, then train."""
        self.curriculum_collator.fixed_stage = self.curriculum_collator.curriculum.last_stage
        size = self.args.per_device_eval_batch_size
        points = stopping_points(self, self.train_dataset, batch_size=size)
        self.train_dataset = self.train_dataset.add_column(TARGET, points)
        return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return -mean log P of stopping at the targets, in each turn after the same number of thoughts."""
        targets = inputs.pop(TARGET)  # (B,)
        ids = inputs[self.processing_class.prompt_names[0]]
        latent_mask = ids == self.curriculum_collator.processor.latent_token_id  # (B, P)
        model.eval()  # as for answering and stopping
        outputs = model(**inputs, output_stop_logits=True, **keeping(self.model, 1))
        loss = -stop_log_probs(outputs.stop_logits, first_thoughts(latent_mask, targets), latent_mask).mean()
        return (loss, outputs) if return_outputs else loss
