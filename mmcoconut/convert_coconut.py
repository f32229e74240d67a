"""Convert a checkpoint of the original Coconut code to mmcoconut: `python -m mmcoconut.convert_coconut …`.

The original writes `torch.save(state_dict)` of its `Coconut` module: the language model under `base_causallm.`, and
its embeddings again under `embedding.`. A checkpoint of its stage 0 (CoT) is the language model alone. Three
tokens are added to the tokenizer in the original's order; `<image>` follows them, so all logits are unchanged.

Source: https://arxiv.org/abs/2412.06769, and the code that was published with it.
"""

import logging
import pickle
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessorPil, CLIPVisionConfig
from transformers.hf_argparser import HfArg

from mmcoconut.arguments.recipes import read_arguments
from mmcoconut.build import from_backbones, processor_from_backbones
from mmcoconut.configuration_mmcoconut import END_LATENT_TOKEN, LATENT_TOKEN, START_LATENT_TOKEN
from mmcoconut.errors import RecipeError, run_command


logger = logging.getLogger("mmcoconut")

WRAPPER = "module."  # prefix of DistributedDataParallel
LANGUAGE_MODEL, EMBEDDINGS = "base_causallm.", "embedding."
ADDED_TOKENS = (START_LATENT_TOKEN, END_LATENT_TOKEN, LATENT_TOKEN)
# The model's class has a vision tower: this is the smallest one, and it never gets a picture.
SIDE = 8
NO_VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


@dataclass
class ConversionArguments:
    """Options of a conversion."""

    checkpoint: str | None = HfArg(default=None, help="File written by the original code, such as checkpoint_33.")
    text_model: str | None = HfArg(default=None, help="Its `model_id`, a folder or Hub id: architecture, tokenizer.")
    num_latents: int | None = HfArg(default=None, help="Thoughts per question: its c_thought times max_latent_stage.")
    output_dir: str | None = HfArg(default=None, help="Output folder for model and processor.")


def read_state_dict(file: str) -> dict[str, torch.Tensor]:
    """Return the language model's weights in a file of the original code, with transformers' names.

    Raises:
        ValueError: the file holds more than tensors, or no language model.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (EOFError, IndexError, KeyError) as error:  # torch's errors for an empty file or a text
        raise ValueError(f"{file} was not written by torch.save. Give a checkpoint_<n> file.") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} holds more than tensors, and is not opened. Give a saved state_dict.") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file} holds a {type(state).__name__}, not a state_dict. Give a checkpoint_<n> file.")
    state = {name.removeprefix(WRAPPER): value for name, value in state.items()}
    inner = {name.removeprefix(LANGUAGE_MODEL): x for name, x in state.items() if name.startswith(LANGUAGE_MODEL)}
    return inner or {name: value for name, value in state.items() if not name.startswith(EMBEDDINGS)}


def load_causal_lm(text_model: str, state: dict[str, torch.Tensor], file: str):
    """Return the language model of an architecture with these weights.

    Raises:
        ValueError: weights are missing, unknown or of another shape.
    """
    config = AutoConfig.from_pretrained(text_model)
    causal_lm = AutoModelForCausalLM.from_config(config)
    embeddings = next(
        name for name, weight in causal_lm.named_parameters() if weight is causal_lm.get_input_embeddings().weight
    )
    if embeddings not in state:
        raise ValueError(f"{file} has no weight {embeddings}: name the --text_model that it was trained from.")
    causal_lm.resize_token_embeddings(len(state[embeddings]), mean_resizing=False)
    try:
        missing, unknown = causal_lm.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit {text_model}: name its --text_model. {error}") from error
    tied = causal_lm.all_tied_weights_keys
    missing = [name for name in missing if name not in tied]
    unknown = [name for name in unknown if not name.endswith((".attn.bias", ".attn.masked_bias"))]  # old GPT-2 buffers
    if missing or unknown:
        raise ValueError(
            f"{file} does not fit {text_model}: it lacks {missing[:3]} and has {unknown[:3]}; name its --text_model."
        )
    return causal_lm


def tokenizer_of(text_model: str, num_rows: int, file: str):
    """Return the original's tokenizer: the language model's with three tokens, padding with the end-of-text token.

    Raises:
        ValueError: the number of tokens differs from the rows of the embeddings.
    """
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_special_tokens({"extra_special_tokens": list(ADDED_TOKENS)}, replace_extra_special_tokens=False)
    if len(tokenizer) > num_rows:
        raise ValueError(
            f"{file} embeds {num_rows} tokens. The tokenizer of {text_model} with {', '.join(ADDED_TOKENS)} has "
            f"{len(tokenizer)}. Name the --text_model that it was trained from."
        )
    return tokenizer


def convert(file: str, text_model: str, *, num_latents: int):
    """Return model and processor, text only, with the same logits as the original's language model.

    Args:
        file: written by the original code.
        text_model: folder or Hub id of the language model that it was trained from.
        num_latents: thoughts per question, at least 0.
    """
    state = read_state_dict(file)
    causal_lm = load_causal_lm(text_model, state, file)
    tokenizer = tokenizer_of(text_model, causal_lm.get_input_embeddings().weight.shape[0], file)
    with tempfile.TemporaryDirectory() as folder:
        causal_lm.save_pretrained(folder)
        model = from_backbones(
            vision_config=CLIPVisionConfig(**NO_VISION, image_size=SIDE, patch_size=SIDE),
            text=folder,
            tokenizer=tokenizer,
        )
    image_processor = CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    processor = processor_from_backbones(
        config=model.config,
        tokenizer=tokenizer,
        image_processor=image_processor,
        markers="both",
        chat_template="plain",
    )
    processor.num_latents = num_latents
    return model, processor


def parse_arguments(argv: list[str]) -> ConversionArguments:
    usage = "mmcoconut convert coconut --checkpoint … --text_model … --num_latents … --output_dir …"
    arguments = read_arguments(argv, ConversionArguments, usage)
    problems = [(name, None, "give it") for name, value in vars(arguments).items() if value is None]
    if arguments.checkpoint is not None and not Path(arguments.checkpoint).is_file():
        problems.append(("checkpoint", arguments.checkpoint, "no such file: correct the path"))
    if arguments.output_dir is not None and Path(arguments.output_dir, "config.json").exists():
        problems.append(("output_dir", arguments.output_dir, "it holds a checkpoint: name another folder"))
    if problems:
        raise RecipeError("command line", problems)
    return arguments


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    model, processor = convert(arguments.checkpoint, arguments.text_model, num_latents=arguments.num_latents)
    for part in (model, processor):
        part.save_pretrained(arguments.output_dir)
    logger.info("written to %s; %d thoughts per question", arguments.output_dir, arguments.num_latents)


if __name__ == "__main__":
    run_command(main)
