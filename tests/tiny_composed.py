"""Tiny InternVLs and LLaVAs of which tests compose models: tokenizer, image processor, configuration, weights."""

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    GotOcr2ImageProcessorPil,
    PreTrainedTokenizerFast,
)

from mmcoconut.arguments.smoke import TINY_TEXT, TINY_VISION
from mmcoconut.data.tokenizer import train_tokenizer


TINY_DECODER = {**TINY_TEXT, "intermediate_size": 64, "num_key_value_heads": 2}
# How they write a chat; trimmed to what a recipe's rows hold.
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


def write_tiny_vlm(folder: Path, model_type: str) -> None:
    """A vision-language model of random weights with its tokenizer and image processor, as from_vlm reads them."""
    tokenizer = tiny_vlm_tokenizer(model_type)
    config = tiny_vlm_config(model_type, tokenizer, vision=TINY_VISION, text=TINY_DECODER)
    image_processor = tiny_vlm_image_processor(model_type, TINY_VISION["image_size"])
    for part in (AutoModelForImageTextToText.from_config(config), tokenizer, image_processor):
        part.save_pretrained(folder)
