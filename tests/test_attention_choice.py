"""Latent attention by default: where it is leaner, never in place of what was asked for, and in no checkpoint."""

import json

import pytest
import torch
from tiny import (
    DECODERS,
    assert_same_gradients,
    batch_of,
    checkpoint_activations,
    loss_and_gradients,
    ragged_batch,
    sliding_qwen2_config,
    tiny_model,
    uncached,
    words,
)
from transformers import DiffLlamaConfig
from transformers.cache_utils import DynamicCache

from mmcoconut.caches_mmcoconut import PassCache
from mmcoconut.kernels import latent
from mmcoconut.kernels.latent import (
    LATENT_WHERE_LEANER,
    LEAST_PREFIX,
    LEAST_PREFIX_IF_NARROW,
    WIDE,
    SplitCache,
    choose_attention,
    chooses_latent_attention,
)
from mmcoconut.kernels.private import attention_of
from mmcoconut.thinking_mmcoconut import ThinkingDecoder


def decoder_attention(model) -> str:
    return attention_of(model.get_decoder().config)


@pytest.fixture
def any_prefix(monkeypatch):
    """Let first passes of any length count as long."""
    monkeypatch.setattr(latent, "LEAST_PREFIX_IF_NARROW", 1)


@pytest.fixture
def caches(monkeypatch) -> list:
    """The kinds of caches that forward passes start."""
    started, start = [], ThinkingDecoder.fresh_cache

    def noted(self, *args, **kwargs):
        started.append(start(self, *args, **kwargs))
        return started[-1]

    monkeypatch.setattr(ThinkingDecoder, "fresh_cache", noted)
    return started


def chosen(text, **config):
    """A model whose attention was left to choose_attention."""
    model = tiny_model(text, **config)
    choose_attention(model)
    return model


@pytest.mark.parametrize("text", DECODERS)
def test_a_decoder_with_full_attention_gets_it(text):
    assert decoder_attention(chosen(text)) == LATENT_WHERE_LEANER


@pytest.mark.parametrize("config", [{}, {"thought_schedule": "jacobi", "jacobi_iterations": 2}])
def test_what_cannot_read_split_keys_keeps_sdpa(config):
    text = "qwen2" if config else sliding_qwen2_config()
    assert decoder_attention(chosen(text, **config)) == "sdpa"


def test_an_attention_that_changes_keys_behind_the_cache_keeps_sdpa():
    config = DiffLlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    assert decoder_attention(chosen(config)) == "sdpa"


@pytest.mark.parametrize("asked", ["eager", "latent"])
def test_another_attention_than_sdpa_stays(asked, tmp_path):
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=asked)
    choose_attention(loaded)
    assert decoder_attention(loaded) == asked


@pytest.mark.parametrize("asked", ["sdpa", "eager", "latent"])
def test_what_is_set_later_is_used(asked):
    model = chosen("gpt2")
    model.set_attn_implementation(asked)
    assert decoder_attention(model) == asked


def test_a_checkpoint_does_not_name_it(tmp_path):
    chosen("qwen2").save_pretrained(tmp_path)
    assert "latent_where" not in (tmp_path / "config.json").read_text()
    assert not [name for name in json.loads((tmp_path / "config.json").read_text()) if "attn" in name]


@pytest.mark.parametrize("attention", [None, "latent"])
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_training_steps_with_it_equal_the_definition(text, attention, tolerance, any_prefix, caches):
    model = chosen(text).train()
    if attention is not None:
        model.get_decoder().set_attn_implementation(attention)
    batch = ragged_batch(model)
    loss, gradients = loss_and_gradients(model, batch)
    assert [type(cache) for cache in caches] == [SplitCache]
    with uncached(model):
        expected_loss, expected = loss_and_gradients(model, batch, use_cache=False)
    assert loss == pytest.approx(expected_loss, abs=tolerance)
    assert_same_gradients(gradients, expected, tolerance)


def test_calls_that_do_not_train_keep_the_growing_cache(any_prefix, caches):
    model = chosen("qwen2").eval()
    batch = ragged_batch(model)
    outputs = model.generate(**batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert isinstance(outputs.past_key_values, DynamicCache)
    model(**batch)
    model.train()
    with torch.no_grad():
        model(**batch)
    model(**batch, use_cache=True)  # gradients may come back through a cache that is kept
    assert len(caches) == 3 and all(isinstance(cache, DynamicCache) for cache in caches)


def test_without_latents_no_cache_is_made(any_prefix, caches):
    model = chosen("gpt2").train()
    batch = batch_of(model, [words(6, 1), words(6, 2)])
    loss = model(**batch, labels=batch["input_ids"]).loss
    model.set_attn_implementation("sdpa")
    assert torch.equal(loss, model(**batch, labels=batch["input_ids"]).loss) and not caches


@pytest.mark.parametrize("text", ["gpt2", "qwen2"])
@pytest.mark.parametrize("tolerance", [1e-6])
def test_checkpointed_first_passes_are_followed_by_split_keys(text, tolerance, any_prefix, caches):
    model = chosen(text).train()
    batch = ragged_batch(model)
    expected_loss, expected = loss_and_gradients(model, batch)
    checkpoint_activations(model)
    model.checkpointed_passes = "first"
    loss, gradients = loss_and_gradients(model, batch)
    assert type(caches[-1]) is PassCache and caches[-1].follow == SplitCache.after
    assert loss == pytest.approx(expected_loss, abs=tolerance)
    assert_same_gradients(gradients, expected, tolerance)


def test_maps_are_made_by_eager_and_by_no_other_as_before():
    model = chosen("qwen2")
    batch = ragged_batch(model)
    with torch.no_grad():
        assert model(**batch, output_attentions=True).attentions == ()
        model.set_attn_implementation("eager")
        assert len(model(**batch, output_attentions=True).attentions) == 2


@pytest.mark.parametrize("width, least", [(WIDE, LEAST_PREFIX), (WIDE - 64, LEAST_PREFIX_IF_NARROW)])
def test_it_is_chosen_behind_long_first_passes_and_said_once(width, least, monkeypatch):
    decoder = chosen("gpt2").get_decoder().train()
    decoder.config.hidden_size = width
    said = []
    monkeypatch.setattr(latent.logger, "info_once", said.append)
    assert not chooses_latent_attention(decoder, least - 1) and not said
    assert chooses_latent_attention(decoder, least)
    assert f"{least} or more columns" in said[0] and "attn_implementation='sdpa'" in said[0]
    with torch.no_grad():
        assert not chooses_latent_attention(decoder, least)
    assert not chooses_latent_attention(decoder.eval(), least)
    assert not chooses_latent_attention(decoder.train().to("meta"), least)  # not measured on other devices
