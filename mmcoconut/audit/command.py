"""Do the thoughts matter, and what do they hold? `python -m mmcoconut.audit --model … --dataset … [--split …]`.

Re-answers the questions with swapped or ablated thoughts (mmcoconut/audit/interventions.py) and with only the thoughts
visible (mmcoconut/audit/necessity.py), decodes and probes the thoughts (mmcoconut/audit/thoughts.py), and writes
audit.json, answers.jsonl, report.html, card.md and pictures/ into `--output_dir`.

Shapes: n rows, N thoughts per row, D hidden.
"""

import logging
import random
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from transformers import set_seed
from transformers.hf_argparser import HfArg

from mmcoconut.arguments.typed import did_you_mean
from mmcoconut.audit.controls import Control, beside, read_controls
from mmcoconut.audit.image_grids import maps_of
from mmcoconut.audit.interventions import (
    Outcome,
    Study,
    counts_to_try,
    images_key,
    knock_outs,
    other_counts,
    other_image,
    other_question,
    replacements,
    shuffled,
)
from mmcoconut.audit.necessity import no_image, only_thoughts, own_embedding
from mmcoconut.audit.report import card_of, interventions_figure, report_of
from mmcoconut.audit.step_reader import StepReader
from mmcoconut.audit.thought_pictures import geometry_figure, probe_figure, side_by_side
from mmcoconut.audit.thoughts import (
    Readings,
    geometry,
    lens_text,
    linear_probe,
    load_extra,
    probe_targets,
    read_thoughts,
)
from mmcoconut.audit.verdict import MARGIN, image_finding, necessity_of, positions_of, verdict_of
from mmcoconut.data import question_text
from mmcoconut.data.scoring import OF_SEVERAL_ROWS, default_metric
from mmcoconut.errors import RecipeError, UsageError
from mmcoconut.evaluation.answering import Answerer, load_checkpoint
from mmcoconut.evaluation.asking import (
    EvaluationArguments,
    default_folder,
    fit_to,
    join_processes,
    parse_arguments,
    read_rows,
    trained_with,
)
from mmcoconut.progress import progress
from mmcoconut.provenance import provenance
from mmcoconut.records import write_json, write_lines
from mmcoconut.statistics import bootstrap_mean


logger = logging.getLogger("mmcoconut")

RECORD_FILE = "audit.json"
ANSWERS_FILE = "answers.jsonl"
REPORT_FILE = "report.html"
CARD_FILE = "card.md"
PICTURES = "pictures"
# Interventions by part of the audit; each returns an outcome, several outcomes, or the reason why there is none.
INTERVENTIONS: dict[str, tuple[Callable[[Study], Outcome | list[Outcome] | str], ...]] = {
    "verdict": (shuffled,),
    "necessity": (only_thoughts, no_image),
    "positions": (own_embedding,),
    "interventions": (other_image, other_question, replacements, knock_outs, other_counts),
}
# Parts that can be left out; `report` is the page with its pictures and the decoded thoughts of single rows.
PARTS = (*INTERVENTIONS, "geometry", "probe", "report")
OWN_NAMES = {RECORD_FILE, ANSWERS_FILE, REPORT_FILE, CARD_FILE, PICTURES}


@dataclass
class AuditArguments(EvaluationArguments):
    """Arguments of the audit: the checkpoint, the rows, and the parts of the report."""

    max_samples: int | None = HfArg(
        default=500, help="Number of rows, drawn at random; each is answered about thirty times."
    )
    output_dir: str | None = HfArg(default=None, help="Default: outputs/audit/<model>-<dataset>-<split>.")
    overwrite: bool = HfArg(default=False, help="Delete an earlier audit in output_dir.")
    stop_threshold: float = HfArg(default=1.0, help="Do not change: an audit covers all thoughts, without early exit.")
    parts: str | list[str] | None = HfArg(default=None, help=f"Only these of {','.join(PARTS)}; default: all.")
    controls: list[str] | None = HfArg(default=None, help="Folders of matched runs of mode markers and pause.")
    margin: float = HfArg(default=MARGIN, help="Smallest difference in accuracy that counts as a change.")
    num_shown: int = HfArg(default=4, help="Rows whose thoughts are drawn and decoded one by one.")
    top_k: int = HfArg(default=5, help="Tokens listed per thought and layer.")

    @property
    def asked_parts(self) -> list[str]:
        """Return the names of the parts, each once, in the order of PARTS; unknown names last."""
        names = self.parts.split(",") if isinstance(self.parts, str) else self.parts or PARTS
        asked = dict.fromkeys(name.strip() for name in names)
        return [part for part in PARTS if part in asked] + [name for name in asked if name not in PARTS]


