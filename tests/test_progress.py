"""Progress: bars where they can be drawn, now and then a line elsewhere; the table of a run, and its time left."""

import io
import logging
from types import SimpleNamespace

import pytest
from datasets import Dataset
from tqdm import auto

from mmcoconut import progress as module
from mmcoconut.progress import ProgressLines, progress
from mmcoconut.training import plan
from mmcoconut.training.curriculum import Curriculum


@pytest.fixture
def clock(monkeypatch):
    """A clock of tqdm's that the test turns."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_elsewhere_than_in_a_terminal_a_line_comes_now_and_then(clock, monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(module.sys, "stderr", written)
    with progress(total=100, desc="answering") as bar:
        assert type(bar) is ProgressLines
        for _ in range(100):
            clock[0] += 1.0
            bar.update()
    lines = [line for line in written.getvalue().replace("\r", "").splitlines() if line.strip()]
    assert 2 <= len(lines) <= 4
    assert all(line.startswith("answering: ") and " of 100 rows, " in line and " left" in line for line in lines)


def test_short_work_writes_nothing_to_a_log(clock, monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(module.sys, "stderr", written)
    assert [*progress(range(50), desc="row checks")] == [*range(50)]
    assert written.getvalue() == ""


@pytest.mark.parametrize("rank, silent, shows", [(None, False, True), ("1", False, False), ("0", True, False)])
def test_one_process_shows_a_bar_in_a_terminal(rank, silent, shows, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(module.sys, "stderr", terminal)
    monkeypatch.setattr(module, "BAR_DELAY", 0)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with progress(total=2, desc="audit", silent=silent) as bar:
        assert isinstance(bar, auto.tqdm)
        bar.update(2)
    assert ("audit: 100%" in terminal.getvalue()) == shows == bool(terminal.getvalue())


def run_of(**changes):
    args = SimpleNamespace(train_batch_size=8, gradient_accumulation_steps=2, world_size=3)
    return {"args": args, "max_steps": 50, "updates_per_epoch": 10, **changes}


def rows_of(count: int) -> Dataset:
    """Rows of 0 to 3 steps."""
    return Dataset.from_dict({"steps": [["a step"] * (index % 4) for index in range(count)]})


@pytest.mark.parametrize(
    "options, said",
    [
        ({"max_latent_stage": 3}, None),
        ({"max_latent_stage": 4}, "stage 4 replaces no further step and only adds latents. Set max_latent_stage to 3"),
        ({"max_latent_stage": 6, "mode": "icot"}, "stages 4 to 6 replace no further step"),
        ({"max_latent_stage": 6, "pad_latent_to_max": False}, "stages 4 to 6 replace no further step. Set"),
        ({"max_latent_stage": 6, "mode": "cot"}, None),
        ({"max_latent_stage": 6, "thoughts_per_turn": 2}, None),
    ],
)
def test_stages_after_the_last_step_are_warned_of(options, said, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mmcoconut"), "propagate", True)
    plan.warn_of_idle_stages(Curriculum(**options), 3)
    assert [said] == [None, *[said for message in caplog.messages if said in message]][-1:]


def test_the_table_says_what_a_run_will_do():
    counts = {"parameters": 4000, "trainable_parameters": 1000, "objective_parameters": 20}
    curriculum = Curriculum(c_thought=2, max_latent_stage=2, epochs_per_stage=(2, 1))
    text = plan.plan_text(curriculum, {"eval": range(5), "train": rows_of(1200)}, counts=counts, **run_of())
    assert "| mode | coconut |" in text and "| rows | eval 5, train 1,200 |" in text
    assert "| updates | 50, 10 per epoch, 48 rows each |" in text and "| steps | 0 to 3 per training row |" in text
    assert "| parameters | 4,000, of which 1,000 are trained (25 %) |" in text and "| of objectives | 20 " in text
    assert text.endswith("| 0 | 1–2 | 0 |\n| 1 | 3 | 2 |\n| 2 | 4 | 4 |\n| 3 | 5 | 4 |")


def test_batches_of_answers_are_counted_in_rows():
    """8 answers per device, 2 batches, 3 processes: 48 answers per update, 6 to each row."""
    run = run_of()
    run["args"].num_generations = 6
    counts = {"parameters": 4000, "trainable_parameters": 1000}
    text = plan.plan_text(Curriculum(max_latent_stage=1), {"train": rows_of(120)}, counts=counts, **run)
    assert "| updates | 50, 10 per epoch, 8 rows each, 6 answers per row |" in text


def test_the_time_left_is_said_after_ten_updates(caplog, monkeypatch):
    now, state = [0.0], SimpleNamespace(global_step=100, max_steps=210, is_world_process_zero=True)
    monkeypatch.setattr(plan.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(logging.getLogger("mmcoconut"), "propagate", True)
    callback = plan.PlanCallback(None, {})
    callback.first_update = state.global_step  # a run that is resumed
    with caplog.at_level(logging.INFO):
        for seconds in (60, *[6] * 15):  # the first one compiles
            state.global_step, now[0] = state.global_step + 1, now[0] + seconds
            callback.on_step_end(None, state, None)
    assert caplog.messages == [
        "110 of 210 updates done, 6 s each: about 10 min left without evaluations. Stages with more latents take "
        "longer."
    ]
