"""What every vision-language model with thoughts must do, as functions of a model type; tests/test_vlms.py runs them.

The types come from transformers' own registry. A type that cannot be built or taken over here has a reason; one that
can is compared with a definition that shares no code with ours: the model's plain class, with thoughts written into
what its decoder reads, and everything computed anew for each column of thoughts. In float64 where the towers allow it.
"""

import contextlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import transformers
from PIL import Image
from tiny_composed import tiny_vlm_tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASS_NAMES

from mmcoconut.build import from_vlm, processor_from_vlm
from mmcoconut.build.tiny_models import tiny_vlm, tiny_weights
from mmcoconut.build.tiny_processors import NoTinyProcessorError
from mmcoconut.build.tiny_vlms import tiny_vlm_config
from mmcoconut.compat_mmcoconut import RELEASE


# Towers that compute in float32 whatever they are asked for; the decoder behind them is in float64 all the same.
FLOAT_TOWERS = ("glm4v", "glm46v", "glm4v_moe", "gemma4")
# Types that are taken over here with their own processors, beside those that must be.
OTHERS = ("aya_vision", "cosmos3_edge", "deepseek_vl", "exaone4_5", "gemma4", "glm46v", "glm4v_moe", "granite_docling")
OTHERS += ("hyperclovax_vision_v2", "idefics2", "janus", "lfm3_vl", "lighton_ocr", "llava_next_video")
OTHERS += ("ovis2", "paddleocr_vl", "qwen3_5_moe", "qwen3_vl_moe", "video_llama_3", "video_llava")
# Types whose published checkpoints have other parts than their defaults.
GEMMA_2 = {"model_type": "gemma2", "sliding_window": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 30.0}
GEMMA_2 |= {"attn_logit_softcapping": 50.0, "layer_types": ["sliding_attention", "full_attention"]}
VARIANTS = {"paligemma (2)": ("paligemma", {"text_config": GEMMA_2})}
VARIANTS |= {"internvl (3.5)": ("internvl", {"text_config": {"model_type": "qwen3"}})}
ROWS = (((40, 30), "What colour is the left square?", 2), ((30, 60), "red?", 3), ((64, 64), "green red", 1))
NEW_TOKENS = 4
# Of float64, in which routers still round to float32, and before transformers 5.24 norms and rotations too.
TOLERANCE = 1e-6 if RELEASE >= (5, 24) else 1e-5


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@contextlib.contextmanager
def without_float32():
    """Let norms and rotations of a float64 model compute in float64, whose rounding would else hide differences."""
    if RELEASE < (5, 24):  # whose code mixes these with float32 made elsewhere
        yield
        return
    own = {name: getattr(torch.Tensor, name) for name in ("float", "to", "type")}

    def of(tensor, dtype):
        return torch.float64 if tensor.dtype == torch.float64 and dtype is torch.float32 else dtype

    def to(self, *args, **kwargs):
        kwargs |= {"dtype": of(self, kwargs["dtype"])} if "dtype" in kwargs else {}
        return own["to"](self, *(of(self, value) for value in args), **kwargs)

    def as_type(self, *args, **kwargs):
        return own["type"](self, *(of(self, value) for value in args), **kwargs)

    torch.Tensor.float = lambda self, *args: self if self.dtype == torch.float64 else own["float"](self, *args)
    torch.Tensor.to, torch.Tensor.type = to, as_type
    try:
        yield
    finally:
        for name, method in own.items():
            setattr(torch.Tensor, name, method)


