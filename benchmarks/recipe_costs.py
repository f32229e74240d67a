"""What each recipe costs: parameters, memory, updates and hours, in results/recipe_costs.csv and docs/scaling.md.

    python benchmarks/recipe_costs.py && python benchmarks/tables.py

Counted: parameters, and the memory of weights, gradients and AdamW's two moments (4 bytes of float32 each), from the
recipe and the shapes of published_shapes.py, built on the meta device, frozen and given adapters as train_hf does it.
Rows of vocabulary that are added to pretrained vision-language models are not counted.

Measured hours are those of results/*/compare.json and LOG.md. All other hours and all activations are estimates:

    operations = 2 · passes · (decoder · tokens + head · text tokens) + 2 · tower passes · tower · patches, a row
    passes: forward 1, backward 1, gradients of weights 1 unless adapters, recomputed 1 under checkpointing
    seconds = operations / (UTILISATION · peak) + thoughts · passes · 4 bytes · decoder / bandwidth, a batch
    activations = 34 · tokens · width · layers numbers of 16 bits (Korthikanti et al. 2022, https://arxiv.org/abs/
        2205.05198, without attention weights, which sdpa does not keep); under checkpointing the layers' inputs in
        float32 and one layer's; logits and their gradient in float32; keys and values of each thought's pass; trained
        weights in bfloat16 under autocast; with adapters two copies of the embeddings, of which peft trains some rows

of one A100 of 80 GB: 312e12 operations a second in bfloat16, 19.5e12 in float32, 2.04e12 bytes a second (its data
sheet). Rows are those of the published training split, or 10,000 where the data are the user's own; tokens are round
numbers for the data set, images at their largest. Evaluation is not counted. Numbers of rows were noted without the
Hub at hand; that of M3CoT (7,863) is the least certain.
"""

import argparse
import csv
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from published_shapes import SHAPES
from transformers import AutoConfig, AutoModelForImageTextToText

from mmcoconut.arguments.fields import DEFAULTS, TYPES, completed_for_a_new_model
from mmcoconut.arguments.recipes import read_values
from mmcoconut.arguments.typed import as_types
from mmcoconut.configuration_mmcoconut import THOUGHT_FIELDS, TOKEN_ID_FIELDS, MMCoconutConfig
from mmcoconut.modeling_mmcoconut import MMCoconutForConditionalGeneration
from mmcoconut.seq2seq_mmcoconut import MMCoconutForSeq2SeqLM
from mmcoconut.training.curriculum import Curriculum
from mmcoconut.training.layout import CONFIG_FIELDS
from mmcoconut.training.lora import add_lora
from mmcoconut.training.parts import parameters_named
from mmcoconut.vlm_mmcoconut import give_thoughts_to_vlm


HERE = Path(__file__).resolve().parent
RECIPES = HERE.parent / "recipes"
FILE = HERE / "results" / "recipe_costs.csv"
UTILISATION, PEAK, BANDWIDTH = 0.4, {True: 312e12, False: 19.5e12}, 2.04e12
CARDS = (8, 16, 24, 40, 48, 80, 141)  # GB of common GPUs
USABLE, CONTEXT = 0.9, 1.0  # share of a card's memory; GB of CUDA itself
OWN_ROWS = 10_000


class Data(NamedTuple):
    """What a row of a data set costs.

    rows: of the training split; None: the recipe says it, or the data are the user's own. text: tokens of question,
    steps and answer. image: placeholders in the decoder. patches: what the tower reads.
    """

    rows: int | None
    text: int
    image: int
    patches: int


