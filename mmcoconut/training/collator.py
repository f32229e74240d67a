"""Collate rows of `mmcoconut.data` into the batches of a stage."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, takewhile

import torch
from PIL import Image

from mmcoconut.arguments.choices import STAGED_MODES, THINKING_MODES
from mmcoconut.chat_template_mmcoconut import messages_of
from mmcoconut.data import history_of, open_images, question_text
from mmcoconut.data.image_features import ImageFeatures
from mmcoconut.data.targets import (
    IGNORED,
    RECURRING_TEXTS,
    answer_columns,
    encode_answer,
    encode_step,
    encode_target,
    predicted,
)
from mmcoconut.errors import UsageError
from mmcoconut.objectives.alignment import Alignment
from mmcoconut.objectives.attach import INPUTS
from mmcoconut.objectives.base import Objective, RowsOfBatch
from mmcoconut.training.curriculum import Curriculum, RowPlan


# Token ids of a prompt, and of the text to write after it.
Turn = tuple[Sequence[int], Sequence[int]]
DECODER_INPUTS = ("decoder_input_ids", "decoder_attention_mask")
USUAL_SIZE = (448, 448)  # in pixels; for images of unknown size


def pad_rows(rows: Sequence[Sequence[int]], value: int, *, left: Sequence[int], length: int) -> torch.Tensor:
    """Pad rows of ids to (B, length): `left[b]` columns before row b, the rest after it."""
    padded = [[value] * pad + list(row) + [value] * (length - pad - len(row)) for row, pad in zip(rows, left)]
    return torch.tensor(padded)


def align_rows(rows: Sequence[Sequence[Turn]], *, pad_id: int, latent_id: int):
    """Batch rows of turns so that the first latents share a column; label only the text to write in each turn.

        pad pad <img> q q <start> <lat> <lat> <end> ### a eos
        <img> q q q q <start> <lat> <lat> <end> s ⏎ ### a eos     (rows are shifted right, then padded on the right)

    Each column with a latent costs a decoder pass, so sharing columns minimizes the passes. Rows without latents are
    not shifted. Return input_ids, attention_mask, labels, each (B, T).
    """
    labels = [[*chain(*([*[IGNORED] * len(prompt), *target] for prompt, target in turns))] for turns in rows]
    rows = [[*chain(*chain(*turns))] for turns in rows]
    first = [row.index(latent_id) if latent_id in row else 0 for row in rows]
    left = [max(first) - column if column else 0 for column in first]
    length = max(pad + len(row) for pad, row in zip(left, rows))
    return {
        "input_ids": pad_rows(rows, pad_id, left=left, length=length),
        "attention_mask": pad_rows([[1] * len(row) for row in rows], 0, left=left, length=length),
        "labels": pad_rows(labels, IGNORED, left=left, length=length),
    }


def first_place(part: Sequence[int], whole: Sequence[int], *, start: int) -> int:
    """Return the first index from `start` at which `part` occurs in `whole`; -1 if there is none.

    >>> first_place([1, 2], [1, 2, 0, 1, 2], start=1), first_place([2, 1], [1, 2], start=0)
    (3, -1)
    """
    starts = range(start, len(whole) - len(part) + 1)
    return next((place for place in starts if whole[place : place + len(part)] == part), -1)


@lru_cache(maxsize=RECURRING_TEXTS)
def encode_size(processor, size: tuple[int, int]):
    """Return the tiles or ids of a picture of this (width, height), as `encode_images` gives them; cached."""
    return processor.encode_images([[Image.new("RGB", size)]], return_tensors="pt")[1][0][0]


def usual_image_length(processor) -> int:
    """Return the tokens of a picture of unknown size: those of one tile, or of a picture of USUAL_SIZE."""
    return len(processor.image_ids(1 if processor.most_tiles else encode_size(processor, USUAL_SIZE)))


@lru_cache(maxsize=RECURRING_TEXTS)
def encode_turns(
    processor, question: str, history: tuple, markers: str, *, num_tiles: tuple, num_latents: int
) -> tuple:
    """Return (prompt, target) of each earlier turn, and the last prompt, as tuples of ids.

    A target is the answer, with the end token if the chat template writes one. markers: the processor's.

    Raises:
        ValueError: the chat template writes an answer differently from `encode_answer`.
    """
    messages = messages_of(question, history, len(num_tiles))
    layout = {**processor.layout(num_latents), "add_generation_prompt": True}
    whole, _ = processor.encode_chat(messages, num_tiles, layout)
    turns, start = [], 0
    for number, (_, answer) in enumerate(history, start=1):
        asked, _ = processor.encode_chat(messages[: 2 * number - 1], num_tiles, layout)
        *written, eos = encode_answer(processor, answer)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, asked)))
        first = first_place(written, whole, start=max(start, same))
        if first < 0:
            raise UsageError(
                f"The chat template does not write the answer of turn {number}, {answer!r}, as the model does: "
                "set a chat_template that keeps earlier answers and adds no space before them."
            )
        end = first + len(written)
        end += whole[end : end + 1] == [eos]
        turns.append((tuple(whole[start:first]), tuple(whole[first:end])))
        start = end
    return tuple(turns), tuple(whole[start:])


class CurriculumCollator:
    """Collate rows of `mmcoconut.data` into batches of the current stage.

    Calling it returns training batches; `prompts` returns evaluation batches, which end where generation begins.
    `CurriculumCallback` sets `epoch`; the workers of a data loader read it when they start.

    Args:
        curriculum, processor: define the schedule and the layout.
        max_length: maximum positions of the language model; longer rows are refused.
        max_new_tokens: maximum tokens that evaluation generates after a prompt.
        alignment: text targets for image–text alignment, if any.
        num_epochs: epochs of the run, if known; stages that it does not reach are not checked.
        objectives: losses on thoughts; the batches hold their inputs under `objective_inputs`.

    With `image_features` batches hold features instead of pixels. num_tiles is what the processor returns per image:
    the number of its tiles, or its placeholder ids.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        processor,
        *,
        max_length: int | None = None,
        max_new_tokens: int = 0,
        alignment: Alignment | None = None,
        num_epochs: int | None = None,
        objectives: Sequence[Objective] = (),
    ):
        self.curriculum, self.processor = curriculum, processor
        self.max_length, self.max_new_tokens = max_length, max_new_tokens
        self.alignment, self.num_epochs, self.objectives = alignment, num_epochs, objectives
        self.epoch = 0
        self.fixed_stage: int | None = None
        self.image_features: ImageFeatures | None = None

    @property
    def stage(self) -> int:
        """The stage of the current epoch, or the fixed stage when a trained checkpoint is evaluated."""
        return self.curriculum.stage_at(self.epoch) if self.fixed_stage is None else self.fixed_stage

    def weights(self, stage: int | None = None) -> dict[str, float]:
        """Return the weights of the objectives that are active at a stage (default: the current one), by name."""
        stage = self.stage if stage is None else stage
        weights = {objective.name: objective.weight_at(stage) for objective in self.objectives}
        return {name: weight for name, weight in weights.items() if weight > 0}

    def check_length(self, row: dict, length: int, what: str) -> None:
        if self.max_length is not None and length > self.max_length:
            raise UsageError(
                f"{row['row_id']}: {what} takes {length} tokens, images and latents included. The maximum of the "
                f"language model, or max_length, is {self.max_length}. Shorten the question or the steps, use "
                "fewer latents or image tokens, lower max_new_tokens, raise max_length, use a language model "
                "with more positions, or set `long_rows: cut`."
            )

    def check_turns(self, row: dict) -> None:
        """Check that this run can lay out the turns of a row.

        Raises:
            ValueError: a conversation with thoughts by stage or for an encoder-decoder; a row with steps without
                stages.
        """
        num_turns, per_turn = 1 + len(history_of(row)), self.curriculum.thoughts_per_turn
        if num_turns > 1 and self.processor.decoder_start_token_id is not None:
            remedy = "An encoder-decoder reads one question. Set dataset_options.max_turns to 1"
        elif num_turns > 1 and self.curriculum.mode in THINKING_MODES and not per_turn:
            remedy = f"Mode {self.curriculum.mode} needs stages, and a conversation has none. Set thoughts_per_turn"
        elif row["steps"] and per_turn:
            remedy = f"With thoughts_per_turn={per_turn} no stage replaces its {len(row['steps'])} steps. Set it to 0"
        else:
            return
        raise UsageError(f"{row['row_id']}: the row has {num_turns} turn(s). {remedy}.")

    def training_plan(self, row: dict) -> RowPlan:
        num_steps = len(row["steps"])
        stage = self.curriculum.training_stage(self.stage, num_steps=num_steps, epoch=self.epoch, index=row["index"])
        return self.curriculum.plan(stage, num_steps)

    def evaluation_plan(self, row: dict) -> RowPlan:
        """Return the plan of the stage, with the number of latents of an evaluation prompt."""
        skipped = self.curriculum.plan(self.stage, len(row["steps"])).skipped_steps
        return RowPlan(skipped, self.curriculum.num_latents(self.stage))

    def encode_turns(self, row: dict, num_tiles: Sequence[int], num_latents: int) -> tuple[list[Turn], list[int]]:
        """Return the earlier turns and the last prompt of a row; num_tiles: one entry per image of the row."""
        self.check_turns(row)
        layout = {"num_tiles": tuple(num_tiles), "num_latents": num_latents}
        asked, markers = (question_text(row), history_of(row)), self.processor.markers
        turns, prompt = encode_turns(self.processor, *asked, markers, **layout)
        return [*turns], [*prompt]

    def encode_prompt(self, row: dict, num_tiles: Sequence[int], num_latents: int) -> list[int]:
        """Return all tokens before a row's last answer."""
        turns, prompt = self.encode_turns(row, num_tiles, num_latents)
        return [*chain(*chain(*turns)), *prompt]

    def encode_row(self, row: dict, plan: RowPlan, num_tiles: Sequence[int]) -> list[Turn]:
        """Return the turns of a row under a plan; the last turn has the remaining steps."""
        turns, prompt = self.encode_turns(row, num_tiles, plan.num_latents)
        target = encode_target(self.processor, row["steps"][plan.skipped_steps :], row["answers"][0])
        return [*turns, (prompt, target)]

    def length_of(self, turns: Sequence[Turn]) -> int:
        """Return the tokens of a row; for an encoder-decoder those of the longer side."""
        *before, (prompt, target) = turns
        return self.longest_part([*chain(*chain(*before)), *prompt], len(target))

    @property
    def stages(self) -> range:
        """Return the stages of rows: the fixed one, or all from the run's first epoch to its last."""
        curriculum = self.curriculum
        if self.fixed_stage is not None:
            return range(self.fixed_stage, self.fixed_stage + 1)
        if curriculum.uniform_prob and curriculum.mode in STAGED_MODES:
            return range(curriculum.last_stage + 1)
        last = curriculum.last_stage if self.num_epochs is None else curriculum.stage_at(max(0, self.num_epochs - 1))
        return range(curriculum.stage_at(0), last + 1)

    def longest_form(self, row: dict, num_tiles: Sequence[int], *, room: int = 0) -> tuple[int, str]:
        """Return the maximum number of tokens of a row at any of `stages`, and a description of that form.

        Each text is tokenized once, not once per stage: a latent is one token, and a row whose latents change with the
        stage has no earlier turns.

        Args:
            num_tiles: one entry per image of the row.
            room: maximum new tokens after its prompt. A row with room is evaluated too, so its own number of
                steps never caps the latents.
        """
        curriculum, (steps, answer) = self.curriculum, self.target_lengths(row)
        plans = {stage: curriculum.plan(stage, len(steps)) for stage in self.stages}
        latents = {stage: curriculum.num_latents(stage) if room else plan.num_latents for stage, plan in plans.items()}
        others = [
            (f"{form} for objectives.{objective.name}", other)
            for stage, plan in plans.items()
            for form, objective in ((f"the sequence of stage {stage}", each) for each in self.objectives)
            if objective.name in self.weights(stage)
            for other in objective.plans(RowPlan(plan.skipped_steps, latents[stage]), len(steps))
        ]
        most = max([*latents.values(), *(other.num_latents for _, other in others)])
        turns, prompt = self.encode_turns(row, num_tiles, most)
        encoder, decoder = self.processor.split_prompt([*chain(*chain(*turns)), *prompt])
        forms = [(len(encoder), "the question")]
        for stage, plan in plans.items():
            begun = len(decoder) - most + latents[stage]
            forms.append((begun + sum(steps[plan.skipped_steps :]) + answer, f"the sequence of stage {stage}"))
            forms.append((begun + room, f"the prompt of stage {stage} with {room} new tokens (max_new_tokens)"))
        for form, other in others:
            begun = len(decoder) - most + other.num_latents
            forms.append((begun + sum(steps[other.skipped_steps :]) + answer, form))
        return max(forms, key=lambda form: form[0])

    def target_lengths(self, row: dict) -> tuple[list[int], int]:
        """Return the tokens of each written step, and of the answer."""
        steps = [len(encode_step(self.processor, step)) for step in row["steps"]]
        return steps, len(encode_answer(self.processor, row["answers"][0]))

    def measure(self, row: dict, num_images: int, whole_row, *, room: int = 0) -> tuple[int, str]:
        """Return `longest_form` of a row with num_images images; `whole_row()` returns the row with its images.

        A row is read to count its tiles only if the maximum number of tiles would make it too long. It is always read
        if the tokens of an image depend on its size.
        """
        most = self.processor.most_tiles
        if num_images and most is None:
            sizes = [image.size for image in open_images(whole_row())]
            return self.longest_form(row, [encode_size(self.processor, size) for size in sizes], room=room)
        found = self.longest_form(row, [most] * num_images, room=room)
        if not num_images or most == 1 or self.max_length is None or found[0] <= self.max_length:
            return found
        return self.longest_form(row, self.pixels([whole_row()])[1][0], room=room)

    def longest(self, row: dict, *, room: int = 0) -> int:
        """Return the maximum number of tokens of a row at any stage, as `measure` counts them."""
        return self.measure(row, len(row["images"]), lambda: row, room=room)[0]

    def longest_part(self, prompt: list[int], num_following: int) -> int:
        """Return the tokens of a prompt and the text after it; for an encoder-decoder those of the longer side."""
        encoder, decoder = self.processor.split_prompt(prompt)
        return max(len(encoder), len(decoder) + num_following)

    def pixels(self, rows: Sequence[dict]) -> tuple[dict, list[list]]:
        """Return the model inputs for all rows' images in order, and num_tiles of each image of each row."""
        if self.image_features is not None:
            return self.image_features.of_rows(rows)
        return self.processor.encode_images([open_images(row) for row in rows], return_tensors="pt")

    def supervised(self, rows: Sequence[dict], plan_of, tiles: Sequence[Sequence], images: dict | None = None) -> dict:
        """Return input_ids, attention_mask, labels (B, T) of rows under their plans; images, tiles: as from `pixels`.

        For an encoder-decoder these are the decoder's, with the encoder's; labels are what each column predicts.
        """
        encoder, decoder = [], []
        for row, num_tiles in zip(rows, tiles):
            (prompt, target), *later = turns = self.encode_row(row, plan_of(row), num_tiles)
            self.check_length(row, self.length_of(turns), f"the sequence of stage {self.stage}")
            read, begun = self.processor.split_prompt(prompt)
            encoder.append(read)
            decoder.append([(begun, target), *later])
        pad_id, latent_id = self.processor.tokenizer.pad_token_id, self.processor.latent_token_id
        batch = align_rows(decoder, pad_id=pad_id, latent_id=latent_id)
        if not encoder[0]:
            said = batch["labels"] != IGNORED
            return {**batch, **self.processor.column_inputs(batch["input_ids"], batch["attention_mask"], images, said)}
        ids, mask = self.processor.prompt_names
        return {
            ids: batch["input_ids"][:, :-1],
            mask: batch["attention_mask"][:, :-1],
            "labels": batch["labels"][:, 1:],
            **self.processor.tokenizer.pad({"input_ids": encoder}, padding_side="right", return_tensors="pt"),
        }

    def steps_of_latents(self, rows: Sequence[dict], ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the step that each latent of ids (B, T) replaces (-1: none), and its index in it, both (B, N)."""
        counts = (ids == self.processor.latent_token_id).sum(dim=1)  # (B,)
        known = torch.tensor([len(row["steps"]) for row in rows])  # (B,)
        per_step = self.curriculum.thoughts_per_turn or self.curriculum.c_thought
        latents = torch.arange(int(counts.max())).expand(len(rows), -1)  # (B, N)
        steps = latents // per_step
        stands_for_one = (latents < counts[:, None]) & (steps < known[:, None])
        return torch.where(stands_for_one, steps, -1), latents % per_step

    def for_objectives(self, rows: Sequence[dict], batch: dict, tiles: Sequence[Sequence], images: dict) -> dict:
        """Return the inputs of this stage's objectives for a labelled batch; empty without objectives."""
        present = [objective for objective in self.objectives if objective.name in self.weights()]
        if not present:
            return {}
        ids = batch[self.processor.prompt_names[0]]  # (B, T)
        steps, places = self.steps_of_latents(rows, ids)
        of_batch = RowsOfBatch(
            rows,
            steps,
            places,
            counts=(ids == self.processor.latent_token_id).sum(dim=1),
            processor=self.processor,
            labelled=lambda plan_of: self.supervised(rows, plan_of, tiles, images),
        )
        columns = answer_columns(rows, predicted(batch["labels"], self.processor), self.processor)  # (B,)
        encoded = {objective.name: objective.encode(of_batch) for objective in present}
        return {INPUTS: {"steps": steps, "places": places, "answer_column": columns, **encoded}}

    def aligned(self, rows: Sequence[dict]) -> dict:
        """Return alignment_input_ids and alignment_attention_mask (images, S): each row's text, once per picture."""
        texts = [self.alignment.text(row) for row in rows for _ in row["images"]]
        if not texts:
            return {}
        tokenizer = self.processor.tokenizer
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", split_special_tokens=True)
        if self.max_length is not None and batch["input_ids"].shape[1] > self.max_length:
            raise UsageError(
                f"A text for alignment takes {batch['input_ids'].shape[1]} tokens. The maximum of the language model "
                f"is {self.max_length}. Set alignment_target to a shorter text."
            )
        return {f"alignment_{name}": batch[name] for name in ("input_ids", "attention_mask")}

    def __call__(self, rows: Sequence[dict]) -> dict:
        pixels, tiles = self.pixels(rows)
        batch = {**self.supervised(rows, self.training_plan, tiles, pixels), **pixels}
        if self.alignment is None:
            return {**batch, **self.for_objectives(rows, batch, tiles, pixels)}
        if self.alignment.warms_up(self.epoch):
            if not any(row["images"] for row in rows):
                raise UsageError(
                    f"{rows[0]['row_id']}: align_warmup_epochs trains on pictures alone, and none of the "
                    f"{len(rows)} rows of this batch has one. Set it to 0, or remove rows without pictures."
                )
            batch = {name: tensor for name, tensor in batch.items() if name not in ("labels", *DECODER_INPUTS)}
            return {**batch, **self.aligned(rows)}
        return {**batch, **self.for_objectives(rows, batch, tiles, pixels), **self.aligned(rows)}

    def prompts(self, rows: Sequence[dict]) -> dict:
        """Return left-padded prompts (B, T), pixels, `index` (B,) of the rows, and under `supervised` labelled rows.

        With an alignment add `num_images` (B,) of each row.
        """
        num_latents = self.curriculum.num_latents(self.stage)
        pixels, tiles = self.pixels(rows)
        prompts = [self.encode_prompt(row, num_tiles, num_latents) for row, num_tiles in zip(rows, tiles)]
        for row, prompt in zip(rows, prompts):
            length = self.longest_part(prompt, self.max_new_tokens)
            self.check_length(row, length, "the prompt with max_new_tokens")
        batch = self.processor.pad_prompts(prompts, padding=True, return_tensors="pt")
        supervised = self.supervised(rows, self.evaluation_plan, tiles, pixels)
        ids, mask = (batch[name] for name in self.processor.prompt_names)
        return {
            **batch,
            **self.processor.column_inputs(ids, mask, pixels),
            **pixels,
            "index": torch.tensor([row["index"] for row in rows]),
            **({"num_images": torch.tensor([len(row["images"]) for row in rows])} if self.alignment else {}),
            "supervised": {
                **supervised,
                **self.for_objectives(rows, supervised, tiles, pixels),
                **(self.aligned(rows) if self.alignment is not None else {}),
            },
        }
