"""Saved folders of cross-attention families, and of parallel thoughts, in a process without this repository."""

import json
import os
import subprocess
import sys

import pytest
import torch
from test_remote_code import ROOT, closure
from tiny import max_difference, tiny_image, tiny_model, tiny_processor, tiny_seq2seq


QUESTIONS = ["What colour is the left square?", "Which"]
NEW_TOKENS = 5
AUTO_CLASSES = {
    "marian": ("AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM"),
    "seq2seq": ("AutoModel", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM"),
    "parallel": ("AutoModel",),
}
SCRIPT = """
import json, sys
sys.modules["mmcoconut"] = None  # importing the repository's package is an error from here on

import torch
import transformers
from PIL import Image
from transformers import AutoProcessor

torch.set_num_threads(1)
questions, new_tokens, auto_classes = json.loads(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
images, remote, results = [Image.open("0.png"), Image.open("1.png")], {"trust_remote_code": True}, {}
for family, names in auto_classes.items():
    processor = AutoProcessor.from_pretrained(family, backend="pil", **remote)
    inputs = processor(images=images, text=questions, num_latents=[3, 1], return_tensors="pt")
    results[family] = {"inputs": dict(inputs)}
    for name in names:
        auto = getattr(transformers, name)
        model, info = auto.from_pretrained(family, output_loading_info=True, **remote)
        assert not any(info.values()), info
        with torch.no_grad():
            results[family][name] = model.eval()(**inputs).logits
        results[family]["class"] = type(model).__name__
    results[family]["generated"] = model.generate(**inputs, max_new_tokens=new_tokens, num_beams=2)
    model.save_pretrained(f"{family} again")
    again = auto.from_pretrained(f"{family} again", **remote).eval()
    results[family]["again"] = again(**inputs).logits.detach()
torch.save(results, "results.pt")
"""


@pytest.fixture(scope="module")
def originals() -> dict:
    """Model and processor of each family."""
    models = {"marian": tiny_model("marian", "vit"), "seq2seq": tiny_seq2seq("attention_prefix")}
    models["parallel"] = tiny_model("llama", thought_schedule="jacobi", jacobi_iterations=1)
    return {family: (model, tiny_processor(model, num_latents=2)) for family, model in models.items()}


@pytest.fixture(scope="module")
def workplace(originals, tmp_path_factory):
    """A folder of saved families, and results.pt, what a fresh process, offline, gets out of them."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for family, parts in originals.items():
        for part in parts:
            part.save_pretrained(folder / family)
    for seed in range(2):
        tiny_image(seed).save(folder / f"{seed}.png")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_HOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    environment["HF_MODULES_CACHE"] = str(folder / "modules")
    words = [json.dumps(QUESTIONS), str(NEW_TOKENS), json.dumps(AUTO_CLASSES)]
    command = [sys.executable, "-c", SCRIPT, *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("family", AUTO_CLASSES)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_every_auto_class_gives_the_same_logits_and_answers(originals, workplace, family, tolerance):
    model, processor = originals[family]
    found = torch.load(workplace / "results.pt", weights_only=False)[family]
    images = [tiny_image(seed) for seed in range(2)]
    inputs = processor(images=images, text=QUESTIONS, num_latents=[3, 1], return_tensors="pt")
    assert found["inputs"].keys() == inputs.keys()
    assert all(torch.equal(found["inputs"][name], inputs[name]) for name in inputs)
    with torch.no_grad():
        logits = model(**inputs).logits
    for name in (*AUTO_CLASSES[family], "again"):
        assert max_difference(found[name], logits) <= tolerance, name
    assert torch.equal(found["generated"], model.generate(**inputs, max_new_tokens=NEW_TOKENS, num_beams=2))
    assert found["class"] == type(model).__name__


@pytest.mark.parametrize("family", AUTO_CLASSES)
def test_folders_name_their_class_and_hold_its_files(originals, workplace, family):
    module = type(originals[family][0]).__module__.rpartition(".")[2]
    expected = closure({"configuration_mmcoconut.py", f"{module}.py", "processing_mmcoconut.py"})
    assert {path.name for path in (workplace / family).glob("*.py")} == expected
    assert all((workplace / family / name).read_text() == (ROOT / name).read_text() for name in expected)
    for folder in (family, f"{family} again"):
        auto_map = json.loads((workplace / folder / "config.json").read_text())["auto_map"]
        named = {name: auto_map[name] for name in AUTO_CLASSES[family]}
        assert set(named.values()) == {f"{module}.{type(originals[family][0]).__name__}"}
