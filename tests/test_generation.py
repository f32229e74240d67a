"""Stock `generate()`: every way of it gives what the model gives without any cache, on ragged batches with images."""

import copy
import threading

import pytest
import torch
from tiny import (
    CROSS_DECODERS,
    DECODERS,
    IN_TEXT_DECODERS,
    TEXT_CONFIGS,
    batch_of,
    last_labels,
    max_difference,
    plain_language_model,
    ragged_batch,
    random_pixels,
    rows_alone,
    sliding_qwen2_config,
    tiny_model,
    tiny_tokenizer,
    uncached,
    words,
)
from transformers import CompileConfig, DynamicCache, GenerationConfig, TextIteratorStreamer, TextStreamer

from mmcoconut.build.tokens import add_special_tokens
from mmcoconut.caches_mmcoconut import text_cache
from mmcoconut.configuration_mmcoconut import TOKEN_ID_FIELDS
from mmcoconut.kernels import latent
from mmcoconut.kernels.latent import MAX_QUERIES, SplitCache
from mmcoconut.modeling_mmcoconut import MMCoconutForConditionalGeneration
from mmcoconut.passes_mmcoconut import column_lists


NEW_TOKENS = 8
UNTIED = 4  # of the weights: with other seeds two words, or two beams, tie, and rounding chooses between them


def generate(model, batch, **options):
    """Sequences and the logits of every step, from one and the same state of the random numbers."""
    torch.manual_seed(0)
    recorded = {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(**batch, **{"max_new_tokens": NEW_TOKENS, **recorded, **options})


def assert_equals_reference(model, batch, tolerance, *, reference=None, **options):
    """`generate(**options)` against a definition that recomputes everything for each token and each thought.

    `reference` are the options of the definition, for ways of decoding that must give what another way gives.
    """
    with uncached(model):
        expected = generate(model, batch, use_cache=False, **(options if reference is None else reference))
    outputs = generate(model, batch, **options)
    assert torch.equal(outputs.sequences, expected.sequences)
    assert len(outputs.logits) == len(expected.logits) or reference is not None
    for logits, expected_logits in zip(outputs.logits, expected.logits):
        assert max_difference(logits, expected_logits) <= tolerance
    return outputs


def text_batch(model, *latents_of_rows, length=12):
    """Rows of text with latents at the given columns."""
    rows = [words(length, seed) for seed, _ in enumerate(latents_of_rows)]
    for row, columns in zip(rows, latents_of_rows):
        for column in columns:
            row[column] = model.config.latent_token_id
    return batch_of(model, rows)


def test_thoughts_and_images_decide_what_is_generated():
    """Without this, equality with the definition would say little."""
    model = tiny_model("qwen2")
    batch = ragged_batch(model)
    sequences = generate(model, batch).sequences
    blind = generate(model, {**batch, "pixel_values": batch["pixel_values"].flip(0)}).sequences
    model.config.thought_mode = "pause"
    unfed = generate(model, batch).sequences
    assert (sequences != unfed).any(dim=1).tolist() == [True, True, True, False]
    assert (sequences != blind).any(dim=1).tolist() == [True, True, False, True]


@pytest.mark.parametrize("image_fusion", ["replace", "add"])
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_greedy_generation_equals_the_definition_in_a_batch_and_alone(text, image_fusion, tolerance):
    model = tiny_model(text, image_fusion=image_fusion)
    batch = ragged_batch(model)
    together = assert_equals_reference(model, batch, tolerance).sequences[:, batch["input_ids"].shape[1] :]
    for row, alone in zip(together, rows_alone(model, batch)):
        answer = assert_equals_reference(model, alone, tolerance).sequences[0, alone["input_ids"].shape[1] :]
        assert torch.equal(row[: len(answer)], answer)
        assert (row[len(answer) :] == model.generation_config.pad_token_id).all()


@pytest.mark.whole_on_the_first("text")
@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "temperature": 1.5},
        {"do_sample": True, "top_k": 20, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2},
        {"repetition_penalty": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_every_decoding_strategy_equals_the_definition(text, options, tolerance):
    model = tiny_model(text, seed=UNTIED)
    reference = {key: value for key, value in options.items() if key != "use_cache"}
    assert_equals_reference(model, ragged_batch(model), tolerance, reference=reference, **options)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("text", [*DECODERS, "sliding"])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_static_cache_equals_the_definition(text, num_beams, tolerance):
    model = tiny_model(sliding_qwen2_config() if text == "sliding" else text, seed=UNTIED)
    options = {"num_beams": num_beams}
    batch = ragged_batch(model)
    assert_equals_reference(model, batch, tolerance, reference=options, cache_implementation="static", **options)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}], ids=str)
