"""Comparisons: the controls differ from coconut only in what they should, and only what is missing is repeated."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_train import TINY
from tiny import tiny_model, tiny_processor

import train_hf
from mmcoconut.arguments.choices import MARKED_MODES, MODES
from mmcoconut.arguments.recipes import parse_recipe
from mmcoconut.arguments.variants import variant_of
from mmcoconut.data import load_examples
from mmcoconut.evaluation import compare, matched_runs
from mmcoconut.evaluation.compare import Finished
from mmcoconut.evaluation.matched_runs import ComparisonError, Run, Runner
from mmcoconut.modeling_mmcoconut import MMCoconutForConditionalGeneration
from mmcoconut.models import load_processor
from mmcoconut.tables import main_table
from mmcoconut.training.checkpoints import describe
from mmcoconut.training.collator import IGNORED, CurriculumCollator, encode_target
from mmcoconut.training.curriculum import Curriculum
from mmcoconut.training.layout import read_layout


EPOCHS = range(5)  # stages 0 to 3 of a curriculum with max_latent_stage 2, the last one twice


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def rows():
    mazes = load_examples("arrow_mazes", split="train", num_rows=12, max_hops=3)
    return [{**row, "index": index} for index, row in enumerate(mazes)]


@pytest.fixture(params=["both", "start"])
def batch(request, model, rows):
    """Makes the training batch of a mode in an epoch, with the markers that train_hf.py gives the mode."""

    def make(mode: str, epoch: int, **curriculum) -> dict:
        processor = tiny_processor(model, markers=request.param if mode in MARKED_MODES else "none")
        collator = CurriculumCollator(Curriculum(mode=mode, max_latent_stage=2, c_thought=2, **curriculum), processor)
        collator.epoch = epoch
        return collator(rows)

    return make


def sequences(batch: dict, leave_out=()) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of every row without padding, and without the ids in `leave_out`."""
    found = []
    for ids, mask, labels in zip(*(batch[key].tolist() for key in ("input_ids", "attention_mask", "labels"))):
        kept = [place for place, real in enumerate(mask) if real and ids[place] not in leave_out]
        found.append(([ids[place] for place in kept], [labels[place] for place in kept]))
    return found


def targets(batch: dict) -> list[list[int]]:
    """The supervised tokens of every row."""
    return [[label for label in labels if label != IGNORED] for labels in batch["labels"].tolist()]


@pytest.mark.parametrize("schedule", [{}, {"uniform_prob": 0.5}, {"pad_latent_to_max": False}])
@pytest.mark.parametrize("epoch", EPOCHS)
def test_no_thoughts_is_coconut_without_markers_and_latents(batch, model, epoch, schedule):
    config = model.config
    added = {config.latent_token_id, config.start_latent_token_id, config.end_latent_token_id}
    coconut = batch("coconut", epoch, **schedule)
    assert sequences(batch("no_thoughts", epoch, **schedule)) == sequences(coconut, leave_out=added)
    assert schedule or (coconut["input_ids"] == config.latent_token_id).sum(1).tolist() == [2 * min(epoch, 2)] * 12


@pytest.mark.parametrize("schedule", [{}, {"uniform_prob": 0.5}, {"pad_latent_to_max": False}])
@pytest.mark.parametrize("epoch", EPOCHS)
def test_pause_has_the_batches_of_coconut(batch, epoch, schedule):
    pause, coconut = batch("pause", epoch, **schedule), batch("coconut", epoch, **schedule)
    assert pause.keys() == coconut.keys()
    assert all(torch.equal(pause[key], coconut[key]) for key in coconut)


@pytest.mark.parametrize("schedule", [{}, {"uniform_prob": 0.5}, {"pad_latent_to_max": False}])
@pytest.mark.parametrize("epoch", EPOCHS)
def test_markers_is_coconut_without_latents(batch, model, epoch, schedule):
    config = model.config
    markers, coconut = batch("markers", epoch, **schedule), batch("coconut", epoch, **schedule)
    assert sequences(markers) == sequences(coconut, leave_out={config.latent_token_id})
    assert (markers["input_ids"] == config.start_latent_token_id).sum(1).tolist() == [1] * 12


