"""A prefix goes through the model once and changes nothing: what is generated behind it equals plain generation."""

import pytest
import torch
from tiny import (
    CROSS_DECODERS,
    DECODERS,
    GPT2_SIZES,
    IN_TEXT_DECODERS,
    NO_DROPOUT,
    batch_of,
    max_difference,
    mistral_config,
    random_pixels,
    sliding_qwen2_config,
    tiny_image,
    tiny_model,
    tiny_processor,
    tiny_seq2seq,
    words,
)
from transformers import CompileConfig, GPT2Config

from mmcoconut.caches_mmcoconut import ThoughtState, text_cache
from mmcoconut.compat_mmcoconut import RELEASE


EXACTLY = {"max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}


def questions(model, *, num_rows=3, ragged=True, images_behind=False, latent_in_prefix=False) -> dict:
    """Prompts about one image, with different numbers of thoughts; ragged, or of one length and with their last text
    of different lengths."""
    image, latent = [model.config.image_token_id] * model.config.image_seq_length, model.config.latent_token_id
    beginning = [*words(3, 1), *image, *words(4, 2), *([latent] * 2 if latent_in_prefix else []), *words(1, 3)]
    tails = [[*words(3 + 2 * row, 10 + row), *[latent] * (row + 1), *words(2, 20 + row)] for row in range(num_rows)]
    if not ragged:
        tails = [[*tail, *words(3 * (num_rows - 1 - row), 30 + row)] for row, tail in enumerate(tails)]
    if images_behind:
        tails = [[*words(1, row), *image, *tail] if row != 1 else tail for row, tail in enumerate(tails)]
    batch = batch_of(model, [[*beginning, *tail] for tail in tails])
    shared, own = random_pixels(1, seed=7), random_pixels(num_rows, seed=8)
    pixels = [[shared, own[row : row + 1]] if images_behind and row != 1 else [shared] for row in range(num_rows)]
    return {**batch, "pixel_values": torch.cat(sum(pixels, []))}


def model_of(text, **config):
    if text == "gpt2 that cross-attends":
        text = GPT2Config(**GPT2_SIZES, **NO_DROPOUT, add_cross_attention=True)
        config["image_fusion"] = "cross_attention"
    return tiny_model(sliding_qwen2_config() if text == "sliding" else text, **config)


def generate(model, batch, **options):
    torch.manual_seed(0)
    return model.generate(**batch, **{**EXACTLY, **options})


def assert_same(outputs, expected, tolerance):
    assert torch.equal(outputs.sequences, expected.sequences)
    for logits, expected_logits in zip(outputs.logits, expected.logits, strict=True):
        assert max_difference(logits, expected_logits) <= tolerance


def contents(prefix) -> list[torch.Tensor]:
    caches = [text_cache(prefix.cache), getattr(prefix.cache, "cross_attention_cache", None)]
    layers = [layer for cache in caches if cache is not None for layer in cache.layers]
    return [ThoughtState.of(prefix.cache).last_state, *(s for layer in layers for s in (layer.keys, layer.values))]


@pytest.mark.whole_on_the_first("text")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"repetition_penalty": 1.5},
        {"prefill_chunk_size": 3},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("text", [*DECODERS, "sliding", "gpt2 that cross-attends"])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_generation_behind_a_prefix_equals_plain_generation(text, options, tolerance):
    model = model_of(text)
    batch = questions(model, ragged=text != "sliding")
    prefix = model.prefill(**batch)
    assert len(prefix) == 8 + model.config.image_seq_length
    before = [states.clone() for states in contents(prefix)]
    plain = {key: value for key, value in options.items() if key not in ("prefill_chunk_size", "cache_implementation")}
    expected = generate(model, batch, **plain)
    if "prefill_chunk_size" in options and RELEASE < (5, 21):
        with pytest.raises(ValueError, match="reads the wrong columns in this release of transformers"):
            generate(model, batch, prefix=prefix, **options)
        return
    assert_same(generate(model, batch, prefix=prefix, **options), expected, tolerance)
    without_pixels = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert_same(generate(model, without_pixels, prefix=prefix, **options), expected, tolerance)
    assert all(torch.equal(*pair) for pair in zip(before, contents(prefix)))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("image_fusion", ["replace", "add"])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_further_images_may_follow_a_prefix(image_fusion, options, tolerance):
    """Given with those of the prefix, as the processor does, or alone."""
    model = tiny_model("qwen2", image_fusion=image_fusion)
    batch = questions(model, images_behind=True)
    expected = generate(model, batch, num_beams=options.get("num_beams", 1))
    prefix = model.prefill(**batch)
    assert_same(generate(model, batch, prefix=prefix, **options), expected, tolerance)
    alone = {**batch, "pixel_values": batch["pixel_values"][[1, 4]]}
    assert_same(generate(model, alone, prefix=prefix, **options), expected, tolerance)


