"""Calls of a vision-language model with thoughts, in its own class, that are not the ordinary ones."""

import copy

import pytest
import torch
from PIL import Image
from tiny import max_difference

from mmcoconut.build import from_vlm, processor_from_vlm
from mmcoconut.build.tiny_models import tiny_vlm
from mmcoconut.compat_mmcoconut import CACHE
from mmcoconut.configuration_mmcoconut import VERSION, check_thought_fields
from mmcoconut.configuration_mmcoconut import logger as configuration_logger


BY_COLUMN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def thinking_pair(model_type: str, **fields):
    vlm, own = tiny_vlm(model_type)
    model = from_vlm(vlm, processor=own, check=False, **fields)
    return model, processor_from_vlm(own, config=model.config)


def prompt(processor, text: str = "What colour is the left square?", num_latents: int = 2, images: int = 1) -> dict:
    pictures = [Image.new("RGB", (40, 30), (200, 30, 60))] * images
    return dict(processor(images=[pictures], text=[text], num_latents=num_latents, return_tensors="pt"))


def labels_of(batch: dict) -> torch.Tensor:
    labels = batch["input_ids"].clone()
    labels[:, :-1] = -100
    return labels


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "smolvlm", "qwen3_5"])
def test_a_cache_is_returned_as_by_the_plain_class_and_none_where_gradients_flow(model_type):
    model, processor = thinking_pair(model_type)
    batch = prompt(processor)
    with torch.no_grad():
        assert model(**batch).get(CACHE) is not None
        assert model(**batch, use_cache=False).get(CACHE) is None
    model(**batch).logits.sum().backward()


def test_recurrent_layers_keep_no_cache_where_gradients_flow():
    model, processor = thinking_pair("qwen3_5")
    with pytest.raises(ValueError, match=r"use_cache=True with gradients.* Pass use_cache=False"):
        model(**prompt(processor), use_cache=True)


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_5_vl"])
def test_latents_are_found_in_embeddings_also_in_scaled_ones(model_type):
    """Gemma multiplies what it reads of its embeddings by √D."""
    model, processor = thinking_pair(model_type)
    batch = prompt(processor, images=0)
    given = {name: batch[name] for name in BY_COLUMN if name in batch}
    ids = given.pop("input_ids")
    with torch.no_grad():
        with pytest.raises(ValueError, match="equal embeddings"):
            model(**given, inputs_embeds=model.get_input_embeddings()(ids))
        weight = model.get_input_embeddings().weight
        weight += 0.1 * torch.randn_like(weight)
        found = model(**given, inputs_embeds=model.get_input_embeddings()(ids), output_thoughts=True)
        expected = model(**given, input_ids=ids)
    assert found.thought_mask.sum() == 2
    assert max_difference(found.logits, expected.logits) <= 1e-5


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "glm4v"])
def test_positions_of_another_number_of_columns_are_refused(model_type):
    """Without position_ids these models make positions of the whole mask, of which the first would be read."""
    model, processor = thinking_pair(model_type)
    batch = prompt(processor)
    with torch.no_grad():
        past = model(**batch, use_cache=True).get(CACHE)
        longer = torch.cat([batch["attention_mask"], torch.ones(1, 1, dtype=torch.long)], dim=1)
        next_id = batch["input_ids"][:, -1:]
        with pytest.raises(ValueError, match=r"position_ids have \d+ columns, but this call has 1.*generate"):
            model(input_ids=next_id, attention_mask=longer, **{CACHE: past})


