"""Holds generated path questions to their graphs, to answers that nothing but the path gives away, and to ProsQA's
files."""

import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from mmcoconut import data
from mmcoconut.data import graph_paths, prosqa
from mmcoconut.data.graph_paths import FRACTIONS, NAMES, SYMBOLS, WORDINGS, WORDS, Puzzle, generate, row_of
from mmcoconut.data.tokenizer import train_tokenizer


TREES = {"num_nodes": 14, "num_edges": 12, "min_hops": 2, "max_hops": 4}
SMALL = {**TREES, "num_edges": 16, "wording": "symbols"}
SHAPES = {
    "default": {},
    "trees": TREES,
    "small": SMALL,
    "dense": {**SMALL, "num_edges": 30},
    "paths alone": {"num_nodes": 8, "num_edges": 6, "min_hops": 3, "max_hops": 3},
    "one hop": {"num_nodes": 9, "num_edges": 12, "min_hops": 1, "max_hops": 1, "wording": "symbols"},
}
# Alex is in a, which is in b; Tom is in c, which is in d; c is in a too.
PUZZLE = Puzzle(
    symbols=("bempus", "Alex", "dempus", "Tom", "fempus", "gempus"),
    edges=((4, 5), (1, 0), (3, 4), (0, 2), (4, 0)),
    path=(1, 0, 2),
    neg_path=(3, 4, 5),
    options=(5, 2),
)


def error_of(call, *parts):
    """Runs `call`, which must raise ValueError with every part in its message."""
    with pytest.raises(ValueError) as caught:
        call()
    for part in parts:
        assert str(part) in str(caught.value), f"{part!r} is not in {caught.value}"


def load(split="train", **options):
    return data.load_examples("graph_paths", split=split, **options)


def twin(puzzle):
    """The same facts and options, asked about the other root."""
    return replace(puzzle, path=puzzle.neg_path, neg_path=puzzle.path)


# Graphs


def distances(edges, start):
    """Hops to all that can be reached, by walking: another way than the module's."""
    found, queue = {start: 0}, [start]
    for node in queue:
        for source, target in edges:
            if source == node and target not in found:
                found[target] = found[node] + 1
                queue.append(target)
    return found


def is_acyclic(edges):
    edges = set(edges)
    while edges:
        sources = {a for a, _ in edges} - {b for _, b in edges}
        if not sources:
            return False
        edges = {(a, b) for a, b in edges if a not in sources}
    return True


def test_hops_from_counts_the_fewest_edges():
    edges = [(0, 1), (1, 2), (0, 3), (3, 4), (4, 2), (2, 5), (6, 0)]
    assert graph_paths.hops_from(edges, 0) == {0: 0, 1: 1, 3: 1, 2: 2, 4: 2, 5: 3}
    assert graph_paths.hops_from(edges, 5) == {5: 0}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("other", [False, True])
def test_each_root_reaches_its_own_option_by_a_shortest_path_and_not_the_other(shape, other):
    options = SHAPES[shape]
    for puzzle in generate("train", num_rows=200, seed=3, **options):
        puzzle = twin(puzzle) if other else puzzle
        reached = distances(puzzle.edges, puzzle.path[0])
        assert reached[puzzle.path[-1]] == puzzle.hops == len(puzzle.neg_path) - 1
        assert puzzle.neg_path[-1] not in reached
        assert set(pairwise(puzzle.path)) <= set(puzzle.edges)
        assert sorted(puzzle.options) == sorted((puzzle.path[-1], puzzle.neg_path[-1]))


@pytest.mark.parametrize("shape", SHAPES)
def test_graphs_have_no_cycle_and_the_size_asked_for(shape):
    options = SHAPES[shape]
    for puzzle in generate("train", num_rows=200, seed=3, **options):
        assert is_acyclic(puzzle.edges)
        assert len(puzzle.symbols) == len(set(puzzle.symbols)) == options.get("num_nodes", 20)
        assert len(puzzle.edges) == len(set(puzzle.edges)) == options.get("num_edges", 24)
        assert {node for edge in puzzle.edges for node in edge} == set(range(len(puzzle.symbols)))
        assert not {puzzle.path[0], puzzle.neg_path[0]} & {target for _, target in puzzle.edges}


