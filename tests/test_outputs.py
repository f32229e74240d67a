"""What is asked for beside logits: states, attention maps and their names, as transformers' models give them."""

import pytest
import torch
from tiny import (
    DECODERS,
    max_difference,
    no_picture,
    plain_language_model,
    ragged_batch,
    seq2seq_batch,
    tiny_model,
    tiny_seq2seq,
    words,
)

from mmcoconut.compat_mmcoconut import RELEASE


@pytest.mark.parametrize("text", DECODERS)
def test_attention_that_makes_no_maps_gives_none_with_latents_as_without(text):
    model = tiny_model(text)
    ids, batch = torch.tensor([words(6, 1)]), ragged_batch(model)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        plain = plain_language_model(model)(input_ids=ids, **no_picture(model, 1), output_attentions=True)
        outputs = model(**batch, output_attentions=True)
        kwargs = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 2}
        generated = model.generate(**batch, **kwargs, do_sample=False)
    assert outputs.attentions == plain.attentions == ()
    assert generated.attentions == ((), ())


@pytest.mark.parametrize("text", DECODERS)
def test_generation_returns_the_maps_that_attention_makes(text):
    model = tiny_model(text)
    model.set_attn_implementation("eager")
    batch = ragged_batch(model)
    kwargs = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 2}
    prefill, step = model.generate(**batch, **kwargs, do_sample=False).attentions
    rows, columns = batch["input_ids"].shape
    assert [maps.shape for maps in prefill] == [(rows, 4, columns, columns)] * 2
    assert [maps.shape for maps in step] == [(rows, 4, 1, columns + 1)] * 2


@pytest.mark.skipif(RELEASE < (5, 23), reason="transformers selects layers from 5.23 on")
@pytest.mark.parametrize("schedule", [{}, {"thought_schedule": "jacobi", "jacobi_iterations": 2}, {"stop_head": True}])
@pytest.mark.parametrize("text", ["gpt2", "qwen2", "bart"])
def test_layers_that_are_not_asked_for_are_none_and_the_others_as_without(text, schedule):
    model = tiny_model(text, **schedule)
    batch = ragged_batch(model)
    with torch.no_grad():
        every = model(**batch, output_hidden_states=True).hidden_states
        chosen = model(**batch, output_hidden_states=[0, -1]).hidden_states
    assert len(chosen) == len(every) == 3 and chosen[1] is None
    assert max_difference(chosen[0], every[0]) == max_difference(chosen[2], every[2]) == 0


@pytest.mark.parametrize("wanted", [True, 0, [0, 1]])
def test_the_towers_layers_that_are_asked_for_stand_beside_the_one_that_is_read(wanted):
    model = tiny_model()
    pixels = ragged_batch(model)["pixel_values"]
    with torch.no_grad():
        expected = model.get_image_features(pixels).pooler_output
        outputs = model.get_image_features(pixels, output_hidden_states=wanted)
    assert outputs.hidden_states[0] is not None and outputs.hidden_states[-1] is not None
    assert max_difference(torch.stack(outputs.pooler_output), torch.stack(expected)) == 0


@pytest.mark.parametrize("num_beams", [1, 2])
def test_an_encoder_decoder_generates_with_all_that_transformers_returns(num_beams):
    model = tiny_seq2seq()
    model.set_attn_implementation("eager")
    batch = seq2seq_batch(model)
    wanted = {"output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
    outputs = model.generate(**batch, **wanted, num_beams=num_beams, max_new_tokens=2, min_new_tokens=2)
    rows, columns = batch["decoder_input_ids"].shape
    questions = batch["input_ids"].shape
    assert [states.shape[:2] for states in outputs.encoder_hidden_states] == [questions] * 2
    assert [maps.shape[2:] for maps in outputs.encoder_attentions] == [questions[1:] * 2]
    for first, second in (outputs.decoder_hidden_states, outputs.decoder_attentions, outputs.cross_attentions):
        assert len(first) == len(second)
    assert outputs.decoder_hidden_states[0][0].shape[:2] == (rows * num_beams, columns)
    assert outputs.decoder_attentions[0][0].shape == (rows * num_beams, 4, columns, columns)
    assert outputs.cross_attentions[1][0].shape[:3] == (rows * num_beams, 4, 1)


def test_what_an_encoder_decoder_returns_has_the_names_and_values_of_its_parts():
    model = tiny_seq2seq()
    model.set_attn_implementation("eager")
    batch = seq2seq_batch(model)
    with torch.no_grad():
        outputs = model(**batch, output_hidden_states=True, output_attentions=True)
        mask = batch["attention_mask"] * (batch["input_ids"] != model.config.image_token_id)
        encoder = model.get_encoder()(batch["input_ids"], attention_mask=mask, output_hidden_states=True)
    names = ("decoder_hidden_states", "decoder_attentions", "cross_attentions", "encoder_hidden_states")
    assert [len(outputs[name]) for name in (*names, "encoder_attentions")] == [3, 2, 2, 2, 1]
    for states, expected in zip(outputs.encoder_hidden_states, encoder.hidden_states):
        assert max_difference(states, expected) == 0
    assert max_difference(model.lm_head(outputs.decoder_hidden_states[-1]), outputs.logits) == 0


def test_text_features_are_an_output_with_states_and_vectors_or_a_tuple():
    model = tiny_seq2seq()
    ids = torch.tensor([words(5, 1), words(5, 2)])
    outputs = model.get_text_features(input_ids=ids, output_hidden_states=True)
    assert outputs.last_hidden_state.shape[:2] == ids.shape and len(outputs.hidden_states) == 2
    assert torch.equal(outputs.pooler_output, model.get_text_features(ids, torch.ones_like(ids)).pooler_output)
    assert torch.equal(model.get_text_features(ids, return_dict=False)[1], outputs.pooler_output)


def test_an_encoder_decoder_refuses_an_assistant_and_takes_prompt_lookup():
    model = tiny_seq2seq()
    batch = seq2seq_batch(model, order=[0])
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens"):
        model.generate(**batch, assistant_model=tiny_seq2seq(seed=1))
    expected = model.generate(**batch, max_new_tokens=6)
    assert torch.equal(model.generate(**batch, max_new_tokens=6, prompt_lookup_num_tokens=2), expected)


@pytest.mark.parametrize("part", ["whole", "base"])
def test_what_the_tower_gave_is_returned_and_its_states_only_where_they_are_asked_for(part):
    model = tiny_model()
    model.set_attn_implementation("eager")
    module, batch = model if part == "whole" else model.model, ragged_batch(model)
    with torch.no_grad():
        asked = module(**batch, output_hidden_states=True, output_attentions=True).image_outputs
        plain = module(**batch).image_outputs
        expected = model.vision_tower(batch["pixel_values"], output_hidden_states=True)
    assert len(asked.hidden_states) == 3 and len(asked.attentions) == 2
    assert max_difference(asked.hidden_states[1], expected.hidden_states[1]) == 0
    assert plain.hidden_states is None and len(plain.pooler_output) == len(batch["pixel_values"])
    model.vision_tower.config.output_hidden_states = True
    assert module(**batch).image_outputs.hidden_states is not None


@pytest.mark.skipif(RELEASE < (5, 23), reason="transformers selects layers from 5.23 on")
def test_a_choice_of_layers_is_the_decoders_alone():
    model = tiny_model()
    outputs = model(**ragged_batch(model), output_hidden_states=[2])
    assert outputs.hidden_states[2] is not None and outputs.image_outputs.last_hidden_state is not None
