"""Answer a data set with a checkpoint and score it: `python -m mmcoconut.evaluation --model … --dataset …`.

Writes evaluation.json (one record) and predictions.jsonl (a line a row) into `--output_dir`. A run that was stopped
goes on where it stopped; `accelerate launch -m mmcoconut.evaluation …` shares the rows among processes.
"""

import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm
from transformers import set_seed
from transformers.hf_argparser import HfArg

from mmcoconut.answering import Answerer, image_name, load_checkpoint
from mmcoconut.arguments import RecipeError, read_arguments, read_recipe
from mmcoconut.data import drop_unreadable, load_examples
from mmcoconut.provenance import peak_memory_mb, provenance
from mmcoconut.scoring import default_metric, score
from mmcoconut.statistics import Estimate, bootstrap_mean, percent


logger = logging.getLogger("mmcoconut")

SETTINGS_FILE = "evaluation_settings.json"
PREDICTIONS_FILE = "predictions.jsonl"
NEW_PREDICTIONS_FILE = "predictions.jsonl.new"
RECORD_FILE = "evaluation.json"
PART = "predictions.part-{}.jsonl"
# All that an evaluation writes, and that `overwrite` deletes; its settings last, by which the folder is known.
OWN_FILES = (RECORD_FILE, PREDICTIONS_FILE, NEW_PREDICTIONS_FILE, PART.format("*"), SETTINGS_FILE)
RECIPE_FILE = "recipe.yaml"
RESULTS_FILE = "results.json"
# How an answer is found: written by `generate`, or the choice that the model thinks likeliest.
SCORE_BY = ("generation", "likelihood", "likelihood_per_token")
CHOICES = {"score_by": SCORE_BY, "dtype": ("auto", "float32", "bfloat16", "float16")}
# What a run's own recipe says where the command does not.
FROM_RECIPE = ("dataset", "dataset_options", "metric", "max_new_tokens", "unreadable_images")
# What does not change the answers, and may differ when an evaluation goes on.
ABOUT_ONE_LAUNCH = ("output_dir", "overwrite", "recipe")
# What may change when a stopped evaluation goes on, for lack of memory.
MAY_CHANGE = ("batch_size",)


@dataclass
class EvaluationArguments:
    """What is evaluated, on what, and how answers are scored."""

    model: str | None = HfArg(default=None, help="Folder or Hub id of a trained checkpoint.")
    revision: str | None = HfArg(default=None, help="Branch, tag or commit of a checkpoint on the Hub.")
    recipe: str | None = HfArg(default=None, help="Recipe that names the data; default: the one inside `model`.")
    dataset: str | None = HfArg(default=None, help="A name in mmcoconut.data.DATASETS.")
    dataset_options: dict | None = HfArg(default=None, help="Passed to the data set: --dataset_options.folder …")
    split: str = HfArg(default="test", help="Split that is answered.")
    max_samples: int | None = HfArg(default=None, help="Answer only so many rows.")
    metric: str | None = HfArg(default=None, help="A folder of metrics/; default: the recipe's, or the data set's.")
    score_by: str = HfArg(default="generation", help="Write answers, or choose the likeliest of a row's choices.")
    num_latents: int | None = HfArg(default=None, help="Thoughts a question; default: the checkpoint's.")
    max_new_tokens: int | None = HfArg(default=None, help="Longest text written; default: the recipe's, or 64.")
    unreadable_images: str | None = HfArg(default=None, help="`error` or `skip`; default: the recipe's, or `error`.")
    batch_size: int = HfArg(default=32, help="Rows answered at once in each process.")
    dtype: str = HfArg(default="auto", help="Of the weights; `auto`: as they were saved.")
    seed: int = HfArg(default=0, help="Of the bootstrap.")
    output_dir: str | None = HfArg(default=None, help="Default: outputs/evaluation/<model>-<dataset>-<split>.")
    overwrite: bool = HfArg(default=False, help="Delete an earlier evaluation in output_dir.")


