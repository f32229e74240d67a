"""Precomputed image features: what the frozen tower gave once stands in the place of the pixels."""

import io
import math
import re

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from test_from_vlm import thinking, thinking_pair, thoughtful_batch
from test_train import ROOT, TINY, losses
from tiny import (
    TEXT_CONFIGS,
    VISION_CONFIGS,
    batch_of,
    last_labels,
    max_difference,
    ragged_batch,
    tiny_image,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
    words,
)
from transformers import TrainingArguments

import train_hf
from mmcoconut.arguments.recipes import parse_recipe
from mmcoconut.build import from_backbones
from mmcoconut.data import Example, image_features, to_dataset
from mmcoconut.data.image_features import one_run_at_a_time, precompute_image_features
from mmcoconut.data.images import open_images
from mmcoconut.errors import RecipeError
from mmcoconut.training.lora import add_lora


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
    model = from_backbones(
        image_fusion="encoder",
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


@pytest.mark.whole_on_the_first("name")
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
        ((3, 4, 23), r"is \(3, 4, 23\), but the projector reads \(images or tiles, 4, 24\)"),
        ((3, 5, 24), r"is \(3, 5, 24\), but the projector reads \(images or tiles, 4, 24\): pass what this"),
        ((3, 24), r"is \(3, 24\), but the projector reads \(images or tiles, 4, 24\)"),
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
    with pytest.raises(ValueError, match=r"\(12, 4, \d+\), but the projector reads \(images or tiles, 16"):
        model(**{**batch, "image_features": batch["image_features"][:, :4]})
    with pytest.raises(ValueError, match=r"num_tiles counts 12 tiles .* but image_features holds 11"):
        model(**{**batch, "image_features": batch["image_features"][:11]})


def test_features_of_part_of_an_image_are_refused_before_generation():
    model, batch = in_text("replace")
    image, features = model.config.image_token_id, precomputed(model, batch)["image_features"]
    rows = torch.tensor([[image] * 3 + words(5, 1), [image] * 5 + words(3, 1)])
    with pytest.raises(ValueError, match="Row 0 of the batch holds 3 <image> placeholders"):
        model.generate(input_ids=rows, image_features=features[:2], max_new_tokens=1)


class Trainer:
    """What precomputing needs of a trainer: a model and its processor in one process."""

    def __init__(self, model, processor, *, batch_size=3):
        self.model, self.processing_class = model, processor
        self.args = TrainingArguments(per_device_eval_batch_size=batch_size, use_cpu=True, disable_tqdm=True)
        self.accelerator = Accelerator(cpu=True)

    def is_world_process_zero(self):
        return True

    is_local_process_zero = is_world_process_zero


def frozen_pair(tiles: bool = False, **config):
    if tiles:
        model, processor = thinking_pair(max_tiles=3)
    else:
        model = tiny_model(**config)
        processor = tiny_processor(model)
    model.vision_tower.requires_grad_(False)
    return model, processor


def picture_bytes(seed: int, size: tuple[int, int] = (40, 24)) -> dict:
    buffer = io.BytesIO()
    tiny_image(seed).resize(size).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def rows_of(*groups) -> Dataset:
    """A data set with the pictures of each group in a row."""
    return to_dataset(Example(list(group), "?", [], [], ["a"], f"row {i}") for i, group in enumerate(groups))


def several_pictures() -> Dataset:
    """Rows of two, no, one and three pictures, of which five are distinct, one of them wide."""
    a, b, c, d = map(picture_bytes, range(4))
    wide = picture_bytes(4, (90, 30))
    return rows_of([a, b], [], [a], [c, wide, d])


@pytest.mark.parametrize("tiles", [False, True])
def test_kept_features_equal_those_of_the_pictures(tiles, tmp_path):
    model, processor = frozen_pair(tiles)
    rows = several_pictures()
    features = precompute_image_features(Trainer(model, processor), [rows], tmp_path)
    pixels, expected_tiles = processor.encode_images([open_images(row) for row in rows], return_tensors="pt")
    found, found_tiles = features.of_rows(list(rows))
    assert found_tiles == expected_tiles and max(sum(found_tiles, [])) == (4 if tiles else 1)
    assert found.keys() == {"image_features", *({"num_tiles"} if tiles else ())}
    assert not tiles or torch.equal(found["num_tiles"], pixels["num_tiles"])
    with torch.no_grad():
        expected = model.get_vision_features(pixels["pixel_values"])
    assert max_difference(found["image_features"], expected) <= 1e-5
    assert features.of_rows([rows[1]]) == ({}, [[]])


def test_equal_pictures_are_computed_once_wherever_they_lie(tmp_path):
    item = picture_bytes(0)
    (tmp_path / "a.png").write_bytes(item["bytes"])
    filed = {"bytes": None, "path": str(tmp_path / "a.png")}
    features = precompute_image_features(
        Trainer(*frozen_pair()), [rows_of([item], [filed]), rows_of([filed, picture_bytes(1)])], tmp_path / "cache"
    )
    assert len(features.shards) == 2


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_shard_that_was_cut_is_named_and_computed_again_once_it_is_deleted(size, tmp_path):
    pair, rows = frozen_pair(), several_pictures()
    first = precompute_image_features(Trainer(*pair), [rows], tmp_path)
    (shard,) = {*first.shards.values()}
    whole = shard.read_bytes()
    image_features.open_shard.cache_clear()
    shard.unlink()
    shard.write_bytes(whole[:size])
    message = re.escape(f"{shard}: not a complete file of image features ({len(whole[:size])} bytes; ")
    with pytest.raises(ValueError, match=f"{message}.*. Delete it, and its features are computed again"):
        precompute_image_features(Trainer(*pair), [rows], tmp_path)
    shard.unlink()
    again = precompute_image_features(Trainer(*pair), [rows], tmp_path)
    assert again.shards == first.shards and shard.read_bytes() == whole


def changed(model, processor, what: str):
    """The pair with one thing changed that features depend on."""
    if what == "weights":
        with torch.no_grad():
            next(model.vision_tower.parameters()).view(-1)[0] += 1e-3
    elif what == "precision of the weights":
        model.vision_tower.bfloat16()
    elif what == "image processor":
        processor.image_processor.image_mean = [0.4, 0.5, 0.5]
    elif what == "tiles":
        processor.image_processor.max_patches = 2
    elif what == "thumbnail":
        processor.use_thumbnail = False
    elif what == "layer":
        model.config.vision_feature_layer = -2
    elif what == "class token":
        model.config.vision_feature_select_strategy = "full"
    return model, processor


WHAT_FEATURES_DEPEND_ON = ("weights", "precision of the weights", "image processor", "layer", "class token")
WHAT_FEATURES_DEPEND_ON += ("tiles", "thumbnail")


@pytest.mark.parametrize("what", WHAT_FEATURES_DEPEND_ON)
def test_another_tower_or_processor_is_never_given_old_features(what, tmp_path):
    tiles = what in ("tiles", "thumbnail")
    rows = several_pictures()
    old = precompute_image_features(Trainer(*frozen_pair(tiles)), [rows], tmp_path)
    model, processor = changed(*frozen_pair(tiles), what)
    new = precompute_image_features(Trainer(model, processor), [rows], tmp_path)
    assert new.folder != old.folder
    pixels, _ = processor.encode_images([open_images(row) for row in rows], return_tensors="pt")
    with torch.no_grad():
        expected = model.get_vision_features(pixels["pixel_values"].to(model.vision_tower.dtype))
    found = new.of_rows(list(rows))[0]["image_features"]
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)
    before = old.of_rows(list(rows))[0]["image_features"]
    assert before.shape != found.shape or max_difference(before.float(), found.float()) > 1e-6