def test_a_loss_has_its_routers_part_as_in_the_plain_class():
    vlm, own = tiny_vlm("qwen3_vl_moe")
    model = from_vlm(copy.deepcopy(vlm), processor=own, check=False)
    vlm.resize_token_embeddings(len(own.tokenizer))
    vlm.load_state_dict(model.state_dict())
    batch = prompt(processor_from_vlm(own, config=model.config), num_latents=0)
    labels = labels_of(batch)
    for each in (vlm, model):
        each.config.text_config.router_aux_loss_coef = 10.0
    without = model(**batch, labels=labels).loss
    for each in (vlm, model):
        each.config.text_config.output_router_logits = True
    expected = vlm(**batch, labels=labels).loss
    assert (expected - without).abs() > 1e-2
    shift_labels = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    for training, given in ((False, {"labels": labels}), (True, {"labels": labels}), (True, {"shift_labels": labels})):
        given = {"shift_labels": shift_labels} if "shift_labels" in given else given
        model.train(training)
        assert max_difference(model(**batch, **given).loss, expected) <= 1e-5


def test_a_model_made_of_a_configuration_has_a_stop_head_that_rarely_stops():
    model, _ = thinking_pair("llava")
    config = copy.deepcopy(model.config)
    config.stop_head, config.thought_norm = True, "projection"
    base = type(model)(config).base_model
    assert base.stop_head.bias.item() == -2.0 and not base.stop_head.weight.any()
    assert not base.thought_feed.linear_1.bias.any()


def test_fields_that_cannot_work_leave_the_model_and_its_tokenizer_as_they_are():
    vlm, own = tiny_vlm("llava")
    known = len(own.tokenizer)
    with pytest.raises(ValueError, match="jacobi_iterations=None"):
        from_vlm(vlm, processor=own, thought_schedule="jacobi")
    assert len(own.tokenizer) == known
    model = from_vlm(vlm, processor=own, check=False, thought_schedule="jacobi", jacobi_iterations=2)
    assert model.config.jacobi_iterations == 2


def test_newer_code_is_warned_of_and_a_saved_model_has_the_version_of_its_code(tmp_path, monkeypatch):
    model, _ = thinking_pair("llava")
    said = []
    monkeypatch.setattr(configuration_logger, "warning_once", said.append)
    model.config.mmcoconut_version = "99.0.0"
    check_thought_fields(model.config)
    assert len(said) == 1 and "99.0.0" in said[0] and VERSION in said[0]
    model.save_pretrained(tmp_path)
    assert model.config.mmcoconut_version == VERSION


@pytest.mark.parametrize("model_type", ["paligemma", "gemma3"])
def test_a_latent_beside_another_rows_image_is_read_over_a_static_cache_or_refused(model_type):
    """Tokens of an image see both ways, so the call cannot be cut there; what is tried is run over a copy."""
    model, processor = thinking_pair(model_type)
    seen = prompt(processor)
    with_image = seen["input_ids"][0]
    first = int((with_image == model.config.image_token_id).nonzero()[0])
    text = torch.arange(20, 20 + len(with_image))
    text[first + 1 : first + 3] = model.config.latent_token_id
    ids = torch.stack([text, with_image])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": seen["pixel_values"]}
    written = torch.zeros_like(ids)
    written[0, first:] = 1
    batch |= processor.column_inputs(ids, batch["attention_mask"], written=written)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**batch, **options)
    if model_type == "gemma3":  # whose layers with windows keep no keys to be read again
        with pytest.raises(ValueError, match="cannot be read again from a StaticSlidingWindowLayer.*a dynamic cache"):
            model.generate(**batch, cache_implementation="static", **options)
        return
    found = model.generate(**batch, cache_implementation="static", **options)
    assert max_difference(torch.stack(found.logits), torch.stack(expected.logits)) <= 1e-5


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl", "gemma3"])
def test_generation_begins_with_embeddings_as_with_ids(model_type):
    model, processor = thinking_pair(model_type)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight += 0.1 * torch.randn_like(weight)
        batch = prompt(processor, images=0)
        ids = batch.pop("input_ids")
        options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        expected = model.generate(input_ids=ids, **batch, **options)
        found = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **batch, **options)
    assert torch.equal(found.sequences, expected.sequences[:, ids.shape[1] :])
    assert max_difference(torch.stack(found.logits), torch.stack(expected.logits)) <= 1e-5
