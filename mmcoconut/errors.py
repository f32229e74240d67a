"""User errors with complete messages: commands print them without a traceback, and end with status 2."""

import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from mmcoconut.explanations import Explanation, explain, explain_causes, message_of_worker


DEBUG = "--debug"
DEBUG_VARIABLE = "MMCOCONUT_DEBUG"  # set by --debug, for the processes that a command starts
DEBUG_VALUES = ("underflow_overflow", "tpu_metrics_debug")  # of the Trainer's argument of the same name
USAGE_STATUS, INTERRUPTED_STATUS = 2, 130
# By command: how to resume after Ctrl-C.
RESUME = {
    "train": "If the run has saved a checkpoint, resume it with the same command and --resume_from_checkpoint true; "
    "without one, start again with --overwrite true.",
    "compare": "The same command resumes it: finished runs are kept.",
    "eval": "The same command resumes it with the rows that are not answered yet.",
    "audit": "An audit is written at its end. Start it again; --max_samples uses fewer rows.",
    "prepare": "The same command resumes it with the missing pictures.",
}


class UsageError(ValueError):
    """A mistake of the user. Its message is complete: commands print it without a traceback."""


class RecipeError(UsageError):
    """All problems of a recipe, one line each; `problems` holds them as (key, value found, remedy)."""

    def __init__(self, recipe: str, problems: list[tuple]):
        self.problems = list(problems)
        lines = [f"{key} = {value!r}: {' '.join(remedy.split())}" for key, value, remedy in self.problems]
        super().__init__("\n  - ".join([f"{recipe}: {len(lines)} problem(s)", *lines]))


def explanation_of(error: BaseException) -> Explanation | None:
    """Return the explanation of an error for the user, with its HTTP status; None for a bug in the code."""
    message = message_of_worker(error)
    if message is not None:
        return Explanation(message)
    if not isinstance(error, UsageError):
        return explain(error)
    cause = explain_causes(error)
    return Explanation(str(error), 400 if cause is None else cause.status)


def is_missing_folder(name) -> bool:
    """Return True if a name is a missing folder, and cannot be a Hub id.

    A path that begins with a dot, slash or tilde is a folder, and so is one whose first part is an existing folder.
    """
    if not isinstance(name, str) or Path(name).is_dir():
        return False
    parent = Path(name).parent
    return name.startswith((".", "/", "~")) or Path(name).is_file() or (parent != Path(".") and parent.is_dir())


def folder_remedy(name: str) -> str:
    """Return what to do about a missing folder: the folder beside it with the most similar name, if there is one."""
    parent = Path(name).parent
    beside = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    close = difflib.get_close_matches(Path(name).name, beside, n=1)
    hint = f"did you mean {str(parent / close[0])!r}? " if close else ""
    return f"{hint}give an existing folder or a Hub id"


def split_debug(words: list[str]) -> tuple[list[str], bool]:
    """Return the words of a command line without a bare `--debug`, and whether it was among them.

    `--debug VALUE` is an argument of transformers' Trainer, and is kept if the value is one of DEBUG_VALUES.

    >>> split_debug(["recipe.yaml", "--debug", "--seed", "1"])
    (['recipe.yaml', '--seed', '1'], True)
    >>> split_debug(["recipe.yaml", "--debug", "underflow_overflow"])
    (['recipe.yaml', '--debug', 'underflow_overflow'], False)
    """
    bare = [
        word == DEBUG and not {*after.replace(",", " ").split()} & {*DEBUG_VALUES}
        for word, after in zip(words, [*words[1:], ""])
    ]
    return [word for word, is_bare in zip(words, bare) if not is_bare], any(bare)


def run_command(main: Callable[[list[str]], object], argv: list[str] | None = None, *, name: str = "") -> None:
    """Run `main(argv)`; print a user error without a traceback, and end with status 2.

    A bare `--debug` among the words shows the traceback, also of the processes that the command starts. Ctrl-C ends
    with status 130.

    Args:
        argv: words of the command line; default: those of this process.
        name: command name, for the hint of RESUME after Ctrl-C.
    """
    words, asked = split_debug(sys.argv[1:] if argv is None else argv)
    inherited = DEBUG_VARIABLE in os.environ
    debug = asked or inherited
    try:
        if debug:
            os.environ[DEBUG_VARIABLE] = "1"
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
    finally:
        if not inherited:
            os.environ.pop(DEBUG_VARIABLE, None)
