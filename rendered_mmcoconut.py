"""Rendered chats given as text, told from plain questions by their type or by the control tokens in them.

A text is a rendered chat if it is a `RenderedPrompt`, or if it holds control tokens of the tokenizer and all of it is
what the chat template writes (`RenderedForm`). Everything else is a question.
"""

import re
from collections.abc import Sequence
from functools import partial

from .chat_template_mmcoconut import control_tokens_of, quoted, render, without_images
from .configuration_mmcoconut import END_LATENT_TOKEN, LATENT_TOKEN, START_LATENT_TOKEN


# What user, assistant and user say in a chat that shows what stands between: no characters, so in no template.
SAMPLES = ("\ufdd5", "\ufdd6", "\ufdd7")


class RenderedPrompt(str):
    """A chat as `apply_chat_template(tokenize=False)` renders it; its control tokens are meant.

    So are those of its slices, and of text that is added in front of it or behind it.
    """

    def __getitem__(self, place) -> "RenderedPrompt":
        return RenderedPrompt(str.__getitem__(self, place))

    def __add__(self, other: str) -> "RenderedPrompt":
        return RenderedPrompt(str(self) + other)

    def __radd__(self, other: str) -> "RenderedPrompt":
        return RenderedPrompt(other + str(self))

    def __reduce__(self):
        return RenderedPrompt, (str(self),)


def rendered_prompt(
    tokenizer, chat_template: str, chat: Sequence[dict], variables: dict, *, sanitized: bool
) -> RenderedPrompt:
    """Return a chat of `conversations_of` as text.

    Raises:
        ValueError: a control token in it, if it is to be sanitized.
    """
    said = quoted([without_images(chat), variables], None)
    if sanitized and quoted(said, control_tokens_of(tokenizer, chat_template)) != said:
        raise ValueError(
            "A message contains the string of a special token, which rendered text cannot tell from a real one: "
            "call apply_chat_template with tokenize=True, return_dict=True."
        )
    return RenderedPrompt(render(tokenizer, chat_template, *said)[0])


class RenderedForm:
    """The form of a chat that a template rendered, by which a copy that is a plain string is recognized.

    Turns of user and assistant in order behind what the template begins with, complete thoughts, of any number, in
    front of every answer, and no other control token but those of images in what a user says. The last answer may be
    open, with or without an end token. Image tokens alone are a chat too, for serving engines measure images with
    them. Where image tokens are the only control tokens, images must be given.

    Over a template that leaves texts out, writes them twice or writes nothing between turns no string is known.
    """

    def __init__(self, tokenizer, chat_template: str, *, markers: str, image_token: str, with_images: bool):
        self.control = control_tokens_of(tokenizer, chat_template)
        self.image_token, self.with_images = image_token, with_images
        roles = ("user", "assistant", "user")
        chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in zip(roles, SAMPLES)]
        layout = {"markers": "none", "num_latents": 0}
        whole, begun, finished = (
            render(tokenizer, chat_template, messages, {**layout, "add_generation_prompt": begins})[0]
            for messages, begins in ((chat, False), (chat, True), (chat[:2], False))
        )
        self.is_known = all(text.count(sample) == 1 for text in (whole, begun) for sample in SAMPLES)
        if not self.is_known:
            return
        self.opening, answering, self.asking, asked = re.split("|".join(SAMPLES), whole)
        self.is_known = self.asking != ""
        begun, self.answered = begun.partition(SAMPLES[2])[2], finished.partition(SAMPLES[1])[2]
        self.turn, self.last = self.patterns(answering, asked, begun, tokenizer.eos_token, markers)

    def patterns(self, answering: str, asked: str, begun: str, end: str, markers: str) -> tuple[str, str]:
        """Match a question with its answer, and what stands behind the last answer that is followed by a question."""
        start, latent, stop = map(re.escape, (START_LATENT_TOKEN, LATENT_TOKEN, END_LATENT_TOKEN))
        thoughts = f"{start * (markers != 'none')}(?:{latent})*{stop * (markers == 'both')}"
        answer = opened = f"(?:(?!{self.control.pattern}).)*"
        question = f"(?:{re.escape(self.image_token)}|(?!{self.control.pattern}).)*"
        if markers == "none" and not self.control.search(begun):
            # Without a token in front of it an open answer could be the last line of a question.
            opened = f"(?:(?<={latent}){answer})?"
        answering, asked, begun, answered, end = map(re.escape, (answering, asked, begun, self.answered, end))
        turn = f"{question}{answering}{thoughts}{answer}"
        return (
            turn,
            f"{question}(?:{asked}|{begun}{thoughts}{opened}(?:{end})?|{answering}{thoughts}{answer}{answered})",
        )

    def fits(self, text: str) -> bool:
        """Return True if all of a text is a chat of the template."""
        found = set(self.control.findall(text))
        if not found or (found == {self.image_token} and not self.with_images):
            return False
        if not text.replace(self.image_token, ""):
            return True
        body = self.without_opening(text) if self.is_known else None
        if body is None:
            return False
        *turns, last = body.split(self.asking)
        patterns = [self.turn] * len(turns) + [self.last]
        if not last and turns and self.asking == self.answered:
            turns, last, patterns = turns[:-1], turns[-1], patterns[:-1]
        matches = partial(re.fullmatch, flags=re.DOTALL)
        return all(map(matches, patterns, [*turns, last]))

    def without_opening(self, text: str) -> str | None:
        """Return a text without what the template writes before the first question, None if it does not begin so.

        Between the first control token of that and the last one a chat may have a system prompt of its own.
        """
        tokens = [*self.control.finditer(self.opening)]
        first = self.opening[: tokens[0].end()] if tokens else ""
        last = self.opening[tokens[-1].start() :] if tokens else self.opening
        _, found, rest = text.partition(last) if last else ("", "", text)
        return rest if text.startswith(first) and found == last else None