def described(row: Mapping, answerer: Answerer) -> dict:
    """What a line of predictions.jsonl repeats of its row."""
    return {
        "index": row["index"],
        "row_id": row["row_id"],
        "images": [image_name(image) for image in row["images"]],
        "question": row["question"],
        "choices": row["choices"],
        "num_steps": len(row["steps"]),
        "num_latents": answerer.num_latents,
        "gold": row["answers"],
    }


def answered_rows(answerer: Answerer, batch: Sequence[Mapping], score_by: str) -> Iterator[dict]:
    """The lines of predictions.jsonl for a batch, all but their scores; `seconds` is the batch's time by row."""
    began = time.perf_counter()
    if score_by == "generation":
        answers = answerer.answer(batch)
    else:
        answers = answerer.choose(batch, per_token=score_by == "likelihood_per_token")
    seconds = (time.perf_counter() - began) / len(batch)
    for row, answer in zip(batch, answers):
        yield {**described(row, answerer), **answer, "seconds": round(seconds, 6)}


def read_lines(file: Path) -> list[dict]:
    """The complete lines of a JSON Lines file; a last line that was cut off in writing is left out."""
    # Bytes: a line may end inside a character, and splitlines() also cuts at characters inside a JSON string.
    lines = file.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def read_parts(folder: Path) -> dict[int, dict]:
    """All rows that were answered, by index: of a finished evaluation, and of parts of any number of processes."""
    files = [*folder.glob(PREDICTIONS_FILE), *sorted(folder.glob(PART.format("*")))]
    return {line["index"]: line for file in files for line in read_lines(file)}


def trim(file: Path) -> None:
    """Cut off a last line that was not written to its end, so that the next one starts on a line of its own."""
    if file.exists():
        whole = file.read_bytes().rpartition(b"\n")
        file.write_bytes(whole[0] + whole[1])


def check_settings(folder: Path, settings: dict) -> None:
    """The folder holds nothing, or parts of an evaluation with the same settings.

    Raises:
        ValueError: another evaluation, with each setting that differs.
    """
    file = folder / SETTINGS_FILE
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no evaluation: give another --output_dir.")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(settings))
    keys = [key for key in {**before, **now} if key not in MAY_CHANGE]
    differing = [key for key in keys if before.get(key) != now.get(key)]
    if differing:
        changes = "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in differing)
        raise ValueError(
            f"{folder} holds an evaluation with other settings ({changes}): give --overwrite true to delete it, or "
            "another --output_dir."
        )


def clear(folder: Path) -> None:
    """Delete what an evaluation wrote into its folder, and nothing else."""
    for name in OWN_FILES:
        for file in folder.glob(name):
            file.unlink()


def prepare_folder(folder: Path, settings: dict, *, overwrite: bool) -> None:
    """A folder that belongs to this evaluation; the main process writes, the others wait."""
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
    """The lines of all rows in order; each process answers its share of those that are missing in the folder."""
    state = PartialState()
    done = read_parts(folder)
    state.wait_for_everyone()  # everyone has read before anyone writes
    missing = [index for index in range(len(rows)) if index not in done]
    if done:
        logger.info("%d of %d rows were answered before", len(done), len(rows))
    mine = missing[state.process_index :: state.num_processes]
    file = folder / PART.format(state.process_index)
    trim(file)
    with file.open("a", encoding="utf-8") as part:
        for start in tqdm(range(0, len(mine), batch_size), unit="batch", disable=not state.is_main_process):
            batch = [{**rows[index], "index": index} for index in mine[start : start + batch_size]]
            for line in answered_rows(answerer, batch, score_by):
                part.write(json.dumps(line, ensure_ascii=False) + "\n")
            part.flush()
    state.wait_for_everyone()
    done = read_parts(folder)
    return [done[index] for index in range(len(rows))]


def check_references(rows, metric: str) -> None:
    """Raise ValueError for a row that the metric cannot score: before the rows are answered, not after."""
    nothing = [""] * len(rows)
    score(metric, nothing, nothing, rows=rows.remove_columns("images"))


