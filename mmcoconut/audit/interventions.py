"""Interventions on thoughts at inference: replace thoughts, re-answer the questions, compare the answers.

A thought is the vector that a latent reads. An intervention replaces it and lets the model continue. Later thoughts
are computed from the replacement, and are replaced too if the intervention says so.
mmcoconut/audit/necessity.py restricts what else the answer sees.

Shapes: n rows of the data, B rows of a batch, N thoughts per row, D hidden.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field

import torch

from mmcoconut.chat_template_mmcoconut import ANSWER_MARKER
from mmcoconut.data import history_of, question_text
from mmcoconut.data.scoring import score
from mmcoconut.errors import UsageError
from mmcoconut.evaluation.answering import Answerer, image_key
from mmcoconut.passes_mmcoconut import position_limit
from mmcoconut.statistics import Estimate, bootstrap_difference, bootstrap_mean


# Position j of the thought and the model's own thought (B, D) → the vector that is read (B, D).
Replace = Callable[[int, torch.Tensor], torch.Tensor]
# Indices of the rows in a batch → its replacement.
ReplaceOf = Callable[[list[int]], Replace]
MOSTLY = 0.5  # with a larger share of empty answers the model does not answer
# Name, description and replacement of interventions.
Table = list[tuple[str, str, ReplaceOf]]


@contextmanager
def intervening(model, replace: Replace) -> Iterator[None]:
    """Make a call of `generate` or `forward` inside read replace(j, thought) as its j-th thought, from 0.

    With `thought_schedule: jacobi`, each thought is replaced in every update.

    Raises:
        ValueError: the model feeds nothing back.
    """
    if model.config.thought_mode != "feedback":
        raise UsageError(
            f"thought_mode={model.config.thought_mode!r}: this checkpoint feeds no hidden state back, so it has no "
            "thoughts to intervene on. Audit a checkpoint that was trained with mode: coconut."
        )
    positions = itertools.count()

    def put(_, __, thought: torch.Tensor) -> torch.Tensor:
        if thought.ndim == 2:
            return replace(next(positions), thought)
        return torch.stack([replace(j, one) for j, one in enumerate(thought.unbind(dim=1))], dim=1)  # (B, N, D)

    hook = model.base_model.thought_feed.register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()


@dataclass
class Answers:
    """The answers of a checkpoint to n rows.

    texts, outputs (n,): the answers, and the complete generated texts. scores (n,): None for donor rows, which have
    no gold answer. generated_tokens: mean per answer. thoughts (n, N, D): the model's own thoughts, even if replaced;
    None if they were not recorded.
    """

    texts: list[str]
    outputs: list[str]
    scores: list[float] | None
    generated_tokens: float
    thoughts: torch.Tensor | None

    @property
    def share_empty(self) -> float:
        return sum(text == "" for text in self.texts) / len(self.texts)


@dataclass
class Outcome:
    """The effect of an intervention, compared with the untouched run of the same rows.

    difference: paired difference of accuracies; num_lost and num_gained: rows whose score fell and rose. changed:
    share of answers whose text changed (compared by complete text if both answers are empty). follows_donor: share of
    rows that now give the donor's answer, among rows whose donor has an answer and a different one.
    """

    name: str
    description: str
    accuracy: Estimate
    difference: Estimate
    num_lost: int
    num_gained: int
    changed: Estimate
    generated_tokens: float
    follows_donor: Estimate | None = None
    num_donors_that_differ: int | None = None
    texts: list[str] = field(default_factory=list, repr=False)

    def asdict(self) -> dict:
        """Return all fields but the answers themselves, for JSON."""
        values = asdict(self)
        del values["texts"]
        return values


def check_single_turns(rows: Sequence[Mapping]) -> None:
    """Check that each row has one turn, because interventions address thoughts by their index before one answer.

    Raises:
        ValueError: a row is a conversation.
    """
    for row in rows:
        if history_of(row):
            raise UsageError(
                f"{row['row_id']}: a conversation of {1 + len(history_of(row))} turns has thoughts before each, "
                "but interventions support only one turn: set --dataset_options.max_turns 1."
            )


class Study:
    """The rows of an audit, answered untouched and under interventions, always in the same batches.

    Args:
        answerer: the checkpoint.
        rows: of `mmcoconut.data`.
        metric: a name in mmcoconut.data.scoring.REFERENCES.
        batch_size: rows answered at once.
        seed: of donors, noise and bootstrap.
        bar: of `mmcoconut.progress`, counts answered rows.

    Raises:
        ValueError: there are fewer than two rows, a conversation, or a checkpoint without thoughts.
    """

    def __init__(
        self,
        answerer: Answerer,
        rows: Sequence[Mapping],
        *,
        metric: str,
        batch_size: int = 32,
        seed: int = 0,
        bar=None,
    ):
        if len(rows) < 2:
            raise UsageError(
                f"An audit of {len(rows)} rows cannot give a row the thoughts of another: give more rows."
            )
        if answerer.model.config.stop_head and answerer.stop_threshold is not None:
            raise UsageError("Rows of this checkpoint stop thinking early: give an Answerer(…, stop_threshold=None).")
        if answerer.num_latents == 0:
            raise UsageError(
                "The checkpoint has num_latents 0, so there are no thoughts to audit: pass --num_latents."
            )
        check_single_turns(rows)
        self.answerer, self.rows, self.metric = answerer, list(rows), metric
        self.batch_size, self.seed, self.bar = batch_size, seed, bar
        self.untouched = self.run(lambda indices: keep)

    def batches(self) -> Iterator[list[int]]:
        for start in range(0, len(self.rows), self.batch_size):
            yield list(range(start, min(start + self.batch_size, len(self.rows))))

    def run(
        self,
        replace_of: ReplaceOf | None = None,
        *,
        donors: Sequence[Mapping] | None = None,
        answerer: Answerer | None = None,
        around: AbstractContextManager | None = None,
    ) -> Answers:
        """Answer all rows, or their donors; `replace_of` gives the replacement for the indices of a batch.

        Without it the thoughts are not recorded. answerer: replaces the study's own. around: context manager for the
        calls, such as `seeing`.
        """
        rows, answerer = donors or self.rows, answerer or self.answerer
        lines, thoughts = [], []
        with around or nullcontext():
            for indices in self.batches():
                batch, seen = [rows[index] for index in indices], []
                if replace_of is None:
                    lines += answerer.answer(batch)
                else:
                    with intervening(answerer.model, recording(replace_of(indices), seen)):
                        lines += answerer.answer(batch)
                    thoughts.append(read_last(seen, answerer.num_latents).cpu())  # (B, N, D)
                if self.bar is not None:
                    self.bar.update(len(batch))
        texts, outputs = [line["answer"] for line in lines], [line["output"] for line in lines]
        scores = score(self.metric, outputs, texts, rows=rows)["scores"] if donors is None else None
        return Answers(
            texts,
            outputs,
            scores,
            sum(line["generated_tokens"] for line in lines) / len(lines),
            torch.cat(thoughts) if thoughts else None,
        )

    def outcome(self, name: str, description: str, answers: Answers, donors: Sequence[str] | None = None) -> Outcome:
        """Compare a run with the untouched one; `donors` (n,) are the answers of the rows that gave the thoughts."""
        before = self.untouched
        pairs = zip(answers.texts, before.texts, answers.outputs, before.outputs)
        changed = [float(now != then if now or then else written != old) for now, then, written, old in pairs]
        scores = list(zip(answers.scores, before.scores))
        follows, num_differ = None, None
        if donors is not None:
            rows = zip(answers.texts, before.texts, donors)
            follow = [float(now == donor) for now, then, donor in rows if donor not in ("", then)]
            follows, num_differ = (bootstrap_mean(follow, seed=self.seed) if follow else None), len(follow)
        return Outcome(
            name=name,
            description=description,
            accuracy=bootstrap_mean(answers.scores, seed=self.seed),
            difference=bootstrap_difference(answers.scores, before.scores, seed=self.seed),
            num_lost=sum(now < then for now, then in scores),
            num_gained=sum(now > then for now, then in scores),
            changed=bootstrap_mean(changed, seed=self.seed),
            generated_tokens=answers.generated_tokens,
            follows_donor=follows,
            num_donors_that_differ=num_differ,
            texts=answers.texts,
        )


def keep(position: int, thought: torch.Tensor) -> torch.Tensor:
    """Return the thought (B, D) unchanged, for runs that only record."""
    return thought


def zero(position: int, thought: torch.Tensor) -> torch.Tensor:
    """Return zeros (B, D)."""
    return torch.zeros_like(thought)


def recording(replace: Replace, seen: list[torch.Tensor]) -> Replace:
    """Return the same replacement, which also appends the model's own thoughts (B, D) to `seen`."""

    def record(position: int, thought: torch.Tensor) -> torch.Tensor:
        seen.append(thought)
        return replace(position, thought)

    return record


