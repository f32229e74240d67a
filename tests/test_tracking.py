"""What trackers get of a run: losses, stage, accuracy of every stage, figures of thoughts, pictures with answers."""

import doctest
import json
import math
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import TINY, launch

import train_hf
from mmcoconut.data import load_examples, question_text
from mmcoconut.data.images import open_images
from mmcoconut.models import load_model
from mmcoconut.processing_mmcoconut import MMCoconutProcessor
from mmcoconut.training import tracking


STAGES = [0, 1, 2]
UPDATES = [6, 12, 18]  # at the end of each stage
NUM_ROWS = 8
FIGURES = ("eval_thought_norm", "eval_thought_cosine")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run of three stages that reported to tensorboard: its folder and its events."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(TINY)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
        train_hf.main(
            [str(folder / "tiny.yaml"), "--output_dir", str(folder / "run"), "--report_to", "tensorboard"]
            + ["--test_split", "test", "--dataset_options.num_rows.test", "4"]
        )
    events = EventAccumulator(str(folder / "events"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    return folder / "run", events


def scalars(events, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "checkpoint-18" / "trainer_state.json").read_text())["log_history"]


def test_losses_stages_and_accuracies_reach_the_tracker(tracked):
    _, events = tracked
    assert [step for step, _ in scalars(events, "train/loss")] == list(range(1, 19))
    assert scalars(events, "eval/stage") == list(zip(UPDATES, map(float, STAGES)))
    assert [step for step, _ in scalars(events, "eval/accuracy")] == UPDATES


def test_thoughts_have_a_norm_from_the_first_and_a_cosine_from_the_second_one_on(tracked):
    folder, events = tracked
    norms, cosines = (scalars(events, f"eval/thought_{name}") for name in ("norm", "cosine"))
    assert [step for step, _ in norms] == [12, 18]
    assert [step for step, _ in cosines] == [18]
    logged = [{name: record[name] for name in FIGURES if name in record} for record in history(folder)]
    assert [len(record) for record in logged if record] == [1, 2]
    # The events hold single precision.
    assert norms[-1][1] == pytest.approx([record for record in logged if record][-1]["eval_thought_norm"], rel=1e-6)


@pytest.mark.parametrize("tolerance", [1e-5])
def test_the_figures_are_those_of_the_thoughts_of_the_first_rows(tracked, tolerance):
    folder, _ = tracked
    model = load_model(folder)
    processor = MMCoconutProcessor.from_pretrained(folder)
    options = {"grid_size": 3, "max_hops": 2, "num_rows": NUM_ROWS, "cell_size": 8}
    rows = list(load_examples("arrow_mazes", split="validation", **options))
    texts = [question_text(row) for row in rows]
    inputs = processor(images=[open_images(row) for row in rows], text=texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        first, second = model(**inputs, output_thoughts=True).thoughts.double().unbind(dim=1)  # (B, D) each
    norm = torch.cat([first, second]).norm(dim=-1).mean().item()
    cosine = ((first * second).sum(-1) / first.norm(dim=-1) / second.norm(dim=-1)).mean().item()
    last = next(record for record in reversed(history(folder)) if "eval_thought_norm" in record)
    assert [last[name] for name in FIGURES] == pytest.approx([norm, cosine], abs=tolerance)


def test_tensorboard_shows_the_pictures_and_what_was_asked_and_answered(tracked):
    _, events = tracked
    assert events.Tags()["images"] == [f"samples/{number}" for number in range(NUM_ROWS)]
    assert [event.step for event in events.Images("samples/0")] == UPDATES
    assert (events.Images("samples/0")[0].width, events.Images("samples/0")[0].height) == (24, 24)
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/text_summary")]
    rows = load_examples("arrow_mazes", split="validation", num_rows=NUM_ROWS, grid_size=3, max_hops=2)
    assert len(texts) == len(UPDATES)
    for text in texts:
        lines = text.splitlines()
        assert lines[0] == "| picture | question | expected | given |"
        for number, (row, line) in enumerate(zip(rows, lines[2:], strict=True)):
            assert line.startswith(f"| samples/{number} | {row['question']} | {row['answers'][0]} | ")


def test_tracking_changes_neither_losses_nor_answers(tracked, recipe, tmp_path):
    folder, _ = tracked
    train_hf.main([recipe, "--output_dir", str(tmp_path / "run")])
    kept = ("loss", "eval_loss", "eval_accuracy", "eval_generated_tokens")
    plain, seen = (
        [[record[name] for name in kept if name in record] for record in history(run) if not {*FIGURES} & {*record}]
        for run in (tmp_path / "run", folder)
    )
    assert plain == seen
    assert not [record for record in history(tmp_path / "run") if {*FIGURES} & {*record}]


@pytest.mark.slow
def test_trackio_gets_a_table_with_the_pictures(recipe, tmp_path):
    folder = tmp_path / "tracked"
    options = ["--output_dir", str(tmp_path / "run"), "--report_to", "trackio"]
    launch(recipe, *options, folder=tmp_path, processes=1, TRACKIO_DIR=str(folder))
    [database] = folder.glob("**/*.db")
    with sqlite3.connect(database) as connection:
        records = [json.loads(text) for (text,) in connection.execute("select metrics from metrics order by id")]
    tables = [record["samples"] for record in records if "samples" in record]
    assert [record["train/global_step"] for record in records if "samples" in record] == UPDATES
    for table in tables:
        assert [row["expected"] for row in table["_value"]] == expected_answers()
        assert {row["picture"]["_type"] for row in table["_value"]} == {"trackio.image"}
    assert len(list(folder.glob("**/*.png"))) == len(UPDATES) * NUM_ROWS
    norms = [record["eval/thought_norm"] for record in records if "eval/thought_norm" in record]
    assert len(norms) == 2 and all(math.isfinite(norm) and norm > 0 for norm in norms)


def expected_answers() -> list[str]:
    rows = load_examples("arrow_mazes", split="validation", num_rows=NUM_ROWS, grid_size=3, max_hops=2)
    return [row["answers"][0] for row in rows]


@pytest.mark.slow
def test_wandb_offline_keeps_pictures_and_a_table_of_the_texts(recipe, tmp_path):
    pytest.importorskip("wandb")
    variables = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    options = ["--output_dir", str(tmp_path / "run"), "--report_to", "wandb"]
    launch(recipe, *options, folder=tmp_path, processes=1, **variables)
    [run] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert run.stat().st_size > 0
    tables = [json.loads(path.read_text()) for path in tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")]
    assert len(tables) == len(UPDATES)
    for table in tables:
        assert table["columns"] == ["question", "expected", "given"]
        assert [expected for _, expected, _ in table["data"]] == expected_answers()
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/**/*.png"))) == len(UPDATES) * NUM_ROWS


def test_figures_of_known_thoughts():
    thoughts = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 2.0]]])
    figures = tracking.thought_figures(thoughts)
    assert figures == pytest.approx({"eval_thought_norm": 2.5, "eval_thought_cosine": (0.8 + 0.0) / 2})
    assert tracking.thought_figures(thoughts[:, :0]) == {}
    assert tracking.thought_figures(thoughts[:, :1]) == {"eval_thought_norm": 3.5}


def test_large_pictures_are_sent_small_and_rows_without_one_get_none():
    row = {"images": [{"bytes": None, "path": None}], "row_id": "row 0"}
    assert tracking.small_picture({**row, "images": []}) is None
    [maze] = load_examples("arrow_mazes", split="test", num_rows=1, cell_size=200)
    assert tracking.small_picture(maze).size == (tracking.LONGEST_SIDE, tracking.LONGEST_SIDE)
    assert np.asarray(open_images(maze)[0]).shape == (600, 600, 3)


def test_docstring_examples_are_true():
    assert doctest.testmod(tracking).failed == 0