def test_icot_is_no_thoughts_with_more_steps_removed_from_a_few_rows(batch):
    """Of 20 · 12 rows some four lose more steps than stage 1 does: exp(-4) of them."""
    moved, fewer = 0, sequences(batch("no_thoughts", 1))
    for seed in range(20):
        for (ids, labels), (others, _) in zip(sequences(batch("icot", 1, seed=seed)), fewer):
            moved += ids != others
            answer = [label for label in labels if label != IGNORED]
            assert others[-len(answer) :] == answer
    assert 1 <= moved <= 12


@pytest.mark.parametrize("epoch", EPOCHS)
def test_cot_is_stage_0_of_no_thoughts_in_every_epoch(batch, epoch):
    assert sequences(batch("cot", epoch, uniform_prob=0.5)) == sequences(batch("no_thoughts", 0))


@pytest.mark.parametrize("epoch", EPOCHS)
def test_no_cot_is_the_question_and_the_answer(batch, model, rows, epoch):
    processor = tiny_processor(model, markers="none")
    expected = []
    for row in rows:
        prompt = processor.encode_prompt(row["question"], num_latents=0)
        answer = encode_target(processor, [], row["answers"][0])
        expected.append((prompt + answer, [IGNORED] * len(prompt) + answer))
    assert sequences(batch("no_cot", epoch)) == expected


@pytest.mark.parametrize("epoch", EPOCHS)
def test_modes_of_a_stage_supervise_the_same_tokens_and_all_modes_the_answer(batch, rows, epoch):
    found = {mode: targets(batch(mode, epoch)) for mode in MODES}
    assert found["coconut"] == found["pause"] == found["no_thoughts"] == found["markers"]
    for index in range(len(rows)):
        answer = found["no_cot"][index]
        assert all(found[mode][index][-len(answer) :] == answer for mode in MODES)
        written = found["coconut"][index]
        assert found["cot"][index][-len(written) :] == written


@pytest.mark.parametrize("epoch", EPOCHS)
def test_all_modes_see_the_same_pictures(batch, epoch):
    pixels = [batch(mode, epoch)["pixel_values"] for mode in MODES]
    assert all(torch.equal(pixels[0], other) for other in pixels)


def trained(recipe: str, folder: Path, mode: str, monkeypatch, *options: str) -> tuple:
    """Row indices of every training batch with its epoch, weights that learning rate 0 left alone, results."""
    order = folder.with_name(f"{folder.name}.order")  # a file, since a data loader's worker has its own memory
    collate = CurriculumCollator.__call__

    def recorded(self, rows):
        with order.open("a") as file:
            file.write(f"{self.epoch} {[row['index'] for row in rows]}\n")
        return collate(self, rows)

    monkeypatch.setattr(CurriculumCollator, "__call__", recorded)
    command = [recipe, "--output_dir", str(folder), "--mode", mode, "--learning_rate", "0.0", "--seed", "7"]
    command += ["--max_eval_samples", "2", "--save_strategy", "no"]
    results = train_hf.main([*command, *options])
    monkeypatch.undo()
    weights = MMCoconutForConditionalGeneration.from_pretrained(folder).state_dict()
    return order.read_text().splitlines(), weights, results


@pytest.mark.slow
def test_all_modes_start_from_the_same_weights_and_train_on_the_same_rows_in_the_same_order(
    recipe, tmp_path, monkeypatch
):
    runs = {mode: trained(recipe, tmp_path / mode, mode, monkeypatch) for mode in MODES}
    order, weights, results = runs["coconut"]
    assert len(order) == results["train_steps"] == 18
    assert len({*order}) == 18  # shuffled anew in each epoch
    for mode, (other_order, other_weights, other_results) in runs.items():
        assert other_order == order, mode
        assert (other_results["train_steps"], other_results["parameters"]) == (18, results["parameters"])
        assert other_weights.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, atol=0, rtol=0, msg=f"{mode}: {name}")
    layouts = {mode: read_layout(str(tmp_path / mode)) for mode in MODES}
    assert {mode: layout.values["mode"] for mode, layout in layouts.items()} == {mode: mode for mode in MODES}
    written = {mode: load_processor(str(tmp_path / mode)).markers for mode in MODES}
    assert written == {mode: "both" if mode in ("coconut", "pause", "markers") else "none" for mode in MODES}


