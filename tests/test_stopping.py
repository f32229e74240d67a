"""Rows that stop thinking: a skipped latent leaves the row that it would be without it, in every family and way."""

import pytest
import torch
from tiny import (
    DECODERS,
    HIDDEN_SIZE,
    assert_same_gradients,
    batch_of,
    last_labels,
    loss_and_gradients,
    max_difference,
    mistral_config,
    ragged_batch,
    rows_alone,
    seq2seq_batch,
    seq2seq_rows_alone,
    tiny_model,
    tiny_processor,
    tiny_seq2seq,
    uncached,
    widths_of_passes,
    words,
)
from transformers import DynamicCache, StaticCache

from mmcoconut.caches_mmcoconut import ThoughtState
from mmcoconut.configuration_mmcoconut import MMCoconutConfig
from mmcoconut.data.conversations import further_turn
from mmcoconut.modeling_mmcoconut import MMCoconutForConditionalGeneration
from mmcoconut.passes_mmcoconut import carry_states, packed
from mmcoconut.rl.stops import first_thoughts, stop_log_probs
from mmcoconut.schedules_mmcoconut import INITIAL_BIAS, first_latents


NEW_TOKENS = 6


def prompts(model, *, ends: bool, num_latents: int = 4) -> dict:
    """Ragged questions with pictures, each with so many latents at its end, or, with `ends`, before an end marker."""
    config = model.config
    image = [config.image_token_id] * config.image_seq_length
    thoughts = [config.start_latent_token_id, *[config.latent_token_id] * num_latents]
    tail = [config.end_latent_token_id] if ends else []
    questions = [[*image, *words(4, 1)], [*words(2, 3), *image, *words(5, 4)], [*image, *words(1, 6)]]
    return batch_of(model, [[*question, *thoughts, *tail] for question in questions])


def shortened(model, row: dict, num_thoughts: int) -> dict:
    """A row alone with only its first thoughts."""
    is_latent = row["input_ids"][0] == model.config.latent_token_id
    kept = ~(is_latent & (is_latent.cumsum(0) > num_thoughts))
    return {**row, **{name: row[name][:, kept] for name in ("input_ids", "attention_mask")}}


def with_stops(model, batch: dict, counts: list[int]) -> dict:
    latents = batch["input_ids"] == model.config.latent_token_id
    left_out = latents & ~first_thoughts(latents, torch.tensor(counts))
    return {**batch, "attention_mask": batch["attention_mask"].masked_fill(left_out, 0)}


def with_head(model, scale: float = 40.0):
    """The model with a stop head that stops at about half of all states, at others in each row."""
    head = model.model.stop_head
    torch.nn.init.normal_(head.weight, std=scale / HIDDEN_SIZE)
    torch.nn.init.zeros_(head.bias)
    return model


def taken(model, batch: dict, threshold=0.5) -> torch.Tensor:
    """How many thoughts rows take (B,)."""
    with torch.no_grad():
        return model.model(**batch, stop_threshold=threshold, output_thoughts=True).thought_mask.sum(dim=1)


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("text", DECODERS)
def test_masked_latents_leave_the_row_without_them(text, ends):
    model, counts = tiny_model(text), [0, 3, 2]
    batch = prompts(model, ends=ends)
    with torch.no_grad():
        logits = model(**with_stops(model, batch, counts)).logits[:, -1]
        for row, count, given in zip(rows_alone(model, batch), counts, logits):
            expected = model(**shortened(model, row, count)).logits[0, -1]
            assert max_difference(given, expected) <= 2e-5
        assert max_difference(logits, model(**batch).logits[:, -1]) > 1e-2


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("text", ["gpt2", "qwen2", "bart"])
def test_generation_behind_masked_latents_is_that_of_the_shorter_rows(text, options, ends):
    model, counts = tiny_model(text), [0, 3, 2]
    batch = prompts(model, ends=ends)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    given = model.generate(**with_stops(model, batch, counts), **options)[:, batch["input_ids"].shape[1] :]
    for row, count, tokens in zip(rows_alone(model, batch), counts, given):
        alone = shortened(model, row, count)
        expected = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(tokens[: len(expected)], expected)


