"""Mistakes of whoever called, told in full: commands print them without a traceback."""

from pathlib import Path


class UsageError(ValueError):
    """A mistake of whoever called, which its message tells in full: a command prints that, without a traceback."""


class RecipeError(UsageError):
    """Everything that is wrong with a recipe, a line each; `problems` holds it as (key, value found, remedy)."""

    def __init__(self, recipe: str, problems: list[tuple]):
        self.problems = list(problems)
        lines = [f"{key} = {value!r}: {' '.join(remedy.split())}" for key, value, remedy in self.problems]
        super().__init__("\n  - ".join([f"{recipe}: {len(lines)} problem(s)", *lines]))


def is_missing_folder(name) -> bool:
    """Return True if a name is that of a folder which is not there, and cannot be meant as a Hub id.

    A path with a dot, a slash or a tilde in front is a folder's, and so is one whose first part is a folder here.
    """
    if not isinstance(name, str) or Path(name).is_dir():
        return False
    parent = Path(name).parent
    return name.startswith((".", "/", "~")) or Path(name).is_file() or (parent != Path(".") and parent.is_dir())


def run_command(main) -> None:
    """Run main(); what is wrong with a recipe, a command line or a name is printed without a traceback."""
    try:
        main()
    except UsageError as error:
        raise SystemExit(str(error)) from None
