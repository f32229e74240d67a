"""What the answer may see, against a definition that takes columns out of the key-value cache of a row alone.

Shapes: B batch, T tokens, V vocabulary.
"""

import pytest
import torch
from test_vlms import FAST, taken_over, types_of
from tiny import (
    TEXT_CONFIGS,
    TEXT_SIZES,
    batch_of,
    checkpoint_activations,
    max_difference,
    mistral_config,
    padded,
    ragged_batch,
    random_pixels,
    rows_alone,
    seq2seq_rows_alone,
    sliding_qwen2_config,
    tiny_model,
    tiny_seq2seq,
    widths_of_passes,
    words,
)
from transformers import BioGptConfig, CompileConfig, FalconConfig, Gemma2Config
from transformers.cache_utils import DynamicCache
from vlm_families import CLASS_NAMES, ROWS, VARIANTS, Family, answers, without_float32

from mmcoconut import modeling_mmcoconut, thinking_mmcoconut
from mmcoconut.build import from_vlm
from mmcoconut.build.tiny_models import tiny_vlm
from mmcoconut.caches_mmcoconut import text_cache
from mmcoconut.compat_mmcoconut import CACHE
from mmcoconut.configuration_mmcoconut import MMCoconutConfig
from mmcoconut.training.deferred import defer_weight_gradients


SEES = ("no_image", "thoughts")
TOLERANCE = 2e-5
TEXTS = {
    **TEXT_CONFIGS,
    "gemma2": lambda: Gemma2Config(
        **TEXT_SIZES, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=None
    ),
    "biogpt": lambda: BioGptConfig(**TEXT_SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
}
IN_TEXT = ("gpt2", "qwen2", "llama", "gemma2", "biogpt")


def rows_of(config, others=True) -> list[list[int]]:
    """One image and two latents, two images and three; others: no image and one latent, and no latent."""
    image = [config.image_token_id] * config.image_seq_length
    latent, start, end = config.latent_token_id, config.start_latent_token_id, config.end_latent_token_id
    rows = [
        [*image, *words(4, 1), start, latent, latent, end, *words(4, 2)],
        [*words(2, 3), *image, *words(1, 4), *image, *words(3, 5), start, latent, latent, latent, end, *words(2, 6)],
    ]
    without = [[*words(5, 6), start, latent, end, *words(6, 7)], [*image, *words(6, 9)]]
    return [*rows, *without] if others else rows


def kept_columns(ids: torch.Tensor, config, sees: str, last: int) -> list[int]:
    """Return the columns up to the last latent of a row of ids (T,) which the columns behind it see."""
    hides = {"all": lambda _: False, "no_image": lambda token: token == config.image_token_id}
    hides["thoughts"] = lambda token: token != config.latent_token_id
    return [column for column in range(last + 1) if not hides[sees](ids[column].item())]


def take_out(cache, kept: list[int]) -> None:
    """Leave only these columns in a cache."""
    for layer in text_cache(cache).layers:
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = len(kept)
        if hasattr(layer, "indexer_keys"):  # (B, T, D), by which a sparse layer chooses what it reads
            layer.indexer_keys = layer.indexer_keys[:, kept]


def definition(model, alone: dict, sees: str, beside: dict | None = None) -> torch.Tensor:
    """Return the logits (1, T, V) of a row alone: run to the last latent, take columns out of the cache, run the rest.

    beside: what the rest reads by cross-attention.
    """
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    mask_name = name.replace("input_ids", "attention_mask")
    ids, before = alone[name], model.config.answer_sees
    latents = (ids[0] == model.config.latent_token_id).nonzero()[:, 0].tolist()
    model.config.answer_sees = "all"
    try:
        if not latents:
            return model(**alone).logits
        end = latents[-1] + 1
        cache = DynamicCache(config=model.get_decoder().config)
        first = model(**{**alone, name: ids[:, :end], mask_name: None, CACHE: cache}, use_cache=True)
        cache = first.get(CACHE)
        take_out(cache, kept_columns(ids[0], model.config, sees, latents[-1]))
        embeds = model.get_input_embeddings()(ids[:, end:])
        positions = torch.arange(end, ids.shape[1])[None]
        rest = {"inputs_embeds": embeds, "position_ids": positions, CACHE: cache, "use_cache": True}
        states = model.get_decoder()(**rest, **(beside or {})).last_hidden_state
        return torch.cat([first.logits, model.get_output_embeddings()(states)], dim=1)
    finally:
        model.config.answer_sees = before


def weighted(logits: torch.Tensor, seed: int) -> torch.Tensor:
    return (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))).sum()