@pytest.mark.parametrize("text", ["gpt2", "qwen2", "marian"])
def test_loss_and_gradients_with_masked_latents_equal_the_definition(text):
    model = tiny_model(text)
    batch = ragged_batch(model, padding="right")
    latents = batch["input_ids"] == model.config.latent_token_id
    skipped = latents & (latents.long().cumsum(dim=1) == latents.sum(dim=1, keepdim=True))  # the last one of each row
    batch["attention_mask"] = batch["attention_mask"].masked_fill(skipped, 0)
    loss, gradients = loss_and_gradients(model, batch)
    with uncached(model):
        expected_loss, expected = loss_and_gradients(model, batch, use_cache=False)
    assert abs(loss - expected_loss) <= 1e-5
    assert_same_gradients(gradients, expected, 2e-5)


def test_checkpointed_training_with_masked_latents_has_the_same_gradients():
    model = tiny_model("gpt2").train()
    batch = with_stops(model, ragged_batch(model, padding="right"), [1, 2, 3, 0])
    _, expected = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable()
    _, gradients = loss_and_gradients(model, batch)
    assert_same_gradients(gradients, expected, 1e-6)


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("text", ["gpt2", "qwen2", "bart"])
def test_rows_that_stop_by_themselves_equal_the_rows_with_as_many_latents(text, ends):
    model = with_head(tiny_model(text, stop_head=True))
    batch = prompts(model, ends=ends, num_latents=6)
    counts = taken(model, batch)
    assert len(set(counts.tolist())) > 1, "the rows of this test stop at different thoughts"
    given = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for row, count, tokens in zip(rows_alone(model, batch), counts.tolist(), given):
        alone = shortened(model, row, count)
        expected = model.generate(**alone, stop_threshold=1.0, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert torch.equal(tokens, expected[0, alone["input_ids"].shape[1] :])


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"num_return_sequences": 2, "num_beams": 2}]
)
def test_ways_of_generation_give_what_masked_latents_give(options):
    model = with_head(tiny_model("gpt2", stop_head=True))
    batch = prompts(model, ends=False, num_latents=6)
    told = with_stops(model, batch, taken(model, batch).tolist())
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    assert torch.equal(model.generate(**batch, **options), model.generate(**told, stop_threshold=None, **options))


def test_split_keys_and_a_prefix_go_with_rows_that_stop():
    model = with_head(tiny_model("gpt2", stop_head=True))
    question = [*words(6, 1), *words(4, 2)]
    thoughts = [model.config.start_latent_token_id, *[model.config.latent_token_id] * 6]
    batch = batch_of(model, [[*question, *words(2, 5), *thoughts], [*question, *words(4, 6), *thoughts]])
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    expected = model.generate(**batch, **options)
    prefix = model.prefill(batch["input_ids"], batch["attention_mask"])
    assert len(prefix) == len(question)
    assert torch.equal(model.generate(**batch, prefix=prefix, **options), expected)
    model.set_attn_implementation("latent")
    assert torch.equal(model.generate(**batch, **options), expected)


def test_no_pass_is_made_for_thoughts_that_no_row_thinks():
    model = tiny_model("gpt2", stop_head=True)
    torch.nn.init.constant_(model.model.stop_head.bias, 10.0)  # all rows stop at once
    calls = widths_of_passes(model)
    with torch.no_grad():
        model.model(**prompts(model, ends=True, num_latents=6), stop_threshold=0.5)
    assert len(calls) == 2  # the question and the rest


