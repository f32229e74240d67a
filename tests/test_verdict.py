"""What an audit says for given figures: every label of every question, in words that the figures allow."""

from types import SimpleNamespace

import pytest

from mmcoconut.audit.controls import Control, beside
from mmcoconut.audit.interventions import Answers, Study
from mmcoconut.audit.verdict import (
    CANNOT_TELL,
    CARRY,
    DO_NOT_SUFFICE,
    FALLS,
    KEPT,
    WOULD_DO,
    WOULD_NOT_DO,
    image_finding,
    necessity_of,
    positions_of,
)


NUM_ROWS = 500
RIGHT = 400  # of them, untouched; each of the five answers is right in a fifth of the rows
COLOURS = ["red", "green", "blue", "black", "white"]


def answers_with(scores: list[float]) -> Answers:
    texts = ["red"] * len(scores)
    return Answers(texts, texts, scores, generated_tokens=3.0, thoughts=None)


def scores_of(right: int) -> list[float]:
    return [1.0] * right + [0.0] * (NUM_ROWS - right)


def study_of(right: int = RIGHT, sees: str = "all") -> Study:
    """Made-up rows and their untouched answers, the first so many of them right."""
    study = object.__new__(Study)
    study.answerer = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(answer_sees=sees)))
    study.rows = [{"answers": [COLOURS[index % 5]]} for index in range(NUM_ROWS)]
    study.metric, study.seed, study.untouched = "exact_match", 0, answers_with(scores_of(right))
    return study


def moved(study: Study, lost: int, gained: int) -> list[float]:
    """Scores of a run in which so many of the right answers turn wrong, and of the wrong ones right."""
    before = study.untouched.scores
    right = int(sum(before))
    return [
        1.0 - score if index < lost or right <= index < right + gained else score for index, score in enumerate(before)
    ]


def outcomes_with(study: Study, name: str, lost: int, gained: int) -> dict:
    return {name: study.outcome(name, "made up", answers_with(moved(study, lost, gained)))}


CASES = [
    (RIGHT, 0, 0, "kept"),
    (RIGHT, 6, 2, "kept"),  # -0.8 points, surely less than the margin
    (RIGHT, 0, 60, "kept"),  # better with less in sight
    (RIGHT, 20, 0, CANNOT_TELL),  # -4 points: the interval reaches beyond the margin, the fall is smaller than it
    (RIGHT, 60, 45, CANNOT_TELL),
    (RIGHT, 60, 20, "falls"),  # -8 points
    (RIGHT, 200, 0, "falls"),
    (100, 0, 0, CANNOT_TELL),  # as often right as the commonest answer: nothing is carried
    (100, 80, 0, "falls"),
]


@pytest.mark.parametrize(("right", "lost", "gained", "label"), CASES)
def test_necessity_follows_size_and_certainty(right, lost, gained, label):
    study = study_of(right)
    found = necessity_of(study, outcomes_with(study, "only_thoughts", lost, gained), [])
    assert found.label == {"kept": CARRY, "falls": DO_NOT_SUFFICE}.get(label, label)
    assert f"{lost} answers turn wrong, {gained} right" in found.sentence
    assert found.accuracy.mean == pytest.approx((right - lost + gained) / NUM_ROWS)
    assert found.difference.mean == pytest.approx((gained - lost) / NUM_ROWS)


@pytest.mark.parametrize(("right", "lost", "gained", "label"), CASES)
def test_sight_of_the_image_follows_size_and_certainty(right, lost, gained, label):
    study = study_of(right)
    found = image_finding(study, outcomes_with(study, "no_image", lost, gained), [])
    assert found.label == {"kept": KEPT, "falls": FALLS}.get(label, label)
    assert ("columns of the question" in " ".join(found.notes)) == (found.label == KEPT)


def necessity_notes(lost: int, *, right: int = RIGHT, sees: str = "all") -> str:
    study = study_of(right, sees)
    found = necessity_of(study, outcomes_with(study, "only_thoughts", lost, 0), [])
    assert ("not trained with so little in sight" in found.sentence) == (found.label == DO_NOT_SUFFICE)
    return " ".join(found.notes)


