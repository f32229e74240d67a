"""The loop: equal to its uncached definition in values and gradients, for every decoder, padding and latent column."""

from functools import partial
from itertools import accumulate

import pytest
import torch
from tiny import (
    DECODERS,
    assert_same_gradients,
    batch_of,
    call_with_cache,
    checkpoint_activations,
    last_labels,
    loss_and_gradients,
    max_difference,
    no_picture,
    passes_over,
    plain_language_model,
    ragged_batch,
    sliding_qwen2_config,
    tiny_model,
    uncached,
    widths_of_passes,
    words,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from mmcoconut.kernels.shared_columns import ShareColumns
from mmcoconut.passes_mmcoconut import column_lists
from mmcoconut.thinking_mmcoconut import Thoughts, think


def text_row_with_latents(config, *columns, length=12):
    row = words(length, seed=1)
    for column in columns:
        row[column] = config.latent_token_id
    return row


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_loop_equals_its_uncached_definition(text, padding, tolerance):
    model = tiny_model(text)
    batch = ragged_batch(model, padding)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        logits = model(**batch).logits[real]
        with uncached(model):
            expected = model(**batch, use_cache=False).logits[real]
        model.config.thought_mode = "pause"
        unfed = model(**batch).logits[real]
    assert max_difference(logits, expected) <= tolerance
    assert max_difference(expected, unfed) > 1  # the thoughts decide these values


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_gradients_of_the_loop_equal_those_of_its_uncached_definition(text, padding, tolerance):
    model = tiny_model(text)
    batch = ragged_batch(model, padding)
    loss, gradients = loss_and_gradients(model, batch)
    with uncached(model):
        expected_loss, expected = loss_and_gradients(model, batch, use_cache=False)
    assert loss == pytest.approx(expected_loss, abs=tolerance)
    assert_same_gradients(gradients, expected, tolerance)


@pytest.mark.parametrize("thought_norm", ["none", "embedding", "projection"])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_loop_equals_its_definition_however_thoughts_are_scaled(thought_norm, tolerance):
    model = tiny_model("qwen2", thought_norm=thought_norm)
    batch = ragged_batch(model)
    loss, gradients = loss_and_gradients(model, batch)
    with uncached(model):
        expected_loss, expected = loss_and_gradients(model, batch, use_cache=False)
    assert loss == pytest.approx(expected_loss, abs=tolerance)
    assert_same_gradients(gradients, expected, tolerance)
    assert any("thought_feed" in name for name in gradients) == (thought_norm == "projection")


def test_scaling_padding_gives_no_gradient_that_is_no_number():
    """Where a row is padding, its state may be zero (Qwen2's is), while other rows think."""
    model = tiny_model("qwen2", thought_norm="embedding")
    batch = batch_of(model, [text_row_with_latents(model.config, 4, 5), words(3, seed=3)])
    model(**batch, labels=last_labels(batch)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("tolerance", [1e-6])
def test_thoughts_are_scaled_as_said(tolerance):
    states = torch.randn(3, 32)
    model = tiny_model(thought_norm="none")
    assert torch.equal(model.model.thought_feed(states), states)

    model = tiny_model(thought_norm="embedding")
    norm = model.model.mean_embedding_norm()
    assert norm == pytest.approx(model.get_input_embeddings().weight.norm(dim=-1).mean().item(), abs=tolerance)
    scaled = model.model.thought_feed(states, norm)
    assert max_difference(scaled, norm * torch.nn.functional.normalize(states, dim=-1)) <= tolerance

    model = tiny_model(thought_norm="projection")
    feed = model.model.thought_feed
    expected = feed.norm(feed.linear_2(torch.nn.functional.gelu(feed.linear_1(states))))
    assert max_difference(feed(states), expected) <= tolerance


@pytest.mark.whole_on_the_first("text")
@pytest.mark.parametrize("columns", [(1,), (3, 4, 5), (2, 6, 7), (1, 11), (11,), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)])
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_latents_may_stand_anywhere_after_the_first_token(text, columns, tolerance):
    model = tiny_model(text)
    batch = batch_of(model, [text_row_with_latents(model.config, *columns)])
    with torch.no_grad():
        logits = model(**batch).logits
        with uncached(model):
            expected = model(**batch, use_cache=False).logits
    assert max_difference(logits, expected) <= tolerance


@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [0.0])
def test_a_row_without_latents_and_images_is_the_plain_language_model(text, tolerance):
    model = tiny_model(text)
    batch = batch_of(model, [words(9, seed=1), words(9, seed=2)])
    with torch.no_grad():
        expected = plain_language_model(model)(**batch, **no_picture(model, 2)).logits
        difference = max_difference(model(**batch).logits, expected)
    assert difference <= tolerance