@pytest.mark.parametrize("window", [2, 6])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_sliding_window_equals_the_definition(window, options, tolerance):
    model = tiny_model(sliding_qwen2_config(window))
    reference = {key: value for key, value in options.items() if key != "prefill_chunk_size"}
    assert_equals_reference(model, ragged_batch(model), tolerance, reference=reference, **options)


@pytest.mark.whole_on_the_first("text")
@pytest.mark.parametrize(
    "text, cache_implementation", [*((text, "dynamic") for text in IN_TEXT_DECODERS), ("qwen2", "static")]
)
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 8, "a chunk begins with a latent", 64])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_prefill_in_chunks_equals_the_definition(text, chunk_size, cache_implementation, tolerance):
    model = tiny_model(text)
    batch = ragged_batch(model)
    if isinstance(chunk_size, str):
        chunk_size = column_lists(batch["input_ids"] == model.config.latent_token_id)[0][1]
    chunks = {"prefill_chunk_size": chunk_size, "cache_implementation": cache_implementation}
    assert_equals_reference(model, batch, tolerance, reference={}, **chunks)


@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_prompt_lookup_equals_the_definition(text, tolerance):
    model = tiny_model(text)
    for row in rows_alone(model, ragged_batch(model)):
        assert_equals_reference(model, row, tolerance, reference={}, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_language_model_as_assistant_changes_nothing(text, tolerance):
    model = tiny_model(text)
    assistant = plain_language_model(tiny_model(text, seed=1))
    assistant.generation_config.pad_token_id = model.generation_config.pad_token_id
    for row in rows_alone(model, ragged_batch(model)):
        assert_equals_reference(model, row, tolerance, reference={}, assistant_model=assistant)


def narrow_model(text):
    """A thinking model of half the width, for images of the same size."""
    config = TEXT_CONFIGS[text]()
    config.hidden_size //= 2
    return tiny_model(config, seed=1, image_fusion="cross_attention" if text in CROSS_DECODERS else "replace")


@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_thinking_assistant_of_another_width_is_shown_the_images_and_changes_nothing(text, tolerance):
    model, assistant = tiny_model(text), narrow_model(text)
    shown = []
    assistant.model.vision_tower.register_forward_hook(
        lambda module, args, kwargs, output: shown.append(len(output.last_hidden_state)), with_kwargs=True
    )
    rows = rows_alone(model, ragged_batch(model))
    for row in rows:
        assert_equals_reference(model, row, tolerance, reference={}, assistant_model=assistant)
    assert set(shown) == {len(row["pixel_values"]) for row in rows if "pixel_values" in row} == {1, 2}


@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_prompt_may_end_with_a_latent(text, tolerance):
    model = tiny_model(text)
    assert_equals_reference(model, text_batch(model, (5, 11), (10, 11)), tolerance)


@pytest.mark.parametrize("config", [{"thought_norm": "embedding"}, {"thought_norm": "projection"}], ids=str)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_scaled_thoughts_generate_what_the_definition_does(config, tolerance):
    model = tiny_model("qwen2", **config)
    assert_equals_reference(model, ragged_batch(model), tolerance, reference={}, prefill_chunk_size=4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_generation_from_embeddings_equals_that_from_ids(options, tolerance):
    model = tiny_model("qwen2")
    batch = ragged_batch(model)
    expected = generate(model, batch, **options)
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    outputs = generate(model, {**batch, "inputs_embeds": embeds}, **options)
    assert torch.equal(outputs.sequences, expected.sequences[:, -outputs.sequences.shape[1] :])
    for logits, expected_logits in zip(outputs.logits, expected.logits):
        assert max_difference(logits, expected_logits) <= tolerance


def latent_model(text, seed=1, **config):
    model = tiny_model(text, seed=seed, **config)
    model.get_decoder().set_attn_implementation("latent")
    return model


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"max_new_tokens": MAX_QUERIES + 4}],
    ids=str,
)
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_keys_that_are_never_joined_generate_what_the_definition_does(text, options, tolerance):
    model = latent_model(text, seed=UNTIED)
    outputs = assert_equals_reference(model, ragged_batch(model), tolerance, **options)
    assert isinstance(text_cache(outputs.past_key_values), SplitCache)


