"""Ask a checkpoint one question: show its answer, its decoded thoughts, and its answers with other thoughts.

The audit (mmcoconut/audit) does the same for many rows with statistics; one question illustrates, and proves nothing.

Shapes: B rows of a batch, n examples, N thoughts per row, D hidden.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from mmcoconut.audit.command import decoded
from mmcoconut.audit.image_grids import maps_of
from mmcoconut.audit.interventions import (
    ReplaceOf,
    Table,
    check_single_turns,
    emptied,
    given,
    images_key,
    intervening,
    keep,
    one_taken_out,
    read_last,
    recording,
    with_images_of,
    with_other_counts,
    with_question_of,
)
from mmcoconut.audit.necessity import ONLY_THOUGHTS, refusal, seeing
from mmcoconut.audit.step_reader import StepReader
from mmcoconut.audit.thoughts import read_thoughts, visible
from mmcoconut.data import history_of, json_steps, question_text
from mmcoconut.data.images import open_images
from mmcoconut.demo.conversation import check_holds_conversations, first_turn, in_last_turn, last_turn
from mmcoconut.errors import UsageError
from mmcoconut.evaluation.answering import Answerer


EXAMPLES_FILE = "examples.json"
ROW_ID = "your question"
KEPT_NUMBERS = 8  # of thoughts; the examples' thoughts are cached for the last ones


def said(answer: str, output: str) -> str:
    """Return the answer, or the whole output if no answer was marked."""
    return answer or output.strip()


@dataclass
class Asked:
    """A row and its answer, generated in `seconds`. gold: the answers in the data; none for a user's question."""

    row: Mapping
    answerer: Answerer
    answer: str
    output: str
    generated_tokens: int
    num_thoughts: int
    decoder_passes: int
    seconds: float
    gold: list[str]

    @property
    def num_latents(self) -> int:
        return self.answerer.num_latents

    @property
    def said(self) -> str:
        return said(self.answer, self.output)


@dataclass
class Thought:
    """Tokens that a state decodes to, (token, probability), most likely first, and where its thought attends.

    image_share: fraction of attention on the picture; None without one. heat_map: None for the reason in
    `Look.no_map`.
    """

    tokens: list[tuple[str, float]]
    image_share: float | None = None
    heat_map: Image.Image | None = None


@dataclass
class Look:
    """The N thoughts of a question, and the state after them, which predicts the first token; the reason for no map.

    In a conversation, the thoughts before the last answer. steps: text that the run's step decoder reads in the
    thoughts; None without one.
    """

    thoughts: list[Thought]
    writes: Thought
    no_map: str | None
    steps: list[str] | None = None


@dataclass
class Variant:
    """An answer with other thoughts. donor_answer: the answer to the question that the thoughts are taken from."""

    name: str
    description: str
    answer: str
    output: str
    generated_tokens: int
    changed: bool
    donor_answer: str | None = None


@dataclass
class Variants:
    """The answers with all thoughts or one replaced, and with other numbers of thoughts; and what was not run."""

    replaced: list[Variant] = field(default_factory=list)
    one_replaced: list[Variant] = field(default_factory=list)
    counted: list[Variant] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)


@dataclass
class Donor:
    """A row whose N thoughts (1, N, D) and answer belong to another question."""

    name: str
    description: str
    answer: str
    thoughts: torch.Tensor


def with_bytes(file: str) -> dict:
    """Return the `images` item of a file: its bytes, not decoded, and its path."""
    return {"bytes": Path(file).read_bytes(), "path": file}


def row_of(question: str, picture: str | None, more: Sequence[str] = ()) -> dict:
    """Return a row of `mmcoconut.data` for a question, a picture's file or None, and files of more pictures.

    The files are not decoded.

    Raises:
        UsageError: no question.
    """
    if not question or not question.strip():
        raise UsageError("The question is empty. Write one, or choose an example.")
    images = [with_bytes(file) for file in (picture, *more) if file is not None]
    return {"images": images, "question": question, "choices": [], "steps": [], "answers": [], "row_id": ROW_ID}


