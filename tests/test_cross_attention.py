"""A decoder alone that reads pictures beside its text: Marian, BART, and GPT-2 with cross-attention.

What holds of every decoder stands in test_latent.py, test_generation.py and test_modeling.py, for Marian and BART too.

Shapes: B batch, T tokens, E image features that a row reads, D hidden.
"""

import copy

import pytest
import torch
from tiny import (
    HIDDEN_SIZE,
    NUM_FEATURES,
    SPREAD,
    TEXT_CONFIGS,
    batch_of,
    checkpoint_activations,
    last_labels,
    max_difference,
    ragged_batch,
    random_pixels,
    rows_alone,
    seq2seq_batch,
    tiny_model,
    tiny_seq2seq,
    tiny_tokenizer,
    uncached,
    widths_of_passes,
    words,
)
from torch import nn
from transformers import AutoModelForCausalLM

from mmcoconut.audit.thoughts import read_thoughts
from mmcoconut.build import from_backbones
from mmcoconut.vision_mmcoconut import features_by_row


TEXTS = ("marian", "bart", "gpt2")
NEW_TOKENS = 5


@pytest.fixture(scope="module")
def models() -> dict:
    """One of each decoder, and the encoder-decoder, which the tests below read and do not change."""
    return {**{text: cross_model(text) for text in TEXTS}, "seq2seq": tiny_seq2seq()}


def cross_model(text, **config):
    return tiny_model(text, image_fusion="cross_attention", **config)


def batch_for(model) -> dict:
    return seq2seq_batch(model) if model.config.is_encoder_decoder else ragged_batch(model)


def generate(model, batch, **options):
    torch.manual_seed(0)
    recorded = {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(**batch, **{"max_new_tokens": NEW_TOKENS, **recorded, **options})


def assert_equals_definition(model, batch, tolerance, *, reference=None, **options):
    outputs = generate(model, batch, **options)
    with uncached(model):
        expected = generate(model, batch, use_cache=False, **(options if reference is None else reference))
    assert torch.equal(outputs.sequences, expected.sequences)
    for logits, expected_logits in zip(outputs.logits, expected.logits, strict=True):
        assert max_difference(logits, expected_logits) <= tolerance
    return outputs


def loss_and_gradients(model, batch, **kwargs) -> tuple[float, dict]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch, labels=last_labels(batch), **kwargs).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected, tolerance):
    assert found[0] == pytest.approx(expected[0], abs=tolerance)
    assert found[1].keys() == expected[1].keys()
    assert any("vision_tower" in name and gradient.abs().max() > 1e-3 for name, gradient in found[1].items())
    assert max(max_difference(found[1][name], expected[1][name]) for name in expected[1]) <= tolerance


def sinusoids(num_positions: int, width: int) -> torch.Tensor:
    """(positions, D): sin(p / 10000^(2i / D)) for all i, then the cosines."""
    angles = torch.arange(num_positions)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def transformer_decoder(decoder) -> nn.TransformerDecoder:
    """PyTorch's post-norm decoder with the weights of a Marian decoder."""
    config = decoder.config
    sizes = (config.d_model, config.decoder_attention_heads, config.decoder_ffn_dim)
    reference = nn.TransformerDecoder(nn.TransformerDecoderLayer(*sizes, dropout=0.0, batch_first=True), 2)
    for layer, own in zip(reference.layers, decoder.layers, strict=True):
        for attention, mine in ((layer.self_attn, own.self_attn), (layer.multihead_attn, own.encoder_attn)):
            projections = (mine.q_proj, mine.k_proj, mine.v_proj)
            attention.in_proj_weight.data = torch.cat([projection.weight for projection in projections])
            attention.in_proj_bias.data = torch.cat([projection.bias for projection in projections])
            attention.out_proj.load_state_dict(mine.out_proj.state_dict())
        pairs = {"linear1": "fc1", "linear2": "fc2", "norm1": "self_attn_layer_norm"}
        pairs |= {"norm2": "encoder_attn_layer_norm", "norm3": "final_layer_norm"}
        for name, other in pairs.items():
            getattr(layer, name).load_state_dict(getattr(own, other).state_dict())
    return reference.eval()