def test_a_fall_says_what_is_left_and_that_the_model_never_saw_so_little():
    assert "'red' would give 20.0 %: part of what it takes is still there" in necessity_notes(200)
    assert "nothing is seen to be left" in necessity_notes(300)
    assert "`answer_sees: thoughts` in a recipe" in necessity_notes(200)
    assert "`answer_sees: thoughts` in a recipe" in necessity_notes(200, sees="no_image")  # which saw the question
    assert necessity_notes(0).endswith("whether it matters what is fed back to them, the verdict tells.")


def test_a_fall_counts_the_answers_that_are_empty():
    study = study_of()
    outcomes = outcomes_with(study, "only_thoughts", 300, 0)
    outcomes["only_thoughts"].texts[:50] = [""] * 50
    assert "10.0 % of these answers are empty." in necessity_of(study, outcomes, []).notes


def test_accuracy_of_the_commonest_answer_is_not_said_to_be_carried():
    assert "would give 20.0 %, and accuracy is not surely above that" in necessity_notes(0, right=100)


@pytest.mark.parametrize(
    ("sees", "of_thoughts", "of_image"), [("all", False, False), ("no_image", False, True), ("thoughts", True, True)]
)
def test_checkpoints_that_hide_it_by_themselves_say_so(sees, of_thoughts, of_image):
    study = study_of(sees=sees)
    notes = [
        find(study, outcomes_with(study, name, 0, 0), []).notes
        for find, name in ((necessity_of, "only_thoughts"), (image_finding, "no_image"))
    ]
    said = [f"has answer_sees: {sees}, so that its untouched answers see no more" in " ".join(some) for some in notes]
    assert said == [of_thoughts, of_image]


def test_what_was_not_run_says_why():
    reasons = ["no_image was not run: some rows have no image", "only_thoughts was not run: it has recurrent layers"]
    for find, reason in ((necessity_of, "it has recurrent layers"), (image_finding, "some rows have no image")):
        found = find(study_of(), {}, reasons)
        assert (found.label, found.accuracy, found.difference) == (CANNOT_TELL, None, None)
        assert found.sentence.endswith(f"was not run: {reason}.")


POSITIONS = [  # lost here; lost by each control; the label
    (4, {}, WOULD_DO),
    (200, {}, CANNOT_TELL),
    (20, {}, CANNOT_TELL),
    (200, {"pause": 200}, WOULD_NOT_DO),
    (200, {"markers": 150, "pause": 200}, WOULD_NOT_DO),
    (200, {"markers": 200}, CANNOT_TELL),  # which has no positions
    (200, {"markers": 20, "pause": 200}, CANNOT_TELL),
    (20, {"pause": 200}, CANNOT_TELL),
    (200, {"markers": 200, "pause": 4}, WOULD_DO),
    (200, {"markers": 4, "pause": 200}, WOULD_DO),
    (4, {"pause": 200}, WOULD_DO),
]


@pytest.mark.parametrize(("lost", "controls", "label"), POSITIONS)
def test_positions_follow_this_checkpoint_and_its_controls(lost, controls, label):
    study = study_of()
    runs = [Control(mode, mode, 1, moved(study, number, 0)) for mode, number in controls.items()]
    compared = list(beside(runs, study.untouched.scores, seed=0))
    found = positions_of(study, outcomes_with(study, "own_embedding", lost, 0), compared)
    assert found.label == label
    assert [control.num_lost for control in found.controls] == list(controls.values())
    for mode, number in controls.items():
        assert f"a run of mode {mode}, seed 1, has {(RIGHT - number) / 5:.1f} %" in found.sentence
    assert ("`--controls`" in found.notes[0]) == (not controls)
    no_positions = label == WOULD_DO and lost > 4 and controls["pause"] > 4  # only `markers` is as good
    assert found.sentence.startswith("Not even extra positions are needed:") == no_positions


def test_positions_do_nothing_for_a_model_at_chance():
    study = study_of(right=100)
    assert positions_of(study, outcomes_with(study, "own_embedding", 0, 0)).label == CANNOT_TELL
