"""Turn any recipe into one that runs offline in seconds: tiny random weights, a few rows in its data's format."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from mmcoconut.data import loader_of


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
NUM_ROWS = 8
OPTIONS_FILE = "sample_options.json"


def tiny_config(model_type: str | None, config: dict | None, name: str | None, *, sizes: dict, key: str) -> dict:
    """The same architecture with tiny sizes; its type comes from the recipe, since nothing is downloaded."""
    model_type = model_type or (config or {}).get("model_type")
    if model_type is None:
        raise ValueError(
            f"--smoke_test cannot tell the architecture of {name} without downloading it: add {key} to the recipe, "
            "e.g. clip_vision_model or gpt2."
        )
    return {"model_type": model_type, **sizes}


def smoke_arguments(model_args, data_args, curriculum_args, run_args) -> tuple:
    """The recipe's architecture, fusion, curriculum and objective on tiny sizes, two stages of one epoch each."""
    folder = Path(run_args.output_dir)
    folder = folder.with_name(f"{folder.name}-smoke")
    with run_args.main_process_first(desc="writing sample data"):
        if run_args.process_index == 0:
            shutil.rmtree(folder, ignore_errors=True)
            options = loader_of(data_args.dataset).write_sample(folder / "data", num_rows=NUM_ROWS, seed=0)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / OPTIONS_FILE).write_text(json.dumps(options, default=str))
        options = json.loads((folder / OPTIONS_FILE).read_text())
    model_args = replace(
        model_args,
        model=None,
        vision_model=None,
        text_model=None,
        vision_config=tiny_config(
            model_args.vision_model_type,
            model_args.vision_config,
            model_args.vision_model,
            sizes=TINY_VISION,
            key="vision_model_type",
        ),
        text_config=tiny_config(
            model_args.text_model_type,
            model_args.text_config,
            model_args.text_model,
            sizes=TINY_TEXT,
            key="text_model_type",
        ),
        tokenizer="train",
        tokenizer_vocab_size=400,
        new_token_init=None,
    )
    data_args = replace(data_args, dataset_options=options, max_new_tokens=4, eval_split="validation")
    max_latent_stage = min(1, curriculum_args.max_latent_stage)
    curriculum_args = replace(curriculum_args, max_latent_stage=max_latent_stage, epochs_per_stage=1, start_epoch=0)
    run_args.output_dir, run_args.do_train = str(folder), True
    run_args.num_train_epochs, run_args.max_steps = 2, -1
    run_args.push_to_hub = False
    if not torch.cuda.is_available():
        run_args.bf16 = run_args.fp16 = False
    return model_args, data_args, curriculum_args, run_args
