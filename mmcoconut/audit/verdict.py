"""Verdicts with their figures: do the thoughts matter, do they carry the answer, would positions suffice?

The three questions are answered separately, because their answers are independent: a model can need its thoughts and
also read the picture directly, and a model that needs them might have learnt as much with idle positions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mmcoconut.audit.controls import ControlOutcome
from mmcoconut.audit.interventions import MOSTLY, Answers, Outcome, Study
from mmcoconut.data.scoring import commonest_answer
from mmcoconut.statistics import Estimate, percent, points, sign_test


# Smaller differences in accuracy, or shares of changed answers, count as none.
MARGIN = 0.05
SIGNIFICANCE = 0.05
CANNOT_TELL = "cannot be told"
DEPENDS, DOES_NOT = "depends", "does not depend"  # whether thoughts matter
CARRY, DO_NOT_SUFFICE = "carry the answer", "do not suffice"  # whether the answer needs only the thoughts
KEPT, FALLS = "kept", "falls"  # accuracy with the image hidden from the answer
WOULD_DO, WOULD_NOT_DO = "would do", "would not do"  # positions without thoughts
UNUSED_TO_IT = "It was not trained with so little in sight, which may be the only reason"


@dataclass
class Verdict:
    """`label`: one of DEPENDS, DOES_NOT, CANNOT_TELL; `sentence`: in words; `notes`: further observations."""

    label: str
    sentence: str
    notes: list[str]


@dataclass
class Finding(Verdict):
    """A verdict on another question, with its own labels, and the figures of the run that it is based on.

    accuracy: of that run; difference: paired, to the untouched run. None if it was not run.
    """

    accuracy: Estimate | None = None
    difference: Estimate | None = None


@dataclass
class Positions(Finding):
    """The finding on extra positions: this checkpoint without feedback, and the matched controls."""

    controls: list[ControlOutcome] = field(default_factory=list)


def is_kept(change: Outcome | ControlOutcome, margin: float) -> bool:
    """Return True if accuracy surely falls by less than the margin."""
    return change.difference.low > -margin


def falls(change: Outcome | ControlOutcome, margin: float) -> bool:
    """Return True if accuracy falls by the margin or more, significantly (by interval and sign test)."""
    no_accident = change.difference.high < 0 and sign_test(change.num_gained, change.num_lost) < SIGNIFICANCE
    return no_accident and change.difference.mean <= -margin


def moved(change: Outcome, untouched: Answers) -> str:
    before, after = percent(sum(untouched.scores) / len(untouched.scores)), percent(change.accuracy.mean)
    return (
        f"accuracy goes from {before} to {after} ({points(change.difference)}: {change.num_lost} answers turn wrong, "
        f"{change.num_gained} right)"
    )


def in_words(swap: Outcome, untouched: Answers) -> str:
    return (
        f"with the thoughts of rows that were answered otherwise, {moved(swap, untouched)} and "
        f"{percent(swap.changed.mean)} of the answers change"
    )


def note_on_removal(outcomes: Mapping[str, Outcome]) -> str | None:
    """Return a note if removing thoughts hurts a model for which swapping them does not."""
    hurt = [name for name in ("zero", "noise", "mean") if name in outcomes and outcomes[name].difference.high < 0]
    if not hurt:
        return None
    return f"Accuracy does fall with {' and '.join(hurt)}: it needs thoughts there, but not those of its own row."


def note_on_words(outcomes: Mapping[str, Outcome], untouched: Answers) -> str | None:
    """Return a note if the model writes more text, given fewer thoughts, and whether it needs it."""
    fewer = [outcomes[name] for j in range(untouched.thoughts.shape[1]) if (name := f"count_{j}") in outcomes]
    longest = max(fewer, key=lambda outcome: outcome.generated_tokens, default=None)
    if longest is None or longest.generated_tokens < 1.1 * untouched.generated_tokens:
        return None
    at_once = outcomes[f"{longest.name}_at_once"]
    note = (
        f"With {longest.description} the model writes {longest.generated_tokens:.1f} tokens per answer, not "
        f"{untouched.generated_tokens:.1f}, with an accuracy of {percent(longest.accuracy.mean)}"
    )
    if at_once.accuracy.high < longest.accuracy.low:
        note += (
            f"; made to answer at once, {percent(at_once.accuracy.mean)}: it reasons in words where it cannot think"
        )
    return f"{note}."


def verdict_of(study: Study, outcomes: Mapping[str, Outcome], *, margin: float = MARGIN) -> Verdict:
    """Tell whether the answer depends on the thoughts, by the shuffled run: real thoughts, of another answer.

    It depends if accuracy falls by the margin or more, significantly (the interval of the difference lies below 0, and
    the exact sign test has p < 0.05). It does not if the difference and the share of changed answers are both within
    the margin, in an untouched run that gives answers. Zeros and noise alone prove nothing: a model may fail on them
    because it never read such vectors.
    """
    untouched, swap = study.untouched, outcomes.get("shuffled")
    if swap is None:
        return Verdict(CANNOT_TELL, f"It cannot be told with {len(study.rows)} examples: all were answered alike.", [])
    empty = untouched.share_empty
    label, start = CANNOT_TELL, f"It cannot be told with {len(study.rows)} examples"
    if falls(swap, margin):
        label, start = DEPENDS, "The answer depends on the thoughts"
    elif is_kept(swap, margin) and max(swap.difference.high, swap.changed.high) < margin and empty < MOSTLY:
        label, start = DOES_NOT, "The answer does not depend on the thoughts"
    answer, baseline = commonest_answer(study.rows, study.metric)
    notes = [
        f"{percent(empty)} of the untouched answers are empty." if empty > 0 else None,
        f"Always answering {answer!r} would be right in {percent(baseline)} of the rows.",
        note_on_removal(outcomes) if label == DOES_NOT else None,
        note_on_words(outcomes, untouched),
    ]
    return Verdict(label, f"{start}: {in_words(swap, untouched)}.", [note for note in notes if note is not None])


def reason_of(name: str, not_run: Iterable[str]) -> str:
    """Return why an intervention was not run."""
    return next(reason for reason in not_run if reason.startswith(f"{name} "))


def above_chance(outcome: Outcome | ControlOutcome, baseline: float) -> bool:
    """Return True if accuracy is surely above that of the commonest answer, which needs no question."""
    return outcome.accuracy.low > baseline


def finding_of(
    study: Study,
    outcome: Outcome,
    *,
    labels: tuple[str, str],
    starts: tuple[str, str, str],
    sees: str,
    margin: float,
) -> Finding:
    """Tell whether accuracy is kept (the first label and start) with less in sight, falls, or cannot be told.

    It is kept if the interval of the difference lies above minus the margin, in a run above chance.

    Args:
        starts: sentence beginnings, one per label and one for CANNOT_TELL. sees: the run's answer_sees.
    """
    answer, baseline = commonest_answer(study.rows, study.metric)
    own, above = study.answerer.model.config.answer_sees, above_chance(outcome, baseline)
    chance = f"Always answering {answer!r} would give {percent(baseline)}"
    label, start, notes = CANNOT_TELL, f"{starts[2]} cannot be told with {len(study.rows)} examples", []
    sentence = moved(outcome, study.untouched)
    if is_kept(outcome, margin) and above:
        label, start = labels[0], starts[0]
    elif falls(outcome, margin):
        label, start = labels[1], starts[1]
        empty = sum(text == "" for text in outcome.texts) / len(outcome.texts)
        left = "part of what it takes is still there" if above else "nothing is seen to be left"
        notes = [f"{chance}: {left}.", *[f"{percent(empty)} of these answers are empty."] * (empty > 0)]
        sentence += f". {UNUSED_TO_IT}"  # as where it was, the untouched run is this one
        notes.append(f"`answer_sees: {sees}` in a recipe trains a model of which it can be told.")
    elif not above:
        notes = [f"{chance}, and accuracy is not surely above that."]
    if own in (sees, "thoughts"):
        notes.append(f"The checkpoint has answer_sees: {own}, so that its untouched answers see no more either.")
    return Finding(
        label,
        f"{start}: where {outcome.description}, {sentence}.",
        notes,
        accuracy=outcome.accuracy,
        difference=outcome.difference,
    )


def sight_finding(
    study: Study,
    outcomes: Mapping[str, Outcome],
    not_run: Iterable[str],
    *,
    name: str,
    starts: tuple[str, str, str],
    note: str,
    **options,
) -> Finding:
    """Return the finding of the intervention `name`, whose answer sees less; CANNOT_TELL if it was not run.

    starts: sentence beginnings per label and for CANNOT_TELL. note: for the first label. options: of `finding_of`.
    """
    if name not in outcomes:
        return Finding(CANNOT_TELL, f"{starts[-1]} cannot be told: {reason_of(name, not_run)}.", [])
    found = finding_of(study, outcomes[name], starts=starts, **options)
    if found.label == options["labels"][0]:
        found.notes.append(note)
    return found


def necessity_of(
    study: Study, outcomes: Mapping[str, Outcome], not_run: Iterable[str], *, margin: float = MARGIN
) -> Finding:
    """Tell whether the thoughts carry the answer, that is, all it needs of question and image.

    It is based on `only_thoughts`, where columns after the thoughts see nothing else before them.
    """
    return sight_finding(
        study,
        outcomes,
        not_run,
        name="only_thoughts",
        labels=(CARRY, DO_NOT_SUFFICE),
        starts=(
            "The thoughts carry the answer",
            "The thoughts alone do not suffice",
            "Whether the thoughts carry the answer",
        ),
        sees="thoughts",
        note="The columns of the thoughts look at question and image themselves: whether it matters what is fed back "
        "to them, the verdict tells.",
        margin=margin,
    )


def image_finding(
    study: Study, outcomes: Mapping[str, Outcome], not_run: Iterable[str], *, margin: float = MARGIN
) -> Finding:
    """Tell whether accuracy is kept with the image hidden from the answer (CVRR, https://arxiv.org/abs/2609.06746).

    The answer still sees question columns that have seen an earlier image; in `necessity_of` it does not.
    """
    return sight_finding(
        study,
        outcomes,
        not_run,
        name="no_image",
        labels=(KEPT, FALLS),
        starts=(
            "The answer need not see the image",
            "The answer is worse without sight of the image",
            "Whether the answer needs to see the image",
        ),
        sees="no_image",
        note="What it needs of the image comes through the thoughts, or through the columns of the question, which "
        "saw the image too.",
        margin=margin,
    )


def control_in_words(control: ControlOutcome) -> str:
    seed = "" if control.seed is None else f", seed {control.seed},"
    return f"a run of mode {control.mode}{seed} has {percent(control.accuracy.mean)} ({points(control.difference)})"


def positions_of(
    study: Study,
    outcomes: Mapping[str, Outcome],
    controls: Sequence[ControlOutcome] = (),
    *,
    margin: float = MARGIN,
) -> Positions:
    """Tell whether extra positions alone would suffice, from this checkpoint without feedback and matched controls.

    They would if either has an accuracy above chance that is surely less than the margin below the untouched one.
    A control of mode `markers` does not even have the positions. They would not if this checkpoint and all controls
    fall, including `pause`, which has the positions. The checkpoint's fall alone means little: it was never trained on
    the embedding that is now read there.
    """
    answer, baseline = commonest_answer(study.rows, study.metric)
    here = outcomes["own_embedding"]
    trained_fail = any(control.mode == "pause" for control in controls)
    trained_fail = trained_fail and all(falls(control, margin) for control in controls)
    label, start = CANNOT_TELL, "Whether extra positions alone would do cannot be told"
    start += "" if controls else " without control runs (`--controls`)"
    enough = [change for change in (here, *controls) if is_kept(change, margin) and above_chance(change, baseline)]
    if any(change is here or change.mode == "pause" for change in enough):
        label, start = WOULD_DO, "Extra positions alone would do"
    elif enough:
        label, start = WOULD_DO, "Not even extra positions are needed"
    elif trained_fail and falls(here, margin):
        label, start = WOULD_NOT_DO, "Extra positions alone would not do"
    words = [f"with nothing fed back, {moved(here, study.untouched)}", *map(control_in_words, controls)]
    if controls:
        note = "Each control is one run: another seed may differ by more than the intervals say."
    else:
        note = (
            "A fall without feedback says as little as with zeros, as this model never read the latent token's "
            "embedding; `--controls` with matched runs of mode markers and pause can tell."
        )
    notes = [note, f"Always answering {answer!r} would give {percent(baseline)}."]
    return Positions(label, f"{start}: {'; '.join(words)}.", notes, here.accuracy, here.difference, list(controls))
