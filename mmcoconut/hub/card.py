"""Write a model card, README.md, from measurements and model_card.md. Anything not measured is left out."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

import mmcoconut
from mmcoconut.arguments.choices import OF_REWARDS, REWARDED
from mmcoconut.configuration_mmcoconut import MMCoconutConfig
from mmcoconut.records import markdown_table
from mmcoconut.statistics import Estimate, percent
from mmcoconut.tables import intervals, main_table, stage_table


TEMPLATE = "model_card.md"
CARD = "README.md"
EVAL_RESULTS = ".eval_results"
PIPELINE, TEXT_PIPELINE = "image-text-to-text", "text-generation"
TAGS = ("mmcoconut", "coconut", "latent-reasoning")
# Recipe keys in the card.
SETTINGS = (
    "model",
    "objective",
    "rewards",
    "rl",
    "thought_noise",
    "stop_head",
    "mode",
    "c_thought",
    "max_latent_stage",
    "epochs_per_stage",
    "uniform_prob",
    "pad_latent_to_max",
    "markers",
)
SETTINGS += (
    "thought_norm",
    "thought_schedule",
    "jacobi_iterations",
    "answer_sees",
    "bptt_thoughts",
    "reset_optimizer",
    "freeze",
    "lora",
)
SETTINGS += (
    "align_weight",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)
SETTINGS += ("learning_rate", "lr_scheduler_type", "max_train_samples")
STARTS = ("model", "vlm", "vision_model", "text_model")


@dataclass(frozen=True)
class Evidence:
    """Measurements of a model; None if not measured.

    recipe, results, evaluation, compare, audit: recipe.yaml, results.json, evaluation.json, compare.json, audit.json.
    audit_section: the audit's card.md. asked: the row of answers.jsonl whose thoughts are shown.
    figures: pictures by content, `thoughts` and `modes`.
    """

    recipe: Mapping = field(default_factory=dict)
    results: Mapping | None = None
    evaluation: Mapping | None = None
    compare: Mapping | None = None
    audit: Mapping | None = None
    audit_section: str | None = None
    asked: Mapping | None = None
    figures: Mapping[str, Path] = field(default_factory=dict)


def template() -> str:
    """Return the text of model_card.md: the repository's, or the installed package's."""
    files = (Path(mmcoconut.__path__[-1], TEMPLATE), Path(__file__).with_name(TEMPLATE))
    return next(file for file in files if file.is_file()).read_text(encoding="utf-8")


def steps_table(evaluation: Mapping) -> str:
    """Return the accuracy by written steps per row, from evaluation.json."""
    groups = evaluation["by_num_steps"].items()
    return markdown_table(
        ["written steps of a row", "accuracy", "n"],
        [[steps, str(Estimate.of(group)), str(group["n"])] for steps, group in groups],
    )


def hub_id(name) -> str | None:
    """Return a name `owner/name` that is not a local folder; otherwise None."""
    is_id = isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not Path(name).exists()
    return name if is_id else None


def base_models(recipe: Mapping) -> list[str]:
    """Return the Hub ids of the models that training started from."""
    return list(dict.fromkeys(name for key in STARTS if (name := hub_id(recipe.get(key)))))


def hub_dataset(recipe: Mapping) -> str | None:
    """Return the Hub id of the data if it was loaded from the Hub."""
    return hub_id((recipe.get("dataset_options") or {}).get("path"))


def measurements(evidence: Evidence) -> list[tuple[str, str, float]]:
    """Return (split, metric, mean score) of all measurements; an evaluation replaces the test during training."""
    results, evaluation, found = evidence.results, evidence.evaluation, {}
    if results is not None and results["stages"]:
        found[results["split"], results["metric"]] = results["stages"][-1]["accuracy"]
    if results is not None and results.get("test"):
        found[evidence.recipe.get("test_split") or "test", results["metric"]] = results["test"]["test_accuracy"]
    if evaluation is not None:
        found[evaluation["split"], evaluation["metric"]] = evaluation["accuracy"]["mean"]
    return [(*key, value) for key, value in found.items()]


def sees_pictures(config) -> bool:
    """Return True if a checkpoint was made for pictures: a text-only model has a tower with a single patch."""
    vision = getattr(config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    return size is None or size != patch  # Qwen2-VL's and others read pictures of any size


def model_index(evidence: Evidence, task: str) -> list[EvalResult]:
    """Return the measurements in the format of the card's metadata."""
    name = dataset_name(evidence)
    if name is None:
        return []
    return [
        EvalResult(
            task_type=task,
            dataset_type=hub_dataset(evidence.recipe) or name,
            dataset_name=name,
            dataset_split=split,
            metric_type=metric,
            metric_value=value,
        )
        for split, metric, value in measurements(evidence)
    ]