def read_last(seen: list[torch.Tensor], num_latents: int) -> torch.Tensor:
    """Return a call's thoughts (B, N, D) from the recorded ones: those of the last update."""
    return torch.stack(seen[-num_latents:], dim=1)


def noise_like(thought: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return uniformly random directions (B, D), each with the norm of its row's thought."""
    noise = torch.randn(thought.shape, generator=generator).to(thought)
    return noise * thought.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)


def noise(seed: int) -> ReplaceOf:
    """Return a replacement by noise that is the same in every run."""

    def of_batch(indices: list[int]) -> Replace:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + indices[0])
        return lambda position, thought: noise_like(thought, generator)

    return of_batch


def given(thoughts: torch.Tensor, partners: Sequence[int] | None = None) -> ReplaceOf:
    """Return a replacement by thoughts (n, N, D): row i reads those of row partners[i] (default: i)."""

    def of_batch(indices: list[int]) -> Replace:
        batch = thoughts[indices if partners is None else [partners[index] for index in indices]]  # (B, N, D)
        return lambda position, thought: batch[:, position].to(thought)

    return of_batch


def mean_thought(thoughts: torch.Tensor) -> ReplaceOf:
    """Return a replacement by the mean over rows of thoughts (n, N, D), per position."""
    mean = thoughts.float().mean(dim=0, keepdim=True)  # (1, N, D)
    return given(mean.expand(len(thoughts), -1, -1))


