"""Links to one question of the demo: settings in the page's address and back, with every value checked."""

import builtins
import io
from pathlib import Path
from urllib.parse import parse_qs, parse_qsl

import pytest
from demo_parts import path_of, tiny_examples
from tiny import tiny_image

from mmcoconut.demo.links import MAX_QUESTION, Limits, Settings, example_name, read_query, write_query
from mmcoconut.demo.panels import panels


LIMITS = Limits(thoughts=3, max_new_tokens=10)
NAME = "arrow_mazes test row 1"


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> list[dict]:
    return tiny_examples(tmp_path_factory.mktemp("examples"))


def read(text: str, examples=()):
    return read_query(dict(parse_qsl(text, keep_blank_values=True)), examples, LIMITS)


@pytest.mark.parametrize(
    "settings",
    [
        Settings("Which colour?", NAME, thoughts=0, max_new_tokens=128, others=False),
        Settings("a&b=c?\nd % é “+” <b> ../x", None, thoughts=8, max_new_tokens=1, others=True),
    ],
)
def test_a_link_is_read_as_it_was_written(settings, examples):
    assert read(write_query(settings), examples) == (settings, [])


def test_examples_have_the_names_of_the_data(examples):
    assert [row["row_id"] for row in examples] == [f"arrow_mazes test row {index}" for index in range(4)]


def test_an_example_alone_brings_its_question_and_the_pages_numbers(examples):
    settings, problems = read("example=arrow_mazes+test+row+1", examples)
    assert settings == Settings(examples[1]["question"], NAME, thoughts=3, max_new_tokens=10, others=True)
    assert problems == []


@pytest.mark.parametrize("text", ["", "__theme=dark&view=api", "path=/etc/passwd"])
def test_an_address_without_settings_changes_nothing(text, examples):
    assert read(text, examples) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("example=/etc/passwd", r"example='/etc/passwd': this page has no such example. Choose one of: arrow_mazes"),
        ("example=../../secret.png", "this page has no such example"),
        ("example=", "this page has no such example"),
        ("thoughts=9", "thoughts='9': write a whole number from 0 to 8"),
        ("thoughts=-1", "from 0 to 8"),
        ("thoughts=1.5", "from 0 to 8"),
        ("thoughts=%D9%A3", "from 0 to 8"),  # a digit that is not ASCII
        ("thoughts=" + 5000 * "9", "from 0 to 8"),  # int() refuses so many digits in words of its own
        ("max_new_tokens=0", "max_new_tokens='0': write a whole number from 1 to 128"),
        ("max_new_tokens=129", "from 1 to 128"),
        ("others=yes", "others='yes': write 1 for yes or 0 for no"),
        ("question=" + (MAX_QUESTION + 1) * "a", f"it has 2001 characters. Shorten it to {MAX_QUESTION}"),
    ],
)
def test_a_wrong_value_is_named_and_the_pages_own_is_used(text, message, examples):
    settings, [problem] = read(text, examples)
    assert message in problem and len(problem) < 400
    assert settings == Settings("", None, thoughts=3, max_new_tokens=10, others=True)


def test_each_wrong_value_is_named(examples):
    settings, problems = read("thoughts=x&others=2&question=Which%3F&example=y", examples)
    assert len(problems) == 3 and settings.question == "Which?"


def test_reading_an_address_opens_no_file(examples, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a file was opened")

    text = f"example={path_of(examples[0])}&question={path_of(examples[0])}&thoughts=/etc/passwd"
    for owner, name in ((builtins, "open"), (io, "open"), (Path, "open"), (Path, "read_bytes"), (Path, "stat")):
        monkeypatch.setattr(owner, name, refuse)
    settings, problems = read(text, examples)
    monkeypatch.undo()
    assert len(problems) == 2 and settings.question == path_of(examples[0]) and settings.example is None


def test_a_picture_is_named_by_its_example(examples, tmp_path):
    first, second = examples[0], {**examples[0], "row_id": "the same picture", "question": "Another question?"}
    tiny_image(5).save(tmp_path / "mine.png")
    rows = [*examples, second]
    assert example_name(rows, path_of(first), "unknown") == first["row_id"]
    assert example_name(rows, path_of(first), "Another question?") == "the same picture"
    assert example_name(rows, str(tmp_path / "mine.png"), first["question"]) is None
    assert example_name(rows, None, first["question"]) is None


@pytest.mark.parametrize("question", ["", " \n", (MAX_QUESTION + 1) * "a"], ids=["none", "blank", "long"])
def test_a_question_that_no_link_can_hold_has_none(question):
    assert write_query(Settings(question, None, 3, 10, True)) == ""


def test_a_link_says_no_more_than_it_must():
    query = parse_qs(write_query(Settings("Which?", None, 3, 10, True)))
    assert query == {"question": ["Which?"], "thoughts": ["3"], "max_new_tokens": ["10"], "others": ["1"]}


def test_what_a_link_says_is_shown_as_text(examples):
    _, problems = read("example=<img src=x onerror=alert(1)>", examples)
    html = panels().from_link(problems)
    assert "<img" not in html and "&lt;img" in html and "Press Ask" in panels().from_link([])