@pytest.mark.slow
def test_order_of_rows_does_not_depend_on_the_mode_with_a_worker_either(recipe, tmp_path, monkeypatch):
    options = ["--dataloader_num_workers", "1", "--dataloader_multiprocessing_context", "fork"]
    orders = {mode: trained(recipe, tmp_path / mode, mode, monkeypatch)[0] for mode in ("coconut",)}
    orders |= {
        f"{mode} with a worker": trained(recipe, tmp_path / f"{mode}-worker", mode, monkeypatch, *options)[0]
        for mode in ("coconut", "no_cot")
    }
    assert len({tuple(order) for order in orders.values()}) == 1 and len(orders["coconut"]) == 18


def planned(recipe: str, *options: str) -> list[Run]:
    return matched_runs.plan_runs(*parse_recipe([recipe, "--compare", "cot,coconut", "--seed", "3", *options]))


def test_runs_differ_in_mode_seed_folder_and_name_only(recipe, tmp_path):
    runs = planned(recipe, "--seeds", "2", "--output_dir", str(tmp_path / "out"), "--run_name", "mine")
    assert [(run.variant.name, run.seed) for run in runs] == [("cot", 3), ("coconut", 3), ("cot", 4), ("coconut", 4)]
    recipes = [yaml.safe_load(run.recipe) for run in runs]
    for run, values in zip(runs, recipes):
        name = f"{run.variant.name}-seed{run.seed}"
        own = {"mode": run.variant.mode, "seed": run.seed, "output_dir": str(tmp_path / "out" / name)}
        assert values == {**recipes[0], **own, "run_name": f"mine-{name}"}


def test_variants_differ_in_mode_schedule_and_objectives_only(recipe):
    names = "jacobi,coconut,pause"
    runs = matched_runs.plan_runs(*parse_recipe([recipe, "--compare", names, "--jacobi_iterations", "2"]))
    assert [run.folder.name for run in runs] == ["jacobi-seed42", "coconut-seed42", "pause-seed42"]
    jacobi, coconut, pause = (yaml.safe_load(run.recipe) for run in runs)
    assert (jacobi["mode"], jacobi["thought_schedule"], jacobi["jacobi_iterations"]) == ("coconut", "jacobi", 2)
    assert (coconut["mode"], coconut["thought_schedule"], coconut["jacobi_iterations"]) == (
        "coconut",
        "sequential",
        None,
    )
    own = {"mode", "thought_schedule", "jacobi_iterations", "output_dir", "run_name"}
    assert {key for key in jacobi if jacobi[key] != coconut[key]} == own - {"mode"}
    assert {key for key in pause if pause[key] != coconut[key]} == {"mode", "output_dir", "run_name"}
    assert [run.has_thoughts for run in runs] == [True, True, False]
    (default,) = matched_runs.plan_runs(*parse_recipe([recipe, "--compare", "jacobi"]))
    assert yaml.safe_load(default.recipe)["jacobi_iterations"] == 3


def test_variants_have_the_objectives_of_their_name_with_the_options_of_the_recipe(recipe):
    def objectives(*options):
        words = [recipe, "--compare", "coconut,coconut+step_tokens,jacobi+step_tokens,cot", *options]
        return [yaml.safe_load(run.recipe)["objectives"] for run in matched_runs.plan_runs(*parse_recipe(words))]

    own, given = {"step_tokens": {}}, {"step_tokens": 0.25}
    assert objectives() == [None, own, own, None]
    assert objectives("--objectives.step_tokens", "0.25") == [None, given, given, None]


def test_recipe_of_a_run_means_the_same_when_it_is_saved_by_the_run(recipe, tmp_path):
    run = planned(recipe, "--output_dir", str(tmp_path / "out"))[1]
    (tmp_path / "run.yaml").write_text(run.recipe)
    assert matched_runs.recipe_text(*parse_recipe([str(tmp_path / "run.yaml")])) == run.recipe


def test_comparison_in_the_folder_of_a_single_run_is_refused(recipe, tmp_path):
    train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), "--max_steps", "1"])
    with pytest.raises(ValueError, match="is the folder of a single run. Set another --output_dir"):
        train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), "--compare", "cot"])


