"""The model: images into the decoder, loss and logits out, built from backbones and saved without losing a tensor."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    DECODERS,
    HIDDEN_SIZE,
    NUM_FEATURES,
    TEXT_CONFIGS,
    TEXT_SIZES,
    TOWER_STRATEGIES,
    TOWERS,
    VISION_CONFIGS,
    VISION_SIZES,
    batch_of,
    checkpoint_activations,
    last_labels,
    max_difference,
    no_picture,
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
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    Dinov2Model,
    DynamicCache,
    SiglipConfig,
    SiglipModel,
    StaticCache,
    ViTModel,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from mmcoconut.build import from_backbones
from mmcoconut.configuration_mmcoconut import SPECIAL_TOKENS, TOKEN_ID_FIELDS
from mmcoconut.modeling_mmcoconut import MMCoconutForConditionalGeneration, MMCoconutModel


PROJECTORS = ("linear", "mlp", "transformer")


def image_ids(config):
    return [config.image_token_id] * config.image_seq_length


def image_row(config, seed=1):
    """A prompt of one image and no latent."""
    return [*words(3, seed), *image_ids(config), *words(4, seed + 1)]


def latent_row(config, num_latents=2, seed=1):
    """A prompt of text with latents, without an image."""
    return [*words(4, seed), *[config.latent_token_id] * num_latents, *words(3, seed + 1)]


def real_columns(values, batch):
    return values[batch["attention_mask"].bool()]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("image_fusion", ["replace", "add"])
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_batch_equals_its_rows_alone(text, image_fusion, padding, tolerance):
    """Rows of none, one and two images, with none to three latents at different columns."""
    model = tiny_model(text, image_fusion=image_fusion)
    batch = ragged_batch(model, padding)
    with torch.no_grad():
        logits = model(**batch).logits
        for row, mask, alone in zip(logits, batch["attention_mask"], rows_alone(model, batch)):
            assert max_difference(row[mask.bool()], model(**alone).logits[0]) <= tolerance


@pytest.mark.parametrize("vision", TOWERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_each_row_reads_its_own_images_in_reading_order(vision, tolerance):
    model = tiny_model(vision=vision)
    batch = ragged_batch(model)
    order = [0, 2, 1, 3]  # the two images of the second row change places
    swapped = {**batch, "pixel_values": batch["pixel_values"][order]}
    with torch.no_grad():
        difference = (model(**batch).logits - model(**swapped).logits).abs().amax(dim=(1, 2))
    assert difference[[0, 2, 3]].max() <= tolerance
    assert difference[1] > 0.1


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("tolerance", [1e-6])
def test_replace_puts_features_where_the_placeholders_are(padding, tolerance):
    model = tiny_model("qwen2", image_fusion="replace")
    batch = batch_of(model, [image_row(model.config), words(5, 7)], padding=padding)
    with torch.no_grad():
        features = model.model.multi_modal_projector(tower_states(model, batch["pixel_values"])[:, 1:])
        embeds = model.get_input_embeddings()(batch["input_ids"])
        embeds[batch["input_ids"] == model.config.image_token_id] = features.flatten(0, 1)
        mask = batch["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = plain_language_model(model)(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
        logits = model(**batch).logits
    assert max_difference(real_columns(logits, batch), real_columns(expected.logits, batch)) <= tolerance


@pytest.mark.parametrize("tolerance", [1e-6])
def test_add_is_embedding_plus_feature(tolerance):
    model = tiny_model("qwen2", image_fusion="add")
    batch = batch_of(model, [image_row(model.config), image_row(model.config, 4)])
    with torch.no_grad():
        features = model.model.multi_modal_projector(tower_states(model, batch["pixel_values"])[:, 1:])
        embeds = model.get_input_embeddings()(batch["input_ids"])
        embeds[:, 3 : 3 + NUM_FEATURES] += features
        expected = plain_language_model(model)(inputs_embeds=embeds)
        difference = max_difference(model(**batch).logits, expected.logits)
    assert difference <= tolerance


def tower_states(model, pixel_values, layer=-1):
    return model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[layer]


@pytest.mark.parametrize("vision, strategy", TOWER_STRATEGIES)
@pytest.mark.parametrize("layers", [-1, -2, [0, -1]])
@pytest.mark.parametrize("tolerance", [1e-6])
def test_features_are_the_layers_and_tokens_that_the_configuration_names(vision, strategy, layers, tolerance):
    model = tiny_model(vision=vision, vision_feature_layer=layers, vision_feature_select_strategy=strategy)
    pixels = random_pixels(2)
    with torch.no_grad():
        chosen = [tower_states(model, pixels, layer) for layer in ([layers] if isinstance(layers, int) else layers)]
        joined = torch.cat(chosen, dim=-1)[:, 1 if strategy == "default" else 0 :]
        expected = model.model.multi_modal_projector(joined)
        features = torch.stack(model.get_image_features(pixels).pooler_output)
    assert max_difference(features, expected) <= tolerance
    assert features.shape[1:] == (model.config.image_seq_length, HIDDEN_SIZE)


@pytest.mark.parametrize("projector_type", PROJECTORS)
@pytest.mark.parametrize("tolerance", [1e-6])
def test_permuted_images_give_permuted_features(projector_type, tolerance):
    model = tiny_model(projector_type=projector_type)
    pixels = random_pixels(4)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        features = torch.stack(model.get_image_features(pixels).pooler_output)
        permuted = torch.stack(model.get_image_features(pixels[order]).pooler_output)
    assert max_difference(permuted, features[order]) <= tolerance
    assert max_difference(permuted, features) > 0.1


@pytest.mark.parametrize("tolerance", [1e-6])
def test_projectors_compute_what_their_names_say(tolerance):
    states = torch.randn(2, NUM_FEATURES, VISION_SIZES["hidden_size"])
    linear = tiny_model(projector_type="linear").model.multi_modal_projector
    assert max_difference(linear(states), states @ linear.weight.T + linear.bias) <= tolerance

    mlp = tiny_model(projector_type="mlp", projector_hidden_act="relu").model.multi_modal_projector
    assert max_difference(mlp(states), mlp.linear_2(torch.relu(mlp.linear_1(states)))) <= tolerance

    transformer = tiny_model(projector_type="transformer").model.multi_modal_projector
    encoded = transformer.layer(transformer.norm(transformer.linear(states)))
    assert max_difference(transformer(states), encoded) <= tolerance
    # Tokens of one image see each other, and no other image's.
    changed = states.clone()
    changed[0, 0] += 1
    difference = (transformer(changed) - transformer(states)).abs().amax(dim=-1)
    assert difference[0].min() > 1e-3
    assert difference[1].max() <= tolerance


@pytest.mark.parametrize("tolerance", [0.0])
def test_encoded_images_can_be_given_in_the_place_of_pixels(tolerance):
    model = tiny_model()
    batch = ragged_batch(model)
    with torch.no_grad():
        expected = model(**batch)
        encoded = model.get_image_features(batch.pop("pixel_values"))
        outputs = model(**batch, mm_encoder_outputs={"image": encoded})
    assert max_difference(outputs.logits, expected.logits) <= tolerance
    assert len(outputs.image_hidden_states) == 4
    assert torch.equal(torch.stack(outputs.image_hidden_states), torch.stack(encoded.pooler_output))


@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [0.0])
def test_embeddings_can_be_given_in_the_place_of_ids(text, tolerance):
    model = tiny_model(text)
    batch = ragged_batch(model)
    with torch.no_grad():
        expected = model(**batch).logits
        embeds = model.get_input_embeddings()(batch.pop("input_ids"))
        logits = model(inputs_embeds=embeds, **batch).logits
    assert max_difference(logits, expected) <= tolerance


@pytest.mark.parametrize("tolerance", [1e-5])
def test_thoughts_are_the_states_before_their_columns(tolerance):
    model = tiny_model("qwen2")
    batch = ragged_batch(model)
    with torch.no_grad():
        outputs = model.model(**batch, output_thoughts=True)
    assert outputs.thought_mask.tolist() == [[True] * 2 + [False], [True] * 3, [True] * 3, [False] * 3]
    latent = batch["input_ids"] == model.config.latent_token_id
    for states, is_latent, thoughts, mask in zip(
        outputs.last_hidden_state, latent, outputs.thoughts, outputs.thought_mask
    ):
        expected = states[is_latent.nonzero().flatten() - 1]
        assert thoughts[mask].numel() == 0 or max_difference(thoughts[mask], expected) <= tolerance
        assert thoughts[~mask].abs().sum() == 0


def test_thoughts_of_a_batch_without_latents_are_empty():
    model = tiny_model()
    outputs = model(**batch_of(model, [words(4, 1)]), output_thoughts=True)
    assert outputs.thoughts.shape == (1, 0, HIDDEN_SIZE)
    assert outputs.thought_mask.shape == (1, 0)


@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [0.0])
def test_pause_is_the_plain_language_model_reading_the_latents_embedding(text, tolerance):
    model = tiny_model(text, thought_mode="pause")
    batch = batch_of(model, [latent_row(model.config), latent_row(model.config, seed=3)])
    with torch.no_grad():
        outputs = model(**batch, output_thoughts=True)
        expected = plain_language_model(model)(**batch, **no_picture(model, 2)).logits
    assert max_difference(outputs.logits, expected) <= tolerance
    latent_embedding = model.get_input_embeddings().weight[model.config.latent_token_id]
    assert max_difference(outputs.thoughts, latent_embedding) <= tolerance


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("text", [*DECODERS, "sliding"])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_hidden_states_and_attentions_equal_those_of_the_definition(text, padding, tolerance):
    model = tiny_model(sliding_qwen2_config(window=4) if text == "sliding" else text)
    model.set_attn_implementation("eager")
    batch = ragged_batch(model, padding)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        outputs = model(**batch, **wanted)
        with uncached(model):
            expected = model(**batch, **wanted, use_cache=False)
    assert len(outputs.hidden_states) == len(expected.hidden_states) == 3
    for states, expected_states in zip(outputs.hidden_states, expected.hidden_states):
        assert max_difference(real_columns(states, batch), real_columns(expected_states, batch)) <= tolerance
    assert len(outputs.attentions) == len(expected.attentions) == 2
    for maps, expected_maps in zip(outputs.attentions, expected.attentions):
        maps, expected_maps = maps.transpose(1, 2), expected_maps.transpose(1, 2)  # (B, T, H, T)
        assert max_difference(real_columns(maps, batch), real_columns(expected_maps, batch)) <= tolerance


@pytest.mark.parametrize("text", ["gpt2", "sliding"])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_attentions_over_a_past_equal_those_of_one_call(text, tolerance):
    model = tiny_model(sliding_qwen2_config(window=4) if text == "sliding" else text)
    model.set_attn_implementation("eager")
    ids = torch.tensor([[*latent_row(model.config), *latent_row(model.config, seed=5)]])
    with torch.no_grad():
        expected = model(ids, output_attentions=True).attentions
        past = model(ids[:, :9], use_cache=True).past_key_values
        attentions = model(ids[:, 9:], past_key_values=past, output_attentions=True).attentions
    for maps, expected_maps in zip(attentions, expected):
        assert max_difference(maps, expected_maps[:, :, 9:]) <= tolerance


@pytest.mark.whole_on_the_first("text")
@pytest.mark.parametrize("cut", [5, 6, 8, 12])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("text", [*DECODERS, "sliding"])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_sequence_may_be_cut_into_calls_anywhere(text, cache, cut, tolerance):
    """The columns 5, 6, 8 and 11 are latents of one row or the other: a call may begin with one."""
    config = sliding_qwen2_config(window=4) if text == "sliding" else None
    model = tiny_model(config or text)
    batch = batch_of(model, [words(14, 1), words(13, 2)])
    batch["input_ids"][0, [5, 6]] = model.config.latent_token_id
    batch["input_ids"][1, [6, 8, 11]] = model.config.latent_token_id
    ids, mask = batch["input_ids"], batch["attention_mask"]
    past = StaticCache(model.config.text_config, max_cache_len=20) if cache == "static" else DynamicCache()
    if cache == "dynamic" and text == "sliding":
        past = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        expected = model(**batch).logits
        first = model(ids[:, :cut], attention_mask=mask[:, :cut], past_key_values=past)
        second = model(ids[:, cut:], attention_mask=mask, past_key_values=first.past_key_values)
    logits = torch.cat([first.logits, second.logits], dim=1)
    assert max_difference(real_columns(logits, batch), real_columns(expected, batch)) <= tolerance


@pytest.mark.parametrize("num_items_in_batch", [None, 17])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("tolerance", [1e-6])
def test_loss_equals_that_of_all_logits(training, padding, num_items_in_batch, tolerance):
    model = tiny_model("qwen2").train(training)
    batch = ragged_batch(model, padding)
    labels = last_labels(batch, num_labels=2)
    labels[0] = -100  # a row that teaches nothing
    options = {} if num_items_in_batch is None else {"num_items_in_batch": torch.tensor(num_items_in_batch)}
    with torch.no_grad():
        loss = model(**batch, labels=labels, **options).loss
        expected = ForCausalLMLoss(model(**batch).logits, labels, model.config.text_config.vocab_size, **options)
    assert loss.item() == pytest.approx(expected.item(), abs=tolerance)


def test_training_runs_the_head_on_labelled_columns_only():
    model = tiny_model().train()
    batch = ragged_batch(model)
    labels = last_labels(batch, num_labels=2)
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    outputs = model(**batch, labels=labels)
    assert outputs.logits is None
    assert seen == [(4 * 2, HIDDEN_SIZE)]
    assert model(**batch, labels=labels, logits_to_keep=3).logits.shape[:2] == (4, 3)
    assert seen[1:] == [(4 * 2, HIDDEN_SIZE), (4, 3, HIDDEN_SIZE)]


@pytest.mark.parametrize("kept", [1, 3, [0, 4, 5]])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tolerance", [1e-6])
def test_kept_logits_are_those_of_all(kept, training, tolerance):
    model = tiny_model().train(training)
    batch = ragged_batch(model)
    columns = slice(-kept, None) if isinstance(kept, int) else kept
    with torch.no_grad():
        expected = model(**batch).logits[:, columns]
        logits = model(**batch, logits_to_keep=torch.tensor(kept) if isinstance(kept, list) else kept).logits
        with_labels = model(**batch, labels=last_labels(batch), logits_to_keep=kept if kept == 1 else 3)
    assert max_difference(logits, expected) <= tolerance
    assert with_labels.logits.shape[1] == (1 if kept == 1 else 3)
    assert with_labels.loss is not None


@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [0.25])
def test_bfloat16_is_close_to_float32(text, tolerance):
    """Tolerance: logits are of size 3, bfloat16 carries 8 bits, and errors grow from thought to thought."""
    model = tiny_model(text).to(torch.bfloat16)
    batch = ragged_batch(model)
    with torch.no_grad():
        rounded = copy.deepcopy(model)(**{**batch, "pixel_values": batch["pixel_values"].bfloat16()}).logits
        expected = model.float()(**{**batch, "pixel_values": batch["pixel_values"].bfloat16().float()}).logits
    assert rounded.dtype == torch.bfloat16
    assert max_difference(real_columns(rounded.float(), batch), real_columns(expected, batch)) <= tolerance


def save_vision(folder, vision, **options):
    """A pretrained vision checkpoint of random weights: CLIP and SigLIP with their text halves; its image tower."""
    torch.manual_seed(3)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = VISION_CONFIGS[vision]()
    if vision == "clip":
        model = CLIPModel(CLIPConfig(vision_config=config.to_dict(), text_config=text, projection_dim=16))
    elif vision == "siglip":
        model = SiglipModel(SiglipConfig(vision_config=config.to_dict(), text_config=text))
    else:
        model = {"vit": ViTModel, "dinov2": Dinov2Model}[vision](config)
    model.eval().to(**options).save_pretrained(folder)
    return model.vision_model if vision in ("clip", "siglip") else model


def save_text(folder, text, *, spare_rows=0, tied=None, dtype=torch.float32):
    """A pretrained language model of random weights, with its tokenizer."""
    torch.manual_seed(4)
    tokenizer = tiny_tokenizer()
    config = TEXT_CONFIGS[text](vocab_size=len(tokenizer) + spare_rows)
    config.tie_word_embeddings = config.tie_word_embeddings if tied is None else tied
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def build(tmp_path, vision="clip", text="gpt2", **config):
    return from_backbones(
        str(tmp_path / "vision"),
        str(tmp_path / "text"),
        vision_feature_select_strategy="full" if vision == "siglip" else "default",
        **config,
    )


def assert_nothing_lost(model, folder):
    """Saved, loaded, and restored from the raw file as a resuming Trainer does it: every tensor is the same."""
    model.save_pretrained(folder)
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())

    other = type(model)(model.config)
    keys = other.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert keys.unexpected_keys == []
    assert keys.missing_keys == (["lm_head.weight"] if model.config.tie_word_embeddings else [])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in other.state_dict().items())
    return loaded


@pytest.mark.parametrize("text", ["gpt2", "qwen2"])
@pytest.mark.parametrize("vision", TOWERS)
def test_pretrained_backbones_are_kept_and_nothing_is_lost_in_saving(tmp_path, vision, text):
    tower = save_vision(tmp_path / "vision", vision)
    causal_lm = save_text(tmp_path / "text", text)
    model = build(tmp_path, vision, text)
    assert model.config.image_seq_length == NUM_FEATURES
    pixels, batch = random_pixels(2), batch_of(model, [words(7, 1), words(7, 2)])
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        assert all(torch.equal(tower_states(model, pixels, layer), states[layer]) for layer in range(3))
        old_tokens = causal_lm.config.vocab_size
        assert torch.equal(model(**batch).logits[..., :old_tokens], causal_lm(**batch).logits)

    batch = ragged_batch(model)
    loaded = assert_nothing_lost(model, tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.generation_config.suppress_tokens == [getattr(model.config, field) for field in TOKEN_ID_FIELDS]


@pytest.mark.parametrize(
    "config",
    [
        {"projector_type": "mlp", "thought_norm": "projection"},
        {"projector_type": "transformer", "image_fusion": "add", "thought_norm": "embedding"},
        {"vision_feature_layer": [-2, -1], "thought_mode": "pause"},
    ],
)
def test_nothing_is_lost_in_saving_whatever_the_configuration(tmp_path, config):
    model = tiny_model("llama", "dinov2", **config)
    batch = ragged_batch(model)
    loaded = assert_nothing_lost(model, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_the_base_model_loads_from_the_same_folder(tmp_path):
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path)
    base, info = MMCoconutModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    batch = ragged_batch(model)
    with torch.no_grad():
        assert torch.equal(base.eval()(**batch).last_hidden_state, model.model(**batch).last_hidden_state)


def new_rows_and_expected(model, causal_lm, num_known, token_id):
    """Input and output embeddings of the four special tokens, and the row that each should start from."""
    special = [getattr(model.config, field) for field in TOKEN_ID_FIELDS]
    rows, expected = [], []
    for new, old in [
        (model.get_input_embeddings(), causal_lm.get_input_embeddings()),
        (model.get_output_embeddings(), causal_lm.get_output_embeddings()),
    ]:
        known = old.weight[:num_known]
        rows.append(new.weight[special])
        expected.append((known.mean(dim=0) if token_id is None else known[token_id]).expand(4, -1))
        assert torch.equal(new.weight[:num_known], known)
    return torch.stack(rows), torch.stack(expected)


@pytest.mark.parametrize("token", [None, "s"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare_rows", [0, 2, 20])
@pytest.mark.parametrize("tolerance", [1e-6])
def test_new_tokens_start_at_the_mean_or_at_a_named_token(tmp_path, spare_rows, tied, token, tolerance):
    """Also where the table has spare rows behind the tokenizer's last token, as Qwen2's has."""
    save_vision(tmp_path / "vision", "clip")
    causal_lm = save_text(tmp_path / "text", "qwen2", tied=tied, spare_rows=spare_rows)
    model = build(tmp_path, new_token_init=token)
    tokenizer = tiny_tokenizer()
    token_id = None if token is None else tokenizer.get_vocab()[token]
    rows, expected = new_rows_and_expected(model, causal_lm, len(tokenizer), token_id)
    assert max_difference(rows, expected) <= tolerance
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.config.text_config.vocab_size == len(tokenizer) + max(spare_rows, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_backbones_of_any_dtype_are_built_in_one(tmp_path, tied, dtype):
    tower = save_vision(tmp_path / "vision", "clip", dtype=dtype)
    causal_lm = save_text(tmp_path / "text", "qwen2", tied=tied, dtype=dtype)
    model = build(tmp_path, thought_norm="projection", projector_type="mlp")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(
        model.get_input_embeddings().weight[:300], causal_lm.get_input_embeddings().weight[:300].float()
    )
    weight = tower.embeddings.patch_embedding.weight
    assert torch.equal(model.model.vision_tower.embeddings.patch_embedding.weight, weight.float())
    assert model(**ragged_batch(model)).logits.isfinite().all()


def test_special_tokens_are_those_of_the_tokenizer():
    tokenizer = tiny_tokenizer()
    model = tiny_model()
    assert not set(SPECIAL_TOKENS) & set(tokenizer.get_vocab())
    ids = [getattr(model.config, field) for field in TOKEN_ID_FIELDS]
    assert ids == list(range(len(tokenizer), len(tokenizer) + 4))
    assert model.generation_config.pad_token_id == len(tokenizer) + 4
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_parts_that_a_checkpoint_lacks_are_initialised_not_left_as_memory(tmp_path):
    """A folder without projector and thought weights: linear, attention and norm layers start as PyTorch's do."""
    tiny_model().save_pretrained(tmp_path)
    config = tiny_model(projector_type="transformer", thought_norm="projection").config
    model, info = MMCoconutForConditionalGeneration.from_pretrained(tmp_path, config=config, output_loading_info=True)
    missing = set(info["missing_keys"])
    assert {name.split(".")[1] for name in missing} == {"multi_modal_projector", "thought_feed"}

    attention = model.model.multi_modal_projector.layer.self_attn
    bound = (6 / (4 * HIDDEN_SIZE)) ** 0.5  # Xavier, of a (3 D, D) matrix
    assert 0.5 * bound < attention.in_proj_weight.abs().max() <= bound
    assert attention.in_proj_bias.abs().max() == 0
    for name, parameter in model.named_parameters():
        if name not in missing or "self_attn.in_proj" in name:
            continue
        if "norm" in name:
            assert torch.equal(parameter, torch.ones(HIDDEN_SIZE) * name.endswith("weight")), name
        elif name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        else:
            assert parameter.std().item() == pytest.approx(config.initializer_range, rel=0.2), name


