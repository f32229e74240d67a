"""The same thoughts, and less beside them: answers that see only the thoughts, and positions that hold none.

Interventions ask whether thoughts matter. These ask whether they carry what the answer needs, with the direct way from
question and image to the answer closed, and whether their columns would do without anything fed back.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from mmcoconut.audit.interventions import MOSTLY, Outcome, Study
from mmcoconut.chat_template_mmcoconut import ANSWER_MARKER


@contextmanager
def with_field(config, name: str, value) -> Iterator[None]:
    """Inside, a field of a configuration has this value; afterwards the one that it had."""
    before = getattr(config, name)
    setattr(config, name, value)
    try:
        yield
    finally:
        setattr(config, name, before)


def seeing(model, sees: str) -> AbstractContextManager[None]:
    """Inside, all that is written behind the last thought sees only so much of what stands before it.

    Args:
        sees: `all`, `no_image` or `thoughts`, see `answer_sees` in the model's configuration.

    Raises:
        ValueError: by the calls inside, of a model that cannot hide it; the message names answer_sees.
    """
    return with_field(model.config, "answer_sees", sees)


@contextmanager
def feeding_nothing(model) -> Iterator[None]:
    """Inside, latents keep the embedding of their token and nothing is fed back, as with `thought_mode: pause`.

    Thoughts that are updated together start as that embedding too, so the schedule makes no difference here.
    """
    with with_field(model.config, "thought_schedule", "sequential"), with_field(model.config, "thought_mode", "pause"):
        yield


ONLY_THOUGHTS = ("only_thoughts", "the answer sees only the thoughts")


def refusal(what: str, error: ValueError) -> str:
    """Return what a model said that cannot hide something; raise any other error."""
    if "answer_sees" not in str(error):
        raise error
    return f"{what}: {str(error).rstrip('.')}"


def hidden(study: Study, name: str, description: str, *, sees: str) -> Outcome | str:
    """Return the outcome of answers that see only so much, or why the model cannot hide the rest.

    Where the untouched answers see no more either, these are they. Where the model only loses its form, so that most
    rows have no answer that had one, each answer is begun for it: what is asked is what it knows.
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
    """Keep the thoughts, and hide from the answer all else that stands before it."""
    return hidden(study, *ONLY_THOUGHTS, sees="thoughts")


def no_image(study: Study) -> Outcome | str:
    """Keep the thoughts and the question, and hide the image from the answer (CVRR, https://arxiv.org/abs/2609.06746).

    Columns of the question that stand behind an image have seen it, and the answer sees them.
    """
    if 0 in map(len, (row["images"] for row in study.rows)):
        return "no_image was not run: some rows have no image"
    return hidden(study, "no_image", "the answer does not see the image", sees="no_image")


def own_embedding(study: Study) -> Outcome:
    """Keep the columns, and put no thoughts in them: `thought_mode: pause`, in a model trained with thoughts."""
    answers = study.run(around=feeding_nothing(study.answerer.model))
    return study.outcome("own_embedding", "extra positions only: nothing is fed back", answers)