def gradients(model, loss) -> dict:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_equals_definition(model, batch, sees, *, defined=definition, rows=None, owner=None, **options) -> None:
    """A batch against its rows alone by definition, in values and gradients; hiding must change something.

    owner: the model that the definition runs, if it is another one.
    """
    alone = rows_alone(model, batch) if rows is None else rows
    name = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
    expected = [defined(model, row, sees, **options) for row in alone]
    of_definition = gradients(owner or model, sum(weighted(logits, seed) for seed, logits in enumerate(expected)))
    model.config.answer_sees = sees
    logits, real = model(**batch).logits, batch[name].bool()
    found = [logits[row, real[row]][None] for row in range(len(alone))]
    for row, (one, other) in enumerate(zip(found, expected)):
        assert max_difference(one, other) <= TOLERANCE, row
    of_batch = gradients(model, sum(weighted(logits, seed) for seed, logits in enumerate(found)))
    largest = max(gradient.abs().max().item() for gradient in of_definition.values())
    assert of_batch.keys() == of_definition.keys()
    assert max(max_difference(of_batch[name], of_definition[name]) for name in of_batch) <= TOLERANCE * largest
    model.config.answer_sees = "all"
    assert max_difference(model(**batch).logits, logits) > 1e-2


@pytest.mark.whole_on_the_first("text")
@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("text", IN_TEXT)
def test_a_ragged_batch_equals_the_definition(text, padding, sees):
    model = tiny_model(TEXTS[text]())
    assert_equals_definition(model, batch_of(model, rows_of(model.config), padding=padding), sees)


@pytest.mark.whole_on_the_first("sees")
@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize(
    "config",
    [
        {"image_fusion": "add"},
        {"thought_norm": "projection"},
        {"thought_schedule": "jacobi", "jacobi_iterations": 2},
        {"thought_schedule": "jacobi", "jacobi_iterations": 5},
        {"thought_mode": "pause"},
    ],
    ids=str,
)
def test_every_way_to_think_equals_the_definition(config, sees):
    model = tiny_model("qwen2", **config)
    assert_equals_definition(model, batch_of(model, rows_of(model.config)), sees)


def by_masks(model, alone: dict, sees: str, window: int) -> torch.Tensor:
    """Return the logits (1, T, V) of a row alone in a decoder with windows, run anew for each thought under 4-D masks.

    A window counts columns, hidden ones included.
    """
    ids, decoder, model.config.answer_sees = alone["input_ids"], model.get_decoder(), "all"
    length, latents = ids.shape[1], (ids[0] == model.config.latent_token_id).nonzero()[:, 0].tolist()
    embeds = model(**alone, output_view=True).view.read  # whose thoughts are written anew below
    queries, keys = torch.arange(length)[:, None], torch.arange(length)[None]
    visible = keys <= queries  # (T, T)
    if latents:
        kept = kept_columns(ids[0], model.config, sees, latents[-1])
        hidden = [column not in kept for column in range(latents[-1] + 1)]
        visible[latents[-1] + 1 :, : latents[-1] + 1] &= ~torch.tensor(hidden)
    in_window = visible & (keys > queries - window)
    masks = {"full_attention": visible[None, None], "sliding_attention": in_window[None, None]}
    mask = masks if getattr(decoder.config, "layer_types", None) else masks["sliding_attention"]
    for column in [*latents, length]:
        states = decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        if column < length:
            embeds = torch.cat([embeds[:, :column], states[:, column - 1 : column], embeds[:, column + 1 :]], dim=1)
    return model.get_output_embeddings()(states)


@pytest.mark.whole_on_the_first("sees")
@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("window", [10, 16])
@pytest.mark.parametrize("make", [mistral_config, sliding_qwen2_config])
def test_sliding_windows_equal_the_definition(make, window, sees):
    model = tiny_model(make(window))
    batch = batch_of(model, rows_of(model.config))
    assert_equals_definition(model, batch, sees, defined=by_masks, window=window)


def alike_rows(config) -> list[list[int]]:
    """Two rows whose last latents stand in the same column behind padding on the right, and see one image each."""
    image, end = [config.image_token_id] * config.image_seq_length, config.end_latent_token_id
    latent, start = config.latent_token_id, config.start_latent_token_id
    return [
        [*image, *words(4, 1), start, latent, latent, end, *words(4, 2)],
        [*words(3, 3), *image, *words(2, 4), start, latent, end, *words(2, 5)],
    ]