@pytest.mark.parametrize("text_type", ["gemma2", "granite", "cohere", "phi"])
def test_a_language_model_whose_head_is_more_than_a_matrix_is_refused(text_type):
    """Its logits would lose their cap, scale or bias without a word."""
    sizes = {**TEXT_SIZES, "num_key_value_heads": 4, "head_dim": HIDDEN_SIZE // 4, "pad_token_id": 0}
    text_config = AutoConfig.for_model(text_type, **sizes)
    text_config.final_logit_softcapping, text_config.logits_scaling, text_config.logit_scale = 1.0, 3.0, 0.5
    with pytest.raises(ValueError, match="has a bias, or scales or caps its logits"):
        tiny_model(text_config)


def test_a_new_model_is_in_evaluation_mode_as_a_loaded_one_is(tmp_path):
    save_vision(tmp_path / "vision", "clip")
    save_text(tmp_path / "text", "gpt2")
    for model in (build(tmp_path, projector_type="transformer"), tiny_model(projector_type="transformer")):
        assert not any(module.training for module in model.modules())


def test_from_backbones_takes_each_part_once_and_knows_its_tokens(tmp_path):
    configs = {"vision_config": VISION_CONFIGS["clip"](), "text_config": TEXT_CONFIGS["gpt2"]()}
    build = from_backbones
    with pytest.raises(ValueError, match="exactly one of vision and vision_config"):
        build(text_config=configs["text_config"], tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="exactly one of text and text_config"):
        build("a", "b", text_config=configs["text_config"], tokenizer=tiny_tokenizer())
    save_text(tmp_path, "gpt2")
    with pytest.raises(ValueError, match="'<<' is not a token"):
        build(text=str(tmp_path), vision_config=configs["vision_config"], new_token_init="<<")


@pytest.mark.parametrize("num_placeholders", [0, NUM_FEATURES - 1, 2 * NUM_FEATURES])
def test_placeholders_and_features_that_differ_in_number_are_refused_with_both(num_placeholders):
    model = tiny_model()
    ids = torch.tensor([[*words(3, 1), *[model.config.image_token_id] * num_placeholders, *words(3, 2)]])
    with pytest.raises(ValueError, match=rf"{num_placeholders} <image> placeholders.*but {NUM_FEATURES} image feat"):
        model(ids, pixel_values=random_pixels(1))


def test_placeholders_without_images_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match=f"{NUM_FEATURES} <image> placeholders.*but 0 image features"):
        model(torch.tensor([image_row(model.config)]))


