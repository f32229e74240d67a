"""Random directed acyclic graphs in words: which of two nodes can be reached from a given node?

The data set is generated, so it needs no file, and its steps are certain: each is one edge of a shortest path. The
task is that of ProsQA (https://arxiv.org/abs/2412.06769), in its sentences or in short symbols for tiny models:

    wording: prosqa    Alex is a bempus. Every bempus is a dimpus. … Is Alex a dimpus or forpus?    Alex is a dimpus.
    wording: symbols   a>b ⏎ b>c ⏎ … ⏎ a > c d ?                                                    c

No shortcut reveals the answer. A second root reaches the second option in as many hops as the root in the question
reaches the first, and both pairs are generated in the same way: the same facts and options, with the other root,
are equally probable and have the other answer. A guess that ignores the root is therefore right half the time.
"""

import os
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

from datasets import Dataset

from mmcoconut.data import SPLITS, Example, nearest, rows_of_split, split_of, to_dataset
from mmcoconut.data.prosqa import FILES
from mmcoconut.data.public import save_json
from mmcoconut.errors import UsageError


NUM_ROWS = {"train": 15_000, "validation": 500, "test": 500}
FRACTIONS = (0.8, 0.1, 0.1)  # of all possible graphs, by hash; rows are drawn within a split's part

WORDINGS = ("prosqa", "symbols")
NAMES = ("Alex", "Bob", "Carol", "Davis", "Eva", "Fae", "Jack", "Max", "Polly", "Rex", "Sally", "Stella", "Tom")
ONSETS = ("b", "br", "d", "f", "g", "gr", "h", "j", "k", "l", "n", "r", "s", "sh", "st", "t", "w", "y", "z")
RIMES = ("empus", "impus", "orpus", "umpus")
WORDS = tuple(onset + rime for onset in ONSETS for rime in RIMES)
SYMBOLS = tuple("abcdefghijklmnopqrstuvwxyz0123456789")  # none differs from another by case alone, as answers must
MAX_NODES = {"prosqa": len(WORDS), "symbols": len(SYMBOLS)}
MAX_DRAWS = 100  # of a graph with too many edges, before an error is raised

Edge = tuple[int, int]  # (from, to), both by number
Nodes = tuple[int, ...]


# Graphs by number


def hops_from(edges: Iterable[Edge], start: int) -> dict[int, int]:
    """Return the fewest edges from `start` to every reachable node, itself included."""
    below = {}
    for source, target in edges:
        below.setdefault(source, []).append(target)
    hops, queue = {start: 0}, [start]
    for node in queue:
        for target in below.get(node, ()):
            if target not in hops:
                hops[target] = hops[node] + 1
                queue.append(target)
    return hops


def _shuffled(rng: random.Random, items) -> list:
    return sorted(items, key=lambda item: rng.random())  # only random() is the same in every version of Python


def _grow(rng: random.Random, paths: tuple[Nodes, Nodes], num_nodes: int) -> list[Edge]:
    """Grow two paths by further nodes, each below or above a random earlier one; nothing is above a root.

    A new node has one edge, so it makes no cycle, no shorter path and no path from one root to the other's option.
    """
    edges = [edge for path in paths for edge in pairwise(path)]
    for node in range(len(paths[0]) + len(paths[1]), num_nodes):
        earlier = int(rng.random() * node)
        above = rng.random() < 0.5 and earlier not in (paths[0][0], paths[1][0])
        edges.append((node, earlier) if above else (earlier, node))
    return edges


def _spoils(edge: Edge, *, from_roots: list[dict], to_options: list[dict], hops: int) -> bool:
    """Return True if an edge would shorten a path, or connect a root to the other's option."""
    for root, option in product((0, 1), repeat=2):
        if edge[0] in from_roots[root] and edge[1] in to_options[option]:
            shortened = from_roots[root][edge[0]] + 1 + to_options[option][edge[1]] < hops
            if root != option or shortened:
                return True
    return False


def _new_edge(rng: random.Random, edges: list[Edge], paths: tuple[Nodes, Nodes], num_nodes: int) -> Edge | None:
    """Return a random edge that makes no cycle, enters no root and spoils no path; None if there is none."""
    backwards = [(target, source) for source, target in edges]
    from_roots = [hops_from(edges, path[0]) for path in paths]
    to_options = [hops_from(backwards, path[-1]) for path in paths]
    targets = [node for node in range(num_nodes) if node not in (paths[0][0], paths[1][0])]
    known = set(edges)
    pairs = [pair for pair in product(range(num_nodes), targets) if pair not in known]
    while pairs:
        edge = pairs.pop(int(rng.random() * len(pairs)))
        if _spoils(edge, from_roots=from_roots, to_options=to_options, hops=len(paths[0]) - 1):
            continue
        if edge[0] not in hops_from(edges, edge[1]):
            return edge
    return None


def _filled(rng: random.Random, paths: tuple[Nodes, Nodes], *, num_nodes: int, num_edges: int) -> list[Edge] | None:
    """Return the edges of a random graph around two paths; None if no edge can be added before it has `num_edges`."""
    edges = _grow(rng, paths, num_nodes)
    while len(edges) < num_edges:
        edge = _new_edge(rng, edges, paths, num_nodes)
        if edge is None:
            return None
        edges.append(edge)
    return edges