def test_a_further_turn_knows_what_was_left_out_before():
    model = with_head(tiny_model("gpt2", stop_head=True))
    processor = tiny_processor(model, num_latents=6, markers="start")
    inputs = processor(images=None, text=["What is above?", "Which colour?"], return_tensors="pt")
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**inputs, **options)
    assert len(set(taken(model, inputs).tolist())) > 1
    further = further_turn(processor, first.sequences, inputs["attention_mask"], ["And below?", "And left of it?"])
    kept = model.generate(**further, past_key_values=first.past_key_values, **options)
    told = with_stops(model, inputs, taken(model, inputs).tolist())["attention_mask"]
    further["attention_mask"] = torch.cat([told, further["attention_mask"][:, told.shape[1] :]], dim=1)
    anew = model.generate(**further, **options)  # from nothing, with the mask of the first turn
    start = further["input_ids"].shape[1]
    assert torch.equal(kept.sequences[:, start:], anew.sequences[:, start:])


def test_decoders_of_an_encoder_decoder_stop():
    model = with_head(tiny_seq2seq(stop_head=True), scale=60.0)
    batch = seq2seq_batch(model, order=(0, 1, 2))
    with torch.no_grad():
        outputs = model.model(**batch, stop_threshold=0.5, output_thoughts=True)
    counts, most = outputs.thought_mask.sum(dim=1), (batch["decoder_input_ids"] == model.config.latent_token_id).sum(1)
    assert (counts < most).any()
    given = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    given = given[:, batch["decoder_input_ids"].shape[1] :]
    for row, count, tokens in zip(seq2seq_rows_alone(model, batch), counts.tolist(), given):
        decoder = {name: row[f"decoder_{name}"] for name in ("input_ids", "attention_mask")}
        short = shortened(model, decoder, count)
        row |= {f"decoder_{name}": tensor for name, tensor in short.items()}
        expected = model.generate(**row, stop_threshold=1.0, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert torch.equal(tokens, expected[0, short["input_ids"].shape[1] :])


def test_stop_logits_are_the_heads_of_the_states_before_each_latent():
    model = with_head(tiny_model("gpt2", stop_head=True))
    batch = with_stops(model, prompts(model, ends=False), [4, 1, 0])
    with torch.no_grad():
        outputs = model.model(**batch, output_stop_logits=True, output_hidden_states=True)
        head, states = model.model.stop_head, outputs.last_hidden_state
        assert outputs.stop_logits.shape == (3, 4)
        assert max_difference(outputs.stop_logits, head(states[:, -5:-1])) == 0
        # A row that has stopped keeps the state at which it did.
        assert max_difference(outputs.stop_logits[2], outputs.stop_logits[2, :1]) == 0
        assert max_difference(outputs.stop_logits[1, 1:], outputs.stop_logits[1, 1:2]) == 0


def test_thresholds_of_each_latent_decide_alone():
    model = tiny_model("gpt2", stop_head=True)  # σ(-2) = 0.12 everywhere
    thresholds = torch.tensor([[0.5, 0.5, 0.1, 0.5], [0.1, 0.5, 0.5, 0.5], [0.5] * 4])
    assert taken(model, prompts(model, ends=True), thresholds).tolist() == [2, 0, 4]


def test_log_probabilities_of_all_numbers_of_thoughts_sum_to_one():
    logits, latents = torch.randn(1, 4).expand(5, 4), torch.ones(5, 4, dtype=torch.bool)
    log_probs = stop_log_probs(logits, first_thoughts(latents, torch.arange(5)), latents)
    assert log_probs.exp().sum().item() == pytest.approx(1.0, abs=1e-6)
    p = logits[0].sigmoid()
    assert log_probs[2].exp().item() == pytest.approx(((1 - p[0]) * (1 - p[1]) * p[2]).item(), rel=1e-5)


def test_states_are_carried_over_skipped_columns_only():
    states = torch.arange(5.0)[None, :, None]
    skipped = torch.tensor([[True, False, True, True, False]])
    assert carry_states(states, skipped, torch.tensor([[9.0]]))[0, :, 0].tolist() == [9.0, 1.0, 1.0, 1.0, 4.0]
    assert first_latents(torch.tensor([[True, True, False, True]])).tolist() == [[True, False, False, True]]
    assert packed(torch.arange(4.0)[None], torch.tensor([[False, True, False, True]])).tolist() == [[1.0, 3.0]]


def test_a_stop_head_survives_saving_and_rarely_stops_when_new(tmp_path):
    model = with_head(tiny_model("gpt2", stop_head=True))
    model.save_pretrained(tmp_path)
    loaded, info = MMCoconutForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded.model.stop_head.weight, model.model.stop_head.weight)
    plain = tiny_model("gpt2")
    plain.save_pretrained(tmp_path / "plain")
    with_new_head = MMCoconutForConditionalGeneration.from_pretrained(tmp_path / "plain", stop_head=True)
    assert with_new_head.model.stop_head.bias.tolist() == [INITIAL_BIAS]
    assert not with_new_head.model.stop_head.weight.any()