def test_rows_that_share_an_image_are_refused():
    """The numbers agree over the batch, but one row lost a placeholder and another has one too many."""
    model = tiny_model()
    rows = [[*words(3, 1), *[model.config.image_token_id] * count] for count in (NUM_FEATURES - 1, NUM_FEATURES + 1)]
    with pytest.raises(ValueError, match=f"Row 0 .* {NUM_FEATURES - 1} <image> placeholders"):
        model(**batch_of(model, rows))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_latent_without_a_token_before_it_is_refused(padding):
    model = tiny_model()
    latent = model.config.latent_token_id
    with pytest.raises(ValueError, match="Row 1 .* no token before it"):
        model(**batch_of(model, [words(5, 1), [latent, *words(2 if padding == "left" else 4, 2)]], padding=padding))


def test_a_call_cannot_begin_with_a_latent_over_a_cache_that_was_cut_or_emptied_or_never_thought():
    model = tiny_model("qwen2")
    ids = torch.tensor([words(5, 1)])
    follow = torch.tensor([[model.config.latent_token_id, *words(2, 2)]])
    cut = model(ids, use_cache=True).past_key_values
    cut.crop(-1)
    emptied = StaticCache(model.config.text_config, max_cache_len=10)
    model(ids, past_key_values=emptied)
    emptied.reset()
    foreign = plain_language_model(model)(ids, use_cache=True).past_key_values
    for past in (cut, emptied, foreign):
        with pytest.raises(ValueError, match="no token before it"):
            model(follow, past_key_values=past)


