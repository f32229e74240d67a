"""Objectives by their names in recipes, and how a recipe's `objectives` is parsed.

objectives: {step_tokens: 0.05, step_decoder: {weight: [0, 1.0], layers: 1}}
"""

import importlib
import inspect
import math
from collections.abc import Iterator, Mapping
from itertools import permutations

from mmcoconut.data import nearest
from mmcoconut.objectives.base import Objective
from mmcoconut.objectives.image_alignment import ImageAlignment
from mmcoconut.objectives.self_distillation import SelfDistillation
from mmcoconut.objectives.step_decoder import StepDecoder
from mmcoconut.objectives.step_tokens import StepTokens


OBJECTIVES = {objective.name: objective for objective in (StepTokens, StepDecoder, SelfDistillation, ImageAlignment)}
TAKEN = ("steps", "places", "answer_column", "ce", "align")  # names used by other parts of a batch or of the loss
A_WEIGHT = "a weight is a finite number of at least 0, or a list of them, one per stage: write one, such as 1.0"


def objective_class(name: str) -> type[Objective]:
    """Return the objective class of a name in OBJECTIVES, or a user's own by `package.module:Class`.

    >>> objective_class("step_tokens").__name__, objective_class("mmcoconut.objectives.step_tokens:StepTokens").name
    ('StepTokens', 'step_tokens')

    Raises:
        ValueError: there is no such name, module or class, or the class is no Objective with a free name.
    """
    if ":" not in name:
        if name not in OBJECTIVES:
            raise ValueError(f"no such objective; {nearest(name, OBJECTIVES)}; or name a class, package.module:Class")
        return OBJECTIVES[name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        remedy = "write package.module:Class, of a module that Python finds from here (PYTHONPATH)"
        raise ValueError(f"it cannot be imported ({error}): {remedy}") from error
    if not (inspect.isclass(found) and issubclass(found, Objective) and isinstance(getattr(found, "name", None), str)):
        raise ValueError("it is no subclass of mmcoconut.objectives.base.Objective with a `name`: make it one")
    if "." in found.name or found.name in TAKEN:
        raise ValueError(f"its name {found.name!r} has a dot or is one of {', '.join(TAKEN)}: give it another")
    return found


def options_of(setting) -> dict:
    """Return an objective's arguments from a recipe's setting: a weight, weights by stage, or a mapping of options.

    >>> options_of(0.5), options_of([0, 1.0]), options_of({"weight": 1.0}), options_of({})
    ({'weight': 0.5}, {'weight': [0, 1.0]}, {'weight': 1.0}, {})
    """
    return dict(setting) if isinstance(setting, Mapping) else {"weight": setting}


def is_weight(value) -> bool:
    """Return True for a finite number of at least 0, or a non-empty list of them."""
    numbers = value if isinstance(value, list) and value else [value]
    is_number = [isinstance(number, int | float) and not isinstance(number, bool) for number in numbers]
    return all(is_number) and all(math.isfinite(number) and number >= 0 for number in numbers)


def make_objective(name: str, setting) -> Objective:
    """Return the objective of a name with a recipe's setting; its modules are not built."""
    return objective_class(name)(**options_of(setting))


def make_objectives(objectives: Mapping | None) -> list[Objective]:
    """Return the objectives of a recipe that have a weight at any stage."""
    made = [make_objective(name, setting) for name, setting in (objectives or {}).items()]
    return [objective for objective in made if objective.is_used]


def objective_problems(objectives: Mapping) -> Iterator[tuple]:
    """Yield the problems of a recipe's `objectives`, as (key, value found, remedy).

    >>> for key, value, remedy in objective_problems({"step_token": 1.0, "step_tokens": {"weight": "much"}}):
    ...     print(f"{key} = {value!r}: {remedy}")  # doctest: +ELLIPSIS
    objectives.step_token = 1.0: no such objective; did you mean 'step_tokens'? ...
    objectives.step_tokens.weight = 'much': a weight is a finite number of at least 0, ...
    """
    for name, setting in objectives.items():
        try:
            objective = objective_class(str(name))
        except ValueError as error:
            yield f"objectives.{name}", setting, str(error)
        else:
            yield from _option_problems(name, objective, setting)
    names = [name for name in objectives if isinstance(name, str)]
    for name in names:
        if ":" in name and (others := [other for other in names if other != name and same_name(name, other)]):
            yield f"objectives.{name}", objectives[name], f"it has the name of {others[0]}: rename it, or keep one"


def pair_problems(objectives: Mapping[str, Objective]) -> Iterator[tuple[str, str]]:
    """Yield (name, remedy) for objectives that conflict with one that provides what latents read at the same stage.

    >>> made = {"image_alignment": ImageAlignment([1, 0], latents_read="target"), "step_decoder": StepDecoder([0, 1])}
    >>> [*pair_problems(made)]  # never at the same stage
    []
    >>> [name for name, remedy in pair_problems({**made, "step_decoder": StepDecoder(1.0)})]
    ['step_decoder']
    """
    for (one, giver), (name, objective) in permutations(objectives.items(), 2):
        stages = range(max(len(giver.weights), len(objective.weights)))
        if not giver.gives_thoughts or not any(giver.weight_at(s) and objective.weight_at(s) for s in stages):
            continue
        if objective.needs_own_thoughts:
            remedy = "let latents read states, give the two weights at other stages, or remove one"
            yield (
                name,
                f"with {one} latents read no thoughts in training, but it trains the model through them: {remedy}",
            )
        elif objective.gives_thoughts and one < name:
            yield name, f"{one} also provides what latents read in training: set one of them to keep thoughts"


def same_name(one: str, other: str) -> bool:
    """Return True if two names of a recipe are logged under the same name."""
    try:
        return objective_class(one).name == objective_class(other).name
    except ValueError:
        return False


def _option_problems(name: str, objective: type[Objective], setting) -> Iterator[tuple]:
    """Yield the problems of one objective's weight and options."""
    key, options = f"objectives.{name}", options_of(setting)
    known = [*inspect.signature(objective).parameters]
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
    except (ValueError, TypeError) as error:  # from checks in the objective itself
        yield key, setting, str(error)
