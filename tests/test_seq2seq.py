"""Visual tokens beside a text encoder's states, thoughts in the decoder, and the alignment of pictures with texts.

Shapes: B batch, S tokens of the encoder, T of the decoder, I images, D hidden, V vocabulary.
"""

import pytest
import torch
from tiny import (
    ENCODER_DECODER_SIZES,
    FIRST_WORD_ID,
    HIDDEN_SIZE,
    TEXT_CONFIGS,
    VISION_CONFIGS,
    VISION_SIZES,
    assert_same_gradients,
    checkpoint_activations,
    decoder_side,
    last_labels,
    loss_and_gradients,
    max_difference,
    padded,
    random_pixels,
    seq2seq_batch,
    seq2seq_rows_alone,
    tiny_model,
    tiny_seq2seq,
    tiny_tokenizer,
    uncached,
    widths_of_passes,
    words,
)
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BartForConditionalGeneration,
    Dinov2Model,
    MBartConfig,
    T5Config,
)

from mmcoconut.build import from_backbones
from mmcoconut.modeling_mmcoconut import MMCoconutForConditionalGeneration
from mmcoconut.seq2seq_mmcoconut import MMCoconutForSeq2SeqLM, MMCoconutSeq2SeqModel, alignment_loss


NEW_TOKENS = 8
PREFIXES = ("pooled_prefix", "attention_prefix")


@pytest.fixture(scope="module")
def model():
    """One that the tests below read and do not change."""
    return tiny_seq2seq()


def labels_of(batch: dict, num_labels: int = 2) -> torch.Tensor:
    """Labels (B, T) at the last real columns of each row of the decoder."""
    return last_labels(decoder_side(batch), num_labels)