DATA = {
    "captioner_flickr30k": Data(145_000, 15, 1, 197),  # 29,000 pictures (Karpathy's split), five captions each
    "gpt2_clip_add_grpo": Data(None, 40, 50, 50),
    "gpt2_clip_add_llava": Data(157_712, 400, 50, 50),  # LLaVA-Instruct-150K, Liu et al. 2023
    "gpt2_clip_add_vqa": Data(None, 40, 50, 50),
    "gpt2_clip_aokvqa": Data(17_056, 110, 49, 50),  # A-OKVQA, Schwenk et al. 2022
    "graph_paths": Data(None, 40, 0, 0),
    "internvl3_coconut": Data(None, 200, 13 * 256, 13 * 1025),
    "jepa_pathvqa": Data(19_654, 20, 1, 257),  # PathVQA's training split on the Hub; pictures of 224
    "puzzlevqa": Data(650, 400, 36, 37),  # LOG.md, 2026-11-21
    "quickstart": Data(None, 40, 9, 10),
    "quickstart_grpo": Data(None, 40, 9, 10),
    "qwen2_5_vl_coconut": Data(7_863, 260, 640, 2560),  # M3CoT, Chen et al. 2024
    "qwen3_vl_coconut": Data(17_056, 110, 392, 1568),
    "smollm2_pointers_from_cot": Data(None, 40, 0, 0),
    "smolvlm_coconut": Data(12_726, 320, 81, 729),  # ScienceQA, Lu et al. 2022
}
SKIPPED = {
    "internvl3_cot": "the first epochs of internvl3_coconut",
    "internvl3_coconut_from_cot": "the other epochs of internvl3_coconut",
    "internvl3_debug": "eight updates a stage",
    "internvl3_eval": "trains nothing",
    "objectives_graphs": "a shorter graph_paths",
    "objectives_mazes": "a shorter quickstart",
    "quickstart_short": "a shorter quickstart",
    "quickstart_stops": "97 weights of the quickstart's model",
    "smollm2_pointers": "stage 0 of two epochs, then smollm2_pointers_from_cot",
    **dict.fromkeys(
        (
            "smollm2_aokvqa_text",
            "smollm2_graphs",
            "smollm2_mazes",
            "smollm2_mazes_text",
            "smollm2_puzzlevqa",
        ),
        "hours wait for finished runs",
    ),
}
# Of the log, seconds of one run: means of three (entry of 2026-11-28) and of two seeds (2026-12-01).
LOGGED = {"quickstart_grpo": 253, "smollm2_pointers_from_cot": 1222}
# Recipes by the folder of a checkpoint that another one starts from, where it is not the recipe's name.
WRITTEN_BY = {"smollm2_writes": "smollm2_pointers"}
COMPARED = {"quickstart": "mazes", "graph_paths": "graph_paths", "puzzlevqa": "puzzlevqa"}


def values_of(recipe: str) -> dict:
    """Return every key of a recipe with its value; files that it names need not exist.

    Raises:
        SystemExit: a recipe that has mistakes.
    """
    values, _, problems = read_values(str(RECIPES / f"{recipe}.yaml"), [])
    values = completed_for_a_new_model(as_types(values, TYPES, problems))
    if problems:
        raise SystemExit(f"{recipe}: {problems}")
    return {**DEFAULTS, **values}


def config_of(name: str | None, fields: dict | None):
    """Return the configuration of a part: fields of the recipe, or the published ones."""
    return AutoConfig.for_model(**(fields or SHAPES[name]))


def composed_of(values: dict):
    """Return the model of a tower and a language model on the meta device, with the vocabulary that it trains with."""
    text = config_of(values["text_model"], values["text_config"])
    known = values["tokenizer_vocab_size"] if values["tokenizer"] == "train" else text.vocab_size
    text.vocab_size = known + len(TOKEN_ID_FIELDS)
    if values["tokenizer"] == "train":
        text.bos_token_id = text.eos_token_id = text.pad_token_id = 0  # which of its ids it is decides no shape
    if getattr(text, "decoder_vocab_size", None) is not None:
        text.decoder_vocab_size = text.vocab_size
    fields = {field: values[field] for field in CONFIG_FIELDS if values[field] is not None}
    fields |= {field: known + number for number, field in enumerate(TOKEN_ID_FIELDS)}
    vision = config_of(values["vision_model"], values["vision_config"])
    with torch.device("meta"):
        config = MMCoconutConfig(vision_config=vision, text_config=text, **fields)
        model_class = MMCoconutForSeq2SeqLM if config.is_encoder_decoder else MMCoconutForConditionalGeneration
        return model_class(config)


