"""Resuming: the newest whole checkpoint is taken, another course is refused, and nothing is overwritten before."""

import errno
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_train import ROOT, TINY, losses

import train_hf
from mmcoconut.errors import UsageError
from mmcoconut.processing_mmcoconut import MMCoconutProcessor
from mmcoconut.records import write_json
from mmcoconut.training.checkpoints import checkpoints_of, choose_checkpoint, damage, newest_whole, rotate


OPTIONS = ["--save_strategy", "steps", "--save_steps", "4", "--lr_scheduler_type", "constant"]
RESUMED = ["--resume_from_checkpoint", "true"]
# What only a run that trains may read; a checkpoint without them still answers.
NOT_READ = ("training_args.bin", "README.md")


def run(folder: Path, *options: str) -> dict:
    return train_hf.main([str(folder.parent / "tiny.yaml"), "--output_dir", str(folder), *OPTIONS, *options])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of 18 updates, three epochs, with checkpoints 4, 6, 8, 12, 16, 18; and its recipe beside it."""
    folder = tmp_path_factory.mktemp("resuming") / "whole"
    (folder.parent / "tiny.yaml").write_text(TINY)
    run(folder)
    return folder


@pytest.fixture
def stopped(whole):
    """That run as if it had been killed after checkpoint-8."""
    folder = whole.parent / "stopped"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("checkpoint-4", "checkpoint-6", "checkpoint-8"):
        shutil.copytree(whole / name, folder / name)
    shutil.copy(whole / "recipe.yaml", folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def messages(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def assert_same_end(folder: Path, whole: Path) -> None:
    assert losses(folder) == losses(whole)
    weights = load_file(whole / "model.safetensors")
    assert all(torch.equal(weight, weights[name]) for name, weight in load_file(folder / "model.safetensors").items())


def test_checkpoints_are_whole_and_say_how_they_were_trained(whole):
    assert [path.name for path in checkpoints_of(whole)] == [f"checkpoint-{n}" for n in (18, 16, 12, 8, 6, 4)]
    assert not any(damage(path) for path in checkpoints_of(whole))
    course = json.loads((whole / "checkpoint-8" / "course.json").read_text())["course"]
    assert course["recipe"] == yaml.safe_load((whole / "recipe.yaml").read_text())
    assert (course["rows"]["train"]["number"], course["rows"]["eval"]["number"]) == (48, 8)
    assert (course["rows per update"], course["processes"]) == (8, 1)
    assert not (whole / ".saving" / "checkpoint-18").exists()


@pytest.mark.parametrize("way", ["removed", "cut"])
def test_checkpoint_with_any_file_removed_or_cut_is_passed_over(stopped, way, caplog):
    """Also without its course.json, as earlier versions saved it, for the files that resuming reads."""
    newest = stopped / "checkpoint-8"
    files = contents(newest)
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "course.json"} <= files.keys()
    for name in files.keys() - {*NOT_READ}:
        caplog.clear()
        if way == "removed":
            (newest / name).unlink()
        else:
            (newest / name).write_bytes(files[name][: len(files[name]) // 2])
        if (name, way) == ("course.json", "removed"):
            assert newest_whole(stopped) == newest
        else:
            assert choose_checkpoint(stopped, True) == stopped / "checkpoint-6"
            assert "checkpoint-8: " in messages(caplog) and name in messages(caplog)
            with pytest.raises(UsageError, match=rf"checkpoint-8 cannot be resumed from: .*{name}.*checkpoint-6"):
                choose_checkpoint(stopped, str(newest))
        (newest / name).write_bytes(files[name])
    (newest / "course.json").unlink()
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (newest / name).unlink() if way == "removed" else (newest / name).write_bytes(files[name][:-200])
        found = {"weights is missing": "model.safetensors is missing"}.get(damage(newest)[0], damage(newest)[0])
        assert found == f"{name} is {'missing' if way == 'removed' else 'cut'}"
        (newest / name).write_bytes(files[name])
    assert not damage(newest)


def test_run_with_a_cut_newest_checkpoint_goes_on_from_the_older_one_and_ends_equal(stopped, whole, caplog):
    cut = stopped / "checkpoint-8" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:1000])
    unfinished = stopped / ".saving" / "checkpoint-12"
    unfinished.mkdir(parents=True)
    run(stopped, *RESUMED)
    said = messages(caplog)
    assert "not resumed from" in said and "checkpoint-8: model.safetensors has 1000 bytes" in said
    assert "checkpoint-12: the run ended while it was being saved" in said
    assert not unfinished.exists() and not damage(stopped / "checkpoint-8")
    assert_same_end(stopped, whole)


def test_disk_that_fills_up_in_a_save_leaves_the_older_checkpoint_and_the_run_goes_on(stopped, whole, monkeypatch):
    save = torch.save

    def fill_disk(value, file, *args, **kwargs):
        save(value, file, *args, **kwargs)
        if str(file).endswith("scheduler.pt"):
            os.truncate(file, 10)
            raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(torch, "save", fill_disk)
    with pytest.raises(OSError, match="No space left"):
        run(stopped, *RESUMED)
    assert [path.name for path in checkpoints_of(stopped)] == ["checkpoint-8", "checkpoint-6", "checkpoint-4"]
    assert newest_whole(stopped) == stopped / "checkpoint-8"
    monkeypatch.undo()
    run(stopped, *RESUMED)
    assert_same_end(stopped, whole)


def test_disk_that_is_full_keeps_the_old_record(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    write_json(file, {"n": 1})

    def fail(path, text, **kwargs):
        path.write_bytes(text.encode()[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        write_json(file, {"n": 2})
    assert json.loads(file.read_text()) == {"n": 1} and [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_rotation_deletes_damaged_checkpoints_first_and_never_what_is_kept(stopped):
    (stopped / "checkpoint-8" / "optimizer.pt").unlink()
    rotate(stopped, 2, keep={stopped / "checkpoint-4"})
    assert [path.name for path in checkpoints_of(stopped)] == ["checkpoint-6", "checkpoint-4"]
    rotate(stopped, 1, keep={stopped / "checkpoint-4", stopped / "checkpoint-6"})
    rotate(stopped, None, keep=set())
    assert [path.name for path in checkpoints_of(stopped)] == ["checkpoint-6", "checkpoint-4"]


def test_best_checkpoint_is_kept_by_its_final_path(whole):
    folder = whole.parent / "limited"
    run(folder, "--save_total_limit", "1", "--metric_for_best_model", "loss", "--num_train_epochs", "2")
    state = json.loads((checkpoints_of(folder)[0] / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(folder / "checkpoint-12")
    assert checkpoints_of(folder) == [folder / "checkpoint-12"]


CHANGED = {
    "batch": (["--per_device_train_batch_size", "16"], "rows per update: 8 in the checkpoint, 16 now"),
    "accumulation": (["--gradient_accumulation_steps", "2"], "gradient_accumulation_steps: 1 in .*, 2 now"),
    "fewer rows": (["--max_train_samples", "40"], "training rows: 48 rows .*, 40 rows"),
    "other rows": (["--dataset_options.seed", "7"], "training rows: 48 rows with fingerprint .* 48 rows with"),
    "evaluation rows": (["--max_eval_samples", "4"], "evaluation rows: 8 rows .*, 4 rows"),
    "rate": (["--learning_rate", "1e-3"], "learning_rate: 0.003 in the checkpoint, 0.001 now"),
    "schedule": (["--lr_scheduler_type", "linear"], "lr_scheduler_type: 'constant' in the checkpoint, 'linear' now"),
    "optimizer": (["--optim", "sgd"], "optim: 'adamw_torch.*' in the checkpoint, 'sgd' now"),
    "seed": (["--seed", "1"], "seed: 42 in the checkpoint, 1 now"),
    "mode": (["--mode", "cot"], "mode: 'coconut' in the checkpoint, 'cot' now"),
    "thoughts": (["--c_thought", "2"], "c_thought: 1 in the checkpoint, 2 now"),
    "stages": (["--epochs_per_stage", "2"], "epochs_per_stage: 1 in the checkpoint, 2 now"),
    "shorter": (["--num_train_epochs", "2"], "num_train_epochs: 3.0 in the checkpoint, 2.0 now"),
    "adapter": (["--lora.r", "4"], "lora: not set in the checkpoint, {'r': 4} now"),
    "model": (["--text_config.num_hidden_layers", "1"], "text_config.num_hidden_layers: 2 in the checkpoint, 1 now"),
    "tokenizer": (["--tokenizer_vocab_size", "500"], "tokenizer_vocab_size: 1000 in the checkpoint, 500 now"),
    "metric": (["--metric", "vqa_accuracy"], "metric: not set in the checkpoint, 'vqa_accuracy' now"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_another_course_is_refused_with_both_values_and_overwrites_nothing(name, stopped):
    options, message = CHANGED[name]
    before = contents(stopped)
    with pytest.raises(UsageError, match=message) as error:
        run(stopped, *RESUMED, *options)
    assert "Set them as the checkpoint has them, or start another run from its weights: --model" in str(error.value)
    assert contents(stopped) == before


def test_all_differences_are_said_at_once(stopped):
    with pytest.raises(UsageError) as error:
        run(stopped, *RESUMED, "--learning_rate", "1e-3", "--mode", "cot", "--weight_decay", "0.1")
    assert all(f"- {key}: " in str(error.value) for key in ("learning_rate", "mode", "weight_decay"))


def test_harmless_changes_are_adopted_and_said_in_one_line(stopped, whole, caplog):
    caplog.set_level(logging.INFO)
    changed = ["--save_steps", "9", "--logging_steps", "1", "--per_device_eval_batch_size", "4"]
    run(stopped, *RESUMED, *changed)
    (line,) = [line for line in messages(caplog).splitlines() if line.startswith("resuming from")]
    assert "save_steps: 4 in the checkpoint, 9 now" in line
    assert "per_device_eval_batch_size: 8 in the checkpoint, 4 now" in line and "output_dir" not in line
    assert_same_end(stopped, whole)


def test_run_may_become_longer_where_the_rate_is_constant(stopped, whole):
    results = run(stopped, *RESUMED, "--num_train_epochs", "4")
    assert results["train_steps"] == 24 and [row["stage"] for row in results["stages"]] == [0, 1, 2, 3]
    former = losses(whole)
    assert {step: loss for step, loss in losses(stopped).items() if step <= 18} == former


def test_equal_updates_in_smaller_batches_go_on(stopped, whole, caplog):
    caplog.set_level(logging.INFO)
    run(stopped, *RESUMED, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2")
    assert "gradient_accumulation_steps: 1 in the checkpoint, 2 now" in messages(caplog)
    assert [*losses(stopped).values()] == pytest.approx([*losses(whole).values()], abs=2e-4)


def test_checkpoint_of_an_earlier_version_is_compared_with_the_recipe_in_its_folder(stopped, whole, caplog):
    for checkpoint in checkpoints_of(stopped):
        (checkpoint / "course.json").unlink()
    before = contents(stopped)
    with pytest.raises(UsageError, match="learning_rate: 0.003 in the checkpoint, 0.001 now"):
        run(stopped, *RESUMED, "--learning_rate", "1e-3")
    with pytest.raises(UsageError, match="max_train_samples: not set in the checkpoint, 40 now"):
        run(stopped, *RESUMED, "--max_train_samples", "40")
    assert contents(stopped) == before
    run(stopped, *RESUMED)
    assert "its rows and devices cannot be compared" in messages(caplog)
    assert_same_end(stopped, whole)
    shutil.copytree(whole / "checkpoint-8", whole.parent / "alone" / "checkpoint-8")
    (whole.parent / "alone" / "checkpoint-8" / "course.json").unlink()
    run(whole.parent / "alone", *RESUMED)
    assert "does not record how it was trained" in messages(caplog)


def test_callback_refuses_a_checkpoint_that_counted_other_epochs(stopped):
    """For those who resume with the trainer alone, without a recipe."""
    for checkpoint in checkpoints_of(stopped):
        (checkpoint / "course.json").unlink()
    (stopped / "recipe.yaml").unlink()
    with pytest.raises(
        UsageError,
        match="after 8 updates. These are 1.333 epochs in its run and 2.667 epochs here .3 updates per epoch",
    ):
        run(stopped, *RESUMED, "--gradient_accumulation_steps", "2")


def test_trained_tokenizer_is_that_of_the_checkpoint(stopped, whole, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a tokenizer is trained")

    monkeypatch.setattr(train_hf, "train_tokenizer", refuse)
    run(stopped, *RESUMED)
    assert_same_end(stopped, whole)


def test_another_tokenizer_is_refused_with_a_token_and_both_ids(stopped):
    """As a tokenizer on the Hub may have changed under its name."""
    other = MMCoconutProcessor.from_pretrained(stopped / "checkpoint-8").tokenizer
    other.add_tokens(["another"])
    message = f"of .*checkpoint-8 in 1 tokens, such as 'another': its id is None there and {len(other) - 1} now"
    with pytest.raises(UsageError, match=message):
        train_hf.check_tokenizer(stopped / "checkpoint-8", other)


def test_finished_run_of_max_steps_keeps_its_last_stage(whole):
    """Its epochs are those of its updates, not num_train_epochs."""
    folder = whole.parent / "steps"
    options = ["--max_steps", "18", "--num_train_epochs", "1"]
    run(folder, *options)
    run(folder, *options, *RESUMED)
    assert MMCoconutProcessor.from_pretrained(folder).num_latents == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lora.r", "8"], r"lora.r: 4 in the checkpoint, 8 now"),
        (["--lora", "null"], r"lora: \{'r': 4\} in the checkpoint, not set now"),
        (["--lora.target_modules", "['c_attn']"], r"lora.target_modules: not set in the checkpoint, \['c_attn'\] now"),
    ],
)
def test_adapter_of_other_settings_is_refused_with_both(options, message, adapted):
    with pytest.raises(UsageError, match=message) as error:
        run(adapted, "--lora.r", "4", *RESUMED, *options)
    assert "--model" not in str(error.value)  # an adapter alone is nothing to start from


@pytest.fixture(scope="module")
def adapted(whole):
    pytest.importorskip("peft")
    run(whole.parent / "adapted", "--lora.r", "4", "--max_steps", "4")
    return whole.parent / "adapted"


def test_overwriting_deletes_nothing_before_the_new_run_is_checked(stopped):
    before = contents(stopped)
    with pytest.raises(UsageError, match="no sub-module 'vision_towr'"):
        run(stopped, "--overwrite", "true", "--freeze", "vision_towr")
    with pytest.raises(UsageError, match="the earlier run is resumed, not deleted"):
        run(stopped, "--overwrite", "true", *RESUMED)
    scratch = ["--vision_config", "null", "--text_config", "null", "--tokenizer", "null"]
    with pytest.raises(UsageError, match="--overwrite would delete .*checkpoint-8, which `model` reads"):
        run(stopped, "--overwrite", "true", "--model", str(stopped / "checkpoint-8"), *scratch)
    assert contents(stopped) == before


def test_run_killed_before_its_first_checkpoint_is_told_to_start_anew(stopped):
    for checkpoint in checkpoints_of(stopped):
        (checkpoint / "scheduler.pt").unlink()
    message = r"no checkpoint to resume from(\n.*scheduler.pt is missing){3}\n.*--overwrite"
    with pytest.raises(UsageError, match=message):
        run(stopped, *RESUMED)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [[], ["--save_total_limit", "1"]], ids=["all kept", "one kept"])
def test_run_killed_ten_times_ends_as_one_that_was_never_stopped(tmp_path, limit):
    """SIGKILL at random moments, also before training begins; a minute of training, most of it saving."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    options = ["--save_steps", "1", "--num_train_epochs", "120", "--epochs_per_stage", "40", *limit]
    options += ["--text_config.resid_pdrop", "0.1"]
    run(tmp_path / "whole", *options)
    folder, draws = tmp_path / "killed", random.Random(0)
    command = [sys.executable, str(ROOT / "train_hf.py"), str(tmp_path / "tiny.yaml"), *OPTIONS, *options]
    command += ["--output_dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    startup = None  # seconds to the first checkpoint, which depend on the machine and what else it does
    for _ in range(10):
        begun, started = newest_whole(folder), time.monotonic()
        process = subprocess.Popen(
            [*command, *(RESUMED if begun else ["--overwrite", "true"])],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if startup is None:
            while newest_whole(folder) is None and process.poll() is None:
                time.sleep(0.05)
            startup = time.monotonic() - started
            time.sleep(draws.uniform(0, 3))
        else:
            time.sleep(draws.uniform(0.4 * startup, startup + 4))
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said[-3000:]
        print(begun and begun.name, [path.name for path in (folder / ".saving").glob("*")])
    assert newest_whole(folder) is not None
    run(folder, *options, *RESUMED)
    assert_same_end(folder, tmp_path / "whole")
