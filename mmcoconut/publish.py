"""Publish a finished run: `python -m mmcoconut.publish --model outputs/quickstart --repo_id user/name [--audit …]`.

The card is made from the named folders: the run's recipe and results, and the output of evaluation, compare
and audit. Model, card and pictures are uploaded as one commit; `--dry_run folder` writes them there instead.
"""

import logging
import reprlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_imports
from transformers.hf_argparser import HfArg
from transformers.processing_utils import ProcessorMixin

from mmcoconut.arguments.fields import NAMES, default_of
from mmcoconut.arguments.recipes import read_arguments, read_recipe
from mmcoconut.audit.command import ANSWERS_FILE, CARD_FILE, PICTURES
from mmcoconut.audit.command import RECORD_FILE as AUDIT_FILE
from mmcoconut.errors import RecipeError, run_command
from mmcoconut.evaluation.asking import trained_with
from mmcoconut.evaluation.evaluate import RECORD_FILE as EVALUATION_FILE
from mmcoconut.hub.card import Evidence, model_card, write_card
from mmcoconut.hub.uploads import Repository, copy_model, quiet_requests
from mmcoconut.models import load_model, load_processor, read_config
from mmcoconut.records import RECIPE_FILE, RESULTS_FILE, read_json, read_lines


COMPARE_FILE, COMPARE_PICTURE = "compare.json", "compare.png"
WROTE = {"audit": (AUDIT_FILE, "mmcoconut.audit"), "evaluation": (EVALUATION_FILE, "mmcoconut.evaluation")}
WROTE |= {"compare": (COMPARE_FILE, "train_hf.py --compare")}
# Recipe keys that may differ between compared runs, or that change no result.
NOT_SHARED = ("mode", "precompute_image_features", "image_features_cache", "attn_implementation")
NOT_SHARED += ("checkpointed_passes", "defer_weight_gradients", "log_gradient_cosine")


@dataclass
class PublishArguments:
    """Options of publishing: the model, its repository, and the measurements in its card."""

    model: str | None = HfArg(default=None, help="Folder of a finished run, or one of its stages/stage-s.")
    repo_id: str | None = HfArg(default=None, help="Repository on the Hub, owner/name; created if missing.")
    evaluation: str | None = HfArg(default=None, help="Folder that mmcoconut.evaluation wrote about this model.")
    compare: str | None = HfArg(default=None, help="Folder that train_hf.py --compare wrote about its recipe.")
    audit: str | None = HfArg(default=None, help="Folder that mmcoconut.audit wrote about this model.")
    shown_row: int | None = HfArg(default=None, help="Row of the audit whose picture is shown; default: the first.")
    license: str | None = HfArg(default=None, help="License of the weights, such as mit; default: the recipe's.")
    private: bool | None = HfArg(default=None, help="Make a new repository private; default: the owner's setting.")
    revision: str | None = HfArg(default=None, help="Branch to upload to; default: main.")
    max_shard_size: str | None = HfArg(default=None, help="Maximum size of a file of weights, such as 5GB.")
    message: str = HfArg(default="Upload model, code and card", help="Commit message.")
    dry_run: str | None = HfArg(default=None, help="Write the files to this new folder, without uploading.")


def unfit(model: str | None) -> str | None:
    """Return why a folder is not a model that can be published, with the remedy; None if it is."""
    remedy = "give the output_dir of a finished run, such as outputs/quickstart"
    if model is None or not Path(model).is_dir():
        return f"no such folder: {remedy}"
    folder = Path(model)
    if not (folder / "config.json").is_file():
        return f"it has no config.json: {remedy}"
    if not list(folder.glob("model*.safetensors")):
        return f"it has no model.safetensors: {remedy}"
    code = {f"{name.partition('.')[0]}.py" for name in read_json(folder / "config.json").get("auto_map", {}).values()}
    lacking = sorted(name for name in closure(folder, code) if not (folder / name).is_file())
    if lacking or not code:
        return f"it has no {', '.join(lacking) or 'auto_map in config.json'}: save the model again by train_hf.py"
    return None


