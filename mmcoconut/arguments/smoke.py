"""Turn any recipe into one that runs offline in seconds: tiny random weights, a few rows in its data's format."""

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    GotOcr2ImageProcessorPil,
    PreTrainedTokenizerFast,
)

from mmcoconut.arguments.choices import REWARDED
from mmcoconut.arguments.recipes import rewarded_arguments
from mmcoconut.data import loader_of
from mmcoconut.data.tokenizer import train_tokenizer
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
TINY_DECODER = {**TINY_TEXT, "intermediate_size": 64, "num_key_value_heads": 2}
# How the vision-language models that from_vlm takes over write a chat; trimmed to what a recipe's rows hold.
INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<IMG_CONTEXT>\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# By model type: the chat template, the image processor, and the tokens, of which the last stands for an image.
TINY_VLMS = {
    "internvl": (
        INTERNVL_TEMPLATE,
        GotOcr2ImageProcessorPil,
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
            "context_image_token": "<IMG_CONTEXT>",
        },
    ),
    "llava": (LLAVA_TEMPLATE, CLIPImageProcessorPil, {"image_token": "<image>"}),
}
NUM_ROWS = 8
OPTIONS_FILE = "sample_options.json"


def tiny_config(model_type: str | None, config: dict | None, name: str | None, *, sizes: dict, key: str) -> dict:
    """The same architecture with the tiny sizes that it has; its type is the recipe's, for nothing is downloaded."""
    model_type = model_type or (config or {}).get("model_type")
    if model_type is None:
        raise ValueError(
            f"--smoke_test cannot tell the architecture of {name} without downloading it: add {key} to the recipe, "
            "e.g. clip_vision_model or gpt2."
        )
    fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    fields |= CONFIG_MAPPING[model_type].attribute_map.keys()
    return {"model_type": model_type, **{name: size for name, size in sizes.items() if name in fields}}


def tiny_vlm_tokenizer(model_type: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens and the chat template of a vision-language model."""
    template, _, named = TINY_VLMS[model_type]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(["What? ### a"], vocab_size=300).backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"turn_token": "<|im_start|>", **named},
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_vlm_image_processor(model_type: str, image_size: int):
    side = {"height": image_size, "width": image_size}
    return TINY_VLMS[model_type][1](size=side, do_center_crop=False)


def tiny_vlm_config(model_type: str, tokenizer, *, vision: dict, text: dict, **fields):
    """The configuration of a vision-language model with these sizes and the vocabulary of the tokenizer."""
    image_token = [*TINY_VLMS[model_type][2].values()][-1]
    text = {**text, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = AutoConfig.for_model(model_type, vision_config=vision, text_config=text, **fields)
    config.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
    return config


def write_tiny_vlm(folder: Path, model_type: str | None) -> None:
    """A vision-language model of random weights with its tokenizer and image processor, as from_vlm reads them."""
    if model_type not in TINY_VLMS:
        raise ValueError(
            f"--smoke_test cannot make a tiny {model_type}: set vlm_model_type in the recipe to one of "
            f"{', '.join(TINY_VLMS)}."
        )
    tokenizer = tiny_vlm_tokenizer(model_type)
    config = tiny_vlm_config(model_type, tokenizer, vision=TINY_VISION, text=TINY_DECODER)
    image_processor = tiny_vlm_image_processor(model_type, TINY_VISION["image_size"])
    for part in (AutoModelForImageTextToText.from_config(config), tokenizer, image_processor):
        part.save_pretrained(folder)


def tiny_backbones(model_args) -> dict:
    """Return what a recipe of two backbones changes for a smoke test: the same architectures with tiny sizes."""
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
    """Two answers to each row, in batches that a few rows fill; models that judge are not here, and left out."""
    of_batches = ("generation_batch_size", "steps_per_generation")
    rl = {key: value for key, value in curriculum_args.rl.items() if key not in of_batches}
    rewards = {name: weight for name, weight in (curriculum_args.rewards or {}).items() if name in REWARDS} or None
    curriculum_args = replace(curriculum_args, rl={**rl, "num_generations": 2}, rewards=rewards)
    run_args.per_device_train_batch_size, run_args.gradient_accumulation_steps = 4, 1
    return curriculum_args, rewarded_arguments(run_args, data_args, curriculum_args)


def smoke_arguments(model_args, data_args, curriculum_args, run_args) -> tuple:
    """The recipe's architecture, fusion, curriculum and objective on tiny sizes, two stages of one epoch each."""
    folder = Path(run_args.output_dir)
    folder = folder.with_name(f"{folder.name}-smoke")
    from_vlm = bool(model_args.vlm or model_args.vlm_model_type)  # a `model` may have been a vlm before
    with run_args.main_process_first(desc="writing sample data"):
        if run_args.process_index == 0:
            shutil.rmtree(folder, ignore_errors=True)
            options = loader_of(data_args.dataset).write_sample(folder / "data", num_rows=NUM_ROWS, seed=0)
            folder.mkdir(parents=True, exist_ok=True)
            if from_vlm:
                write_tiny_vlm(folder / "vlm", model_args.vlm_model_type)
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