@pytest.mark.parametrize("chunk_size", [2, 5, MAX_QUERIES + 3])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_split_keys_take_a_prefill_in_chunks(chunk_size, tolerance):
    model = latent_model("qwen2")
    outputs = assert_equals_reference(
        model, ragged_batch(model), tolerance, reference={}, prefill_chunk_size=chunk_size
    )
    assert isinstance(outputs.past_key_values, SplitCache)


@pytest.mark.parametrize("text", IN_TEXT_DECODERS)
def test_decoding_reads_the_prefix_where_the_first_pass_left_it(text):
    model = latent_model(text)
    seen = []

    def spy(step, key, value):
        seen.append((key.prefix.data_ptr(), key.prefix.shape[2]))
        return latent.attention_forward(step, key, value)

    pytorch = latent.PYTORCH._replace(attention_forward=spy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent, "PYTORCH", pytorch)
        generate(model, text_batch(model, [9, 10]), min_new_tokens=NEW_TOKENS)
    assert len(seen) == (2 + NEW_TOKENS - 1) * 2  # thoughts and tokens · layers
    assert len(set(seen)) == 2 and {length for _, length in seen} == {9}


@pytest.mark.parametrize(
    "text, config, options",
    [
        ("qwen2", {}, {"prompt_lookup_num_tokens": 2}),
        ("qwen2", {}, {"cache_implementation": "static"}),
        ("qwen2", {"thought_schedule": "jacobi", "jacobi_iterations": 2}, {}),
        (sliding_qwen2_config(), {}, {}),
    ],
    ids=["assisted", "static", "jacobi", "sliding"],
)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_what_must_read_joined_keys_keeps_the_librarys_cache(text, config, options, tolerance):
    model = latent_model(text, **config)
    row = rows_alone(model, ragged_batch(model))[0]
    outputs = assert_equals_reference(model, row, tolerance, reference={}, **options)
    assert not isinstance(text_cache(outputs.past_key_values), SplitCache)


@pytest.mark.parametrize("change", ["crop", "select", "repeat"])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_split_cache_can_be_cropped_selected_and_repeated(change, tolerance):
    model = latent_model("qwen2")
    batch = text_batch(model, [4, 5], [4, 8], [5, 6])
    ids = batch["input_ids"]
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        if change == "crop":
            cache.crop(-3)
            kept = ids[:, :-3]
        elif change == "select":
            cache.batch_select_indices(torch.tensor([2, 0]))
            kept = ids[[2, 0]]
        else:
            cache.batch_repeat_interleave(2)
            kept = ids.repeat_interleave(2, dim=0)
        more = torch.tensor([words(3, 7)]).expand(len(kept), -1)
        found = model(more, past_key_values=cache).logits
        with uncached(model):
            expected = model(torch.cat([kept, more], dim=1), use_cache=False).logits[:, -3:]
    assert isinstance(cache, SplitCache)
    assert max_difference(found, expected) <= tolerance


