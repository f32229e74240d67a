"""Convert values of a recipe to the types of their fields, within their choices and limits."""

import difflib
import math
from enum import EnumMeta
from typing import TypedDict, get_args

from huggingface_hub.dataclasses import StrictDataclassFieldValidationError, validate_typed_dict

from mmcoconut.arguments.choices import CHOICES, LIMITS, NOT_THERE
from mmcoconut.arguments.recipe_files import scalar


def did_you_mean(word, words) -> str:
    close = difflib.get_close_matches(str(word), list(words), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _choices(key: str, kind) -> tuple:
    enums = [part for part in get_args(kind) if isinstance(part, EnumMeta)]
    return CHOICES.get(key) or tuple(member.value for enum in enums for member in enum)


def typed_value(key: str, value, kind):
    """Return `value` as the type `kind` of the field `key`, within its choices and limits; ValueError with the remedy.

    Words on the command line and in variables have no type: the first interpretation that fits the field is used.
    """
    choices, (low, high) = _choices(key, kind), LIMITS.get(key, (-math.inf, math.inf))
    if value is None and type(None) in get_args(kind):
        return None
    field = TypedDict("Given", {key: kind}, total=False)
    if value is False and "no" in choices:  # YAML 1.1 reads a bare `no` as false
        value = "no"
    if isinstance(value, str) and (key, value) in NOT_THERE:
        raise ValueError(NOT_THERE[key, value])
    if choices and value not in choices:
        raise ValueError(f"choose one of {', '.join(choices)}{did_you_mean(value, choices)}")
    meanings = [scalar(value), value, [value]]
    if type(meanings[0]) in (int, float):
        meanings += [float(meanings[0])] + [int(meanings[0])] * float(meanings[0]).is_integer()
    for meaning in meanings:
        try:
            validate_typed_dict(field, {key: meaning})
            break
        except StrictDataclassFieldValidationError:
            continue
    else:
        raise ValueError(f"expected {kind.__name__ if isinstance(kind, type) else kind}")
    numbers = meaning if isinstance(meaning, list) else [meaning]
    if key in LIMITS and meaning is not None and not (numbers and all(low <= number <= high for number in numbers)):
        raise ValueError(f"must lie between {low} and {high}")
    return meaning


def as_types(values: dict, types: dict, problems: list[tuple], *, others=()) -> dict:
    """Return the values as the types of their fields; `others` are further names for hints on unknown keys."""
    typed = {}
    for key, value in values.items():
        try:
            if key not in types:
                raise ValueError(f"no such key{did_you_mean(key, {*types, *others})}")
            typed[key] = typed_value(key, value, types[key])
        except ValueError as error:
            problems.append((key, value, str(error)))
    return typed
