"""A saved folder is complete: a process that has never seen this repository loads it, thinks with it and answers."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_image, tiny_model, tiny_processor


ROOT = Path(__file__).resolve().parent.parent
ENTRIES = ("configuration_mmcoconut.py", "modeling_mmcoconut.py", "processing_mmcoconut.py")
LIBRARIES = {"torch", "transformers", "huggingface_hub"}
READER = "images_mmcoconut.py"  # the only file that reaches outside: it reads the images that its caller names
LIBRARIES_OF = {READER: {"PIL", "numpy", "transformers"}}
QUESTION = "What colour is the left square?"
NUM_LATENTS = 3
NEW_TOKENS = 6

SCRIPT = """
import json, sys
sys.modules["mmcoconut"] = None  # importing the repository's package is an error from here on

import torch
from PIL import Image
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, pipeline,
)

torch.set_num_threads(1)
folder, again, question, new_tokens = sys.argv[1:4] + [int(sys.argv[4])]
image = Image.open("image.png")
remote = {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained(folder, backend="pil", **remote)
inputs = processor(images=image, text=question, return_tensors="pt")
message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}

results = {"input_ids": inputs["input_ids"]}
for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForCausalLM):
    model = auto.from_pretrained(folder, **remote).eval()
    with torch.no_grad():
        results[auto.__name__] = model(**inputs).logits
generated = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
results["generated"] = generated
prefix = model.prefill(**inputs, num_tokens=inputs["input_ids"].shape[1] - 5)
results["behind a prefix"] = model.generate(**inputs, prefix=prefix, max_new_tokens=new_tokens, do_sample=False)
results["class"] = type(model).__module__

pipe = pipeline("image-text-to-text", model=folder, processor=processor, **remote)
options = {"max_new_tokens": new_tokens, "return_full_text": False}
results["chat"] = pipe(text=[message], **options)[0]["generated_text"]
results["chat without thoughts"] = pipe(text=[message], num_latents=0, **options)[0]["generated_text"]
results["plain"] = pipe(images=image, text=question, **options)[0]["generated_text"]
results["text alone"] = pipe(text=question, **options)[0]["generated_text"]