def generate(model, batch, **options):
    """Sequences and the logits of every step, from one and the same state of the random numbers."""
    torch.manual_seed(0)
    recorded = {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(**batch, **{"max_new_tokens": NEW_TOKENS, **recorded, **options})


def assert_same_generation(outputs, expected, tolerance):
    assert torch.equal(outputs.sequences, expected.sequences)
    for logits, expected_logits in zip(outputs.logits, expected.logits, strict=True):
        assert max_difference(logits, expected_logits) <= tolerance


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("projector_type", PREFIXES)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_loop_equals_its_uncached_definition_and_rows_alone(projector_type, padding, tolerance):
    model = tiny_seq2seq(projector_type)
    batch = seq2seq_batch(model, padding)
    real = batch["decoder_attention_mask"].bool()
    with torch.no_grad():
        logits = model(**batch).logits
        with uncached(model):
            expected = model(**batch, use_cache=False).logits
        for row, mask, alone in zip(logits, real, seq2seq_rows_alone(model, batch), strict=True):
            assert max_difference(row[mask], model(**alone).logits[0]) <= tolerance
        model.config.thought_mode = "pause"
        unfed = model(**batch).logits
    assert max_difference(logits[real], expected[real]) <= tolerance
    assert max_difference(expected[real], unfed[real]) > 1  # the thoughts decide these values


@pytest.mark.parametrize("thought_norm", ["none", "embedding", "projection"])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_gradients_of_the_loop_equal_those_of_its_definition(thought_norm, tolerance):
    model = tiny_seq2seq("attention_prefix", thought_norm=thought_norm)
    batch = seq2seq_batch(model)
    loss, gradients = loss_and_gradients(model, batch)
    with uncached(model):
        expected_loss, expected = loss_and_gradients(model, batch, use_cache=False)
    assert loss == pytest.approx(expected_loss, abs=tolerance)
    assert_same_gradients(gradients, expected, tolerance)
    assert any("thought_feed" in name for name in gradients) == (thought_norm == "projection")
    assert any("language_model.encoder" in name for name in gradients)


@pytest.mark.parametrize("tolerance", [1e-6])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(tolerance):
    model = tiny_seq2seq().train()
    batch = seq2seq_batch(model)
    expected_loss, expected = loss_and_gradients(model, batch)
    calls = []
    handle = model.get_decoder().layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint_activations(model)
    loss, gradients = loss_and_gradients(model, batch)
    handle.remove()
    assert loss == pytest.approx(expected_loss, abs=tolerance)
    assert_same_gradients(gradients, expected, tolerance)
    passes = int((batch["decoder_input_ids"] == model.config.latent_token_id).sum(dim=1).max()) + 1
    assert len(calls) == 2 * passes


def test_the_answers_loss_reaches_every_thought(model):
    batch = seq2seq_batch(model)
    thoughts = []
    handle = model.model.thought_feed.register_forward_hook(lambda module, args, thought: thoughts.append(thought))
    loss = model(**batch, labels=labels_of(batch, num_labels=1)).loss
    handle.remove()
    counts = (batch["decoder_input_ids"] == model.config.latent_token_id).sum(dim=1)  # (B,)
    reached = torch.stack([gradient.norm(dim=-1) for gradient in torch.autograd.grad(loss, thoughts)], dim=1)
    assert torch.equal(reached > 1e-4, torch.arange(len(thoughts)) < counts[:, None])


def test_pause_reads_the_latents_embedding_in_one_pass():
    model = tiny_seq2seq(thought_mode="pause")
    batch = seq2seq_batch(model)
    passes = widths_of_passes(model)
    with torch.no_grad():
        outputs = model(**batch, output_thoughts=True)
    embedding = model.get_input_embeddings().weight[model.config.latent_token_id]
    assert outputs.thought_mask.sum(dim=1).tolist() == [2, 3, 1, 0]
    assert (outputs.thoughts[outputs.thought_mask] == embedding).all()
    assert len(passes) == 1


@pytest.mark.parametrize("tolerance", [1e-5])
def test_without_pictures_and_thoughts_it_is_the_librarys_bart(model, tolerance):
    bart = BartForConditionalGeneration(model.config.text_config).eval()
    bart.model.load_state_dict(model.language_model.state_dict())
    questions = padded([words(7, 1), words(4, 2)], padding="right", pad_token_id=model.config.text_config.pad_token_id)
    labels = torch.tensor([words(5, 3), [*words(3, 4), -100, -100]])
    with torch.no_grad():
        expected = bart(**questions, labels=labels)
        outputs = model(**questions, labels=labels)
    assert max_difference(outputs.logits, expected.logits) <= tolerance
    assert outputs.loss.item() == pytest.approx(expected.loss.item(), abs=tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "temperature": 1.5},
        {"do_sample": True, "num_return_sequences": 3},
        {"repetition_penalty": 1.5},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_every_decoding_strategy_equals_the_definition(model, options, tolerance):
    batch = seq2seq_batch(model)
    reference = {key: value for key, value in options.items() if "cache" not in key}
    with uncached(model):
        expected = generate(model, batch, use_cache=False, **reference)
    assert_same_generation(generate(model, batch, **options), expected, tolerance)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
def test_a_batch_is_answered_as_its_rows_alone(model, options):
    batch = seq2seq_batch(model)
    together = generate(model, batch, **options).sequences[:, batch["decoder_input_ids"].shape[1] :]
    pad = model.generation_config.pad_token_id
    for row, alone in zip(together, seq2seq_rows_alone(model, batch), strict=True):
        answer = generate(model, alone, **options).sequences[0, alone["decoder_input_ids"].shape[1] :]
        assert torch.equal(row[: len(answer)], answer)
        assert (row[len(answer) :] == pad).all()


@pytest.mark.parametrize("tolerance", [1e-5])
def test_prompt_lookup_equals_plain_decoding(model, tolerance):
    for row in seq2seq_rows_alone(model, seq2seq_batch(model)):
        assert_same_generation(generate(model, row, prompt_lookup_num_tokens=3), generate(model, row), tolerance)


def test_thoughts_and_pictures_decide_what_is_generated():
    """Without this, equality with the definition would say little."""
    model = tiny_seq2seq("attention_prefix")
    batch = seq2seq_batch(model)
    logits = generate(model, batch).logits[0]
    blind = generate(model, {**batch, "pixel_values": batch["pixel_values"].roll(1, 0)}).logits[0]
    model.config.thought_mode = "pause"
    unfed = generate(model, batch).logits[0]
    assert ((logits - unfed).abs().amax(dim=1) > 0.1).tolist() == [True, True, True, False]
    assert ((logits - blind).abs().amax(dim=1) > 0.1).tolist() == [True, True, False, True]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_encoder_outputs_take_the_place_of_question_and_pictures_and_are_made_once(model, options):
    batch = seq2seq_batch(model)
    encoder, decoder = ({k: v for k, v in batch.items() if k.startswith("decoder_") == own} for own in (False, True))
    runs = []
    parts = (model.vision_tower, model.get_encoder())
    handles = [part.register_forward_hook(lambda *_: runs.append(1)) for part in parts]
    expected = generate(model, batch, **options)
    assert len(runs) == 2
    with torch.no_grad():
        encoder_outputs = model.model.encode(**encoder)
    outputs = generate(model, {**decoder, "encoder_outputs": encoder_outputs}, **options)
    assert len(runs) == 4
    for handle in handles:
        handle.remove()
    assert_same_generation(outputs, expected, 0.0)


@pytest.mark.parametrize("tolerance", [1e-5])
def test_an_answer_goes_on_over_its_cache(model, tolerance):
    batch = seq2seq_batch(model)
    ids, mask = batch["decoder_input_ids"], batch["decoder_attention_mask"]
    encoder = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        expected = model(**batch).logits
        for cut in range(1, ids.shape[1]):
            outputs = model.model.encode(**encoder)
            first = model(
                encoder_outputs=outputs, decoder_input_ids=ids[:, :cut], decoder_attention_mask=mask[:, :cut]
            )
            second = model(
                encoder_outputs=outputs,
                decoder_input_ids=ids[:, cut:],
                decoder_attention_mask=mask,
                past_key_values=first.past_key_values,
            )
            logits = torch.cat([first.logits, second.logits], dim=1)
            assert max_difference(logits[mask.bool()], expected[mask.bool()]) <= tolerance, cut


def test_a_prefill_in_chunks_is_refused(model):
    with pytest.raises(ValueError, match="prefill_chunk_size does not work"):
        generate(model, seq2seq_batch(model), prefill_chunk_size=3)


@pytest.mark.parametrize("num_items_in_batch", [None, 17])
@pytest.mark.parametrize("tolerance", [1e-6])
def test_labels_are_what_each_column_predicts(model, num_items_in_batch, tolerance):
    batch = seq2seq_batch(model)
    labels = labels_of(batch)
    labels[3] = -100  # a row that teaches nothing
    options = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
    with torch.no_grad():
        outputs = model(**batch, labels=labels, **options)
    log_probs = outputs.logits.log_softmax(dim=-1)
    picked = log_probs.gather(2, labels.clamp(min=0)[..., None])[..., 0][labels != -100]
    assert len(picked) == 6
    assert outputs.loss.item() == pytest.approx(-picked.sum().item() / (num_items_in_batch or 6), abs=tolerance)


def test_labels_alone_make_the_decoders_text(model):
    start, pad = model.config.text_config.decoder_start_token_id, model.config.text_config.pad_token_id
    labels = torch.tensor([[7, 8, 9], [7, -100, -100], [-100, 8, 9]])
    expected = torch.tensor([[start, 7, 8], [start, 7, pad], [start, pad, 8]])
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels), expected)
    batch = {name: tensor for name, tensor in seq2seq_batch(model).items() if not name.startswith("decoder_")}
    labels = torch.tensor([words(4, seed) for seed in range(4)])
    with torch.no_grad():
        loss = model(**batch, labels=labels).loss
        given = model.prepare_decoder_input_ids_from_labels(labels)
        assert loss == model(**batch, labels=labels, decoder_input_ids=given).loss


