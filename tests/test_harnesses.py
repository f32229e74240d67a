"""lm-eval and lmms-eval ask a checkpoint the same rows and find the same answers and scores as our own evaluation.

The programs are not among the requirements: without them these tests are skipped.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import DatasetDict
from tiny import tiny_model, tiny_processor

from mmcoconut import from_vlm, processor_from_vlm
from mmcoconut.build.tiny_models import tiny_vlm
from mmcoconut.data import DATASETS, load_examples, loader_of
from mmcoconut.errors import UsageError
from mmcoconut.evaluation.evaluate import main as evaluate
from mmcoconut.harnesses import TASK_FOLDERS, tasks
from mmcoconut.harnesses.__main__ import main as print_folder
from mmcoconut.records import read_lines
from mmcoconut.training.collator import CurriculumCollator
from mmcoconut.training.curriculum import Curriculum


ROOT = Path(__file__).parent.parent
NUM_LATENTS = 2
NEW_TOKENS = 8
MAZES = {"cell_size": 8, "max_hops": 2, "num_rows": 6}
ASKED = ("arrow_mazes", "mmvp", "blink")  # one picture, pairs, several pictures


def composed():
    model = tiny_model("gpt2")
    return model, tiny_processor(model, num_latents=NUM_LATENTS)


def taken_over():
    vlm, processor = tiny_vlm("llava")
    model = from_vlm(vlm, processor=processor)
    return model, processor_from_vlm(processor, config=model.config, num_latents=NUM_LATENTS)


def taught(model, processor):
    """The same after a few updates, so that it writes `### colour` and is right now and then."""
    collator = CurriculumCollator(Curriculum(max_latent_stage=NUM_LATENTS), processor)
    collator.fixed_stage = NUM_LATENTS + 1  # no step is written
    rows = load_examples("arrow_mazes", split="train", **{**MAZES, "num_rows": 24})
    batch = collator([{**row, "index": index} for index, row in enumerate(rows)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, processor


@pytest.fixture(scope="module", params=[composed, taken_over], ids=["composed", "llava"])
def checkpoint(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("harnesses") / "tiny"
    for part in taught(*request.param()):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict[str, dict]:
    """Of each data set the options that load its rows."""
    folder = tmp_path_factory.mktemp("data")
    samples = {name: loader_of(name).write_sample(folder / name, num_rows=6, seed=0) for name in ASKED[1:]}
    return {"arrow_mazes": MAZES, **samples}


@pytest.fixture(scope="module")
def ours(checkpoint, options, tmp_path_factory) -> dict[str, tuple[float, list[str]]]:
    """Of each data set the score and the texts of `python -m mmcoconut.evaluation`."""
    return {name: evaluated(checkpoint, name, options[name], tmp_path_factory.mktemp("ours")) for name in ASKED}


def evaluated(checkpoint, name: str, options: dict, folder: Path) -> tuple[float, list[str]]:
    """Return the score and the texts of our evaluation, written to `folder`/out_`name`."""
    words = ["--model", checkpoint, "--dataset", name, "--dataset_options", json.dumps(options)]
    words += ["--max_new_tokens", NEW_TOKENS, "--batch_size", 4, "--output_dir", folder / f"out_{name}"]
    record = evaluate([str(word) for word in words])
    return record["accuracy"]["mean"], [
        line["output"] for line in read_lines(folder / f"out_{name}/predictions.jsonl")
    ]


def own_rows(folder: Path) -> dict:
    """Write four rows without pictures, with choices; return the options that load them."""
    rows = [
        {"question": f"{color} or not?", "steps": ["It is."], "choices": ["red", "blue"], "answer": color}
        for color in ("red", "blue", "blue", "red")
    ]
    (folder / "test.json").write_text(json.dumps(rows))
    return {"file": str(folder / "{split}.json"), "images_required": False}


# The task files and what they name


def test_every_task_file_names_a_data_set_and_what_all_share():
    files = sorted(TASK_FOLDERS["lm_eval"].glob("*.yaml"))
    names = [yaml.safe_load(file.read_text())["dataset_kwargs"]["dataset"] for file in files]
    assert [file.stem.removesuffix("_likelihood") for file in files] == [f"mmcoconut_{name}" for name in names]
    assert {*names} <= DATASETS.keys() and {"blink", "m3cot", "mmstar", "mmvp", "scienceqa", "vstar"} <= {*names}
    shared = "".join((TASK_FOLDERS["lm_eval"] / name).read_text() for name in ("_rows_yaml", "_choices_yaml"))
    functions = [line.rpartition("!function ")[2] for line in shared.splitlines() if "!function" in line]
    assert len(functions) == 9
    for function in functions:
        module, _, name = function.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))


def test_the_folder_of_a_program_is_printed(capsys):
    print_folder(["lm_eval"])
    assert capsys.readouterr().out.strip() == str(TASK_FOLDERS["lm_eval"])
    with pytest.raises(UsageError, match="did you mean 'lm_eval'.*lm_eval, lmms_eval"):
        print_folder(["lm_evl"])
    with pytest.raises(UsageError, match="no name was given"):
        print_folder([])


def test_a_row_is_asked_with_its_pictures_in_front_and_scored_by_its_data_sets_metric(tmp_path):
    sample = {name: loader_of(name).write_sample(tmp_path / name, num_rows=4, seed=0) for name in ("mmvp", "blink")}
    assert tasks.text_of(tasks.load("blink", **sample)["test"][3]).startswith("<image><image>What is the color")
    rows = tasks.load("mmvp", config_source="x.yaml", **sample)["test"]
    assert [image.size for image in tasks.images_of(rows[0])] == [(48, 48)]
    right = [tasks.target_of(row) for row in rows]
    written = [f"### {right[0]}", "### neither", f"so\n### {right[2].upper()}", f"### {right[3]}"]
    outcomes = [tasks.outcome_of(row, [text])["score"] for row, text in zip(rows, written)]
    json.dumps(outcomes)  # --log_samples writes them
    assert tasks.mean_score(outcomes) == 0.5  # one of two pairs, not three of four questions


def test_options_say_where_rows_are_and_missing_ones_are_asked_for():
    assert len(tasks.load("arrow_mazes", arrow_mazes={**MAZES, "split": "validation"})["test"]) == 6
    with pytest.raises(
        UsageError, match=r"task of mmvp got the metadata \['blink'\], without options.*--metadata '\{\"mmvp\""
    ):
        tasks.load("mmvp", blink={"path": "x"})


def test_choices_are_compared_as_they_were_trained_and_only_without_pictures(checkpoint, tmp_path):
    rows = tasks.load_choices("json_steps", str(checkpoint), trust_remote_code=True, json_steps=own_rows(tmp_path))[
        "test"
    ]
    end = rows[0]["end"]
    assert tasks.choices_of(rows[0]) == [f"### red{end}", f"### blue{end}"]
    chosen = [tasks.chosen_outcome_of(row, [(-2.0, False), (-1.0, True)])["score"] for row in rows]
    assert [outcome["output"] for outcome in chosen] == ["### blue"] * len(rows)
    assert tasks.mean_score(chosen) == 0.5
    with pytest.raises(UsageError, match="row 0 has 1 pictures.*--score_by likelihood"):
        tasks.load_choices("mmvp", str(checkpoint), mmvp=loader_of("mmvp").write_sample(tmp_path, num_rows=2, seed=0))
    with pytest.raises(UsageError, match="row 0 has no choices.*mmcoconut_graph_paths"):
        tasks.load_choices("graph_paths", str(checkpoint), graph_paths={"num_rows": 2})


# The programs


def run_program(words: list, folder: Path) -> dict:
    """Run lm-eval's command in the new `folder`; return its results, with `samples` by task in the rows' order."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, "-m", *map(str, words), "--output_path", "out", "--log_samples"]
    folder.mkdir()
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    [results] = (folder / "out").rglob("*results*.json")
    found = json.loads(results.read_text())
    for file in (folder / "out").rglob("*samples_*.jsonl"):
        name = next(name for name in found["results"] if f"samples_{name}_20" in file.name)
        found.setdefault("samples", {})[name] = sorted(read_lines(file), key=lambda sample: sample["doc_id"])
    return found