def test_a_call_cannot_begin_with_a_latent_where_the_past_ends_in_padding():
    model = tiny_model()
    batch = batch_of(model, [words(6, 1), words(3, 2)])
    batch["input_ids"][1, 3] = model.config.latent_token_id
    ids, mask = batch["input_ids"], batch["attention_mask"]
    past = model(ids[:, :3], attention_mask=mask[:, :3], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="Row 1 .* no token before it"):
        model(ids[:, 3:], attention_mask=mask, past_key_values=past)


def test_a_latent_after_the_last_label_is_refused():
    model = tiny_model()
    batch = batch_of(model, [latent_row(model.config), latent_row(model.config)])
    labels = torch.full_like(batch["input_ids"], -100)
    labels[1, 3:5] = 7  # latents at 4 and 5
    with pytest.raises(ValueError, match=r"Row 1 .* last labelled token \(column 4\)"):
        model(**batch, labels=labels)
    labels[1, 5] = 7
    assert model(**batch, labels=labels).loss.isfinite()


@pytest.mark.parametrize("text", ["gpt2", "bart", "marian"])
def test_more_tokens_than_a_table_has_positions_are_refused_with_both_numbers(text):
    model = tiny_model(text)
    model(torch.tensor([words(128, 1)]))
    with pytest.raises(ValueError, match="129 tokens.*128 positions"):
        model(torch.tensor([words(129, 1)]))
    past = model(torch.tensor([words(120, 1)]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="130 tokens.*128 positions"):
        model(torch.tensor([words(10, 1)]), past_key_values=past)


@pytest.mark.parametrize("rope", [{}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}])
@pytest.mark.parametrize("text", ["qwen2", "llama"])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_rotary_positions_go_on_beyond_those_of_training(text, rope, tolerance):
    parameters = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", **rope}}
    model = tiny_model(TEXT_CONFIGS[text](**parameters))
    latent = model.config.latent_token_id
    batch = batch_of(model, [[*words(150, 1), latent, latent, *words(3, 2)]])
    with torch.no_grad():
        logits = model(**batch).logits
        with uncached(model):
            expected = model(**batch, use_cache=False).logits
    assert max_difference(logits, expected) <= tolerance


