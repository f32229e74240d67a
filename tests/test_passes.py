"""Checkpointing of the first pass alone: same numbers, one pass recomputed, and less kept."""

import pytest
from tiny import (
    DECODERS,
    assert_same_gradients,
    batch_of,
    checkpoint_activations,
    kept_bytes,
    loss_and_gradients,
    ragged_batch,
    tiny_model,
    words,
)

from mmcoconut.compat_mmcoconut import is_checkpointing


def model_with(text, attention, **config):
    model = tiny_model(text, **config).train()
    model.get_decoder().set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "latent"])
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-12])
def test_checkpointing_the_first_pass_changes_neither_loss_nor_gradients(text, attention, tolerance):
    model = model_with(text, attention).double()
    batch = ragged_batch(model)
    batch["pixel_values"] = batch["pixel_values"].double()
    expected_loss, expected = loss_and_gradients(model, batch)
    checkpoint_activations(model)
    model.model.checkpointed_passes = "first"
    loss, gradients = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected_loss, abs=tolerance)
    assert_same_gradients(gradients, expected, tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "latent"])
@pytest.mark.parametrize("checkpointed, num_again", [("first", 1), ("all", 4)])
def test_only_the_passes_that_are_named_run_again(attention, checkpointed, num_again):
    model = model_with("qwen2", attention)
    batch = ragged_batch(model)
    checkpoint_activations(model)
    model.model.checkpointed_passes = checkpointed
    calls = []
    model.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    loss_and_gradients(model, batch)
    assert len(calls) == 4 + num_again  # three thoughts


def test_the_first_pass_keeps_less_and_latent_steps_what_they_keep_otherwise():
    def per_token(prefix: int, num_latents: int, **chosen) -> float:
        """Further bytes of a prefix, or of latents, of twice the number."""
        model = model_with("qwen2", "latent")
        latents = [model.config.latent_token_id] * num_latents
        if chosen:
            checkpoint_activations(model)
            model.model.checkpointed_passes = chosen["checkpointed"]
        return kept_bytes(model, batch_of(model, [[*words(prefix, 1), *latents, *words(2, 2)]]))

    def growth(**chosen) -> tuple[int, int]:
        base = per_token(32, 4, **chosen)
        return per_token(64, 4, **chosen) - base, per_token(32, 8, **chosen) - base

    whole, first = growth(), growth(checkpointed="first")
    assert first[0] < whole[0] / 2
    assert abs(first[1] - whole[1]) <= 4 * 8  # an index a token


def test_jacobi_iterations_are_checkpointed_whole():
    model = model_with("gpt2", "sdpa", thought_schedule="jacobi", jacobi_iterations=2)
    batch = ragged_batch(model)
    expected_loss, expected = loss_and_gradients(model, batch)
    checkpoint_activations(model)
    model.model.checkpointed_passes = "first"
    loss, gradients = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert_same_gradients(gradients, expected, 1e-6)


def test_layers_are_checkpointed_again_after_a_step():
    model = model_with("gpt2", "latent")
    checkpoint_activations(model)
    model.model.checkpointed_passes = "first"
    loss_and_gradients(model, ragged_batch(model))
    assert is_checkpointing(model)
    assert all(layer.gradient_checkpointing for layer in model.get_decoder().h)


def test_an_unknown_choice_is_refused_with_the_known_ones():
    model = tiny_model("gpt2").train()
    checkpoint_activations(model)
    model.checkpointed_passes = "prefix"
    with pytest.raises(ValueError, match=r"checkpointed_passes='prefix'.*'all', 'first'"):
        model(**ragged_batch(model))


def test_settings_are_those_of_the_base_model_through_the_head():
    model = tiny_model("gpt2")
    for name, value in {"bptt_thoughts": 1, "checkpointed_passes": "first"}.items():
        setattr(model, name, value)
        assert getattr(model.model, name) == getattr(model, name) == value
