"""Batches of rows that cost alike: fewer padded columns and passes, every row once, exact when resumed or shared."""

import shutil

import pytest
import torch
from test_train import losses, recipe  # noqa: F401  (a fixture)
from tiny import tiny_model, tiny_processor, tiny_seq2seq

import train_hf
from mmcoconut.data import image_counts, load_examples
from mmcoconut.errors import RecipeError
from mmcoconut.training.collator import CurriculumCollator
from mmcoconut.training.curriculum import Curriculum
from mmcoconut.training.grouping import StageGroupedSampler
from mmcoconut.training.trainer import with_index


NUM_ROWS, BATCH = 480, 8
RAGGED = {"uniform_prob": 0.3, "pad_latent_to_max": False, "max_latent_stage": 4}
GROUPED = ["--train_sampling_strategy", "group_by_length"]


@pytest.fixture(scope="module")
def rows():
    """Mazes whose questions differ in length, every third without its picture."""
    mazes = load_examples("arrow_mazes", split="train", num_rows=NUM_ROWS, max_hops=4, cell_size=8)
    changed = mazes.map(
        lambda row, index: {
            "question": row["question"] + " Look closely." * (index % 5),
            "images": [] if index % 3 == 0 else row["images"],
        },
        with_indices=True,
    )
    return with_index(changed)


def sampler_of(rows, model=None, epoch=2, **curriculum):
    processor = tiny_processor(model or tiny_model())
    made = CurriculumCollator(Curriculum(**(curriculum or RAGGED)), processor)
    made.epoch = epoch
    return StageGroupedSampler(BATCH, rows, made, seed=0)


def cost(collator, rows, order) -> tuple[int, int]:
    """Padded columns, and passes of the decoder, of an epoch in this order."""
    padded = passes = 0
    for start in range(0, len(order), BATCH):
        of_batch = [rows[index] for index in order[start : start + BATCH]]
        batch = collator.supervised(of_batch, collator.training_plan, [[1] * len(row["images"]) for row in of_batch])
        padded += int((batch["attention_mask"] == 0).sum())
        passes += 1 + int((batch["input_ids"] == collator.processor.latent_token_id).any(0).sum())
    return padded, passes


def test_grouped_batches_have_fewer_padded_columns_and_fewer_passes(rows):
    sampler = sampler_of(rows)
    random_order = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(0)).tolist()
    padded, passes = cost(sampler.collator, rows, list(sampler))
    padded_at_random, passes_at_random = cost(sampler.collator, rows, random_order)
    assert padded < 0.6 * padded_at_random
    assert passes < 0.85 * passes_at_random


def test_an_epoch_holds_every_row_once_and_the_next_another_order(rows):
    sampler = sampler_of(rows)
    first, again = list(sampler), list(sampler)
    sampler.collator.epoch = 3
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(NUM_ROWS))
    assert first == again != second
    batches = [{frozenset(order[at : at + BATCH]) for at in range(0, NUM_ROWS, BATCH)} for order in (first, second)]
    assert len(batches[0] & batches[1]) < NUM_ROWS // BATCH // 2


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_counted_lengths_differ_from_those_of_batches_by_a_constant_and_at_most_a_token(rows, family):
    """The end of a question may be one token with the new line behind it."""
    sampler = sampler_of(rows, tiny_seq2seq() if family == "encoder_decoder" else None)
    collator = sampler.collator
    for epoch in (0, 2, 9):
        collator.epoch = epoch
        differences = set()
        for row, lengths in zip(rows, sampler.of_rows, strict=True):
            plan = collator.training_plan(row)
            [(prompt, target)] = collator.encode_row(row, plan, [1] * len(row["images"]))
            differences.add(len(prompt) + len(target) - lengths.under(plan))
        assert max(differences) - min(differences) <= 1


def test_rows_are_ordered_by_latents_before_tokens_at_the_stage_of_the_epoch(rows):
    sampler = sampler_of(rows)
    for epoch in (0, 1, 3):
        sampler.collator.epoch = epoch
        plans = [sampler.collator.training_plan(row) for row in rows]
        tokens = [lengths.under(plan) for lengths, plan in zip(sampler.of_rows, plans, strict=True)]
        costs = sampler.costs()
        by_cost = sorted(range(NUM_ROWS), key=lambda index: costs[index])
        assert by_cost == sorted(range(NUM_ROWS), key=lambda index: (plans[index].num_latents, tokens[index]))


def test_pictures_are_counted_without_being_read(rows):
    assert image_counts(rows) == [len(row["images"]) for row in rows]
    some = rows.select(range(400, 10, -7))
    assert image_counts(some) == [len(row["images"]) for row in some]


@pytest.mark.slow
def test_grouped_run_is_resumed_exactly_inside_a_stage(recipe, tmp_path):  # noqa: F811
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = [*GROUPED, "--save_strategy", "steps", "--save_steps", "4", "--uniform_prob", "0.3"]
    options += ["--text_config.resid_pdrop", "0.1"]
    train_hf.main([recipe, "--output_dir", str(whole), *options])
    shutil.copytree(whole / "checkpoint-8", resumed / "checkpoint-8")
    train_hf.main([recipe, "--output_dir", str(resumed), *options, "--resume_from_checkpoint", "true"])
    assert losses(resumed) == losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], GROUPED])
def test_workers_that_read_and_tokenize_change_no_result(recipe, tmp_path, options):  # noqa: F811
    options = [*options, "--uniform_prob", "0.3", "--text_config.resid_pdrop", "0.1"]
    for workers in ("0", "2"):
        words = ["--output_dir", str(tmp_path / workers), "--dataloader_num_workers", workers]
        train_hf.main([recipe, *words, *options])
    assert losses(tmp_path / "0") == losses(tmp_path / "2")


def test_grouping_changes_the_order_of_training_and_not_the_rows_evaluated(recipe, tmp_path):  # noqa: F811
    found = {}
    for name, options in (("random", []), ("grouped", GROUPED)):
        still = ["--learning_rate", "0.0", "--num_train_epochs", "1", *options]
        results = train_hf.main([recipe, "--output_dir", str(tmp_path / name), *still])
        found[name] = results["stages"], losses(tmp_path / name)
    assert found["random"][0] == found["grouped"][0]
    assert found["random"][1] != found["grouped"][1]


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("train_sampling_strategy", "batch_rebalance", "choose one of random, sequential, group_by_length"),
        (
            "length_column_name",
            "length",
            "lengths change with the stage, so rows have no such column: remove this key",
        ),
    ],
)
def test_what_needs_one_length_a_row_is_refused(recipe, key, value, remedy):  # noqa: F811
    with pytest.raises(RecipeError, match=f"{key} = '{value}': .*{remedy}"):
        train_hf.main([recipe, f"--{key}", value])