def test_the_same_tower_and_processor_find_their_features(tmp_path):
    rows = several_pictures()
    first = precompute_image_features(Trainer(*frozen_pair()), [rows], tmp_path)
    model, processor = frozen_pair()
    model.config.text_config.use_cache = False  # nothing that the tower reads
    break_tower(model)
    again = precompute_image_features(Trainer(model, processor, batch_size=1), [rows], tmp_path)
    assert again.shards == first.shards


def test_a_stopped_run_loses_at_most_a_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(image_features, "SHARD_PICTURES", 2)
    rows = rows_of(*[[picture_bytes(seed)] for seed in range(7)])
    model, processor = frozen_pair()
    run, computed = image_features.run_tower, []

    def stopping_at(number):
        def stopped(model, pixel_values, **kwargs):
            if len(computed) == number:
                raise KeyboardInterrupt
            computed.append(len(pixel_values))
            return run(model, pixel_values, **kwargs)

        return stopped

    monkeypatch.setattr(image_features, "run_tower", stopping_at(5))
    with pytest.raises(KeyboardInterrupt):
        precompute_image_features(Trainer(model, processor, batch_size=1), [rows], tmp_path)
    [folder] = tmp_path.iterdir()
    (folder / "cut.partial").write_bytes(b"half a shard")
    monkeypatch.setattr(image_features, "run_tower", stopping_at(None))
    features = precompute_image_features(Trainer(model, processor, batch_size=1), [rows], tmp_path)
    assert sum(computed) == 5 + 3  # four of the first five were in whole shards
    assert len(features.shards) == 7 and not list(folder.glob("*.partial"))


def test_runs_that_share_a_folder_wait_for_each_other(tmp_path):
    with one_run_at_a_time(tmp_path, Accelerator(cpu=True)), pytest.raises(Timeout):
        FileLock(tmp_path / "lock").acquire(timeout=0)
    FileLock(tmp_path / "lock").acquire(timeout=0)


def test_a_picture_outside_the_splits_is_refused(tmp_path):
    features = precompute_image_features(Trainer(*frozen_pair()), [several_pictures()], tmp_path)
    with pytest.raises(ValueError, match="row 0: .* lacks the features of a picture"):
        features.of_rows(list(rows_of([picture_bytes(9)])))


