"""An evaluation answers every row as the model alone would, goes on where it stopped, and mixes no two evaluations.

Shapes: B rows of a batch, T tokens, V vocabulary.
"""

import doctest
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from tiny import tiny_image, tiny_model, tiny_processor, widths_of_passes

from mmcoconut import provenance
from mmcoconut.audit.command import AuditArguments
from mmcoconut.data import Example, load_examples, loader_of, question_text, to_dataset
from mmcoconut.data.images import open_images
from mmcoconut.data.scoring import score
from mmcoconut.errors import RecipeError, run_command
from mmcoconut.evaluation import answering
from mmcoconut.evaluation import evaluate as evaluation
from mmcoconut.evaluation.answering import Answerer, load_checkpoint
from mmcoconut.evaluation.asking import EvaluationArguments
from mmcoconut.evaluation.evaluate import main, parse_arguments
from mmcoconut.images_mmcoconut import UnreadableImageError
from mmcoconut.records import read_lines
from mmcoconut.statistics import bootstrap_mean
from mmcoconut.training.collator import CurriculumCollator, encode_target
from mmcoconut.training.curriculum import Curriculum


NUM_LATENTS = 2
NUM_ROWS = 7
MAZES = {"cell_size": 8, "max_hops": 2, "num_rows": NUM_ROWS}
OPTIONS = ["--dataset", "arrow_mazes", "--split", "validation"]
OPTIONS += [word for key, value in MAZES.items() for word in (f"--dataset_options.{key}", str(value))]
OPTIONS += ["--max_new_tokens", "8", "--batch_size", "3"]
MEASURED = ("seconds", "seconds_per_answer", "peak_memory_mb", "command", "processes", "machine", "batch_size")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny model that has learnt to write `### colour`, though hardly which one."""
    folder = tmp_path_factory.mktemp("evaluation") / "tiny"
    model = tiny_model("gpt2")
    processor = tiny_processor(model, num_latents=NUM_LATENTS)
    collator = CurriculumCollator(Curriculum(max_latent_stage=NUM_LATENTS), processor)
    collator.fixed_stage = NUM_LATENTS + 1  # no step is written
    rows = load_examples("arrow_mazes", split="train", **{**MAZES, "num_rows": 32})
    batch = collator([{**row, "index": index} for index, row in enumerate(rows)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_checkpoint(str(checkpoint), device=PartialState().device)


@pytest.fixture(scope="module")
def rows():
    return load_examples("arrow_mazes", split="validation", **MAZES)


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory) -> Path:
    """An evaluation that nothing interrupted; not to be written into."""
    folder = tmp_path_factory.mktemp("evaluation") / "whole"
    evaluate(checkpoint, folder)
    return folder


@pytest.fixture
def answered(monkeypatch) -> list[int]:
    """The indices of all rows that are answered from here on."""
    indices, answer = [], Answerer.answer

    def watched(self, rows, *args):
        indices.extend(row["index"] for row in rows)
        return answer(self, rows, *args)

    monkeypatch.setattr(Answerer, "answer", watched)
    return indices


def evaluate(model: Path, folder: Path, *options: str) -> dict:
    return main(["--model", str(model), "--output_dir", str(folder), *OPTIONS, *options])


def lines_of(folder: Path, *, timed: bool = False) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").strip("\n").split("\n")]
    assert all(line["seconds"] > 0 for line in lines)
    return [{key: value for key, value in line.items() if timed or key != "seconds"} for line in lines]


def record_of(folder: Path) -> dict:
    record = json.loads((folder / "evaluation.json").read_text("utf-8"))
    return {key: value for key, value in record.items() if key not in MEASURED}


def generated_alone(loaded, row: dict, *, num_latents: int = NUM_LATENTS, max_new_tokens: int = 8) -> list[int]:
    """What the model writes for a row without any company: its new tokens (T,)."""
    model, processor = loaded
    images = open_images(row)
    inputs = processor(
        images=[images] if images else None, text=[question_text(row)], num_latents=num_latents, return_tensors="pt"
    ).to(model.device)
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


def text_of(loaded, tokens: list[int]) -> str:
    return loaded[1].tokenizer.decode(tokens, skip_special_tokens=True)


def decoder_calls(model, function) -> int:
    """How often the language model runs inside `function()`."""
    calls = widths_of_passes(model)
    before = len(calls)
    function()
    return len(calls) - before


def json_data(folder: Path, rows: list[dict]) -> list[str]:
    """Options that load these rows of json_steps; the last --dataset_options on a command line counts."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"steps": [], **row} for row in rows]
    (folder / "validation.json").write_text(json.dumps(rows), encoding="utf-8")
    options = {"file": str(folder / "{split}.json")}
    options |= {"image_root": str(folder)} if any(row.get("image") for row in rows) else {"images_required": False}
    return ["--dataset", "json_steps", "--dataset_options", json.dumps(options)]


def test_docstring_examples_are_true():
    assert doctest.testmod(evaluation).failed == 0
    assert doctest.testmod(provenance).failed == 0


# What is written


