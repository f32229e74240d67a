"""The commands of `mmcoconut`. Nothing heavy is imported before a command is known."""

import difflib
import importlib
import sys
from collections.abc import Callable
from typing import NamedTuple

from mmcoconut_cli import doctor


USAGE_STATUS = 2
OF_A_MODEL = "MODEL [--key value ...]"


class Command(NamedTuple):
    """Arguments and description of a command; `target` is the `module:function` that runs it with its words."""

    takes: str
    does: str
    target: str

    @property
    def is_light(self) -> bool:
        """True if the command is of this package, so that it runs without torch and transformers."""
        return self.target.startswith("mmcoconut_cli.")


COMMANDS = {
    "train": Command(
        "RECIPE [--key value ...]",
        "train a model; a recipe's name or file; on all GPUs",
        "mmcoconut.launching:train",
    ),
    "eval": Command(
        OF_A_MODEL,
        "answer a data set with a checkpoint, and score the answers",
        "mmcoconut.launching:evaluate",
    ),
    "compare": Command(
        "RECIPE A,B,... [--key value ...]",
        "train modes or objectives on the same rows; one table",
        "mmcoconut.launching:compare",
    ),
    "audit": Command(
        OF_A_MODEL,
        "test whether the answers depend on the thoughts",
        "mmcoconut.launching:audit",
    ),
    "demo": Command(OF_A_MODEL, "show answers and thoughts on a page in the browser", "mmcoconut.launching:demo"),
    "serve": Command(
        "MODEL [--port 8000 ...]", "answer requests of OpenAI's clients over HTTP", "mmcoconut.serve:main"
    ),
    "publish": Command(
        "MODEL --repo_id OWNER/NAME", "upload a finished run with its model card", "mmcoconut.launching:publish"
    ),
    "convert": Command(
        "coconut|vlm ...", "convert a checkpoint of another project or form", "mmcoconut.launching:convert"
    ),
    "ask": Command(
        'MODEL [--image FILE] "QUESTION"', "answer one question: answer, thoughts, time", "mmcoconut.ask:main"
    ),
    "recipes": Command("", "list the recipes", "mmcoconut_cli.recipes:main"),
    "doctor": Command("", "check versions, devices, optional packages and folders", "mmcoconut_cli.doctor:main"),
}


def help_text() -> str:
    """Return the help text of `mmcoconut --help`."""
    width = max(len(f"{name} {command.takes}") for name, command in COMMANDS.items())
    lines = [f"  {f'{name} {command.takes}':{width}}  {command.does}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mmcoconut COMMAND [...] [--debug]",
            "",
            "Continuous thoughts for vision-language models.",
            "",
            *lines,
            "",
            "mmcoconut COMMAND --help lists the options of a command. --debug shows the traceback of an error.",
        ]
    )


def refuse(text: str) -> None:
    """Print the problem of a command line, and end with status 2."""
    print(text, file=sys.stderr)
    raise SystemExit(USAGE_STATUS)


def load(target: str, debug: bool) -> tuple[Callable, Callable]:
    """Import `run_command` and a command's function; if that fails, print what is missing."""
    module, _, function = target.partition(":")
    try:
        run_command = importlib.import_module("mmcoconut.errors").run_command
        return run_command, getattr(importlib.import_module(module), function)
    except ImportError as error:
        if debug:
            raise
        refuse(f"mmcoconut cannot be loaded: {error}\nRun `mmcoconut doctor` to see what is missing or too old.")


def main(argv: list[str] | None = None) -> None:
    """Run a command: `mmcoconut COMMAND ...`.

    Raises:
        SystemExit: with status 2 for a user error, 130 after Ctrl-C, and a command's own.
    """
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(help_text())
        return
    if name == "--version":
        print(f"mmcoconut {doctor.installed('mmcoconut') or 'is not installed'}")
        return
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f" Did you mean {nearest[0]!r}?" if nearest else ""
        refuse(f"mmcoconut has no command {name!r}.{meant} mmcoconut --help lists the commands.")
    command = COMMANDS[name]
    if command.is_light:
        module, _, function = command.target.partition(":")
        raise SystemExit(getattr(importlib.import_module(module), function)(words))
    run_command, function = load(command.target, "--debug" in words)
    run_command(function, words, name=name)