def test_a_cache_through_which_gradients_may_flow_is_the_librarys():
    model = latent_model("qwen2")
    batch = text_batch(model, [4, 5])
    assert isinstance(model(**batch, use_cache=True).past_key_values, DynamicCache)


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static", "split"])
@pytest.mark.parametrize("text", [*IN_TEXT_DECODERS, "sliding"])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_further_turn_thinks_on_over_the_cache_of_the_first(text, cache_implementation, tolerance):
    """The second turn brings an image and latents to each row; only its own image is given again."""
    model = tiny_model(sliding_qwen2_config() if text == "sliding" else text)
    config = model.config
    first = ragged_batch(model)
    exactly = {"max_new_tokens": 4, "min_new_tokens": 4}
    cache = {"cache_implementation": cache_implementation}
    if cache_implementation == "split":
        model.get_decoder().set_attn_implementation("latent")
        cache = {}
    if cache_implementation == "static":
        cache["max_cache_len"] = 64
    answered = generate(model, first, **exactly, **cache)

    image, latent = [config.image_token_id] * config.image_seq_length, config.latent_token_id
    turn = torch.tensor(
        [[*words(2, seed), *image, *words(1, seed), latent, latent, *words(2, 9)] for seed in range(4)]
    )
    input_ids = torch.cat([answered.sequences, turn], dim=1)
    added = input_ids.shape[1] - first["input_ids"].shape[1]
    attention_mask = torch.nn.functional.pad(first["attention_mask"], (0, added), value=1)
    both = {"input_ids": input_ids, "attention_mask": attention_mask}
    pixels = random_pixels(4, seed=5)
    outputs = generate(model, {**both, "pixel_values": pixels, "past_key_values": answered.past_key_values}, **exactly)

    old = first["pixel_values"]  # one, two, no and one image a row
    in_reading_order = torch.cat([old[:1], pixels[:1], old[1:3], pixels[1:2], pixels[2:3], old[3:], pixels[3:]])
    with uncached(model):
        expected = generate(model, {**both, "pixel_values": in_reading_order}, use_cache=False, **exactly)
    assert torch.equal(outputs.sequences, expected.sequences)
    for logits, expected_logits in zip(outputs.logits, expected.logits):
        assert max_difference(logits, expected_logits) <= tolerance