def test_directions_must_be_read_once_there_are_more_edges_than_two_trees_take():
    def joined(puzzle):
        both_ways = [*puzzle.edges, *((b, a) for a, b in puzzle.edges)]
        return puzzle.neg_path[-1] in distances(both_ways, puzzle.path[0])

    assert not any(joined(puzzle) for puzzle in generate("train", num_rows=200, **TREES))
    share = sum(joined(puzzle) for puzzle in generate("train", num_rows=200)) / 200
    assert share > 0.9


def test_hops_are_uniform():
    counts = Counter(puzzle.hops for puzzle in generate("train", num_rows=3000, **TREES))
    assert sorted(counts) == [2, 3, 4]
    assert all(is_near(count, 3000, probability=1 / 3) for count in counts.values()), counts


def test_rows_depend_on_the_seed_alone_and_more_rows_continue_the_list():
    few, many = load(num_rows=20, seed=3, **SMALL), load(num_rows=50, seed=3, **SMALL)
    assert few["question"][:] == many["question"][:20]
    assert few["question"][:] != load(num_rows=20, seed=4, **SMALL)["question"][:]


@pytest.mark.parametrize("wording, digest", [("prosqa", "823130c93a840a35"), ("symbols", "16192c501a2fcc6e")])
def test_puzzles_are_the_same_everywhere(wording, digest):
    content = repr(list(generate("train", num_rows=100, wording=wording)))
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("wording", WORDINGS)
def test_graphs_of_different_splits_are_different(wording):
    # Few possible graphs and different seeds: drawn without splitting, symbols would collide hundreds of times.
    options = {"num_nodes": 6, "num_edges": 4, "min_hops": 1, "max_hops": 2, "wording": wording}
    graphs = {}
    for seed, split in enumerate(data.SPLITS):
        puzzles = list(generate(split, num_rows=400, seed=seed, **options))
        graphs[split] = {frozenset((p.symbols[a], p.symbols[b]) for a, b in p.edges) for p in puzzles}
        assert {data.split_of(puzzle.layout(), FRACTIONS) for puzzle in puzzles} == {split}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not graphs[one] & graphs[other]


def test_no_question_about_a_graph_comes_twice():
    options = {"num_nodes": 6, "num_edges": 4, "min_hops": 1, "max_hops": 1, "wording": "symbols"}
    puzzles = list(generate("train", num_rows=2000, **options))
    seen = {
        (p.layout(), p.symbols[p.path[0]], frozenset((p.symbols[p.path[-1]], p.symbols[p.neg_path[-1]])))
        for p in puzzles
    }
    assert len(seen) == 2000 > len({puzzle.layout() for puzzle in puzzles})


def test_the_layout_is_the_graph_without_the_order_of_its_facts():
    assert PUZZLE.layout() == b"Alex>bempus Tom>fempus bempus>dempus fempus>bempus fempus>gempus"
    assert replace(PUZZLE, edges=PUZZLE.edges[::-1], options=(2, 5)).layout() == PUZZLE.layout()


# Shortcuts


def two_sided_p(successes, n, probability=0.5):
    """The chance that a binomial count is at least as far from n · probability as `successes`."""
    distance = abs(successes - n * probability) - 1e-9
    far = [k for k in range(n + 1) if abs(k - n * probability) >= distance]
    log_p, log_q = math.log(probability), math.log(1 - probability)
    return math.fsum(
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * log_p + (n - k) * log_q)
        for k in far
    )


def is_near(successes, n, *, probability=0.5):
    """No fewer and no more than chance gives in all but one of 10,000 repetitions."""
    return two_sided_p(successes, n, probability) > 1e-4


def below(puzzle, node):
    return len(distances(puzzle.edges, node))


def above(puzzle, node):
    return len(distances([(b, a) for a, b in puzzle.edges], node))


def depth(puzzle, node):
    """The hops from the nearest node that no edge enters."""
    upwards = distances([(b, a) for a, b in puzzle.edges], node)
    return min(hops for other, hops in upwards.items() if all(b != other for _, b in puzzle.edges))