def vlm_of(values: dict):
    """Return a vision-language model that thinks on the meta device."""
    config = config_of(values["vlm"], None)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    for field, value in {**THOUGHT_FIELDS, **dict(zip(TOKEN_ID_FIELDS[1:], range(3)))}.items():
        setattr(model.config, field, value)
    return give_thoughts_to_vlm(model)


def model_of(values: dict):
    """Return the model that a recipe trains, frozen and with adapters as it says, without any weights."""
    start = values
    while start["model"] is not None:  # a checkpoint of another recipe
        name = Path(start["model"]).name
        start = values_of(WRITTEN_BY.get(name, name))
    model = composed_of(start) if start["vlm"] is None else vlm_of(start)
    for name in values["freeze"]:
        for parameter in parameters_named(model, name).values():
            parameter.requires_grad_(False)
    if values["lora"] is not None:
        add_lora(model, values["lora"])
    return model


def count(parameters, *, trained: bool = False) -> int:
    """Return how many numbers these parameters hold, or those of them that are trained."""
    return sum(each.numel() for each in parameters if each.requires_grad or not trained)


def updates_of(values: dict, data: Data) -> tuple[int, int]:
    """Return rows of the training split, and updates of the run on one GPU."""
    number = (values["dataset_options"] or {}).get("num_rows")
    rows = data.rows or (number["train"] if number else OWN_ROWS)
    if (values["max_steps"] or 0) > 0:
        return rows, values["max_steps"]
    batch = (values["per_device_train_batch_size"] or 8) * (values["gradient_accumulation_steps"] or 1)
    answers = (values["rl"] or {}).get("num_generations", 1)  # which a batch of reinforcement learning is made of
    return rows, int(math.ceil(rows * answers / batch) * values["num_train_epochs"])


def thoughts_of(values: dict) -> list[int]:
    """Return the thoughts of a row in each epoch."""
    lengths = values["epochs_per_stage"]
    curriculum = Curriculum(
        **{name: values[name] for name in ("mode", "c_thought", "max_latent_stage", "thoughts_per_turn")},
        epochs_per_stage=tuple(lengths) if isinstance(lengths, list) else lengths,
    )
    return [curriculum.num_latents(curriculum.stage_at(epoch)) for epoch in range(int(values["num_train_epochs"]))]


class Sizes(NamedTuple):
    """Numbers of parameters, and of a decoder's layers."""

    decoder: int
    head: int
    tower: int
    tower_learns: bool
    width: int
    layers: int
    kv_width: int


def sizes_of(model) -> Sizes:
    """Return what decides time and activations. The decoder of an encoder-decoder counts with its encoder."""
    text, head = model.config.get_text_config(), model.get_output_embeddings().weight.numel()
    tower = model.get_encoder(modality="image")
    inside = [parameter for name, parameter in model.named_parameters() if "lora_" not in name]
    language = count(inside) - count(tower.parameters())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    heads = text.num_attention_heads
    kv_width = text.hidden_size // heads * (getattr(text, "num_key_value_heads", None) or heads)
    decoder = language - head * (1 if tied else 2)
    learns = count(tower.parameters(), trained=True) > 0
    return Sizes(decoder, head, count(tower.parameters()), learns, text.hidden_size, text.num_hidden_layers, kv_width)


