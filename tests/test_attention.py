"""Split attention: equal to its definition, alone and inside every decoder, and nothing of the prefix is copied."""

from typing import NamedTuple

import pytest
import torch
from tiny import (
    DECODERS,
    assert_same_gradients,
    batch_of,
    checkpoint_activations,
    kept_bytes,
    last_labels,
    loss_and_gradients,
    max_difference,
    ragged_batch,
    sliding_qwen2_config,
    tiny_model,
    uncached,
    words,
)
from transformers.cache_utils import DynamicCache

from mmcoconut.kernels import latent
from mmcoconut.kernels.latent import (
    MAX_QUERIES,
    PYTORCH,
    Split,
    SplitCache,
    SplitLayer,
    Step,
    latent_attention,
    latent_attention_forward,
    latent_attention_reference,
)
from mmcoconut.thinking_mmcoconut import Thoughts


def latent_model(text, **config):
    model = tiny_model(text, **config).train()
    model.get_decoder().set_attn_implementation("latent")
    return model


class Inputs(NamedTuple):
    """Of two rows, with heads of 8."""

    query: torch.Tensor
    key: Split
    value: Split

    def leaves(self) -> list[torch.Tensor]:
        return [self.query, *self.key, *self.value]

    def to(self, dtype) -> "Inputs":
        key, value = (Split(*(part.to(dtype) for part in split)) for split in (self.key, self.value))
        return Inputs(self.query.to(dtype), key, value)


def random_inputs(*, num_heads, num_kv_heads, num_queries, prefix, tail) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def states(heads, length):
        return torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64).requires_grad_()

    key, value = (Split(states(num_kv_heads, prefix), states(num_kv_heads, tail)) for _ in range(2))
    return Inputs(states(num_heads, num_queries), key, value)


def call(function, inputs: Inputs, **how) -> torch.Tensor:
    return function(Step(inputs.query, **{"scaling": 0.3, **how}), inputs.key, inputs.value)


def left_padded_mask(num_queries, prefix, tail) -> torch.Tensor:
    """Row 0 sees all that is before it, row 1 not its first three keys."""
    causal = torch.ones(num_queries, prefix + tail).tril(prefix + tail - num_queries).bool()
    mask = causal.expand(2, 1, -1, -1).clone()
    mask[1, :, :, :3] = False
    return mask