@pytest.mark.parametrize("tolerance", [1e-5])
def test_marian_is_pytorchs_transformer_decoder(tolerance):
    """Post-norm, sinusoidal positions, over all features of a row's one or two images."""
    model = cross_model(TEXT_CONFIGS["marian"](activation_function="relu"))
    image = model.config.image_token_id
    rows = [[image, *words(8, 1)], [*words(2, 2), image, *words(3, 3), image]]
    batch = batch_of(model, rows, padding="right")
    for parameter in model.get_decoder().parameters():  # biases and norms as well, which begin at 0 and 1
        parameter.data += SPREAD * torch.randn_like(parameter) if parameter.requires_grad else 0
    with torch.no_grad():
        features = torch.cat(model.get_image_features(batch["pixel_values"]).pooler_output)
        memory, visible = features_by_row(features, batch["input_ids"] == image, HIDDEN_SIZE)
        embeds = model.get_input_embeddings()(batch["input_ids"]) + sinusoids(9, HIDDEN_SIZE)
        expected = transformer_decoder(model.get_decoder())(
            embeds,
            memory,
            tgt_mask=torch.ones(9, 9).triu(1).bool(),
            tgt_key_padding_mask=batch["attention_mask"] == 0,
            memory_key_padding_mask=~visible,
        )
        states = model.model(**batch).last_hidden_state
    assert visible.sum(dim=1).tolist() == [NUM_FEATURES, 2 * NUM_FEATURES]
    real = batch["attention_mask"].bool()
    assert max_difference(states[real], expected[real]) <= tolerance


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_gpt2s_loop_equals_its_definition_and_rows_alone(padding, tolerance):
    model = cross_model("gpt2")
    batch = ragged_batch(model, padding)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        logits = model(**batch).logits
        with uncached(model):
            expected = model(**batch, use_cache=False).logits
        for row, mask, alone in zip(logits, real, rows_alone(model, batch), strict=True):
            assert max_difference(row[mask], model(**alone).logits[0]) <= tolerance
    assert max_difference(logits[real], expected[real]) <= tolerance
    gradients = loss_and_gradients(model, batch)
    with uncached(model):
        assert_same_gradients(gradients, loss_and_gradients(model, batch, use_cache=False), tolerance)
    checkpoint_activations(model.train())
    assert_same_gradients(loss_and_gradients(model, batch), gradients, tolerance)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"do_sample": True}], ids=str
)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_gpt2_generates_what_its_definition_does(models, options, tolerance):
    reference = {key: value for key, value in options.items() if "cache" not in key}
    assert_equals_definition(models["gpt2"], ragged_batch(models["gpt2"]), tolerance, reference=reference, **options)


def key_projection(model) -> nn.Module:
    """What makes the keys of the features in the decoder's first layer."""
    layer = (getattr(model.get_decoder(), "layers", None) or model.get_decoder().h)[0]
    return layer.crossattention.c_attn if hasattr(layer, "crossattention") else layer.encoder_attn.k_proj