def test_the_head_runs_where_it_is_needed():
    model = tiny_seq2seq().train()
    batch = seq2seq_batch(model)
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    assert model(**batch, labels=labels_of(batch)).logits is None
    kept = model(**batch, logits_to_keep=2).logits
    assert seen == [(4 * 2, HIDDEN_SIZE), (4, 2, HIDDEN_SIZE)]
    assert max_difference(kept, model(**batch).logits[:, -2:]) <= 1e-6


def test_placeholders_are_not_read_as_text_and_padding_is_not_read():
    model = tiny_seq2seq()
    batch = seq2seq_batch(model)
    with torch.no_grad():
        expected = model(**batch).logits
        other_pad = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, FIRST_WORD_ID)}
        assert torch.equal(model(**other_pad).logits, expected)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # is the embeddings' as well
        model.get_input_embeddings().weight[model.config.image_token_id] = 100 * torch.randn(HIDDEN_SIZE)
        assert torch.equal(model(**batch).logits, expected)
        model.get_input_embeddings().weight[batch["input_ids"][0, 1]] = torch.randn(HIDDEN_SIZE)
        assert max_difference(model(**batch).logits[0], expected[0]) > 0.1


def test_visual_tokens_stand_before_the_states_with_their_mask(model):
    batch = seq2seq_batch(model)
    with torch.no_grad():
        encoded = model.model.encode(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
    assert encoded.last_hidden_state.shape[1] == 2 * 2 + batch["input_ids"].shape[1]
    assert encoded.attention_mask[:, :4].tolist() == [[1, 1, 0, 0], [1] * 4, [0] * 4, [1, 1, 0, 0]]
    text = batch["attention_mask"] * (batch["input_ids"] != model.config.image_token_id)
    assert torch.equal(encoded.attention_mask[:, 4:], text)
    tokens = torch.cat(encoded.image_hidden_states).unflatten(-1, (2, HIDDEN_SIZE))  # (I, 2, D)
    assert torch.equal(encoded.last_hidden_state[0, :2], tokens[0])
    assert torch.equal(encoded.last_hidden_state[1, :4], tokens[1:3].flatten(0, 1))
    assert encoded.image_embeds.shape == (4, HIDDEN_SIZE)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [([[3.0, 0.0]], 0.0), ([[-2.0, 0.0]], 2.0), ([[0.0, 5.0]], 1.0), ([[0.0, 1.0], [1.0, 1.0]], 1 - 0.25 * 2**0.5)],
)
@pytest.mark.parametrize("tolerance", [1e-6])
def test_alignment_of_vectors_worked_by_hand(texts, expected, tolerance):
    images = torch.tensor([[1.0, 0.0], [2.0, 0.0]])[: len(texts)]
    assert alignment_loss(images, torch.tensor(texts)).item() == pytest.approx(expected, abs=tolerance)


