"""Links to one question: the page's settings as query parameters of its address, and back.

    ?example=arrow_mazes+test+row+3&question=…&thoughts=7&max_new_tokens=64&others=1

A link is written by anyone, so every value is checked, and none is ever a path: a picture is named by its example,
which is looked up among the examples of this page.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlencode

from mmcoconut.audit.interventions import images_key
from mmcoconut.data import question_text
from mmcoconut.demo.one_question import with_bytes
from mmcoconut.errors import UsageError


MAX_QUESTION = 2000  # characters; browsers and servers cut longer addresses
YES_OR_NO = {"1": True, "0": False}
KEYS = ("example", "question", "thoughts", "max_new_tokens", "others")


@dataclass(frozen=True)
class Settings:
    """The settings of one question.

    question: its text. example: name of the example whose picture is used; None without one. thoughts,
    max_new_tokens: numbers of the sliders. others: ask again with other thoughts.
    """

    question: str
    example: str | None
    thoughts: int
    max_new_tokens: int
    others: bool


@dataclass(frozen=True)
class Limits:
    """The initial numbers of the two sliders, and the largest: of thoughts, and of tokens per answer."""

    thoughts: int
    max_new_tokens: int

    @property
    def most_thoughts(self) -> int:
        return max(8, 2 * self.thoughts)

    @property
    def most_new_tokens(self) -> int:
        return max(128, 2 * self.max_new_tokens)


def find_example(examples: Sequence[Mapping], name: str) -> Mapping:
    """Return the example of a name.

    Raises:
        UsageError: the page has no such example.
    """
    for row in examples:
        if row["row_id"] == name:
            return row
    known = ", ".join(row["row_id"] for row in examples) or "none"
    raise UsageError(f"example={name[:100]!r}: this page has no such example. Choose one of: {known}.")


def example_name(examples: Sequence[Mapping], picture: str | None, question: str) -> str | None:
    """Return the name of the example with a file's picture, if possible one with this question; None without one."""
    if picture is None:
        return None
    key = images_key({"images": [with_bytes(picture)]})
    same = [row for row in examples if images_key(row) == key]
    same.sort(key=lambda row: question_text(row) != question)
    return same[0]["row_id"] if same else None


def whole_number(text: str, key: str, low: int, high: int) -> int:
    """Return a number in ASCII digits.

    Raises:
        UsageError: no whole number from `low` to `high`.
    """
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(high))
    if not is_number or not low <= int(text) <= high:
        raise UsageError(f"{key}={text[:100]!r}: write a whole number from {low} to {high}.")
    return int(text)


def read_question(text: str) -> str:
    """Return a question.

    Raises:
        UsageError: it is too long for a link.
    """
    if len(text) > MAX_QUESTION:
        raise UsageError(f"question: it has {len(text)} characters. Shorten it to {MAX_QUESTION}.")
    return text


def read_yes_or_no(text: str, key: str) -> bool:
    """Return True for 1 and False for 0.

    Raises:
        UsageError: another value.
    """
    if text not in YES_OR_NO:
        raise UsageError(f"{key}={text[:100]!r}: write 1 for yes or 0 for no.")
    return YES_OR_NO[text]


def read_query(
    query: Mapping[str, str], examples: Sequence[Mapping], limits: Limits
) -> tuple[Settings, list[str]] | None:
    """Return the settings of an address, and what is wrong with it; None if it has no settings.

    A wrong value is replaced by the page's own. Without a question, that of the example is taken. Other parameters
    are ignored: some are gradio's.

    query: the parameters by name, such as `gr.Request.query_params`.
    """
    found = {key: str(query[key]) for key in KEYS if key in query}
    if not found:
        return None
    problems = []

    def value(key: str, read, default):
        if key not in found:
            return default
        try:
            return read(found[key])
        except UsageError as error:
            problems.append(str(error))
            return default

    example = value("example", lambda name: find_example(examples, name), None)
    own_question = "" if example is None else question_text(example)
    settings = Settings(
        question=value("question", read_question, own_question),
        example=None if example is None else example["row_id"],
        thoughts=value("thoughts", lambda n: whole_number(n, "thoughts", 0, limits.most_thoughts), limits.thoughts),
        max_new_tokens=value(
            "max_new_tokens",
            lambda n: whole_number(n, "max_new_tokens", 1, limits.most_new_tokens),
            limits.max_new_tokens,
        ),
        others=value("others", lambda text: read_yes_or_no(text, "others"), True),
    )
    return settings, problems


def write_query(settings: Settings) -> str:
    """Return the settings as the query of an address, without `?`; empty if the question is missing or too long."""
    if not settings.question.strip() or len(settings.question) > MAX_QUESTION:
        return ""
    values = {
        "example": settings.example,
        "question": settings.question,
        "thoughts": settings.thoughts,
        "max_new_tokens": settings.max_new_tokens,
        "others": int(settings.others),
    }
    return urlencode({key: value for key, value in values.items() if value is not None})
