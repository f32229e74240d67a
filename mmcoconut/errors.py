"""Mistakes of whoever called, told in full: commands print them without a traceback, and end with status 2."""

import sys
from collections.abc import Callable
from pathlib import Path

from mmcoconut.explanations import Explanation, explain, explain_causes


DEBUG = "--debug"
USAGE_STATUS, INTERRUPTED_STATUS = 2, 130
# By command: how to go on after Ctrl-C.
RESUME = {
    "train": "If the run has saved a checkpoint, the same command with --resume_from_checkpoint true goes on from it; "
    "without one, start again with --overwrite true.",
    "compare": "The same command goes on: runs that are finished are kept.",
    "eval": "The same command goes on with the rows that are not answered yet.",
    "audit": "An audit is written at its end, so start it again; --max_samples takes fewer rows.",
    "prepare": "The same command goes on with the pictures that are missing.",
}


class UsageError(ValueError):
    """A mistake of whoever called, which its message tells in full: a command prints that, without a traceback."""


class RecipeError(UsageError):
    """Everything that is wrong with a recipe, a line each; `problems` holds it as (key, value found, remedy)."""

    def __init__(self, recipe: str, problems: list[tuple]):
        self.problems = list(problems)
        lines = [f"{key} = {value!r}: {' '.join(remedy.split())}" for key, value, remedy in self.problems]
        super().__init__("\n  - ".join([f"{recipe}: {len(lines)} problem(s)", *lines]))


def explanation_of(error: BaseException) -> Explanation | None:
    """What to tell whoever called about an error, and its HTTP status; None for a mistake in the code."""
    if not isinstance(error, UsageError):
        return explain(error)
    cause = explain_causes(error)
    return Explanation(str(error), 400 if cause is None else cause.status)


def is_missing_folder(name) -> bool:
    """Return True if a name is that of a folder which is not there, and cannot be meant as a Hub id.

    A path with a dot, a slash or a tilde in front is a folder's, and so is one whose first part is a folder here.
    """
    if not isinstance(name, str) or Path(name).is_dir():
        return False
    parent = Path(name).parent
    return name.startswith((".", "/", "~")) or Path(name).is_file() or (parent != Path(".") and parent.is_dir())


def split_debug(words: list[str]) -> tuple[list[str], bool]:
    """Return the words of a command line without a bare `--debug`, and whether it was among them.

    `--debug VALUE` is an argument of transformers' Trainer, and stays.

    >>> split_debug(["recipe.yaml", "--debug", "--seed", "1"])
    (['recipe.yaml', '--seed', '1'], True)
    >>> split_debug(["recipe.yaml", "--debug", "underflow_overflow"])
    (['recipe.yaml', '--debug', 'underflow_overflow'], False)
    """
    bare = [word == DEBUG and after.startswith("--") for word, after in zip(words, [*words[1:], "--"])]
    return [word for word, is_bare in zip(words, bare) if not is_bare], any(bare)


def run_command(main: Callable[[list[str]], object], argv: list[str] | None = None, *, name: str = "") -> None:
    """Run `main(argv)`; print a mistake of whoever called without a traceback, and end with status 2.

    A bare `--debug` among the words shows the traceback. Ctrl-C ends with status 130.

    Args:
        argv: words of the command line; default: those of this process.
        name: of the command, by which RESUME says how to go on after Ctrl-C.
    """
    words, debug = split_debug(sys.argv[1:] if argv is None else argv)
    try:
        main(words)
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"\nInterrupted. {RESUME.get(name, '')}".rstrip(), file=sys.stderr)
        raise SystemExit(INTERRUPTED_STATUS) from None
    except Exception as error:
        explanation = None if debug else explanation_of(error)
        if explanation is None:
            raise
        hint = "" if isinstance(error, UsageError) else f"\n({DEBUG} shows where it was raised.)"
        print(f"{explanation.text}{hint}", file=sys.stderr)
        raise SystemExit(USAGE_STATUS) from None