def test_padding_does_not_count_as_tokens():
    model = tiny_model("gpt2")
    batch = batch_of(model, [words(100, 1)])
    ids = torch.nn.functional.pad(batch["input_ids"], (60, 0))
    mask = torch.nn.functional.pad(batch["attention_mask"], (60, 0))
    assert model(ids, attention_mask=mask).logits.isfinite().all()


def test_inputs_that_exclude_each_other_are_refused():
    model = tiny_model()
    batch = ragged_batch(model)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(**batch, inputs_embeds=model.get_input_embeddings()(batch["input_ids"]))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(pixel_values=batch["pixel_values"])
    encoded = model.get_image_features(batch["pixel_values"])
    with pytest.raises(ValueError, match="pixel_values and mm_encoder_outputs both hold the images"):
        model(**batch, mm_encoder_outputs={"image": encoded})


def test_masks_made_for_all_columns_are_cut_for_each_pass():
    model = tiny_model()
    ids = torch.tensor([latent_row(model.config)])
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1]).tril().bool()
    expected = model(ids).logits
    for prepared in (mask, torch.where(mask, 0.0, -1e38)):
        assert torch.allclose(model(ids, attention_mask=prepared).logits, expected, atol=1e-5)
    model.config.thought_mode = "pause"
    assert model(ids, attention_mask=mask).logits.isfinite().all()