def test_a_tower_with_adapters_is_refused(tmp_path):
    model, processor = frozen_pair()
    add_lora(model, {"target_modules": ["self_attn.q_proj"]})
    with pytest.raises(ValueError, match="needs a frozen vision tower, and 4 of its parameters .* `lora` out of it"):
        precompute_image_features(Trainer(model, processor), [several_pictures()], tmp_path)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--precompute_image_features", "true"], "the vision tower is trained: add `vision_tower` to `freeze`"),
        (["--freeze", "vision_tower", "--image_features_cache", "x"], "set `precompute_image_features: true` too"),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused(options, message, recipe):
    with pytest.raises(RecipeError, match=message):
        parse_recipe([recipe, *options])


@pytest.fixture
def frozen(recipe, tmp_path):
    """Runs the tiny recipe with a frozen tower; `precompute` as in a recipe that keeps features in one cache."""

    def run(name: str, *options: str, precompute: bool = True) -> dict:
        cache = ["--precompute_image_features", "true", "--image_features_cache", str(tmp_path / "cache")]
        options = [*options, "--freeze", "vision_tower", *(cache if precompute else [])]
        return train_hf.main([recipe, "--output_dir", str(tmp_path / name), *options])

    return run


def broken_once_computed(monkeypatch) -> None:
    """Towers raise as soon as train_hf.py has their features."""

    def precompute(trainer, *args):
        features = precompute_image_features(trainer, *args)
        break_tower(trainer.model)
        return features

    monkeypatch.setattr(train_hf, "precompute_image_features", precompute)


DROPOUT = ["--text_config.resid_pdrop", "0.3"]  # drawn anew in every pass: both runs must draw the same


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--bf16"], ["--dataloader_num_workers", "2"], DROPOUT])
def test_training_and_evaluation_never_run_the_tower_and_equal_those_that_do(options, frozen, tmp_path, monkeypatch):
    options = [*options, "--num_train_epochs", "2", "--test_split", "test", "--dataset_options.num_rows.test", "6"]
    expected = frozen("live", *options, precompute=False)
    broken_once_computed(monkeypatch)
    found = frozen("kept", *options)
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "live"), abs=1e-4)
    for one, two in zip(found["stages"], expected["stages"], strict=True):
        assert one == pytest.approx(two, abs=1e-3)
    assert found["test"]["test_loss"] == pytest.approx(expected["test"]["test_loss"], abs=1e-3)


def test_a_second_run_computes_nothing_and_repeats_the_first(frozen, tmp_path, monkeypatch):
    frozen("one", "--num_train_epochs", "1")

    def refuse(*args, **kwargs):
        raise AssertionError("the vision tower ran")

    monkeypatch.setattr(image_features, "run_tower", refuse)
    frozen("two", "--num_train_epochs", "1")
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    frozen("a control to compare with", "--num_train_epochs", "1", "--mode", "no_cot")
    assert losses(tmp_path / "a control to compare with") != losses(tmp_path / "one")


def test_evaluation_of_a_checkpoint_may_read_kept_features(frozen, tmp_path, monkeypatch):
    frozen("run", "--num_train_epochs", "1")
    broken_once_computed(monkeypatch)
    own = ["--vision_config", "null", "--text_config", "null", "--tokenizer", "null", "--do_train", "false"]
    metrics = frozen("eval", "--model", str(tmp_path / "run"), *own)
    live = frozen("live", "--model", str(tmp_path / "run"), *own, precompute=False)
    assert metrics["eval_loss"] == pytest.approx(live["eval_loss"], abs=1e-5)


def test_resuming_with_another_tower_is_refused(frozen, tmp_path):
    frozen("run", "--save_strategy", "steps", "--save_steps", "4", "--num_train_epochs", "1")
    file = tmp_path / "run" / "checkpoint-4" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "vision_tower" in name)
    save_file({**weights, name: weights[name] + 1}, file, metadata={"format": "pt"})
    again = ["--num_train_epochs", "1", "--resume_from_checkpoint", str(file.parent)]
    with pytest.raises(ValueError, match="vision tower differs from the recipe's"):
        frozen("run", *again)


@pytest.mark.parametrize(
    "name, options",
    [
        ("captioner_flickr30k", ["--mode", "coconut", "--max_latent_stage", "1"]),
        ("gpt2_clip_aokvqa", []),
        ("internvl3_coconut", ["--composed", "true"]),
        ("jepa_pathvqa", ["--freeze", "[vision_tower, language_model.encoder]", "--learning_rates", "null"]),
    ],
)
def test_recipe_runs_on_kept_features_in_a_smoke_test(name, options, tmp_path, monkeypatch):
    broken_once_computed(monkeypatch)
    options = ["--smoke_test", "--precompute_image_features", "true", "--disable_tqdm", "true", *options]
    run = [str(ROOT / "recipes" / f"{name}.yaml"), "--output_dir", str(tmp_path / "run"), *options]
    results = train_hf.main(run)
    assert results["stages"] and all(math.isfinite(row["loss"]) for row in results["stages"])
    assert list((tmp_path / "run-smoke" / "image_features").glob("*/*.safetensors"))