def test_checkpoint_that_was_not_written_to_its_end_is_not_resumed(recipe, tmp_path):
    run = planned(recipe, "--output_dir", str(tmp_path))[0]
    state = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
    for step, lost in ((4, None), (6, "optimizer.pt"), (8, "trainer_state.json")):
        (run.folder / f"checkpoint-{step}").mkdir(parents=True)
        for file in state:
            (run.folder / f"checkpoint-{step}" / file).touch()
        describe(run.folder / f"checkpoint-{step}", {})
        if lost is not None:
            (run.folder / f"checkpoint-{step}" / lost).unlink()
    assert run.checkpoint == run.folder / "checkpoint-4"


def test_overwriting_deletes_the_runs_of_this_comparison_and_nothing_else(recipe, tmp_path):
    runs = planned(recipe, "--output_dir", str(tmp_path / "out"))
    for name in ("cot-seed3/recipe.yaml", "coconut-seed3/notes.txt", "cot-seed9/recipe.yaml", "cot-seed3.log"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).touch()
    matched_runs.clear(runs)
    left = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert left == {"coconut-seed3/notes.txt", "cot-seed9/recipe.yaml"}


def test_missing_matplotlib_is_said_before_anything_is_trained(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install mmcoconut\[audit\]"):
        train_hf.main([recipe, "--compare", "cot", "--output_dir", str(tmp_path / "out")])


def test_comparison_within_several_processes_is_refused(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "clear", lambda runs: pytest.fail("deleted"))
    runs = planned(recipe, "--output_dir", str(tmp_path / "out"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="Start it with `python train_hf.py`, in one process"):
        compare.check_start(runs, overwrite=True)


@pytest.mark.parametrize(
    "device, visible, expected", [("cpu", "1,2", ""), ("cuda", None, "0"), ("cuda", "MIG-a,5", "MIG-a")]
)
def test_runs_have_one_device(monkeypatch, device, visible, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert matched_runs.device_of_runs(torch.device(device)) == expected


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for is dead too."""
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(status) and not status.startswith("Z")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_stops_the_children_and_theirs_and_starts_no_more(recipe, tmp_path, monkeypatch, capsys, number):
    nested = "import subprocess; child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); child.wait()"
    monkeypatch.setattr(Runner, "train_command", lambda self, run: [sys.executable, "-c", nested])
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    earlier = signal.signal(number, handlers[number])
    runs = planned(recipe, "--output_dir", str(tmp_path))

    def interrupt():
        while not (runs[0].log.exists() and runs[0].log.read_text().splitlines()[1:]):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    timer = threading.Thread(target=interrupt)
    timer.start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            Runner("train_hf.py", options=[], device="").finish_all(runs)
        assert signal.getsignal(number) == handlers[number]
    finally:
        timer.join()
        signal.signal(number, earlier)
    assert time.monotonic() - began < 30
    grandchild = int(runs[0].log.read_text().splitlines()[1])
    while is_alive(grandchild) and time.monotonic() - began < 30:  # a busy machine takes its time to end it
        time.sleep(0.05)
    assert not is_alive(grandchild)
    assert not runs[1].log.exists()
    assert capsys.readouterr().out == "cot seed 3: training … (0 of 2 runs done)\n"


def test_jobs_run_at_a_time_and_an_interrupt_ends_all(recipe, tmp_path, monkeypatch):
    """Each run waits for the other's log, so that they end only side by side; the third and fourth are interrupted."""
    runs = planned(recipe, "--seeds", "2", "--output_dir", str(tmp_path))
    wait = "import sys, time; from pathlib import Path\nwhile not Path(sys.argv[1]).exists(): time.sleep(0.02)"
    partner = {runs[0]: runs[1].log, runs[1]: runs[0].log, runs[2]: tmp_path / "never", runs[3]: tmp_path / "never"}
    monkeypatch.setattr(Runner, "train_command", lambda self, run: [sys.executable, "-c", wait, str(partner[run])])
    monkeypatch.setattr(Runner, "evaluation_command", lambda self, run: [sys.executable, "-c", ""])
    monkeypatch.setattr(Run, "is_audited", True)
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt():
        while not (runs[2].log.exists() and runs[3].log.exists()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Thread(target=interrupt, daemon=True)
    timer.start()
    runner = Runner("train_hf.py", options=[], device="", jobs=2)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            runner.finish_all(runs)
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert time.monotonic() - began < 30
    assert runner.num_done == 2 and runner.processes == set()


def test_after_the_first_run_the_time_left_is_said(recipe, tmp_path, monkeypatch, capsys):
    """Training takes 100 s each; a run that fails counts in neither number."""
    modes = "cot,no_cot,coconut,pause"
    runs = planned(recipe, "--compare", modes, "--seeds", "1", "--output_dir", str(tmp_path))
    now, evaluated = [0.0], set()
    monkeypatch.setattr(matched_runs, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Run, "is_evaluated", property(lambda self: self in evaluated))
    monkeypatch.setattr(Run, "is_audited", property(lambda self: not self.has_thoughts))
    monkeypatch.setattr(Runner, "train_command", lambda self, run: ["train"])

    def call(self, command, run):
        now[0] += 100.0 if command == ["train"] else 7.0 if "mmcoconut.audit" in command else 0.0
        if "mmcoconut.evaluation" in command:
            if run.variant.name == "no_cot":
                raise subprocess.CalledProcessError(1, command)
            evaluated.add(run)

    monkeypatch.setattr(Runner, "call", call)
    Runner("train_hf.py", options=[], device="").finish_all(runs)
    said = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" left")]
    assert said == [
        "1 of 4 runs trained and evaluated, 100 s each: about 5 min left",
        "2 of 3 runs trained and evaluated, 100 s each: about 100 s left",
    ]


def test_audits_come_last_and_name_the_controls_of_their_seed(recipe, tmp_path, monkeypatch):
    runs = planned(recipe, "--compare", "coconut,pause", "--seeds", "2", "--output_dir", str(tmp_path))
    calls, evaluated = [], set()
    monkeypatch.setattr(Run, "is_evaluated", property(lambda self: self in evaluated))
    monkeypatch.setattr(Runner, "train_command", lambda self, run: ["train", str(run)])

    def call(self, command, run):
        if "mmcoconut.evaluation" in command and str(run) != "pause seed 4":
            evaluated.add(run)
        if "mmcoconut.audit" in command:
            calls.append((str(run), command[command.index("--controls") + 1] if "--controls" in command else None))
        else:
            calls.append(str(run))

    monkeypatch.setattr(Runner, "call", call)
    Runner("train_hf.py", options=[], device="").finish_all(runs)
    assert calls[:8] == [name for run in runs for name in (str(run), str(run))]
    assert calls[8:] == [("coconut seed 3", str(tmp_path)), ("coconut seed 4", None)]


def outcome(mode: str, seed: int, scores, *, num_steps=None, **results) -> Finished:
    """A finished run with these scores, the gold answers taken in turn from red, blue, red."""
    rows = [
        {"index": index, "row_id": f"row {index}", "num_steps": steps, "gold": [["red", "blue", "red"][index % 3]]}
        for index, steps in enumerate(num_steps or [1] * len(scores))
    ]
    shared = {"machine": "two cores", "commit": "abc", "versions": {"torch": "2"}}
    trained = {"train_steps": 18, "train_seconds": 10.0 * seed, "parameters": 5, "command": "", "date": "2026-01-01"}
    evaluated = {"generated_tokens": 3.0, "num_latents": 2, "decoder_passes": 5.0, "seconds_per_answer": 0.5}
    evaluated |= {"peak_memory_mb": 1.0, "dataset": "mazes", "split": "test", "metric": "exact_match", "n": len(rows)}
    return Finished(
        run=Run(
            variant_of(mode),
            seed,
            Path("out", f"{mode}-seed{seed}"),
            f"mode: {mode}\nseed: {seed}\nlearning_rate: 0.1\n",
        ),
        results={**trained, **shared, **results},
        evaluation={**evaluated, **shared},
        predictions=[{**row, "score": float(score)} for row, score in zip(rows, scores)],
    )


def summary(outcomes: list[Finished]) -> dict:
    return compare.summarise(outcomes, command="python train_hf.py")


@pytest.fixture
def outcomes():
    steps = [1, 1, 2, 2]
    return [
        outcome("cot", 1, [1, 1, 1, 0], num_steps=steps),
        outcome("coconut", 1, [1, 0, 0, 0], num_steps=steps),
        outcome("cot", 2, [1, 1, 1, 1], num_steps=steps),
        outcome("coconut", 2, [1, 1, 0, 1], num_steps=steps),
    ]


def test_table_has_a_row_a_mode_with_means_over_seeds_and_rows(outcomes):
    cot, coconut = summary(outcomes)["modes"]
    assert (cot["mode"], coconut["mode"]) == ("cot", "coconut")
    assert (cot["accuracy"]["mean"], coconut["accuracy"]["mean"]) == (7 / 8, 1 / 2)
    assert cot["accuracy"]["low"] < 7 / 8 < cot["accuracy"]["high"]
    assert (cot["accuracy_by_seed"], coconut["accuracy_by_seed"]) == ({"1": 3 / 4, "2": 1}, {"1": 1 / 4, "2": 3 / 4})
    assert {steps: (group["mean"], group["n"]) for steps, group in coconut["by_num_steps"].items()} == {
        "1": (3 / 4, 2),
        "2": (1 / 4, 2),
    }
    assert (cot["train_seconds"], cot["train_steps"], cot["generated_tokens"], cot["decoder_passes"]) == (15, 18, 3, 5)


def test_difference_to_coconut_is_paired_by_row_and_seed(outcomes):
    cot, coconut = summary(outcomes)["modes"]
    assert coconut["difference_to_coconut"] is None
    assert cot["difference_to_coconut"]["mean"] == 3 / 8
    assert cot["difference_to_coconut"]["low"] >= 0  # cot is nowhere worse, though their own intervals overlap
    assert cot["accuracy"]["low"] < coconut["accuracy"]["high"]
    assert summary(outcomes[::2])["modes"][0]["difference_to_coconut"] is None


def test_commonest_answer_is_scored_on_the_same_rows(outcomes):
    assert summary(outcomes)["commonest_answer"] == {"answer": "red", "accuracy": 3 / 4}


def test_training_time_of_a_resumed_run_is_left_out(outcomes):
    resumed = {"command": "train_hf.py out/cot-seed1.yaml --resume_from_checkpoint out/cot-seed1/checkpoint-6"}
    steps = [1, 1, 2, 2]
    outcomes[0] = outcome("cot", 1, [1, 1, 1, 0], num_steps=steps, **resumed)
    assert summary(outcomes)["modes"][0]["train_seconds"] == 20
    outcomes[2] = outcome("cot", 2, [1, 1, 1, 0], num_steps=steps, **resumed)
    assert summary(outcomes)["modes"][0]["train_seconds"] is None
    assert "| resumed |" in compare.markdown(summary(outcomes))


def test_markdown_says_what_the_figures_were_made_with(outcomes):
    text = compare.markdown(summary(outcomes))
    cot = next(line for line in text.splitlines() if line.startswith("| `cot` | 87.5 % ["))
    assert "| 75.0 / 100.0 | +37.5 points [" in cot
    for part in (
        "4 rows of `mazes` (test)",
        "seeds 1, 2",
        "two cores",
        "torch 2",
        "abc",
        "`red`",
        "75.0 %",
        "2026-01-01",
    ):
        assert part in text
    assert text.endswith("```bash\npython train_hf.py\n```\n")


def audit(label: str, accuracy, **more) -> dict:
    return {"verdict": {"label": label}, "probe": {"accuracy": accuracy}, **more}


def test_table_says_what_the_audits_found(outcomes):
    found = {"label": "do not suffice", "accuracy": {"mean": 0.25, "low": 0.0, "high": 0.5}}
    outcomes[1] = replace(outcomes[1], audit=audit("depends", [[0.5, None], [0.25, 0.75]], necessity=found))
    outcomes[3] = replace(outcomes[3], audit=audit("cannot be told", [[None, None], [0.5, 0.5]]))
    cot, coconut = summary(outcomes)["modes"]
    assert (cot["verdicts"], cot["necessity"], cot["probe_accuracy"]) == (None, None, None)
    assert coconut["verdicts"] == ["depends", "cannot be told"]
    assert coconut["necessity"] == {"labels": ["do not suffice"], "accuracy": 0.25}
    assert coconut["probe_accuracy"] == (0.625 + 0.5) / 2
    text = compare.markdown(summary(outcomes))
    assert "| depends (1), cannot be told (1) | 25.0 %: do not suffice | 56.2 % |" in text
    assert "| – | – | – |" in text and "Audits use at most 300 rows" in text


def test_table_of_an_older_comparison_has_the_columns_that_it_knows(outcomes):
    old = summary(outcomes)["modes"]
    newer = ("seconds_per_update", "train_peak_memory_mb", "settings", "verdicts", "necessity", "probe_accuracy")
    old = [{key: record[key] for key in record if key not in newer} for record in old]
    header, _, cot, _ = main_table(old).splitlines()
    assert header.endswith("| updates | s of training |") and cot.endswith("| 18 | 15.0 |")


def test_time_of_an_update_and_memory_of_training_are_means_over_runs(outcomes):
    steps = [1, 1, 2, 2]
    for place, seconds in ((0, 0.5), (2, 0.25)):
        outcomes[place] = outcome(
            "cot", place, [1] * 4, num_steps=steps, seconds_per_update=seconds, peak_memory_mb=100.0
        )
    cot, coconut = summary(outcomes)["modes"]
    assert (cot["seconds_per_update"], cot["train_peak_memory_mb"]) == (0.375, 100)
    assert coconut["seconds_per_update"] is None


@pytest.mark.parametrize("number", [1, 13])
def test_picture_has_a_line_for_each_variant_with_a_style_of_its_mode(outcomes, tmp_path, number):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    found = summary(outcomes)
    names = [*compare.STYLES, "coconut+a", "coconut+b", "jacobi+a", "pause+a", "coconut+a+b"][:number]
    found["modes"] = [{**found["modes"][0], "mode": name} for name in names]
    compare.draw(found, tmp_path / "compare.png")
    width, height = image.open(tmp_path / "compare.png").size
    assert width == 1600 and height == round(200 * (1.4 + 0.3 * max(number, 3)))
    assert {*MODES, "jacobi"} == {*compare.STYLES}
    assert len({tuple(style.values()) for style in compare.STYLES.values()}) == len(compare.STYLES)
    assert compare.style_of("jacobi+a") == {**compare.STYLES["jacobi"], "marker": "P"}


def test_runs_of_different_numbers_of_updates_do_not_compare(outcomes):
    outcomes.append(outcome("pause", 1, [1, 1, 1, 1], num_steps=[1, 1, 2, 2], train_steps=17))
    with pytest.raises(ValueError, match="cot seed 1 made 18 updates and pause seed 1 made 17"):
        compare.check_matched(outcomes)


def test_runs_evaluated_on_different_rows_do_not_compare(outcomes):
    compare.check_matched(outcomes)
    outcomes.append(outcome("pause", 1, [1, 1, 1], num_steps=[1, 1, 2]))
    with pytest.raises(ValueError, match=r"on 4 rows and pause seed 1 on 3; 1 of them .* such as \(3, 'row 3', 2\)"):
        compare.check_matched(outcomes)


def files_of(out: Path) -> dict[str, int]:
    """When the results, evaluations and audits of all runs were written."""
    files = [*out.glob("*/results.json"), *out.glob("*/*/evaluation.json"), *out.glob("*/*/audit.json")]
    return {str(file.relative_to(out)): file.stat().st_mtime_ns for file in files}


@pytest.mark.slow
def test_comparison_keeps_what_finished_and_repeats_only_the_rest(recipe, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    command = [recipe, "--compare", "cot,coconut", "--seeds", "2", "--seed", "1", "--output_dir", str(out)]
    command += ["--hub_token", "hf_secret"]
    blocker = out / "cot-seed1" / "notes.txt"
    blocker.parent.mkdir(parents=True)
    blocker.write_text("mine")

    with pytest.raises(ComparisonError) as error:
        train_hf.main(command)
    message = str(error.value)
    assert message.startswith("1 of 4 runs failed. The same command repeats only these")
    assert f"cot seed 1 ended with status 1; {out / 'cot-seed1.log'} ends with" in message
    assert "no run of this script: --overwrite does not delete it" in message
    assert "(3 of 4 runs done)" in capsys.readouterr().out
    assert blocker.exists() and not (out / "compare.json").exists()
    finished = files_of(out)
    assert len(finished) == 8

    shutil.rmtree(blocker.parent)
    result = train_hf.main(command)
    said = [line for line in capsys.readouterr().out.splitlines() if "runs done)" in line]
    assert said == [
        "cot seed 1: training … (3 of 4 runs done)",
        "cot seed 1: evaluating … (3 of 4 runs done)",
        "cot seed 1: done (4 of 4 runs done)",
    ]
    everything = files_of(out)
    assert len(everything) == 10 and finished.items() <= everything.items()
    assert json.loads((out / "compare.json").read_text()) == result
    assert [record["mode"] for record in result["modes"]] == ["cot", "coconut"]
    assert [(record["train_steps"], record["num_latents"]) for record in result["modes"]] == [(18, 0), (18, 2)]
    assert (result["seeds"], result["n"], result["split"]) == ([1, 2], 8, "validation")
    assert (out / "compare.md").read_text() == compare.markdown(result)
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "hf_secret" not in (out / "compare.md").read_text() + (out / "compare.json").read_text()

    assert train_hf.main(command) == result
    assert files_of(out) == everything and "training" not in capsys.readouterr().out.split("| mode |")[0]

    (out / "coconut-seed2" / "results.json").unlink()
    resumed = train_hf.main(command)
    assert "coconut seed 2: resuming from checkpoint-18 … (3 of 4 runs done)" in capsys.readouterr().out
    changed = {name for name, written in files_of(out).items() if written != everything[name]}
    files = ("results.json", "evaluation/evaluation.json", "audit/audit.json")
    assert changed == {f"coconut-seed2/{file}" for file in files}
    assert [record["accuracy"] for record in resumed["modes"]] == [record["accuracy"] for record in result["modes"]]

    with pytest.raises(ValueError) as refused:
        train_hf.main([*command, "--learning_rate", "0.5"])
    runs = "cot-seed1, coconut-seed1, cot-seed2, coconut-seed2"
    assert f"- learning_rate: 0.003 there, 0.5 now ({runs})\nSet --overwrite true" in str(refused.value)
    assert len(files_of(out)) == 10


@pytest.mark.slow
def test_comparison_of_variants_side_by_side_is_extended_by_further_ones(recipe, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    command = [recipe, "--output_dir", str(out), "--jobs", "2", "--seed", "1"]
    first = train_hf.main([*command, "--compare", "jacobi,markers"])
    assert [record["mode"] for record in first["modes"]] == ["jacobi", "markers"]
    kept = files_of(out)
    assert len(kept) == 5  # with one audit

    result = train_hf.main([*command, "--compare", "markers,pause,icot,coconut,jacobi"])
    assert kept.items() <= files_of(out).items() and len(files_of(out)) == 12
    assert "(2 of 5 runs done)" in capsys.readouterr().out
    records = {record["mode"]: record for record in result["modes"]}
    assert [*records] == ["markers", "pause", "icot", "coconut", "jacobi"]
    assert {name: record["num_latents"] for name, record in records.items()} == {
        **{"markers": 0, "pause": 2, "icot": 0, "coconut": 2, "jacobi": 2},
    }
    assert {name for name, record in records.items() if record["verdicts"]} == {"coconut", "jacobi"}
    assert all(record["seconds_per_update"] > 0 < record["train_peak_memory_mb"] for record in records.values())
    assert records["jacobi"]["settings"]["jacobi_iterations"] == 3
    assert {record["train_steps"] for record in records.values()} == {18}
    assert "jacobi_iterations" not in result["recipe"]


def test_run_of_an_older_version_is_not_another_recipe_for_the_keys_it_lacks(recipe, tmp_path):
    """A key that came later and has its default changes nothing; another value of it does."""
    run = planned(recipe, "--output_dir", str(tmp_path / "out"))[0]
    earlier = {key: value for key, value in yaml.safe_load(run.recipe).items() if key != "image_size"}
    run.folder.mkdir(parents=True)
    (run.folder / "recipe.yaml").write_text(yaml.safe_dump(earlier))
    assert matched_runs.differences(run) == []
    now = replace(run, recipe=yaml.safe_dump({**yaml.safe_load(run.recipe), "image_size": 32}))
    assert matched_runs.differences(now) == ["image_size: 'not set' there, 32 now"]
