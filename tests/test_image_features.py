"""Precomputed image features: what the frozen tower gave once stands in the place of the pixels."""

import pytest
import torch
from test_from_vlm import thinking, thoughtful_batch
from tiny import TEXT_CONFIGS, VISION_CONFIGS, batch_of, last_labels, ragged_batch, tiny_model, tiny_tokenizer, words

from mmcoconut.seq2seq_mmcoconut import MMCoconutForSeq2SeqLM


CONFIGS = {
    "replace": {"projector_type": "mlp"},
    "replace, two layers": {"text": "qwen2", "vision_feature_layer": [1, -1]},
    "replace, all tokens": {"vision": "dinov2", "vision_feature_select_strategy": "full"},
    "add": {"image_fusion": "add", "projector_type": "transformer", "projector_num_heads": 4},
    "cross_attention": {"vision": "vit", "image_fusion": "cross_attention"},
}
WAYS_TO_GENERATE = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "chunked prefill": {"prefill_chunk_size": 5},
    "static cache": {"cache_implementation": "static"},
}


def in_text(name: str):
    """A model whose decoder reads questions and pictures, and a batch of several pictures a row, or of tiles."""
    if name == "tiles":
        model = thinking("internvl")
        return model, thoughtful_batch(model)
    model = tiny_model(**CONFIGS[name])
    return model, ragged_batch(model)


def beside_an_encoder():
    """An encoder-decoder, whose encoder reads the questions, and a batch with two, one and no pictures."""
    torch.manual_seed(0)
    model = MMCoconutForSeq2SeqLM.from_backbones(
        vision_config=VISION_CONFIGS["dinov2"](),
        text_config=TEXT_CONFIGS["bart"](),
        tokenizer=tiny_tokenizer(),
        vision_feature_select_strategy="full",
        projector_type="attention_prefix",
        projector_num_heads=4,
        image_pooling="cls",
        initializer_range=0.15,
    )
    image, latent = model.config.image_token_id, model.config.latent_token_id
    batch = batch_of(model, [[image, image, *words(3, 1)], [image, *words(5, 2)], words(6, 3)])
    begin = model.config.text_config.decoder_start_token_id
    answers = torch.tensor([[begin, latent, latent, *words(3, seed)] for seed in range(3)])
    return model, {**batch, "decoder_input_ids": answers}


def model_and_batch(name: str):
    return beside_an_encoder() if name == "encoder" else in_text(name)


def precomputed(model, batch: dict) -> dict:
    """The batch with what the tower gives of its pixels in their place."""
    with torch.no_grad():
        features = model.get_vision_features(batch["pixel_values"])
    return {**{key: value for key, value in batch.items() if key != "pixel_values"}, "image_features": features}


def labels_of(batch: dict) -> torch.Tensor:
    if "decoder_input_ids" in batch:
        return batch["decoder_input_ids"].masked_fill(torch.arange(6) < 4, -100)
    return last_labels(batch)


def break_tower(model) -> None:
    """From here on the tower cannot be run unnoticed."""

    def refuse(*args, **kwargs):
        raise AssertionError("the vision tower ran")

    model.model.vision_tower.forward = refuse


def loss_and_gradients(model, batch: dict) -> tuple:
    model.zero_grad()
    model.vision_tower.requires_grad_(False)
    outputs = model(**batch, labels=labels_of(batch))
    outputs.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return outputs.loss, outputs.logits, gradients


@pytest.mark.parametrize("name", [*CONFIGS, "tiles", "encoder"])
def test_loss_logits_and_gradients_equal_those_of_the_pixels(name):
    model, batch = model_and_batch(name)
    loss, logits, gradients = loss_and_gradients(model, batch)
    batch = precomputed(model, batch)
    break_tower(model)
    again, logits_again, gradients_again = loss_and_gradients(model, batch)
    assert torch.equal(loss, again) and torch.equal(logits, logits_again)
    assert gradients.keys() == gradients_again.keys()
    of_projector = [key for key in gradients if "multi_modal_projector" in key]
    assert any(gradients[key].abs().max() > 0 for key in of_projector)
    assert all(torch.equal(gradients[key], gradients_again[key]) for key in gradients)