@pytest.mark.parametrize("text", DECODERS)
def test_noise_changes_thoughts_as_the_definition_says(text):
    model = tiny_model(text)
    batch, noise = ragged_batch(model), torch.randn(4, 3, HIDDEN_SIZE)
    with torch.no_grad():
        given, plain = model(**batch, thought_noise=noise).logits, model(**batch).logits
        with uncached(model):
            expected = model(**batch, thought_noise=noise, use_cache=False).logits
    real = batch["attention_mask"].bool()
    assert max_difference(given[real], expected[real]) <= 2e-5
    assert max_difference(given[real], plain[real]) > 1e-2


PARALLEL = {"thought_schedule": "jacobi", "jacobi_iterations": 2}


@pytest.mark.parametrize("text, schedule", [*((text, {}) for text in DECODERS), ("gpt2", PARALLEL)])
def test_gradients_with_noise_on_thoughts_equal_the_definition(text, schedule):
    model = tiny_model(text, **schedule)
    batch, noise = ragged_batch(model, padding="right"), torch.randn(4, 3, HIDDEN_SIZE)
    loss, gradients = loss_and_gradients(model, batch, thought_noise=noise)
    with uncached(model):
        expected_loss, expected = loss_and_gradients(model, batch, thought_noise=noise, use_cache=False)
    assert abs(loss - expected_loss) <= 1e-5
    assert_same_gradients(gradients, expected, 3e-5)


def test_noise_is_measured_in_the_thoughts_own_size():
    model = tiny_model("gpt2")
    batch = prompts(model, ends=True, num_latents=1)
    noise = torch.randn(3, 1, HIDDEN_SIZE)
    with torch.no_grad():
        plain = model.model(**batch, output_thoughts=True).thoughts  # (B, 1, D)
        noisy = model.model(**batch, output_thoughts=True, thought_noise=noise).thoughts
    size = plain.square().mean(dim=-1, keepdim=True).sqrt()
    assert max_difference(noisy - plain, size * noise) <= 1e-5


def test_generation_reads_the_noise_in_its_prefill():
    model = tiny_model("gpt2")
    batch, noise = prompts(model, ends=True), torch.randn(3, 4, HIDDEN_SIZE)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    given = model.generate(**batch, thought_noise=noise, **options)
    with uncached(model):
        expected = model.generate(**batch, thought_noise=noise, use_cache=False, **options)
    assert torch.equal(given, expected)
    with pytest.raises(ValueError, match="3 rows with 2 thoughts, but this call has 3 rows with up to 4"):
        model.generate(**batch, thought_noise=noise[:, :2], **options)


