"""Parallel thoughts equal their definition, and the sequential ones with as many updates; links end where they should.

Values and gradients, for every decoder, padding and latent column, with and without a cache that is kept.
"""

import pytest
import torch
from tiny import (
    CROSS_DECODERS,
    DECODERS,
    IN_TEXT_DECODERS,
    assert_same_gradients,
    batch_of,
    checkpoint_activations,
    last_labels,
    loss_and_gradients,
    max_difference,
    passes_over,
    ragged_batch,
    rows_alone,
    seq2seq_batch,
    seq2seq_rows_alone,
    sliding_qwen2_config,
    tiny_model,
    tiny_seq2seq,
    uncached,
    widths_of_passes,
    words,
)
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from mmcoconut.kernels.shared_columns import ShareColumns
from mmcoconut.passes_mmcoconut import column_lists, linked_thoughts
from mmcoconut.schedules_mmcoconut import ThinkTogether, check_can_update, think_together_uncached
from mmcoconut.thinking_mmcoconut import Thoughts
from mmcoconut.training.lora import add_lora


FAMILIES = (*DECODERS, "seq2seq")
MOST_LATENTS = 3  # of a row, in the ragged batches of tiny.py
NEW_TOKENS = 6


def model_of(text, iterations: int | None = None, **config):
    """A tiny model that thinks in parallel, or one thought after the other without a number of updates."""
    schedule = {} if iterations is None else {"thought_schedule": "jacobi", "jacobi_iterations": iterations}
    return tiny_seq2seq(**schedule, **config) if text == "seq2seq" else tiny_model(text, **schedule, **config)


def batch_for(model, padding="left") -> dict:
    return seq2seq_batch(model, padding) if model.config.is_encoder_decoder else ragged_batch(model, padding)


def set_schedule(model, iterations: int | None) -> None:
    model.config.thought_schedule = "sequential" if iterations is None else "jacobi"
    model.config.jacobi_iterations = iterations


