"""Stage arithmetic, the collator's layout and the callback's schedule."""

import math
import re

import pytest
import torch
from tiny import tiny_model, tiny_processor, tiny_seq2seq

from mmcoconut.arguments.choices import MODES
from mmcoconut.data import load_examples
from mmcoconut.training.callbacks import CurriculumCallback
from mmcoconut.training.collator import IGNORED, CurriculumCollator, encode_target
from mmcoconut.training.curriculum import Curriculum, RowPlan


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_model())


@pytest.fixture(scope="module")
def rows():
    mazes = load_examples("arrow_mazes", split="train", num_rows=12, max_hops=3)
    return [{**row, "index": index} for index, row in enumerate(mazes)]


def collator(processor, epoch=0, **curriculum):
    made = CurriculumCollator(Curriculum(**curriculum), processor, max_length=256, max_new_tokens=8)
    made.epoch = epoch
    return made


@pytest.mark.parametrize(
    "lengths, start_epoch, stages",
    [
        (2, 0, [0, 0, 1, 1, 2, 2, 3, 3, 3]),
        ((3, 1), 0, [0, 0, 0, 1, 2, 3, 3, 3, 3]),
        (2, 3, [1, 2, 2, 3, 3, 3, 3, 3, 3]),
    ],
)
def test_stage_of_an_epoch_is_counted_in_stage_lengths_and_stops_after_the_last(lengths, start_epoch, stages):
    curriculum = Curriculum(max_latent_stage=2, epochs_per_stage=lengths, start_epoch=start_epoch)
    assert [curriculum.stage_at(epoch) for epoch in range(9)] == stages


# Worked by hand from the original's published rule; columns: stage, number of steps, steps skipped, latents.
@pytest.mark.parametrize(
    "padded, stage, num_steps, skipped, latents",
    [
        (True, 0, 3, 0, 0),
        (True, 1, 3, 1, 2),
        (True, 2, 3, 2, 4),
        (True, 2, 1, 1, 4),
        (True, 3, 5, 5, 4),
        (True, 3, 0, 0, 4),
        (False, 2, 1, 1, 2),
        (False, 3, 5, 5, 4),
        (False, 2, 0, 0, 0),
    ],
)
def test_stage_replaces_steps_by_latents(padded, stage, num_steps, skipped, latents):
    curriculum = Curriculum(c_thought=2, max_latent_stage=2, pad_latent_to_max=padded)
    assert curriculum.plan(stage, num_steps) == RowPlan(skipped, latents)


@pytest.mark.parametrize("padded", [True, False])
def test_evaluation_never_looks_at_the_gold_number_of_steps(padded):
    curriculum = Curriculum(c_thought=2, max_latent_stage=3, pad_latent_to_max=padded)
    assert [curriculum.num_latents(stage) for stage in range(6)] == [0, 2, 4, 6, 6, 6]


def test_modes_differ_in_steps_and_latents_only_as_named():
    plans = {mode: Curriculum(mode=mode, max_latent_stage=3).plan(2, 3) for mode in MODES}
    assert plans == {
        "coconut": RowPlan(2, 2),
        "pause": RowPlan(2, 2),
        "no_thoughts": RowPlan(2, 0),
        "markers": RowPlan(2, 0),
        "icot": RowPlan(2, 0),
        "cot": RowPlan(0, 0),
        "no_cot": RowPlan(3, 0),
    }
    assert Curriculum(mode="cot").stage_at(100) == Curriculum(mode="no_cot").stage_at(100) == 0


def test_uniform_prob_draws_each_stage_equally_often_and_the_same_in_every_worker():
    curriculum = Curriculum(uniform_prob=0.5, max_latent_stage=3)
    draws = [curriculum.training_stage(9, num_steps=3, epoch=1, index=index) for index in range(4000)]
    assert draws == [curriculum.training_stage(9, num_steps=3, epoch=1, index=index) for index in range(4000)]
    shares = [draws.count(stage) / len(draws) for stage in (0, 1, 2, 3, 9)]
    assert shares == pytest.approx([0.125, 0.125, 0.125, 0.125, 0.5], abs=0.025)


def test_removal_smoothing_takes_rows_of_icot_further_with_the_probabilities_of_the_paper():
    curriculum = Curriculum(mode="icot", max_latent_stage=3)
    draws = [curriculum.training_stage(1, num_steps=3, epoch=1, index=index) for index in range(40_000)]
    assert draws == [curriculum.training_stage(1, num_steps=3, epoch=1, index=index) for index in range(40_000)]
    shares = [sum(draw >= stage for draw in draws) / len(draws) for stage in (1, 2, 3)]
    assert shares[0] == 1 and max(draws) <= curriculum.last_stage == 4
    assert shares[1] == pytest.approx(math.exp(-4), rel=0.1)
    assert shares[2] == pytest.approx(math.exp(-8), abs=3e-4)
    assert {curriculum.training_stage(4, num_steps=3, epoch=1, index=index) for index in range(1000)} == {4}
    assert curriculum.resets_optimizer and not Curriculum(mode="no_thoughts").resets_optimizer


def test_first_latents_share_a_column_and_only_targets_are_labelled(processor, rows):
    rows = [{**row, "question": "Where? " * (index % 3)} for index, row in enumerate(rows)]
    batch = collator(processor, epoch=2)(rows)
    latent = batch["input_ids"] == processor.latent_token_id
    assert latent.sum(1).tolist() == [2] * len(rows)
    assert len({row.nonzero()[0].item() for row in latent}) == 1
    for row, ids, mask, labels in zip(rows, batch["input_ids"], batch["attention_mask"], batch["labels"]):
        real = ids[mask.bool()].tolist()
        prompt = processor.encode_prompt(row["question"], num_latents=2)
        target = encode_target(processor, row["steps"][2:], row["answers"][0])
        assert real == prompt + target
        assert labels[labels != IGNORED].tolist() == target
        assert labels[mask.bool()].tolist() == [IGNORED] * len(prompt) + target