def _random_edges(rng: random.Random, paths: tuple[Nodes, Nodes], *, num_nodes: int, num_edges: int) -> list[Edge]:
    """Return the edges of `_filled`, drawn again while it fails; the lengths of paths stay as drawn."""
    for _ in range(MAX_DRAWS):
        edges = _filled(rng, paths, num_nodes=num_nodes, num_edges=num_edges)
        if edges is not None:
            return edges
    raise UsageError(
        f"num_edges is {num_edges}, and none of {MAX_DRAWS} random graphs of {num_nodes} nodes around two paths of "
        f"{len(paths[0]) - 1} hops could have that many; lower num_edges, or raise num_nodes"
    )


# Puzzles


@dataclass(frozen=True)
class Puzzle:
    """A graph and a question about it.

    symbols: names of the nodes; all other fields hold node numbers, which index it.
    edges: in the order of the facts.
    path: a shortest path from the root in the question to the right option.
    neg_path: equally long, from the other root to the wrong option.
    options: the last nodes of both, in the order of the question.
    """

    symbols: tuple[str, ...]
    edges: tuple[Edge, ...]
    path: Nodes
    neg_path: Nodes
    options: Nodes

    @property
    def hops(self) -> int:
        return len(self.path) - 1

    def layout(self) -> bytes:
        """Return the graph without the order of its facts and without a question: it determines the split, so that no
        graph is in two splits."""
        return " ".join(sorted(f"{self.symbols[a]}>{self.symbols[b]}" for a, b in self.edges)).encode()


def _symbols(rng: random.Random, wording: str, *, num_nodes: int, roots: Nodes) -> tuple[str, ...]:
    """Return the names of the nodes: the first letters and digits, or words drawn per graph, and names for roots."""
    if wording == "symbols":
        return SYMBOLS[:num_nodes]
    symbols = _shuffled(rng, WORDS)[:num_nodes]
    for root, name in zip(roots, _shuffled(rng, NAMES), strict=False):
        symbols[root] = name
    return tuple(symbols)


def _random_puzzle(rng: random.Random, hops: int, *, num_nodes: int, num_edges: int, wording: str) -> Puzzle:
    paths = (tuple(range(hops + 1)), tuple(range(hops + 1, 2 * hops + 2)))
    edges = _random_edges(rng, paths, num_nodes=num_nodes, num_edges=num_edges)
    numbers = _shuffled(rng, range(num_nodes))  # until here the paths' numbers would reveal the answer
    path, neg_path = (tuple(numbers[node] for node in path) for path in paths)
    return Puzzle(
        symbols=_symbols(rng, wording, num_nodes=num_nodes, roots=(path[0], neg_path[0])),
        edges=tuple((numbers[source], numbers[target]) for source, target in _shuffled(rng, edges)),
        path=path,
        neg_path=neg_path,
        options=tuple(_shuffled(rng, (path[-1], neg_path[-1]))),
    )


def _check_shape(num_nodes: int, num_edges: int, *, min_hops: int, max_hops: int, wording: str) -> None:
    if wording not in WORDINGS:
        raise UsageError(f"wording is {wording!r}; {nearest(wording, WORDINGS)}")
    if not 1 <= min_hops <= max_hops:
        raise UsageError(f"min_hops is {min_hops} and max_hops is {max_hops}; choose 1 <= min_hops <= max_hops")
    least, most = 2 * (max_hops + 1), MAX_NODES[wording]
    if not least <= num_nodes <= most:
        raise UsageError(
            f"num_nodes is {num_nodes}; choose {least} to {most}: two paths of max_hops {max_hops} take {least} nodes "
            f"and wording {wording!r} has {most} different symbols; or lower max_hops"
        )
    if num_edges < num_nodes - 2:
        raise UsageError(
            f"num_edges is {num_edges} and num_nodes is {num_nodes}; choose at least {num_nodes - 2} edges, one for "
            "each node but the two roots"
        )


def generate(
    split: str,
    *,
    num_rows: int | Mapping[str, int] = NUM_ROWS,
    seed: int = 0,
    num_nodes: int = 20,
    num_edges: int = 24,
    min_hops: int = 3,
    max_hops: int = 5,
    wording: str = "prosqa",
) -> Iterator[Puzzle]:
    """Yield the puzzles of a split in the order of `load`'s rows; the options are those of `load`.

    Puzzles are drawn at random and kept if the hash of their graph falls in this split's part, so two splits never
    share a graph, whatever their seeds; within a split no question about a graph is repeated. More rows continue the
    same list.
    """
    num_rows = rows_of_split("graph_paths", num_rows, split)
    _check_shape(num_nodes, num_edges, min_hops=min_hops, max_hops=max_hops, wording=wording)
    share = FRACTIONS[SPLITS.index(split)]
    rng = random.Random(f"graph_paths {split} {seed}")
    seen = set()
    for _ in range(1000 + int(20 * num_rows / share)):  # enough, unless there are hardly as many puzzles
        hops = min_hops + int(rng.random() * (max_hops - min_hops + 1))
        puzzle = _random_puzzle(rng, hops, num_nodes=num_nodes, num_edges=num_edges, wording=wording)
        layout = puzzle.layout()
        question = (layout, puzzle.symbols[puzzle.path[0]], frozenset(puzzle.symbols[node] for node in puzzle.options))
        if split_of(layout, FRACTIONS) != split or question in seen:
            continue
        seen.add(question)
        yield puzzle
        if len(seen) == num_rows:
            return
    raise UsageError(
        f"num_rows is {num_rows} for split {split!r}, and only {len(seen)} different puzzles of {num_nodes} nodes "
        "were found for it; lower num_rows, or raise num_nodes"
    )