def test_predictions_are_the_rows_in_order_each_as_if_it_were_alone(loaded, rows, whole):
    lines = lines_of(whole)
    assert [line["index"] for line in lines] == list(range(NUM_ROWS))
    for line, row in zip(lines, rows, strict=True):
        tokens = generated_alone(loaded, row)
        assert line["output"] == text_of(loaded, tokens)
        assert line["answer"] == line["output"].rpartition("###")[2].strip()
        assert (line["generated_tokens"], line["num_latents"]) == (len(tokens), NUM_LATENTS)
        assert (line["row_id"], line["question"], line["gold"]) == (row["row_id"], row["question"], row["answers"])
        assert (line["num_steps"], line["choices"]) == (len(row["steps"]), [])
        assert [name[:7] for name in line["images"]] == ["sha256:"]
        assert line["score"] == float(line["answer"] == row["answers"][0])
        assert line["correct"] is (line["answer"] == row["answers"][0])
    # Rows of different lengths, ended and cut off, right and wrong, and different pictures: or all this says little.
    assert len({line["generated_tokens"] for line in lines}) > 1
    assert {line["score"] for line in lines} == {0.0, 1.0}
    assert len({line["images"][0] for line in lines}) == NUM_ROWS


def test_record_holds_the_means_of_the_predictions(checkpoint, loaded, whole):
    lines, record = lines_of(whole, timed=True), json.loads((whole / "evaluation.json").read_text())
    scores = [line["score"] for line in lines]
    assert record["accuracy"] == bootstrap_mean(scores).asdict()
    assert record["accuracy"]["mean"] == sum(scores) / NUM_ROWS
    for key in ("generated_tokens", "decoder_passes"):
        assert record[key] == pytest.approx(sum(line[key] for line in lines) / NUM_ROWS)
    assert record["seconds"] == pytest.approx(sum(line["seconds"] for line in lines), abs=1e-3)
    assert record["seconds_per_answer"] == pytest.approx(record["seconds"] / NUM_ROWS, abs=1e-3)
    by_steps = {steps: [line["score"] for line in lines if line["num_steps"] == steps] for steps in (2, 3)}
    assert {steps: (group["mean"], group["n"]) for steps, group in record["by_num_steps"].items()} == {
        str(steps): (sum(group) / len(group), len(group)) for steps, group in by_steps.items()
    }
    assert (record["metric"], record["n"], record["split"]) == ("exact_match", NUM_ROWS, "validation")
    assert record["metric_details"] == {"exact_match": record["accuracy"]["mean"], "n": NUM_ROWS}
    assert record["parameters"] == sum(parameter.numel() for parameter in loaded[0].parameters())
    assert (record["dtype"], record["dataset_options"], record["trained_with"]) == ("float32", MAZES, None)
    assert sorted(path.name for path in whole.iterdir()) == [
        "evaluation.json", "evaluation_settings.json", "predictions.jsonl"]  # fmt: skip


def test_figures_of_a_metric_are_recorded_and_printed_apart(whole):
    rows = to_dataset(Example([], "?", [], [], [gold], "row") for gold in ("yes", "no", "no", "red lobe", "liver"))
    lines = [{"output": f"### {answer}", "answer": answer} for answer in ("yes", "no", "yes", "red", "liver")]
    details = evaluation.add_scores(lines, rows, "medical_vqa")
    assert [line["score"] for line in lines] == [1.0, 1.0, 0.0, 0.0, 1.0]
    assert details == {
        "medical_vqa": 0.6, "n": 5, "yes_no_accuracy": pytest.approx(2 / 3), "n_yes_no": 3,
        "open_exact_match": 0.5, "open_f1": pytest.approx((2 / 3 + 1) / 2), "n_open": 2}  # fmt: skip
    record = json.loads((whole / "evaluation.json").read_text())
    printed = evaluation.summary({**record, "metric": "medical_vqa", "metric_details": details}).split("\n")
    assert printed[2:5] == ["  yes_no_accuracy: 0.6667", "  n_yes_no: 3", "  open_exact_match: 0.5"]
    assert printed[5:7] == ["  open_f1: 0.8333", "  n_open: 2"]
    assert evaluation.summary(record).split("\n")[2].startswith("  2 steps")  # exact_match has no other figures