def test_embeddings_that_do_not_tell_special_tokens_apart_are_refused(tmp_path):
    """New tokens start at one and the same row, so that an image placeholder would pass for a latent."""
    save_vision(tmp_path / "vision", "clip")
    save_text(tmp_path / "text", "qwen2")
    model = build(tmp_path)
    embed = model.get_input_embeddings()
    assert model(inputs_embeds=embed(torch.tensor([words(5, 1)]))).logits.isfinite().all()
    with pytest.raises(ValueError, match="pass input_ids"):
        model(inputs_embeds=embed(torch.tensor([image_row(model.config)])), pixel_values=random_pixels(1))


def test_continuing_a_cache_under_checkpointing_is_refused():
    model = tiny_model("qwen2").train()
    past = model(torch.tensor([words(5, 1)]), use_cache=True).past_key_values
    checkpoint_activations(model)
    with pytest.raises(ValueError, match="cannot continue past_key_values"):
        model(torch.tensor([words(5, 1)]), past_key_values=past)


def test_continuous_batching_is_refused_where_thoughts_need_passes_of_their_own():
    model = tiny_model()
    with pytest.raises(NotImplementedError, match="The cache is a object, with which continuous batching"):
        model(torch.tensor([latent_row(model.config)]), cache=object())


def test_rows_with_parts_of_images_are_refused_before_generation():
    model = tiny_model()
    batch = ragged_batch(model)
    image = model.config.image_token_id
    rows = torch.tensor([[image] * 3 + words(5, 1), [image] * 5 + words(3, 1)])
    with pytest.raises(ValueError, match="Row 0 of the batch holds 3 <image> placeholders, .* no multiple of the 4"):
        model.generate(input_ids=rows, pixel_values=batch["pixel_values"][:2], max_new_tokens=1)


