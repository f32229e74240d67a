"""What a model is to write of a row, as ids: steps on their lines, `### answer`, eos, each tokenized apart.

    step 1 ⏎ step 2 ⏎ ### answer <eos>

Training learns it, and objectives take what a thought is to say from the same functions, so both have the same ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, takewhile

import torch

from mmcoconut.chat_template_mmcoconut import ANSWER_MARKER


IGNORED = -100
RECURRING_TEXTS = 1024  # few, as the ids of a prompt may hold thousands of an image's


@dataclass(frozen=True)
class RowPlan:
    """Say what is done to a row: how many of its first steps go, and how many latents come, in each turn."""

    skipped_steps: int
    num_latents: int


@lru_cache(maxsize=RECURRING_TEXTS)
def encode_step(processor, step: str) -> tuple:
    """Return the ids of a written step, on its line, once for steps that recur."""
    return tuple(processor.encode_text(f"{step}\n"))


@lru_cache(maxsize=RECURRING_TEXTS)
def encode_answer(processor, answer: str) -> tuple:
    """Return the ids of `### answer`, eos, once for answers that recur."""
    return (*processor.encode_text(f"{ANSWER_MARKER} {answer}"), processor.tokenizer.eos_token_id)


def encode_target(processor, steps: Sequence[str], answer: str) -> list[int]:
    """Return the ids of steps on their lines, `### answer`, eos."""
    return [*chain(*(encode_step(processor, step) for step in steps)), *encode_answer(processor, answer)]


def marker_length(processor, answer: str) -> int:
    """Return how many of encode_answer's ids are the marker's; 1 where a tokenizer joins it with the text."""
    marker, written = processor.encode_text(ANSWER_MARKER), encode_answer(processor, answer)
    return max(1, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(marker, written))))


def predicted(labels: torch.Tensor, processor) -> torch.Tensor:
    """Return what each column is to predict (B, T), of a batch's labels (B, T), which say so for encoder-decoders."""
    if processor.decoder_start_token_id is not None:
        return labels
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)


def answer_columns(rows: Sequence[Mapping], targets: torch.Tensor, processor) -> torch.Tensor:
    """Return the column (B,) of the token before each row's answer, the marker's last one.

    Args:
        targets: what each column is to predict (B, T), see `predicted`; a row's last one is its eos.
    """
    last = (targets != IGNORED).long().cumsum(dim=1).argmax(dim=1)  # (B,): which predicts the eos
    behind = []
    for row in rows:
        answer = row["answers"][0]
        behind.append(len(encode_answer(processor, answer)) - 1 - marker_length(processor, answer))
    return last - torch.tensor(behind, device=targets.device)