def only_at(position: int, replace_of: ReplaceOf) -> ReplaceOf:
    """Return a replacement at one position only; later thoughts are recomputed from it."""

    def of_batch(indices: list[int]) -> Replace:
        replace = replace_of(indices)
        return lambda j, thought: replace(j, thought) if j == position else thought

    return of_batch


def other_rows(keys: Sequence, seed: int, groups: Sequence | None = None) -> list[int] | None:
    """Return for each row a random other row with a different key, from the row's group if it has one.

    Return None if some row has no such partner, because all keys are equal.
    """
    if len(set(keys)) < 2:
        return None
    rng = random.Random(seed)
    members = {}
    for index, group in enumerate(groups if groups is not None else [None] * len(keys)):
        members.setdefault(group, []).append(index)
    partners = []
    for index, key in enumerate(keys):
        group = members[groups[index] if groups is not None else None]
        candidates = [other for other in group if keys[other] != key] or range(len(keys))
        partner = rng.choice(candidates)
        while keys[partner] == key:  # only when all rows are searched, which have two keys
            partner = rng.choice(candidates)
        partners.append(partner)
    return partners


def images_key(row: Mapping) -> tuple[str, ...]:
    return tuple(image_key(image) for image in row["images"])


def with_images_of(row: Mapping, donor: Mapping) -> dict:
    return {**row, "images": donor["images"]}


def with_question_of(row: Mapping, donor: Mapping) -> dict:
    return {**row, "question": donor["question"], "choices": donor["choices"]}


def swapped(study: Study, name: str, description: str, donors: list[dict]) -> Outcome:
    """Give every row the thoughts of its donor row."""
    of_donors = study.run(lambda indices: keep, donors=donors)
    answers = study.run(given(of_donors.thoughts))
    return study.outcome(name, description, answers, of_donors.texts)