def test_record_says_how_the_checkpoint_was_trained(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    trained = {"mode": "coconut", "seed": 3, "train_steps": 40, "train_seconds": 1.5, "command": "train_hf.py"}
    trained |= {"commit": "abc", "versions": {"torch": "2"}, "machine": "x86_64"}
    (folder / "results.json").write_text(json.dumps({**trained, "stages": []}))
    assert evaluate(folder, tmp_path / "out", "--max_samples", "1")["trained_with"] == trained


def test_only_so_many_rows_are_answered(checkpoint, whole, tmp_path):
    assert evaluate(checkpoint, tmp_path / "few", "--max_samples", "4")["n"] == 4
    assert lines_of(tmp_path / "few") == lines_of(whole)[:4]
    assert evaluate(checkpoint, tmp_path / "all", "--max_samples", "400")["n"] == NUM_ROWS


@pytest.mark.parametrize("num_latents", [0, 1, 4])
def test_number_of_latents_can_be_chosen(checkpoint, loaded, rows, tmp_path, num_latents):
    record = evaluate(checkpoint, tmp_path / "out", "--num_latents", str(num_latents))
    assert record["num_latents"] == num_latents
    for line, row in zip(lines_of(tmp_path / "out"), rows, strict=True):
        tokens = generated_alone(loaded, row, num_latents=num_latents)
        assert (line["output"], line["num_latents"]) == (text_of(loaded, tokens), num_latents)
        assert line["decoder_passes"] == num_latents + len(tokens)


def test_latents_change_what_is_written(loaded, rows):
    written = [[generated_alone(loaded, row, num_latents=count) for row in rows] for count in (0, 1, NUM_LATENTS)]
    assert written[0] != written[1] != written[2]


@pytest.mark.parametrize("thought_mode", ["feedback", "pause"])
@pytest.mark.parametrize("num_latents", [0, 1, 3])
def test_decoder_passes_are_the_calls_of_the_language_model(loaded, rows, monkeypatch, thought_mode, num_latents):
    model, processor = loaded
    monkeypatch.setattr(model.config, "thought_mode", thought_mode)
    answerer = Answerer(model, processor, num_latents=num_latents, max_new_tokens=8)
    counted = []
    for row in rows:
        answers = []
        calls = decoder_calls(model, lambda row=row, answers=answers: answers.extend(answerer.answer([row])))
        assert [answer["decoder_passes"] for answer in answers] == [calls]
        counted.append(calls)
    assert len(set(counted)) > 1
    thoughts = num_latents if thought_mode == "feedback" else 0
    assert min(counted) >= thoughts + 2  # the marker and the end, at least


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("num_latents", [0, 1, 3])
def test_passes_of_parallel_thoughts_are_counted_as_they_are_made(loaded, rows, monkeypatch, num_latents, iterations):
    model, processor = loaded
    monkeypatch.setattr(model.config, "thought_schedule", "jacobi")
    monkeypatch.setattr(model.config, "jacobi_iterations", iterations)
    answerer, answers = Answerer(model, processor, num_latents=num_latents, max_new_tokens=8), []
    calls = decoder_calls(model, lambda: answers.extend(answerer.answer([rows[0]])))
    assert [answer["decoder_passes"] for answer in answers] == [calls]


@pytest.mark.parametrize("sees", ["no_image", "thoughts"])
@pytest.mark.parametrize(
    "changed", [{}, {"thought_mode": "pause"}, {"thought_schedule": "jacobi", "jacobi_iterations": 2}], ids=str
)
def test_what_sees_less_takes_a_pass_of_its_own(loaded, rows, monkeypatch, changed, sees):
    model, processor = loaded
    for name, value in {**changed, "answer_sees": sees}.items():
        monkeypatch.setattr(model.config, name, value)
    row = {**rows[0], "choices": ["red", "yellow"]}
    for markers, begin_with in (("both", ""), ("start", ""), ("start", "###")):
        monkeypatch.setattr(processor, "markers", markers)
        for asked in (row, {**row, "images": []}):
            answerer = Answerer(model, processor, max_new_tokens=4, begin_with=begin_with)
            for ask in (answerer.answer, partial(answerer.choose, per_token=False)):
                answers = []
                calls = decoder_calls(model, lambda ask=ask, asked=asked, found=answers: found.extend(ask([asked])))
                assert [answer["decoder_passes"] for answer in answers] == [calls], (markers, begin_with, ask)


def test_choosing_takes_one_pass_after_the_thoughts(loaded, rows):
    answerer = Answerer(*loaded)
    row, answers = {**rows[0], "choices": ["red", "yellow"]}, []
    calls = decoder_calls(loaded[0], lambda: answers.extend(answerer.choose([row], per_token=False)))
    assert [answer["decoder_passes"] for answer in answers] == [calls] == [NUM_LATENTS + 1]


# Going on


def interrupted(whole: Path, folder: Path, parts: dict[str, bytes]) -> Path:
    """What an evaluation left that was killed when it had written these parts."""
    folder.mkdir()
    shutil.copy(whole / "evaluation_settings.json", folder)
    for name, content in parts.items():
        (folder / name).write_bytes(content)
    return folder


def unscored(whole: Path) -> list[bytes]:
    """The lines of an evaluation as they stood before they were scored."""
    lines = lines_of(whole, timed=True)
    kept = [{key: value for key, value in line.items() if key not in ("score", "correct")} for line in lines]
    return [json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in kept]


@pytest.mark.parametrize(
    ("parts_of", "missing"),
    [
        (lambda lines: {"predictions.part-0.jsonl": b"".join(lines[:4])}, [4, 5, 6]),
        (lambda lines: {"predictions.part-0.jsonl": b"".join(lines[:4])[:-20]}, [3, 4, 5, 6]),
        (lambda lines: {"predictions.part-0.jsonl": lines[0][:15]}, [0, 1, 2, 3, 4, 5, 6]),
        (lambda lines: {"predictions.part-0.jsonl": b"".join(lines)[:-1]}, [6]),  # all but the last line's end
        (
            lambda lines: {
                "predictions.part-0.jsonl": lines[0] + lines[2],
                "predictions.part-1.jsonl": lines[1] + lines[3][:-9],
                "predictions.part-2.jsonl": b"",
            },
            [3, 4, 5, 6],
        ),
        (lambda lines: {"predictions.jsonl": b"".join(lines[1::2])}, [0, 2, 4, 6]),
        (
            lambda lines: {"predictions.jsonl": b"".join(lines[:6]), "predictions.jsonl.new": lines[0]},
            [6],
        ),
        (lambda lines: {"predictions.jsonl": b"".join(lines)}, []),  # killed before the record was written
    ],
    ids=["half", "cut line", "cut first line", "no newline", "three processes", "lines deleted", "replacing", "all"],
)
def test_evaluation_goes_on_with_the_missing_rows_only(checkpoint, whole, tmp_path, answered, parts_of, missing):
    folder = interrupted(whole, tmp_path / "out", parts_of(unscored(whole)))
    evaluate(checkpoint, folder)
    assert answered == missing
    assert lines_of(folder) == lines_of(whole)
    assert record_of(folder) == record_of(whole)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())


