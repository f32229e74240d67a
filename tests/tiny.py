"""Tiny models, batches and the no-cache reference for the tests: random weights, made in code, nothing downloaded.

Shapes: B batch, T tokens, N latents, D hidden, V vocabulary.
"""

import contextlib
from functools import partial

import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Dinov2Config,
    GPT2Config,
    LlamaConfig,
    MarianConfig,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
    ViTConfig,
)
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from mmcoconut.build import from_backbones, processor_from_backbones
from mmcoconut.compat_mmcoconut import CACHE
from mmcoconut.data.tokenizer import train_tokenizer
from mmcoconut.passes_mmcoconut import (
    Passes,
    carry_states,
    column_lists,
    gather_thoughts,
    linked_thoughts,
    noise_by_column,
)
from mmcoconut.schedules_mmcoconut import RETURNED, think_together_uncached
from mmcoconut.thinking_mmcoconut import Thoughts, think_uncached


TEXTS = (
    "What colour is the left square?\nred\ngreen\nblue\n### red",
    "Which shape is above the other circle?\n### a cube",
)
HIDDEN_SIZE = 32
IMAGE_SIZE = 16
NUM_FEATURES = 4  # (16 / 8)² patches
FIRST_WORD_ID = 1  # id 0 is the end of the text

# Weights of this size let one thought move the logits by ones, where tolerances are 1e-5.
SPREAD = 0.15
VISION_SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
}
TEXT_SIZES = {
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": SPREAD,
}
GPT2_SIZES = {"n_embd": HIDDEN_SIZE, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": SPREAD}
ENCODER_DECODER_SIZES = {
    "d_model": HIDDEN_SIZE,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    "init_std": SPREAD,
    "dropout": 0.0,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

TEXT_CONFIGS = {
    "gpt2": partial(GPT2Config, **GPT2_SIZES, **NO_DROPOUT),
    "qwen2": partial(Qwen2Config, **TEXT_SIZES, num_key_value_heads=2, tie_word_embeddings=False),
    "llama": partial(LlamaConfig, **TEXT_SIZES, num_key_value_heads=4, tie_word_embeddings=False),
    "marian": partial(MarianConfig, **ENCODER_DECODER_SIZES),
    "bart": partial(BartConfig, **ENCODER_DECODER_SIZES),
}
# These read the pictures by cross-attention, the others in the place of placeholders.
CROSS_DECODERS = ("marian", "bart")
VISION_CONFIGS = {
    "clip": partial(CLIPVisionConfig, **VISION_SIZES),
    "siglip": partial(SiglipVisionConfig, **VISION_SIZES),
    "vit": partial(ViTConfig, **VISION_SIZES, initializer_range=SPREAD),
    "dinov2": partial(Dinov2Config, **VISION_SIZES, initializer_range=SPREAD),
}
DECODERS = tuple(TEXT_CONFIGS)
IN_TEXT_DECODERS = tuple(name for name in DECODERS if name not in CROSS_DECODERS)
TOWERS = tuple(VISION_CONFIGS)
# SigLIP has no class token to leave out.
TOWER_STRATEGIES = [(vision, "full") for vision in TOWERS]
TOWER_STRATEGIES += [(vision, "default") for vision in TOWERS if vision != "siglip"]


def checkpoint_activations(model, *args, enable: bool = True, **kwargs) -> None:
    """Switch gradient checkpointing on or off; the methods' names changed with transformers 5.23."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_{'enable' if enable else 'disable'}")(*args, **kwargs)


def tiny_tokenizer():
    """A fresh byte-level BPE of about 320 tokens, without the model's special tokens."""
    return train_tokenizer(TEXTS, vocab_size=320)


def sliding_qwen2_config(window: int = 6):
    """Qwen2 with one full and one sliding-window layer."""
    return TEXT_CONFIGS["qwen2"](
        use_sliding_window=True, sliding_window=window, layer_types=["full_attention", "sliding_attention"]
    )


def mistral_config(window: int = 6) -> MistralConfig:
    """A decoder whose window `layer_types` do not name."""
    return MistralConfig(**TEXT_SIZES, num_key_value_heads=2, sliding_window=window, tie_word_embeddings=False)


def tiny_model(text="gpt2", vision="clip", seed=0, **config):
    """A model with random weights in eval mode; `text` and `vision` are names above or configurations."""
    torch.manual_seed(seed)
    config.setdefault("initializer_range", SPREAD)
    if text in CROSS_DECODERS:
        config.setdefault("image_fusion", "cross_attention")
    if vision == "siglip":  # which has no class token to leave out
        config.setdefault("vision_feature_select_strategy", "full")
    return from_backbones(
        vision_config=VISION_CONFIGS[vision]() if isinstance(vision, str) else vision,
        text_config=TEXT_CONFIGS[text]() if isinstance(text, str) else text,
        tokenizer=tiny_tokenizer(),
        **config,
    )


def tiny_seq2seq(projector_type="pooled_prefix", seed=0, vision=None, text=None, **config):
    """BART beside DINOv2, or configurations, with random weights in eval mode; two visual tokens an image."""
    torch.manual_seed(seed)
    config = {"num_visual_tokens": 2, "initializer_range": SPREAD, **config}
    return from_backbones(
        image_fusion="encoder",
        vision_config=vision or VISION_CONFIGS["dinov2"](),
        text_config=text or TEXT_CONFIGS["bart"](),
        tokenizer=tiny_tokenizer(),
        projector_type=projector_type,
        **config,
    )


def tiny_processor(model, tokenizer=None, **kwargs):
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    return processor_from_backbones(
        config=model.config, tokenizer=tokenizer or tiny_tokenizer(), image_processor=image_processor, **kwargs
    )


def tiny_image(seed=0):
    """A picture of random pixels."""
    pixels = torch.randint(0, 256, (20, 24, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def words(num_words: int, seed: int) -> list[int]:
    """Ids of ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD_ID, 300, (num_words,), generator=generator).tolist()


def ragged_rows(config) -> list[list[int]]:
    """Prompts of different lengths, with their latents at different columns and text after every latent.

    One image and two latents; two images and three latents; no image and two groups of latents; no latent.
    """
    image = [config.image_token_id] * config.image_seq_length
    latent, start, end = config.latent_token_id, config.start_latent_token_id, config.end_latent_token_id
    return [
        [*image, *words(4, 1), start, latent, latent, end, *words(3, 2)],
        [*words(2, 3), *image, *words(1, 4), *image, *words(3, 5), start, latent, latent, latent, end],
        [*words(5, 6), start, latent, end, *words(2, 7), latent, latent, *words(2, 8)],
        [*image, *words(6, 9)],
    ]


def padded(rows: list[list[int]], *, padding: str, pad_token_id: int) -> dict:
    """input_ids and attention_mask (B, T) of ragged rows."""
    length = max(map(len, rows))
    input_ids, attention_mask = [], []
    for row in rows:
        pad, real = [pad_token_id] * (length - len(row)), [1] * len(row)
        zeros = [0] * len(pad)
        input_ids.append(pad + row if padding == "left" else row + pad)
        attention_mask.append(zeros + real if padding == "left" else real + zeros)
    return {"input_ids": torch.tensor(input_ids), "attention_mask": torch.tensor(attention_mask)}


def random_pixels(num_images: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def count_images(config, input_ids) -> int:
    return int((torch.as_tensor(input_ids) == config.image_token_id).sum()) // config.image_seq_length


def batch_of(model, rows: list[list[int]], *, padding: str = "left") -> dict:
    """What `forward` and `generate` take for these rows, with random pixels for their images."""
    batch = padded(rows, padding=padding, pad_token_id=model.generation_config.pad_token_id)
    num_images = count_images(model.config, batch["input_ids"])
    return {**batch, "pixel_values": random_pixels(num_images)} if num_images else batch


def ragged_batch(model, padding: str = "left") -> dict:
    return batch_of(model, ragged_rows(model.config), padding=padding)


def rows_alone(model, batch: dict) -> list[dict]:
    """The rows of a batch, each as a batch of one without its padding."""
    alone, first_image = [], 0
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"]):
        ids = ids[mask.bool()][None]
        last_image = first_image + count_images(model.config, ids)
        pixels = {"pixel_values": batch["pixel_values"][first_image:last_image]} if last_image > first_image else {}
        alone.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels})
        first_image = last_image
    return alone


def seq2seq_rows(config) -> list[tuple[list[int], list[int]]]:
    """Questions of one, two, no and one image, and decoder prompts with two, three, one and no latents."""
    image, end = config.image_token_id, config.text_config.eos_token_id
    latent, open_, close = config.latent_token_id, config.start_latent_token_id, config.end_latent_token_id
    start = config.text_config.decoder_start_token_id
    return [
        ([image, *words(4, 1), end], [start, open_, latent, latent, close, *words(3, 2)]),
        ([*words(2, 3), image, *words(1, 4), image, *words(3, 5), end], [start, open_, *[latent] * 3, close]),
        ([*words(5, 6), end], [start, open_, latent, close, *words(4, 7)]),
        ([image, *words(6, 9), end], [start, *words(4, 8)]),
    ]


def seq2seq_batch(model, padding: str = "left", order=(0, 1, 2, 3)) -> dict:
    """The rows above as a batch in this order, the decoder's side padded as asked, the encoder's behind."""
    rows = seq2seq_rows(model.config)
    questions, prompts = zip(*(rows[index] for index in order))
    pad = {"pad_token_id": model.generation_config.pad_token_id}
    decoder = padded(prompts, padding=padding, **pad)
    encoder = padded(questions, padding="right", **pad)
    num_images = count_images(model.config, encoder["input_ids"])
    pixels = {"pixel_values": random_pixels(num_images)} if num_images else {}
    return {**encoder, **pixels, **{f"decoder_{name}": tensor for name, tensor in decoder.items()}}


def decoder_side(batch: dict) -> dict:
    """input_ids and attention_mask (B, T) of what thoughts stand in, for helpers that know a decoder alone."""
    return {name: batch[f"decoder_{name}"] for name in ("input_ids", "attention_mask")}


def seq2seq_rows_alone(model, batch: dict) -> list[dict]:
    """The rows of a batch, each as a batch of one without padding on either side."""
    alone = rows_alone(model, {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")})
    prompts = rows_alone(model, {**decoder_side(batch), "pixel_values": None})
    return [{**row, **{f"decoder_{name}": prompt[name] for name in prompt}} for row, prompt in zip(alone, prompts)]


def last_labels(batch: dict, num_labels: int = 2) -> torch.Tensor:
    """Labels (B, T) on the last real tokens of each row."""
    mask = batch["attention_mask"]
    to_the_end = mask.flip(1).cumsum(1).flip(1) * mask  # (B, T), 1 at the last real token
    return batch["input_ids"].masked_fill((to_the_end == 0) | (to_the_end > num_labels), -100)


def loss_and_gradients(model, batch, **kwargs) -> tuple[float, dict]:
    """The loss on the last tokens that each row writes, and its gradients by name, pixels included."""
    model.zero_grad(set_to_none=True)
    batch = {**batch, "pixel_values": batch["pixel_values"].clone().requires_grad_()}
    labels = last_labels(decoder_side(batch) if model.config.is_encoder_decoder else batch)
    loss = model(**batch, labels=labels, **kwargs).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), {**gradients, "pixel_values": batch["pixel_values"].grad}


def kept_bytes(model, batch) -> int:
    """Bytes that are allocated in a forward pass and still there after it, whoever holds them."""
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = model(**batch, labels=last_labels(batch)).loss
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in profile.events())


def assert_same_gradients(gradients, expected, tolerance):
    assert gradients.keys() == expected.keys()
    assert expected["pixel_values"].abs().max() > 100 * tolerance
    differences = {name: max_difference(gradients[name], expected[name]) for name in expected}
    assert max(differences.values()) <= tolerance, max(differences, key=differences.get)


def plain_language_model(model):
    """The library's own causal language model with this model's weights."""
    causal_lm = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    causal_lm.get_decoder().load_state_dict(model.model.language_model.state_dict())
    causal_lm.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    return causal_lm


def no_picture(model, num_rows: int) -> dict:
    """What the plain language model is given for rows without pictures: with cross-attention, a feature of zeros."""
    states = torch.zeros(num_rows, 1, HIDDEN_SIZE)
    return {"encoder_hidden_states": states} if model.model.cross_attends else {}


def widths_of_passes(model) -> list[int]:
    """A list that gets the columns of every pass through the decoder from now on."""
    widths = []
    layer = next(module for module in model.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer))
    layer.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    return widths


def call_with_cache(decoder, past_key_values, **inputs):
    """Call a decoder with a cache under the name that transformers has for it."""
    return decoder(**{CACHE: past_key_values}, **inputs)


def passes_over(decoder, inputs_embeds: torch.Tensor, cache=None) -> Passes:
    """The passes of a call of a function that is given inputs_embeds (B, t, D) and past_key_values."""
    call = lambda past_key_values, **inputs: decoder(past_key_values=past_key_values, **inputs)  # noqa: E731
    return Passes(
        call, DynamicCache() if cache is None else cache, {"inputs_embeds": inputs_embeds}, keeps_cache=False
    )


@contextlib.contextmanager
def uncached(model):
    """Inside, the model is its own definition: every call recomputes everything, once more for each thought.

    Calls must not use a cache: `model(..., use_cache=False)`, `model.generate(..., use_cache=False)`.
    """
    base = model.model

    def run_definition(latents, inputs, *, returned, stop_threshold=None, thought_noise=None, **others):
        unknown = {name for name in RETURNED if returned[name]} - {"output_thoughts"}
        unknown |= {name for name, value in others.items() if value is not None} - {"image_mask", "beside"}
        assert stop_threshold is None and not unknown, f"the definition does not know {unknown}"
        kwargs = {name: value for name, value in inputs.items() if name not in ("inputs_embeds", "use_cache")}
        assert kwargs.pop(CACHE) is None and not inputs["use_cache"], "it has no cache: pass use_cache=False"
        attention_mask, decoder = kwargs["attention_mask"], base.get_decoder()
        noise = None if thought_noise is None else noise_by_column(thought_noise, latents)
        skipped = torch.zeros_like(latents) if attention_mask is None else latents & (attention_mask == 0)
        norm = base.get_input_embeddings().weight.detach().norm(dim=-1).mean()
        thoughts = Thoughts(latents & ~skipped, partial(base.thought_feed, embedding_norm=norm), noise=noise)
        thoughts.linked = linked_thoughts(thoughts.latents, base.bptt_thoughts)
        if model.config.thought_mode == "feedback":
            thoughts.columns = column_lists(thoughts.latents)[0]
        definition = think_uncached
        if model.config.thought_schedule == "jacobi":
            definition = partial(think_together_uncached, num_iterations=model.config.jacobi_iterations)
        for_states = {name: value for name, value in kwargs.items() if not name.startswith("output_")}
        states, read = definition(decoder, inputs["inputs_embeds"], thoughts, **for_states)
        outputs = decoder(inputs_embeds=read, use_cache=False, **kwargs)
        outputs.last_hidden_state = states
        fields = {"attention_mask": attention_mask if skipped.any() else None}
        if skipped.any():
            outputs.last_hidden_state = carry_states(states, skipped)
        if returned["output_thoughts"]:
            fields |= dict(zip(("thoughts", "thought_mask"), gather_thoughts(read, thoughts.latents)))
        return outputs, fields

    base.run_decoder = run_definition
    try:
        yield model
    finally:
        del base.run_decoder


def max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()
