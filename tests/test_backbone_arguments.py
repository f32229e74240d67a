"""What from_backbones and composed_from_vlm take and refuse; the weights are of the dtype that is asked for."""

import pytest
import torch
from test_from_vlm import tiny_vlm
from tiny import max_difference, ragged_batch, seq2seq_batch, tiny_model, tiny_seq2seq

from mmcoconut import build


def composed_from_vlm(**config):
    vlm, tokenizer = tiny_vlm("internvl tied")
    return build.composed_from_vlm(vlm, tokenizer=tokenizer, **config)


@pytest.mark.parametrize("make", [tiny_model, tiny_seq2seq, composed_from_vlm])
@pytest.mark.parametrize(
    ("name", "near"),
    [("image_fusoin", "'image_fusion'"), ("thought_nrom", "'thought_norm'"), ("zzz", "fields of MMCoconutConfig")],
)
def test_an_unknown_argument_is_refused_with_the_nearest_field(make, name, near):
    with pytest.raises(ValueError, match=f"takes no '{name}': .*{near}"):
        make(**{name: "add"})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (tiny_model, "latent_token_id"),
        (composed_from_vlm, "projector_type"),
        (composed_from_vlm, "vision_feature_layer"),
    ],
)
def test_what_follows_from_the_parts_cannot_be_chosen(make, name):
    with pytest.raises(ValueError, match=f"'{name}', which follows from the parts"):
        make(**{name: 1})


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
@pytest.mark.parametrize("make", [tiny_model, tiny_seq2seq, composed_from_vlm])
def test_weights_are_of_the_dtype_that_is_asked_for_and_the_configuration_says_so(make, dtype, tmp_path):
    model = make(dtype=dtype, thought_norm="projection")
    configs = (model.config, model.config.vision_config, model.config.text_config)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {config.dtype for config in configs} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("make", [composed_from_vlm, lambda **config: tiny_model("qwen2", **config)])
def test_rotary_frequencies_stay_exact_in_a_narrow_dtype(make):
    exact, narrow = (dict(make(**dtype).named_buffers()) for dtype in ({}, {"dtype": torch.bfloat16}))
    names = [name for name in exact if name.endswith("inv_freq")]
    assert names and all(torch.equal(exact[name], narrow[name]) for name in names)


def test_a_narrow_model_computes_what_a_cast_one_does():
    wide, narrow = tiny_model("qwen2"), tiny_model("qwen2", dtype=torch.bfloat16)
    batch = ragged_batch(wide)
    with torch.no_grad():
        assert max_difference(narrow(**batch).logits.float(), wide(**batch).logits) < 0.5


@pytest.mark.parametrize("dtype", ["bfloat", torch.int8, "nn"])
def test_a_dtype_that_weights_cannot_have_is_refused(dtype):
    with pytest.raises(ValueError, match="not a type of weights: pass torch.bfloat16"):
        tiny_model(dtype=dtype)


@pytest.mark.parametrize("make", [tiny_model, tiny_seq2seq])
def test_generate_refuses_an_argument_that_nothing_reads(make):
    """The keywords of attention and outputs are known, so that a misspelt one of them is not taken for another."""
    model = make()
    batch = seq2seq_batch(model) if make is tiny_seq2seq else ragged_batch(model)
    for unknown in ("max_new_token", "output_attention", "pixel_value"):
        with pytest.raises(ValueError, match=f"not used by the model: .*'{unknown}'"):
            model.generate(**batch, **{unknown: 1})