def test_finished_evaluation_is_read_and_keeps_the_machine_it_ran_on(checkpoint, whole, tmp_path, answered):
    folder = shutil.copytree(whole, tmp_path / "out")
    record = {**json.loads((folder / "evaluation.json").read_text()), "machine": "another", "date": "2001-01-01"}
    (folder / "evaluation.json").write_text(json.dumps(record))
    assert evaluate(checkpoint, folder) == record
    assert (answered, lines_of(folder, timed=True)) == ([], lines_of(whole, timed=True))
    assert json.loads((folder / "evaluation.json").read_text()) == record


def test_line_cut_anywhere_is_left_out_and_breaks_inside_text_are_none(tmp_path):
    lines = [{"output": "a\u2028b\x85c\x1c\r\nd\x0b"}, {"output": "où est le café\u2029? 🐈"}]
    first, second = (json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
    file = tmp_path / "predictions.part-0.jsonl"
    for end in range(len(second) + 1):
        file.write_bytes(first + second[:end])
        assert read_lines(file) == (lines if end == len(second) else lines[:1])
        evaluation.trim(file)
        assert file.read_bytes() == (first + second if end == len(second) else first)


def test_rows_with_every_kind_of_line_break_are_read_back(checkpoint, tmp_path, answered):
    questions = ["one\u2028two", "où est\x85le café?", "three\nfour\r\n🐈"]
    data = json_data(tmp_path / "data", [{"question": question, "answer": "red"} for question in questions])
    evaluate(checkpoint, tmp_path / "out", *data)
    assert [line["question"] for line in lines_of(tmp_path / "out")] == questions
    (tmp_path / "out" / "evaluation.json").unlink()
    evaluate(checkpoint, tmp_path / "out", *data)
    assert answered == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_latents", "1"], "num_latents was 2 and is 1"),
        (["--max_new_tokens", "9"], "max_new_tokens was 8 and is 9"),
        (["--split", "test"], "split was 'validation' and is 'test'"),
        (["--max_samples", "3"], "max_samples was None and is 3; n was 7 and is 3"),
        (
            ["--dataset_options.seed", "1"],
            "dataset_options was .* and is .*'seed': 1.*; rows was .* and is",
        ),
        (["--metric", "vqa_accuracy"], "metric was 'exact_match' and is 'vqa_accuracy'"),
        (["--dtype", "bfloat16"], "dtype was 'auto' and is 'bfloat16'"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused_with_both_values(
    checkpoint, whole, tmp_path, options, message, answered
):
    folder = shutil.copytree(whole, tmp_path / "out")
    with pytest.raises(ValueError, match=f"other settings .*{message}.*--overwrite true"):
        evaluate(checkpoint, folder, *options)
    assert (answered, lines_of(folder)) == ([], lines_of(whole))


def test_checkpoint_that_was_trained_again_is_refused(checkpoint, tmp_path, answered):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    evaluate(folder, tmp_path / "out", "--max_samples", "1")
    weights = load_file(folder / "model.safetensors")
    last = sorted(weights)[-1]
    save_file({**weights, last: weights[last] + 0.01}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"other settings \(weights was '\w+' and is '\w+'\)"):
        evaluate(folder, tmp_path / "out", "--max_samples", "1")
    assert answered == [0]


def test_rows_that_changed_in_the_same_file_are_refused(checkpoint, tmp_path, answered):
    rows = [{"question": "Which?", "answer": "red"}]
    evaluate(checkpoint, tmp_path / "out", *json_data(tmp_path / "data", rows))
    rows[0]["answer"] = "blue"
    with pytest.raises(ValueError, match=r"other settings \(rows was '\w+' and is '\w+'\)"):
        evaluate(checkpoint, tmp_path / "out", *json_data(tmp_path / "data", rows))
    assert answered == [0]


def test_overwriting_deletes_the_evaluation_and_nothing_else(checkpoint, whole, tmp_path, answered):
    folder = shutil.copytree(whole, tmp_path / "out")
    (folder / "predictions.part-3.jsonl").write_text("{broken")
    (folder / "notes.txt").write_text("mine")
    record = evaluate(checkpoint, folder, "--max_samples", "2", "--overwrite", "true")
    assert (record["n"], answered, len(lines_of(folder))) == (2, [0, 1], 2)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "predictions.part-3.jsonl").exists()


@pytest.mark.parametrize("overwrite", [[], ["--overwrite", "true"]])
@pytest.mark.parametrize("name", ["notes.txt", "settings.json", "predictions.jsonl"])
def test_folder_that_is_no_evaluation_is_left_alone(checkpoint, tmp_path, name, overwrite):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="is not empty and holds no evaluation. Set another --output_dir"):
        evaluate(checkpoint, tmp_path, *overwrite)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "{}")]


# Several processes