def places(puzzle, node):
    """The facts that mention it, by their place."""
    return [place for place, edge in enumerate(puzzle.edges) if node in edge]


def mean_distance(puzzle, node):
    """How far its facts stand from those about the root."""
    roots = places(puzzle, puzzle.path[0])
    return sum(abs(one - other) for one in places(puzzle, node) for other in roots) / len(places(puzzle, node))


# What a guess may look at; the option with the larger value is chosen.
SHORTCUTS = {
    "first option": lambda puzzle, node: -puzzle.options.index(node),
    "mentioned more often": lambda puzzle, node: len(places(puzzle, node)),
    "mentioned first": lambda puzzle, node: -min(places(puzzle, node)),
    "mentioned last": lambda puzzle, node: max(places(puzzle, node)),
    "in-degree": lambda puzzle, node: sum(b == node for _, b in puzzle.edges),
    "out-degree": lambda puzzle, node: sum(a == node for a, _ in puzzle.edges),
    "sink": lambda puzzle, node: all(a != node for a, _ in puzzle.edges),
    "deeper": depth,
    "more nodes below": below,
    "more nodes above": above,
    "symbol": lambda puzzle, node: puzzle.symbols[node],
    "number": lambda puzzle, node: node,
    "near the root's facts": lambda puzzle, node: -mean_distance(puzzle, node),
    "before the root": lambda puzzle, node: min(places(puzzle, node)) < min(places(puzzle, puzzle.path[0])),
}
NEED_THE_ROOT = ("near the root's facts", "before the root")


def guesses(shortcut, puzzles):
    """True where the shortcut is right, False where it is wrong; ties are left out."""
    for puzzle in puzzles:
        target, other = (SHORTCUTS[shortcut](puzzle, node) for node in (puzzle.path[-1], puzzle.neg_path[-1]))
        if target != other:
            yield target > other


@pytest.fixture(scope="module")
def many():
    return {shape: list(generate("train", num_rows=2000, seed=7, **SHAPES[shape])) for shape in ("default", "small")}


@pytest.mark.parametrize("shape", ["default", "small"])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_a_shortcut_is_right_half_the_time(shortcut, shape, many):
    right = list(guesses(shortcut, many[shape]))
    assert len(right) > 400, "too many ties to tell"
    assert is_near(sum(right), len(right)), f"{sum(right)} of {len(right)}"


@pytest.mark.parametrize("shortcut", [name for name in SHORTCUTS if name not in NEED_THE_ROOT])
def test_asking_about_the_other_root_turns_right_guesses_into_wrong_ones(shortcut, many):
    """Why shortcuts fail: the twin of a puzzle could have been drawn in its place, and has the other answer."""
    right = list(guesses(shortcut, many["small"]))
    assert list(guesses(shortcut, map(twin, many["small"]))) == [not guess for guess in right]


def test_a_shortcut_that_is_there_is_found(many):
    leaky = [replace(puzzle, options=(puzzle.path[-1], puzzle.neg_path[-1])) for puzzle in many["small"]]
    right = list(guesses("first option", leaky))
    assert sum(right) == len(right) == 2000 and not is_near(2000, 2000)
    assert not is_near(1100, 2000) and is_near(1050, 2000)  # 55 % of 2000 is found


def test_two_sided_p_is_that_of_a_coin():
    assert two_sided_p(0, 2) == pytest.approx(0.5)
    assert two_sided_p(5, 10) == pytest.approx(1)
    assert two_sided_p(10, 10) == pytest.approx(2 / 1024)


# Words


def test_a_row_in_the_sentences_of_prosqa():
    assert row_of(PUZZLE, "prosqa") == {
        "question": "Every fempus is a gempus. Alex is a bempus. Tom is a fempus. Every bempus is a dempus. "
        "Every fempus is a bempus. Is Alex a gempus or dempus?",
        "answer": "Alex is a dempus.",
        "steps": ["Alex is a bempus.", "Every bempus is a dempus."],
        "idx_to_symbol": ["bempus", "Alex", "dempus", "Tom", "fempus", "gempus"],
        "edges": [[4, 5], [1, 0], [3, 4], [0, 2], [4, 0]],
        "root": 1,
        "target": 2,
        "neg_target": 5,
    }