def test_what_cannot_stop_says_so():
    model = tiny_model("gpt2")
    batch = prompts(model, ends=True)
    with pytest.raises(ValueError, match="config.stop_head is False"):
        model(**batch, stop_threshold=0.5)
    model = with_head(tiny_model("gpt2", stop_head=True))
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**batch, max_new_tokens=2, prefill_chunk_size=4)
    with pytest.raises(ValueError, match="3 latents, but this call has 3 rows with up to 4"):
        model(**batch, stop_threshold=torch.rand(3, 3))
    outputs = model(**batch, stop_threshold=0.5, use_cache=True)
    following = torch.full((3, 1), words(1, 1)[0])
    with pytest.raises(ValueError, match="pass the attention_mask"):
        model(input_ids=following, past_key_values=outputs.past_key_values)
    model.train()
    with pytest.raises(ValueError, match="cannot stop early in training"):
        model(**batch, labels=last_labels(batch), stop_threshold=0.5)
    for wrong in ({"thought_schedule": "jacobi", "jacobi_iterations": 2}, {"thought_mode": "pause"}):
        with pytest.raises(ValueError, match="stop_head=True"):
            MMCoconutConfig(stop_head=True, **wrong)


def two_turns(model, num_latents: int = 4) -> dict:
    """Two rows of two turns, each with so many latents, of different lengths."""
    config = model.config
    thoughts = [config.start_latent_token_id, *[config.latent_token_id] * num_latents]
    rows = [[*words(5, 1), *thoughts, *words(3, 2), *thoughts], [*words(2, 3), *thoughts, *words(5, 4), *thoughts]]
    return batch_of(model, rows)


def test_each_turn_stops_for_itself():
    model = tiny_model("gpt2", stop_head=True)  # σ(-2) = 0.12 everywhere
    batch = two_turns(model)
    thresholds = torch.full((2, 8), 0.5)
    thresholds[0, 1] = thresholds[0, 6] = thresholds[1, 0] = 0.1
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
    given = model.generate(**batch, stop_threshold=thresholds, **options)
    latents = batch["input_ids"] == model.config.latent_token_id
    stopped = ThoughtState.of(given.past_key_values).attention_mask[:, : latents.shape[1]].bool()
    thought = [row[of_row].tolist() for row, of_row in zip(stopped, latents)]
    assert thought[0] == [True, False, False, False, True, True, False, False]
    assert thought[1] == [False] * 4 + [True] * 4
    told = {**batch, "attention_mask": batch["attention_mask"].masked_fill(latents & ~stopped, 0)}
    assert torch.equal(given.sequences, model.generate(**told, stop_threshold=None, **options).sequences)


def test_log_probabilities_of_turns_add_up():
    latents = torch.tensor([[True, True, False, True, True, True]])
    logits = torch.randn(1, 5)
    kept = torch.tensor([[True, False, False, False, False, False]])  # one in the first turn, then none
    p = logits[0].sigmoid()
    expected = (1 - p[0]) * p[1] * p[2]
    assert stop_log_probs(logits, kept, latents).exp().item() == pytest.approx(expected.item(), rel=1e-5)
    counts = torch.tensor([2])
    assert first_thoughts(latents, counts).tolist() == [[True, True, False, True, True, False]]


def test_rows_that_stop_read_the_noise_of_their_thoughts():
    model = with_head(tiny_model("gpt2", stop_head=True))
    batch, noise = prompts(model, ends=False, num_latents=6), torch.randn(3, 6, HIDDEN_SIZE)
    with torch.no_grad():
        outputs = model(**batch, stop_threshold=0.5, thought_noise=noise)
        told = {**batch, "attention_mask": outputs.attention_mask}
        assert (outputs.attention_mask != batch["attention_mask"]).any()
        assert max_difference(outputs.logits[:, -1], model(**told, thought_noise=noise).logits[:, -1]) <= 1e-5
        assert max_difference(outputs.logits[:, -1], model(**told).logits[:, -1]) > 1e-2