@pytest.mark.slow
def test_two_processes_write_what_one_does(checkpoint, whole, tmp_path):
    """One of the rows was answered before, by a process of another launch, so that six are shared by two."""
    folder = interrupted(whole, tmp_path / "out", {"predictions.part-5.jsonl": unscored(whole)[3]})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--main_process_port", str(port), "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "-m", "mmcoconut.evaluation", "--model", str(checkpoint)]
    command += ["--output_dir", str(folder), *OPTIONS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert lines_of(folder) == lines_of(whole)
    assert lines_of(folder, timed=True)[3] == lines_of(whole, timed=True)[3]
    assert record_of(folder) == record_of(whole)
    record = json.loads((folder / "evaluation.json").read_text())
    assert record["processes"] == 2
    assert record["command"].startswith("python -m mmcoconut.evaluation --model ")
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert done.stdout.count("written to") == 1


def test_processes_share_the_missing_rows_and_answer_none_twice(loaded, rows, whole, tmp_path, monkeypatch, answered):
    """Each of three processes in turn, with the two others' lines written by the time that all have met again."""
    lines = unscored(whole)
    for process in range(3):
        folder = interrupted(whole, tmp_path / str(process), {"predictions.part-7.jsonl": lines[2]})
        meetings = [lambda: None, partial((folder / "predictions.part-8.jsonl").write_bytes, b"".join(lines))]
        meetings.append(lambda: None)  # all have read, before the parts become one file
        state = SimpleNamespace(process_index=process, num_processes=3, is_main_process=process == 0)
        state.wait_for_everyone = lambda meetings=meetings: meetings.pop(0)()
        monkeypatch.setattr(evaluation, "PartialState", lambda state=state: state)
        options = {"batch_size": 3, "score_by": "generation"}
        found = evaluation.answer_all(Answerer(*loaded, max_new_tokens=8), rows, folder, **options)
        assert [line["index"] for line in found] == list(range(NUM_ROWS))
        assert len(read_lines(folder / f"predictions.part-{process}.jsonl")) == 2
    assert sorted(answered) == [0, 1, 3, 4, 5, 6]


# Likelihood


@pytest.fixture(scope="module")
def choices_data(tmp_path_factory):
    """Rows with a picture each and choices of different lengths, one of which is accepted in two spellings."""
    folder = tmp_path_factory.mktemp("choices")
    choices = [["red", "yellow", "a deep dark blue"], ["green", "red"], ["yellow", "pink", "cyan", "red"]]
    rows = []
    for index, some in enumerate(choices):
        tiny_image(index).save(folder / f"{index}.png")
        accepted = [some[0], some[1]]
        rows.append({"image": f"{index}.png", "question": "Which?", "choices": some, "answers": accepted})
    return json_data(folder, rows)


def log_probs_alone(loaded, row: dict) -> list[tuple[float, int]]:
    """For each choice alone: log p(### choice <eos> | prompt), from all logits (T, V), and its number of tokens."""
    model, processor = loaded
    pixels = processor.image_processor(open_images(row), return_tensors="pt")["pixel_values"].to(model.device)
    found = []
    for choice in row["choices"]:
        prompt = processor.encode_prompt(question_text(row), num_images=1, num_latents=NUM_LATENTS)
        target = encode_target(processor, [], choice)
        with torch.no_grad():
            ids = torch.tensor([prompt + target], device=model.device)
            logits = model(input_ids=ids, pixel_values=pixels).logits[0]  # (T, V)
        predicted = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)  # (target, V)
        found.append((sum(row[token].item() for row, token in zip(predicted, target)), len(target)))
    return found


@pytest.mark.parametrize("score_by", ["likelihood", "likelihood_per_token"])
def test_chosen_is_the_likeliest_choice_of_each_row_alone(checkpoint, loaded, choices_data, tmp_path, score_by):
    # No text is written, so its greatest length does not count.
    options = ["--score_by", score_by, "--max_new_tokens", "4000", *choices_data]
    record = evaluate(checkpoint, tmp_path / "out", *options)
    options = parse_arguments(["--model", "m", "--dataset", *choices_data[1:]]).dataset_options
    rows = load_examples("json_steps", split="validation", **options)
    for line, row in zip(lines_of(tmp_path / "out"), rows, strict=True):
        alone = [total / (count if score_by.endswith("token") else 1) for total, count in log_probs_alone(loaded, row)]
        assert line["log_probs"] == pytest.approx(alone, abs=2e-4)
        best = row["choices"][alone.index(max(alone))]
        assert (line["answer"], line["output"], line["generated_tokens"]) == (best, f"### {best}", 0)
        assert line["decoder_passes"] == NUM_LATENTS + 1
    assert record["score_by"] == score_by
    assert record["accuracy"]["mean"] == sum(line["score"] for line in lines_of(tmp_path / "out")) / 3


def test_likelihood_a_token_prefers_other_choices(loaded, choices_data):
    """Or the two ways would not be told apart above."""
    options = parse_arguments(["--model", "m", "--dataset", *choices_data[1:]]).dataset_options
    rows = load_examples("json_steps", split="validation", **options)
    answerer = Answerer(*loaded)
    whole, by_token = (answerer.choose(list(rows), per_token=per_token) for per_token in (False, True))
    assert [answer["answer"] for answer in whole] != [answer["answer"] for answer in by_token]