def generate(model, batch, **options):
    """Sequences and the logits of every step, from one and the same state of the random numbers."""
    torch.manual_seed(0)
    recorded = {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(**batch, **{"max_new_tokens": NEW_TOKENS, **recorded, **options})


def row_with_latents(model, *columns, length=12):
    row = words(length, seed=1)
    for column in columns:
        row[column] = model.config.latent_token_id
    return row


def assert_same_loss_and_gradients(found, expected, tolerance):
    assert found[0] == pytest.approx(expected[0], abs=tolerance)
    assert_same_gradients(found[1], expected[1], tolerance)


# The parallel loop


@pytest.mark.whole_on_the_first("text")
@pytest.mark.parametrize("iterations", [1, 2, 4])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("text", FAMILIES)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_parallel_loop_and_its_gradients_equal_the_definition(text, padding, iterations, tolerance):
    model = model_of(text, iterations)
    batch = batch_for(model, padding)
    found = loss_and_gradients(model, batch)
    with uncached(model):
        expected = loss_and_gradients(model, batch, use_cache=False)
    assert_same_loss_and_gradients(found, expected, tolerance)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("text", FAMILIES)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_as_many_updates_as_thoughts_give_the_sequential_loop_and_fewer_another_model(text, padding, tolerance):
    model = model_of(text)
    batch = batch_for(model, padding)
    expected = loss_and_gradients(model, batch)
    for iterations in (MOST_LATENTS, MOST_LATENTS + 5):
        set_schedule(model, iterations)
        assert_same_loss_and_gradients(loss_and_gradients(model, batch), expected, tolerance)
    set_schedule(model, 1)
    assert abs(loss_and_gradients(model, batch)[0] - expected[0]) > 100 * tolerance


@pytest.mark.parametrize("thought_norm", ["embedding", "projection"])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_parallel_loop_equals_its_definition_however_thoughts_are_scaled(thought_norm, tolerance):
    model = model_of("qwen2", 2, thought_norm=thought_norm)
    batch = batch_for(model)
    found = loss_and_gradients(model, batch)
    with uncached(model):
        expected = loss_and_gradients(model, batch, use_cache=False)
    assert_same_loss_and_gradients(found, expected, tolerance)
    assert any("thought_feed" in name for name in found[1]) == (thought_norm == "projection")


@pytest.mark.whole_on_the_first("text")
@pytest.mark.parametrize("columns", [(1,), (3, 4, 5), (2, 6, 7), (1, 11), (11,), (9, 10, 11)])
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_latents_updated_together_may_stand_anywhere_after_the_first_token(text, columns, tolerance):
    model = model_of(text, 2)
    batch = batch_of(model, [row_with_latents(model, *columns)])
    with torch.no_grad():
        outputs = model(**batch, output_thoughts=True)
        with uncached(model):
            expected = model(**batch, use_cache=False, output_thoughts=True)
    assert max_difference(outputs.logits, expected.logits) <= tolerance
    assert max_difference(outputs.thoughts, expected.thoughts) <= tolerance


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("iterations, expected", [(1, [4, 6, 8]), (2, [4, 8, 12]), (3, [4, 8, 16]), (9, [4, 8, 16])])
def test_an_update_reads_what_the_thoughts_were_before_it(iterations, expected, cached):
    """Over a decoder that doubles 1, 2, …, with latents in the places of 3, 4 and 5; worked out by hand."""

    def doubling(inputs_embeds, past_key_values=None, **kwargs):
        if past_key_values is not None:
            past_key_values.update(inputs_embeds[:, None], inputs_embeds[:, None], 0)
        return BaseModelOutputWithPast(last_hidden_state=2 * inputs_embeds)

    embeds = torch.arange(1.0, 8).reshape(1, 7, 1)
    latents = torch.zeros(1, 7, dtype=torch.bool)
    latents[:, [2, 3, 4]] = True
    thoughts = Thoughts(latents, feed=lambda states: states, columns=[2, 3, 4])
    if cached:
        passes = passes_over(doubling, embeds)
        ThinkTogether(iterations)(passes, thoughts)
        states, read = passes.joined().last_hidden_state, torch.cat(passes.embeds_run, dim=1)
    else:
        states, read = think_together_uncached(doubling, embeds, thoughts, num_iterations=iterations)
    assert read.flatten().tolist() == [1, 2, *expected, 6, 7]
    assert states.flatten().tolist() == [2 * value for value in [1, 2, *expected, 6, 7]]


@pytest.mark.parametrize("iterations", [1, 2, MOST_LATENTS, 8])
@pytest.mark.parametrize("text", DECODERS)
def test_an_update_is_one_pass_over_the_latents_and_there_is_none_without_effect(text, iterations):
    model = model_of(text, iterations)
    batch, passes = ragged_batch(model), widths_of_passes(model)
    with torch.no_grad():
        model(**batch)
    columns, length = column_lists(batch["input_ids"] == model.config.latent_token_id)[0], batch["input_ids"].shape[1]
    updates = [columns[-1] - columns[0]] * min(iterations, MOST_LATENTS)
    assert passes == [columns[0], *updates, length - columns[0]]


@pytest.mark.parametrize("text", FAMILIES)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_row_does_not_depend_on_its_batch(text, tolerance):
    model = model_of(text, 2)
    batch = batch_for(model)
    alone = seq2seq_rows_alone if text == "seq2seq" else rows_alone
    mask = batch["decoder_attention_mask" if text == "seq2seq" else "attention_mask"].bool()
    with torch.no_grad():
        logits = model(**batch).logits
        for row, real, inputs in zip(logits, mask, alone(model, batch), strict=True):
            assert max_difference(row[real], model(**inputs).logits[0]) <= tolerance


@pytest.mark.parametrize("every_n_layers", [1, 2])
@pytest.mark.parametrize("text", FAMILIES)
@pytest.mark.parametrize("tolerance", [1e-6])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(text, every_n_layers, tolerance):
    model = model_of(text, 2).train()
    batch = batch_for(model)
    expected = loss_and_gradients(model, batch)
    checkpoint_activations(model, every_n_layers=every_n_layers)
    assert_same_loss_and_gradients(loss_and_gradients(model, batch), expected, tolerance)


@pytest.mark.parametrize("tolerance", [1e-6])
def test_latent_attention_gives_parallel_thoughts_the_same_gradients(tolerance):
    model = model_of("qwen2", 2)
    batch = batch_for(model)
    expected = loss_and_gradients(model, batch)
    model.set_attn_implementation("latent")
    assert_same_loss_and_gradients(loss_and_gradients(model, batch), expected, tolerance)


# Generation, and caches that are kept


@pytest.mark.whole_on_the_first("text")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 3},
        {"num_beams": 3},
        {"do_sample": True, "temperature": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("text", FAMILIES)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_generation_with_parallel_thoughts_equals_the_definition(text, options, tolerance):
    model = model_of(text, 2, seed=1)
    batch = batch_for(model)
    outputs = generate(model, batch, **options)
    of_definition = {
        name: value for name, value in options.items() if name not in ("cache_implementation", "use_cache")
    }
    with uncached(model):
        expected = generate(model, batch, use_cache=False, **of_definition)
    assert torch.equal(outputs.sequences, expected.sequences)
    for logits, expected_logits in zip(outputs.logits, expected.logits, strict=True):
        assert max_difference(logits, expected_logits) <= tolerance


@pytest.mark.parametrize("text", IN_TEXT_DECODERS)
def test_a_prompt_may_end_with_latents_that_are_updated_together(text):
    model = model_of(text, 1)
    batch = batch_of(model, [row_with_latents(model, 5, 11), row_with_latents(model, 10, 11)])
    with uncached(model):
        expected = generate(model, batch, use_cache=False).sequences
    assert torch.equal(generate(model, batch).sequences, expected)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_thoughts_may_come_first_over_a_cache_of_text(text, kind, tolerance):
    model = model_of(text, 2)
    row = torch.tensor([row_with_latents(model, 4, 5, 7)])
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=20)
    with torch.no_grad():
        expected = model(row).logits[:, 4:]
        cache = model(row[:, :4], past_key_values=cache).past_key_values
        outputs = model(row[:, 4:], past_key_values=cache)
    assert max_difference(outputs.logits, expected) <= tolerance
    assert int(outputs.past_key_values.get_seq_length()) == 12