@pytest.mark.parametrize("text", CROSS_DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_cross_attention_takes_chunks_of_text_and_refuses_an_image_after_the_first(text, tolerance):
    model = tiny_model(text)
    image, latent = model.config.image_token_id, model.config.latent_token_id
    early = batch_of(model, [[*words(2, seed), image, latent, *words(6, seed)] for seed in range(2)])
    assert_equals_reference(model, early, tolerance, reference={}, prefill_chunk_size=4)
    late = batch_of(model, [[*words(6, seed), image, latent, *words(2, seed)] for seed in range(2)])
    with pytest.raises(ValueError, match="all images in the first call"):
        generate(model, late, prefill_chunk_size=4)


def compiled(*, fullgraph: bool) -> dict:
    """Options of a static cache with compiled steps; `generate` compiles on accelerators only unless it is told to."""
    compile_config = CompileConfig(fullgraph=fullgraph, backend="eager", mode=None)
    compile_config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": compile_config}


@pytest.mark.parametrize("text", ["gpt2", "marian", "sliding"])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_compiled_steps_are_one_graph_and_equal_the_definition(fresh_compiler, text, tolerance):
    model = tiny_model(sliding_qwen2_config() if text == "sliding" else text)
    assert_equals_reference(model, ragged_batch(model), tolerance, reference={}, **compiled(fullgraph=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("tolerance", [1e-5])
def test_compiled_chunks_with_latents_at_different_columns_equal_the_definition(fresh_compiler, tolerance):
    model = tiny_model("gpt2")
    batch = text_batch(model, (3, 8))
    options = {"prefill_chunk_size": 6, "max_new_tokens": 3, **compiled(fullgraph=False)}
    assert_equals_reference(model, batch, tolerance, reference={"max_new_tokens": 3}, **options)


def test_a_compiled_chunk_of_one_latent_is_refused_not_misread(fresh_compiler):
    model = tiny_model("gpt2")
    with pytest.raises(RuntimeError, match="cannot read a thought"):
        generate(model, text_batch(model, (6,), length=7), prefill_chunk_size=6, **compiled(fullgraph=False))


def test_a_compiled_step_leaves_no_state_of_an_earlier_column(fresh_compiler):
    """A cache that was cut and filled again by a compiled step is as long as before, with another last column."""
    model = tiny_model("gpt2")
    ids, latent = torch.tensor([words(8, 1)]), torch.tensor([[model.config.latent_token_id]])
    step = torch.compile(model, backend="eager")
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(-1)
        step(torch.tensor([[9]]), past_key_values=cache)
        assert cache.get_seq_length() == 8
        with pytest.raises(ValueError, match="no token before it"):
            model(latent, past_key_values=cache)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}, {"use_cache": False}, {"do_sample": True}],
    ids=str,
)
def test_the_vision_tower_runs_once_a_generation(options):
    model = tiny_model()
    runs = []
    model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    generate(model, ragged_batch(model), **options)
    assert len(runs) == 1


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_special_tokens_are_never_generated(options):
    """Even from a head that would give them every probability."""
    model = tiny_model()
    special = [getattr(model.config, field) for field in TOKEN_ID_FIELDS]
    boost = torch.zeros(model.config.text_config.vocab_size)
    boost[special] = 100.0
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + boost)
    batch = ragged_batch(model)
    generated = generate(model, batch, **options).sequences[:, batch["input_ids"].shape[1] :]
    assert not torch.isin(generated, torch.tensor(special)).any()
    assert torch.isin(generate(model, batch, suppress_tokens=[]).logits[0].argmax(-1), torch.tensor(special)).all()


def test_a_model_made_of_its_configuration_suppresses_special_tokens_and_a_users_choice_is_kept(tmp_path):
    config = tiny_model().config
    special = [getattr(config, field) for field in TOKEN_ID_FIELDS]
    model = MMCoconutForConditionalGeneration(copy.deepcopy(config))
    assert model.generation_config.suppress_tokens == special
    model.save_pretrained(tmp_path)
    assert MMCoconutForConditionalGeneration.from_pretrained(tmp_path).generation_config.suppress_tokens == special
    model.generation_config.suppress_tokens = [*special, 7]
    model.save_pretrained(tmp_path)
    loaded = MMCoconutForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.suppress_tokens == [*special, 7]
    (tmp_path / "generation_config.json").unlink()
    loaded = MMCoconutForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.suppress_tokens == special


def streaming_tokenizer():
    tokenizer = tiny_tokenizer()
    add_special_tokens(tokenizer)
    return tokenizer


