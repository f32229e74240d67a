"""timm backbones as vision towers, where timm (and torchvision, which it needs) is installed; errors everywhere."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from test_train import ROOT, TINY
from tiny import TEXT_CONFIGS, max_difference, ragged_batch, tiny_image, tiny_tokenizer, uncached
from transformers import CLIPImageProcessorPil, ConvNextConfig, TimmWrapperConfig
from transformers.utils import is_timm_available

import mmcoconut.build.timm
import train_hf
from mmcoconut.arguments.recipes import parse_recipe
from mmcoconut.build import from_backbones, processor_from_backbones
from mmcoconut.build.timm import timm_image_processor
from mmcoconut.models import CheckpointError, check_sources, load_model
from mmcoconut.processing_mmcoconut import MMCoconutProcessor


needs_timm = pytest.mark.skipif(not is_timm_available(), reason="runs timm, which is not installed with torchvision")
SIDE = 16  # 4 patches of 8 × 8
SIZES = {"img_size": SIDE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SETTINGS = {"input_size": [3, SIDE, SIDE], "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
SETTINGS |= {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.25, 0.5]}
# By architecture: its class and register tokens.
PREFIX = {"vit_tiny_patch16_224": 1, "vit_small_patch16_dinov3": 5, "vit_base_patch16_siglip_224": 0}


def config_of(architecture="vit_tiny_patch16_224", **fields) -> TimmWrapperConfig:
    return TimmWrapperConfig(architecture=architecture, model_args=SIZES, **fields)


def timm_model(vision_config=None, *, vision=None, strategy="full", **options):
    torch.manual_seed(0)
    options = {"vision_feature_select_strategy": strategy, **options}
    return from_backbones(
        vision,
        vision_config=vision_config,
        text_config=TEXT_CONFIGS["gpt2"](),
        tokenizer=tiny_tokenizer(),
        **options,
    )


def write_checkpoint(folder, architecture="vit_tiny_patch16_224"):
    """A folder as timm's checkpoints on the Hub are: its configuration, and weights by timm's own names."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=0, **SIZES)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architecture": architecture, "num_classes": 2, "label_names": ["a", "b"], "model_args": SIZES}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": SETTINGS}))
    return model.eval()


@needs_timm
@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("architecture", PREFIX)
def test_features_are_those_of_timm(architecture, strategy):
    if (PREFIX[architecture], strategy) == (0, "default"):
        with pytest.raises(ValueError, match="'default' leaves out the class token, and the timm .* has none: set"):
            timm_model(config_of(architecture), strategy=strategy)
        return
    model = timm_model(config_of(architecture), strategy=strategy)
    assert model.config.image_seq_length == PREFIX[architecture] + 4 - (strategy == "default")
    assert model.config.vision_config.hidden_size == 24 and model.config.vision_last_norm
    pixels = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = model.model.vision_tower.timm_model.forward_features(pixels)[:, strategy == "default" :]
        assert torch.equal(model.model.get_vision_features(pixels), expected)


@needs_timm
def test_thoughts_over_a_timm_tower_equal_their_definition():
    model = timm_model(config_of(), strategy="default", initializer_range=0.15)
    batch = ragged_batch(model)
    is_text = batch["attention_mask"].bool()
    with torch.no_grad():
        logits = model(**batch).logits[is_text]
        with uncached(model):
            assert max_difference(logits, model(**batch).logits[is_text]) <= 1e-5


