"""What is wrong with a row is said before the first update, with the row, both numbers and what to do."""

import re

import pytest
from test_from_vlm import thinking_pair
from tiny import tiny_image, tiny_model, tiny_processor

from mmcoconut.chat_template_mmcoconut import parse_answer
from mmcoconut.data import Example, to_dataset
from mmcoconut.data.arrow_mazes import png_bytes
from mmcoconut.data.scoring import REFERENCES
from mmcoconut.errors import UsageError
from mmcoconut.objectives.alignment import Alignment
from mmcoconut.training.collator import CurriculumCollator, encode_target
from mmcoconut.training.curriculum import Curriculum
from mmcoconut.training.row_checks import check_alignment_texts, check_answers, check_lengths


PICTURE = {"bytes": png_bytes(tiny_image()), "path": None}


def row(number: int = 0, **changes) -> Example:
    fields = {"images": [PICTURE], "question": "Which?", "choices": [], "steps": ["red", "blue"], "answers": ["2"]}
    return Example(**{**fields, "row_id": f"train.json row {number}", **changes})


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_model())


def collator(processor, *, max_length=256, max_new_tokens=8, alignment=None, **curriculum):
    options = {"max_length": max_length, "max_new_tokens": max_new_tokens, "alignment": alignment}
    return CurriculumCollator(Curriculum(**curriculum), processor, **options)


# Lengths


@pytest.mark.parametrize(
    "curriculum, room, form",
    [
        ({}, 0, "the sequence of stage 0"),
        ({"c_thought": 40}, 0, "the sequence of stage 3"),
        ({"c_thought": 5}, 60, r"the prompt of stage 3 with 60 new tokens \(max_new_tokens\)"),
    ],
)
def test_a_row_that_is_too_long_at_any_stage_is_refused_with_both_numbers(curriculum, room, form, processor):
    rows = to_dataset([row(0, steps=["red"]), row(1, steps=["red blue green", "red blue green", "red"])])
    made = collator(processor, **curriculum)
    longest = made.longest(rows[1], room=room)
    made.max_length = longest
    check_lengths(rows, made, room=room)
    made.max_length = longest - 1
    message = f"train.json row [01]: {form} takes {longest} tokens, .* is {longest - 1}. Shorten .* fewer"
    with pytest.raises(UsageError, match=message):
        check_lengths(rows, made, room=room)


def test_pictures_are_not_decoded_to_measure_rows_whose_tiles_do_not_depend_on_them(processor):
    broken = [{"bytes": b"not decoded", "path": None}] * 2
    made = collator(processor, max_length=40)
    check_lengths(to_dataset([row(images=broken[:1])]), made)
    made.max_length = made.longest(to_dataset([row(images=broken)])[0]) - 1
    with pytest.raises(UsageError, match=f"takes {made.max_length + 1} tokens"):
        check_lengths(to_dataset([row(images=broken)]), made)


def test_tiles_are_counted_and_only_where_the_most_of_them_would_be_too_long():
    model, processor = thinking_pair(max_tiles=3)
    wide = {"bytes": png_bytes(tiny_image().resize((90, 30))), "path": None}
    (square,) = rows = to_dataset([row()])
    made = collator(processor)
    most, exact = (made.longest_form(square, [tiles])[0] for tiles in (4, 1))
    assert most - exact == 3 * processor.image_seq_length
    made.max_length = most
    check_lengths(to_dataset([row(images=[{"bytes": b"not decoded", "path": None}])]), made)
    made.max_length = exact
    check_lengths(rows, made)
    with pytest.raises(UsageError, match=f"train.json row 1: the sequence of stage 0 takes {most} tokens"):
        check_lengths(to_dataset([row(), row(1, images=[wide])]), made)


# Answers


MARKED_ANSWERS = ("48+24=72 #### 72", "Sure:\n\n### Eggs\n- two", "#1", "a\n#### b", "red ###")


@pytest.mark.parametrize("answer", MARKED_ANSWERS)
def test_an_answer_that_holds_the_marker_is_learnt_and_scored_whole(answer, processor):
    steps = ["16 ### 4", "4 #### 2"]
    written = processor.tokenizer.decode(encode_target(processor, steps, answer), skip_special_tokens=True)
    assert parse_answer(written) == answer
    check_answers(to_dataset([row(steps=steps, answers=[answer])]), "exact_match")


@pytest.mark.parametrize("answer", ["### red", "#### 72", "###"])
def test_an_answer_that_begins_with_the_marker_is_refused_with_its_row(answer):
    rows = to_dataset([row(), row(1, answers=[answer])])
    message = f"train.json row 1, field 'answers': found {answer!r}, which evaluation reads as "
    with pytest.raises(UsageError, match=re.escape(message)):
        check_answers(rows, "exact_match")


@pytest.mark.parametrize("step", ["### Look", "Look.\n#### 2", "###"])
def test_a_step_that_would_be_read_as_the_answer_is_refused_with_its_row(step):
    rows = to_dataset([row(), row(1, steps=["Look.", step])])
    with pytest.raises(UsageError, match=re.escape(f"train.json row 1, field 'steps': found {step!r}, and the first")):
        check_answers(rows, "exact_match")


def test_the_row_that_a_metric_cannot_read_is_named():
    answers = [*map(str, range(7)), "seven", "8"]
    rows = to_dataset(row(number, answers=[answer]) for number, answer in enumerate(answers))
    check_answers(rows, "exact_match")
    message = (
        r"train.json row 7, field 'answers': found \['seven'\], which the metric numeric_answer cannot read "
        r"\(the reference is 'seven'; give a number.*\): correct the row, leave it out, or set `metric` to another"
    )
    with pytest.raises(UsageError, match=message):
        check_answers(rows, "numeric_answer")
    with pytest.raises(UsageError, match="row 0, field 'answers': .* metric aokvqa_mc .* none of the choices"):
        check_answers(rows, "aokvqa_mc")


# pair_accuracy scores a row by another row too.
@pytest.mark.parametrize("metric", sorted({*REFERENCES} - {"pair_accuracy"}))
def test_an_answer_with_space_around_it_scores_by_every_metric(metric):
    choices = [" 2", "3"] if metric == "aokvqa_mc" else []
    check_answers(to_dataset([row(answers=[" 2", "3"], choices=choices)]), metric)


def test_an_answer_that_scores_nothing_is_refused(monkeypatch):
    monkeypatch.setitem(REFERENCES, "exact_match", lambda row: ["another"])
    with pytest.raises(UsageError, match=r"row 0, field 'answers': found \['2'\]; the metric exact_match .* 0. "):
        check_answers(to_dataset([row()]), "exact_match")


# Texts that pictures are aligned with


def test_a_text_to_align_with_that_is_too_long_or_missing_is_refused_with_its_row(processor):
    alignment = Alignment(align_weight=1.0, targets=("question",))
    rows = to_dataset([row(), row(1, images=[], question="red " * 40), row(2, question="red " * 40)])
    check_alignment_texts(rows, collator(processor, max_length=20))
    with pytest.raises(UsageError, match="train.json row 2: its alignment text takes 41 tokens.* is 20. Set align"):
        check_alignment_texts(rows, collator(processor, max_length=20, alignment=alignment))
    with pytest.raises(UsageError, match="train.json row 0: nothing to align"):
        check_alignment_texts(to_dataset([row(question=" ")]), collator(processor, alignment=alignment))