@pytest.mark.parametrize("text", ["qwen2", *CROSS_DECODERS])
def test_thoughts_of_an_earlier_call_could_not_be_updated_any_more(text):
    model = model_of(text, 2)
    row = torch.tensor([row_with_latents(model, 4, 5)])
    with torch.no_grad():
        cache = model(row, use_cache=True).past_key_values
        model(row[:, :3], past_key_values=cache)  # more text
        with pytest.raises(ValueError, match="thoughts up to column 5, .*without past_key_values"):
            model(row, past_key_values=cache)
        cache.crop(-11)
        model(row, past_key_values=cache)
    if text == "qwen2":
        with pytest.raises(ValueError, match="without prefill_chunk_size"):
            generate(model, {"input_ids": row}, prefill_chunk_size=5)


class RoundedLayer(DynamicLayer):
    """A cache that does not keep all keys as they are, as quantized ones do not."""


@pytest.mark.parametrize("kind, message", [("rounded", "from a RoundedLayer"), ("offloaded", "an offloaded cache")])
def test_a_cache_that_does_not_keep_the_keys_as_they_are_is_refused(kind, message):
    model = model_of("qwen2", 2)
    row = torch.tensor([row_with_latents(model, 4, 5)])
    cache = Cache(layer_class_to_replicate=RoundedLayer if kind == "rounded" else DynamicLayer)
    with torch.no_grad():
        cache = model(row[:, :4], past_key_values=cache).past_key_values
        cache.offloading = kind == "offloaded"
        with pytest.raises(ValueError, match=f"{message}.*thought_schedule='sequential'"):
            model(row[:, 4:], past_key_values=cache)


@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_sliding_window_equals_the_definition(tolerance):
    model = model_of(sliding_qwen2_config(), 2).train()
    batch = batch_for(model)
    found = loss_and_gradients(model, batch)
    with uncached(model):
        assert_same_loss_and_gradients(loss_and_gradients(model, batch, use_cache=False), found, tolerance)


def test_shards_are_refused():
    with pytest.raises(ValueError, match="does not work with FSDP"):
        check_can_update(DynamicCache(), sharded=True)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"thought_schedule": "jacobi"}, "jacobi_iterations=None with thought_schedule='jacobi'"),
        ({"thought_schedule": "jacobi", "jacobi_iterations": 0}, "jacobi_iterations=0 .* at least 1 time"),
        ({"jacobi_iterations": 3}, "jacobi_iterations=3 is unused with thought_schedule='sequential'"),
        (
            {"thought_schedule": "jacobi", "jacobi_iterations": 3, "thought_mode": "pause"},
            "thought_schedule='jacobi' has no effect with thought_mode='pause'",
        ),
    ],
    ids=str,
)
def test_a_schedule_that_cannot_be_meant_is_refused_when_built_and_when_set_later(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**fields)
    model = tiny_model()
    for name, value in fields.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        type(model)(model.config)
    if fields.get("thought_schedule") == "jacobi" and "thought_mode" not in fields:
        with pytest.raises(ValueError, match=message):
            model(**ragged_batch(model))


# Truncated back-propagation


def detached_by_hand(model, num_detached: int):
    """Detach the states that the first thoughts of a call are made of; for rows alone, thought one after the other."""
    calls = []

    def detach(module, args):
        calls.append(1)
        return (args[0].detach(), *args[1:]) if len(calls) <= num_detached else args

    return model.model.thought_feed.register_forward_pre_hook(detach)


@pytest.mark.parametrize("bptt_thoughts, expected", [(0, []), (1, [5, 7]), (2, [3, 5, 7]), (3, [2, 3, 5, 7])])
def test_a_rows_last_thoughts_are_linked(bptt_thoughts, expected):
    latent_mask = torch.zeros(2, 8, dtype=torch.bool)
    latent_mask[0, [2, 3, 5]] = latent_mask[1, 7] = True
    linked = linked_thoughts(latent_mask, bptt_thoughts) & latent_mask
    assert linked.nonzero()[:, 1].sort().values.tolist() == expected


