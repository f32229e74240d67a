"""The objectives by the names that recipes give them, and what a recipe's `objectives` becomes.

objectives: {step_tokens: 0.05, step_decoder: {weight: [0, 1.0], layers: 1}}
"""

import inspect
import math
from collections.abc import Iterator, Mapping

from mmcoconut.data import nearest
from mmcoconut.objectives.base import Objective
from mmcoconut.objectives.image_alignment import ImageAlignment
from mmcoconut.objectives.self_distillation import SelfDistillation
from mmcoconut.objectives.step_decoder import StepDecoder
from mmcoconut.objectives.step_tokens import StepTokens


OBJECTIVES = {objective.name: objective for objective in (StepTokens, StepDecoder, SelfDistillation, ImageAlignment)}
A_WEIGHT = "a weight is a finite number of at least 0, or a list of them, one a stage: write one, such as 1.0"


def options_of(setting) -> dict:
    """Return the arguments of an objective that a recipe says: a weight, weights by stage, or a mapping of options.

    >>> options_of(0.5), options_of([0, 1.0]), options_of({"weight": 1.0}), options_of({})
    ({'weight': 0.5}, {'weight': [0, 1.0]}, {'weight': 1.0}, {})
    """
    return dict(setting) if isinstance(setting, Mapping) else {"weight": setting}


def is_weight(value) -> bool:
    """Return True for a finite number of at least 0, or a list of some."""
    numbers = value if isinstance(value, list) and value else [value]
    is_number = [isinstance(number, int | float) and not isinstance(number, bool) for number in numbers]
    return all(is_number) and all(math.isfinite(number) and number >= 0 for number in numbers)


def make_objective(name: str, setting) -> Objective:
    """Return the objective of a name in OBJECTIVES with what a recipe says of it; its modules are not built."""
    return OBJECTIVES[name](**options_of(setting))


def make_objectives(objectives: Mapping | None) -> list[Objective]:
    """Return the objectives of a recipe that have a weight at any stage."""
    made = [make_objective(name, setting) for name, setting in (objectives or {}).items()]
    return [objective for objective in made if objective.is_used]


def objective_problems(objectives: Mapping) -> Iterator[tuple]:
    """Yield what is wrong with a recipe's `objectives`, as (key, value found, remedy).

    >>> for key, value, remedy in objective_problems({"step_token": 1.0, "step_tokens": {"weight": "much"}}):
    ...     print(f"{key} = {value!r}: {remedy}")  # doctest: +ELLIPSIS
    objectives.step_token = 1.0: no such objective; did you mean 'step_tokens'? ...
    objectives.step_tokens.weight = 'much': a weight is a finite number of at least 0, ...
    """
    for name, setting in objectives.items():
        if name in OBJECTIVES:
            yield from _option_problems(name, setting)
        else:
            yield f"objectives.{name}", setting, f"no such objective; {nearest(name, OBJECTIVES)}"


def _option_problems(name: str, setting) -> Iterator[tuple]:
    """Yield what is wrong with the weight and the options of one objective."""
    key, options = f"objectives.{name}", options_of(setting)
    known = [*inspect.signature(OBJECTIVES[name]).parameters]
    found = [
        (f"{key}.{option}", options[option], f"no such option; {nearest(option, known)}")
        for option in options
        if option not in known
    ]
    if not is_weight(options.get("weight", 1.0)):
        found.append((f"{key}.weight" if isinstance(setting, Mapping) else key, options["weight"], A_WEIGHT))
    yield from found
    if found:
        return
    try:
        make_objective(name, setting)
    except (ValueError, TypeError) as error:  # of a value that only the objective knows
        yield key, setting, str(error)
