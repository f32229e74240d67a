"""Necessity: answers that see only the thoughts, and positions without thoughts.

Interventions test whether thoughts matter. This file tests whether they are sufficient: the answer cannot attend to
question and image directly. It also tests whether their columns suffice without anything fed back.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from mmcoconut.audit.interventions import MOSTLY, Outcome, Study
from mmcoconut.chat_template_mmcoconut import ANSWER_MARKER


@contextmanager
def with_field(config, name: str, value) -> Iterator[None]:
    """Set a field of a configuration inside this context, and restore it afterwards."""
    before = getattr(config, name)
    setattr(config, name, value)
    try:
        yield
    finally:
        setattr(config, name, before)


def seeing(model, sees: str) -> AbstractContextManager[None]:
    """Restrict inside this context what all columns after the last thought see.

    Args:
        sees: `all`, `no_image` or `thoughts`, see `answer_sees` in the model's configuration.

    Raises:
        ValueError: by calls inside, if the model cannot hide it; the message names answer_sees.
    """
    return with_field(model.config, "answer_sees", sees)


@contextmanager
def feeding_nothing(model) -> Iterator[None]:
    """Feed nothing back inside this context: latents keep their token's embedding (`thought_mode: pause`).

    Parallel thoughts start as that embedding too, so the schedule makes no difference here.
    """
    with with_field(model.config, "thought_schedule", "sequential"), with_field(model.config, "thought_mode", "pause"):
        yield


ONLY_THOUGHTS = ("only_thoughts", "the answer sees only the thoughts")


def refusal(what: str, error: ValueError) -> str:
    """Return the message of a model that cannot hide something; raise any other error."""
    if "answer_sees" not in str(error):
        raise error
    return f"{what}: {str(error).rstrip('.')}"


def hidden(study: Study, name: str, description: str, *, sees: str) -> Outcome | str:
    """Return the outcome of answers with a restricted view, or why the model cannot hide the rest.

    If the untouched answers see no more either, they are reused. If the model only loses the answer's format, so that
    most rows lose their answer, each answer is started with the marker: the test is about content, not format.
    """
    if study.answerer.model.config.answer_sees in (sees, "thoughts"):
        return study.outcome(name, description, study.untouched)
    try:
        answers = study.run(around=seeing(study.answerer.model, sees))
        if answers.share_empty > max(MOSTLY, study.untouched.share_empty):
            begun = study.answerer.with_count(study.answerer.num_latents, begin_with=ANSWER_MARKER)
            answers = study.run(around=seeing(study.answerer.model, sees), answerer=begun)
            description += f" and is begun with {ANSWER_MARKER}"
    except ValueError as error:
        return refusal(f"{name} was not run", error)
    return study.outcome(name, description, answers)


def only_thoughts(study: Study) -> Outcome | str:
    """Keep the thoughts, and hide everything else before the answer from it."""
    return hidden(study, *ONLY_THOUGHTS, sees="thoughts")


def no_image(study: Study) -> Outcome | str:
    """Keep the thoughts and the question, and hide the image from the answer (CVRR, https://arxiv.org/abs/2609.06746).

    The answer still sees question columns after an image, which have seen the image.
    """
    if 0 in map(len, (row["images"] for row in study.rows)):
        return "no_image was not run: some rows have no image"
    return hidden(study, "no_image", "the answer does not see the image", sees="no_image")


def own_embedding(study: Study) -> Outcome:
    """Keep the latent columns without thoughts: `thought_mode: pause`, in a model trained with thoughts."""
    answers = study.run(around=feeding_nothing(study.answerer.model))
    return study.outcome("own_embedding", "extra positions only: nothing is fed back", answers)
