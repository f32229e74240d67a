"""Read a recipe's YAML, its bases and the words `--key value`, before keys have types.

A recipe with `base: other.yaml` holds only its differences from that file, which is in the same folder and may have
a base too.
"""

import difflib
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from mmcoconut.errors import RecipeError
from mmcoconut_cli.recipes import installed_recipes


VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
YAML_1_2_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
KEY_IN_A_REMEDY = re.compile(r"`(\w+)`")
BASE = "base"
WHERE_FILES_ARE = {
    "recipe": "the first argument is a YAML file",
    BASE: "a path starts at the recipe's own folder; `mmcoconut recipes` lists the names",
}


class RecipeLoader(yaml.SafeLoader):
    """Safe YAML loader that reads 1e-5 as a number (YAML 1.2) and records duplicate keys."""

    def __init__(self, stream):
        super().__init__(stream)
        self.duplicates = []

    def construct_mapping(self, node, deep=False):
        lines = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in lines:
                self.duplicates.append((key, f"line {line}", f"already set in line {lines[key]}: keep one"))
            lines[key] = line
        return super().construct_mapping(node, deep)


class RecipeDumper(yaml.SafeDumper):
    """Quote text that RecipeLoader would read as a number."""


for _class in (RecipeLoader, RecipeDumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", YAML_1_2_FLOAT, list("-+.0123456789"))


def scalar(value):
    """Return the YAML value of a text; text that is not YAML, and other types, are returned unchanged."""
    try:
        return yaml.load(value, RecipeLoader) if isinstance(value, str) else value
    except (yaml.YAMLError, ValueError):  # a ValueError is a date such as 2024-13-01
        return value


def read_overrides(words: list[str], problems: list[tuple]) -> dict:
    """Parse `--key value`, `--key=value`, `--key a b` (a list) and a bare `--key` (true)."""
    given, key = {}, None
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            given[key] = [value] if equals else []
        elif key is None:
            problems.append(("command line", word, "it precedes the first --key: remove it"))
        else:
            given[key].append(word)
    return {key: [*map(scalar, some)] if some[1:] else some[0] if some else True for key, some in given.items()}


def assign(values: dict, key: str, value, *, problems: list[tuple]) -> None:
    """Set values["a"]["b"] = value for the key a.b; entries of a mapping have no type, so text is read as YAML."""
    *parents, last = key.split(".")
    for parent in parents:
        values[parent] = {} if values.get(parent) is None else scalar(values[parent])
        if not isinstance(values[parent], dict):
            problems.append((key, value, f"`{parent}` is not a mapping"))
            return
        values = values[parent]
    values[last] = scalar(value) if parents else value


def expand(value, key: str, problems: list[tuple]):
    """Return `value` with ${VAR}, ${VAR:-default} and a leading ~ expanded, also inside mappings and lists."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        parts = {name: expand(item, f"{key}.{name}".lstrip("."), problems) for name, item in items}
        return parts if isinstance(value, dict) else [*parts.values()]
    if not isinstance(value, str):
        return value

    def substitute(match: re.Match) -> str:
        name, default = match.groups()
        if name not in os.environ and default is None:
            problems.append((key, value, f"set the environment variable {name}, or write ${{{name}:-default}}"))
        return os.environ.get(name) or default or ""

    expanded = VARIABLE.sub(substitute, value)
    expanded = os.path.expanduser(expanded) if expanded.startswith("~/") else expanded
    return scalar(expanded) if "." in key and expanded != value else expanded


def merge(far: dict, near: dict) -> dict:
    """Return `far` overridden by `near`, also inside mappings; None in `near` removes a key of `far`.

    >>> merge({"seed": 1, "mode": "cot", "sizes": {"a": 1, "b": 2}}, {"seed": 2, "mode": None, "sizes": {"b": 3}})
    {'seed': 2, 'sizes': {'a': 1, 'b': 3}}
    """
    merged = dict(far)
    for key, value in near.items():
        if value is None and key in far:
            del merged[key]
        elif isinstance(value, dict) and isinstance(far.get(key), dict):
            merged[key] = merge(far[key], value)
        else:
            merged[key] = value
    return merged


def _leaves(values: dict, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of each value that is not a mapping of others."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield *path, key


def _says(values, path: tuple) -> bool:
    for key in path:
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


def _refused(chain: tuple[str, ...], value, remedy: str, key: str = BASE) -> RecipeError:
    """Return the error of a file that cannot be read, with the chain of files."""
    way = f"; the files: {' → '.join(chain)}" if chain[1:] else ""
    return RecipeError(chain[0], [(key, value, remedy + way)])


def _read_file(chain: tuple[str, ...]) -> tuple[dict, list[tuple]]:
    """Return the values of the last file of the chain, and its duplicate keys."""
    file, key = chain[-1], BASE if chain[1:] else "recipe"
    if not Path(file).is_file():
        folder = Path(file).parent
        beside = [each.name for each in folder.glob("*.y*ml")] if folder.is_dir() else []
        close = difflib.get_close_matches(Path(file).name, beside, n=1)
        meant = f"; did you mean `{folder / close[0]}`?" if close else ""
        raise _refused(chain, file, f"no such file: {WHERE_FILES_ARE[key]}{meant}", key)
    try:
        loader = RecipeLoader(Path(file).read_text(encoding="utf-8"))
        values = loader.get_single_data() or {}
    except (yaml.YAMLError, ValueError) as error:
        raise _refused(chain, file, f"not YAML: {error}", key) from error
    if not isinstance(values, dict):
        raise _refused(chain, values, "expected lines of `key: value`", key)
    lines = [(key, f"{line} of {file}" if chain[1:] else line, remedy) for key, line, remedy in loader.duplicates]
    return {str(key): value for key, value in values.items()}, lines


def _base_of(chain: tuple[str, ...], base) -> str:
    """Return the file that the last file of the chain names as its base: next to it, or a recipe of this package."""
    problems = []
    path = expand(base, BASE, problems)
    if problems:
        raise _refused(chain, base, problems[0][-1])
    if not isinstance(path, str):
        raise _refused(chain, base, "expected the path of one recipe")
    file = str(Path(chain[-1]).parent / path)
    if not Path(file).is_file() and Path(path).name == path:
        file = str(installed_recipes().get(path.removesuffix(".yaml"), file))
    if Path(file).resolve() in [Path(earlier).resolve() for earlier in chain]:
        raise _refused((*chain, file), base, "a recipe cannot be a base of itself: remove one of these lines")
    return file


def _read_chain(chain: tuple[str, ...]) -> list[tuple[str, dict, list]]:
    """Return the last file of the chain and its bases, nearest first: name, values, duplicate keys."""
    values, twice = _read_file(chain)
    base = values.pop(BASE, None)
    bases = [] if base is None else _read_chain((*chain, _base_of(chain, base)))
    return [(chain[-1], values, twice), *bases]


def located(recipe: str) -> str:
    """Return the file of a recipe: an existing path unchanged, otherwise the recipe of this name in the package.

    Raises:
        RecipeError: neither a file nor a recipe of this package.
    """
    if Path(recipe).is_file() or not recipe or Path(recipe).name != recipe or Path(recipe).suffix:
        return recipe
    known = installed_recipes()
    if recipe in known:
        return str(known[recipe])
    nearest = difflib.get_close_matches(recipe, known, n=1)
    meant = f"; did you mean `{nearest[0]}`?" if nearest else ""
    remedy = f"neither a file nor a recipe of this package{meant or '.'} `mmcoconut recipes` lists these"
    raise RecipeError(recipe, [("recipe", recipe, remedy)])


class MergedRecipe(NamedTuple):
    """A recipe merged with its bases: values, the file of each value (nested ones as a.b), and problems."""

    values: dict
    sources: dict[str, str]
    problems: list[tuple]


def read_recipe_file(recipe: str) -> MergedRecipe:
    """Read a recipe and complete it key by key from its bases.

    Raises:
        RecipeError: a file is missing or holds no mapping, or is a base of itself; names the chain of files.
    """
    files = _read_chain((located(recipe),))
    merged = functools.reduce(merge, [values for _, values, _ in reversed(files)])
    sources = {
        ".".join(map(str, path)): next(file for file, values, _ in files if _says(values, path))
        for path in _leaves(merged)
    }
    return MergedRecipe(merged, sources, [problem for _, _, twice in files for problem in twice])


def forget_sources(sources: dict[str, str], keys) -> None:
    """Remove the sources of these keys and of the values inside them."""
    for name in [*sources]:
        if any(name == key or name.startswith(f"{key}.") for key in keys):
            del sources[name]


def name_sources(problems: list[tuple], sources: dict[str, str], recipe: str) -> list[tuple]:
    """Return the problems, with the files of their keys unless that is the recipe itself."""
    named = []
    for key, value, remedy in problems:
        for name in dict.fromkeys([key, *KEY_IN_A_REMEDY.findall(remedy)]):
            inside = (leaf for leaf in sources if f"{leaf}.".startswith(f"{name}.") or name.startswith(f"{leaf}."))
            files = dict.fromkeys(sources[leaf] for leaf in inside)
            if files.keys() - {recipe}:
                remedy += f"; `{name}` is set in {', '.join(files)}"
        named.append((key, value, remedy))
    return named
