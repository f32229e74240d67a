"""What a recipe's YAML and the words `--key value` say, before any key has a type: reading, variables, mistakes."""

import os
import re
from pathlib import Path

import yaml


VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
YAML_1_2_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, a line each; `problems` holds it as (key, value found, remedy)."""

    def __init__(self, recipe: str, problems: list[tuple]):
        self.problems = list(problems)
        lines = [f"{key} = {value!r}: {' '.join(remedy.split())}" for key, value, remedy in self.problems]
        super().__init__("\n  - ".join([f"{recipe}: {len(lines)} problem(s)", *lines]))


class RecipeLoader(yaml.SafeLoader):
    """Safe YAML that reads 1e-5 as a number (YAML 1.2) and notes the keys that are written twice."""

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
    """Quotes the text that RecipeLoader would read as a number."""


for _class in (RecipeLoader, RecipeDumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", YAML_1_2_FLOAT, list("-+.0123456789"))


def scalar(value):
    """What text means as YAML; text that is not YAML, and what is not text, stands for itself."""
    try:
        return yaml.load(value, RecipeLoader) if isinstance(value, str) else value
    except (yaml.YAMLError, ValueError):  # a ValueError is a date such as 2024-13-01
        return value


def read_file(recipe: str, problems: list[tuple]) -> dict:
    if not Path(recipe).is_file():
        raise RecipeError(recipe, [("recipe", recipe, "no such file: the first argument is a YAML file")])
    try:
        loader = RecipeLoader(Path(recipe).read_text(encoding="utf-8"))
        values = loader.get_single_data() or {}
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(recipe, [("recipe", recipe, f"not YAML: {error}")]) from error
    if not isinstance(values, dict):
        raise RecipeError(recipe, [("recipe", values, "expected lines of `key: value`")])
    problems += loader.duplicates
    return {str(key): value for key, value in values.items()}


def read_overrides(words: list[str], problems: list[tuple]) -> dict:
    """`--key value`, `--key=value`, `--key a b` (a list) and a bare `--key` (true)."""
    given, key = {}, None
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            given[key] = [value] if equals else []
        elif key is None:
            problems.append(("command line", word, "stands before the first --key"))
        else:
            given[key].append(word)
    return {key: [*map(scalar, some)] if some[1:] else some[0] if some else True for key, some in given.items()}


def assign(values: dict, key: str, value, *, problems: list[tuple]) -> None:
    """values["a"]["b"] = value for the key a.b; what stands inside a mapping has no type, so text is read as YAML."""
    *parents, last = key.split(".")
    for parent in parents:
        values[parent] = {} if values.get(parent) is None else scalar(values[parent])
        if not isinstance(values[parent], dict):
            problems.append((key, value, f"`{parent}` is not a mapping"))
            return
        values = values[parent]
    values[last] = scalar(value) if parents else value


def expand(value, key: str, problems: list[tuple]):
    """`value` with ${VAR}, ${VAR:-default} and a leading ~ replaced, also inside mappings and lists."""
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