def write_examples(folder: Path, rows: Sequence[Mapping]) -> None:
    """Write rows of at most one picture as `examples.json` and PNG pictures, for `read_examples`; skip other rows.

    Questions include their choices, as the model reads them. Of a conversation only the first turn is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in (first_turn(row) for row in rows if len(row["images"]) <= 1):
        line = {"question": question_text(row), "steps": row["steps"], "answers": row["answers"]}
        line["name"] = row["row_id"]
        for picture in open_images(row):
            line["image"] = f"{len(lines)}.png"
            picture.save(folder / line["image"])
        lines.append(line)
    (folder / EXAMPLES_FILE).write_text(json.dumps(lines, indent=2, ensure_ascii=False), encoding="utf-8")


def read_examples(folder: Path) -> list[dict]:
    """Return the rows written by `write_examples`, with their pictures' bytes, which identify a picture.

    Their `row_id` is that of the data. Folders written before 0.2 do not have it, and keep the file's.
    """
    with_pictures = any(Path(folder).glob("*.png"))
    options = {"image_root": str(folder)} if with_pictures else {"images_required": False}
    file = Path(folder, EXAMPLES_FILE)
    rows = json_steps.load(split="test", file={"test": file}, **options)
    names = [line.get("name") for line in json_steps.read_rows(file)]
    return [
        {**row, "images": [with_bytes(image["path"]) for image in row["images"]], "row_id": name or row["row_id"]}
        for row, name in zip(rows, names, strict=True)
    ]


def think(answerer: Answerer, rows: Sequence[Mapping]) -> tuple[list[dict], torch.Tensor]:
    """Return the answers to rows, in one batch, and the thoughts (B, N, D) of their last turns."""
    seen = []
    with intervening(answerer.model, recording(keep, seen)):
        lines = answerer.answer(rows)
    return lines, read_last(seen, answerer.num_latents)


def answer_with(answerer: Answerer, row: Mapping, replace_of: ReplaceOf) -> dict:
    """Return the answer to one row, the first of those in the replacement; earlier turns keep their thoughts."""
    num_earlier = answerer.num_latents * len(history_of(row))
    with intervening(answerer.model, in_last_turn(replace_of, num_earlier)([0])):
        return answerer.answer([row])[0]


def variant_of(asked: Asked, name: str, description: str, line: Mapping, donor_answer: str | None = None) -> Variant:
    changed = said(line["answer"], line["output"]) != asked.said
    return Variant(
        name, description, line["answer"], line["output"], line["generated_tokens"], changed, donor_answer=donor_answer
    )


class Asker:
    """Ask a checkpoint one question at a time, also with the thoughts of example rows.

    Args:
        model, processor: as from `load_checkpoint`, or from `AutoModel` and `AutoProcessor`.
        examples: rows of `mmcoconut.data`; without them there are no thoughts of other rows and no mean.
        max_new_tokens, num_beams: generation options of every answer.
        seed: seed of the noise.
        reader: the step decoder of the checkpoint's run.
    """

    def __init__(
        self,
        model,
        processor,
        examples: Sequence[Mapping] = (),
        *,
        max_new_tokens: int = 64,
        num_beams: int = 1,
        seed: int = 0,
        reader: StepReader | None = None,
    ):
        check_single_turns(examples)
        self.model, self.processor, self.examples = model.eval(), processor, list(examples)
        self.max_new_tokens, self.num_beams, self.seed = max_new_tokens, num_beams, seed
        self.thoughts_of_examples, self.reader = {}, reader

    def ask(self, row: Mapping, num_latents: int, *, max_new_tokens: int | None = None) -> Asked:
        """Answer a row with num_latents unmodified thoughts before each of its answers.

        max_new_tokens: of this answer; default: the Asker's.

        Raises:
            UsageError: the row has earlier turns, and the model is an encoder-decoder.
        """
        check_holds_conversations(row, self.processor)
        answerer = Answerer(
            self.model,
            self.processor,
            num_latents=num_latents,
            max_new_tokens=max_new_tokens or self.max_new_tokens,
            num_beams=self.num_beams,
            stop_threshold=None,
        )
        start = time.perf_counter()
        line = answerer.answer([row])[0]
        return Asked(row, answerer, seconds=time.perf_counter() - start, gold=self.gold_of(row), **line)

    def gold_of(self, row: Mapping) -> list[str]:
        """Return the gold answers, if the row asks an example's question about its picture, and asks it first."""
        if history_of(row):
            return []
        asked = (images_key(row), question_text(row))
        same = [example for example in self.examples if (images_key(example), question_text(example)) == asked]
        return same[0]["answers"] if same else []

    def look(self, asked: Asked, *, top_k: int = 5) -> Look:
        """Return what the thoughts before the answer to a row decode to and where they attend.

        Raises:
            UsageError: a row without thoughts.
        """
        if asked.num_latents == 0:
            raise UsageError("The answer has no thoughts to show. Set their number to 1 or more.")
        inputs = asked.answerer.inputs([asked.row])
        readings = last_turn(read_thoughts(self.model, inputs, top_k=top_k), asked.num_latents)
        *lens, last = [state[-1] for state in decoded(readings, self.processor.tokenizer, 0)]
        maps, reason = maps_of(self.model, self.processor, asked.row, inputs, readings)
        shares = readings.image_share(0).tolist() if asked.row["images"] else [None] * len(lens)
        thoughts = [
            Thought([(visible(text), p) for text, p in tokens], share, None if maps is None else maps[j])
            for j, (tokens, share) in enumerate(zip(lens, shares))
        ]
        writes = Thought([(visible(text), p) for text, p in last])
        look = Look(thoughts, writes, reason)
        if self.reader is not None:
            look.steps = self.reader.read(readings.thoughts[0], self.processor.tokenizer)
        return look

    def of_examples(self, answerer: Answerer) -> tuple[list[dict], torch.Tensor]:
        """Return answers and thoughts (n, N, D) of the examples, cached by number of thoughts and of tokens."""
        key = answerer.num_latents, answerer.max_new_tokens
        if key not in self.thoughts_of_examples:
            while len(self.thoughts_of_examples) >= KEPT_NUMBERS:
                del self.thoughts_of_examples[next(iter(self.thoughts_of_examples))]
            self.thoughts_of_examples[key] = think(answerer, self.examples)
        return self.thoughts_of_examples[key]

    def donors(self, asked: Asked) -> Iterator[Donor | str]:
        """Yield rows with other answers, to test if the answer changes with the thoughts; or why there is none."""
        row, images = asked.row, images_key(asked.row)
        pictures = [e for e in self.examples if len(images_key(e)) == len(images) > 0 and images_key(e) != images]
        questions = [e for e in self.examples if images and question_text(e) != question_text(row)]
        for name, description, rows in (
            ("shuffled", "of an example with another answer", self.examples),
            ("other_image", "on this question about another picture", [with_images_of(row, e) for e in pictures]),
            (
                "other_question",
                "on another question about this picture",
                [with_question_of(row, e) for e in questions],
            ),
        ):
            yield self.first_that_differs(asked, rows, name=name, description=f"the thoughts {description}")

    def first_that_differs(self, asked: Asked, rows: Sequence[Mapping], *, name: str, description: str) -> Donor | str:
        """Return the first row with another answer, or the reason why there is none."""
        if not rows:
            return f"{description}: there is no example to take them from"
        try:
            lines, thoughts = (
                self.of_examples(asked.answerer) if rows is self.examples else think(asked.answerer, rows)
            )
        except UsageError as error:  # a longer question may not fit after the earlier turns
            return f"{description}: {str(error).rstrip('.')}"
        for index, line in enumerate(lines):
            answer = said(line["answer"], line["output"])
            if answer != asked.said:
                return Donor(name, description, answer, thoughts[index : index + 1])
        return f"{description}: all of them are answered like this question"

    def tables(self, asked: Asked) -> tuple[Table, Table]:
        """Return replacements of all thoughts, by thoughts of no row, and of one, by means over examples and row."""
        _, own = think(asked.answerer, [asked.row])
        if not self.examples:
            return [entry for entry in emptied(own, self.seed) if entry[0] != "mean"], []
        thoughts = torch.cat([own, self.of_examples(asked.answerer)[1]])  # (1 + n, N, D)
        return emptied(thoughts, self.seed), one_taken_out(thoughts)

    def intervene(self, asked: Asked) -> Variants:
        """Answer the question with replaced thoughts, with an answer that sees only the thoughts, and with other
        numbers of thoughts.

        Raises:
            UsageError: a row without thoughts; a checkpoint that feeds no hidden state back.
        """
        if asked.num_latents == 0:
            raise UsageError("The answer has no thoughts to replace. Set their number to 1 or more.")
        variants, answerer = Variants(), asked.answerer
        for donor in self.donors(asked):
            if isinstance(donor, str):
                variants.not_run.append(donor)
                continue
            line = answer_with(answerer, asked.row, given(donor.thoughts))
            variants.replaced.append(variant_of(asked, donor.name, donor.description, line, donor.answer))
        for variants_of_table, table in zip((variants.replaced, variants.one_replaced), self.tables(asked)):
            for name, description, replace_of in table:
                line = answer_with(answerer, asked.row, replace_of)
                variants_of_table.append(variant_of(asked, name, description, line))
        try:
            with seeing(self.model, "thoughts"):
                variants.replaced.append(variant_of(asked, *ONLY_THOUGHTS, answerer.answer([asked.row])[0]))
        except ValueError as error:
            variants.not_run.append(refusal(ONLY_THOUGHTS[1], error))
        for name, description, other in with_other_counts(answerer, [asked.row]):
            variants.counted.append(variant_of(asked, name, description, other.answer([asked.row])[0]))
        return variants