@pytest.mark.parametrize("columns", [[1], [4, 5], [2, 7, 11]])
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_cutting_the_sequence_changes_nothing_where_nothing_is_fed_back(text, columns, tolerance):
    model = tiny_model(text)
    decoder = model.model.language_model
    embeds = model.get_input_embeddings()(torch.tensor([words(12, seed=1)]))
    no_latents = torch.zeros(1, 12, dtype=torch.bool)
    with torch.no_grad():
        whole = decoder(inputs_embeds=embeds)
        cache = decoder(inputs_embeds=embeds[:, :1]).past_key_values
        cache.crop(-1)
        passes = passes_over(partial(call_with_cache, decoder), embeds, cache)
        think(passes, Thoughts(no_latents, feed=model.model.thought_feed, columns=columns))
    assert torch.equal(torch.cat(passes.embeds_run, dim=1), embeds)
    assert max_difference(passes.joined().last_hidden_state, whole.last_hidden_state) <= tolerance
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("text", DECODERS)
def test_every_column_goes_through_the_decoder_exactly_once(text, padding, monkeypatch):
    model = tiny_model(text)
    batch = ragged_batch(model, padding)
    monkeypatch.setattr(ShareColumns, "layout_for", lambda *_: None)
    passes = widths_of_passes(model)
    with torch.no_grad():
        model(**batch)
    columns = column_lists(batch["input_ids"] == model.config.latent_token_id)[0]
    assert list(accumulate(passes)) == [*columns, batch["input_ids"].shape[1]]


@pytest.mark.parametrize("tolerance", [1e-6])
def test_gradients_through_thoughts_are_the_derivative_of_the_loss(tolerance):
    """Along a change of the question, in float64 (which GPT-2 alone computes throughout), autograd gives what a
    difference of losses gives, and detached thoughts do not."""
    model = tiny_model("gpt2").double()
    batch = batch_of(model, [text_row_with_latents(model.config, 5, 6, 7)])
    input_ids, labels = batch["input_ids"], last_labels(batch)
    embeds = model.get_input_embeddings()(input_ids).detach()
    change = torch.randn_like(embeds)
    change[:, 5:] = 0  # only the question moves

    def loss_at(embeds):
        states = model.model(inputs_embeds=embeds).last_hidden_state
        return torch.nn.functional.cross_entropy(model.lm_head(states[:, :-1]).transpose(1, 2), labels[:, 1:])

    def slope():
        leaf = embeds.clone().requires_grad_()
        return (torch.autograd.grad(loss_at(leaf), leaf)[0] * change).sum().item()

    with torch.no_grad():
        derivative = ((loss_at(embeds + 1e-5 * change) - loss_at(embeds - 1e-5 * change)) / 2e-5).item()
    assert slope() == pytest.approx(derivative, abs=tolerance)
    model.model.thought_feed.register_forward_hook(lambda module, args, thought: thought.detach())
    assert abs(slope() - derivative) > 1e-2


