"""Letters that each lead to the next, in any order: which letter is reached from a given one after a few hops?

The data set is text only and generated, so it needs no file, and its steps are certain: each is one hop.

    F>C G>F C>A A>G From G go 3.    G>F ⏎ F>C ⏎ C>A    A

All letters of a row form one cycle, so no letter is passed twice, and a guess that is not the start is right once in
num_letters - 1 times. Following the hops needs one look-up after another.
"""

import os
import random
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from datasets import Dataset

from mmcoconut.data import SPLITS, Example, nearest, rows_of_split, split_of, to_dataset
from mmcoconut.errors import UsageError


NUM_ROWS = {"train": 15_000, "validation": 500, "test": 500}
FRACTIONS = (0.8, 0.1, 0.1)  # of all possible cycles, by hash; rows are drawn within a split's part
MAX_DRAWS = 100  # per row, before an error is raised
STEP_FORMS = ("pairs", "letters")


@dataclass(frozen=True)
class Chase:
    """A cycle of letters and a question about it.

    cycle: each letter leads to the next one, and the last to the first; the start is the first.
    order: positions in the cycle, in the order in which the letters are listed.
    hops: how many to follow, less than there are letters.
    """

    cycle: str
    order: tuple[int, ...]
    hops: int

    @property
    def path(self) -> str:
        """The start, then the letter that each hop reaches."""
        return self.cycle[: self.hops + 1]

    def layout(self) -> bytes:
        """Return the cycle from its first letter in the alphabet on: it determines the split, so that no cycle is in
        two splits, whatever its start and order."""
        first = self.cycle.index(min(self.cycle))
        return (self.cycle[first:] + self.cycle[:first]).encode()

    def question(self) -> str:
        """Return the listed letters and the question.

        >>> Chase("GFCA", (1, 0, 3, 2), 3).question()
        'F>C G>F A>G C>A From G go 3.'
        """
        pairs = [f"{self.cycle[at]}>{self.cycle[(at + 1) % len(self.cycle)]}" for at in self.order]
        return f"{' '.join(pairs)} From {self.cycle[0]} go {self.hops}."

    def steps(self, form: str = "pairs") -> list[str]:
        """Return a step per hop; forms: `pairs`, or `letters`, the reached letter alone.

        >>> Chase("GFCA", (1, 0, 3, 2), 3).steps()
        ['G>F', 'F>C', 'C>A']
        """
        if form == "letters":
            return [*self.path[1:]]
        return [f"{self.path[hop]}>{self.path[hop + 1]}" for hop in range(self.hops)]


def _shuffled(rng: random.Random, items) -> list:
    return sorted(items, key=lambda item: rng.random())  # only random() is the same in every version of Python


def _check_shape(num_letters: int, min_hops: int, max_hops: int) -> None:
    if not 3 <= num_letters <= len(string.ascii_uppercase):
        raise UsageError(f"num_letters is {num_letters}; choose 3 to {len(string.ascii_uppercase)}")
    if not 1 <= min_hops <= max_hops < num_letters:
        raise UsageError(
            f"min_hops is {min_hops}, max_hops {max_hops} and num_letters {num_letters}; choose "
            "1 <= min_hops <= max_hops < num_letters, or the path would pass its start again"
        )


def generate(
    split: str,
    *,
    num_rows: int | Mapping[str, int] = NUM_ROWS,
    seed: int = 0,
    num_letters: int = 8,
    min_hops: int = 1,
    max_hops: int = 4,
) -> Iterator[Chase]:
    """Yield the questions of a split in the order of `load`'s rows; the options are those of `load`.

    Cycles are drawn at random and kept if their hash falls in this split's part, so two splits never share a cycle,
    whatever their seeds; within a split no question is repeated. More rows continue the same list.
    """
    num_rows = rows_of_split("pointer_chasing", num_rows, split)
    _check_shape(num_letters, min_hops, max_hops)
    rng = random.Random(f"pointer_chasing {split} {seed}")
    share = FRACTIONS[SPLITS.index(split)]
    seen = set()
    for _ in range(1000 + int(MAX_DRAWS * num_rows / share)):
        chase = Chase(
            cycle="".join(_shuffled(rng, string.ascii_uppercase)[:num_letters]),
            order=tuple(_shuffled(rng, range(num_letters))),
            hops=min_hops + int(rng.random() * (max_hops - min_hops + 1)),
        )
        if split_of(chase.layout(), FRACTIONS) == split and chase not in seen:
            seen.add(chase)
            yield chase
            if len(seen) == num_rows:
                return
    raise UsageError(
        f"num_rows is {num_rows} for split {split!r}, and only {len(seen)} different questions of {num_letters} "
        "letters were drawn; lower num_rows, or raise num_letters"
    )


def write_sample(folder: str | os.PathLike, *, num_rows: int, seed: int) -> dict:
    """Return the options for `num_rows` rows per split; no file is written, because the data set needs none."""
    return {"num_rows": num_rows, "seed": seed}


def load(
    *,
    split: str,
    num_rows: int | Mapping[str, int] = NUM_ROWS,
    seed: int = 0,
    num_letters: int = 8,
    min_hops: int = 1,
    max_hops: int = 4,
    steps: str = "pairs",
) -> Dataset:
    """Load the rows of a split: no picture, the pairs and the question, one hop per step, the letter that is reached.

    num_rows: for every split, or a mapping by split. num_letters: pairs of a row, drawn from the alphabet.
    min_hops, max_hops: range of the uniform number of hops.
    steps: `pairs`, as `G>F`, or `letters`, the reached letter alone, `F`.
    """
    if steps not in STEP_FORMS:
        raise UsageError(f"steps is {steps!r}; {nearest(steps, STEP_FORMS)}")
    chases = generate(
        split, num_rows=num_rows, seed=seed, num_letters=num_letters, min_hops=min_hops, max_hops=max_hops
    )
    return to_dataset(
        Example(
            images=[],
            question=chase.question(),
            choices=[],
            steps=chase.steps(steps),
            answers=[chase.path[-1]],
            row_id=f"pointer_chasing {split} row {index}",
        )
        for index, chase in enumerate(chases)
    )