def test_score_may_lie_between_wrong_and_right(checkpoint, choices_data, tmp_path):
    options = ["--score_by", "likelihood", "--metric", "vqa_accuracy", *choices_data]
    record = evaluate(checkpoint, tmp_path / "out", *options)
    lines = lines_of(tmp_path / "out")
    # One of two accepted answers: left out, it matches none; else one of three needed.
    expected = [1 / 6 if line["answer"] in line["gold"] else 0.0 for line in lines]
    assert [line["score"] for line in lines] == pytest.approx(expected)
    assert max(expected) > 0
    assert not any(line["correct"] for line in lines)
    assert record["accuracy"]["mean"] == pytest.approx(sum(expected) / 3)


def test_row_without_choices_has_no_likelihood(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="arrow_mazes validation row 0 has no choices.*generation"):
        evaluate(checkpoint, tmp_path / "out", "--score_by", "likelihood")


def test_choice_that_does_not_fit_is_refused_with_its_row(checkpoint, tmp_path):
    data = json_data(tmp_path, [{"question": "Which?", "choices": ["red", "word " * 90], "answer": "red"}])
    with pytest.raises(ValueError, match=r"row 0: the prompt takes \d+ tokens.* more may follow.* has 128 positions"):
        evaluate(checkpoint, tmp_path / "out", "--score_by", "likelihood", *data)


# Rows


def test_text_rows_and_rows_with_pictures_share_a_batch(checkpoint, loaded, tmp_path):
    for index in range(3):
        tiny_image(index).save(tmp_path / f"{index}.png")
    rows = [
        {"question": "Which one is it, and why?", "answer": "red"},
        {"image": ["0.png", "1.png"], "question": "Which?", "answer": "red"},
        {"image": "2.png", "question": "What is that?", "answer": "red", "choices": ["red", "blue"]},
    ]
    data = json_data(tmp_path, rows)
    evaluate(checkpoint, tmp_path / "out", *data)
    options = parse_arguments(["--model", "m", *data]).dataset_options
    lines = lines_of(tmp_path / "out")
    for line, row in zip(lines, load_examples("json_steps", split="validation", **options), strict=True):
        assert line["output"] == text_of(loaded, generated_alone(loaded, row))
    names = [[Path(name).name for name in line["images"]] for line in lines]
    assert names == [[], ["0.png", "1.png"], ["2.png"]]


def test_rows_of_text_alone_are_answered(checkpoint, loaded, tmp_path):
    data = json_data(tmp_path, [{"question": question, "answer": "red"} for question in ("Which?", "Who is there?")])
    evaluate(checkpoint, tmp_path / "out", *data)
    for line in lines_of(tmp_path / "out"):
        row = {"images": [], "question": line["question"], "choices": [], "row_id": ""}
        assert line["output"] == text_of(loaded, generated_alone(loaded, row))


def test_unreadable_picture_is_an_error_with_its_row_and_earlier_rows_are_kept(checkpoint, tmp_path, answered):
    for index in range(4):
        tiny_image(index).save(tmp_path / f"{index}.png")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[:40])
    rows = [{"image": f"{index}.png", "question": "Which?", "answer": "red"} for index in range(4)]
    run = partial(evaluate, checkpoint, tmp_path / "out", *json_data(tmp_path, rows), "--batch_size", "2")
    with pytest.raises(UnreadableImageError, match=r"validation.json row 2: image file .*2\.png"):
        run()
    (tmp_path / "2.png").write_bytes(whole)
    run()
    assert answered == [0, 1, 2, 3, 2, 3]


def test_prompt_fills_the_positions_and_no_more(checkpoint, loaded, rows, tmp_path):
    encode = partial(loaded[1].encode_prompt, num_images=1, num_latents=NUM_LATENTS)
    lengths = [len(encode(question_text(row))) for row in rows]
    longest, room = lengths.index(max(lengths)), 128 - max(lengths)
    evaluate(checkpoint, tmp_path / "fits", "--max_new_tokens", str(room), "--batch_size", "7")
    message = (
        f"arrow_mazes validation row {longest}: the prompt takes {max(lengths)} tokens, images and 2 latents "
        f"included, and {room + 1} more may follow. The language model has 128 positions. Lower max_new_tokens"
    )
    with pytest.raises(ValueError, match=message):
        evaluate(checkpoint, tmp_path / "out", "--max_new_tokens", str(room + 1), "--batch_size", "7")


def test_row_that_the_metric_cannot_score_ends_the_run_before_any_is_answered(checkpoint, tmp_path, answered):
    with pytest.raises(ValueError, match="row 0: the reference is '.*'; give a number"):
        evaluate(checkpoint, tmp_path / "out", "--metric", "numeric_answer")
    assert answered == [] and not (tmp_path / "out").exists()


def test_numeric_answers_are_read_out_of_the_whole_text(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "parse_answer", lambda text: "8")
    options = loader_of("gsm8k_aug").write_sample(tmp_path / "data", num_rows=2, seed=0)
    data = ["--dataset", "gsm8k_aug", "--dataset_options", json.dumps(options)]
    record = evaluate(checkpoint, tmp_path / "out", *data)
    lines = lines_of(tmp_path / "out")
    gold = [{"answers": line["gold"], "row_id": "", "choices": []} for line in lines]
    outputs = [line["output"] for line in lines]
    assert record["metric"] == "numeric_answer"
    assert [line["score"] for line in lines] == score("numeric_answer", outputs, ["8"] * 2, rows=gold)["scores"]