@pytest.mark.whole_on_the_first("sees")
@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("text", ["gpt2", "marian", "bart"])
def test_a_decoder_that_reads_images_by_cross_attention_reads_none_behind_the_last_latent(text, sees):
    model = tiny_model(text, image_fusion="cross_attention")
    batch = batch_of(model, alike_rows(model.config), padding="right")
    kept = "all" if sees == "no_image" else sees  # the placeholder is text
    defined = lambda model, alone, sees: definition(model, alone, kept)  # noqa: E731
    assert_equals_definition(model, batch, sees, defined=defined)


@pytest.mark.parametrize("text", ["gpt2", "marian"])
def test_rows_that_would_read_nothing_in_other_columns_are_refused(text):
    model = tiny_model(text, image_fusion="cross_attention", answer_sees="no_image")
    batch = batch_of(model, rows_of(model.config))
    with pytest.raises(ValueError, match="batch rows whose last latents are in the same column"):
        model(**batch)
    for row in rows_alone(model, batch):
        model(**row)


def seq2seq_of(config, prompts) -> dict:
    """Return a batch of an encoder-decoder with an image in each question, and these prompts, padded behind."""
    questions = [[config.image_token_id, *words(4 + row, row), 2] for row in range(len(prompts))]
    pad = {"padding": "right", "pad_token_id": 1}
    decoder = {f"decoder_{name}": value for name, value in padded(prompts, **pad).items()}
    return {**padded(questions, **pad), **decoder, "pixel_values": random_pixels(len(prompts))}


def encoder_left(model, alone: dict, sees: str) -> dict:
    """Return what a row alone (1, T) of an encoder-decoder reads behind its last latent by cross-attention."""
    if sees == "thoughts":
        return {}
    encoded = model.model.encode(*(alone[name] for name in ("input_ids", "attention_mask", "pixel_values")))
    states, mask = encoded.last_hidden_state, encoded.attention_mask.clone()
    mask[:, : model.config.num_visual_tokens] = 0
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("text", ["bart", "marian"])
def test_an_encoder_decoder_equals_the_definition(text, sees):
    model = tiny_seq2seq(text=TEXTS[text]())
    config = model.config
    latent, start = config.latent_token_id, config.text_config.decoder_start_token_id
    open_, close = config.start_latent_token_id, config.end_latent_token_id
    prompts = [
        [start, open_, latent, latent, close, *words(4, 1)],
        [start, *words(1, 2), open_, latent, close, *words(2, 3)],
    ]
    if sees == "no_image":  # whose rows still read the question, and need not be alike
        prompts = [*prompts, [start, open_, latent, latent, latent, close], [start, *words(5, 4)]]
    batch = seq2seq_of(config, prompts)

    def defined(model, alone, sees):
        beside = encoder_left(model, alone, sees)
        return definition(model, alone, "all" if sees == "no_image" else sees, beside)

    assert_equals_definition(model, batch, sees, defined=defined, rows=seq2seq_rows_alone(model, batch))


@pytest.mark.whole_on_the_first("sees")
@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("attention", ["sdpa", "eager", "latent"])
def test_every_attention_equals_the_definition(attention, sees):
    model = tiny_model("llama")
    model.get_decoder().set_attn_implementation(attention)
    batch = batch_of(model, rows_of(model.config))
    of_sdpa = tiny_model("llama")
    defined = lambda _, row, sees: definition(of_sdpa, row, sees)  # noqa: E731
    assert_equals_definition(model, batch, sees, defined=defined, owner=of_sdpa)


@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_latents_share_columns_and_the_answers_run_in_one_pass_behind_them(padding, sees):
    model = tiny_model("qwen2")
    config, image = model.config, [model.config.image_token_id] * model.config.image_seq_length
    latents = [config.start_latent_token_id, *[config.latent_token_id] * 3, config.end_latent_token_id]
    rows = [[*words(row % 3, row), *image, *words(3 * row, row), *latents, *words(9 - 2 * row, 7)] for row in range(4)]
    batch, widths = batch_of(model, [*rows, [*image, *words(6, 9)]], padding=padding), []
    assert_equals_definition(model, batch, sees)
    config.answer_sees, widths = sees, widths_of_passes(model)
    model(**batch)
    assert len(widths) == 1 + 3 + 1


