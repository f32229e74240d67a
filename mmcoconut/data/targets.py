"""Target ids of a row: steps on separate lines, `### answer`, eos, each tokenized separately.

    step 1 ⏎ step 2 ⏎ ### answer <eos>

Training and objectives use the same functions, so a thought's target has the same ids as the written text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, takewhile

import torch

from mmcoconut.chat_template_mmcoconut import ANSWER_MARKER


IGNORED = -100
RECURRING_TEXTS = 1024  # few, because the ids of a prompt may include thousands for an image


@dataclass(frozen=True)
class RowPlan:
    """The plan of a row: number of first steps to remove, and number of latents per turn."""

    skipped_steps: int
    num_latents: int


@lru_cache(maxsize=RECURRING_TEXTS)
def encode_step(processor, step: str) -> tuple:
    """Return the ids of a written step with its line end, cached."""
    return tuple(processor.encode_text(f"{step}\n"))


@lru_cache(maxsize=RECURRING_TEXTS)
def encode_answer(processor, answer: str) -> tuple:
    """Return the ids of `### answer`, eos, cached."""
    return (*processor.encode_text(f"{ANSWER_MARKER} {answer}"), processor.tokenizer.eos_token_id)


def encode_target(processor, steps: Sequence[str], answer: str) -> list[int]:
    """Return the ids of steps on separate lines, `### answer`, eos."""
    return [*chain(*(encode_step(processor, step) for step in steps)), *encode_answer(processor, answer)]


def marker_length(processor, answer: str) -> int:
    """Return the number of the marker's ids in encode_answer's result; 1 if a tokenizer merges it with the text."""
    marker, written = processor.encode_text(ANSWER_MARKER), encode_answer(processor, answer)
    return max(1, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(marker, written))))


def predicted(labels: torch.Tensor, processor) -> torch.Tensor:
    """Return the target of each column (B, T) for labels (B, T), which are shifted already for encoder-decoders."""
    if processor.decoder_start_token_id is not None:
        return labels
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)


def answer_columns(rows: Sequence[Mapping], targets: torch.Tensor, processor) -> torch.Tensor:
    """Return the column (B,) of the token before each row's answer, the last one of the marker.

    Args:
        targets: the target of each column (B, T), see `predicted`; a row's last one is its eos.
    """
    last = (targets != IGNORED).long().cumsum(dim=1).argmax(dim=1)  # (B,): the column that predicts the eos
    behind = []
    for row in rows:
        answer = row["answers"][0]
        behind.append(len(encode_answer(processor, answer)) - 1 - marker_length(processor, answer))
    return last - torch.tensor(behind, device=targets.device)
