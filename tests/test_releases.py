"""A checkpoint saved under one release of transformers gives the same logits and tokens under every other one.

`make releases` unpacks other releases under .releases/; without them these tests are skipped.
"""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers


ROOT = Path(__file__).resolve().parent.parent
OTHERS = {folder.name: folder for folder in sorted((ROOT / ".releases").glob("*")) if folder.is_dir()}
RELEASES = {**OTHERS, transformers.__version__: None}
KINDS = ("decoder", "encoder-decoder")
PAIRS = [(*pair, kind) for pair in product(RELEASES, RELEASES) if pair[0] != pair[1] for kind in KINDS]

SAVE = """
import sys
from pathlib import Path

import torch
import transformers
from tiny import tiny_image, tiny_model, tiny_processor, tiny_seq2seq

release, folder = sys.argv[1:]
assert transformers.__version__ == release, transformers.__file__
builders = {"decoder": lambda: tiny_model("gpt2", thought_norm="projection"), "encoder-decoder": tiny_seq2seq}
for kind, build in builders.items():
    torch.manual_seed(0)
    model = build()
    processor = tiny_processor(model)
    processor.num_latents = 3
    for part in (model, processor):
        part.save_pretrained(Path(folder, kind))
tiny_image().save(Path(folder, "image.png"))
"""
ANSWER = """
import sys
sys.modules["mmcoconut"] = None  # importing the package is an error from here on

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

release, *folders = sys.argv[1:]
assert transformers.__version__ == release, transformers.__file__
torch.set_num_threads(1)
answers = {}
for folder in folders:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    image = Image.open("image.png")
    inputs = processor(images=[[image], [image]], text=["Which square?", "Is the left one red?"], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    beams = model.generate(**inputs, max_new_tokens=6, num_beams=3)
    with torch.no_grad():
        logits = model(**inputs).logits
    answers[folder] = {"ids": inputs["input_ids"], "logits": logits, "tokens": tokens, "beams": beams}
torch.save(answers, "answers.pt")
"""


def run(release: str, script: str, *arguments, workplace: Path, path: list[Path]) -> None:
    """Run a script in a process whose transformers is of this release, in an empty folder and offline."""
    found = [str(folder) for folder in [RELEASES[release], *path] if folder is not None]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_HOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(workplace / "hf"), "PYTHONPATH": os.pathsep.join(found)}
    environment["HF_MODULES_CACHE"] = str(workplace / "modules")
    command = [sys.executable, "-c", script, release, *map(str, arguments)]
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"transformers {release}: {done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each release answers with the checkpoints that each release saved: answers[loads][saves, kind]."""
    if not OTHERS:
        pytest.skip("no other release of transformers under .releases/: run `make releases`")
    saved = {}
    for release in RELEASES:
        folder = saved[release] = tmp_path_factory.mktemp(f"saved-{release}")
        run(release, SAVE, folder, workplace=folder, path=[ROOT, ROOT / "tests"])
    folders = {(release, kind): saved[release] / kind for release in RELEASES for kind in KINDS}
    given = {}
    for release in RELEASES:
        workplace = tmp_path_factory.mktemp(f"loads-{release}")
        (workplace / "image.png").write_bytes((saved[release] / "image.png").read_bytes())
        run(release, ANSWER, *folders.values(), workplace=workplace, path=[])
        loaded = torch.load(workplace / "answers.pt")
        given[release] = {key: loaded[str(folder)] for key, folder in folders.items()}
    return given


@pytest.mark.parametrize("saves, loads, kind", PAIRS or [("one", "another", "decoder")])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_checkpoint_of_one_release_answers_alike_under_another(answers, saves, loads, kind, tolerance):
    expected, found = answers[saves][saves, kind], answers[loads][saves, kind]
    for name in ("ids", "tokens", "beams"):
        assert torch.equal(found[name], expected[name]), name
    assert (found["logits"] - expected["logits"]).abs().max() <= tolerance