@pytest.mark.slow
def test_the_command_of_lm_eval_writes_our_scores_and_texts_without_pictures_too(checkpoint, ours, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm_eval==0.4.13")
    own = own_rows(tmp_path)
    words = ["lm_eval", "run", "--model", "hf-multimodal", "--device", "cpu"]
    words += ["--model_args", f"pretrained={checkpoint},trust_remote_code=True"]
    words += ["--include_path", TASK_FOLDERS["lm_eval"], "--apply_chat_template", "--batch_size", 4]
    words += ["--metadata", json.dumps({"arrow_mazes": MAZES, "json_steps": own})]
    words += ["--gen_kwargs", f"max_gen_toks={NEW_TOKENS}", "--tasks"]
    found = run_program([*words, "mmcoconut_arrow_mazes"], tmp_path / "images")
    score, texts = ours["arrow_mazes"]
    assert [sample["resps"][0][0] for sample in found["samples"]["mmcoconut_arrow_mazes"]] == texts
    assert found["results"]["mmcoconut_arrow_mazes"]["score,none"] == score
    found = run_program([*words, "mmcoconut_json_steps_likelihood"], tmp_path / "text")
    words = ["--model", checkpoint, "--dataset", "json_steps", "--dataset_options", json.dumps(own)]
    words += ["--score_by", "likelihood", "--output_dir", tmp_path / "likelihood"]
    record = evaluate([str(word) for word in words])
    samples = found["samples"]["mmcoconut_json_steps_likelihood"]
    theirs = torch.tensor([[float(resp[0][0]) for resp in sample["resps"]] for sample in samples])
    log_probs = [line["log_probs"] for line in read_lines(tmp_path / "likelihood/predictions.jsonl")]
    torch.testing.assert_close(theirs, torch.tensor(log_probs), rtol=1e-4, atol=1e-4)
    assert found["results"]["mmcoconut_json_steps_likelihood"]["score,none"] == record["accuracy"]["mean"]


@pytest.mark.slow
def test_lm_eval_finds_the_same_answers_and_scores(checkpoint, options, ours):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm_eval==0.4.13")
    manager = importlib.import_module("lm_eval.tasks").TaskManager(
        include_path=str(TASK_FOLDERS["lm_eval"]), include_defaults=False, metadata=options
    )
    found = lm_eval.simple_evaluate(
        model="hf-multimodal",
        model_args={"pretrained": str(checkpoint), "trust_remote_code": True},
        tasks=[f"mmcoconut_{name}" for name in ASKED],
        task_manager=manager,
        batch_size=4,
        device="cpu",
        apply_chat_template=True,
        gen_kwargs={"max_gen_toks": NEW_TOKENS},
        bootstrap_iters=0,
    )
    for name in ASKED:
        score, texts = ours[name]
        samples = sorted(found["samples"][f"mmcoconut_{name}"], key=lambda sample: sample["doc_id"])
        assert [sample["resps"][0][0] for sample in samples] == texts
        assert found["results"][f"mmcoconut_{name}"]["score,none"] == score
        assert len({*texts}) > 1  # or equal texts say little


@pytest.mark.slow
def test_lmms_eval_finds_the_same_answers_and_scores(checkpoint, options, ours, tmp_path):
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install lmms_eval==0.7.3 'filelock<4'")
    models = importlib.import_module("lmms_eval.models")
    models.MODEL_REGISTRY_V2.register_manifest(importlib.import_module("mmcoconut.harnesses.lmms_model").manifest())
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ASKED:
        DatasetDict(tasks.load(name, **options)).save_to_disk(tmp_path / name)
        own = {"include": str(TASK_FOLDERS["lmms_eval"] / "_rows_yaml"), "task": f"own_{name}"}
        (folder / f"own_{name}.yaml").write_text(yaml.safe_dump({**own, "dataset_path": str(tmp_path / name)}))
    evaluator = importlib.import_module("lmms_eval.evaluator")
    manager = importlib.import_module("lmms_eval.tasks").TaskManager(
        "ERROR", include_path=str(folder), include_defaults=False
    )
    found = evaluator.simple_evaluate(
        model="mmcoconut",
        model_args=f"pretrained={checkpoint}",
        tasks=[f"own_{name}" for name in ASKED],
        task_manager=manager,
        batch_size=4,
        device="cpu",
        gen_kwargs=f"max_new_tokens={NEW_TOKENS}",
        log_samples=True,
        bootstrap_iters=0,
    )
    for name in ASKED:
        score, texts = ours[name]
        samples = sorted(found["samples"][f"own_{name}"], key=lambda sample: sample["doc_id"])
        assert [sample["resps"][0][0] for sample in samples] == texts
        assert found["results"][f"own_{name}"]["score,none"] == score
