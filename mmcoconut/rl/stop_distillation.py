"""A stop head learns from the model itself: from the fewest thoughts after which it answers a row right.

Every training row is answered with 0, 1, … N thoughts, and the head is trained to stop after the first number with
which the answer is right and comes at once; at N where none is. (With fewer thoughts a model of the curriculum writes
the steps that it has not thought.) Nothing else is trained: a row that thinks on answers as it did before.

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
    """Of each row the first number of thoughts with a right answer, or the last; right[number][row].

    >>> fewest_right([[False, True, False], [True, True, False], [True, False, False]])
    [1, 0, 2]
    """
    last = len(right) - 1
    return [next((number for number, is_right in enumerate(row) if is_right), last) for row in zip(*right)]


def right_with(answerer: Answerer, rows: Sequence[Mapping], metric: str) -> list[bool]:
    """Whether each row is answered fully right and without a written step, with the answerer's number of thoughts."""
    answers = answerer.answer(rows)
    outputs, given = [answer["output"] for answer in answers], [answer["answer"] for answer in answers]
    scores = score(metric, outputs, given, rows=rows)["scores"]
    return [value == 1.0 and text.startswith(ANSWER_MARKER) for value, text in zip(scores, outputs)]


def stopping_points(trainer: "StopDistiller", rows, *, batch_size: int) -> list[int]:
    """The number of thoughts after which each row is to stop; every process answers its share of the rows."""
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
    """Prompts of the last stage, and `num_thoughts` (B,) after which each is to stop.

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
    """CurriculumTrainer that trains the stop head of a model which answers already, and nothing else of it."""

    def __init__(self, *, model, **kwargs):
        model.requires_grad_(False)
        model.base_model.stop_head.requires_grad_(True)
        super().__init__(model=model, **kwargs)
        self.data_collator = StopCollator(self.curriculum_collator)

    def train(self, *args, **kwargs):
        """As the library's, when the rows have been answered with every number of thoughts."""
        self.curriculum_collator.fixed_stage = self.curriculum_collator.curriculum.last_stage
        size = self.args.per_device_eval_batch_size
        points = stopping_points(self, self.train_dataset, batch_size=size)
        self.train_dataset = self.train_dataset.add_column(TARGET, points)
        return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """-mean log P of where rows are to stop, in each turn after as many thoughts."""
        targets = inputs.pop(TARGET)  # (B,)
        ids = inputs[self.processing_class.prompt_names[0]]
        latent_mask = ids == self.curriculum_collator.processor.latent_token_id  # (B, P)
        model.eval()  # as when it answered, and as when it will stop
        outputs = model(**inputs, output_stop_logits=True, **keeping(self.model, 1))
        loss = -stop_log_probs(outputs.stop_logits, first_thoughts(latent_mask, targets), latent_mask).mean()
        return (loss, outputs) if return_outputs else loss