def test_a_row_in_symbols():
    row = row_of(replace(PUZZLE, symbols=tuple("abcdef")), "symbols")
    assert row["question"] == "e>f\nb>a\nd>e\na>c\ne>a\nb > f c ?"
    assert (row["steps"], row["answer"]) == (["b>a", "a>c"], "c")


def test_roots_have_names_and_all_other_nodes_have_words():
    for puzzle in generate("train", num_rows=100):
        roots = {puzzle.path[0], puzzle.neg_path[0]}
        for node, symbol in enumerate(puzzle.symbols):
            assert symbol in (NAMES if node in roots else WORDS)


def test_vocabularies_hold_nothing_twice_and_no_word_that_needs_an():
    for words in (NAMES, WORDS, SYMBOLS):
        assert len({word.lower() for word in words}) == len(words)  # answers are compared without their case
        assert len(words) == len(set(words))
    assert not set(NAMES) & set(WORDS) and not any(word[0] in "aeiou" for word in WORDS)


@pytest.mark.parametrize("wording", WORDINGS)
def test_the_largest_graphs_have_enough_symbols(wording):
    size = graph_paths.MAX_NODES[wording]
    (puzzle,) = generate("test", num_rows=1, num_nodes=size, num_edges=size, wording=wording)
    assert len(set(puzzle.symbols)) == size


def test_every_symbol_comes_in_every_role():
    """Also in tiny graphs, no symbol is always a root or always an option."""
    roots, answers = Counter(), Counter()
    for puzzle in generate("train", num_rows=2400, num_nodes=12, num_edges=12, max_hops=3, wording="symbols"):
        assert set(puzzle.symbols) == set(SYMBOLS[:12])
        roots[puzzle.symbols[puzzle.path[0]]] += 1
        answers[puzzle.symbols[puzzle.path[-1]]] += 1
    for counts in (roots, answers):
        assert len(counts) == 12
        assert all(is_near(count, 2400, probability=1 / 12) for count in counts.values()), counts


def written(row):
    return f"{row['question']}\n" + "".join(f"{step}\n" for step in row["steps"]) + f"### {row['answers'][0]}"


def test_an_edge_and_an_option_are_one_token_of_our_own_tokenizer():
    rows = load(num_rows=1000, **SMALL)
    tokenizer = train_tokenizer(map(written, rows), vocab_size=300 + SMALL["num_nodes"] ** 2)
    for row in rows:
        question = tokenizer.tokenize(f"{row['question']}\n")
        steps = [tokenizer.tokenize(f"{step}\n") for step in row["steps"]]
        assert len(question) == SMALL["num_edges"] + 5  # the root, its sign, two options, the question mark
        assert all(len(step) == 1 and set(step) <= set(question) for step in steps)
        answer = tokenizer.tokenize(f"### {row['answers'][0]}")
        assert len(answer) == 2 and answer[1] in question


# Rows and files


@pytest.mark.parametrize("wording", WORDINGS)
def test_a_row_of_the_data_set_is_the_puzzle_generated_at_its_place(wording):
    options = {**SMALL, "num_rows": {"train": 20, "test": 5}, "seed": 9, "wording": wording}
    rows = load("test", **options)
    assert rows.features == data.FEATURES
    for index, (row, puzzle) in enumerate(zip(rows, generate("test", **options), strict=True)):
        expected = row_of(puzzle, wording)
        assert row == {
            "images": [],
            "question": expected["question"],
            "choices": [],
            "steps": expected["steps"],
            "answers": [expected["answer"]],
            "row_id": f"graph_paths test row {index}",
            "history": [],
        }
        assert len(row["steps"]) == puzzle.hops


def test_a_sample_is_read_in_every_split_and_depends_on_the_seed_alone(tmp_path):
    def questions(seed):
        options = graph_paths.write_sample(tmp_path, num_rows=3, seed=seed)
        return [load(split, **options)["question"][:] for split in data.SPLITS]

    assert questions(1) == questions(1) != questions(2)
    assert len({question for part in questions(1) for question in part}) == 9