def in_training(model, batch, sees, **options) -> dict:
    """Return the gradients of the weighted logits of a batch in training mode."""
    model.config.answer_sees = sees
    logits = model.train()(**batch, **options).logits
    return gradients(model, weighted(logits * batch["attention_mask"][..., None], 0))


@pytest.mark.whole_on_the_first("passes")
@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("linked", [None, 1])
@pytest.mark.parametrize("passes", ["all", "first"])
@pytest.mark.parametrize("config", [{}, {"thought_schedule": "jacobi", "jacobi_iterations": 2}], ids=str)
def test_checkpointed_passes_give_the_same_gradients(config, passes, linked, sees):
    model = tiny_model("gpt2", **config)
    batch = batch_of(model, rows_of(model.config))
    model.bptt_thoughts = linked
    expected = in_training(model, batch, sees)
    checkpoint_activations(model)
    model.checkpointed_passes = passes
    found = in_training(model, batch, sees)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert max(max_difference(found[name], expected[name]) for name in expected) <= TOLERANCE * largest
    model.bptt_thoughts = 1 if linked is None else None
    other = in_training(model, batch, sees)
    assert max(max_difference(found[name], other[name]) for name in expected) > 1e-3 * largest


@pytest.mark.parametrize("sees", SEES)
def test_weight_gradients_formed_once_are_the_same(sees):
    model = tiny_model("qwen2")
    batch = batch_of(model, rows_of(model.config))
    expected = in_training(model, batch, sees)
    defer_weight_gradients(model, True)
    found = in_training(model, batch, sees)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert max(max_difference(found[name], expected[name]) for name in expected) <= TOLERANCE * largest


@pytest.mark.parametrize("sees", SEES)
def test_given_thoughts_hide_as_their_own_do_and_no_pass_behind_them_calls_the_feed(sees):
    model, calls = tiny_model("qwen2"), []
    batch = batch_of(model, rows_of(model.config))
    handle = model.model.thought_feed.register_forward_hook(lambda *_: calls.append(1))
    model(**batch)
    number, model.config.answer_sees = len(calls), sees
    view = model(**batch, output_view=True).view
    handle.remove()
    assert len(calls) == 2 * number
    again = model(**batch, output_view=True, given_thoughts=lambda *_: (view.thoughts, view.mask)).view
    real = batch["attention_mask"].bool()
    assert max_difference(again.states[real], view.states[real]) <= TOLERANCE


def test_what_cannot_be_hidden_is_refused():
    model = tiny_model("qwen2", answer_sees="thoughts", stop_head=True)
    batch = batch_of(model, rows_of(model.config))
    with pytest.raises(ValueError, match="pass stop_threshold=None, or set answer_sees='all'"):
        model(**batch, stop_threshold=0.5)
    with pytest.raises(ValueError, match="Row 2 of the batch has text between its latents"):
        model(**ragged_batch(model))
    falcon = FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True)
    with pytest.raises(ValueError, match=r"counts distances by its attention mask \(ALiBi\): set answer_sees='all'"):
        model = tiny_model(falcon, answer_sees="thoughts")
        model(**batch_of(model, rows_of(model.config)))
    without = batch_of(model, [rows_of(model.config)[3]])
    assert model(**without).logits is not None  # where nothing is thought


def test_an_older_configuration_sees_all():
    assert MMCoconutConfig().answer_sees == "all"
    with pytest.raises(ValueError, match="answer_sees='nothing' is not one of all, no_image, thoughts"):
        MMCoconutConfig(answer_sees="nothing")
    vlm, own = tiny_vlm("internvl")
    model = from_vlm(vlm, processor=own, check=False)
    del model.config.answer_sees
    again = type(model)(model.config)
    assert again.config.answer_sees == "all"
    from_vlm_too = from_vlm(tiny_vlm("internvl")[0], processor=own, check=False, answer_sees="no_image")
    assert from_vlm_too.config.answer_sees == "no_image"


# --- what is kept in a cache -----------------------------------------------------------------------------------------
NEW_TOKENS = 5
CACHED = [
    {},
    {"num_beams": 3},
    {"num_beams": 2, "num_return_sequences": 2},
    {"cache_implementation": "static"},
    {"cache_implementation": "static", "num_beams": 3},
    {"prefill_chunk_size": 5},
    {"prompt_lookup_num_tokens": 3},
]