def test_streamed_text_is_the_generated_text(capsys):
    model, tokenizer = tiny_model(), streaming_tokenizer()
    row = rows_alone(model, ragged_batch(model))[1]
    answer = generate(model, row).sequences[0, row["input_ids"].shape[1] :]
    expected = tokenizer.decode(answer)

    generate(model, row, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == expected + "\n"

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    thread = threading.Thread(
        target=model.generate, kwargs={**row, "streamer": streamer, "max_new_tokens": NEW_TOKENS}
    )
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_generation_follows_training():
    """A few steps on one answer, and greedy decoding gives it: labels, columns and thoughts meet where they should."""
    model = tiny_model("gpt2").train()
    batch = ragged_batch(model, padding="left")
    answers = torch.tensor([words(3, seed) for seed in (11, 12, 13, 14)])
    taught = {
        **batch,
        "input_ids": torch.cat([batch["input_ids"], answers], dim=1),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 3), value=1),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(**taught, labels=last_labels(taught, num_labels=3)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sequences = generate(model.eval(), batch, max_new_tokens=3).sequences
    assert torch.equal(sequences, taught["input_ids"])


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("text", ["gpt2", *CROSS_DECODERS])
def test_a_table_of_positions_ends_generation_before_it_begins(text, num_beams):
    """Only what is read needs a position: the last new token is not."""
    model = tiny_model(text)
    batch = batch_of(model, [words(120, 1), words(90, 2)])
    exactly = {"num_beams": num_beams, "min_new_tokens": 9, "eos_token_id": None}
    assert model.generate(**batch, max_new_tokens=9, **exactly).shape == (2, 129)
    with pytest.raises(ValueError, match="has 120 tokens.*max_new_tokens=10 .* 128 positions: lower .* at most 9"):
        model.generate(**batch, max_new_tokens=10)
    with pytest.raises(ValueError, match="has 120 tokens.*max_new_tokens=10 .* 128 positions"):
        model.generate(**batch, max_length=130)


def test_padding_takes_no_positions_in_generation():
    model = tiny_model("gpt2")
    batch = batch_of(model, [words(100, 1)])
    ids = torch.nn.functional.pad(batch["input_ids"], (60, 0))
    mask = torch.nn.functional.pad(batch["attention_mask"], (60, 0))
    assert model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=29).shape[1] <= 189
    with pytest.raises(ValueError, match="has 100 tokens.*max_new_tokens=30"):
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=30)


def test_rotary_positions_have_no_end():
    model = tiny_model("qwen2")
    batch = batch_of(model, [words(120, 1)])
    assert model.generate(**batch, max_new_tokens=20, min_new_tokens=20).shape == (1, 140)


def test_a_further_turn_beyond_the_positions_is_refused_and_the_first_stands():
    model = tiny_model("gpt2")
    batch = batch_of(model, [words(100, 1)])
    answered = generate(model, batch, max_new_tokens=8, min_new_tokens=8)
    ids = torch.cat([answered.sequences, torch.tensor([words(12, 2)])], dim=1)
    further = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": answered.past_key_values}
    with pytest.raises(ValueError, match="has 120 tokens.*max_new_tokens=10 .* leave out earlier turns"):
        model.generate(**further, max_new_tokens=10)
    assert model.generate(**further, max_new_tokens=9).shape[1] <= 129


def test_a_call_inside_another_one_reads_its_own_prompt_only():
    """As of a stopping criterion that asks the model something else while a picture is being described."""
    model = tiny_model("qwen2")
    batch, question = ragged_batch(model), torch.tensor([words(5, 1)])
    alone, inside = model.generate(question, max_new_tokens=3), []

    def ask(input_ids, scores, **kwargs):
        inside.append(model.generate(question, max_new_tokens=3))
        return torch.zeros(len(input_ids), dtype=torch.bool)

    expected = model.generate(**batch, max_new_tokens=3)
    assert torch.equal(model.generate(**batch, max_new_tokens=3, stopping_criteria=[ask]), expected)
    assert inside and all(torch.equal(tokens, alone) for tokens in inside)


@pytest.mark.parametrize("kind", [None, "dynamic", "static"])
def test_split_keys_yield_to_a_cache_that_a_configuration_names(kind):
    model = latent_model("qwen2")
    question = torch.tensor([words(9, 1)])
    expected = model.generate(question, max_new_tokens=4)
    config = GenerationConfig(max_new_tokens=4, cache_implementation=kind)
    given = [((question, config), {}), ((question,), {"generation_config": config})]
    if kind is not None:
        given.append(((question,), {"max_new_tokens": 4, "cache_implementation": kind}))
    for args, kwargs in given:
        assert torch.equal(model.generate(*args, **kwargs), expected)