def test_checkpoint_without_some_weights_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.multi_modal_projector.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights, such as model.multi_modal_projector.weight"):
        evaluate(folder, tmp_path / "out")


# Arguments


@pytest.fixture
def with_recipe(checkpoint, tmp_path) -> Path:
    """The checkpoint with a recipe of its training beside the weights."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    mazes = {**MAZES, "num_rows": {"validation": NUM_ROWS, "train": 100}}
    recipe = {"dataset": "arrow_mazes", "dataset_options": mazes, "max_new_tokens": 8, "learning_rate": 0.1}
    (folder / "recipe.yaml").write_text(json.dumps({**recipe, "metric": "medical_vqa"}))
    return folder


def test_recipe_beside_the_weights_says_which_data(with_recipe, whole, tmp_path):
    record = main(["--model", str(with_recipe), "--output_dir", str(tmp_path / "out"), "--split", "validation"])
    assert (record["dataset"], record["metric"], record["n"]) == ("arrow_mazes", "medical_vqa", NUM_ROWS)
    assert [line["output"] for line in lines_of(tmp_path / "out")] == [line["output"] for line in lines_of(whole)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"max_new_tokens": 8, "metric": "medical_vqa"}),
        (["--max_new_tokens", "5", "--metric", "exact_match"], {"max_new_tokens": 5, "metric": "exact_match"}),
        (["--dataset", "arrow_mazes"], {"max_new_tokens": 8, "metric": "medical_vqa"}),
        (
            ["--dataset_options.cell_size", "16", "--dataset_options.num_rows", "3"],
            {"dataset_options": {**MAZES, "cell_size": 16, "num_rows": 3}},
        ),
        (
            ["--dataset", "prosqa", "--dataset_options.folder", "d"],
            {"dataset": "prosqa", "dataset_options": {"folder": "d"}, "max_new_tokens": 64, "metric": None},
        ),
    ],
)
def test_command_line_comes_before_the_recipe_and_another_data_set_leaves_it(with_recipe, options, expected):
    arguments = parse_arguments(["--model", str(with_recipe), *options])
    assert {key: getattr(arguments, key) for key in expected} == expected


def test_recipe_that_is_named_comes_before_the_one_beside_the_weights(with_recipe, tmp_path):
    (tmp_path / "other.yaml").write_text("dataset: vqav2\ndataset_options: {folder: d}\n")
    arguments = parse_arguments(["--model", str(with_recipe), "--recipe", str(tmp_path / "other.yaml")])
    assert (arguments.dataset, arguments.dataset_options) == ("vqav2", {"folder": "d"})
    assert (arguments.max_new_tokens, arguments.metric) == (64, None)


@pytest.mark.parametrize("arguments", [EvaluationArguments, AuditArguments])
@pytest.mark.parametrize(
    ("text", "key", "own"),
    [
        ("markers: none", "markers", "both"),
        ("mode: pause", "mode", "coconut"),
        ("image_fusion: add", "image_fusion", "replace"),
    ],
)
def test_recipe_that_is_named_and_has_another_layout_is_refused(checkpoint, tmp_path, arguments, text, key, own):
    (tmp_path / "other.yaml").write_text(f"dataset: arrow_mazes\n{text}\n")
    words = ["--model", str(checkpoint), "--recipe", str(tmp_path / "other.yaml")]
    with pytest.raises(RecipeError, match=f"{key} = .*: the checkpoint .* has '{own}'.* remove this key"):
        parse_arguments(words, arguments)
    (tmp_path / "other.yaml").write_text(f"dataset: arrow_mazes\n{key}: {own}\n")
    assert parse_arguments(words, arguments).dataset == "arrow_mazes"


def test_name_without_a_checkpoint_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = ["--dataset", "arrow_mazes", "--max_samples", "1", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda _: main(["--model", "nobody/nothing", *options]))
    said = capsys.readouterr().err
    assert re.fullmatch("model = 'nobody/nothing': .* Give an existing folder or a Hub id.\n", said)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "m", "--num_latent", "2"], "num_latent = '2': no such key; did you mean `num_latents`?"),
        (["--model", "m", "--metric", "exact_mach"], "metric = 'exact_mach': choose one of .*exact_match"),
        (["--model", "m", "--score_by", "luck"], "score_by = 'luck': choose one of generation, likelihood,"),
        (["--model", "m", "--dtype", "int8"], "dtype = 'int8': choose one of auto, float32"),
        (["--model", "m", "--dataset", "arrow_maze"], "dataset = 'arrow_maze': .*did you mean `arrow_mazes`"),
        (["--model", "m", "--batch_size", "0"], "batch_size = '0': must lie between 1 and inf"),
        (["--model", "m", "--num_latents", "-1"], "num_latents = '-1': must lie between 0 and inf"),
        (["--dataset", "arrow_mazes"], "model = None: name a checkpoint"),
        (["--model", "m"], "dataset = None: name a data set, or a --recipe"),
        (["--model", "m", "--recipe", "nowhere.yaml"], "recipe = 'nowhere.yaml': no such file"),
    ],
)
def test_wrong_arguments_are_refused_with_the_remedy(options, message):
    with pytest.raises(RecipeError, match=message.replace("?", r"\?").replace("..yaml", r"\.yaml")):
        parse_arguments(options)


def test_everything_that_is_wrong_is_said_at_once():
    with pytest.raises(RecipeError) as error:
        parse_arguments(["--score_by", "luck", "--dtype", "int8"])
    assert [key for key, _, _ in error.value.problems] == ["score_by", "dtype", "model"]


def test_folder_is_named_for_model_data_and_split(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to(Path(checkpoint).parent)
    main(["--model", "./runs/tiny/", *OPTIONS, "--max_samples", "1"])
    assert (tmp_path / "outputs/evaluation/runs-tiny-arrow_mazes-validation/evaluation.json").exists()


def test_command_is_written_as_a_shell_takes_it_and_without_tokens(monkeypatch):
    words = ["somewhere/train_hf.py", "recipe.yaml", "--freeze", "[a, b]", "--hub_token", "hf_1", "--push"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert provenance.command() == "train_hf.py recipe.yaml --freeze '[a, b]' --hub_token hidden --push"


def test_unreadable_images_are_left_out_where_the_recipe_or_the_command_says_so(checkpoint, tmp_path, caplog):
    options = loader_of("json_steps").write_sample(tmp_path / "data", num_rows=3, seed=0)
    words = ["--dataset", "json_steps", "--dataset_options", json.dumps(options), "--split", "validation"]
    rows = load_examples("json_steps", split="validation", **options)
    Path(rows[1]["images"][0]["path"]).write_bytes(b"no picture")
    model = ["--model", str(checkpoint), "--max_new_tokens", "2"]
    with pytest.raises(UnreadableImageError):
        main([*model, *words, "--output_dir", str(tmp_path / "error")])
    record = main([*model, *words, "--output_dir", str(tmp_path / "skip"), "--unreadable_images", "skip"])
    assert record["n"] == len(rows) - 1
    assert "left out" in caplog.text and rows[1]["row_id"] in caplog.text


def test_smaller_batches_may_finish_a_stopped_evaluation(checkpoint, tmp_path):
    whole = evaluate(checkpoint, tmp_path / "whole")
    evaluate(checkpoint, tmp_path / "stopped")
    for name in ("evaluation.json", "predictions.jsonl"):
        (tmp_path / "stopped" / name).unlink()
    record = evaluate(checkpoint, tmp_path / "stopped", "--batch_size", "1")
    assert (record["accuracy"], record["batch_size"]) == (whole["accuracy"], 1)


# Benchmarks


def test_rows_of_a_pair_are_drawn_together():
    scores = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    lines = [{"index": index, "pair": str(index // 2), "score": score} for index, score in enumerate(scores)]
    assert evaluation.accuracy_of(lines, seed=0) == bootstrap_mean([1.0, 0.0, 0.5], seed=0).asdict()
    alone = [{"index": line["index"], "score": line["score"]} for line in lines]
    assert evaluation.accuracy_of(alone, seed=0) == bootstrap_mean(scores, seed=0).asdict()


def test_categories_have_accuracies_and_a_mean_that_counts_each_once():
    labels = ["Jigsaw", "Counting", "Jigsaw", "Jigsaw"]
    scores = [1.0, 0.0, 0.0, 1.0]
    lines = [{"index": n, "category": label, "score": scores[n]} for n, label in enumerate(labels)]
    found = evaluation.accuracy_by_category(lines, seed=0)
    assert {name: (group["mean"], group["n"]) for name, group in found["by_category"].items()} == {
        "Counting": (0.0, 1),
        "Jigsaw": (pytest.approx(2 / 3), 3),
    }
    assert found["mean_of_categories"] == pytest.approx(1 / 3)
    assert evaluation.accuracy_by_category([{"index": 0, "score": 1.0}], seed=0) == {}


@pytest.mark.parametrize("score_by", ["generation", "likelihood"])
@pytest.mark.parametrize("name", ["mmvp", "blink"])
def test_a_benchmark_is_evaluated_by_text_and_by_likelihood(name, score_by, checkpoint, tmp_path, capsys):
    options = loader_of(name).write_sample(tmp_path / "data", num_rows=4, seed=0)
    words = ["--dataset", name, "--split", "test", "--dataset_options", json.dumps(options)]
    record = evaluate(checkpoint, tmp_path / "out", *words, "--score_by", score_by)
    lines, printed = lines_of(tmp_path / "out"), capsys.readouterr().out
    rows = load_examples(name, split="test", **options)
    right = [line["answer"] == row["answers"][0] for line, row in zip(lines, rows, strict=True)]
    if name == "mmvp":
        pairs = [right[0] and right[1], right[2] and right[3]]
        assert [line["score"] for line in lines] == [float(pair) for pair in pairs for _ in range(2)]
        assert record["accuracy"] == bootstrap_mean([float(pair) for pair in pairs]).asdict()
        assert record["metric_details"]["question_accuracy"] == sum(right) / 4
        assert "by_category" not in record and "question_accuracy" in printed
    else:
        assert [len(line["images"]) for line in lines] == [1, 1, 2, 2]
        groups = {"Counting": right[:2], "Jigsaw": right[2:]}
        assert {task: group["mean"] for task, group in record["by_category"].items()} == {
            task: sum(group) / 2 for task, group in groups.items()
        }
        assert "mean of the 2 categories" in printed and "Jigsaw: " in printed
