"""Answer a data set with a checkpoint and score it: `python -m mmcoconut.evaluation --model … --dataset …`.

Writes evaluation.json (one record) and predictions.jsonl (one line per row) to `--output_dir`. A stopped evaluation
resumes; `accelerate launch -m mmcoconut.evaluation …` shares the rows among processes.
"""

import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from transformers import set_seed

from mmcoconut.data import without_pictures
from mmcoconut.data.scoring import default_metric, figures_of, score
from mmcoconut.errors import RecipeError, UsageError
from mmcoconut.evaluation.answering import Answerer, image_name, load_checkpoint
from mmcoconut.evaluation.asking import (
    default_folder,
    fit_to,
    join_processes,
    parse_arguments,
    read_rows,
    trained_with,
)
from mmcoconut.progress import progress
from mmcoconut.provenance import peak_memory_mb, provenance
from mmcoconut.records import changed_settings, json_line, read_json, read_lines, write_json, write_lines
from mmcoconut.statistics import Estimate, bootstrap_mean, percent


logger = logging.getLogger("mmcoconut")

SETTINGS_FILE = "evaluation_settings.json"
PREDICTIONS_FILE = "predictions.jsonl"
NEW_PREDICTIONS_FILE = "predictions.jsonl.new"
RECORD_FILE = "evaluation.json"
PART = "predictions.part-{}.jsonl"
# All files of an evaluation, which `overwrite` deletes; its settings, which identify the folder, come last.
OWN_FILES = (RECORD_FILE, PREDICTIONS_FILE, NEW_PREDICTIONS_FILE, PART.format("*"), SETTINGS_FILE)
# Settings that do not change the answers, and may differ when an evaluation resumes.
ABOUT_ONE_LAUNCH = ("output_dir", "overwrite", "recipe")
# Settings that may change when a stopped evaluation resumes with less memory.
MAY_CHANGE = ("batch_size",)


def described(row: Mapping, answerer: Answerer) -> dict:
    """Return the fields of a row that its line in predictions.jsonl repeats."""
    labels = {name: row[name] for name in ("category", "pair") if row.get(name)}
    return {
        "index": row["index"],
        "row_id": row["row_id"],
        "images": [image_name(image) for image in row["images"]],
        "question": row["question"],
        "choices": row["choices"],
        "num_steps": len(row["steps"]),
        "num_latents": answerer.num_latents,
        "gold": row["answers"],
        **labels,
    }


def answered_rows(answerer: Answerer, batch: Sequence[Mapping], score_by: str) -> Iterator[dict]:
    """Yield the lines of predictions.jsonl for a batch, without scores; `seconds` is the batch's time per row."""
    began = time.perf_counter()
    if score_by == "generation":
        answers = answerer.answer(batch)
    else:
        answers = answerer.choose(batch, per_token=score_by == "likelihood_per_token")
    seconds = (time.perf_counter() - began) / len(batch)
    for row, answer in zip(batch, answers):
        yield {**described(row, answerer), **answer, "seconds": round(seconds, 6)}


def read_parts(folder: Path) -> dict[int, dict]:
    """Return all answered rows by index: of a finished evaluation, or of the parts of any number of processes."""
    files = [*folder.glob(PREDICTIONS_FILE), *sorted(folder.glob(PART.format("*")))]
    return {line["index"]: line for file in files for line in read_lines(file)}


def trim(file: Path) -> None:
    """Remove an incomplete last line, so that the next line starts on a line of its own."""
    if file.exists():
        whole = file.read_bytes().rpartition(b"\n")
        file.write_bytes(whole[0] + whole[1])


def check_settings(folder: Path, settings: dict) -> None:
    """Check that the folder is empty or holds parts of an evaluation with the same settings.

    Raises:
        ValueError: another evaluation; names each setting that differs.
    """
    file = folder / SETTINGS_FILE
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty and holds no evaluation. Set another --output_dir.")
        return
    changes = changed_settings(read_json(file), settings, may_change=MAY_CHANGE)
    if changes:
        raise UsageError(
            f"{folder} holds an evaluation with other settings ({changes}). Set --overwrite true to delete it, or "
            "another --output_dir."
        )


def clear(folder: Path) -> None:
    """Delete the files of an evaluation in its folder, and nothing else."""
    for name in OWN_FILES:
        for file in folder.glob(name):
            file.unlink()