def closure(folder: Path, names: set[str]) -> set[str]:
    """Return these files and all modules that they load, as transformers finds them, whether they exist or not."""
    reached = set()
    while names := names - reached:
        reached |= names
        there = [folder / name for name in names if (folder / name).is_file()]
        names = {f"{module}.py" for file in there for module in get_relative_imports(file)}
    return reached


def is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def missing(arguments: PublishArguments) -> Iterator[tuple]:
    """Yield what is missing, as (field, value, remedy)."""
    reason = unfit(arguments.model)
    if reason is not None:
        yield "model", arguments.model, reason
    if arguments.repo_id is None:
        yield "repo_id", None, "name the repository: owner/name"
    elif not is_repo_id(arguments.repo_id):
        yield "repo_id", arguments.repo_id, "no valid name on the Hub: use owner/name, of letters, digits, -, _ and ."
    for field, (file, program) in WROTE.items():
        folder = getattr(arguments, field)
        if folder is not None and not Path(folder, file).is_file():
            yield field, folder, f"it has no {file}: give the folder that {program} wrote"
    if arguments.dry_run is not None and Path(arguments.dry_run).exists():
        yield "dry_run", arguments.dry_run, "it exists already: give a new folder, or delete it"
    if arguments.shown_row is not None and arguments.audit is None:
        yield "shown_row", arguments.shown_row, "the rows belong to an audit: set --audit too"
    elif arguments.shown_row is not None and picture_of(arguments) is None:
        shown = [path.stem.removeprefix("row_") for path in pictures(arguments.audit)]
        yield "shown_row", arguments.shown_row, f"the audit shows row {', '.join(shown) or 'none'}: choose one of them"


def pictures(audit: str) -> list[Path]:
    """Return the pictures of rows with their thoughts that an audit drew."""
    return sorted(Path(audit, PICTURES).glob("row_*.png"), key=lambda path: int(path.stem.removeprefix("row_")))


def picture_of(arguments: PublishArguments) -> Path | None:
    """Return the picture of the selected row; None if the audit drew none."""
    if arguments.audit is None:
        return None
    wanted = arguments.shown_row
    found = [path for path in pictures(arguments.audit) if wanted is None or path.stem == f"row_{wanted}"]
    return found[0] if found else None


def read_evidence(arguments: PublishArguments) -> Evidence:
    """Read all results from the named folders."""
    model = Path(arguments.model)
    recipe, results = model / RECIPE_FILE, model / RESULTS_FILE
    evidence = Evidence(
        recipe=read_recipe(recipe) if recipe.is_file() else {},
        results=read_json(results) if results.is_file() else None,
        **{
            field: read_json(Path(getattr(arguments, field), file))
            for field, (file, _) in WROTE.items()
            if getattr(arguments, field) is not None
        },
    )
    figures, picture = {}, picture_of(arguments)
    if arguments.compare is not None and Path(arguments.compare, COMPARE_PICTURE).is_file():
        figures["modes"] = Path(arguments.compare, COMPARE_PICTURE)
    if arguments.audit is None:
        return replace(evidence, figures=figures)
    audit = Path(arguments.audit)
    evidence = replace(evidence, audit_section=(audit / CARD_FILE).read_text(encoding="utf-8"))
    if picture is None:
        return replace(evidence, figures=figures)
    asked = read_lines(audit / ANSWERS_FILE)[int(picture.stem.removeprefix("row_"))]
    return replace(evidence, asked=asked, figures={**figures, "thoughts": picture})


def of_another_model(record: Mapping, model: str, num_latents: int) -> str | None:
    """Return why an evaluation or audit belongs to another checkpoint; None if nothing contradicts."""
    here, there = trained_with(model), record["trained_with"]
    differing = [key for key in here or {} if there is not None and here[key] != there[key]]
    if differing:
        key = differing[0]
        return (
            f"it belongs to another run, {key} is {there[key]!r} there and {here[key]!r} here: repeat it with this one"
        )
    if record["num_latents"] != num_latents:
        return f"it was made with {record['num_latents']} thoughts, the checkpoint has {num_latents}: repeat it so"
    return None