def test_prompt_is_the_beginning_of_the_training_row_in_every_mode(processor, rows):
    for mode in MODES:
        made = collator(processor, epoch=2, mode=mode)
        prompts = made.prompts(rows)
        training = made(rows)
        for index in range(len(rows)):
            prompt = prompts["input_ids"][index][prompts["attention_mask"][index].bool()].tolist()
            row = training["input_ids"][index][training["attention_mask"][index].bool()].tolist()
            assert row[: len(prompt)] == prompt
            answer = processor.tokenizer.decode(row[len(prompt) :], skip_special_tokens=True)
            assert answer.endswith(f"### {rows[index]['answers'][0]}")
        assert torch.equal(prompts["supervised"]["input_ids"], training["input_ids"])


def test_pieces_tokenized_apart_equal_the_whole(processor, rows):
    for row in rows:
        whole = "".join(f"{step}\n" for step in row["steps"]) + f"### {row['answers'][0]}"
        expected = [*processor.encode_text(whole), processor.tokenizer.eos_token_id]
        assert encode_target(processor, row["steps"], row["answers"][0]) == expected


def test_row_longer_than_the_positions_is_refused_by_name(processor, rows):
    made = CurriculumCollator(Curriculum(), processor, max_length=20)
    with pytest.raises(ValueError, match=r"arrow_mazes train row 0: .* tokens, .* max_length, is 20\. Shorten"):
        made(rows)


def test_prompt_that_leaves_no_room_for_the_answer_is_refused_by_name(processor, rows):
    made = CurriculumCollator(Curriculum(), processor, max_length=40, max_new_tokens=40)
    with pytest.raises(ValueError, match="arrow_mazes train row 0: the prompt with max_new_tokens takes"):
        made.prompts(rows)


def lengths_by_definition(made, row, room: int) -> list[int]:
    """Tokens of a row at each stage that it is laid out at, encoded anew for each; with room also of its prompts."""
    lengths = []
    for stage in made.stages:
        made.fixed_stage = stage
        plan = made.training_plan(row)
        turns = [made.encode_row(row, plan, [1])]
        if room:
            turns.append(made.encode_row(row, made.evaluation_plan(row), [1]))
            prompt = made.encode_prompt(row, [1], made.curriculum.num_latents(made.fixed_stage))
            lengths.append(made.longest_part(prompt, room))
        lengths += map(made.length_of, turns)
    made.fixed_stage = None
    return lengths


@pytest.mark.parametrize("markers", ["both", "none"])
@pytest.mark.parametrize("room", [0, 9, 200])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("mode, c_thought", [("coconut", 1), ("coconut", 30), ("cot", 1), ("no_cot", 1), ("pause", 4)])
def test_longest_form_of_a_row_is_that_of_all_its_stages(mode, c_thought, padded, room, markers, rows):
    made = collator(
        tiny_processor(tiny_model(), markers=markers), mode=mode, c_thought=c_thought, pad_latent_to_max=padded
    )
    for row in rows[:3]:
        assert made.longest(row, room=room) == max(lengths_by_definition(made, row, room))
    encoder_decoder = collator(tiny_processor(tiny_seq2seq()), mode=mode, c_thought=c_thought)
    assert encoder_decoder.longest(rows[0], room=room) == max(lengths_by_definition(encoder_decoder, rows[0], room))


@pytest.mark.parametrize(
    "options, num_epochs, stages",
    [
        ({}, None, [0, 1, 2, 3, 4]),
        ({}, 3, [0, 1, 2]),
        ({"start_epoch": 3}, None, [3, 4]),
        ({"start_epoch": 1}, 2, [1, 2]),
        ({"uniform_prob": 0.1}, 1, [0, 1, 2, 3, 4]),
        ({"mode": "cot", "uniform_prob": 0.1}, 9, [0]),
    ],
)
def test_only_stages_of_the_run_are_measured(options, num_epochs, stages, processor):
    made = CurriculumCollator(Curriculum(**options), processor, num_epochs=num_epochs)
    assert [*made.stages] == stages


@pytest.mark.parametrize(
    "options, num_epochs, level, said",
    [
        ({"epochs_per_stage": 5}, 2, "WARNING", "ends in stage 0 of 4, with 0 of 3 latents: .* Train for 21 epochs"),
        ({"epochs_per_stage": 1, "start_epoch": 2}, 1, "WARNING", "stage 2 of 4, with 2 of 3 .* Train for 3 epochs"),
        (
            {"epochs_per_stage": 1, "start_epoch": 2},
            2,
            "INFO",
            "stage 3 of 4. The last .* written steps after the first 3",
        ),
        ({"epochs_per_stage": (4, 1)}, 8, "INFO", "ends in stage 4 of 4"),
    ],
)
def test_a_run_says_at_its_start_in_which_stage_it_ends(options, num_epochs, level, said, processor, caplog):
    caplog.set_level("INFO")
    CurriculumCallback(CurriculumCollator(Curriculum(**options), processor)).announce_last_stage(num_epochs)
    (record,) = caplog.records
    assert record.levelname == level and re.search(said, record.message)


def test_a_run_without_stages_says_nothing_of_them(processor, caplog):
    caplog.set_level("INFO")
    CurriculumCallback(CurriculumCollator(Curriculum(mode="cot"), processor)).announce_last_stage(2)
    assert not caplog.records


@pytest.mark.parametrize("values", [{"mode": "cococonut"}, {"epochs_per_stage": 0}, {"epochs_per_stage": ()}])
def test_impossible_schedule_is_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Curriculum(**values)