def prepare_folder(folder: Path, settings: dict, *, overwrite: bool) -> None:
    """Prepare the folder of this evaluation; the main process writes, the others wait."""
    state = PartialState()
    with state.main_process_first():
        if state.is_main_process:
            if overwrite and (folder / SETTINGS_FILE).exists():
                clear(folder)
            else:
                check_settings(folder, settings)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def answer_all(answerer: Answerer, rows, folder: Path, *, batch_size: int, score_by: str) -> list[dict]:
    """Return the lines of all rows in order; each process answers its share of the rows missing in the folder."""
    state = PartialState()
    done = read_parts(folder)
    state.wait_for_everyone()  # all processes have read before any writes
    missing = [index for index in range(len(rows)) if index not in done]
    if done:
        logger.info("%d of %d rows were answered before", len(done), len(rows))
    mine = missing[state.process_index :: state.num_processes]
    file = folder / PART.format(state.process_index)
    trim(file)
    with file.open("a", encoding="utf-8") as part, progress(total=len(mine), desc="answering") as bar:
        for start in range(0, len(mine), batch_size):
            batch = [{**rows[index], "index": index} for index in mine[start : start + batch_size]]
            for line in answered_rows(answerer, batch, score_by):
                part.write(json_line(line))
            part.flush()
            bar.update(len(batch))
    state.wait_for_everyone()
    done = read_parts(folder)
    state.wait_for_everyone()  # all processes have read before the parts become one file
    return [done[index] for index in range(len(rows))]


def check_references(rows, metric: str) -> None:
    """Raise ValueError for a row that the metric cannot score, before rows are answered."""
    nothing = [""] * len(rows)
    score(metric, nothing, nothing, rows=without_pictures(rows))


def add_scores(lines: list[dict], rows, metric: str) -> dict:
    """Set `score` and `correct` of each line; return the metric's other results."""
    outputs, answers = [line["output"] for line in lines], [line["answer"] for line in lines]
    results = score(metric, outputs, answers, rows=without_pictures(rows))
    for line, value in zip(lines, results.pop("scores"), strict=True):
        line |= {"score": value, "correct": value == 1.0}
    return {key: value for key, value in results.items() if not isinstance(value, list)}


def mean_of(lines: Sequence[Mapping], key: str) -> float:
    return sum(line[key] for line in lines) / len(lines)


def accuracy_of(lines: Sequence[Mapping], seed: int) -> dict:
    """Return mean and interval of the scores; the rows of a pair are resampled together, if all pairs are whole."""
    drawn = {}
    for line in lines:
        drawn.setdefault(line.get("pair", line["index"]), []).append(line["score"])
    if len({len(scores) for scores in drawn.values()}) > 1:
        drawn = {line["index"]: [line["score"]] for line in lines}
    return bootstrap_mean([sum(scores) / len(scores) for scores in drawn.values()], seed=seed).asdict()


def accuracy_by(lines: Sequence[Mapping], key: str, seed: int) -> dict[str, dict]:
    """Return accuracy and number of rows by the value of `key`: the number of gold steps, a measure of difficulty, or
    the category of a benchmark's question."""
    groups = {}
    for line in lines:
        groups.setdefault(line[key], []).append(line)
    return {str(value): {**accuracy_of(group, seed), "n": len(group)} for value, group in sorted(groups.items())}


def accuracy_by_category(lines: Sequence[Mapping], seed: int) -> dict:
    """Return what a benchmark with categories adds to the record: accuracy per category, and their mean."""
    if not all("category" in line for line in lines):
        return {}
    groups = accuracy_by(lines, "category", seed)
    mean = sum(group["mean"] for group in groups.values()) / len(groups)
    return {"by_category": groups, "mean_of_categories": mean}


def record_of(lines: list[dict], details: dict, settings: dict, *, model) -> dict:
    """Return the record of an evaluation."""
    seed, seconds = settings["seed"], sum(line["seconds"] for line in lines)
    return {
        **{key: settings[key] for key in ("model", "revision", "dataset", "dataset_options", "split", "metric")},
        "score_by": settings["score_by"],
        "n": len(lines),
        "accuracy": accuracy_of(lines, seed),
        "metric_details": details,
        "by_num_steps": accuracy_by(lines, "num_steps", seed),
        **accuracy_by_category(lines, seed),
        "generated_tokens": mean_of(lines, "generated_tokens"),
        "num_latents": settings["num_latents"],
        "num_thoughts": mean_of(lines, "num_thoughts"),
        "decoder_passes": mean_of(lines, "decoder_passes"),
        "seconds": round(seconds, 3),
        "seconds_per_answer": round(seconds / len(lines), 6),
        "peak_memory_mb": round(peak_memory_mb(model.device), 1),
        "batch_size": settings["batch_size"],
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": seed,
        "processes": PartialState().num_processes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_with": trained_with(settings["model"]),
        **provenance(model.device),
    }