@pytest.mark.parametrize("way", ["crop", "reset"])
def test_a_cache_that_is_used_again_forgets_what_was_left_out(way):
    model = tiny_model("gpt2", stop_head=True)
    batch = with_stops(model, prompts(model, ends=True), [1, 0, 2])
    marker = (batch["input_ids"] == model.config.start_latent_token_id).nonzero()[0, 1].item()
    whole = {**batch, "attention_mask": (batch["input_ids"] != model.generation_config.pad_token_id).long()}
    cache = StaticCache(config=model.config.text_config, max_cache_len=64) if way == "reset" else DynamicCache()
    with torch.no_grad():
        expected = model(**whole, use_cache=False).logits[:, -1]
        model(**batch, use_cache=True, past_key_values=cache)
        if way == "reset":
            cache.reset()
            rest = whole
        else:
            cache.crop(marker - batch["input_ids"].shape[1])
            rest = {"input_ids": batch["input_ids"][:, marker:], "attention_mask": whole["attention_mask"]}
        given = model(**rest, past_key_values=cache, use_cache=True).logits[:, -1]
    assert max_difference(given, expected) <= 1e-5


def test_what_was_left_out_does_not_count_for_the_loss():
    model = tiny_model("gpt2")
    row = [*words(4, 1), model.config.start_latent_token_id, *words(2, 2), model.config.latent_token_id]
    batch = batch_of(model, [row])
    batch["attention_mask"][0, -1] = 0
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, -2] = batch["input_ids"][0, -2]
    assert model(**batch, labels=labels).loss.isfinite()


def test_a_sliding_window_that_is_shorter_than_the_sequence_is_refused():
    model = tiny_model(mistral_config(window=6))
    with pytest.raises(ValueError, match="window of 6, and the sequence has"):
        model(**with_stops(model, prompts(model, ends=True), [1, 0, 2]))


def test_a_prefix_ends_before_thoughts_that_rows_may_leave_out():
    model = with_head(tiny_model("gpt2", stop_head=True))
    batch = two_turns(model)
    row = {name: batch[name][:1] for name in ("input_ids", "attention_mask")}
    row = {name: tensor[:, row["attention_mask"][0].bool()] for name, tensor in row.items()}
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    prefix = model.prefill(row["input_ids"])
    assert len(prefix) == 6  # five words and the marker
    assert torch.equal(model.generate(**row, prefix=prefix, **options), model.generate(**row, **options))
    with pytest.raises(ValueError, match="1 <= num_tokens <= 6"):
        model.prefill(row["input_ids"], num_tokens=8)


def test_given_positions_close_up_over_latents_that_are_left_out():
    """As they count on after the images of a vision-language model, whatever the numbers before."""
    model = tiny_model("qwen2", stop_head=True)
    ids = torch.tensor([[*words(4, 1), *[model.config.latent_token_id] * 2, *words(3, 2)]])
    positions = torch.tensor([[0, 3, 6, 7, 8, 9, 10, 11, 12]])
    without = torch.tensor([[0, 3, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        found = model(input_ids=ids, position_ids=positions, stop_threshold=-1.0).logits  # stops at once
        words_alone = model(input_ids=torch.cat([ids[:, :4], ids[:, 6:]], dim=1), position_ids=without).logits
        whole = model(input_ids=ids, position_ids=positions).logits
        assert torch.allclose(found[:, 6:], words_alone[:, 4:], atol=1e-5)
        assert torch.equal(model(input_ids=ids, position_ids=positions, stop_threshold=1.0).logits, whole)


def test_stop_logits_of_a_first_latent_read_the_state_before_it_also_with_pause():
    model = tiny_model("qwen2", stop_head=True)
    model.config.thought_mode = "pause"
    torch.nn.init.normal_(model.model.stop_head.weight)
    ids = torch.tensor([[*words(5, 1), *[model.config.latent_token_id] * 2, *words(2, 2)]])
    with torch.no_grad():
        whole = model(input_ids=ids, output_stop_logits=True).stop_logits
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        found = model(input_ids=ids[:, 5:], past_key_values=cache, output_stop_logits=True).stop_logits
    assert torch.allclose(found, whole, atol=1e-5)