def generate(model, batch, **options):
    recorded = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, "eos_token_id": None}
    return model.generate(**batch, **{"max_new_tokens": NEW_TOKENS, **recorded, **options})


def by_steps(model, alone: dict, sees: str) -> list[int]:
    """Return the tokens that a row alone is answered with, each read off the definition of all before it."""
    suppressed, new = model.generation_config.suppress_tokens, []
    for _ in range(NEW_TOKENS):
        logits = definition(model, alone, sees)[0, -1]
        logits[suppressed] = -torch.inf
        new.append(int(logits.argmax()))
        ids = torch.cat([alone["input_ids"], torch.tensor([new[-1:]])], dim=1)
        alone = {**alone, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return new


@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("text", ["gpt2", "qwen2"])
@torch.no_grad()
def test_greedy_answers_equal_the_definition(text, sees):
    model = tiny_model(text, seed=4)
    batch = batch_of(model, rows_of(model.config))
    expected = [by_steps(model, row, sees) for row in rows_alone(model, batch)]
    model.config.answer_sees = sees
    for options in ({}, {"use_cache": False}):
        assert generate(model, batch, **options).sequences[:, batch["input_ids"].shape[1] :].tolist() == expected
    model.config.answer_sees = "all"
    assert generate(model, batch).sequences[:, batch["input_ids"].shape[1] :].tolist() != expected


def assert_generates_as_without_cache(model, batch, **options):
    names = ("num_beams", "num_return_sequences")
    reference = {name: value for name, value in options.items() if name in names}
    expected = generate(model, batch, use_cache=False, **reference)
    found = generate(model, batch, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.logits, expected.logits):
        assert max_difference(one, other) <= TOLERANCE


@pytest.mark.whole_on_the_first("text")
@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("options", CACHED, ids=str)
@pytest.mark.parametrize("text", ["qwen2", "gpt2", "sliding"])
def test_every_cached_generation_equals_one_without_cache(text, options, sees):
    model = tiny_model(sliding_qwen2_config(8) if text == "sliding" else text, seed=4, answer_sees=sees)
    rows = rows_of(model.config)[: 1 if "prompt_lookup_num_tokens" in options else None]
    assert_generates_as_without_cache(model, batch_of(model, rows), **options)


@pytest.mark.whole_on_the_first("sees")
@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("text", ["cross_attention", "encoder"])
def test_cached_generation_beside_encoder_states_equals_one_without_cache(text, options, sees):
    model, batch = model_and_prompts(text, sees)
    before = generate(model, batch).logits
    assert_generates_as_without_cache(model, batch, **options)
    model.config.answer_sees = "all"
    assert max(max_difference(*pair) for pair in zip(generate(model, batch).logits, before)) > 1e-2


def compiled_steps() -> dict:
    """Return options of `generate` with compiled steps, which without them only an accelerator has."""
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def model_and_prompts(text: str, sees: str) -> tuple:
    """Return a model that reads images in its text, beside it or in an encoder, and prompts that end with thoughts."""
    if text == "encoder":
        model = tiny_seq2seq(answer_sees=sees)
        config = model.config
        thoughts = [config.start_latent_token_id, config.latent_token_id, config.end_latent_token_id]
        return model, seq2seq_of(config, [[config.text_config.decoder_start_token_id, *thoughts]] * 2)
    if text == "cross_attention":
        model = tiny_model("gpt2", image_fusion="cross_attention", answer_sees=sees)
        ends = model.config.end_latent_token_id
        return model, batch_of(model, [row[: row.index(ends)] for row in alike_rows(model.config)])
    model = tiny_model(sliding_qwen2_config(8) if text == "sliding" else text, seed=4, answer_sees=sees)
    return model, batch_of(model, rows_of(model.config))


@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("text", ["gpt2", "sliding", "cross_attention", "encoder"])
def test_compiled_steps_hide_too(fresh_compiler, text, sees):
    model, batch = model_and_prompts(text, sees)
    assert_generates_as_without_cache(model, batch, **compiled_steps())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.whole_on_the_first("sees")
@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("text", ["gpt2", "sliding", "cross_attention", "encoder"])
def test_steps_that_a_user_compiled_hide_too(monkeypatch, text, sees):
    """Over a growing cache, whose mask is 2-D: nobody tells the decoder of thoughts in such a step."""
    model, batch = model_and_prompts(text, sees)
    for module in (modeling_mmcoconut, thinking_mmcoconut):
        monkeypatch.setattr(module, "takes_no_thoughts", lambda num_columns: num_columns == 1)
    assert_generates_as_without_cache(model, batch)


@pytest.mark.parametrize("sees", SEES)
def test_a_latent_last_in_the_prompt_is_no_thought_of_the_next_call_of_several_processes(monkeypatch, sees):
    """Where passes must begin in the same columns everywhere, a step behind it still begins as a step."""
    model = tiny_model("gpt2", seed=4, answer_sees=sees)
    batch = batch_of(model, [[model.config.image_token_id] * 4 + [*words(4, 1), model.config.latent_token_id]])
    expected = generate(model, batch)
    monkeypatch.setattr(thinking_mmcoconut, "is_sharded", lambda decoder: True)
    monkeypatch.setattr(thinking_mmcoconut, "agreed_columns", lambda columns, num_columns, device: columns)
    found = generate(model, batch)
    for one, other in zip(found.logits, expected.logits):
        assert max_difference(one, other) <= TOLERANCE


def run_over(model, cache, ids: torch.Tensor, start: int) -> torch.Tensor:
    """Return logits (1, t, V) of text alone at positions from start on, over a cache."""
    positions = torch.arange(start, start + ids.shape[1])[None]
    read = {"inputs_embeds": model.get_input_embeddings()(ids), "position_ids": positions, "use_cache": True}
    return model.get_output_embeddings()(model.get_decoder()(**read, **{CACHE: cache}).last_hidden_state)


@torch.no_grad()
def turns_by_definition(model, turns: list[dict], sees: str) -> torch.Tensor:
    """Return the logits of the last of some turns, whose latents see all of the turns before."""
    model.config.answer_sees, before, cache = "all", torch.zeros(1, 0, dtype=torch.long), DynamicCache()
    for turn in turns:
        ids = turn["input_ids"]
        end = int((ids[0] == model.config.latent_token_id).nonzero().max()) + 1
        first = model(**{**turn, "input_ids": ids[:, :end], "attention_mask": None, CACHE: cache}, use_cache=True)
        all_ids = torch.cat([before, ids], dim=1)
        whole = [(layer.keys, layer.values) for layer in cache.layers]
        kept = kept_columns(all_ids[0], model.config, sees, before.shape[1] + end - 1)
        take_out(cache, kept)
        rest = run_over(model, cache, ids[:, end:], before.shape[1] + end)
        for layer, (keys, values) in zip(cache.layers, whole):
            layer.keys = torch.cat([keys, layer.keys[:, :, len(kept) :]], dim=2)
            layer.values = torch.cat([values, layer.values[:, :, len(kept) :]], dim=2)
        before = all_ids
    return torch.cat([first.logits, rest], dim=1)


@pytest.mark.parametrize("sees", SEES)
@torch.no_grad()
def test_a_further_turn_hides_earlier_answers_too(sees):
    model = tiny_model("qwen2")
    config = model.config
    latent, open_, close = config.latent_token_id, config.start_latent_token_id, config.end_latent_token_id
    image = [config.image_token_id] * config.image_seq_length
    rows = [
        [[*image, *words(3, 1), open_, latent, latent, close, *words(3, 2)], [*words(4, 3), open_, latent, close, 7]],
        [[*words(6, 4), open_, latent, close, *words(5, 5)], [*image, open_, latent, latent, close, 9]],
    ]
    batches = [batch_of(model, [row[turn] for row in rows]) for turn in (0, 1)]
    turns = [rows_alone(model, batch) for batch in batches]
    expected = [turns_by_definition(model, [of_row[row] for of_row in turns], sees) for row in (0, 1)]
    config.answer_sees = sees
    cache = DynamicCache()
    model(**batches[0], **{CACHE: cache}, use_cache=True)
    mask = torch.cat([batch["attention_mask"] for batch in batches], dim=1)
    found = model(**{**batches[1], "attention_mask": mask, CACHE: cache}, use_cache=True).logits
    real = batches[1]["attention_mask"].bool()
    for row, logits in enumerate(expected):
        assert max_difference(found[row, real[row]][None], logits) <= TOLERANCE


@pytest.mark.parametrize("sees", SEES)
@torch.no_grad()
def test_a_conversation_goes_on_in_generate_over_the_cache_of_the_turn_before(sees):
    model = tiny_model("qwen2", seed=4)
    config = model.config
    row = batch_of(model, [rows_of(config)[0]])
    latent, open_, close = config.latent_token_id, config.start_latent_token_id, config.end_latent_token_id
    question = torch.tensor([[*words(3, 8), open_, latent, close]])
    config.answer_sees = sees
    first = generate(model, row)
    ids = torch.cat([first.sequences, question], dim=1)
    mask = torch.ones_like(ids)
    second = generate(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=first.past_key_values)
    new = second.sequences[0, ids.shape[1] :].tolist()
    turn = {"input_ids": torch.cat([first.sequences[:, -1:], question, torch.tensor([new[:-1]])], dim=1)}
    turn["attention_mask"] = torch.ones_like(turn["input_ids"])
    before = {**row, "input_ids": first.sequences[:, :-1]}
    logits = turns_by_definition(model, [before, turn], sees)[0, -NEW_TOKENS:]
    assert max_difference(torch.cat(second.logits), logits) <= TOLERANCE


@pytest.mark.parametrize("sees", SEES)
def test_turns_in_chunks_are_refused_as_their_questions_would_see_less(sees):
    model = tiny_model("qwen2", seed=4, answer_sees=sees)
    latent, row = model.config.latent_token_id, rows_of(model.config)[0]
    first = generate(model, batch_of(model, [row]), prefill_chunk_size=4)
    question = torch.tensor([[*words(5, 8), latent, *words(1, 3)]])
    ids = torch.cat([first.sequences, question], dim=1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(ValueError, match="prefill_chunk_size would split a later turn's question from"):
        generate(model, batch, past_key_values=first.past_key_values, prefill_chunk_size=2)
    with pytest.raises(ValueError, match="Row 0 of the batch has text between its latents"):
        generate(model, batch, prefill_chunk_size=5)


@pytest.mark.parametrize("sees", SEES)
def test_a_prefix_is_hidden_too(sees):
    model = tiny_model("qwen2", answer_sees=sees)
    batch = batch_of(model, [rows_of(model.config)[0]] * 2)
    batch["pixel_values"] = batch["pixel_values"][:1].expand(2, -1, -1, -1)
    prefix = model.prefill(**batch, num_tokens=7)
    expected = generate(model, batch).sequences
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model.generate(**ids, prefix=prefix, max_new_tokens=NEW_TOKENS, eos_token_id=None), expected)
    model.config.answer_sees = "all"
    with pytest.raises(ValueError, match="whose answer_sees is 'all', not"):
        model.generate(**ids, prefix=prefix)


def test_a_cache_that_was_filled_without_notes_is_refused():
    model = tiny_model("gpt2")
    batch, cache = batch_of(model, [rows_of(model.config)[0]]), DynamicCache()
    model(**batch, **{CACHE: cache}, use_cache=True)
    model.config.answer_sees = "thoughts"
    with pytest.raises(ValueError, match="and no record of which are images and thoughts"):
        model(input_ids=torch.tensor([[5]]), **{CACHE: cache})


# --- vision-language models' own classes -----------------------------------------------------------------------------
# Why nothing can be hidden from a type's decoder, as its error says it.
IN_STATES, BESIDE = "recurrent layers keep what they read", "reads its images in separate cross-attention layers"
REFUSED = dict.fromkeys(("lfm2_vl", "lfm3_vl", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), IN_STATES)
REFUSED |= {"inkling_mm_model": IN_STATES, "qwen3_5": IN_STATES, "qwen3_5_moe": IN_STATES, "mllama": BESIDE}
HIDING = [name for name in (*CLASS_NAMES, *VARIANTS) if name not in (*FAST, *REFUSED)]


def asked_of(each: Family, rows=ROWS) -> dict:
    """Return a batch of questions about a picture each; where none is read here, a placeholder stands for one."""
    batch = each.inputs(rows)
    if each.how_images_are_read == "text alone":
        first = batch["attention_mask"].argmax(dim=1)  # (B,)
        batch["input_ids"][torch.arange(len(rows)), first] = each.model.config.image_token_id
    return batch


def by_cutting(each, alone: dict, sees: str) -> torch.Tensor:
    """Return the states (1, t, D) behind the last latent of a row alone, whose columns are taken out of the cache."""
    model, ids, asked = each.model, alone["input_ids"], []
    decoder, length = model.get_decoder(), ids.shape[1]
    handle = decoder.register_forward_pre_hook(lambda _, args, given: asked.append(given), with_kwargs=True)
    model(**alone)
    handle.remove()
    end = int(each.latents_of(alone)[0].nonzero().max()) + 1
    cut = {name: value for name, value in alone.items() if value.ndim == 2 and value.shape[1] == length}
    cut = {name: value[:, :end] for name, value in cut.items()}
    cache = DynamicCache(config=decoder.config)
    model(**{**alone, **cut, CACHE: cache}, use_cache=True)
    take_out(cache, kept_columns(ids[0], model.config, sees, end - 1))
    embeds, positions = asked[0].get("inputs_embeds"), asked[0].get("position_ids")
    embeds = model.get_input_embeddings()(ids) if embeds is None else embeds
    positions = torch.arange(length)[None] if positions is None else positions
    read = {"inputs_embeds": embeds[:, end:], "position_ids": positions[..., end:], "use_cache": True, CACHE: cache}
    if asked[0].get("per_layer_inputs") is not None:
        read["per_layer_inputs"] = asked[0]["per_layer_inputs"][:, end:]
    return decoder(**read).last_hidden_state


@pytest.fixture(params=types_of([*FAST, *HIDING]), scope="module")
def each(request, table):
    found = taken_over(request.param, table)
    yield found
    found.model.config.answer_sees = "all"


@pytest.mark.parametrize("sees", SEES)
def test_a_model_of_any_family_equals_the_definition(each, sees, table, monkeypatch):
    if getattr(each.model.get_decoder().config, "sliding_window", None):  # which would count what is left in the cache
        monkeypatch.setattr(each.model.get_decoder().config, "sliding_window", 1024)
    batch, alone = asked_of(each), [asked_of(each, ROWS[row : row + 1]) for row in range(len(ROWS))]
    model = each.model
    with without_float32():
        model.config.answer_sees = "all"
        expected = [by_cutting(each, row, sees) for row in alone]
        of_definition = gradients(model, sum(weighted(states, seed) for seed, states in enumerate(expected)))
        everything = model(**batch, output_view=True).view.states
        model.config.answer_sees = sees
        states = model(**batch, output_view=True).view.states
        found = [states[row, -one.shape[1] :][None] for row, one in enumerate(expected)]
        for one, other in zip(found, expected):
            assert max_difference(one, other) <= each.row_tolerance
        of_batch = gradients(model, sum(weighted(states, seed) for seed, states in enumerate(found)))
    largest = max(gradient.abs().max().item() for gradient in of_definition.values())
    assert of_batch.keys() == of_definition.keys()
    differences = [max_difference(of_batch[name], of_definition[name]) for name in of_batch]
    assert max(differences) <= each.row_tolerance * largest
    assert max_difference(everything, states) > 1e-3
    table.found(each.model_type, "answer sees")


@pytest.mark.whole_on_the_first("each")
@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_a_model_of_any_family_generates_as_without_a_cache(each, options, sees):
    if each.model_type == "paligemma (2)" and "cache_implementation" in options:
        pytest.skip("the plain class has no static cache of windows")
    model, batch = each.model, asked_of(each)
    model.config.answer_sees = sees
    beams = {name: value for name, value in options.items() if name == "num_beams"}
    with without_float32():
        expected = answers(model, batch, use_cache=False, **beams)
        assert torch.equal(answers(model, batch, **options), expected)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in REFUSED if name in CLASS_NAMES])
def test_a_model_that_cannot_hide_says_why(model_type, table, monkeypatch):
    found = taken_over(model_type, table)
    for sees in SEES:
        monkeypatch.setattr(found.model.config, "answer_sees", sees)
        with pytest.raises(ValueError, match=REFUSED[model_type]):
            found.model(**asked_of(found))
    table.found(model_type, "answer sees", f"no: {REFUSED[model_type]}")


@pytest.mark.parametrize("text", ["gpt2", "bart"])
def test_maps_of_what_is_read_beside_the_text_are_zero_behind_the_last_latent(text):
    model = tiny_model(text, image_fusion="cross_attention", answer_sees="no_image")
    model.get_decoder().set_attn_implementation("eager")
    batch = batch_of(model, alike_rows(model.config), padding="right")
    last = int((batch["input_ids"][0] == model.config.latent_token_id).nonzero().max())
    for layer in model(**batch, output_attentions=True).cross_attentions:
        assert layer.shape[2] == batch["input_ids"].shape[1]
        assert (layer[:, :, : last + 1].sum(dim=-1) > 0.99).all() and not layer[:, :, last + 1 :].any()