def counts_to_try(own: int, room: int) -> list[int]:
    """Return other numbers of thoughts to try: down to none, and up to twice as many if positions allow."""
    fewer = range(own) if own <= 8 else sorted({0, 1, own // 4, own // 2, 3 * own // 4, own - 1})
    more = sorted({own + 1, own + 2, 2 * own})
    return [*fewer, *(count for count in more if count - own <= room)]


def room_for_more(answerer: Answerer, rows: Sequence[Mapping]) -> int:
    """Return how many positions the longest prompt and `max_new_tokens` leave free, per turn of the longest row."""
    limit = position_limit(answerer.model.get_decoder())
    if limit is None:
        return 2 * answerer.num_latents
    free = limit - max(map(answerer.prompt_length, rows)) - answerer.max_new_tokens
    return free // max(1 + len(history_of(row)) for row in rows)


def shuffled(study: Study) -> Outcome | str:
    """Swap in the thoughts of a row with another answer, or return why that is not possible."""
    partners = other_rows(study.untouched.texts, study.seed)
    if partners is None:
        return "shuffled was not run: all rows were answered alike"
    answers = study.run(given(study.untouched.thoughts, partners))
    donors = [study.untouched.texts[partner] for partner in partners]
    return study.outcome("shuffled", "the thoughts of a random row that was answered otherwise", answers, donors)


def other_image(study: Study) -> Outcome | str:
    """Swap in the thoughts on the same question about another row's image, or return why that is not possible."""
    images, questions = [images_key(row) for row in study.rows], [question_text(row) for row in study.rows]
    if 0 in map(len, images) or len(set(map(len, images))) > 1:
        return "other_image was not run: it needs rows with equally many images, at least one"
    partners = other_rows(images, study.seed, groups=questions)
    if partners is None:
        return "other_image was not run: no two rows have different images"
    donors = [with_images_of(row, study.rows[partner]) for row, partner in zip(study.rows, partners)]
    return swapped(study, "other_image", "the thoughts on this question about another image", donors)


def other_question(study: Study) -> Outcome | str:
    """Swap in the thoughts on another row's question about the same image, or return why that is not possible."""
    images, questions = [images_key(row) for row in study.rows], [question_text(row) for row in study.rows]
    if 0 in map(len, images):
        return "other_question was not run: some rows have no image"
    partners = other_rows(questions, study.seed, groups=images)
    if partners is None:
        return "other_question was not run: all rows ask the same question"
    donors = [with_question_of(row, study.rows[partner]) for row, partner in zip(study.rows, partners)]
    return swapped(study, "other_question", "the thoughts on another question about this image", donors)


def emptied(thoughts: torch.Tensor, seed: int) -> Table:
    """Return replacements of all thoughts (n, N, D) by zeros, noise, mean: name, description, replacement."""
    return [
        ("zero", "zeros", lambda indices: zero),
        ("noise", "random directions as long as the thoughts", noise(seed)),
        ("mean", "the mean thought of each position over all rows", mean_thought(thoughts)),
    ]


def one_taken_out(thoughts: torch.Tensor) -> Table:
    """Return replacements of one thought (n, N, D) at a time by its mean; later ones are recomputed."""
    mean = mean_thought(thoughts)
    return [
        (f"without_{j + 1}", f"thought {j + 1} alone replaced by its mean", only_at(j, mean))
        for j in range(thoughts.shape[1])
    ]


def replacements(study: Study) -> list[Outcome]:
    """Replace all thoughts by zeros, by noise, and by their mean."""
    table = emptied(study.untouched.thoughts, study.seed)
    return [study.outcome(name, description, study.run(replace_of)) for name, description, replace_of in table]


def knock_outs(study: Study) -> list[Outcome]:
    """Replace one thought at a time by its mean; later ones are recomputed."""
    table = one_taken_out(study.untouched.thoughts)
    return [study.outcome(name, description, study.run(replace_of)) for name, description, replace_of in table]


def with_other_counts(own: Answerer, rows: Sequence[Mapping]) -> list[tuple[str, str, Answerer]]:
    """Return name, description and answerer for fewer and more thoughts than its own.

    With fewer it may continue in words, as learnt in earlier stages, so each also runs without written steps.
    """
    free, at_once = [], []
    for count in counts_to_try(own.num_latents, room_for_more(own, rows)):
        instead = f"{count} thought{'s' if count != 1 else ''} instead of {own.num_latents}"
        free.append((f"count_{count}", instead, own.with_count(count)))
        if count < own.num_latents:
            other = own.with_count(count, begin_with=ANSWER_MARKER)
            at_once.append((f"count_{count}_at_once", f"{instead}, no written steps", other))
    return [*free, *at_once]


def other_counts(study: Study) -> list[Outcome]:
    """Run with fewer and more thoughts than the study has, see `with_other_counts`."""
    return [
        study.outcome(name, description, study.run(answerer=answerer))
        for name, description, answerer in with_other_counts(study.answerer, study.rows)
    ]