# Rows


def _sentence(symbols: tuple[str, ...], edge: Edge) -> str:
    source, target = symbols[edge[0]], symbols[edge[1]]
    return f"{source} is a {target}." if source in NAMES else f"Every {source} is a {target}."


def _prosqa_texts(puzzle: Puzzle) -> dict:
    symbols = puzzle.symbols
    root, target = symbols[puzzle.path[0]], symbols[puzzle.path[-1]]
    first, second = (symbols[node] for node in puzzle.options)
    facts = " ".join(_sentence(symbols, edge) for edge in puzzle.edges)
    return {
        "question": f"{facts} Is {root} a {first} or {second}?",
        "answer": f"{root} is a {target}.",
        "steps": [_sentence(symbols, edge) for edge in pairwise(puzzle.path)],
    }


def _symbol_texts(puzzle: Puzzle) -> dict:
    """Return a puzzle's texts in symbols. An edge is one word on one line: `train_tokenizer` makes one token of it and
    its line end, in facts and steps alike, if its vocabulary is large enough (300 + num_nodes² entries)."""
    symbols = puzzle.symbols
    root, target = symbols[puzzle.path[0]], symbols[puzzle.path[-1]]
    first, second = (symbols[node] for node in puzzle.options)
    facts = "".join(f"{symbols[a]}>{symbols[b]}\n" for a, b in puzzle.edges)
    return {
        "question": f"{facts}{root} > {first} {second} ?",
        "answer": target,
        "steps": [f"{symbols[a]}>{symbols[b]}" for a, b in pairwise(puzzle.path)],
    }


def row_of(puzzle: Puzzle, wording: str) -> dict:
    """Return the puzzle as a row of the public ProsQA files; `edges` are in the order of the facts."""
    return {
        **(_prosqa_texts(puzzle) if wording == "prosqa" else _symbol_texts(puzzle)),
        "idx_to_symbol": list(puzzle.symbols),
        "edges": [list(edge) for edge in puzzle.edges],
        "root": puzzle.path[0],
        "target": puzzle.path[-1],
        "neg_target": puzzle.neg_path[-1],
    }


def _rows(split: str, *, wording: str = "prosqa", **options) -> list[dict]:
    return [row_of(puzzle, wording) for puzzle in generate(split, wording=wording, **options)]


def write_prosqa_files(folder: str | os.PathLike, **options) -> dict:
    """Write the rows of `load` with these options as `prosqa_train.json`, `prosqa_valid.json` and `prosqa_test.json`,
    the public format; return the options with which `mmcoconut.data.prosqa.load` reads them back."""
    for split, name in FILES.items():
        save_json(Path(folder) / f"prosqa_{name}.json", _rows(split, **options))
    return {"folder": str(folder)}


def write_sample(folder: str | os.PathLike, *, num_rows: int, seed: int) -> dict:
    """Return the options for `num_rows` rows per split; no file is written, because the data set needs none."""
    return {"num_rows": num_rows, "seed": seed}


def load(
    *,
    split: str,
    num_rows: int | Mapping[str, int] = NUM_ROWS,
    seed: int = 0,
    num_nodes: int = 20,
    num_edges: int = 24,
    min_hops: int = 3,
    max_hops: int = 5,
    wording: str = "prosqa",
) -> Dataset:
    """Load the rows of a split: no picture, the facts and the question, one edge of a shortest path per step, the
    reachable option.

    num_rows: for every split, or a mapping by split.
    num_nodes, num_edges: of every graph. num_nodes - 2 edges make two trees with a root and an option each, so
        directions can be ignored; every further edge adds a second path, or joins the trees.
    min_hops, max_hops: the length of the path is uniform in this range.
    wording: `prosqa`, sentences as in the public files; `symbols`, a letter per node and a token per edge (see
        `_symbol_texts`).
    """
    rows = _rows(
        split,
        num_rows=num_rows,
        seed=seed,
        num_nodes=num_nodes,
        num_edges=num_edges,
        min_hops=min_hops,
        max_hops=max_hops,
        wording=wording,
    )
    return to_dataset(
        Example(
            images=[],
            question=row["question"],
            choices=[],
            steps=row["steps"],
            answers=[row["answer"]],
            row_id=f"graph_paths {split} row {index}",
        )
        for index, row in enumerate(rows)
    )
