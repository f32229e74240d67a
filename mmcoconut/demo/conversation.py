"""Further questions about the same picture: the turns so far, and the thoughts of the last turn alone.

A model thinks before every answer. The page shows and replaces the thoughts of one turn: the last N of the N · turns
latents in the prompt. Earlier turns are given to the model as question and answer, as in an evaluation of
conversations (docs/conversations.md), and their thoughts are computed again.

Shapes: B rows of a batch, N thoughts per turn, D hidden.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mmcoconut.audit.interventions import ReplaceOf
from mmcoconut.audit.thoughts import Readings
from mmcoconut.data import history_of
from mmcoconut.errors import UsageError


@dataclass
class Turn:
    """A question, its answer, and the panel of its thoughts as HTML; empty until they are read."""

    question: str
    answer: str
    thoughts: str = ""


@dataclass
class Conversation:
    """A picture (the `images` of a row) and the turns about it, the last of which the page shows in full."""

    images: list[Mapping]
    turns: list[Turn] = field(default_factory=list)

    def row_after(self, row: Mapping) -> dict:
        """Return a row that asks its question after the turns, about their picture."""
        history = [{"question": turn.question, "answer": turn.answer} for turn in self.turns]
        return {**row, "images": self.images, "history": history}

    def with_turn(self, turn: Turn) -> "Conversation":
        """Return a conversation with one more turn; this one stays as it is."""
        return Conversation(self.images, [*self.turns, turn])


def holds_conversations(processor) -> bool:
    """Return True if a model can read earlier turns; an encoder-decoder reads one question."""
    return processor.decoder_start_token_id is None


def check_holds_conversations(row: Mapping, processor) -> None:
    """Check that a model can read the earlier turns of a row.

    Raises:
        UsageError: the row has earlier turns, and the model is an encoder-decoder.
    """
    if history_of(row) and not holds_conversations(processor):
        raise UsageError("An encoder-decoder reads one question and no further turn. Ask it as a new question.")


def first_turn(row: Mapping) -> dict:
    """Return the first question of a conversation with its answer as a row; a row of one turn as it is."""
    history = history_of(row)
    if not history:
        return dict(row)
    question, answer = history[0]
    return {**row, "question": question, "choices": [], "steps": [], "answers": [answer], "history": []}


def in_last_turn(replace_of: ReplaceOf, num_earlier: int) -> ReplaceOf:
    """Return the same replacement for the last turn's thoughts: `num_earlier` thoughts before them are kept."""

    def of_batch(indices: list[int]):
        replaced = replace_of(indices)
        return lambda j, thought: thought if j < num_earlier else replaced(j - num_earlier, thought)

    return of_batch


def last_turn(readings: Readings, num_latents: int) -> Readings:
    """Return the readings of the last N = `num_latents` thoughts, with the state that predicts the first token."""
    states = slice(-(num_latents + 1), None)
    attention = readings.image_attention
    return replace(
        readings,
        thoughts=readings.thoughts[:, -num_latents:],  # (n, N, D)
        tokens=readings.tokens[:, states],  # (n, N + 1, L + 1, k)
        probabilities=readings.probabilities[:, states],
        image_attention=None if attention is None else [row[:, -num_latents:] for row in attention],  # (L, N, P) each
    )