def texts_of_images(model) -> dict:
    """Four texts of different lengths, as a model is given them to align its four images with."""
    pad = model.config.text_config.pad_token_id
    texts = padded([words(5, 1), words(3, 2), words(7, 3), words(2, 4)], padding="right", pad_token_id=pad)
    return {f"alignment_{name}": tensor for name, tensor in texts.items()}


@pytest.mark.parametrize("tolerance", [1e-6])
def test_the_teachers_vector_is_the_mean_of_its_real_states(model, tolerance):
    texts = texts_of_images(model)
    ids, mask = texts["alignment_input_ids"], texts["alignment_attention_mask"]
    vectors = model.get_text_features(ids, mask).pooler_output
    for vector, row, real in zip(vectors, ids, mask.bool()):
        with torch.no_grad():
            states = model.get_encoder()(row[real][None]).last_hidden_state[0]
        assert max_difference(vector, functional.normalize(states.mean(dim=0), dim=0)) <= tolerance
    assert torch.equal(model.get_text_features(ids.masked_fill(mask == 0, FIRST_WORD_ID), mask).pooler_output, vectors)


@pytest.mark.parametrize("projector_type", PREFIXES)
def test_alignment_teaches_the_pictures_side_only_and_runs_no_decoder(projector_type):
    model = tiny_seq2seq(projector_type)
    batch = seq2seq_batch(model)
    passes = widths_of_passes(model)
    encoder = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    outputs = model(**encoder, **texts_of_images(model))
    outputs.alignment_loss.backward()
    assert passes == [] and outputs.loss is None and outputs.logits is None
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {"model.multi_modal_projector.embedding.adapter.weight"} < reached
    assert any(name.startswith("model.vision_tower.encoder.layer.0") for name in reached)
    assert not any("language_model" in name or "lm_head" in name for name in reached)


@pytest.mark.parametrize("tolerance", [1e-6])
def test_both_losses_come_of_one_call_and_the_labels_loss_stays_what_it_is(model, tolerance):
    batch = seq2seq_batch(model)
    texts = texts_of_images(model)
    with torch.no_grad():
        both = model(**batch, labels=labels_of(batch), **texts)
        assert both.loss == model(**batch, labels=labels_of(batch)).loss
        described = model.get_text_features(texts["alignment_input_ids"], texts["alignment_attention_mask"])
        cosine = functional.cosine_similarity(both.image_embeds, described.pooler_output)
    assert both.alignment_loss.item() == pytest.approx(1 - cosine.mean().item(), abs=tolerance)