def of_another_recipe(compare: Mapping, evidence: Evidence) -> str | None:
    """Return why a comparison does not apply to this model; None if nothing contradicts."""
    remedy = "give the comparison of its own recipe"
    there, here = compare["recipe"], evidence.recipe
    varied = compare["modes"][0].get("settings", {})
    for key in [key for names in NAMES[:3] for key in names if key not in {*NOT_SHARED, *varied}] if here else ():
        found = there.get(key, default_of(key)), here.get(key, default_of(key))
        if found[0] != found[1]:
            return f"its runs have {key} = {reprlib.repr(found[0])}, the model {reprlib.repr(found[1])}: {remedy}"
    own = {key: here.get(key, default_of(key)) for key in varied if key not in NOT_SHARED}
    if here and own and not any(own.items() <= record["settings"].items() for record in compare["modes"]):
        return f"none of its variants has {reprlib.repr(own)}, as the model: {remedy}"
    updates = {record["train_steps"] for record in compare["modes"]}
    if evidence.results is not None and evidence.results["train_steps"] not in updates:
        return f"its runs made {updates.pop()} updates, the model {evidence.results['train_steps']}: {remedy}"
    return None


def contradictions(arguments: PublishArguments, evidence: Evidence, num_latents: int) -> Iterator[tuple]:
    """Yield results that belong to something else, as (field, value, remedy)."""
    for field in ("evaluation", "audit"):
        record = getattr(evidence, field)
        reason = None if record is None else of_another_model(record, arguments.model, num_latents)
        if reason is not None:
            yield field, getattr(arguments, field), reason
    reason = None if evidence.compare is None else of_another_recipe(evidence.compare, evidence)
    if reason is not None:
        yield "compare", arguments.compare, reason


def read_all(arguments: PublishArguments) -> tuple[Evidence, PreTrainedConfig, ProcessorMixin]:
    """Return the content of the card.

    Raises:
        RecipeError: all missing files, or else all results that belong to something else.
    """
    problems = [*missing(arguments)]
    if problems:
        raise RecipeError("command line", problems)
    evidence = read_evidence(arguments)
    config, processor = read_config(arguments.model), load_processor(arguments.model)
    problems = [*contradictions(arguments, evidence, processor.num_latents)]
    if problems:
        raise RecipeError("command line", problems)
    return evidence, config, processor


def assemble(folder: Path, arguments: PublishArguments) -> None:
    """Write all files of the revision to a new folder."""
    evidence, config, processor = read_all(arguments)
    copy_model(Path(arguments.model), folder)
    if arguments.max_shard_size is not None:
        for weights in folder.glob("model*.safetensors*"):
            weights.unlink()
        load_model(arguments.model).save_pretrained(folder, max_shard_size=arguments.max_shard_size)
    card = model_card(
        arguments.repo_id,
        evidence,
        config=config,
        processor=processor,
        license=arguments.license or evidence.recipe.get("license"),
    )
    write_card(folder, card, evidence)


def main(argv: list[str] | None = None) -> str:
    """Publish; return the address of the commit, or the folder of a dry run."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    quiet_requests()
    usage = "mmcoconut publish MODEL --repo_id owner/name [--key value ...]"
    arguments = read_arguments(sys.argv[1:] if argv is None else argv, PublishArguments, usage)
    if arguments.dry_run is not None:
        assemble(Path(arguments.dry_run), arguments)
        print(f"written to {arguments.dry_run}, nothing uploaded: read {Path(arguments.dry_run, 'README.md')}")
        return arguments.dry_run
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "revision")
        assemble(folder, arguments)
        repository = Repository(arguments.repo_id, private=arguments.private)
        address = repository.upload(folder, message=arguments.message, branch=arguments.revision)
    print(f"uploaded: {address}")
    return address


if __name__ == "__main__":
    run_command(main)