def eval_entries(evidence: Evidence) -> list[EvalResultEntry]:
    """Return the measurements for `.eval_results`, which the Hub shows with the data set; only for data on the Hub."""
    dataset = hub_dataset(evidence.recipe)
    if dataset is None:
        return []
    task = (evidence.recipe.get("dataset_options") or {}).get("config") or "default"
    return [
        EvalResultEntry(dataset_id=dataset, task_id=task, value=value, notes=f"{metric} on the split {split}")
        for split, metric, value in measurements(evidence)
    ]


def dataset_name(evidence: Evidence) -> str | None:
    """Return the data set that the model was trained on, or else evaluated on."""
    return evidence.recipe.get("dataset") or (evidence.evaluation or evidence.audit or {}).get("dataset")


def card_data(title: str, evidence: Evidence, license: str | None, task: str) -> ModelCardData:
    """Return the card's metadata."""
    results, dataset = model_index(evidence, task), hub_dataset(evidence.recipe)
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        base_model=base_models(evidence.recipe) or None,
        datasets=[dataset] if dataset else None,
        license=license,
        tags=[*TAGS],
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=title,
        eval_results=results or None,
    )


def layout(processor, pictures: bool) -> str:
    """Return a prompt as the chat template renders it, runs of placeholders written as `×n`."""
    question = [{"type": "image"}] * pictures + [{"type": "text", "text": "Your question?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    of_an_image = getattr(processor, "image_seq_length", None) or "n"  # or it depends on the picture's size
    text = text.replace(processor.image_token, f"{processor.image_token}×{of_an_image}")
    return re.sub(r"(<\|latent\|>)+", f"<|latent|>×{processor.num_latents}", text)


def limits(evidence: Evidence, mode: str | None, num_latents: int, *, stops: bool) -> list[str]:
    """Return the limitations of the measurements; stops: True if rows stop thinking by themselves."""
    name = dataset_name(evidence)
    seeds = len(evidence.compare["seeds"]) if evidence.compare else 0
    thinks = mode == "coconut" and num_latents > 0
    often = times(num_latents, stops=stops)
    possible = {
        f"This run trained it on `{name}` only; other pictures and questions were not tested.": name is not None,
        "Its answers were not evaluated.": not measurements(evidence),
        f"It thinks {often} per question; with another `num_latents` it is a model that was not measured "
        "here.": thinks,
        "No control was trained: whether the thoughts cause its accuracy is not known.": thinks and not seeds,
        "One seed per control: other seeds may differ by more than the intervals.": seeds == 1,
        "It was not audited: whether its answers depend on its thoughts is not known.": thinks
        and evidence.audit is None,
        "Loading it with thoughts runs the code in this repository: read it, and pin a `revision`.": True,
    }
    return [limit for limit, holds in possible.items() if holds]


def times(number: int, *, stops: bool = False) -> str:
    """Return how often a model thinks before the answer; an upper limit if rows stop by themselves.

    >>> times(1), times(7), times(7, stops=True)
    ('once', '7 times', 'up to 7 times')
    """
    return ("up to " if stops else "") + ("once" if number == 1 else f"{number} times")


def shown(value) -> str:
    """Format a setting for a table cell."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def without_parents(name: str) -> str:
    """Return the last part of an absolute path, whose folders are of no use to others; other names unchanged.

    >>> without_parents("/data/outputs/cot"), without_parents("openai-community/gpt2")
    ('cot', 'openai-community/gpt2')
    """
    return Path(name).name if Path(name).is_absolute() else name


def settings_of(recipe: Mapping) -> dict[str, str]:
    """Return the recipe settings of a card; those of rewards only with rewards."""
    rewarded = recipe.get("objective") in REWARDED
    keys = [key for key in SETTINGS if rewarded or key not in OF_REWARDS]
    found = {key: shown(recipe[key]) for key in keys if recipe.get(key) not in (None, [], {})}
    return {key: without_parents(value) if key in STARTS else value for key, value in found.items()}


def parts(evidence: Evidence) -> dict:
    """Return the tables and sentences of the template."""
    results, evaluation, compare = evidence.results, evidence.evaluation, evidence.compare
    recipe = evidence.recipe
    return {
        "settings": settings_of(recipe),
        "stage_table": stage_table(results["stages"]) if results else None,
        "evaluation_table": steps_table(evaluation) if evaluation else None,
        "compare_table": main_table(compare["modes"]) if compare else None,
        "intervals": intervals(len(compare["seeds"])) if compare else None,
        "audit_section": evidence.audit_section,
        "figures": {name: figure_name(name) for name in evidence.figures},
        "percent": percent,
        "estimate": lambda record: str(Estimate.of(record)),
        "versions": lambda record: ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
    }


def figure_name(name: str) -> str:
    """Return the file name of a picture in the card's folder."""
    return f"{name}.png"


def model_card(
    name: str,
    evidence: Evidence,
    *,
    config,
    processor,
    license: str | None = None,
    branches: Sequence[str] = (),
) -> ModelCard:
    """Make the card of a model.

    Args:
        name: the Hub id or folder to load it from.
        config, processor: of the checkpoint.
        branches: branches of its repository, with the best model of each stage.
    """
    pictures = sees_pictures(config)
    title = name.rstrip("/").rpartition("/")[-1]
    results, recipe = evidence.results, evidence.recipe
    own_class = None if isinstance(config, MMCoconutConfig) else (config.architectures or [config.model_type])[0]
    mode = (results or recipe).get("mode", "coconut" if config.thought_mode == "feedback" else "pause")
    card = ModelCard.from_template(
        card_data(title, evidence, license, PIPELINE if pictures else TEXT_PIPELINE),
        template_str=template(),
        **vars(evidence) | parts(evidence),
        title=title,
        model_name=name,
        mode=mode,
        config=config,
        processor=processor,
        layout=layout(processor, pictures),
        pictures=pictures,
        own_class=own_class,
        auto_class="AutoModelForImageTextToText" if own_class else "AutoModel",
        times=times(processor.num_latents, stops=config.stop_head),
        base_model=base_models(recipe),
        dataset=f"`{dataset_name(evidence)}`" if dataset_name(evidence) else "its data",
        parameters=(results or {}).get("parameters"),
        max_new_tokens=recipe.get("max_new_tokens") or 64,
        branches=branches,
        limits=limits(evidence, mode, processor.num_latents, stops=config.stop_head),
    )
    card.text = re.sub(r"\n{3,}", "\n\n", card.text)  # around sections that were left out
    return card


def write_card(folder: Path, card: ModelCard, evidence: Evidence) -> None:
    """Write README.md, its pictures, and `.eval_results` if the data is on the Hub."""
    card.save(folder / CARD)
    for name, picture in evidence.figures.items():
        (folder / figure_name(name)).write_bytes(picture.read_bytes())
    entries = eval_entries(evidence)
    if entries:
        (folder / EVAL_RESULTS).mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        (folder / EVAL_RESULTS / f"{dataset_name(evidence)}.yaml").write_text(text, encoding="utf-8")
