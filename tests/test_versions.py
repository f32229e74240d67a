"""What one version saves the next one loads; the Auto classes run the package's code, not that of a checkpoint."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_image, tiny_model, tiny_seq2seq
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
)

import mmcoconut
from mmcoconut.configuration_mmcoconut import VERSION, MMCoconutConfig
from mmcoconut.modeling_mmcoconut import MMCoconutForConditionalGeneration
from mmcoconut.processing_mmcoconut import MMCoconutProcessor
from mmcoconut.seq2seq_mmcoconut import MMCoconutForSeq2SeqLM


STORED = sorted(path.parent for path in (Path(__file__).parent / "checkpoints").glob("*/*/config.json"))
NAMES = [f"{folder.parent.name}-{folder.name}" for folder in STORED]
QUESTION = "What colour is the left square?"


def test_package_and_checkpoints_have_one_version():
    assert mmcoconut.__version__ == VERSION == MMCoconutConfig().mmcoconut_version
    assert VERSION in {folder.parent.name for folder in STORED}


@pytest.mark.parametrize("folder", STORED, ids=NAMES)
@pytest.mark.parametrize("tolerance", [1e-4])
def test_a_stored_checkpoint_answers_as_when_it_was_stored(folder, tolerance):
    expected = load_file(folder / "expected.safetensors")
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    inputs = processor(images=tiny_image(), text=QUESTION, return_tensors="pt")
    assert inputs.keys() == expected.keys() - {"logits", "tokens"}
    for name, tensor in inputs.items():
        torch.testing.assert_close(tensor, expected[name])
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    torch.testing.assert_close(logits, expected["logits"], atol=tolerance, rtol=0)
    assert torch.equal(model.generate(**inputs, max_new_tokens=10, do_sample=False), expected["tokens"])


def copy_with_version(folder, version: str, destination) -> Path:
    copy = shutil.copytree(folder, destination / "copy")
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(values | {"mmcoconut_version": version}))
    return copy


@pytest.mark.parametrize("version, warns", [("9.0.0", True), ("0.0.9", False), (VERSION, False)])
def test_a_checkpoint_of_a_newer_version_is_warned_of(version, warns, tmp_path, caplog, monkeypatch):
    copy = copy_with_version(STORED[0], version, tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("mmcoconut"), "propagate", True)
    AutoConfig.from_pretrained(copy)
    assert (f"Written by mmcoconut {version}" in caplog.text) == warns


def test_saving_writes_the_version_that_saves(tmp_path):
    config = AutoConfig.from_pretrained(copy_with_version(STORED[0], "0.0.9", tmp_path))
    assert config.mmcoconut_version == "0.0.9"
    config.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["mmcoconut_version"] == VERSION


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints whose own code is broken, so that running any of it is an error."""
    folders = {}
    for name, model in (("decoder", tiny_model()), ("encoder-decoder", tiny_seq2seq())):
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        for file in folders[name].glob("*.py"):
            file.write_text("raise RuntimeError('code of the checkpoint was run')")
    return folders


@pytest.mark.parametrize("trust", [None, True])
@pytest.mark.parametrize(
    "name, auto_class, expected",
    [
        ("decoder", AutoModel, MMCoconutForConditionalGeneration),
        ("decoder", AutoModelForImageTextToText, MMCoconutForConditionalGeneration),
        ("decoder", AutoModelForCausalLM, MMCoconutForConditionalGeneration),
        ("encoder-decoder", AutoModel, MMCoconutForSeq2SeqLM),
        ("encoder-decoder", AutoModelForImageTextToText, MMCoconutForSeq2SeqLM),
        ("encoder-decoder", AutoModelForSeq2SeqLM, MMCoconutForSeq2SeqLM),
    ],
)
def test_auto_classes_run_the_packages_code_and_none_of_a_checkpoint(saved, name, auto_class, expected, trust):
    assert type(auto_class.from_pretrained(saved[name], trust_remote_code=trust)) is expected


def test_auto_processor_gives_the_packages_processor():
    assert type(AutoProcessor.from_pretrained(STORED[0], backend="pil")) is MMCoconutProcessor
