"""`mmcoconut recipes`: list the installed recipes, one per line."""

import importlib.util
import re
import shutil
import textwrap
from pathlib import Path


def folder() -> Path:
    """Return the folder of the recipes, in the installed package or in its checkout.

    Raises:
        FileNotFoundError: the recipes are not installed.
    """
    spec = importlib.util.find_spec("mmcoconut")
    roots = [] if spec is None else [Path(spec.origin).parent, Path(spec.origin).parent.parent]
    found = next((root / "recipes" for root in roots if (root / "recipes" / "quickstart.yaml").is_file()), None)
    if found is None:
        raise FileNotFoundError("The recipes are not installed: install mmcoconut again.")
    return found


def installed_recipes() -> dict[str, Path]:
    """Return the files of the recipes by name.

    Raises:
        FileNotFoundError: the recipes are not installed.
    """
    return {file.stem: file for file in sorted(folder().glob("*.yaml"))}


def sentence_of(recipe: Path) -> str:
    """Return the first sentence of a recipe's comment, which says what it trains."""
    lines = [line.removeprefix("#").strip() for line in recipe.read_text(encoding="utf-8").splitlines()]
    comment = " ".join(lines[: next((index for index, line in enumerate(lines) if re.match(r"\w+:", line)), None)])
    return re.split(r"(?<=\.)\s(?=[A-Z$])", comment, maxsplit=1)[0]


def main(words: list[str]) -> int:
    """Print every recipe's name and what it trains; return the exit status."""
    if {"-h", "--help"} & {*words}:
        print("usage: mmcoconut recipes\n\nList the recipes by name. mmcoconut train NAME runs one.")
        return 0
    try:
        found = installed_recipes()
    except FileNotFoundError as error:
        print(error)
        return 1
    names = max(map(len, found))
    room = max(30, shutil.get_terminal_size((119, 24)).columns - names - 2)
    for name, file in found.items():
        print(f"{name:{names}}  {textwrap.shorten(sentence_of(file), room, placeholder=' …')}")
    print(f"\nThe files are in {folder()}. Start one with: mmcoconut train quickstart")
    return 0