def add_scores(lines: list[dict], rows, metric: str) -> dict:
    """Set `score` and `correct` of each line; the metric's other results."""
    outputs, answers = [line["output"] for line in lines], [line["answer"] for line in lines]
    results = score(metric, outputs, answers, rows=rows.remove_columns("images"))
    for line, value in zip(lines, results.pop("scores"), strict=True):
        line |= {"score": value, "correct": value == 1.0}
    return {key: value for key, value in results.items() if not isinstance(value, list)}


def mean_of(lines: Sequence[Mapping], key: str) -> float:
    return sum(line[key] for line in lines) / len(lines)


def accuracy_of(lines: Sequence[Mapping], seed: int) -> dict:
    return bootstrap_mean([line["score"] for line in lines], seed=seed).asdict()


def accuracy_by_steps(lines: Sequence[Mapping], seed: int) -> dict[str, dict]:
    """Accuracy and number of the rows with equally many gold steps, which is how hard they are."""
    groups = {}
    for line in lines:
        groups.setdefault(line["num_steps"], []).append(line)
    return {str(steps): {**accuracy_of(group, seed), "n": len(group)} for steps, group in sorted(groups.items())}


def trained_with(model: str) -> dict | None:
    """How the checkpoint was trained, from the results.json beside its weights; None where there is none."""
    file = Path(model, RESULTS_FILE)
    if not file.exists():
        return None
    results = json.loads(file.read_text(encoding="utf-8"))
    kept = ("mode", "seed", "train_steps", "train_seconds", "command", "commit", "versions", "machine")
    return {key: results.get(key) for key in kept}