@dataclass
class Shown:
    """One row of the report: question, answer, what its thoughts decode to, and what they attend to.

    lens: for each of the N thoughts and the text after them, and each layer, the most likely tokens with their
    probabilities. strip: the heat maps; None if no_map says why. steps: the steps that the run's step decoder writes
    from the thoughts; None if the run has none.
    """

    row_id: str
    question: str
    gold: list[str]
    answer: str
    lens: list[list[list[tuple[str, float]]]]
    image_share: list[float] | None
    strip: Image.Image | None
    no_map: str | None
    steps: list[str] | None


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Check that the folder is empty or, with `overwrite`, holds only an earlier audit.

    Raises:
        ValueError: it holds something else.
    """
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if found and not overwrite:
        raise UsageError(
            f"{folder} is not empty: give --overwrite true to replace an earlier audit, or another --output_dir."
        )
    if found and not found & OWN_NAMES:
        raise UsageError(f"{folder} holds {sorted(found)[0]}, which is not of an audit: give another --output_dir.")


def clear(folder: Path) -> None:
    """Delete the files that an audit wrote into its folder, and nothing else."""
    for name in OWN_NAMES - {PICTURES}:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / PICTURES, ignore_errors=True)


def draw_rows(rows, count: int | None, seed: int):
    """Return `count` random rows, in their order: the first rows may all be of one kind."""
    if count is None or count >= len(rows):
        return rows
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), count)))


def decoded(readings: Readings, tokenizer, row: int) -> list[list[list[tuple[str, float]]]]:
    """Return one row's logit lens: per state and layer, the most likely tokens as text with probabilities."""
    tokens, probabilities = readings.tokens[row].tolist(), readings.probabilities[row].tolist()
    return [
        [[(tokenizer.decode([token]), round(p, 4)) for token, p in zip(*layer)] for layer in zip(*state)]
        for state in zip(tokens, probabilities)
    ]


def show(study: Study, count: int, top_k: int, reader: StepReader | None = None) -> list[Shown]:
    """Return the first rows of the study, each read alone, also by a step decoder if there is one."""
    answerer, shown = study.answerer, []
    model, tokenizer = answerer.model, answerer.processor.tokenizer
    for index, row in enumerate(study.rows[:count]):
        inputs = answerer.inputs([row])
        readings = read_thoughts(model, inputs, top_k=top_k)
        reads = lens_text(readings, tokenizer, 0)
        captions = [f"thought {j + 1} · reads: {text}" for j, text in enumerate(reads[: answerer.num_latents])]
        has_images = len(row["images"]) > 0
        maps, no_map = maps_of(model, answerer.processor, row, inputs, readings)
        shown.append(
            Shown(
                row_id=row["row_id"],
                question=question_text(row),
                gold=row["answers"],
                answer=study.untouched.texts[index],
                lens=decoded(readings, tokenizer, 0),
                image_share=readings.image_share(0).tolist() if has_images else None,
                strip=None if maps is None else side_by_side(maps, captions),
                no_map=no_map if has_images else None,
                steps=None if reader is None else reader.read(readings.thoughts[0], tokenizer),
            )
        )
    return shown


def probe(study: Study) -> dict:
    """Probe which written step each thought encodes; rows of one picture (or question) share a half of the split."""
    names, targets = probe_targets(study.rows)
    groups = [images_key(row) or question_text(row) for row in study.rows]
    return linear_probe(study.untouched.thoughts, targets, names=names, groups=groups, seed=study.seed)


def asked_in(parts: Collection[str]) -> list[Callable]:
    """Return the interventions of these parts of an audit."""
    return [ask for part, asks in INTERVENTIONS.items() if part in parts for ask in asks]


def runs_of(ask: Callable, num_latents: int) -> int:
    """Return about how often an intervention answers all rows, for a progress bar."""
    several = {"other_image": 2, "other_question": 2, "replacements": 3, "knock_outs": num_latents}
    several["other_counts"] = num_latents + len(counts_to_try(num_latents, 2 * num_latents))
    return several.get(ask.__name__, 1)


