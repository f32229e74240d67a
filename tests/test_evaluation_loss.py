"""The loss of an evaluation belongs to the split: a mean over its labelled tokens, whatever the batches were."""

import pytest
import torch
from tiny import tiny_image, tiny_model, tiny_processor, tiny_seq2seq

from mmcoconut.arguments.fields import RunArguments
from mmcoconut.data import Example, to_dataset
from mmcoconut.data.arrow_mazes import png_bytes
from mmcoconut.objectives.alignment import Alignment
from mmcoconut.training.collator import IGNORED, CurriculumCollator
from mmcoconut.training.curriculum import Curriculum
from mmcoconut.training.trainer import CurriculumTrainer


NUM_ROWS = 7


def rows():
    """Rows with different numbers of pictures, words of the question, steps and words of the answer."""
    return to_dataset(
        Example(
            images=[{"bytes": png_bytes(tiny_image(seed)), "path": None} for seed in range(index % 3)],
            question="Where is it? " * (1 + index % 2),
            choices=[],
            steps=["red"] * (index % 4),
            answers=["blue " * (1 + 3 * (index % 3)) + "end"],
            row_id=f"row {index}",
        )
        for index in range(NUM_ROWS)
    )


def trainer_of(model, folder, *, alignment=None, batch_size=8):
    collator = CurriculumCollator(Curriculum(), tiny_processor(model), max_new_tokens=2, alignment=alignment)
    collator.fixed_stage = 1
    options = {"use_cpu": True, "disable_tqdm": True, "report_to": [], "per_device_eval_batch_size": batch_size}
    args = RunArguments(output_dir=str(folder), **options)
    return CurriculumTrainer(model=model, args=args, data_collator=collator, eval_dataset=rows())


@torch.no_grad()
def losses_of_single_rows(trainer) -> dict[str, float]:
    """By the definition: each row alone, its loss weighed by its labelled tokens, its alignment by its pictures."""
    collator, found = trainer.curriculum_collator, torch.zeros(4)
    for index, row in enumerate(rows()):
        batch = collator.prompts([{**row, "index": index}])
        pixels = {"pixel_values": batch["pixel_values"]} if row["images"] else {}
        outputs = trainer.model(**batch["supervised"], **pixels)
        num_tokens = (batch["supervised"]["labels"] != IGNORED).sum()
        found[:2] += torch.tensor([outputs.loss * num_tokens, num_tokens])
        if row["images"] and collator.alignment is not None:
            found[2:] += torch.tensor([outputs.alignment_loss * len(row["images"]), len(row["images"])])
    return {"ce_loss": found[0] / found[1], "align_loss": found[2] / found[3]}


@pytest.mark.parametrize("batch_size", [1, 2, 3, NUM_ROWS])
def test_loss_is_the_mean_over_labelled_tokens_whatever_the_batches(batch_size, tmp_path):
    trainer = trainer_of(tiny_model(), tmp_path, batch_size=batch_size)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(losses_of_single_rows(trainer)["ce_loss"].item(), abs=1e-5)
    assert "eval_ce_loss" not in metrics
    assert trainer.model(**trainer.curriculum_collator.prompts(  # the model's own loss is a number again
        [{**rows()[0], "index": 0}])["supervised"]).loss.shape == ()  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 2, 3, NUM_ROWS])
def test_both_terms_of_an_alignment_are_means_over_the_split(batch_size, tmp_path):
    alignment = Alignment(0.5, ce_weight=2.0, targets=("answer",))
    trainer = trainer_of(tiny_seq2seq(), tmp_path, alignment=alignment, batch_size=batch_size)
    metrics, expected = trainer.evaluate(), losses_of_single_rows(trainer)
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value.item(), abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(2 * metrics["eval_ce_loss"] + 0.5 * metrics["eval_align_loss"])
