"""Does the answer depend on the thoughts? In three words, with the figures that they rest on."""

from collections.abc import Mapping
from dataclasses import dataclass

from mmcoconut.audit.interventions import Answers, Outcome, Study
from mmcoconut.data.scoring import commonest_answer
from mmcoconut.statistics import percent, points, sign_test


# A difference in accuracy, or a share of changed answers, that is smaller is taken for none.
MARGIN = 0.05
SIGNIFICANCE = 0.05
MOSTLY = 0.5
DEPENDS, DOES_NOT, CANNOT_TELL = "depends", "does not depend", "cannot be told"


@dataclass
class Verdict:
    """`label`: one of DEPENDS, DOES_NOT, CANNOT_TELL; `sentence` says it in words; `notes` say what else was seen."""

    label: str
    sentence: str
    notes: list[str]


def in_words(swap: Outcome, untouched: Answers) -> str:
    before, after = percent(sum(untouched.scores) / len(untouched.scores)), percent(swap.accuracy.mean)
    return (
        f"with the thoughts of rows that were answered otherwise, accuracy goes from {before} to {after} "
        f"({points(swap.difference)}: {swap.num_lost} answers turn wrong, {swap.num_gained} right) and "
        f"{percent(swap.changed.mean)} of the answers change"
    )


def note_on_removal(outcomes: Mapping[str, Outcome]) -> str | None:
    """For a model that does not care whose thoughts it reads: whether it cares that there are any."""
    hurt = [name for name in ("zero", "noise", "mean") if name in outcomes and outcomes[name].difference.high < 0]
    if not hurt:
        return None
    return f"Accuracy does fall with {' and '.join(hurt)}: something must stand there, but which thoughts is all one."


def note_on_words(outcomes: Mapping[str, Outcome], untouched: Answers) -> str | None:
    """Return True if the model, given fewer thoughts, goes on in words, and needs them."""
    fewer = [outcomes[name] for j in range(untouched.thoughts.shape[1]) if (name := f"count_{j}") in outcomes]
    longest = max(fewer, key=lambda outcome: outcome.generated_tokens, default=None)
    if longest is None or longest.generated_tokens < 1.1 * untouched.generated_tokens:
        return None
    at_once = outcomes[f"{longest.name}_at_once"]
    note = (
        f"With {longest.description} the model writes {longest.generated_tokens:.1f} tokens an answer, not "
        f"{untouched.generated_tokens:.1f}, with an accuracy of {percent(longest.accuracy.mean)}"
    )
    if at_once.accuracy.high < longest.accuracy.low:
        note += (
            f"; made to answer at once, {percent(at_once.accuracy.mean)}: it reasons in words where it cannot think"
        )
    return f"{note}."


def verdict_of(study: Study, outcomes: Mapping[str, Outcome], *, margin: float = MARGIN) -> Verdict:
    """Return True if the answer depends on the thoughts, told by the shuffled run: real thoughts, of another answer.

    It depends if accuracy falls by the margin or more, and the fall is no accident (the interval of the difference
    lies below 0, and the exact sign test has p < 0.05). It does not if the difference and the share of changed answers
    are both within the margin, in an untouched run that gives answers. Zeros and noise are no proof by themselves: a
    model may fail on them because it never read such vectors.
    """
    untouched, swap = study.untouched, outcomes.get("shuffled")
    if swap is None:
        return Verdict(CANNOT_TELL, f"It cannot be told with {len(study.rows)} examples: all were answered alike.", [])
    empty = sum(text == "" for text in untouched.texts) / len(untouched.texts)
    no_accident = swap.difference.high < 0 and sign_test(swap.num_gained, swap.num_lost) < SIGNIFICANCE
    label, start = CANNOT_TELL, f"It cannot be told with {len(study.rows)} examples"
    if no_accident and swap.difference.mean <= -margin:
        label, start = DEPENDS, "The answer depends on the thoughts"
    elif swap.difference.low > -margin and max(swap.difference.high, swap.changed.high) < margin and empty < MOSTLY:
        label, start = DOES_NOT, "The answer does not depend on the thoughts"
    answer, baseline = commonest_answer(study.rows, study.metric)
    notes = [
        f"{percent(empty)} of the untouched answers are empty." if empty > 0 else None,
        f"Always answering {answer!r} would be right in {percent(baseline)} of the rows.",
        note_on_removal(outcomes) if label == DOES_NOT else None,
        note_on_words(outcomes, untouched),
    ]
    return Verdict(label, f"{start}: {in_words(swap, untouched)}.", [note for note in notes if note is not None])