def write_results(folder: Path, lines: list[dict], record: dict) -> None:
    """Write predictions.jsonl in row order, replacing the parts, and then the record."""
    whole = folder / NEW_PREDICTIONS_FILE
    write_lines(whole, lines)
    whole.replace(folder / PREDICTIONS_FILE)
    for part in folder.glob(PART.format("*")):
        part.unlink()
    write_json(folder / RECORD_FILE, record)


def short_hash(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def hash_of_weights(model) -> str:
    """Return a hash that changes with training: of the first values of every parameter, which is fast."""
    return short_hash(
        *(weight.detach().flatten()[:256].float().cpu().numpy().tobytes() for weight in model.parameters())
    )


def hash_of_rows(rows) -> str:
    """Return a hash of the rows without their pictures."""
    return short_hash(json.dumps(without_pictures(rows)[:]).encode())


def settings_of(arguments, answerer: Answerer, rows) -> dict:
    """Return all settings that the answers depend on; hashes detect changes under the same name."""
    settings = {key: value for key, value in asdict(arguments).items() if key not in ABOUT_ONE_LAUNCH}
    if not answerer.model.config.stop_head:  # then nothing depends on it, and older folders lack it
        del settings["stop_threshold"]
    return {
        **settings,
        "num_latents": answerer.num_latents,
        "metric": arguments.metric or default_metric(arguments.dataset, rows[0]),
        "n": len(rows),
        "weights": hash_of_weights(answerer.model),
        "rows": hash_of_rows(rows),
    }


def finished_record(folder: Path, num_rows: int) -> dict | None:
    """Return the record of a finished evaluation, with the machine and date of its run; None if it is incomplete."""
    file = folder / RECORD_FILE
    if not file.exists() or len(read_parts(folder)) < num_rows:
        return None
    return read_json(file)


def summary(record: dict) -> str:
    """Format the record as a few lines of text."""
    accuracy, metric = record["accuracy"], record["metric"]
    figures = {
        name: value for name, value in figures_of(record["metric_details"]).items() if name not in (metric, "n")
    }
    lines = [
        f"{metric} on {record['n']} rows of {record['dataset']} ({record['split']}): "
        f"{Estimate.of(accuracy)}, 95 % interval in brackets",
        f"{record['num_thoughts']:.3g} thoughts, {record['generated_tokens']:.1f} tokens and "
        f"{record['decoder_passes']:.1f} decoder passes per answer; {record['seconds']:.1f} s, summed over "
        "processes",
    ]
    lines += [f"  {name}: {value:.4g}" for name, value in figures.items()]
    lines += [
        f"  {steps} steps: {percent(group['mean'])} of {group['n']}" for steps, group in record["by_num_steps"].items()
    ]
    if categories := record.get("by_category"):
        lines += [f"  {name}: {percent(group['mean'])} of {group['n']}" for name, group in categories.items()]
        lines.append(f"  mean of the {len(categories)} categories: {percent(record['mean_of_categories'])}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    state = join_processes()
    set_seed(arguments.seed)
    rows = read_rows(arguments)
    model, processor = load_checkpoint(
        arguments.model, revision=arguments.revision, dtype=arguments.dtype, device=state.device
    )
    if arguments.stop_threshold != 0.5 and not model.config.stop_head:
        remedy = f"{arguments.model} has no stop head: remove this key"
        raise RecipeError("command line", [("stop_threshold", arguments.stop_threshold, remedy)])
    answerer = Answerer(
        model,
        processor,
        num_latents=arguments.num_latents,
        max_new_tokens=arguments.max_new_tokens,
        num_beams=arguments.num_beams,
        stop_threshold=arguments.stop_threshold,
    )
    rows = fit_to(answerer, rows, arguments)
    settings = settings_of(arguments, answerer, rows)
    check_references(rows, settings["metric"])
    folder = Path(arguments.output_dir or default_folder(arguments, "evaluation"))
    prepare_folder(folder, settings, overwrite=arguments.overwrite)
    record = finished_record(folder, len(rows))
    finished = record is not None
    if not finished:
        lines = answer_all(answerer, rows, folder, batch_size=arguments.batch_size, score_by=arguments.score_by)
        details = add_scores(lines, rows, settings["metric"])
        record = record_of(lines, details, settings, model=model)
        if state.is_main_process:
            write_results(folder, lines, record)
    if state.is_main_process:
        print(summary(record))
        done = f"written to {folder}: each answer in {PREDICTIONS_FILE}"
        again = "Nothing was answered again. If pictures behind the same paths changed, repeat with --overwrite true."
        print(f"already in {folder}, of {record['date']}. {again}" if finished else done)
    state.wait_for_everyone()
    return record
