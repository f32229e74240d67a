"""Rows whose latents stand in different columns: as few passes as the row with the most latents, and nothing else."""

from functools import partial

import pytest
import torch
from tiny import (
    DECODERS,
    FIRST_WORD_ID,
    assert_same_gradients,
    batch_of,
    call_with_cache,
    last_labels,
    loss_and_gradients,
    max_difference,
    mistral_config,
    ragged_batch,
    sliding_qwen2_config,
    tiny_model,
    uncached,
    widths_of_passes,
    words,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import masking_utils
from transformers.cache_utils import DynamicCache, QuantizedCache

from mmcoconut.kernels.latent import SplitCache
from mmcoconut.kernels.shared_columns import COLUMNS_OF_A_PASS, ShareColumns, can_move_keys, layout_of
from mmcoconut.passes_mmcoconut import Passes
from mmcoconut.thinking_mmcoconut import Thoughts, think


@pytest.fixture
def ungrouped(monkeypatch):
    """Switches regrouping off when called."""
    return lambda: monkeypatch.setattr(ShareColumns, "layout_for", lambda *_: None)


def drawn(rows: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent mask and attention mask of rows of `L` (latent), `.` (padding) and anything else."""
    latents = torch.tensor([[letter == "L" for letter in row] for row in rows])
    return latents, torch.tensor([[letter != "." for letter in row] for row in rows]).long()


def test_layout_is_the_drawn_one():
    rows = ["aLbLcde", "..fghLi", "jkl.LmL", "nopqrst"]
    layout = layout_of(*drawn(rows))
    letters = torch.tensor([[ord(letter) for letter in row] for row in rows])
    moved = torch.where(layout.real, layout.move(letters), ord("."))
    found = ["".join(map(chr, row)) for row in moved.tolist()]
    assert found == ["a......LbLcde", "fgh....L.i...", "jkl....LmL...", "nopqrst......"]
    assert layout.starts == [0, 7, 9]
    assert [end.tolist() for end in layout.ends] == [[0, 2, 2, 6], [1, 0, 1, 0], [3, 0, 0, 0]]
    real = drawn(rows)[1].bool()
    assert torch.equal(layout.move_back(layout.move(letters))[real], letters[real])


@pytest.mark.parametrize("attention", ["sdpa", "latent"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-12])
def test_regrouped_rows_have_the_loss_and_gradients_of_rows_left_as_they_are(
    text, padding, attention, tolerance, ungrouped
):
    model = tiny_model(text).double().train()
    model.get_decoder().set_attn_implementation(attention)
    batch = ragged_batch(model, padding)
    batch["pixel_values"] = batch["pixel_values"].double()
    passes = widths_of_passes(model)
    loss, gradients = loss_and_gradients(model, batch)
    assert len(passes) == 3 + 1  # three latents in the longest row
    ungrouped()
    passes.clear()
    expected_loss, expected = loss_and_gradients(model, batch)
    assert len(passes) > 4
    assert loss == pytest.approx(expected_loss, abs=tolerance)
    assert_same_gradients(gradients, expected, tolerance)


@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_states_thoughts_and_the_kept_cache_are_in_the_columns_of_the_call(text, tolerance, ungrouped):
    model = tiny_model(text)
    batch = ragged_batch(model)
    wanted = {"use_cache": True, "output_thoughts": True, "output_hidden_states": True}
    with torch.no_grad():
        found = model(**batch, **wanted)
        ungrouped()
        expected = model(**batch, **wanted)
    real = batch["attention_mask"].bool()
    for name in ("thoughts", "thought_mask"):
        assert max_difference(getattr(found, name).double(), getattr(expected, name).double()) <= tolerance
    for states, others in zip((found.logits, *found.hidden_states), (expected.logits, *expected.hidden_states)):
        assert max_difference(states[real], others[real]) <= tolerance
    caches = [
        getattr(each, "self_attention_cache", each) for each in (found.past_key_values, expected.past_key_values)
    ]
    for layer, other in zip(*(cache.layers for cache in caches)):
        for states, others in zip((layer.keys, layer.values), (other.keys, other.values)):
            assert max_difference(states.transpose(1, 2)[real], others.transpose(1, 2)[real]) <= tolerance


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("text", ["gpt2", "qwen2", "marian"])
def test_generation_writes_the_same_tokens(text, options, ungrouped):
    model = tiny_model(text)
    batch = ragged_batch(model)
    found = model.generate(**batch, max_new_tokens=6, **options)
    ungrouped()
    assert torch.equal(found, model.generate(**batch, max_new_tokens=6, **options))


@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_further_turn_continues_the_kept_cache(tolerance):
    """The state of the last column is remembered where it now stands, so that a next call may begin with a latent."""
    model = tiny_model("qwen2")
    batch = ragged_batch(model)
    latent = model.config.latent_token_id
    further = torch.tensor([[latent, *words(2, row)] for row in range(4)])
    mask = torch.cat([batch["attention_mask"], torch.ones_like(further)], dim=1)
    with torch.no_grad():
        first = model(**batch, use_cache=True)
        second = model(input_ids=further, attention_mask=mask, past_key_values=first.past_key_values)
        ids = torch.cat([batch["input_ids"], further], dim=1)
        whole = model(**{**batch, "input_ids": ids, "attention_mask": mask}, use_cache=False)
    assert max_difference(second.logits, whole.logits[:, -3:]) <= tolerance


def test_what_cannot_be_moved_runs_column_by_column():
    model = tiny_model("qwen2")
    batch = ragged_batch(model)
    passes = widths_of_passes(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(**batch, output_attentions=True)
    assert len(passes) > 4
    sliding = tiny_model(sliding_qwen2_config())
    passes = widths_of_passes(sliding)
    with torch.no_grad():
        sliding(**ragged_batch(sliding), use_cache=True)
    assert len(passes) > 4


def test_rows_that_share_their_columns_are_left_as_they_are(monkeypatch):
    model = tiny_model("gpt2")
    latents = [model.config.latent_token_id] * 2
    monkeypatch.setattr("mmcoconut.kernels.shared_columns.layout_of", None)
    batch = batch_of(model, [[*words(3, 1), *latents, *words(2, 2)], [*words(5, 3), *latents, *words(2, 4)]])
    passes = widths_of_passes(model)
    with torch.no_grad():
        model(**batch)
    assert len(passes) == 3


@pytest.mark.parametrize("text", ["gpt2", "qwen2", "llama"])
def test_the_loop_waits_for_the_device_nowhere(text):
    """Fake tensors have no numbers, so that to look at one raises."""
    model = tiny_model(text).model.train()
    width = model.config.text_config.hidden_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        latent_mask = torch.zeros(2, 9, dtype=torch.bool)
        inputs = {
            "inputs_embeds": torch.randn(2, 9, width),
            "attention_mask": torch.ones(2, 9, dtype=torch.long),
            "position_ids": torch.arange(9).expand(2, 9),
            "use_cache": True,
        }
        thoughts = Thoughts(latent_mask, feed=model.thought_feed, columns=[5, 6, 7])
        model.get_decoder().set_attn_implementation("latent")
        passes = Passes(partial(call_with_cache, model.get_decoder()), SplitCache(), inputs, keeps_cache=True)
        think(passes, thoughts)
    assert passes.joined().last_hidden_state.shape == (2, 9, width)


@pytest.mark.parametrize("attention, num_looks", [("latent", 1), ("sdpa", 3)])
def test_masks_of_latent_steps_are_made_without_a_look_at_the_padding(attention, num_looks, monkeypatch):
    """The library looks whether it can do without a mask; latent attention leaves it one look, in the first pass."""
    model = tiny_model("qwen2").train()
    model.get_decoder().set_attn_implementation(attention)
    looks, look = [], masking_utils.fast_all
    monkeypatch.setattr(masking_utils, "fast_all", lambda mask: looks.append(1) or look(mask))
    row = [*words(5, 1), *[model.config.latent_token_id] * 3, *words(3, 2)]
    model(**batch_of(model, [row, row]))
    assert len(looks) == num_looks


def test_labels_of_regrouped_rows_stay_with_their_tokens():
    model = tiny_model("gpt2").train()
    batch = ragged_batch(model)
    labels = last_labels(batch)
    loss = model(**batch, labels=labels).loss
    logits = model(**batch).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "latent"])
@pytest.mark.parametrize("config", [sliding_qwen2_config, mistral_config])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_window_of_columns_is_left_as_it_is(config, attention, tolerance):
    model = tiny_model(config()).train()
    batch = ragged_batch(model)
    with uncached(model):
        expected_loss, expected = loss_and_gradients(model, batch, use_cache=False)
    model.get_decoder().set_attn_implementation(attention)
    loss, gradients = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected_loss, abs=tolerance)
    assert_same_gradients(gradients, expected, tolerance)
    model.gradient_checkpointing_enable()
    for passes in ("all", "first"):
        model.checkpointed_passes = passes
        loss, gradients = loss_and_gradients(model, batch)
        assert loss == pytest.approx(expected_loss, abs=tolerance)
        assert_same_gradients(gradients, expected, tolerance)


@pytest.mark.parametrize("config", [sliding_qwen2_config, mistral_config])
@pytest.mark.parametrize("tolerance", [1e-4])
def test_a_window_over_a_plain_cache_is_left_as_it_is(config, tolerance):
    model = tiny_model(config())
    batch = ragged_batch(model)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        with uncached(model):
            expected = model(**batch, use_cache=False).logits
        logits = model(**batch, past_key_values=DynamicCache()).logits
    assert max_difference(logits[real], expected[real]) <= tolerance


@pytest.mark.parametrize("text", ["marian", "bart", "gpt2"])
@pytest.mark.parametrize("tolerance", [1e-4])
def test_rows_that_would_grow_long_are_left_as_they_are(text, tolerance):
    """Passes would be saved, and columns nearly doubled, past the positions of decoders that count them by column."""
    model = tiny_model(text)
    latent = model.config.latent_token_id
    rows = [
        [*words(3, 1), latent, *words(100, 2), latent, *words(10, 3)],
        [*words(110, 4), latent, *words(3, 5), latent, *words(2, 6)],
    ]
    batch = batch_of(model, rows)
    real = batch["attention_mask"].bool()
    passes = widths_of_passes(model)
    with torch.no_grad():
        logits = model(**batch).logits
        assert len(passes) == 4 + 1
        with uncached(model):
            expected = model(**batch, use_cache=False).logits
    assert max_difference(logits[real], expected[real]) <= tolerance


@pytest.mark.parametrize("num_columns, num_passes, most, expected", [
    (13, 4, None, True), (13 - COLUMNS_OF_A_PASS, 4, None, True), (12 - COLUMNS_OF_A_PASS, 4, None, False),
    (13, 4, 13, True), (13, 4, 12, False),
])  # fmt: skip
def test_a_layout_is_worth_a_few_columns_for_each_pass_that_it_saves(num_columns, num_passes, most, expected):
    layout = layout_of(*drawn(["aLbLcde", "..fghLi", "jkl.LmL", "nopqrst"]))  # 13 columns in 3 passes
    assert ShareColumns(most).is_worth(layout, num_columns, num_passes) is expected


def test_keys_that_are_quantized_or_offloaded_are_not_moved():
    model = tiny_model("qwen2")
    cache = QuantizedCache("fp8", model.config.text_config)
    assert model.generate(**ragged_batch(model), max_new_tokens=3, past_key_values=cache).shape[0] == 4
    assert can_move_keys(DynamicCache()) and not can_move_keys(cache)
    offloaded = DynamicCache()
    offloaded.offloading = True
    assert not can_move_keys(offloaded)


def test_attention_maps_asked_for_in_the_decoders_configuration_have_the_columns_of_the_call():
    model = tiny_model("qwen2")
    model.set_attn_implementation("eager")
    model.get_decoder().config.output_attentions = True
    batch = ragged_batch(model)
    num_columns = batch["input_ids"].shape[1]
    with torch.no_grad():
        assert model(**batch).attentions[0].shape[-2:] == (num_columns, num_columns)


@pytest.mark.parametrize("tolerance", [1e-5])
def test_token_type_ids_go_with_their_tokens(tolerance, ungrouped):
    model = tiny_model("gpt2")
    batch = ragged_batch(model)
    types = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]) + FIRST_WORD_ID
    with torch.no_grad():
        found = model(**batch, token_type_ids=types).logits
        plain = model(**batch).logits
        ungrouped()
        expected = model(**batch, token_type_ids=types).logits
    real = batch["attention_mask"].bool()
    assert max_difference(found[real], expected[real]) <= tolerance < max_difference(found[real], plain[real])
