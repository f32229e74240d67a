"""mmcoconut.data.pointer_chasing: steps and answers follow from the listed pairs, and splits are separate."""

import pytest

from mmcoconut.data import SPLITS, load_examples
from mmcoconut.data.pointer_chasing import generate, load
from mmcoconut.errors import UsageError


def test_steps_and_answer_follow_from_the_question_alone():
    rows = load(split="train", num_rows=200, num_letters=7, min_hops=1, max_hops=6)
    for row in rows:
        pairs, question = row["question"].split(" From ")
        leads_to = dict(pair.split(">") for pair in pairs.split())
        start, hops = question.removesuffix(".").split(" go ")
        path = [start]
        for _ in range(int(hops)):
            path.append(leads_to[path[-1]])
        assert row["steps"] == [f"{a}>{b}" for a, b in zip(path, path[1:])]
        assert row["answers"] == [path[-1]] and len(set(path)) == len(path)
        assert len(leads_to) == 7 and set(leads_to) == set(leads_to.values())
    assert {len(row["steps"]) for row in rows} == {1, 2, 3, 4, 5, 6}


def test_splits_share_no_cycle_whatever_their_seeds_and_more_rows_continue():
    layouts = {
        split: {chase.layout() for chase in generate(split, num_rows=300, seed=seed, num_letters=5)}
        for seed, split in enumerate(SPLITS)
    }
    assert not layouts["train"] & layouts["validation"] and not layouts["train"] & layouts["test"]
    assert not layouts["validation"] & layouts["test"]
    few, many = (list(generate("test", num_rows=number)) for number in (20, 40))
    assert many[:20] == few and len(set(many)) == 40
    assert few != list(generate("test", num_rows=20, seed=1))


def test_the_position_of_a_pair_does_not_give_the_answer_away():
    chases = list(generate("train", num_rows=3000, num_letters=6, min_hops=3, max_hops=3))
    leads_to_answer = [
        sum(chase.cycle[chase.order[place]] == chase.path[-2] for chase in chases) for place in range(6)
    ]
    assert all(abs(count - 500) < 100 for count in leads_to_answer)  # five standard deviations


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_letters": 2}, "num_letters is 2; choose 3 to 26"),
        ({"num_letters": 4, "max_hops": 4}, "max_hops 4 and num_letters 4"),
        ({"min_hops": 3, "max_hops": 2}, "min_hops is 3, max_hops 2"),
        ({"steps": "letter"}, "steps is 'letter'.*letters"),
        ({"num_letters": 3, "max_hops": 1, "num_rows": 10_000_000}, "lower num_rows"),
    ],
)
def test_impossible_options_are_named(options, message, monkeypatch):
    monkeypatch.setattr("mmcoconut.data.pointer_chasing.MAX_DRAWS", 1e-5)
    with pytest.raises(UsageError, match=message):
        load(split="test", **options)


def test_letters_alone_are_the_ends_of_the_pairs():
    pairs, letters = (load(split="test", num_rows=20, steps=form) for form in ("pairs", "letters"))
    assert letters["steps"] == [[step[-1] for step in row] for row in pairs["steps"]]
    assert letters["question"] == pairs["question"]


def test_it_is_a_data_set_by_name():
    assert load_examples("pointer_chasing", split="test", num_rows=3).num_rows == 3