@pytest.mark.parametrize("text", IN_TEXT_DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_thoughts_in_a_prefix_and_directly_behind_it_are_those_of_plain_generation(text, tolerance):
    model = model_of(text)
    batch = questions(model, num_rows=1, latent_in_prefix=True)
    expected = generate(model, batch)
    first_latent = (batch["input_ids"][0] == model.config.latent_token_id).nonzero()[0].item()
    for num_tokens in range(first_latent, first_latent + 4):
        prefix = model.prefill(**batch, num_tokens=num_tokens)
        assert_same(generate(model, batch, prefix=prefix), expected, tolerance)
    together = {name: tensor.repeat(2, *[1] * (tensor.ndim - 1)) for name, tensor in batch.items()}
    prefix = model.prefill(**batch, num_tokens=first_latent)
    assert_same(
        generate(model, together, prefix=prefix, num_beams=2), generate(model, together, num_beams=2), tolerance
    )


@pytest.mark.parametrize("tolerance", [1e-5])
def test_tiles_and_features_of_the_tower_are_read_as_pixels_are(tolerance):
    model = tiny_model("gpt2")
    tile = [model.config.image_token_id] * model.config.image_seq_length
    rows = [[*words(2, 1), *tile, *tile, *words(2, 2), *words(2 + row, 9 + row), *tile, 5] for row in range(2)]
    batch = batch_of(model, rows)
    pixels, num_tiles = random_pixels(4), torch.tensor([2, 1, 2, 1])
    batch["pixel_values"] = pixels[[0, 1, 2, 0, 1, 3]]
    expected = generate(model, batch, num_tiles=num_tiles)
    prefix = model.prefill(**batch, num_tiles=num_tiles)
    assert prefix.images["num_tiles"].tolist() == [2]
    assert_same(generate(model, batch, num_tiles=num_tiles, prefix=prefix), expected, tolerance)
    features = model.get_vision_features(batch.pop("pixel_values")).detach()
    given = {**batch, "image_features": features, "num_tiles": num_tiles}
    assert_same(generate(model, given, prefix=model.prefill(**given)), expected, tolerance)
    with pytest.raises(ValueError, match="cannot be compared"):
        generate(model, given, prefix=prefix)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_the_tower_and_the_prefix_own_forward_for_all_questions(options):
    model = tiny_model("gpt2")
    batch = questions(model)
    towers, columns = [], []
    model.model.vision_tower.register_forward_hook(lambda *_: towers.append(1))
    layer = model.get_decoder().h[0]
    layer.register_forward_pre_hook(lambda module, args: columns.append(args[0].shape[:2]))
    prefix = model.prefill(**batch)
    for _ in range(3):
        generate(model, batch, prefix=prefix, **options)
    assert len(towers) == 1
    assert columns[0] == (1, len(prefix))
    assert max(width for _, width in columns[1:]) <= batch["input_ids"].shape[1] - len(prefix)


@pytest.mark.parametrize("tolerance", [1e-5])
def test_compiled_decoding_follows_a_prefix(fresh_compiler, tolerance):
    model = tiny_model("gpt2")
    batch = questions(model)
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config}
    assert_same(generate(model, batch, prefix=model.prefill(**batch), **options), generate(model, batch), tolerance)


@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_further_turn_follows_one_behind_a_prefix(tolerance):
    model = tiny_model("qwen2")
    batch = questions(model, num_rows=1)
    prefix = model.prefill(**batch, num_tokens=8)
    expected = generate(model, batch)
    outputs = generate(model, batch, prefix=prefix)
    assert_same(outputs, expected, tolerance)
    turn = torch.tensor([[*words(2, 3), model.config.latent_token_id, *words(1, 4)]])
    further = {"input_ids": torch.cat([outputs.sequences, turn], dim=1)}
    again = [generate(model, {**further, "past_key_values": each.past_key_values}) for each in (outputs, expected)]
    assert_same(*again, tolerance)


@pytest.mark.parametrize("config", [sliding_qwen2_config, mistral_config])
def test_a_sliding_window_refuses_padding_behind_a_prefix(config):
    model = tiny_model(config())
    batch = questions(model)
    with pytest.raises(ValueError, match="one length, or one at a time"):
        generate(model, batch, prefix=model.prefill(**batch))


def test_no_cache_is_returned_whose_padding_stands_elsewhere_than_in_the_prompts():
    model = tiny_model("gpt2")
    batch = questions(model)
    assert generate(model, batch, prefix=model.prefill(**batch)).past_key_values is None


def test_prompts_of_the_processor_share_the_image_and_what_stands_before_the_questions_part():
    model = tiny_model("qwen2")
    processor = tiny_processor(model)
    processor.num_latents = 2
    texts = ["Which shape is it?", "What colour is the left square?"]
    inputs = processor(images=[tiny_image()] * 2, text=texts, return_tensors="pt", padding=True)
    prefix = model.prefill(**inputs)
    assert (prefix.input_ids == model.config.image_token_id).sum() == model.config.image_seq_length
    with_it = model.generate(**inputs, prefix=prefix, max_new_tokens=5)
    assert torch.equal(with_it, model.generate(**inputs, max_new_tokens=5))


