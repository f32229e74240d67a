"""Log to trackers, besides losses and accuracy, figures of the thoughts and example answers with pictures.

With `report_to` trackio, tensorboard or wandb, each evaluation within training runs the first rows of the evaluation
data once. All processes compute, because a sharded model needs all of them; the first process sends.

Shapes: B rows, N thoughts per row, D hidden.
"""

from dataclasses import astuple, dataclass

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from mmcoconut.data import question_text
from mmcoconut.data.images import open_images
from mmcoconut.records import markdown_table


NUM_SAMPLES = 8
LONGEST_SIDE = 256  # pixels; longest side of a logged picture
TAG = "samples"
COLUMNS = ["picture", "question", "expected", "given"]


@dataclass
class Sample:
    """A row's first picture (or None), its question, its first accepted answer, and the model's answer."""

    picture: Image.Image | None
    question: str
    expected: str
    given: str


def thought_figures(thoughts: torch.Tensor) -> dict[str, float]:
    """Return the mean norm of thoughts (B, N, D), and the mean cosine of each to the next; undefined figures are
    left out.

    >>> thought_figures(torch.tensor([[[3.0, 4.0], [4.0, 3.0]]]))  # doctest: +ELLIPSIS
    {'eval_thought_norm': 5.0, 'eval_thought_cosine': 0.96...}
    """
    thoughts, figures = thoughts.float(), {}
    if thoughts.shape[1] > 0:
        figures["eval_thought_norm"] = thoughts.norm(dim=-1).mean().item()
    if thoughts.shape[1] > 1:
        cosines = torch.cosine_similarity(thoughts[:, :-1], thoughts[:, 1:], dim=-1)  # (B, N − 1)
        figures["eval_thought_cosine"] = cosines.mean().item()
    return figures


def small_picture(row: dict) -> Image.Image | None:
    """Return the row's first picture, resized to at most LONGEST_SIDE."""
    images = open_images(row)
    if not images:
        return None
    picture = images[0].copy()
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return picture


def in_a_cell(text: str) -> str:
    """Escape a text for one cell of a Markdown table.

    >>> in_a_cell("a|b\\nc")
    'a\\\\|b<br>c'
    """
    return text.replace("|", "\\|").replace("\n", "<br>")


def send_to_tensorboard(samples: list[Sample], step: int, callbacks: list) -> None:
    """Send each picture separately, and one table of the texts."""
    writer = next(callback.tb_writer for callback in callbacks if isinstance(callback, TensorBoardCallback))
    lines = []
    for number, sample in enumerate(samples):
        tag = f"{TAG}/{number}"
        if sample.picture is not None:
            writer.add_image(tag, np.asarray(sample.picture), step, dataformats="HWC")
        lines.append([tag, *map(in_a_cell, (sample.question, sample.expected, sample.given))])
    writer.add_text(TAG, markdown_table(COLUMNS, lines), step)
    writer.flush()


def send_to_trackio(samples: list[Sample], step: int, callbacks: list) -> None:
    """Send one table that includes the pictures."""
    import trackio

    rows = [astuple(sample) for sample in samples]
    data = [["" if picture is None else trackio.Image(picture), *texts] for picture, *texts in rows]
    trackio.log({TAG: trackio.Table(columns=COLUMNS, data=data), "train/global_step": step})


def send_to_wandb(samples: list[Sample], step: int, callbacks: list) -> None:
    """Send a table of the texts, and the pictures with captions: pictures in a table are not kept offline."""
    import wandb

    rows = [astuple(sample) for sample in samples]
    records = {TAG: wandb.Table(columns=COLUMNS[1:], data=[texts for _, *texts in rows])}
    pictures = [(picture, " | ".join(texts)) for picture, *texts in rows if picture is not None]
    if pictures:
        records[f"{TAG}/pictures"] = [wandb.Image(picture, caption=caption) for picture, caption in pictures]
    wandb.log({**records, "train/global_step": step})


SENDERS = {"tensorboard": send_to_tensorboard, "trackio": send_to_trackio, "wandb": send_to_wandb}


def is_tracked(args) -> bool:
    """Return True if a run reports to a tracker that this module supports."""
    return bool(SENDERS.keys() & {*args.report_to})


class TrackingCallback(TrainerCallback):
    """Log `eval_thought_norm` and `eval_thought_cosine`, and send samples, at each evaluation within training.

    Args:
        trainer: a CurriculumTrainer.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    @torch.no_grad()
    def look(self, rows: list[dict]) -> tuple[list[Sample], dict[str, float]]:
        """Return the model's answers to rows, and the figures of its thoughts."""
        trainer, collator = self.trainer, self.trainer.curriculum_collator
        processor, model = trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model).eval()
        batch = collator.prompts(rows)
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("index", "num_images", "supervised")}
        inputs = trainer._prepare_input(inputs)
        with trainer.compute_loss_context_manager():
            thoughts = model(**inputs, output_thoughts=True, logits_to_keep=1).thoughts  # (B, N, D)
            tokens = model.generate(**inputs, max_new_tokens=collator.max_new_tokens, do_sample=False)
        answers = processor.decode_answers(tokens, inputs)
        samples = [
            Sample(small_picture(row), question_text(row), row["answers"][0], answer)
            for row, answer in zip(rows, answers)
        ]
        return samples, thought_figures(thoughts)

    def on_evaluate(self, args, state, control, **kwargs):
        if not self.trainer.is_in_train:
            return
        rows = self.trainer.evaluated
        samples, figures = self.look(list(rows.select(range(min(NUM_SAMPLES, len(rows))))))
        if figures:
            self.trainer.log(figures)
        if state.is_world_process_zero:
            for name in SENDERS.keys() & {*args.report_to}:
                SENDERS[name](samples, state.global_step, self.trainer.callback_handler.callbacks)