def test_no_limit_and_a_negative_one():
    latent_mask = torch.ones(1, 3, dtype=torch.bool)
    assert linked_thoughts(latent_mask, None) is None
    model = tiny_model()
    model.model.bptt_thoughts = -1
    with pytest.raises(ValueError, match="bptt_thoughts=-1 is less than 0"):
        model(**ragged_batch(model))


@pytest.mark.whole_on_the_first("text")
@pytest.mark.parametrize("bptt_thoughts", [0, 1, 2])
@pytest.mark.parametrize("iterations", [None, 2])
@pytest.mark.parametrize("text", FAMILIES)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_truncated_gradients_equal_those_of_the_definition(text, iterations, bptt_thoughts, tolerance):
    model = model_of(text, iterations)
    batch = batch_for(model)
    whole = loss_and_gradients(model, batch)
    model.model.bptt_thoughts = bptt_thoughts
    found = loss_and_gradients(model, batch)
    with uncached(model):
        expected = loss_and_gradients(model, batch, use_cache=False)
    assert_same_loss_and_gradients(found, expected, tolerance)
    assert found[0] == whole[0]  # values are what they were
    if iterations is None:
        moved = max(max_difference(found[1][name], whole[1][name]) for name in whole[1])
        assert moved > 100 * tolerance


@pytest.mark.parametrize("bptt_thoughts", [0, 1, 2])
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_ragged_batch_is_truncated_as_its_rows_alone_by_hand(text, bptt_thoughts, tolerance):
    """Rows have two, three, three and no latents, and equally many labels, so that the loss is their mean."""
    model = model_of(text)
    batch = ragged_batch(model)
    model.model.bptt_thoughts = bptt_thoughts
    loss, gradients = loss_and_gradients(model, batch)
    model.model.bptt_thoughts = None
    model.zero_grad()
    losses = []
    for row in rows_alone(model, batch):
        num_latents = int((row["input_ids"] == model.config.latent_token_id).sum())
        hook = detached_by_hand(model, max(0, num_latents - bptt_thoughts))
        losses.append(model(**row, labels=last_labels(row)).loss / 4)
        losses[-1].backward()
        hook.remove()
    assert loss == pytest.approx(sum(losses).item(), abs=tolerance)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {*gradients} - {"pixel_values"} == {*expected}
    assert max(max_difference(gradients[name], expected[name]) for name in expected) <= tolerance


@pytest.mark.parametrize("iterations", [None, MOST_LATENTS])
@pytest.mark.parametrize("tolerance", [1e-6])
def test_as_many_links_as_thoughts_are_all(iterations, tolerance):
    model = model_of("qwen2", iterations)
    batch = batch_for(model)
    expected = loss_and_gradients(model, batch)
    model.model.bptt_thoughts = MOST_LATENTS
    assert_same_loss_and_gradients(loss_and_gradients(model, batch), expected, tolerance)


@pytest.mark.parametrize("bptt_thoughts", [0, 1])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_parallel_thoughts_that_are_final_have_the_truncated_gradients_of_the_sequential_ones(
    bptt_thoughts, tolerance
):
    model = model_of("llama")
    batch = batch_for(model)
    model.model.bptt_thoughts = bptt_thoughts
    expected = loss_and_gradients(model, batch)
    set_schedule(model, MOST_LATENTS)
    assert_same_loss_and_gradients(loss_and_gradients(model, batch), expected, tolerance)


@pytest.mark.parametrize("iterations", [None, 2])
def test_no_parameter_loses_its_gradient_without_links(iterations):
    model = model_of("qwen2", iterations, thought_norm="projection")
    batch = batch_for(model)
    expected = loss_and_gradients(model, batch)[1]
    model.model.bptt_thoughts = 0
    found = loss_and_gradients(model, batch)[1]
    assert found.keys() == expected.keys()
    assert all(found[name].abs().max() > 0 for name in found if "thought_feed" in name and "bias" not in name)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("iterations", [None, 2])
@pytest.mark.parametrize("tolerance", [1e-6])
def test_truncation_goes_with_checkpointing_and_adapters(iterations, adapted, tolerance):
    model = model_of("qwen2", iterations).train()
    if adapted:
        add_lora(model, {"r": 4, "lora_dropout": 0.0})
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    model.model.bptt_thoughts = 1
    batch = batch_for(model)
    expected = loss_and_gradients(model, batch)
    with uncached(model):
        assert_same_loss_and_gradients(loss_and_gradients(model, batch, use_cache=False), expected, 10 * tolerance)
    checkpoint_activations(model)
    assert_same_loss_and_gradients(loss_and_gradients(model, batch), expected, tolerance)


def test_the_sequential_loop_has_no_links_to_cut_by_default():
    model = model_of("gpt2")
    assert model.model.bptt_thoughts is None
    assert model.model.schedule_of_call(None) == ShareColumns()