def activations_gb(values: dict, data: Data, sizes: Sizes, trained: int) -> float:
    """Return the estimate of what a batch keeps, GB; see the top of this file."""
    rows, tokens = values["per_device_train_batch_size"] or 8, data.text + data.image
    bytes_each, numbers = (2 if values["bf16"] else 4), rows * tokens * sizes.width
    kept = 34 // 2 * bytes_each * numbers
    layers = 4 * numbers * sizes.layers + kept if values["activation_checkpointing"] else kept * sizes.layers
    logits = 2 * 4 * rows * data.text * sizes.head // sizes.width
    copies = max(thoughts_of(values)) * 2 * rows * tokens * sizes.layers * sizes.kv_width * bytes_each
    weights = 2 * trained * bool(values["bf16"]) + 2 * 4 * sizes.head * (values["lora"] is not None)
    return (layers + logits + copies + weights) / 1e9


def estimated_hours(values: dict, data: Data, sizes: Sizes, rows: int) -> float:
    """Return the estimate of a run's hours on one A100; see the top of this file."""
    passes = 2 + (values["lora"] is None) + bool(values["activation_checkpointing"])
    tokens = data.text + data.image
    row = 2 * passes * (sizes.decoder * tokens + sizes.head * data.text)
    row += 2 * (3 if sizes.tower_learns else 1) * sizes.tower * data.patches
    epochs = values["num_train_epochs"]
    computing = rows * epochs * row / (UTILISATION * PEAK[bool(values["bf16"])])
    batches = rows / (values["per_device_train_batch_size"] or 8)
    reading = batches * sum(thoughts_of(values)) * passes * 4 * sizes.decoder / BANDWIDTH
    return (computing + reading) / 3600


def measured_hours(recipe: str) -> float | None:
    """Return the hours that a run was measured to take, or None."""
    seconds = LOGGED.get(recipe)
    if recipe in COMPARED:
        modes = json.loads((HERE / "results" / COMPARED[recipe] / "compare.json").read_text())["modes"]
        seconds = next(mode["train_seconds"] for mode in modes if mode["mode"] == "coconut")
    return None if seconds is None else seconds / 3600


def rounded(value: float) -> str:
    """Return a number with two significant digits, or whole from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def row_of(recipe: str) -> dict:
    """Return the line of a recipe."""
    values, data = values_of(recipe), DATA[recipe]
    model = model_of(values)
    total, trained = count(model.parameters()), count(model.parameters(), trained=True)
    copies = 1 + (values["objective"] == "grpo" and bool((values["rl"] or {}).get("beta")))  # the reference model
    state = 4 * (copies * total + 3 * trained) / 1e9
    sizes = sizes_of(model)
    activations = activations_gb(values, data, sizes, trained)
    rows, updates = updates_of(values, data)
    fits = [card for card in CARDS if state + activations + CONTEXT <= USABLE * card]
    hours, how = measured_hours(recipe), "measured, one CPU thread"
    if hours is None and values["objective"] == "supervised":
        hours, how = estimated_hours(values, data, sizes, rows), "estimate, one A100"
    own = data.rows is None and not (values["dataset_options"] or {}).get("num_rows")
    return {
        "recipe": recipe,
        "parameters_millions": f"{total / 1e6:,.1f}" if total < 1e8 else f"{total / 1e6:,.0f}",
        "trained_millions": f"{trained / 1e6:,.1f}" if trained < 1e8 else f"{trained / 1e6:,.0f}",
        "state_gb": rounded(state),
        "activations_gb": rounded(activations),
        "smallest_gpu_gb": "none needed" if "CPU" in how and hours else fits[0] if fits else "several",
        "rows": f"{rows:,}{' (assumed)' if own else ''}",
        "updates": f"{updates:,}",
        "hours": "–" if hours is None else rounded(hours),
        "how": "not estimated: it generates" if hours is None else how,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, default=FILE, help="the CSV to write")
    arguments = parser.parse_args()
    rows = [row_of(recipe) for recipe in DATA]
    with arguments.file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=[*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {arguments.file}")


if __name__ == "__main__":
    main()
