"""The page's panels as HTML, and the functions of its buttons, which fill them one after the other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined

from mmcoconut.audit.report import data_uri
from mmcoconut.demo.conversation import Conversation, Turn
from mmcoconut.demo.one_question import Asked, Asker, row_of


PANELS = Path(__file__).with_name("panels.html")
TOP_K = 3  # tokens shown per thought
NO_CONVERSATION = "There is no answer yet. Ask a question first; a further question is about the same picture."


class Shown(NamedTuple):
    """The page's panels as HTML: earlier turns, answer, thoughts, answers with other thoughts; and what was said."""

    earlier: str
    answer: str
    thoughts: str
    others: str
    conversation: Conversation | None


def panels():
    """Return the macros of panels.html by name: functions that return HTML, with all texts escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "uri": data_uri,
        "percent": lambda share: f"{100 * share:.0f} %",
        "milliseconds": lambda seconds: f"{1000 * seconds:.0f}",
    }
    return environment.from_string(PANELS.read_text(encoding="utf-8")).module


def panel_of(html, name: str, compute: Callable[[], object], **options) -> str:
    """Return a result as a panel; in case of an error its message with the remedy."""
    try:
        return getattr(html, name)(compute(), **options)
    except ValueError as error:
        return html.message(str(error))


class Responder:
    """Answer the page's questions: yield its panels again whenever more is known.

    Args:
        asker: the checkpoint.
    """

    def __init__(self, asker: Asker):
        self.asker, self.html = asker, panels()

    def ask(
        self,
        picture: str | None,
        question: str,
        num_latents: float,
        max_new_tokens: float,
        with_others: bool,
        more: Sequence[str] | None = None,
    ) -> Iterator[Shown]:
        """Ask the first question of a conversation; more: files of further pictures."""
        numbers = {"num_latents": int(num_latents), "max_new_tokens": int(max_new_tokens)}
        try:
            row = row_of(question, picture, more or ())
            asked = self.asker.ask(row, **numbers)
        except ValueError as error:
            yield Shown("", self.html.message(str(error)), "", "", None)
            return
        yield from self.show(asked, Conversation(row["images"]), with_others)

    def ask_further(
        self,
        conversation: Conversation | None,
        question: str,
        num_latents: float,
        max_new_tokens: float,
        with_others: bool,
    ) -> Iterator[Shown]:
        """Ask a further question about the conversation's picture; without a conversation, say so."""
        if conversation is None:
            yield Shown("", self.html.message(NO_CONVERSATION), "", "", None)
            return
        numbers = {"num_latents": int(num_latents), "max_new_tokens": int(max_new_tokens)}
        try:
            asked = self.asker.ask(conversation.row_after(row_of(question, None)), **numbers)
        except ValueError as error:
            yield Shown(self.html.earlier(conversation.turns), self.html.message(str(error)), "", "", conversation)
            return
        yield from self.show(asked, conversation, with_others)

    def show(self, asked: Asked, before: Conversation, with_others: bool) -> Iterator[Shown]:
        """Yield the panels of an answered question, which follows the turns of `before`."""
        html, turn = self.html, Turn(asked.row["question"], asked.said)
        number = len(before.turns) + 1
        shown = Shown(
            earlier=html.earlier(before.turns),
            answer=html.answer(asked, number),
            thoughts=html.waiting("Reading the thoughts"),
            others="",
            conversation=before.with_turn(turn),
        )
        yield shown
        thoughts = panel_of(html, "thoughts", lambda: self.asker.look(asked, top_k=TOP_K), number=number)
        shown = shown._replace(thoughts=thoughts, conversation=before.with_turn(replace(turn, thoughts=thoughts)))
        if not with_others:
            yield shown
            return
        yield shown._replace(others=html.waiting("Asking again with other thoughts"))
        others = panel_of(html, "variants", lambda: self.asker.intervene(asked), number=number)
        yield shown._replace(others=others)
