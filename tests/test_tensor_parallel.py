"""Which weights tensor parallelism cuts; test_processes.py computes with cut ones."""

import pytest
from tiny import tiny_model, tiny_seq2seq


@pytest.mark.parametrize("text", ["qwen2", "llama"])
def test_the_plan_of_the_decoder_is_joined_with_that_of_the_head(text):
    model = tiny_model(text)
    decoder = {f"model.language_model.{name}": style for name, style in model.get_decoder().tp_plan.items()}
    assert "model.language_model.layers.*.mlp.down_proj" in decoder
    assert model.tp_plan == {"lm_head": "colwise_gather_output", **decoder}


@pytest.mark.parametrize("make", [tiny_model, tiny_seq2seq])
def test_a_head_is_not_cut_where_the_decoder_it_is_tied_to_cannot_be(make):
    model = make()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not model.tp_plan
