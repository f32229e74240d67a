"""What the answer may see, against a definition that takes columns out of the key-value cache of a row alone.

Shapes: B batch, T tokens, V vocabulary.
"""

import pytest
import torch
from tiny import (
    TEXT_CONFIGS,
    TEXT_SIZES,
    batch_of,
    max_difference,
    mistral_config,
    rows_alone,
    seq2seq_rows_alone,
    sliding_qwen2_config,
    tiny_model,
    tiny_seq2seq,
    words,
)
from transformers import BioGptConfig, Gemma2Config
from transformers.cache_utils import DynamicCache

from mmcoconut.caches_mmcoconut import text_cache
from mmcoconut.compat_mmcoconut import CACHE


SEES = ("no_image", "thoughts")
TOLERANCE = 2e-5
TEXTS = {
    **TEXT_CONFIGS,
    "gemma2": lambda: Gemma2Config(
        **TEXT_SIZES, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=None
    ),
    "biogpt": lambda: BioGptConfig(**TEXT_SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
}
IN_TEXT = ("gpt2", "qwen2", "llama", "gemma2", "biogpt")


def rows_of(config, others=True) -> list[list[int]]:
    """One image and two latents, two images and three; others: no image and one latent, and no latent."""
    image = [config.image_token_id] * config.image_seq_length
    latent, start, end = config.latent_token_id, config.start_latent_token_id, config.end_latent_token_id
    rows = [
        [*image, *words(4, 1), start, latent, latent, end, *words(4, 2)],
        [*words(2, 3), *image, *words(1, 4), *image, *words(3, 5), start, latent, latent, latent, end, *words(2, 6)],
    ]
    without = [[*words(5, 6), start, latent, end, *words(6, 7)], [*image, *words(6, 9)]]
    return [*rows, *without] if others else rows


def kept_columns(ids: torch.Tensor, config, sees: str, last: int) -> list[int]:
    """Return the columns up to the last latent of a row of ids (T,) which the columns behind it see."""
    hides = {"all": lambda _: False, "no_image": lambda token: token == config.image_token_id}
    hides["thoughts"] = lambda token: token != config.latent_token_id
    return [column for column in range(last + 1) if not hides[sees](ids[column].item())]


def take_out(cache, kept: list[int]) -> None:
    """Leave only these columns in a cache."""
    for layer in text_cache(cache).layers:
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = len(kept)


def definition(model, alone: dict, sees: str, beside: dict | None = None) -> torch.Tensor:
    """Return the logits (1, T, V) of a row alone: run to the last latent, take columns out of the cache, run the rest.

    beside: what the rest reads by cross-attention.
    """
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    mask_name = name.replace("input_ids", "attention_mask")
    ids, before = alone[name], model.config.answer_sees
    latents = (ids[0] == model.config.latent_token_id).nonzero()[:, 0].tolist()
    model.config.answer_sees = "all"
    try:
        if not latents:
            return model(**alone).logits
        end = latents[-1] + 1
        cache = DynamicCache(config=model.get_decoder().config)
        first = model(**{**alone, name: ids[:, :end], mask_name: None, CACHE: cache}, use_cache=True)
        cache = first.get(CACHE)
        take_out(cache, kept_columns(ids[0], model.config, sees, latents[-1]))
        embeds = model.get_input_embeddings()(ids[:, end:])
        positions = torch.arange(end, ids.shape[1])[None]
        rest = {"inputs_embeds": embeds, "position_ids": positions, CACHE: cache, "use_cache": True}
        states = model.get_decoder()(**rest, **(beside or {})).last_hidden_state
        return torch.cat([first.logits, model.get_output_embeddings()(states)], dim=1)
    finally:
        model.config.answer_sees = before


def weighted(logits: torch.Tensor, seed: int) -> torch.Tensor:
    return (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))).sum()


def gradients(model, loss) -> dict:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_equals_definition(model, batch, sees, *, rows=None, **options) -> None:
    """A batch against its rows alone by definition, in values and gradients; hiding must change something."""
    alone = rows_alone(model, batch) if rows is None else rows
    name = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
    expected = [definition(model, row, sees, **options) for row in alone]
    of_definition = gradients(model, sum(weighted(logits, seed) for seed, logits in enumerate(expected)))
    model.config.answer_sees = sees
    logits, real = model(**batch).logits, batch[name].bool()
    found = [logits[row, real[row]][None] for row in range(len(alone))]
    for row, (one, other) in enumerate(zip(found, expected)):
        assert max_difference(one, other) <= TOLERANCE, row
    of_batch = gradients(model, sum(weighted(logits, seed) for seed, logits in enumerate(found)))
    largest = max(gradient.abs().max().item() for gradient in of_definition.values())
    assert of_batch.keys() == of_definition.keys()
    assert max(max_difference(of_batch[name], of_definition[name]) for name in of_batch) <= TOLERANCE * largest
    model.config.answer_sees = "all"
    assert max_difference(model(**batch).logits, logits) > 1e-2


@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("text", IN_TEXT)
def test_a_ragged_batch_equals_the_definition(text, padding, sees):
    model = tiny_model(TEXTS[text]())
    assert_equals_definition(model, batch_of(model, rows_of(model.config), padding=padding), sees)


@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize(
    "config",
    [
        {"image_fusion": "add"},
        {"thought_norm": "projection"},
        {"thought_schedule": "jacobi", "jacobi_iterations": 2},
        {"thought_schedule": "jacobi", "jacobi_iterations": 5},
        {"thought_mode": "pause"},
    ],
    ids=str,
)
def test_every_way_to_think_equals_the_definition(config, sees):
    model = tiny_model("qwen2", **config)
    assert_equals_definition(model, batch_of(model, rows_of(model.config)), sees)