@needs_timm
def test_checkpoint_is_a_tower_with_its_image_processor(tmp_path):
    (tmp_path / "timm").mkdir()
    timm_tower = write_checkpoint(tmp_path / "timm")
    name = str(tmp_path / "timm")
    model = timm_model(vision=name, strategy="default")
    processor = processor_from_backbones(name, config=model.config, tokenizer=tiny_tokenizer(), num_latents=2)
    inputs = processor(images=tiny_image(), text="What?", return_tensors="pt")
    with torch.no_grad():
        expected = timm_tower.forward_features(inputs["pixel_values"])[:, 1:]
        assert torch.equal(model.model.get_vision_features(inputs["pixel_values"]), expected)

    saved = tmp_path / "saved"
    for part in (model, processor):
        part.save_pretrained(saved)
    loaded, again = load_model(str(saved)), MMCoconutProcessor.from_pretrained(saved)
    other = again(images=tiny_image(), text="What?", return_tensors="pt")
    assert max_difference(other["pixel_values"], inputs["pixel_values"]) <= 0.05  # torchvision may resize when loaded
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.equal(loaded(**inputs).logits, logits)
    torch.save({**inputs}, tmp_path / "inputs.pt")
    code = (
        "import sys, torch\nfrom transformers import AutoModelForImageTextToText as Auto\n"
        f"model = Auto.from_pretrained({str(saved)!r}, trust_remote_code=True)\n"
        f"inputs = torch.load({str(tmp_path / 'inputs.pt')!r})\n"
        f"torch.save(model(**inputs).logits, {str(tmp_path / 'logits.pt')!r})\n"
        "assert 'mmcoconut' not in sys.modules\n"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry and not entry.startswith(str(ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits)


@needs_timm
@pytest.mark.parametrize("frozen", [False, True])
def test_recipe_trains_on_a_timm_tower(frozen, tmp_path):
    (tmp_path / "timm").mkdir()
    write_checkpoint(tmp_path / "timm")
    text = TINY[TINY.index("text_config") :]
    (tmp_path / "r.yaml").write_text(f"vision_model: {tmp_path / 'timm'}\n{text}")
    words = ["--freeze", "[vision_tower]", "--precompute_image_features", "true"] if frozen else []
    words += ["--image_features_cache", str(tmp_path / "cache")] if frozen else []
    run = ["--output_dir", str(tmp_path / "run"), "--max_train_samples", "8", *words]
    assert train_hf.main([str(tmp_path / "r.yaml"), *run])["stages"][-1]["n"] == 8


@needs_timm
def test_convolutional_network_of_timm_is_refused():
    with pytest.raises(ValueError, match=r"of shape \(1, 512, 7, 7\), not .* take a vision tr"):
        timm_model(TimmWrapperConfig(architecture="resnet18"))


@needs_timm
def test_only_the_last_layer_of_a_timm_tower_can_be_read():
    with pytest.raises(ValueError, match="vision_feature_layer=-2, and a timm backbone gives its last layer alone"):
        timm_model(config_of(), vision_feature_layer=-2)


def test_convolutional_network_of_transformers_is_refused():
    config = ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)
    with pytest.raises(ValueError, match="The vision tower convnext has no .*: take a vision transformer"):
        timm_model(config)


# The image processor, which needs no timm


@pytest.mark.parametrize("mode, size", [("center", {"shortest_edge": 17}), ("squash", {"height": 17, "width": 17})])
def test_image_processor_scales_and_crops_as_timm_says(mode, size):
    made = timm_image_processor(config_of(pretrained_cfg={**SETTINGS, "crop_mode": mode}))
    values = made.to_dict()
    assert {key: values["size"][key] for key in size} == size
    assert (values["resample"], tuple(values["image_std"])) == (3, (0.5, 0.25, 0.5))
    assert made(tiny_image(), return_tensors="pt")["pixel_values"].shape == (1, 3, SIDE, SIDE)


@pytest.mark.parametrize("settings, problem", [({"crop_mode": "border"}, "'border'"), ({"interpolation": "x"}, "'x'")])
def test_settings_without_a_counterpart_are_refused(settings, problem):
    with pytest.raises(ValueError, match=f"{problem}.* which no image processor here does: give image_processor="):
        timm_image_processor(config_of(pretrained_cfg={**SETTINGS, **settings}))
    with pytest.raises(ValueError, match="is from no checkpoint: give image_processor="):
        timm_image_processor(config_of())


@needs_timm
def test_image_processor_does_what_timm_does():
    transforms = pytest.importorskip("timm.data").create_transform(**SETTINGS, is_training=False)
    if not hasattr(transforms, "transforms"):
        pytest.skip("torchvision is not whole")
    made = timm_image_processor(config_of(pretrained_cfg=SETTINGS))
    pixels = made(tiny_image(), return_tensors="pt")["pixel_values"][0]
    assert isinstance(made, CLIPImageProcessorPil)
    assert max_difference(pixels, transforms(tiny_image())) <= 1e-2


# What is missing


def test_missing_timm_is_named_with_what_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr(mmcoconut.build.timm, "is_timm_available", lambda: False)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit", "pretrained_cfg": SETTINGS}))
    message = "is a timm backbone, which needs timm and torchvision: pip install timm torchvision"
    with pytest.raises(ValueError, match=message):
        timm_model(vision=str(tmp_path))
    with pytest.raises(ValueError, match=f"'vit_tiny_patch16_224' {message}"):
        timm_model(config_of())
    (tmp_path / "r.yaml").write_text(f"vision_model: {tmp_path}\n{TINY[TINY.index('text_config') :]}")
    with pytest.raises(CheckpointError, match=f"^vision_model = '{tmp_path}' {message}"):
        check_sources(parse_recipe([str(tmp_path / "r.yaml")])[0])