@pytest.mark.parametrize("way", WAYS_TO_GENERATE)
@pytest.mark.parametrize("name", [*CONFIGS, "tiles", "encoder"])
def test_generated_tokens_equal_those_of_the_pixels(name, way):
    model, batch = model_and_batch(name)
    if way == "chunked prefill" and (name == "encoder" or model.model.cross_attends):
        pytest.skip("pictures read by cross-attention are not cut")
    options = {**WAYS_TO_GENERATE[way], "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**batch, **options)
    batch = precomputed(model, batch)
    break_tower(model)
    found = model.generate(**batch, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits))
    batch["image_features"] = batch["image_features"].flip(0)
    other = model.generate(**batch, **options)
    assert not torch.equal(other.logits[0], expected.logits[0])


def test_image_vectors_and_alignment_equal_those_of_the_pixels():
    model, batch = beside_an_encoder()
    texts = torch.tensor([words(4, seed) for seed in range(3)])
    aligned = {"alignment_input_ids": texts, "alignment_attention_mask": torch.ones_like(texts)}
    expected = model(**batch, **aligned)
    found = model(**precomputed(model, batch), **aligned)
    assert torch.equal(found.image_embeds, expected.image_embeds)
    assert torch.equal(found.alignment_loss, expected.alignment_loss)


def test_features_of_another_precision_are_read_in_the_models():
    model, batch = in_text("replace")
    batch = precomputed(model, batch)
    rounded = {**batch, "image_features": batch["image_features"].bfloat16()}
    expected = model(**{**batch, "image_features": rounded["image_features"].float()}).logits
    assert torch.equal(model(**rounded).logits, expected)


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("name", ["replace", "encoder"])
def test_images_given_twice_are_refused(name, call):
    model, batch = model_and_batch(name)
    both = {**batch, **precomputed(model, batch)}
    with pytest.raises(ValueError, match="pixel_values and image_features both hold the images"):
        model(**both) if call == "forward" else model.generate(**both, max_new_tokens=1)


def test_encoded_images_beside_features_are_refused():
    model, batch = in_text("replace")
    batch["mm_encoder_outputs"] = {"image": model.get_image_features(batch["pixel_values"])}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="image_features and mm_encoder_outputs both hold"):
            call(**precomputed(model, batch))


@pytest.mark.parametrize(
    "shape, message",
    [
        ((3, 4, 23), r"is \(3, 4, 23\), and the projector reads \(images or tiles, 4, 24\)"),
        ((3, 5, 24), r"is \(3, 5, 24\), and the projector reads \(images or tiles, 4, 24\): pass what get_vision_fea"),
        ((3, 24), r"is \(3, 24\), and the projector reads \(images or tiles, 4, 24\)"),
    ],
)
def test_features_of_another_shape_are_refused(shape, message):
    model, batch = in_text("replace")
    batch = {**precomputed(model, batch), "image_features": torch.zeros(shape)}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(**batch)


def test_features_before_pixel_shuffle_are_counted_in_patches():
    model, batch = in_text("tiles")
    batch = precomputed(model, batch)
    assert batch["image_features"].shape[1:] == (16, model.config.vision_config.hidden_size)
    with pytest.raises(ValueError, match=r"\(12, 4, \d+\), and the projector reads \(images or tiles, 16"):
        model(**{**batch, "image_features": batch["image_features"][:, :4]})
    with pytest.raises(ValueError, match=r"num_tiles counts 12 tiles .* but image_features holds 11"):
        model(**{**batch, "image_features": batch["image_features"][:11]})


def test_features_of_part_of_an_image_are_refused_before_generation():
    model, batch = in_text("replace")
    image, features = model.config.image_token_id, precomputed(model, batch)["image_features"]
    rows = torch.tensor([[image] * 3 + words(5, 1), [image] * 5 + words(3, 1)])
    with pytest.raises(ValueError, match="Row 0 of the batch holds 3 <image> placeholders"):
        model.generate(input_ids=rows, image_features=features[:2], max_new_tokens=1)