model.save_pretrained(again)
processor.save_pretrained(again)
results["config"] = AutoConfig.from_pretrained(again, **remote).to_dict()
results["again"] = AutoModel.from_pretrained(again, **remote).eval()(**inputs).logits.detach()
torch.save(results, "results.pt")
"""


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    model = tiny_model("qwen2", thought_norm="projection")
    processor = tiny_processor(model)
    processor.num_latents = NUM_LATENTS
    return model, processor


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in original:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory):
    """What a fresh process gets out of the folder, alone in another folder and offline."""
    workplace = tmp_path_factory.mktemp("elsewhere")
    tiny_image().save(workplace / "image.png")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_HOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(workplace / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    environment["HF_MODULES_CACHE"] = str(workplace / "modules")
    command = [sys.executable, "-c", SCRIPT, str(folder), str(workplace / "again"), QUESTION, str(NEW_TOKENS)]
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {**torch.load(workplace / "results.pt"), "again folder": workplace / "again"}


def expected_answer(original, images, question, **kwargs):
    model, processor = original
    inputs = processor(images=images, text=question, return_tensors="pt", **kwargs)
    generated = model.generate(**inputs, max_new_tokens=NEW_TOKENS)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(generated, skip_special_tokens=True)


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM", "again"])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_remote_logits_equal_the_local_ones(original, results, auto, tolerance):
    model, processor = original
    inputs = processor(images=tiny_image(), text=QUESTION, return_tensors="pt")
    assert torch.equal(results["input_ids"], inputs["input_ids"])
    assert (inputs["input_ids"] == model.config.latent_token_id).sum() == NUM_LATENTS
    with torch.no_grad():
        difference = (results[auto] - model(**inputs).logits).abs().max()
    assert difference <= tolerance


def test_remote_code_runs_from_the_folder(results):
    assert results["class"].startswith("transformers_modules.")


def test_remote_generation_equals_the_local_one(original, results):
    model, processor = original
    inputs = processor(images=tiny_image(), text=QUESTION, return_tensors="pt")
    assert torch.equal(results["generated"], model.generate(**inputs, max_new_tokens=NEW_TOKENS))
    assert torch.equal(results["behind a prefix"], results["generated"])


def test_the_pipeline_answers_chats_and_plain_questions(original, results):
    image = tiny_image()
    assert results["chat"] == expected_answer(original, image, QUESTION)
    assert results["plain"] == results["chat"]
    assert results["chat without thoughts"] == expected_answer(original, image, QUESTION, num_latents=0)
    assert results["text alone"] == expected_answer(original, None, QUESTION)
    assert len({results["chat"], results["chat without thoughts"], results["text alone"]}) == 3


def relative_imports(file):
    """Root files that a file takes names from."""
    nodes = ast.walk(ast.parse((ROOT / file).read_text()))
    return {f"{node.module}.py" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1}


def closure(files):
    reached = set()
    while files := files - reached:
        reached |= files
        files = set().union(*(relative_imports(file) for file in files))
    return reached


def imported_libraries(path):
    """The first names of everything that a file imports absolutely, but for what it can do without."""
    tree, names = ast.parse(path.read_text()), set()
    guarded = {node for guard in ast.walk(tree) if isinstance(guard, ast.Try) for node in guard.body}
    for node in set(ast.walk(tree)) - guarded:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 and node.module and "." not in node.module, ast.unparse(node)
    return names


def test_a_saved_folder_holds_exactly_the_files_that_its_code_reaches(folder, results):
    expected = closure(set(ENTRIES))
    assert {"thinking_mmcoconut.py"} < expected
    for saved in (folder, results["again folder"]):
        assert {path.name for path in saved.glob("*.py")} == expected
        for name in expected:
            assert (saved / name).read_text() == (ROOT / name).read_text()


@pytest.mark.parametrize("file", sorted(closure(set(ENTRIES))))
def test_shipped_files_import_the_standard_library_and_three_others(file):
    assert imported_libraries(ROOT / file) - set(sys.stdlib_module_names) <= LIBRARIES_OF.get(file, LIBRARIES)


MODULES = {
    "collections",
    "contextlib",
    "contextvars",
    "copy",
    "dataclasses",
    "difflib",
    "functools",
    "inspect",
    "itertools",
}
MODULES |= {"json", "math", "numbers", "operator", "re", "typing"}
REACHES_OUT = {"open", "exec", "eval", "compile", "__import__", "input", "breakpoint"}


def calls(path):
    """Names that a file calls as plain functions, and methods as `library.function`."""
    nodes = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {ast.unparse(node) for node in nodes}


@pytest.mark.parametrize("file", sorted({path.name for path in ROOT.glob("*_mmcoconut.py")} - {READER}))
def test_shipped_files_open_no_file_and_no_socket(file):
    """They import nothing of the standard library that could, and call no built-in that could."""
    assert imported_libraries(ROOT / file) & set(sys.stdlib_module_names) <= MODULES
    assert not calls(ROOT / file) & {*REACHES_OUT, "torch.load", "torch.save", "torch.hub.load"}


def test_the_reader_of_images_opens_files_for_reading_and_urls_and_runs_nothing():
    reading = {"base64", "http", "io", "os", "struct", "urllib", "zlib"}
    assert imported_libraries(ROOT / READER) & set(sys.stdlib_module_names) <= MODULES | reading
    assert calls(ROOT / READER) & REACHES_OUT == {"open"}
    from_os = {name for name in calls(ROOT / READER) if name.startswith("os.")}
    assert from_os == {"os.path.exists", "os.fspath"}
    text = (ROOT / READER).read_text()
    assert re.findall(r"(?<![\w.])open\(.*\)", text) == ['open(path, "rb")']


def test_saved_files_name_their_classes_without_a_repository(folder, results):
    for saved in (folder, results["again folder"]):
        config = json.loads((saved / "config.json").read_text())
        processor = json.loads((saved / "processor_config.json").read_text())
        assert config["auto_map"]["AutoModel"] == "modeling_mmcoconut.MMCoconutForConditionalGeneration"
        assert processor["auto_map"]["AutoProcessor"] == "processing_mmcoconut.MMCoconutProcessor"
        assert processor["num_latents"] == NUM_LATENTS


@pytest.mark.parametrize(
    "entries, num_files, num_lines",
    [
        (("vlm_mmcoconut.py", "vlm_processing_mmcoconut.py"), 14, 4090),
        (("modeling_mmcoconut.py", "processing_mmcoconut.py"), 15, 4630),
        (("seq2seq_mmcoconut.py", "processing_mmcoconut.py"), 16, 4940),
    ],
)
def test_a_checkpoint_ships_little_code(entries, num_files, num_lines):
    """What a reader of a checkpoint has to trust; no file is longer than 500 lines."""
    lengths = [len((ROOT / file).read_text().splitlines()) for file in closure({*entries})]
    assert len(lengths) <= num_files and sum(lengths) <= num_lines and max(lengths) <= 500