@pytest.mark.parametrize("text", DECODERS)
def test_the_answers_loss_reaches_every_thought(text):
    model = tiny_model(text)
    batch = batch_of(model, [text_row_with_latents(model.config, 4, 5, 8)])
    thoughts = []
    model.model.thought_feed.register_forward_hook(lambda module, args, thought: thoughts.append(thought))
    loss = model(**batch, labels=last_labels(batch)).loss
    gradients = torch.autograd.grad(loss, thoughts)
    assert len(gradients) == 3
    assert all(gradient.norm() > 1e-3 for gradient in gradients)


def test_pause_gives_the_question_another_gradient():
    gradients = []
    for thought_mode in ("feedback", "pause"):
        model = tiny_model("qwen2", thought_mode=thought_mode)
        batch = batch_of(model, [text_row_with_latents(model.config, 5, 6, 7)])
        model(**batch, labels=last_labels(batch)).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad[batch["input_ids"][0, :5]])
    assert max_difference(*gradients) > 1e-2


@pytest.mark.parametrize("every_n_layers", [1, 2])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-6])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(text, padding, every_n_layers, tolerance):
    model = tiny_model(text).train()
    batch = ragged_batch(model, padding)
    expected_loss, expected = loss_and_gradients(model, batch)
    checkpoint_activations(model, every_n_layers=every_n_layers)
    loss, gradients = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected_loss, abs=tolerance)
    assert_same_gradients(gradients, expected, tolerance)
    checkpoint_activations(model, enable=False)
    assert loss_and_gradients(model, batch)[0] == expected_loss


def test_gradient_checkpointing_runs_each_layer_again_in_the_backward_pass():
    model = tiny_model("qwen2").train()
    batch = ragged_batch(model)
    calls = []
    attention = model.model.language_model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    loss_and_gradients(model, batch)
    without = len(calls)
    checkpoint_activations(model)
    loss_and_gradients(model, batch)
    assert len(calls) - without == 2 * without


def test_reentrant_checkpointing_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="use_reentrant"):
        checkpoint_activations(model, {"use_reentrant": True})


def test_checkpointing_of_the_decoder_alone_is_refused_where_thoughts_need_its_cache():
    model = tiny_model("qwen2").train()
    checkpoint_activations(model.model.language_model)
    with pytest.raises(ValueError, match="whole model"):
        loss_and_gradients(model, ragged_batch(model))


@pytest.mark.parametrize("tolerance", [1e-6])
def test_checkpointing_a_sliding_window_changes_nothing(tolerance):
    model = tiny_model(sliding_qwen2_config()).train()
    batch = ragged_batch(model)
    expected_loss, expected = loss_and_gradients(model, batch)
    checkpoint_activations(model)
    loss, gradients = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected_loss, abs=tolerance)
    assert_same_gradients(gradients, expected, tolerance)


@pytest.mark.slow
def test_compiled_loop_equals_the_loop_when_the_columns_change_from_call_to_call():
    """Over a decoder that doubles: torch.compile has to read the columns of each call, not those of the first."""

    def doubling(inputs_embeds, **kwargs):
        return BaseModelOutputWithPast(last_hidden_state=2 * inputs_embeds)

    def run(embeds, latents):
        passes = passes_over(doubling, embeds)
        think(passes, Thoughts(latents, feed=lambda state: state, columns=column_lists(latents)[0]))
        return torch.cat(passes.embeds_run, dim=1)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="eager")
    for columns, length in [([6], 8), ([2], 6), ([3], 7), ([2, 3, 6], 9), ([], 5), ([1, 4], 7)]:
        embeds = torch.arange(1.0, length + 1).reshape(1, length, 1)
        latent_mask = torch.zeros(1, length, dtype=torch.bool)
        latent_mask[:, columns] = True
        expected = embeds.flatten().tolist()
        for column in columns:
            expected[column] = 2 * expected[column - 1]
        assert compiled(embeds, latent_mask).flatten().tolist() == expected, columns
