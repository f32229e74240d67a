"""What is asked for beside logits: states, attention maps and their names, as transformers' models give them."""

import pytest
import torch
from tiny import (
    DECODERS,
    max_difference,
    no_picture,
    plain_language_model,
    ragged_batch,
    tiny_model,
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
