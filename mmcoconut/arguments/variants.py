"""Variants of a comparison: a mode, with a schedule of thoughts and objectives in addition to the answer's loss.

    coconut                the mode, without further objectives
    jacobi                 mode coconut with `thought_schedule: jacobi`
    coconut+step_tokens    with the objective of that name, one of mmcoconut.objectives; several are joined by +

Options of an objective are taken from the recipe's `objectives`; the variant's name decides which are on.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from mmcoconut.arguments.choices import MODES, THINKING_MODES
from mmcoconut.arguments.typed import did_you_mean
from mmcoconut.objectives import OBJECTIVES


JACOBI = "jacobi"
# Updates of a `jacobi` variant if the recipe sets none.
JACOBI_ITERATIONS = 3


@dataclass(frozen=True)
class Variant:
    """Settings of one line of the table; all other settings are the recipe's.

    schedule: `jacobi`, or None for the recipe's.
    """

    name: str
    mode: str
    objectives: tuple[str, ...] = ()
    schedule: str | None = None

    def settings(self, recipe: Mapping) -> dict:
        """Return mode, schedule and objectives as recipe keys; `recipe` is the compared recipe.

        >>> variant = variant_of("jacobi+step_tokens", ["step_tokens"])
        >>> variant.settings({"thought_schedule": "sequential", "objectives": {"other": 2.0}})
        ... # doctest: +NORMALIZE_WHITESPACE
        {'mode': 'coconut', 'thought_schedule': 'jacobi', 'jacobi_iterations': 3, 'objectives': {'step_tokens': {}}}
        """
        schedule, iterations = self.schedule or recipe.get("thought_schedule"), recipe.get("jacobi_iterations")
        if schedule != JACOBI:
            iterations = None
        elif self.schedule is not None:
            iterations = iterations or JACOBI_ITERATIONS
        given = recipe.get("objectives") or {}
        return {
            "mode": self.mode,
            "thought_schedule": schedule,
            "jacobi_iterations": iterations,
            "objectives": {name: given.get(name, {}) for name in self.objectives} or None,
        }


def known_objectives() -> tuple[str, ...]:
    """Return the names of all objectives."""
    return tuple(OBJECTIVES)


def variant_names(compare: str | list[str] | None) -> list[str]:
    """Return the names in `compare`, in order.

    >>> variant_names("cot, coconut+a"), variant_names(["cot", "no_cot"]), variant_names(None)
    (['cot', 'coconut+a'], ['cot', 'no_cot'], [])
    """
    names = compare.split(",") if isinstance(compare, str) else compare or []
    return [name.strip() for name in names]


def compared_modes(compare: str | list[str] | None) -> list[str]:
    """Return the modes of the variants in `compare`, without duplicates and in order.

    >>> compared_modes("cot, jacobi,coconut+a"), compared_modes(None)
    (['cot', 'coconut'], [])
    """
    starts = [name.split("+")[0].strip() for name in variant_names(compare)]
    return list(dict.fromkeys("coconut" if start == JACOBI else start for start in starts))


def compares_jacobi(compare: str | list[str] | None) -> bool:
    """Return True if a variant in `compare` sets the schedule `jacobi`."""
    return any(name.split("+")[0].strip() == JACOBI for name in variant_names(compare))


def variant_of(name: str, known: Collection[str] = ()) -> Variant:
    """Return the variant of this name; known: names of objectives.

    Raises:
        ValueError: an unknown mode or objective, a repeated objective, or one for a mode without thoughts.

    >>> variant_of("coconut+a+b", ["a", "b"])
    Variant(name='coconut+a+b', mode='coconut', objectives=('a', 'b'), schedule=None)
    >>> variant_of("cot+a", ["a"])
    Traceback (most recent call last):
    ValueError: `cot` has no thoughts for an objective: add `a` to coconut, jacobi, pause, or remove it
    """
    start, *objectives = [part.strip() for part in name.split("+")]
    mode = "coconut" if start == JACOBI else start
    starts = (*MODES, JACOBI)
    if mode not in MODES:
        raise ValueError(f"choose from {', '.join(starts)}{did_you_mean(start, starts)}")
    for objective in objectives:
        if objective not in known:
            choices = ", ".join(known) or "none"
            raise ValueError(f"no objective {objective!r}: choose from {choices}{did_you_mean(objective, known)}")
        if objectives.count(objective) > 1:
            raise ValueError(f"`{objective}` is named twice: name it once")
        if mode not in THINKING_MODES:
            remedy = f"add `{objective}` to {', '.join(sorted((*THINKING_MODES, JACOBI)))}, or remove it"
            raise ValueError(f"`{mode}` has no thoughts for an objective: {remedy}")
    return Variant(name, mode, tuple(objectives), JACOBI if start == JACOBI else None)


def variants_of(compare: str | list[str] | None, known: Collection[str] = ()) -> list[Variant]:
    """Return the variants in `compare`, in order; see `variant_of`."""
    return [variant_of(name, known) for name in variant_names(compare)]


def variant_problems(compare: str | list[str], known: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Yield (name, remedy) for each unknown or repeated variant."""
    found = {}
    for name in variant_names(compare) or [""]:
        try:
            variant = variant_of(name, known)
        except ValueError as error:
            yield name, str(error)
            continue
        same = variant.mode, variant.schedule, frozenset(variant.objectives)
        if same in found:
            yield name, f"it is `{found[same]}` again: name it once"
        found.setdefault(same, name)