def cache_of(model) -> type:
    """The kind of cache that a call of the model starts with."""
    thoughts = Thoughts(torch.zeros(1, 1, dtype=torch.bool), feed=model.model.thought_feed)
    return type(model.get_decoder().fresh_cache(thoughts, keeps_cache=False, replays=False))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("num_heads, num_kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("num_queries, prefix, tail", [(1, 7, 1), (1, 33, 5), (3, 5, 3), (16, 9, 20)])
@pytest.mark.parametrize("tolerance", [1e-12])
def test_split_attention_equals_its_definition(masked, num_heads, num_kv_heads, num_queries, prefix, tail, tolerance):
    shape = {"num_queries": num_queries, "prefix": prefix, "tail": tail}
    inputs = random_inputs(num_heads=num_heads, num_kv_heads=num_kv_heads, **shape)
    mask = left_padded_mask(**shape) if masked else None
    assert_equals_the_definition(inputs, tolerance, mask=mask)


def assert_equals_the_definition(inputs: Inputs, tolerance: float, **how) -> None:
    """Value and five gradients."""
    found = []
    for function in (latent_attention, latent_attention_reference):
        output = call(function, inputs, **how)
        found.append([output, *torch.autograd.grad(output.square().sum(), inputs.leaves())])
    for tensor, expected in zip(*found, strict=True):
        assert max_difference(tensor, expected) <= tolerance
    assert found[0][0].abs().max() > 0.1


@pytest.mark.parametrize("num_heads, num_kv_heads, num_queries", [(4, 4, 1), (4, 2, 3)])
@pytest.mark.parametrize("tolerance", [1e-12])
def test_split_attention_with_dropout_equals_its_definition(num_heads, num_kv_heads, num_queries, tolerance):
    shape = {"num_queries": num_queries, "prefix": 9, "tail": 4}
    inputs = random_inputs(num_heads=num_heads, num_kv_heads=num_kv_heads, **shape)
    torch.manual_seed(0)
    kept = torch.empty(2, num_heads, num_queries, 13, dtype=torch.float64).bernoulli_(0.7).div_(0.7)
    assert_equals_the_definition(inputs, tolerance, mask=left_padded_mask(**shape), kept=kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_at_low_precision_is_within_twice_that_of_the_definition(dtype):
    inputs = random_inputs(num_heads=4, num_kv_heads=2, num_queries=1, prefix=65, tail=4)
    exact = call(latent_attention_reference, inputs)
    functions = (latent_attention, latent_attention_reference)
    errors = [max_difference(call(function, inputs.to(dtype)), exact) for function in functions]
    assert 0 < errors[0] <= 2 * errors[1]


def test_a_query_that_may_look_nowhere_has_finite_values_and_gradients():
    inputs = random_inputs(num_heads=2, num_kv_heads=1, num_queries=1, prefix=4, tail=1)
    output = call(latent_attention, inputs, mask=torch.zeros(2, 1, 1, 5, dtype=torch.bool))
    gradients = torch.autograd.grad(output.sum(), inputs.leaves())
    assert all(tensor.isfinite().all() for tensor in (output, *gradients))


def test_dropout_drops_whole_keys_and_scales_the_rest():
    layer, ones = SplitLayer(), torch.ones(2, 1, 4, 8, dtype=torch.float64)
    layer.update(ones[:, :, :3], ones[:, :, :3])
    keys, _ = layer.update(ones[:, :, 3:], ones[:, :, 3:])
    torch.manual_seed(0)
    inputs, how = (None, ones[:, :, :1], keys, None, None), {"scaling": 0.0, "dropout": 0.5}
    outputs = [latent_attention_forward(*inputs, **how)[0] for _ in range(50)]  # (B, Q, H, K)
    # Equal weights of 1/4 on values of 1: dropping j of four and doubling the rest gives (4 - j) / 2.
    seen = {round(value, 6) for value in torch.stack(outputs)[..., 0].flatten().tolist()}
    assert seen == {0.0, 0.5, 1.0, 1.5, 2.0}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_loop_over_split_attention_equals_its_uncached_definition(text, padding, tolerance):
    model = latent_model(text)
    batch = ragged_batch(model, padding)
    loss, gradients = loss_and_gradients(model, batch)
    with uncached(model):
        expected_loss, expected = loss_and_gradients(model, batch, use_cache=False)
    assert loss == pytest.approx(expected_loss, abs=tolerance)
    assert_same_gradients(gradients, expected, tolerance)


@pytest.mark.parametrize("vision", ["clip", "siglip", "vit", "dinov2"])
@pytest.mark.parametrize("tolerance", [1e-12])
def test_whole_model_may_be_set_to_latent_attention_with_any_tower(vision, tolerance):
    model = tiny_model("qwen2", vision=vision).double().train()
    batch = ragged_batch(model)
    batch["pixel_values"] = batch["pixel_values"].double()
    expected_loss, expected = loss_and_gradients(model, batch)
    model.set_attn_implementation("latent")
    assert cache_of(model) is SplitCache
    loss, gradients = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected_loss, abs=tolerance)
    assert_same_gradients(gradients, expected, tolerance)


def row_of(model, num_latents: int, prefix: int) -> dict:
    """A batch of one: text, latents and two labelled tokens."""
    return batch_of(model, [[*words(prefix, 1), *[model.config.latent_token_id] * num_latents, *words(2, 2)]])


@pytest.mark.parametrize("text", DECODERS)
def test_every_latent_step_reads_one_and_the_same_prefix(text, monkeypatch):
    model = latent_model(text)
    seen = []

    def spy(step, key, value):
        lengths = (key.prefix.shape[2], key.tail.shape[2])
        seen.append((key.prefix.data_ptr(), value.prefix.data_ptr(), *lengths))
        return PYTORCH.attention_forward(step, key, value)

    monkeypatch.setattr(latent, "PYTORCH", PYTORCH._replace(attention_forward=spy))
    batch = row_of(model, num_latents=4, prefix=10)
    model(**batch, labels=last_labels(batch)).loss.backward()
    assert len(seen) == 4 * 2  # steps · layers; the last one holds the answer as well
    assert [tail for *_, tail in seen[::2]] == [1, 2, 3, 6]
    assert {prefix for *_, prefix, _ in seen} == {10}
    assert len({pointers[:2] for pointers in seen}) == 2  # one pair a layer


@pytest.mark.parametrize("text", DECODERS)
def test_gradients_of_a_pass_are_formed_once_from_all_steps_that_read_its_keys(text, monkeypatch):
    model = latent_model(text)
    seen = []

    def spy(step, key, *args):
        seen.append((key.shape[2], step.query.shape[2]))
        return PYTORCH.key_backward(step, key, *args)

    monkeypatch.setattr(latent, "PYTORCH", PYTORCH._replace(key_backward=spy))
    batch = row_of(model, num_latents=4, prefix=10)
    model(**batch, labels=last_labels(batch)).loss.backward()
    # Columns, and queries of the steps that read them; the last step holds two tokens more. Two layers.
    assert sorted(seen) == sorted(2 * [(10, 3 + 3), (1, 3 + 3), (1, 2 + 3), (1, 1 + 3), (3, 3)])


def test_what_a_latent_keeps_for_the_backward_pass_does_not_grow_with_the_prefix():
    def per_latent(attention: str, prefix: int) -> float:
        model = tiny_model("gpt2").train()
        model.get_decoder().set_attn_implementation(attention)
        few, many = (kept_bytes(model, row_of(model, num_latents, prefix)) for num_latents in (4, 8))
        return (many - few) / 4

    growth = {attention: per_latent(attention, 80) - per_latent(attention, 20) for attention in ("latent", "sdpa")}
    assert growth["latent"] == 60  # one mask for all layers, a byte a key
    assert growth["sdpa"] >= 2 * 60 * 2 * 32 * 4  # layers · further keys · keys and values · width · bytes


@pytest.mark.parametrize("tolerance", [1e-12])
def test_a_long_text_between_and_after_latents_reads_joined_keys(tolerance):
    """A tail that is joined, written further, and joined again, in one graph."""
    model = tiny_model("gpt2").double().train()
    latents = [model.config.latent_token_id] * 2
    image = [model.config.image_token_id] * model.config.image_seq_length
    row = [*image, *words(5, 1), *latents, *words(MAX_QUERIES + 3, 2), *latents, *words(3, 3), *latents]
    batch = batch_of(model, [[*row, *words(MAX_QUERIES + 2, 4)], [*words(6, 5), *latents, *words(20, 6)]])
    batch["pixel_values"] = batch["pixel_values"].double()
    found = []
    for attention in ("sdpa", "latent"):
        model.get_decoder().set_attn_implementation(attention)
        found.append(loss_and_gradients(model, batch))
    assert found[0][0] == pytest.approx(found[1][0], abs=tolerance)
    assert_same_gradients(found[1][1], found[0][1], tolerance)


def test_a_graph_can_be_gone_through_twice():
    inputs = random_inputs(num_heads=4, num_kv_heads=2, num_queries=2, prefix=5, tail=3)
    loss = call(latent_attention, inputs).square().sum()
    first, second = (torch.autograd.grad(loss, inputs.leaves(), retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second))


def test_a_sliding_window_keeps_the_librarys_cache():
    model = latent_model("qwen2")
    sliding = latent_model(sliding_qwen2_config())
    assert cache_of(sliding) is DynamicCache
    assert cache_of(model) is SplitCache


@pytest.mark.parametrize("text", ["gpt2", "qwen2", "bart"])
@pytest.mark.parametrize("tolerance", [1e-6])
def test_checkpointed_training_and_generation_are_as_with_sdpa(text, tolerance):
    model, latent = tiny_model(text).train(), latent_model(text)
    batch = ragged_batch(model)
    found = []
    for each in (model, latent):
        checkpoint_activations(each)
        found.append(loss_and_gradients(each, batch))
        checkpoint_activations(each, enable=False)
    assert found[0][0] == pytest.approx(found[1][0], abs=tolerance)
    assert_same_gradients(found[1][1], found[0][1], tolerance)
    tokens = [each.eval().generate(**batch, max_new_tokens=5, num_beams=2) for each in (model, latent)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("num_labels", [1, 4, MAX_QUERIES + 1])
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-12])
def test_without_an_attention_mask_steps_with_and_without_a_mask_meet(text, num_labels, tolerance):
    """A pass of one query needs no mask then, and one of several does."""
    model = tiny_model(text).double().train()
    image = [model.config.image_token_id] * model.config.image_seq_length
    row = [*image, *words(4, 1), *[model.config.latent_token_id] * 3, *words(num_labels, 2)]
    batch = batch_of(model, [row, row])
    batch["pixel_values"] = batch["pixel_values"].double()
    del batch["attention_mask"]
    labels, found = batch["input_ids"].clone(), []
    labels[:, :-num_labels] = -100
    for attention in ("sdpa", "latent"):
        model.get_decoder().set_attn_implementation(attention)
        model.zero_grad(set_to_none=True)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        found.append((loss.item(), gradients))
    assert found[0][0] == pytest.approx(found[1][0], abs=tolerance)
    assert all(max_difference(found[0][1][name], found[1][1][name]) <= tolerance for name in found[0][1])


@pytest.mark.parametrize("num_labels", [2, MAX_QUERIES + 1])
@pytest.mark.parametrize("text", ["gpt2", "qwen2"])
def test_error_under_autocast_is_within_that_of_sdpa(text, num_labels):
    """As the Trainer does, the backward pass runs outside of autocast: nothing there casts what does not fit."""
    model = tiny_model(text).train()
    row = [*words(9, 1), *[model.config.latent_token_id] * 3, *words(num_labels, 2)]
    input_ids, found = torch.tensor([row, row[::-1]]), {}
    labels = input_ids.clone()
    labels[:, :-num_labels] = -100
    for name, attention, enabled in (("exact", "sdpa", False), ("sdpa", "sdpa", True), ("latent", "latent", True)):
        model.get_decoder().set_attn_implementation(attention)
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        found[name] = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    errors = {
        side: sum(max_difference(found[side][name], found["exact"][name]) for name in found["exact"])
        for side in ("sdpa", "latent")
    }
    assert found["latent"].keys() == found["exact"].keys()
    assert 0 < errors["latent"] <= 1.2 * errors["sdpa"]