@pytest.mark.parametrize("pooling, strategy", [("mean", "default"), ("mean", "full"), ("cls", "full")])
@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("tolerance", [1e-6])
def test_a_pictures_vector_is_pooled_normalised_and_adapted(pooling, strategy, adapter, tolerance):
    vision = VISION_CONFIGS["dinov2"](hidden_size=HIDDEN_SIZE) if not adapter else VISION_CONFIGS["dinov2"]()
    options = {"image_pooling": pooling, "alignment_adapter": adapter, "vision_feature_select_strategy": strategy}
    model = tiny_seq2seq(vision=vision, **options)
    pixels = random_pixels(3)
    with torch.no_grad():
        states = model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        states = states[:, 1:] if strategy == "default" else states
        pooled = functional.normalize(states[:, 0] if pooling == "cls" else states.mean(dim=1), dim=-1)
        linear = model.model.multi_modal_projector.embedding.adapter
        expected = pooled @ linear.weight.T + linear.bias if adapter else pooled
        outputs = model.get_image_features(pixels)
    assert max_difference(outputs.image_embeds, expected) <= tolerance


@pytest.mark.parametrize("tolerance", [1e-6])
def test_only_attention_tells_pictures_of_one_mean_apart(tolerance):
    width = VISION_SIZES["hidden_size"]
    patches, change = torch.randn(1, 4, width), torch.randn(1, 1, width)
    moved = patches + torch.cat([change, -change, torch.zeros(1, 2, width)], dim=1)  # the same mean
    with torch.no_grad():
        pooled, attended = (tiny_seq2seq(name).model.multi_modal_projector for name in PREFIXES)
        assert max_difference(pooled(patches), pooled(moved)) <= tolerance
        assert max_difference(attended(patches), attended(moved)) > 0.1
        assert attended(patches).shape == pooled(patches).shape == (1, 2, HIDDEN_SIZE)


def test_what_cannot_be_aligned_or_read_is_refused(model):
    batch = seq2seq_batch(model)
    encoder = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    texts = texts_of_images(model)
    with pytest.raises(ValueError, match="4 images to align with 3 texts"):
        model(**encoder, **{name: tensor[:3] for name, tensor in texts.items()})
    with pytest.raises(ValueError, match="no question to encode: pass input_ids"):
        model.generate(decoder_input_ids=torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="nothing for the decoder to read"):
        model(**encoder)
    with pytest.raises(ValueError, match="129 tokens, but the text encoder has 128 positions"):
        model(torch.tensor([words(129, 1)]), decoder_input_ids=torch.tensor([[0]]))
    with pytest.raises(ValueError, match="129 tokens.*128 positions"):
        model(torch.tensor([words(3, 1)]), decoder_input_ids=torch.tensor([words(129, 1)]))
    labels = torch.full_like(batch["decoder_input_ids"], -100)
    labels[1, 2] = 7
    with pytest.raises(ValueError, match="Row 1 .* after its last labelled token"):
        model(**batch, labels=labels)
    with pytest.raises(ValueError, match="no image vectors: pass the images, and take a projector"):
        linear = tiny_seq2seq("linear")
        linear(**encoder, **texts)


def test_each_fusion_has_one_class(model, tmp_path):
    model.save_pretrained(tmp_path)
    wrong = (
        lambda: MMCoconutForConditionalGeneration.from_pretrained(tmp_path),
        lambda: MMCoconutForSeq2SeqLM(tiny_model("bart").config),
    )
    for build in wrong:
        with pytest.raises(ValueError, match="use MMCoconutForSeq2SeqLM for `encoder`, and"):
            build()


OTHERS = {
    "marian": TEXT_CONFIGS["marian"](),
    "scaled bart": TEXT_CONFIGS["bart"](scale_embedding=True),
    "mbart": MBartConfig(**ENCODER_DECODER_SIZES),
}


@pytest.mark.parametrize("text", OTHERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_other_encoder_decoders_think_as_the_definition_says(text, tolerance):
    model = tiny_seq2seq(text=OTHERS[text])
    batch = seq2seq_batch(model)
    real = batch["decoder_attention_mask"].bool()
    with torch.no_grad():
        logits = model(**batch).logits[real]
        with uncached(model):
            assert max_difference(logits, model(**batch, use_cache=False).logits[real]) <= tolerance


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (T5Config(d_model=HIDDEN_SIZE, d_kv=8, num_heads=4, d_ff=64, num_layers=2), "has no part without its head"),
        (TEXT_CONFIGS["marian"](share_encoder_decoder_embeddings=False), "take a language model that shares them"),
        (TEXT_CONFIGS["bart"](decoder_layerdrop=0.5), "decoder_layerdrop=0.5 drops different layers in each pass"),
        (TEXT_CONFIGS["gpt2"](), "gpt2 is a decoder alone: use BART"),
    ],
)
def test_encoder_decoders_that_could_not_think_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        tiny_seq2seq(text=text)