def count_calls(module: nn.Module) -> list[int]:
    """A list that gets an entry for every call of a module from now on."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"do_sample": True}], ids=str
)
@pytest.mark.parametrize("text", [*TEXTS, "seq2seq"])
def test_keys_of_the_pictures_are_computed_once_a_generation(models, text, options):
    model = copy.deepcopy(models[text])
    keys, passes = count_calls(key_projection(model)), widths_of_passes(model)
    generate(model, batch_for(model), min_new_tokens=NEW_TOKENS, **options)
    assert len(passes) >= 3 + NEW_TOKENS  # three thoughts
    assert len(keys) == 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("text", [*TEXTS, "seq2seq"])
def test_keys_of_the_pictures_are_computed_once_a_training_step(text, checkpointing):
    model = tiny_seq2seq() if text == "seq2seq" else cross_model(text)
    if checkpointing:
        checkpoint_activations(model)
    batch = batch_for(model.train())
    ids = batch["decoder_input_ids" if text == "seq2seq" else "input_ids"]
    keys, passes = count_calls(key_projection(model)), widths_of_passes(model)
    loss = model(**batch, labels=ids).loss if text == "seq2seq" else model(**batch, labels=last_labels(batch)).loss
    assert (len(keys), len(passes) > 3) == (1, True)
    loss.backward()
    assert len(keys) == 1 + checkpointing  # recomputed once, not once a thought


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_tiles_of_an_image_are_read_with_it(models, text, tolerance):
    """Rows of an image of two tiles, of none, and of two images of one and two tiles; a batch, and the rows alone."""
    model = models[text]
    image, latent = model.config.image_token_id, model.config.latent_token_id
    rows = [[image, image, *words(4, 1), latent], [*words(3, 2), latent], [image, *words(2, 3), image, image, latent]]
    pixels, tiles = random_pixels(5), [[2], [], [1, 2]]
    batch = {**batch_of(model, rows), "pixel_values": pixels, "num_tiles": torch.tensor([2, 1, 2])}
    together = generate(model, batch).sequences[:, batch["input_ids"].shape[1] :]
    first = 0
    with torch.no_grad():
        logits = model(**batch).logits
    for index, (row, num_tiles) in enumerate(zip(rows, tiles)):
        own = pixels[first : first + sum(num_tiles)]
        alone = {"input_ids": torch.tensor([row])}
        alone |= {"pixel_values": own, "num_tiles": torch.tensor(num_tiles)} if num_tiles else {}
        with torch.no_grad():
            assert max_difference(logits[index, -len(row) :], model(**alone).logits[0]) <= tolerance
        answer = generate(model, alone).sequences[0, len(row) :]
        assert torch.equal(together[index, : len(answer)], answer)
        first += sum(num_tiles)
    with pytest.raises(ValueError, match="num_tiles counts 4 tiles"):
        model(**{**batch, "num_tiles": torch.tensor([2, 2])})
    with pytest.raises(ValueError, match="Row 0 .* ends inside an image"):
        model(**{**batch, "num_tiles": torch.tensor([3, 2])})


@pytest.mark.parametrize("value", [1e4, -1e4])
@pytest.mark.parametrize("text", [*TEXTS, "seq2seq"])
def test_features_behind_a_rows_own_are_never_read(text, value):
    model = tiny_seq2seq() if text == "seq2seq" else cross_model(text)
    batch, fuse, filled = batch_for(model), model.model.fuse, []

    def fuse_with_other_padding(*args):
        read = fuse(*args)
        padding = read["encoder_attention_mask"][..., None] == 0
        filled.append(int(padding.sum()))
        return {**read, "encoder_hidden_states": read["encoder_hidden_states"].masked_fill(padding, value)}

    expected = generate(model, batch)
    model.model.fuse = fuse_with_other_padding
    found = generate(model, batch)
    assert filled[0] > 0
    assert all(torch.equal(logits, other) for logits, other in zip(found.logits, expected.logits, strict=True))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_turn_of_text_thinks_on_over_the_pictures_of_the_first(models, text, tolerance):
    model = models[text]
    first = ragged_batch(model)
    exactly = {"max_new_tokens": 3, "min_new_tokens": 3}
    answered = generate(model, first, **exactly)
    latent = model.config.latent_token_id
    turn = torch.tensor([[*words(2, seed), latent, latent, *words(2, 9)] for seed in range(4)])
    ids = torch.cat([answered.sequences, turn], dim=1)
    mask = nn.functional.pad(first["attention_mask"], (0, ids.shape[1] - first["input_ids"].shape[1]), value=1)
    both = {"input_ids": ids, "attention_mask": mask}
    keys = count_calls(key_projection(model))
    outputs = generate(model, {**both, "past_key_values": answered.past_key_values}, **exactly)
    assert not keys
    with uncached(model):
        expected = generate(model, {**both, "pixel_values": first["pixel_values"]}, use_cache=False, **exactly)
    assert torch.equal(outputs.sequences, expected.sequences)
    for logits, expected_logits in zip(outputs.logits, expected.logits, strict=True):
        assert max_difference(logits, expected_logits) <= tolerance


@pytest.mark.parametrize("text", ["marian", "bart"])
def test_decoders_that_number_columns_count_padding_against_their_positions(models, text):
    model = models[text]
    model(torch.tensor([words(128, 1)]))
    with pytest.raises(ValueError, match="129 tokens.*128 positions"):
        model(torch.tensor([words(129, 1)]))
    past = model(torch.tensor([words(120, 1)]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="130 tokens.*128 positions"):
        model(torch.tensor([words(10, 1)]), past_key_values=past)
    mask = torch.ones(1, 129, dtype=torch.long)
    mask[:, :60] = 0
    with pytest.raises(ValueError, match="129 tokens.*128 positions"):
        model(torch.tensor([words(129, 1)]), attention_mask=mask)


def test_decoders_that_cannot_read_pictures_are_refused():
    for text in ("llama", "qwen2"):
        with pytest.raises(ValueError, match=f"{text} has none: use GPT-2"):
            cross_model(text)
    with pytest.raises(ValueError, match="set scale_embedding=False"):
        cross_model(TEXT_CONFIGS["marian"](scale_embedding=True))


def save_backbones(folder, text, *, with_cross_attention=True):
    """A ViT folder and a language model's, with its tokenizer; returns the language model."""
    torch.manual_seed(4)
    tokenizer = tiny_tokenizer()
    config = TEXT_CONFIGS[text](vocab_size=len(tokenizer), pad_token_id=5, bos_token_id=0, eos_token_id=0)
    if text == "marian":
        config.decoder_vocab_size = len(tokenizer)
    config.add_cross_attention = with_cross_attention
    causal_lm = AutoModelForCausalLM.from_config(config).eval()
    causal_lm.save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    tiny_model("gpt2", "vit").vision_tower.save_pretrained(folder / "vision")
    return causal_lm