def intervene(study: Study, parts: Collection[str] = PARTS) -> tuple[dict[str, Outcome], list[str]]:
    """Run every intervention of these parts; return outcomes by name, and reasons why some were not run."""
    outcomes, reasons = [], []
    for ask in asked_in(parts):
        logger.info("interventions: %s", ask.__name__.replace("_", " "))
        before = 0 if study.bar is None else study.bar.n
        result = ask(study)
        if study.bar is not None:  # correct the estimated number of runs
            study.bar.total += study.bar.n - before - runs_of(ask, study.answerer.num_latents) * len(study.rows)
            study.bar.refresh()
        if isinstance(result, str):
            reasons.append(result)
        else:
            outcomes += result if isinstance(result, list) else [result]
    return {outcome.name: outcome for outcome in outcomes}, reasons


def findings(
    study: Study, outcomes: Mapping[str, Outcome], *, arguments, not_run: list[str], controls: Sequence[Control]
) -> dict:
    """Return the findings for audit.json of the requested parts, by name."""
    embeddings, margin = study.answerer.model.get_input_embeddings(), arguments.margin

    def necessity() -> dict:
        found = necessity_of(study, outcomes, not_run, margin=margin)
        return {**asdict(found), "no_image": asdict(image_finding(study, outcomes, not_run, margin=margin))}

    def positions() -> dict:
        compared = list(beside(controls, study.untouched.scores, seed=study.seed))
        return asdict(positions_of(study, outcomes, compared, margin=margin))

    makers = {
        "verdict": lambda: asdict(verdict_of(study, outcomes, margin=margin)),
        "necessity": necessity,
        "positions": positions,
        "geometry": lambda: geometry(
            study.untouched.thoughts, embeddings.weight * getattr(embeddings, "embed_scale", 1.0)
        ),
        "probe": lambda: probe(study),
    }
    return {part: make() for part, make in makers.items() if part in arguments.asked_parts}


def record_of(study: Study, outcomes: Mapping[str, Outcome], *, arguments, **found) -> dict:
    """Return the content of audit.json; `found` as in `findings`."""
    model, untouched = study.answerer.model, study.untouched
    return {
        **{key: getattr(arguments, key) for key in ("model", "revision", "dataset", "dataset_options", "split")},
        "metric": study.metric,
        "n": len(study.rows),
        "num_latents": study.answerer.num_latents,
        "parts": arguments.asked_parts,
        "accuracy": bootstrap_mean(untouched.scores, seed=study.seed).asdict(),
        "generated_tokens": untouched.generated_tokens,
        "margin": arguments.margin,
        **findings(study, outcomes, arguments=arguments, **found),
        "interventions": {name: outcome.asdict() for name, outcome in outcomes.items()},
        "not_run": found["not_run"],
        "seed": study.seed,
        "batch_size": study.batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "trained_with": trained_with(arguments.model),
        **provenance(model.device),
    }


def pictures_of(record: dict, outcomes: Mapping[str, Outcome], shown: Sequence[Shown]) -> dict[str, Image.Image]:
    """Return every picture of the report by name."""
    pictures = {}
    if outcomes:
        pictures["interventions"] = interventions_figure(outcomes, record["accuracy"], num_rows=record["n"])
    if "geometry" in record:
        pictures["geometry"] = geometry_figure(record["geometry"])
    if "probe" in record and any(reason is None for reason in record["probe"]["reasons"]):
        pictures["probe"] = probe_figure(record["probe"])
    strips = {f"row_{index}": row.strip for index, row in enumerate(shown) if row.strip is not None}
    return {**pictures, **strips}


def answer_lines(study: Study, outcomes: Mapping[str, Outcome]) -> list[dict]:
    """Return the answers to each row, untouched and under every intervention."""
    return [
        {
            "row_id": row["row_id"],
            "question": question_text(row),
            "gold": row["answers"],
            "untouched": text,
            **{name: outcome.texts[index] for name, outcome in outcomes.items()},
        }
        for index, (row, text) in enumerate(zip(study.rows, study.untouched.texts))
    ]