def test_a_saved_decoder_without_an_encoder_is_refused(tmp_path):
    AutoModelForCausalLM.from_config(TEXT_CONFIGS["gpt2"]()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gpt2 is a decoder alone: use BART"):
        from_backbones(
            image_fusion="encoder",
            text=str(tmp_path),
            vision_config=VISION_CONFIGS["dinov2"](),
            tokenizer=tiny_tokenizer(),
        )


def save_backbones(folder, *, bias: float = 0.0) -> tuple:
    """DINOv2 and BART checkpoints of random weights, and a tokenizer."""
    torch.manual_seed(4)
    tokenizer = tiny_tokenizer()
    ids = {"pad_token_id": 5, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    bart = BartForConditionalGeneration(TEXT_CONFIGS["bart"](vocab_size=len(tokenizer), **ids)).eval()
    bart.final_logits_bias += bias
    tower = Dinov2Model(VISION_CONFIGS["dinov2"]()).eval()
    for name, part in {"text": bart, "vision": tower}.items():
        part.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "text")
    return tower, bart


@pytest.mark.parametrize("tolerance", [1e-5])
def test_pretrained_backbones_are_kept(tmp_path, tolerance):
    tower, bart = save_backbones(tmp_path)
    model = from_backbones(
        str(tmp_path / "vision"), str(tmp_path / "text"), projector_type="pooled_prefix", image_fusion="encoder"
    )
    for part, own in ((bart.model, model.language_model), (tower, model.vision_tower)):
        weights = own.state_dict()
        for name, expected in part.state_dict().items():
            assert torch.equal(weights[name][: len(expected)], expected), name
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.generation_config.decoder_start_token_id == 0
    ids, labels = torch.tensor([words(6, 1)]), torch.tensor([words(4, 2)])
    with torch.no_grad():
        expected = bart(ids, labels=labels).logits
        logits = model(ids, labels=labels).logits[..., : expected.shape[-1]]
    assert max_difference(logits, expected) <= tolerance


def test_a_bart_that_shifts_its_logits_is_refused(tmp_path):
    save_backbones(tmp_path, bias=0.1)
    with pytest.raises(ValueError, match="has a bias, or scales or caps its logits"):
        from_backbones(
            str(tmp_path / "vision"), str(tmp_path / "text"), projector_type="pooled_prefix", image_fusion="encoder"
        )


def test_saved_parts_load_by_themselves_and_tied_weights_stay_one(tmp_path, model):
    model.save_pretrained(tmp_path / "whole")
    loaded, info = MMCoconutForSeq2SeqLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(info.values()), info
    embeddings = loaded.get_input_embeddings().weight
    language_model = loaded.language_model
    for tied in (loaded.lm_head, language_model.encoder.embed_tokens, language_model.decoder.embed_tokens):
        assert tied.weight is embeddings
    base = MMCoconutSeq2SeqModel.from_pretrained(tmp_path / "whole")
    assert torch.equal(base.get_input_embeddings().weight, embeddings)
    for name in ("vision_tower", "language_model"):
        getattr(loaded, name).save_pretrained(tmp_path / name)
        part, info = AutoModel.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info.values()), info
        expected = getattr(model, name).state_dict()
        assert part.state_dict().keys() == expected.keys()
        assert all(torch.equal(weight, expected[key]) for key, weight in part.state_dict().items())


@pytest.mark.parametrize("tolerance", [0.0])
def test_teacher_says_the_same_in_training_as_in_evaluation(tolerance):
    model = tiny_seq2seq(text=TEXT_CONFIGS["bart"](dropout=0.5))
    texts = torch.tensor([words(5, 1), words(5, 2)])
    expected = model.get_text_features(texts, torch.ones_like(texts)).pooler_output
    model.train()
    assert max_difference(model.get_text_features(texts, torch.ones_like(texts)).pooler_output, expected) <= tolerance
    assert model.get_encoder().training