def pixtral_images(model, rows) -> dict:
    """Return what Mistral 3 reads of pictures of whole patches, whose processor needs torchvision."""
    side, merge = model.config.vision_config.patch_size, model.config.spatial_merge_size
    sizes = [[edge // (side * merge) * side * merge for edge in reversed(size)] for size, *_ in rows]
    pixels = torch.zeros(len(rows), 3, *map(max, zip(*sizes)))
    for image, (height, width) in zip(pixels, sizes):
        image[:, :height, :width] = torch.randn(
            3, height, width, generator=torch.Generator().manual_seed(height * width)
        )
    counts = [height * width // (side * merge) ** 2 for height, width in sizes]
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}, counts


# What stands in for a processor that cannot be made here: pixels, and the placeholders of each row's picture.
IMAGES_BY_HAND = {"mistral3": pixtral_images}


@dataclass
class Family:
    """A thinking model, its plain class with the same weights, and their processor."""

    model_type: str
    model: torch.nn.Module
    plain: torch.nn.Module
    processor: object

    def inputs(self, rows=ROWS, latents: bool = True) -> dict:
        """Return a left-padded batch of questions about a picture each; latents=False leaves the thoughts out."""
        batch = self.by_hand(rows, latents) if self.processor is None else self.by_processor(rows, latents)
        dtype = next(self.model.get_input_embeddings().parameters()).dtype
        if self.model_type in FLOAT_TOWERS:
            dtype = torch.float32
        floats = {name: value.to(dtype) for name, value in batch.items() if value.is_floating_point()}
        return {**batch, **floats}

    def by_processor(self, rows, latents: bool) -> dict:
        images = [[picture(size, seed=size[0])] for size, *_ in rows]
        counts = [count * latents for *_, count in rows]
        texts = [text for _, text, _ in rows]
        return dict(self.processor(images=images, text=texts, num_latents=counts, return_tensors="pt", padding=True))

    def by_hand(self, rows, latents: bool) -> dict:
        """Return a batch of ids without a processor, of text alone if there is no stand-in for its pictures."""
        config, ids = self.model.config, []
        make = IMAGES_BY_HAND.get(self.model_type, lambda model, rows: ({}, [0] * len(rows)))
        images, placeholders = make(self.model, rows)
        for (_, text, count), number in zip(rows, placeholders):
            words = [20 + sum(map(ord, word)) % 200 for word in text.split()]
            thoughts = [config.start_latent_token_id, *[config.latent_token_id] * count, config.end_latent_token_id]
            ids.append([*[config.image_token_id] * number, *words, *(thoughts if latents else [])])
        longest = max(map(len, ids))
        padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
        return {"input_ids": padded, "attention_mask": mask, **images}

    def plain_rows_are_equal(self) -> bool:
        """Return True if the plain model's logits, without latents, are the same in a batch and row by row."""
        batch = self.inputs(latents=False)
        real = batch["attention_mask"].bool()
        with torch.no_grad(), without_float32():
            logits = self.plain(**batch).logits
            rows = (
                self.plain(**self.inputs(ROWS[row : row + 1], latents=False)).logits[0] for row in range(len(ROWS))
            )
            return all(
                (alone - logits[row, real[row]]).abs().max() <= self.row_tolerance for row, alone in enumerate(rows)
            )

    @property
    def how_images_are_read(self) -> str:
        """Return `yes`, or what stands in for a processor that cannot be made here."""
        if self.processor is not None:
            return "yes"
        return "yes, images by hand" if self.model_type in IMAGES_BY_HAND else "text alone"

    @property
    def row_tolerance(self) -> float:
        """How much logits of a row may differ in a batch and alone: a tower in float32 sums in another order there."""
        return 1e-4 if self.model_type in FLOAT_TOWERS else TOLERANCE

    def latents_of(self, batch: dict) -> torch.Tensor:
        return batch["input_ids"] == self.model.config.latent_token_id  # (B, T)


def tiny_pair(model_type: str, fields: dict) -> tuple:
    """Return a tiny plain model and its processor; where that cannot be made here a tokenizer with an image token."""
    try:
        return tiny_vlm(model_type, **fields)
    except NoTinyProcessorError:
        tokenizer = tiny_vlm_tokenizer("internvl")
        image = {"image_token_id": tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")}
        return tiny_weights(tiny_vlm_config(model_type, len(tokenizer), **image)), tokenizer


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@lru_cache(maxsize=1)
def family(name: str) -> "Family | str":
    """Return the family of a model type or one of VARIANTS, or the reason why there is none here."""
    model_type, fields = VARIANTS.get(name, (name, {}))
    try:
        vlm, own = tiny_pair(model_type, fields)
    except Exception as error:  # of a configuration that tiny sizes do not fit, or a library that is missing
        return f"not built here: {type(error).__name__}: {first_line(error)}"
    for config in (vlm.config, vlm.config.get_text_config()):
        config._experts_implementation = "eager"  # the grouped one knows no float64
    try:
        is_tokenizer = isinstance(own, PreTrainedTokenizerFast)
        model = from_vlm(vlm, **{"tokenizer" if is_tokenizer else "processor": own})
        processor = None if is_tokenizer else processor_from_vlm(own, config=model.config)
    except ValueError as error:
        return str(error)
    except Exception as error:  # of an image processor that makes no tiny pictures
        return f"not built here: {type(error).__name__}: {first_line(error)}"
    plain = getattr(transformers, CLASS_NAMES[model_type])(model.config).eval()
    try:
        plain.load_state_dict(model.state_dict())
    except RuntimeError as error:
        return f"its plain class does not open a checkpoint whose vocabulary has grown ({first_line(error)})"
    for each in (model, plain):
        parts = (each.get_decoder(), each.get_output_embeddings()) if model_type in FLOAT_TOWERS else (each,)
        for part in parts:
            part.double()
    made = Family(name, model, plain, processor)
    try:
        with torch.no_grad():
            plain(**made.inputs(ROWS[:1], latents=False))
    except Exception as error:  # of a tower that tiny sizes do not fit
        return f"not built here: its plain class reads no tiny image ({type(error).__name__}: {first_line(error)})"
    return made


def by_definition(plain, latents: torch.Tensor, **inputs) -> torch.Tensor:
    """Return the logits (B, T, V) of a plain model that reads thoughts; for each column of them all is run again."""
    decoder, thoughts, states = plain.get_decoder().base_model, {}, []

    def write_thoughts(module, args, kwargs):
        if kwargs.get("inputs_embeds") is None:
            kwargs["inputs_embeds"] = module.get_input_embeddings()(kwargs.pop("input_ids"))
        embeds = kwargs["inputs_embeds"]
        for (row, column), thought in thoughts.items():
            place = torch.tensor([row]), torch.tensor([column])
            embeds = embeds.index_put(place, thought[None])
        kwargs.pop("logits_to_keep", None)
        return args, {**kwargs, "inputs_embeds": embeds}

    def keep_states(module, args, output):
        states.append(output.last_hidden_state)

    handles = [decoder.register_forward_pre_hook(write_thoughts, with_kwargs=True)]
    handles.append(decoder.register_forward_hook(keep_states))
    try:
        for column in latents.any(dim=0).nonzero()[:, 0].tolist():
            plain(**inputs, use_cache=False)
            for row in latents[:, column].nonzero()[:, 0].tolist():
                thoughts[row, column] = states[-1][row, column - 1]
        return plain(**inputs, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def gradients_of(model, logits: torch.Tensor, real: torch.Tensor) -> dict:
    """Return the gradients of a fixed weighting of the logits (B, T, V) of real columns (B, T)."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(logits.shape, generator=generator, dtype=logits.dtype) * real[..., None]
    model.zero_grad()
    (logits * weights).sum().backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def relative_difference(found: dict, expected: dict) -> float:
    """Return the largest difference of gradients, over the largest gradient; they must be of the same weights."""
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    return max((found[name] - expected[name]).abs().max().item() for name in found) / largest


@contextlib.contextmanager
def checkpointing(model):
    """Inside, a model trains with gradient checkpointing, and nothing is dropped out."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def answers(model, batch: dict, **options) -> torch.Tensor:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    with torch.no_grad():
        return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