def build(folder):
    return from_backbones(str(folder / "vision"), str(folder / "text"), image_fusion="cross_attention")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_pretrained_decoders_are_kept_and_saved_whole(tmp_path, text, tolerance):
    causal_lm = save_backbones(tmp_path, text)
    model = build(tmp_path)
    own = model.get_decoder().state_dict()
    for name, expected in causal_lm.get_decoder().state_dict().items():
        assert torch.equal(own[name][: len(expected)], expected), name
    head = causal_lm.get_output_embeddings().weight
    assert torch.equal(model.lm_head.weight[: len(head)], head)
    ids, states = torch.tensor([words(7, 1)]), torch.zeros(1, 1, HIDDEN_SIZE)
    with torch.no_grad():
        expected = causal_lm(ids, encoder_hidden_states=states, use_cache=False).logits
        assert max_difference(model(ids).logits[..., : len(head)], expected) <= tolerance
    model.save_pretrained(tmp_path / "saved")
    loaded, info = type(model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    tied = head is causal_lm.get_input_embeddings().weight
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    batch = ragged_batch(model)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_a_decoder_that_never_saw_a_picture_gets_new_cross_attention_alone(tmp_path):
    causal_lm = save_backbones(tmp_path, "gpt2", with_cross_attention=False)
    decoder = build(tmp_path).get_decoder()
    own, old = decoder.state_dict(), causal_lm.get_decoder().state_dict()
    assert all(torch.equal(own[name][: len(expected)], expected) for name, expected in old.items())
    new = own.keys() - old.keys()
    assert new and all("cross" in name for name in new)
    weights = [own[name] for name in new if name.endswith("c_attn.weight")]
    assert all(weight.std().item() == pytest.approx(SPREAD, rel=0.2) for weight in weights)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    causal_lm = save_backbones(tmp_path, "marian")
    weights = causal_lm.state_dict()
    missing = next(name for name in weights if name.endswith("layers.1.fc1.weight"))
    del weights[missing]
    causal_lm.save_pretrained(tmp_path / "text", state_dict=weights)
    with pytest.raises(ValueError, match=f"lacks 1 weights of MarianForCausalLM, {missing}"):
        build(tmp_path)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_attention_of_a_thought_is_on_the_rows_own_features(models, text, tolerance):
    model = models[text]
    image, latent = model.config.image_token_id, model.config.latent_token_id
    rows = [
        [image, *words(4, 1), latent, latent],
        [image, *words(2, 3), image, latent, latent],
        [*words(3, 2), latent, latent],
    ]
    batch = batch_of(model, rows)
    readings = read_thoughts(model, batch)
    assert [row.shape for row in readings.image_attention] == [(2, 2, n * NUM_FEATURES) for n in (1, 2, 0)]
    # What a row reads besides its images is nothing, so all its attention is on them.
    for row in (0, 1):
        assert torch.allclose(readings.image_share(row), torch.ones(2), atol=tolerance)
    for found, alone in zip(readings.image_attention, rows_alone(model, batch), strict=True):
        assert torch.allclose(found, read_thoughts(model, alone).image_attention[0], atol=tolerance)
