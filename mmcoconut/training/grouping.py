"""Group batches by cost at the current stage: number of latents, then number of tokens.

    train_sampling_strategy: group_by_length

A batch costs a decoder pass per column with a latent, and every row is padded to all of its columns, so rows with
few of either pay for the others. transformers' sampler of this name uses one length per row for the whole run; here
the lengths change with the stage. The order of an epoch depends on seed and epoch only, so a run resumes exactly
and all processes draw the same order.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from datasets import Dataset
from transformers.trainer_pt_utils import LengthGroupedSampler

from mmcoconut.chat_template_mmcoconut import ANSWER_MARKER
from mmcoconut.data import history_of, image_counts, question_text
from mmcoconut.training.collator import CurriculumCollator, usual_image_length
from mmcoconut.training.curriculum import RowPlan


TEXT_COLUMNS = ["question", "choices", "steps", "answers", "history"]


class RowLengths(NamedTuple):
    """Tokens of a row: images and question with earlier turns, each step, and the answer; without the tokens that
    a template adds to all rows. num_turns: number of answers, each with latents before it."""

    prompt: int
    steps: tuple[int, ...]
    answer: int
    num_turns: int

    def latents(self, plan: RowPlan) -> int:
        return plan.num_latents * self.num_turns

    def under(self, plan: RowPlan) -> int:
        """Return the tokens under a plan, latents included."""
        return self.prompt + self.latents(plan) + sum(self.steps[plan.skipped_steps :]) + self.answer


def token_counts(tokenizer, texts: Sequence[str], *, add_special_tokens: bool = False) -> dict[str, int]:
    """Return the number of tokens of each distinct text."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    encoded = tokenizer(distinct, add_special_tokens=add_special_tokens, split_special_tokens=True)
    return {text: len(ids) for text, ids in zip(distinct, encoded["input_ids"], strict=True)}


def prompt_texts(row) -> list[str]:
    """Return the texts before a row's last answer: the earlier questions and answers, and its own question."""
    earlier = ((question, f"{ANSWER_MARKER} {answer}") for question, answer in history_of(row))
    return [*chain(*earlier), question_text(row)]


def row_lengths(rows: Dataset, processor) -> list[RowLengths]:
    """Return the lengths of rows of mmcoconut.data; each picture counts as `usual_image_length`."""
    image_length = usual_image_length(processor) if any(image_counts(rows)) else 0
    texts = [
        (prompt_texts(row), [f"{step}\n" for step in row["steps"]], f"{ANSWER_MARKER} {row['answers'][0]}")
        for row in rows.select_columns(TEXT_COLUMNS)
    ]
    counts = token_counts(processor.tokenizer, [text for row in texts for text in (*row[0], *row[1], row[2])])
    return [
        RowLengths(
            prompt=sum(counts[text] for text in prompt) + num_images * image_length,
            steps=tuple(counts[step] for step in steps),
            answer=counts[answer],
            num_turns=(len(prompt) + 1) // 2,
        )
        for (prompt, steps, answer), num_images in zip(texts, image_counts(rows), strict=True)
    ]


class StageGroupedSampler(LengthGroupedSampler):
    """Group rows as transformers does, by number of latents and then of tokens, at the stage of the collator's epoch.

    Args:
        batch_size: rows per update, over all processes and accumulated batches.
        rows: with their number in `index`.
        collator: the trainer's; its epoch is read at the start of each epoch.
        seed: seed of the order, together with the epoch.
    """

    def __init__(self, batch_size: int, rows: Dataset, collator: CurriculumCollator, *, seed: int):
        self.collator, self.seed = collator, seed
        self.index, self.of_rows = list(rows["index"]), row_lengths(rows, collator.processor)
        super().__init__(batch_size, lengths=[0] * len(rows))

    def costs(self) -> list[int]:
        """Return a number for each row that orders them by latents, and by tokens where these are equal."""
        plans = [
            self.collator.training_plan({"steps": row.steps, "index": index})
            for row, index in zip(self.of_rows, self.index, strict=True)
        ]
        tokens = [row.under(plan) for row, plan in zip(self.of_rows, plans, strict=True)]
        above = max(tokens) + 1
        rows = zip(self.of_rows, plans, tokens, strict=True)
        return [row.latents(plan) * above + count for row, plan, count in rows]

    def __iter__(self):
        self.lengths = self.costs()
        self.generator = torch.Generator().manual_seed(self.seed + self.collator.epoch)
        return super().__iter__()