def broken(name):
    """A model, what is passed to prefill, what is passed to generate, and what the error says."""
    model = tiny_model("gpt2")
    batch = questions(model)
    one = {name: tensor[:1] for name, tensor in questions(model, num_rows=1).items()}
    num_shared = 8 + model.config.image_seq_length
    ids, latent = batch["input_ids"], model.config.latent_token_id
    other_text = ids.clone()
    other_text[2, 6] = 299
    last = {"input_ids": ids[2:, :num_shared], "pixel_values": one["pixel_values"]}
    last_turn = {"input_ids": ids[2:], "pixel_values": one["pixel_values"], "num_tokens": 8}
    latents_first = batch_of(model, [[*words(3, 1), latent, *words(2, 4)], [*words(3, 1), latent, 7]])
    return {
        "another token": (
            model,
            batch,
            {**batch, "input_ids": other_text},
            r"leaves the prefix \(12 tokens\) at token 6",
        ),
        "another beginning": (model, batch, {"input_ids": ids[2:, 1:]}, "pass whole prompts"),
        "its padding unsaid": (model, batch, {"input_ids": ids}, "attention_mask where they are padded"),
        "a shorter prompt": (model, batch, {"input_ids": ids[2:, :9]}, "at token 9: its end where"),
        "nothing behind": (model, batch, last, "num_tokens=11"),
        "another picture": (
            model,
            batch,
            {**batch, "pixel_values": batch["pixel_values"] * torch.tensor([1, 1, 2.0])[:, None, None, None]},
            "Row 2 has other pixel_values",
        ),
        "another number": (model, batch, {**batch, "pixel_values": random_pixels(2)}, "has 2 images or tiles"),
        "embeddings": (model, batch, {"inputs_embeds": model.get_input_embeddings()(ids)}, "no inputs_embeds"),
        "prompt lookup": (
            model,
            last_turn,
            {**last_turn, "prompt_lookup_num_tokens": 2},
            "Assisted decoding",
        ),
        "no cache": (model, batch, {**batch, "use_cache": False}, "use_cache is False"),
        "padding before a latent": (
            model,
            {**latents_first, "num_tokens": 3},
            latents_first,
            "directly after the 3 tokens",
        ),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "another token", "another beginning", "its padding unsaid", "a shorter prompt", "nothing behind",
        "another picture", "another number", "embeddings", "prompt lookup", "no cache", "padding before a latent",
    ],
)  # fmt: skip
def test_a_prompt_that_does_not_fit_its_prefix_is_refused(name):
    model, of_prefix, batch, message = broken(name)
    prefix = model.prefill(**of_prefix)
    batch = {key: value for key, value in batch.items() if key != "num_tokens"}
    with pytest.raises(ValueError, match=message):
        generate(model, batch, prefix=prefix)


@pytest.mark.parametrize(
    ("num_tokens", "message"),
    [(0, "1 <= num_tokens <= 12"), (13, "the prefix needs 13"), (5, "no multiple of the 4")],
)
def test_a_prefix_that_cannot_be_is_refused(num_tokens, message):
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match=message):
        model.prefill(**questions(model), num_tokens=num_tokens)


def test_a_prefix_of_prompts_with_different_pictures_is_refused():
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match="Row 1 has other pixel_values"):
        model.prefill(**{**questions(model), "pixel_values": random_pixels(3)})


@pytest.mark.parametrize("text", CROSS_DECODERS)
def test_cross_attention_refuses_images_behind_a_prefix(text):
    model = tiny_model(text)
    batch = questions(model, images_behind=True)
    with pytest.raises(ValueError, match="all images in the first call"):
        generate(model, batch, prefix=model.prefill(**batch))


def test_an_encoder_decoder_says_what_to_reuse_in_the_place_of_a_prefix():
    model = tiny_seq2seq()
    with pytest.raises(ValueError, match="get_vision_features"):
        model.prefill(torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="get_vision_features"):
        model.generate(torch.ones(1, 3, dtype=torch.long), prefix=object())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "outputs/a, and is read by outputs/b, whose weights are others"),
        ({"thought_norm": "embedding"}, "outputs/a, .* outputs/b, whose thought_norm is 'embedding', not 'none'"),
        ({"thought_mode": "pause"}, "outputs/a, .* outputs/b, whose thought_mode is 'pause', not 'feedback'"),
    ],
)
def test_a_prefix_of_another_checkpoint_is_refused_with_both_names(other, message):
    made, reads = tiny_model("gpt2"), tiny_model("gpt2", **other)
    made.name_or_path, reads.name_or_path = "outputs/a", "outputs/b"
    batch = questions(made)
    prefix = made.prefill(**batch)
    with pytest.raises(ValueError, match=message):
        generate(reads, batch, prefix=prefix)


def test_a_prefix_outlives_reloading_and_not_training(tmp_path):
    model = tiny_model("gpt2")
    batch = questions(model)
    prefix = model.prefill(**batch)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    again.config.text_config.use_cache = False
    assert generate(again, batch, prefix=prefix).sequences.shape == generate(model, batch).sequences.shape
    with torch.no_grad():
        again.get_decoder().h[1].mlp.c_fc.bias += 1e-3
    with pytest.raises(ValueError, match="whose weights are others: make the prefix with the model that reads it"):
        generate(again, batch, prefix=prefix)