def test_tower_without_a_class_token_cannot_leave_it_out():
    with pytest.raises(ValueError, match="siglip_vision_model has none among its 4 tokens: set .*'full'"):
        tiny_model(vision="siglip", vision_feature_select_strategy="default")


def test_configuration_without_token_ids_is_refused():
    config = tiny_model().config
    config.latent_token_id = None
    with pytest.raises(ValueError, match="lacks latent_token_id: set them to the tokenizer"):
        MMCoconutForConditionalGeneration(config)


@pytest.mark.parametrize("vision", TOWERS)
@pytest.mark.parametrize("tolerance", [0.0])
def test_last_layer_may_be_read_as_the_tower_returns_it_also_after_reloading(vision, tolerance, tmp_path):
    model = tiny_model(vision=vision, vision_feature_select_strategy="full", vision_last_norm=True)
    pixels = random_pixels(2)
    with torch.no_grad():
        expected = model.vision_tower(pixels).last_hidden_state
        before = tower_states(model, pixels)
        assert (max_difference(before, expected) > 0.1) == (vision != "clip")  # CLIP normalises its class token alone
        assert max_difference(model.get_vision_features(pixels), expected) <= tolerance
        model.save_pretrained(tmp_path)
        reloaded = MMCoconutForConditionalGeneration.from_pretrained(tmp_path)
        assert max_difference(reloaded.get_vision_features(pixels), expected) <= tolerance