@pytest.mark.parametrize("wording", WORDINGS)
def test_prosqa_reads_the_same_rows_back_from_files_in_its_format(wording, tmp_path):
    options = {"num_rows": 12, "seed": 4, **SMALL, "wording": wording}
    source = graph_paths.write_prosqa_files(tmp_path / "files", **options)
    for split in data.SPLITS:
        read, made = prosqa.load(split=split, **source), load(split, **options)
        assert read.remove_columns("row_id").to_list() == made.remove_columns("row_id").to_list()
        assert len(read) == 12


def test_files_hold_the_published_fields_with_numbers_that_index_the_symbols(tmp_path):
    graph_paths.write_prosqa_files(tmp_path, num_rows={"train": 8, "validation": 2, "test": 3})
    sizes = {"train": 8, "valid": 2, "test": 3}
    for name, size in sizes.items():
        rows = json.loads((tmp_path / f"prosqa_{name}.json").read_text(encoding="utf-8"))
        assert len(rows) == size
        for row in rows:
            symbols = row["idx_to_symbol"]
            root, target, neg_target = (symbols[row[key]] for key in ("root", "target", "neg_target"))
            asked = {f"Is {root} a {a} or {b}?" for a, b in ((target, neg_target), (neg_target, target))}
            assert asked & {row["question"][row["question"].rindex(" Is ") + 1 :]}
            assert row["answer"] == f"{root} is a {target}."
            pairs = re.findall(r"(?:Every )?(\w+) is a (\w+)\.", row["question"])
            assert pairs == [(symbols[a], symbols[b]) for a, b in row["edges"]]
            steps = [re.fullmatch(r"(?:Every )?(\w+) is a (\w+)\.", step).groups() for step in row["steps"]]
            assert (steps[0][0], steps[-1][1]) == (root, target)
            assert all(one[1] == other[0] for one, other in pairwise(steps)) and set(steps) <= set(pairs)


# Errors


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"num_rows": 0}, ("num_rows is 0", "'train'", "at least 1")),
        ({"num_rows": {"test": 5}}, ("num_rows", "'train'", "['test']", "add it")),
        ({"wording": "prosqua"}, ("wording is 'prosqua'", "did you mean 'prosqa'", "prosqa, symbols")),
        ({"min_hops": 6}, ("min_hops is 6", "max_hops is 5", "1 <= min_hops <= max_hops")),
        ({"min_hops": 0}, ("min_hops is 0", "1 <= min_hops")),
        ({"num_nodes": 11}, ("num_nodes is 11", "choose 12 to 76", "max_hops 5", "or lower max_hops")),
        ({"num_nodes": 77, "num_edges": 99}, ("num_nodes is 77", "12 to 76", "'prosqa'")),
        ({"num_nodes": 53, "num_edges": 99, "wording": "symbols"}, ("num_nodes is 53", "12 to 36", "'symbols'")),
        ({"num_edges": 17}, ("num_edges is 17", "num_nodes is 20", "at least 18")),
        (
            {"num_nodes": 12, "num_edges": 60},
            ("num_edges is 60", "none of 100", "12 nodes", "hops", "lower num_edges, or raise num_nodes"),
        ),
        (
            {"num_nodes": 4, "num_edges": 2, "min_hops": 1, "max_hops": 1, "wording": "symbols", "num_rows": 30},
            ("num_rows is 30", "'train'", "different puzzles of 4 nodes", "lower num_rows, or raise num_nodes"),
        ),
    ],
)
def test_impossible_options_are_refused_with_the_value_and_the_remedy(options, parts):
    error_of(lambda: load(**{"num_rows": 5, **options}), *parts)


def test_the_shape_is_checked_also_where_the_files_are_written(tmp_path):
    error_of(lambda: graph_paths.write_prosqa_files(tmp_path, num_rows=2, num_nodes=3), "num_nodes is 3", "choose 12")


@pytest.mark.parametrize("name, nearest", [("tests", "did you mean 'test'"), ("valid", "did you mean 'validation'")])
def test_an_unknown_split_is_answered_with_the_nearest(name, nearest):
    error_of(lambda: load(name), "graph_paths", repr(name), nearest)
