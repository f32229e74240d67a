"""Turn any recipe into a smoke test that runs offline in seconds: tiny random weights, a few rows of made-up data."""

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mmcoconut.arguments.choices import REWARDED
from mmcoconut.arguments.recipes import rewarded_arguments
from mmcoconut.arguments.typed import did_you_mean
from mmcoconut.build.tiny_models import write_tiny_vlm
from mmcoconut.data import loader_of
from mmcoconut.errors import UsageError
from mmcoconut.objectives.rewards import REWARDS


TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TINY_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
TINY_DECODER = {**TINY_TEXT, "intermediate_size": 64, "num_key_value_heads": 2}
TINY_ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 1024,
}
NUM_ROWS = 8
OPTIONS_FILE = "sample_options.json"


def tiny_config(model_type: str | None, config: dict | None, name: str | None, *, sizes: dict, key: str) -> dict:
    """Return the same architecture with tiny sizes; the recipe must give its type, because nothing is downloaded."""
    model_type = model_type or (config or {}).get("model_type")
    if model_type is None:
        raise ValueError(
            f"--smoke_test cannot tell the architecture of {name} without downloading it: add {key} to the recipe, "
            "e.g. clip_vision_model or gpt2."
        )
    fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    fields |= CONFIG_MAPPING[model_type].attribute_map.keys()
    return {"model_type": model_type, **{name: size for name, size in sizes.items() if name in fields}}


def write_smoke_vlm(folder: Path, model_type: str | None) -> None:
    """Write a vision-language model with random weights and its processor, in the format that from_vlm reads.

    Raises:
        UsageError: no model type, or one without a tiny version.
    """
    known = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if model_type not in known:
        remedy = "set vlm_model_type to the model_type in the config.json of `vlm`, such as qwen2_5_vl"
        what = "a tiny model of an unnamed architecture" if model_type is None else f"a tiny {model_type}"
        raise UsageError(f"--smoke_test cannot make {what}: {remedy}{did_you_mean(str(model_type), known)}")
    write_tiny_vlm(folder, model_type)


def tiny_backbones(model_args) -> dict:
    """Return a recipe's changes for a smoke test of two backbones: the same architectures with tiny sizes."""
    return {
        "vision_model": None,
        "text_model": None,
        "vision_config": tiny_config(
            model_args.vision_model_type,
            model_args.vision_config,
            model_args.vision_model,
            sizes=TINY_VISION,
            key="vision_model_type",
        ),
        "text_config": tiny_config(
            model_args.text_model_type,
            model_args.text_config,
            model_args.text_model,
            sizes={**TINY_DECODER, **TINY_ENCODER_DECODER},
            key="text_model_type",
        ),
        "gguf_file": None,
        "tokenizer": "train",
        "chat_template": None,
        "tokenizer_vocab_size": 400,
    }


def smoke_rewards(curriculum_args, data_args, run_args) -> tuple:
    """Set two answers per row, in batches that a few rows fill, and drop reward models, which are not available."""
    of_batches = ("generation_batch_size", "steps_per_generation")
    rl = {key: value for key, value in curriculum_args.rl.items() if key not in of_batches}
    rewards = {name: weight for name, weight in (curriculum_args.rewards or {}).items() if name in REWARDS} or None
    curriculum_args = replace(curriculum_args, rl={**rl, "num_generations": 2}, rewards=rewards)
    run_args.per_device_train_batch_size, run_args.gradient_accumulation_steps = 4, 1
    return curriculum_args, rewarded_arguments(run_args, data_args, curriculum_args)


def smoke_arguments(model_args, data_args, curriculum_args, run_args) -> tuple:
    """Return the recipe's architecture, fusion, curriculum and objective in tiny sizes, two stages of one epoch."""
    folder = Path(run_args.output_dir)
    folder = folder.with_name(f"{folder.name}-smoke")
    from_vlm = bool(model_args.vlm or model_args.vlm_model_type)  # a `model` may have been a vlm before
    with run_args.main_process_first(desc="writing sample data"):
        if run_args.process_index == 0:
            shutil.rmtree(folder, ignore_errors=True)
            options = loader_of(data_args.dataset).write_sample(folder / "data", num_rows=NUM_ROWS, seed=0)
            folder.mkdir(parents=True, exist_ok=True)
            if from_vlm:
                write_smoke_vlm(folder / "vlm", model_args.vlm_model_type)
            (folder / OPTIONS_FILE).write_text(json.dumps(options, default=str))
        options = json.loads((folder / OPTIONS_FILE).read_text())
    tiny = {"vlm": str(folder / "vlm"), "image_size": None} if from_vlm else tiny_backbones(model_args)
    model_args = replace(model_args, model=None, new_token_init=None, **tiny)
    data_args = replace(data_args, dataset_options=options, max_new_tokens=4, eval_split="validation")
    if data_args.precompute_image_features:
        data_args = replace(data_args, image_features_cache=str(folder / "image_features"))
    max_latent_stage = min(1, curriculum_args.max_latent_stage)
    curriculum_args = replace(curriculum_args, max_latent_stage=max_latent_stage, epochs_per_stage=1, start_epoch=0)
    run_args.output_dir, run_args.do_train = str(folder), True
    run_args.num_train_epochs, run_args.max_steps = 2, -1
    run_args.push_to_hub = False
    if not torch.cuda.is_available():
        run_args.bf16 = run_args.fp16 = False
    if curriculum_args.objective in REWARDED:
        curriculum_args, run_args = smoke_rewards(curriculum_args, data_args, run_args)
    return model_args, data_args, curriculum_args, run_args