def record_of(lines: list[dict], details: dict, settings: dict, *, model) -> dict:
    """The one record of an evaluation."""
    seed, seconds = settings["seed"], sum(line["seconds"] for line in lines)
    return {
        **{key: settings[key] for key in ("model", "revision", "dataset", "dataset_options", "split", "metric")},
        "score_by": settings["score_by"],
        "n": len(lines),
        "accuracy": accuracy_of(lines, seed),
        "metric_details": details,
        "by_num_steps": accuracy_by_steps(lines, seed),
        "generated_tokens": mean_of(lines, "generated_tokens"),
        "num_latents": settings["num_latents"],
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
    """predictions.jsonl in the rows' order in the place of the parts, and then the record."""
    whole = folder / NEW_PREDICTIONS_FILE
    whole.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    whole.replace(folder / PREDICTIONS_FILE)
    for part in folder.glob(PART.format("*")):
        part.unlink()
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def parse_arguments(argv: list[str], cls=EvaluationArguments):
    """Arguments of the command line, completed from the recipe named there or found beside the weights.

    Raises:
        RecipeError: every argument that is unknown, of the wrong type or missing.
    """
    arguments = read_arguments(argv, cls, f"python -m {cls.__module__} --model … --dataset … [--key value ...]")
    problems = [
        (name, getattr(arguments, name), f"choose one of {', '.join(choices)}")
        for name, choices in CHOICES.items()
        if getattr(arguments, name, None) not in (None, *choices)
    ]
    if arguments.model is None:
        problems.append(("model", None, "name a checkpoint: its folder or Hub id"))
    if problems:
        raise RecipeError("command line", problems)
    beside = Path(arguments.model, RECIPE_FILE)
    if arguments.recipe is None and beside.is_file():
        arguments.recipe = str(beside)
    recipe = read_recipe(arguments.recipe) if arguments.recipe is not None else {}
    if arguments.dataset not in (None, recipe.get("dataset")):
        recipe = {}  # another data set has other options
    for name in FROM_RECIPE:
        given, default = getattr(arguments, name), recipe.get(name)
        if name == "dataset_options":
            setattr(arguments, name, {**(default or {}), **(given or {})})
        elif given is None:
            setattr(arguments, name, default)
    if arguments.dataset is None:
        raise RecipeError("command line", [("dataset", None, "name a data set, or a --recipe that does")])
    arguments.max_new_tokens = arguments.max_new_tokens or 64
    return arguments


def read_rows(arguments):
    """The rows to be answered; those left out by `unreadable_images: skip` are named in the log."""
    with PartialState().main_process_first():
        rows = load_examples(arguments.dataset, split=arguments.split, **arguments.dataset_options)
    count = len(rows) if arguments.max_samples is None else min(arguments.max_samples, len(rows))
    rows = rows.select(range(count))
    if arguments.unreadable_images == "skip":
        rows, skipped = drop_unreadable(rows)
        for message in skipped:
            logger.warning("left out: %s", message)
    return rows


def default_folder(arguments, room: str) -> Path:
    """outputs/<room>/, and in it the checkpoint's path in one word, the data set and the split."""
    model = arguments.model.strip("/.").replace("/", "-")
    return Path("outputs", room, f"{model}-{arguments.dataset}-{arguments.split}")


def short_hash(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def hash_of_weights(model) -> str:
    """Changes when the model is trained: of the first values of every parameter, which is quick for large ones too."""
    return short_hash(
        *(weight.detach().flatten()[:256].float().cpu().numpy().tobytes() for weight in model.parameters())
    )


def hash_of_rows(rows) -> str:
    """Changes with what is asked: of all but the pictures."""
    return short_hash(json.dumps(rows.remove_columns("images")[:]).encode())


def settings_of(arguments, answerer: Answerer, rows) -> dict:
    """All that the answers depend on; folders and files may have changed under the same name since."""
    settings = {key: value for key, value in asdict(arguments).items() if key not in ABOUT_ONE_LAUNCH}
    return {
        **settings,
        "num_latents": answerer.num_latents,
        "metric": arguments.metric or default_metric(arguments.dataset, rows[0]),
        "n": len(rows),
        "weights": hash_of_weights(answerer.model),
        "rows": hash_of_rows(rows),
    }


def finished_record(folder: Path, num_rows: int) -> dict | None:
    """The record of an evaluation that is complete, with the machine and the date of the time when it ran."""
    file = folder / RECORD_FILE
    if not file.exists() or len(read_parts(folder)) < num_rows:
        return None
    return json.loads(file.read_text(encoding="utf-8"))


def summary(record: dict) -> str:
    """The record as a few lines for the reader."""
    accuracy = record["accuracy"]
    lines = [
        f"{record['metric']} on {record['n']} rows of {record['dataset']} ({record['split']}): "
        f"{Estimate(**accuracy)}, in brackets the 95 % interval",
        f"{record['num_latents']} thoughts, {record['generated_tokens']:.1f} tokens and "
        f"{record['decoder_passes']:.1f} decoder passes an answer; {record['seconds']:.1f} s in all",
    ]
    lines += [
        f"  {steps} steps: {percent(group['mean'])} of {group['n']}" for steps, group in record["by_num_steps"].items()
    ]
    return "\n".join(lines)


def join_processes() -> PartialState:
    """The processes of `accelerate launch`; on a CPU, unless told, each would take itself for the only one."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def main(argv: list[str] | None = None) -> dict:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    state = join_processes()
    set_seed(arguments.seed)
    rows = read_rows(arguments)
    model, processor = load_checkpoint(
        arguments.model, revision=arguments.revision, dtype=arguments.dtype, device=state.device
    )
    answerer = Answerer(model, processor, num_latents=arguments.num_latents, max_new_tokens=arguments.max_new_tokens)
    settings = settings_of(arguments, answerer, rows)
    check_references(rows, settings["metric"])
    folder = Path(arguments.output_dir or default_folder(arguments, "evaluation"))
    prepare_folder(folder, settings, overwrite=arguments.overwrite)
    record = finished_record(folder, len(rows))
    if record is None:
        lines = answer_all(answerer, rows, folder, batch_size=arguments.batch_size, score_by=arguments.score_by)
        details = add_scores(lines, rows, settings["metric"])
        record = record_of(lines, details, settings, model=model)
        if state.is_main_process:
            write_results(folder, lines, record)
    if state.is_main_process:
        print(summary(record))
        print(f"written to {folder}")
    state.wait_for_everyone()
    return record


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
