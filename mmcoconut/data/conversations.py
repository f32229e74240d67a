"""Conversations: cut rows that are longer than a model can read, and add turns to a cached conversation.

In a row that is too long, whole turns are cut from the end and counted. A row whose first or only turn is
too long is dropped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

import torch
from datasets import Dataset, Features, concatenate_datasets
from transformers import BatchFeature

from mmcoconut.chat_template_mmcoconut import SAMPLE, control_tokens_of, encode_marked, messages_of, quoted, render
from mmcoconut.data import FEATURES
from mmcoconut.errors import UsageError
from mmcoconut.progress import progress


LONG_ROWS = ("error", "cut")
TEXTS = [column for column in FEATURES if column not in ("images", "row_id")]


@dataclass
class Cut:
    """Counts of rows that were too long, of turns cut from them, and of rows dropped."""

    rows: int = 0
    turns: int = 0
    left_out: int = 0

    def asdict(self) -> dict[str, int]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.rows} rows too long: {self.turns} turns cut from their ends, {self.left_out} rows left out"


def without_last_turn(row: Mapping[str, Any]) -> dict:
    """Return a conversation without its last turn."""
    *history, last = row["history"]
    texts = {"question": last["question"], "answers": [last["answer"]], "choices": [], "steps": []}
    return {**row, **texts, "history": history}


def fit_rows(rows: Dataset, length_of: Callable[[Mapping[str, Any]], int], limit: int) -> tuple[Dataset, Cut]:
    """Return the rows of at most `limit` tokens by `length_of`; whole turns are cut from the ends of longer rows.

    Raises:
        ValueError: no row is left.
    """
    cut, kept, texts = Cut(), [], []
    for index, row in enumerate(progress(rows, desc="row lengths")):
        num_turns = 1 + len(row["history"])
        while (too_long := length_of(row) > limit) and row["history"]:
            row = without_last_turn(row)
        num_cut = num_turns - 1 - len(row["history"])
        cut.rows += num_cut > 0 or too_long
        cut.left_out += too_long
        cut.turns += 0 if too_long else num_cut
        if not too_long:
            kept.append(index)
            texts.append({column: row[column] for column in TEXTS})
    if not kept:
        raise UsageError(f"None of the {len(rows)} rows fits into {limit} tokens: raise max_length.")
    if not cut.rows:
        return rows, cut
    features = Features({column: FEATURES[column] for column in TEXTS})
    shortened = Dataset.from_dict({column: [text[column] for text in texts] for column in TEXTS}, features=features)
    return concatenate_datasets([rows.select(kept).remove_columns(TEXTS), shortened], axis=1), cut


def turn_behind_answer(processor, question: str, num_latents: int | None) -> list[int]:
    """Return the ids that a processor's template writes between an answer and the next question.

    Raises:
        ValueError: the template drops earlier answers.
    """
    tokens = control_tokens_of(processor.tokenizer, processor.chat_template)
    variables = {**processor.layout(num_latents), "add_generation_prompt": True}
    messages = messages_of(quoted(question, tokens), [("", SAMPLE)], 0)
    chat, _ = render(processor.tokenizer, processor.chat_template, messages, variables)
    _, found, behind = chat.rpartition(SAMPLE)
    if not found:
        raise UsageError("The chat template drops earlier answers. Set one that keeps them, or start again.")
    return encode_marked(processor.tokenizer, behind, follows=True)[0]


def further_turn(
    processor, sequences, attention_mask, text: Sequence[str], *, num_latents: int | None = None
) -> BatchFeature:
    """Make prompts of a further turn for `generate` with the `past_key_values` that it returned for the last turn.

        q q <lat> a a eos · · · · q q q <lat>        the mask hides tokens that a row generated after its end, and the
        q q <lat> a a a a a eos q q q q <lat>        padding before its new question

    Args:
        sequences (B, T): ids as `generate` returned them, their prompts included.
        attention_mask (B, prompt): mask of the prompts.
        text: the next question of each row; strings of special tokens in it stay plain text.
        num_latents: latents before the next answers; default: the processor's.

    Returns:
        input_ids, attention_mask (B, T + new).

    Raises:
        ValueError: sequences, masks and texts differ in number; the model is an encoder-decoder.
    """
    if processor.decoder_start_token_id is not None:
        raise UsageError("An encoder-decoder reads one question and no further turn. Ask it as a new question.")
    if not len(sequences) == len(attention_mask) == len(text):
        raise UsageError(
            f"{len(sequences)} sequences, {len(attention_mask)} masks and {len(text)} texts: give one text per row, "
            "and one generated sequence (num_beams and num_return_sequences of 1)."
        )
    eos, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    masks, turns = [], []
    for written, question in zip(sequences[:, attention_mask.shape[1] :].tolist(), text):
        turn = turn_behind_answer(processor, question, num_latents)
        is_ended, writes_end = eos in written, turn[0] == eos
        padding = len([*takewhile(pad.__eq__, reversed(written))])  # after an end token other than eos
        seen = written.index(eos) + writes_end if is_ended else len(written) - padding
        masks.append([1] * seen + [0] * (len(written) - seen))
        turns.append(turn[1:] if is_ended and writes_end else turn)
    asked = processor.tokenizer.pad({"input_ids": turns}, padding_side="left", return_tensors="pt")
    asked = asked.to(sequences.device)
    seen = torch.tensor(masks, dtype=attention_mask.dtype, device=sequences.device)  # (B, T - prompt)
    return BatchFeature(
        {
            "input_ids": torch.cat([sequences, asked["input_ids"]], dim=1),  # (B, T + new)
            "attention_mask": torch.cat([attention_mask, seen, asked["attention_mask"]], dim=1),
        }
    )
