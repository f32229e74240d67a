"""Weight gradients formed once: equal to those formed in every pass, and truly formed once."""

import copy

import pytest
import torch
from tiny import (
    DECODERS,
    assert_same_gradients,
    last_labels,
    loss_and_gradients,
    max_difference,
    ragged_batch,
    tiny_model,
)
from torch import nn

from mmcoconut.training import deferred
from mmcoconut.training.deferred import (
    LEAST_WIDTH,
    DeferredWeightGradients,
    defer_weight_gradients,
    defers_gradients,
    product,
)


def batch_in(model, dtype) -> dict:
    batch = ragged_batch(model)
    return {**batch, "pixel_values": batch["pixel_values"].to(dtype)}


def found_both_ways(model, batch, **kwargs) -> list:
    """Loss and gradients with weight gradients formed in every pass, then with those formed once."""
    found = []
    for choice in (False, True):
        defer_weight_gradients(model, choice)
        found.append(loss_and_gradients(model, batch, **kwargs))
    return found


@pytest.mark.parametrize("attention", ["sdpa", "latent"])
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-12])
def test_gradients_formed_once_are_those_of_every_pass(text, attention, tolerance):
    model = tiny_model(text, thought_norm="projection").double().train()
    model.get_decoder().set_attn_implementation(attention)
    every, once = found_both_ways(model, batch_in(model, torch.float64))
    assert once[0] == every[0]
    assert_same_gradients(once[1], every[1], tolerance)


def count_takes(monkeypatch) -> list[int]:
    """The number of passes in each weight gradient that is formed."""
    takes, take = [], deferred.Ledger.take

    def counted(ledger, dtype):
        takes.append(len(ledger.gradients))
        return take(ledger, dtype)

    monkeypatch.setattr(deferred.Ledger, "take", counted)
    return takes


@pytest.mark.parametrize("text, num_linears", [("gpt2", 2 * 4), ("qwen2", 2 * 7)])
def test_each_weight_of_the_decoder_forms_one_gradient_from_all_passes(text, num_linears, monkeypatch):
    model = tiny_model(text).train()
    defer_weight_gradients(model, True)
    batch = ragged_batch(model)
    hooked = []
    for name, weight in model.get_decoder().named_parameters():
        weight.register_post_accumulate_grad_hook(lambda _, name=name: hooked.append(name))
    takes = count_takes(monkeypatch)
    model(**batch, labels=last_labels(batch)).loss.backward()
    assert takes == [3 + 1] * num_linears  # three thoughts
    assert len(hooked) == len(set(hooked))  # as data parallel training wants it


def test_a_frozen_weight_and_a_pass_without_gradients_are_left_alone(monkeypatch):
    model = tiny_model("qwen2").train()
    defer_weight_gradients(model, True)
    batch = ragged_batch(model)
    takes = count_takes(monkeypatch)
    frozen = [name for name, weight in model.get_decoder().named_parameters() if "mlp" in name]
    for name in frozen:
        model.get_decoder().get_parameter(name).requires_grad_(False)
    model(**batch, labels=last_labels(batch)).loss.backward()
    assert len(takes) == 2 * 4
    assert all(model.get_decoder().get_parameter(name).grad is None for name in frozen)
    model.eval()(**batch, labels=last_labels(batch)).loss.backward()
    with torch.no_grad():
        model.train()(**batch)
    assert len(takes) == 2 * 4


def test_by_default_it_is_for_wide_decoders_on_a_cpu():
    model = tiny_model("gpt2").train().model
    decoder = model.get_decoder()
    assert not defers_gradients(decoder, None)
    decoder.config.n_embd = LEAST_WIDTH  # which is all that is looked at
    assert defers_gradients(decoder, None)
    assert not defers_gradients(copy.deepcopy(decoder).to("meta"), None)
    assert defers_gradients(decoder, True)
    assert not defers_gradients(decoder.eval(), True)


def test_error_under_autocast_is_no_larger_than_that_of_every_pass():
    model = tiny_model("qwen2").train()
    batch = ragged_batch(model)
    exact = loss_and_gradients(model, batch)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        every, once = found_both_ways(model, batch)
    assert once[0] == pytest.approx(every[0], abs=2e-2)
    assert once[1].keys() == exact.keys()
    errors = [sum(max_difference(gradients[name], exact[name]) for name in exact) for gradients in (once[1], every[1])]
    assert 0 < errors[0] <= 1.2 * errors[1]


def test_a_weight_used_both_ways_and_with_two_biases_gets_all_of_its_gradient():
    weight, inputs = (torch.randn(4, 4, dtype=torch.float64) for _ in range(2))
    biases = torch.randn(2, 4, dtype=torch.float64)

    def gradients(context) -> tuple:
        leaves = [nn.Parameter(tensor.clone()) for tensor in (weight, *biases)]
        with context:
            hidden = nn.functional.linear(inputs, leaves[0], leaves[1])
            hidden = nn.functional.linear(hidden.tanh(), leaves[0], leaves[2])
            hidden = torch.addmm(leaves[1], hidden.tanh(), leaves[0])
            hidden = nn.functional.linear(hidden.tanh(), leaves[0])
        return torch.autograd.grad(hidden.square().sum(), leaves)

    for found, expected in zip(gradients(DeferredWeightGradients()), gradients(torch.enable_grad())):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("num_rows, width", [(1, 6), (5, 6), (5, 7), (40, 6)])
@pytest.mark.parametrize("tolerance", [1e-12])
def test_a_product_in_parts_is_the_product(num_threads, num_rows, width, tolerance):
    before = torch.get_num_threads()
    rows, matrix = torch.randn(num_rows, 5).double(), torch.randn(width, 5).double().T
    torch.set_num_threads(num_threads)
    try:
        assert max_difference(product(rows, matrix), rows @ matrix) <= tolerance
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("choice", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "latent"])
@pytest.mark.parametrize("text", ["gpt2", "qwen2"])
@pytest.mark.parametrize("tolerance", [1e-12])
def test_gradients_asked_for_in_part_leave_nothing_behind(text, attention, choice, tolerance):
    """A backward pass for the pixels, or for one weight of an upper layer, goes by what others would have to empty."""
    model = tiny_model(text).double().train()
    model.get_decoder().set_attn_implementation(attention)
    defer_weight_gradients(model, choice)
    batch = batch_in(model, torch.float64)
    _, expected = loss_and_gradients(model, batch)
    weights = [weight for name, weight in model.get_decoder().named_parameters() if ".1." in name and weight.ndim == 2]
    model.zero_grad(set_to_none=True)
    pixels = batch["pixel_values"].clone().requires_grad_()
    loss = model(**{**batch, "pixel_values": pixels}, labels=last_labels(batch)).loss
    for wanted in (pixels, *weights):
        torch.autograd.grad(loss, [wanted], retain_graph=True)
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert_same_gradients({**gradients, "pixel_values": pixels.grad}, expected, tolerance)