@pytest.mark.parametrize(
    "names, part", [(("none", "none"), "vision tower 'none'"), ((None, "none"), "language model 'none'")]
)
def test_a_backbone_that_is_not_there_is_refused_by_its_part_and_name(names, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vision, text = names
    configs = {} if vision else {"vision_config": VISION_CONFIGS["clip"]()}
    with pytest.raises(ValueError, match=f"The {part} is neither a folder that holds a config.json nor found"):
        from_backbones(vision, text, tokenizer=tiny_tokenizer(), **configs)


@pytest.mark.parametrize("text", ["gpt2", "qwen2"])
@pytest.mark.parametrize("image_fusion", ["replace", "add"])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_an_exported_program_reads_other_sizes_and_refuses_thoughts(text, image_fusion, tolerance):
    """`torch.export` follows one path, and how often the decoder runs for thoughts depends on the ids."""
    model = tiny_model(text, image_fusion=image_fusion)

    def inputs(rows, length, last=7):
        ids = torch.tensor([[model.config.image_token_id] * 4 + words(length, row) + [last] for row in range(rows)])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(rows, 3, 16, 16)}

    rows, columns = torch.export.Dim("rows", min=2, max=8), torch.export.Dim("columns", min=8, max=60)
    shapes = {"input_ids": {0: rows, 1: columns}, "attention_mask": {0: rows, 1: columns}, "pixel_values": {0: rows}}
    options = {"use_cache": False}
    program = torch.export.export(
        model, (), {**inputs(2, 6), **options}, dynamic_shapes={**shapes, **dict.fromkeys(options)}, strict=False
    ).module()
    batch = inputs(5, 17)
    assert (program(**batch, **options)["logits"] - model(**batch).logits).abs().max() <= tolerance
    with pytest.raises(RuntimeError, match="cannot read a thought"):
        program(**inputs(2, 6, last=model.config.latent_token_id), **options)


@pytest.mark.parametrize("layers, strategy", [(0, "full"), ([1, -1], "default")])
def test_a_call_may_read_other_layers_than_the_configuration(layers, strategy):
    model = tiny_model()
    options = {"vision_feature_layer": layers, "vision_feature_select_strategy": strategy}
    pixels = batch_of(model, [[model.config.image_token_id] * NUM_FEATURES])["pixel_values"]
    found = model.get_vision_features(pixels, **options)
    model.config.update(options)
    assert torch.equal(found, model.get_vision_features(pixels))