def write(folder: Path, record: dict, *, pictures: Mapping[str, Image.Image], lines: list[dict], shown: list[Shown]):
    """Write all files of the audit and delete an earlier one's; page and pictures only with the part `report`."""
    clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / ANSWERS_FILE, lines)
    if "report" in record["parts"]:
        (folder / PICTURES).mkdir()
        for name, picture in pictures.items():
            picture.save(folder / PICTURES / f"{name}.png")
        (folder / REPORT_FILE).write_text(report_of(record, pictures, shown), encoding="utf-8")
    (folder / CARD_FILE).write_text(card_of(record), encoding="utf-8")
    write_json(folder / RECORD_FILE, record)


def check_start(arguments, state) -> None:
    """Raise early for whatever would stop the audit later."""
    parts = arguments.asked_parts
    problems = [
        ("parts", part, f"choose from {', '.join(PARTS)}{did_you_mean(part, PARTS)}")
        for part in parts
        if part not in PARTS
    ]
    if arguments.score_by != "generation":
        problems.append(("score_by", arguments.score_by, "an audit reads what is written"))
    if arguments.stop_threshold != 1:
        remedy = "interventions replace all thoughts, so none is left out: remove this key"
        problems.append(("stop_threshold", arguments.stop_threshold, remedy))
    if arguments.controls and "positions" not in parts:
        problems.append(
            ("controls", arguments.controls, "controls need the part positions, which `parts` leaves out: add it")
        )
    if problems:
        raise RecipeError("command line", problems)
    if state.num_processes > 1:
        raise UsageError(
            f"An audit runs in one process, but {state.num_processes} were started: start it without a launcher."
        )
    for part, name in (("report", "matplotlib"), ("probe", "sklearn")):
        if part in parts:
            load_extra(name)


def controls_of(arguments, rows, metric: str) -> list[Control]:
    """Return the matched controls named in the command; read before any row is answered."""
    names = ("dataset", "dataset_options", "split", "score_by")
    asked = {**{name: getattr(arguments, name) for name in names}, "metric": metric}
    return read_controls(arguments.controls or (), rows, asked, trained_with(arguments.model))


def main(argv: list[str] | None = None) -> dict:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv, AuditArguments, "audit")
    state = join_processes()
    check_start(arguments, state)
    folder = Path(arguments.output_dir or default_folder(arguments, "audit"))
    check_folder(folder, overwrite=arguments.overwrite)
    set_seed(arguments.seed)
    count, arguments.max_samples = arguments.max_samples, None
    rows = draw_rows(read_rows(arguments), count, arguments.seed)
    model, processor = load_checkpoint(
        arguments.model, revision=arguments.revision, dtype=arguments.dtype, device=state.device
    )
    # Without early exit: the audit asks about all thoughts.
    counts = {"num_latents": arguments.num_latents, "max_new_tokens": arguments.max_new_tokens}
    answerer = Answerer(model, processor, stop_threshold=None, **counts)
    rows = fit_to(answerer, rows, arguments)
    metric = arguments.metric or default_metric(arguments.dataset, rows[0])
    if metric in OF_SEVERAL_ROWS:
        remedy = "it scores rows together, and an audit changes and draws them one by one; use exact_match"
        raise RecipeError("command line", [("metric", metric, remedy)])
    controls = controls_of(arguments, rows, metric)
    logger.info("answering %d rows untouched", len(rows))
    num_runs = 1 + sum(runs_of(ask, answerer.num_latents) for ask in asked_in(arguments.asked_parts))
    reports = "report" in arguments.asked_parts
    with progress(total=num_runs * len(rows), desc="audit", unit="answers") as bar:
        options = {"metric": metric, "batch_size": arguments.batch_size, "seed": arguments.seed}
        study = Study(answerer, rows, **options, bar=bar)
        reader = StepReader.beside(arguments.model)
        shown = show(study, arguments.num_shown, arguments.top_k, reader) if reports else []
        outcomes, not_run = intervene(study, arguments.asked_parts)
    record = record_of(study, outcomes, arguments=arguments, not_run=not_run, controls=controls)
    pictures = pictures_of(record, outcomes, shown) if reports else {}
    write(folder, record, pictures=pictures, lines=answer_lines(study, outcomes), shown=shown)
    print(card_of(record))
    print(f"written to {folder}: open {folder / (REPORT_FILE if reports else RECORD_FILE)}")
    return record
