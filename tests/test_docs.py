"""What README.md and docs/ show is true: every code block runs or is checked, every link leads somewhere.

The python blocks of a page are one program, run in a folder like that of a user: outputs/quickstart is a checkpoint,
and Hub ids are folders of those names; all tiny. In bash blocks every command of this library is run with what makes
it short; commands for other machines are read by the parsers that they are for.
"""

import configparser
import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from tiny import TEXT_CONFIGS, VISION_CONFIGS, tiny_image, tiny_tokenizer
from transformers import CLIPImageProcessor, CLIPVisionModel, GPT2LMHeadModel

import train_hf
from mmcoconut.arguments.fields import TYPES
from mmcoconut.arguments.recipe_files import BASE
from mmcoconut.arguments.recipes import parse_recipe, read_recipe
from mmcoconut.build.tiny_models import write_tiny_vlm
from mmcoconut.data import TEST_ONLY, json_steps, llava_instruct, loader_of
from mmcoconut_cli import commands


ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Later options win. A comparison of all modes with three seeds would train fifteen times.
TINY = ["--smoke_test", "true", "--disable_tqdm", "true", "--report_to", "none"]
TINY_COMPARISON = ["--compare", "coconut", "--seeds", "1"]
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
# The blocks that cannot run, with why; whoever adds one says so here too.
REASONS = {
    "docs/audit.md": ["it needs the runs of a comparison, which train for minutes"],
    "docs/backbones.md": [
        "it takes the checkpoint of a run of that recipe",
        "it installs packages of 90 and 250 MB; tests/test_real_weights.py does the rest",
    ],
    "docs/benchmarks.md": [
        "it downloads",
        "lm-eval is not among the requirements; tests/test_harnesses.py runs it",
        "lmms-eval is not among the requirements, and downloads its tasks; tests/test_harnesses.py runs it",
    ],
    "docs/install.md": ["it installs the wheel of a release; tests/test_wheel.py does"],
    "docs/objectives.md": ["it trains 39 models"],
    "docs/publishing.md": [
        "it uploads; tests/test_publish.py publishes to a server of its own",
        "it uploads; tests/test_demo.py uploads a Space to a server of its own",
    ],
    "docs/using.md": [
        "tests/test_cli.py and tests/test_wheel.py run these commands",
        "a server does not end by itself; tests/test_use.py starts this one and asks it",
    ],
}
NUM_PICTURES = 8


@dataclass
class Block:
    """A fenced block: its page, the line of its fence counted from 1, and why it is not run, if so."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    found, begun = [], None
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if begun is None:
            begun = number
            continue
        reason = NOT_RUN.fullmatch(lines[begun - 1])
        text = "\n".join(lines[begun + 1 : number]) + "\n"
        found.append(Block(page, begun + 1, lines[begun][3:], text, reason and reason[1]))
        begun = None
    assert begun is None, f"{page.name}:{begun + 1}: this block does not end"
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def blocks_in(language: str):
    """Parametrises a test with the blocks of a language that are run."""
    chosen = [block for block in BLOCKS if block.language == language and block.reason is None]
    return pytest.mark.parametrize("block", chosen, ids=lambda block: block.name)


def write_hub_models(folder: Path) -> None:
    """Folders with the names of the Hub ids in the pages, each a tiny model of that architecture."""
    torch.manual_seed(0)
    side = {"height": 16, "width": 16}
    clip, gpt2, tokenizer = folder / "openai/clip-vit-base-patch32", folder / "openai-community/gpt2", tiny_tokenizer()
    for part in (CLIPVisionModel(VISION_CONFIGS["clip"]()), CLIPImageProcessor(size=side, crop_size=side)):
        part.save_pretrained(clip)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    decoder = GPT2LMHeadModel(TEXT_CONFIGS["gpt2"](vocab_size=len(tokenizer), **ids))
    for part in (decoder, tokenizer):
        part.save_pretrained(gpt2)
    write_tiny_vlm(folder / "OpenGVLab/InternVL3-1B-hf", "internvl")
    decoder.resize_token_embeddings(len(tokenizer) + 3, mean_resizing=False)
    torch.save(decoder.state_dict(), folder / "checkpoint_33")  # as the original Coconut code saves its stage 0


def write_data(folder: Path) -> None:
    """Rows and a recipe of a user's own, benchmarks, and Flickr30k's captions and pictures."""
    json_steps.write_sample(folder / "data" / "mine", num_rows=8, seed=0)
    [recipe] = [block for block in BLOCKS if block.page.name == "data.md" and block.text.startswith(f"{BASE}: ")]
    (folder / "try.yaml").write_text(recipe.text)  # the page says so
    for name in TEST_ONLY:
        loader_of(name).write_sample(folder / "data" / name, num_rows=4, seed=0)
    pictures = folder / "flickr30k-images"
    pictures.mkdir()
    rows = []
    for number in range(NUM_PICTURES):
        tiny_image(number).save(pictures / f"{number}.jpg")
        split = ("train", "train", "val", "test")[number % 4]
        sentences = [{"raw": f"A dog , number {number} ."}]
        rows.append({"filename": f"{number}.jpg", "split": split, "sentences": sentences})
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": rows, "dataset": "flickr30k"}))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """The folder that a user stands in, after `make quickstart`."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    write_hub_models(folder)
    write_data(folder)
    with contextlib.chdir(folder):
        for recipe in ("quickstart", "gpt2_clip_add_llava"):
            train_hf.main([f"recipes/{recipe}.yaml", *TINY])
        train_hf.main(["try.yaml", *TINY])
        steps = ["--objectives.step_decoder", "1.0", "--output_dir", "outputs/steps"]
        train_hf.main(["recipes/quickstart.yaml", *steps, *TINY])
    for name in ("quickstart", "try", "steps"):
        (folder / f"outputs/{name}-smoke").rename(folder / "outputs" / name)
    return folder


@pytest.fixture
def user(scratch, monkeypatch):
    monkeypatch.chdir(scratch)
    return scratch


@pytest.fixture(scope="module")
def programs():
    """Of each page the names that its python blocks have made, and how many blocks have run."""
    return {page: ({"__name__": page.stem}, []) for page in PAGES}


@blocks_in("python")
def test_a_python_block_runs_behind_those_before_it(block, user, programs):
    names, done = programs[block.page]
    for earlier in blocks_of(block.page):
        if earlier.language == "python" and earlier.line <= block.line and earlier.line not in done:
            code = "\n" * earlier.line + earlier.text  # so that an error names the page's own line
            exec(compile(code, str(earlier.page), "exec"), names)
            done.append(earlier.line)


def commands_of(text: str) -> list[list[str]]:
    """The words of each command of a block, without comments.

    >>> commands_of("a b \\\\\\n  --c 1  # why\\nd && e\\n")
    [['a', 'b', '--c', '1'], ['d'], ['e']]
    """
    lines = text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split("&&")]
    return [words for words in (shlex.split(part, comments=True) for part in parts) if words]


def check_make(words: list[str]) -> None:
    subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, capture_output=True)


def check_pip(words: list[str]) -> None:
    """What is installed is an extra of setup.cfg or a pinned name; files that are named exist."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    pins = [line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()]
    for option, word in zip(["", *words], words):
        extras = re.fullmatch(r"(?:\.|mmcoconut)\[([\w,]+)\]", word)
        if option == "-c":
            assert (ROOT / word).is_file(), word
        elif extras:
            assert set(extras[1].split(",")) <= set(setup["options.extras_require"]), word
        elif not word.startswith("-") and option not in ("-d", "--find-links"):
            assert word in [".", "setuptools", *pins], word


def run_script(script: str, words: list[str]) -> None:
    assert script == "train_hf.py", f"no way to run {script}"
    if words == ["--help"]:
        with pytest.raises(SystemExit) as ended:
            train_hf.main(words)
        assert ended.value.code == 0
        return
    train_hf.main([*words, *TINY, *(TINY_COMPARISON if "--compare" in words else [])])


def run_launched(words: list[str]) -> None:
    """The script in this process; with a file for several devices only the file and the recipe are read."""
    launch = launch_command_parser().parse_args(words)
    if launch.config_file is None:
        return run_script(launch.training_script, launch.training_script_args)
    assert load_config_from_file(launch.config_file).num_processes > 1
    parse_recipe([*launch.training_script_args, *TINY])


def main_of(module: str):
    """Return `main` of what `python -m module` runs."""
    loaded = importlib.import_module(module)
    is_package = hasattr(loaded, "__path__")
    return (importlib.import_module(f"{module}.__main__") if is_package else loaded).main


def run_console(words: list[str]) -> None:
    """Run the console script in this process; `train` and `compare` with what makes them short."""
    tiny = {"train": TINY, "compare": [*TINY, *TINY_COMPARISON]}.get(words[0], [])
    try:
        commands.main([*words, *tiny])
    except SystemExit as ended:
        assert not ended.code, f"mmcoconut {shlex.join(words)} ended with status {ended.code}"


def run(words: list[str]) -> None:
    """A command of a bash block, or what can be known of it here."""
    match words:
        case ["make", *targets]:
            check_make(targets)
        case ["pip", "install" | "download", *rest]:
            check_pip(rest)
        case ["python3", "-m", "venv", folder]:
            venv.create(folder, with_pip=False)
        case ["source", script]:
            assert Path(script).is_file(), f"no file {script}"
        case ["python", "-c", program]:
            exec(program, {})
        case ["accelerate", "launch", *rest]:
            run_launched(rest)
        case ["mmcoconut", *rest]:
            run_console(rest)
        case ["python", "-m", module, "--help"]:
            with pytest.raises(SystemExit) as ended:
                main_of(module)(["--help"])
            assert ended.value.code == 0
        case ["python", "-m", module, *rest]:
            main_of(module)(rest)
        case ["python", script, *rest]:
            run_script(script, rest)
        case _:
            raise AssertionError(f"no way to run {shlex.join(words)}")


@pytest.mark.slow
@blocks_in("bash")
def test_the_commands_of_a_bash_block_run(block, user):
    for words in commands_of(block.text):
        run(words)


@blocks_in("yaml")
def test_a_yaml_block_is_a_recipe_or_a_part_of_one(block, user):
    """Its keys exist and have the right types, also in the recipe that it is based on."""
    values = yaml.safe_load(block.text)
    assert values.keys() <= {BASE, *TYPES}
    file = user / "recipes" / "block.yaml"
    file.write_text(block.text)
    assert {key for key, value in values.items() if value is not None} - {BASE} <= read_recipe(file).keys()


@blocks_in("json")
def test_a_json_block_holds_rows_that_are_read(block, tmp_path):
    """Rows of json_steps, or, with turns in them, of llava_instruct."""
    rows = json.loads(block.text)
    rows = rows if isinstance(rows, list) else [rows]
    (tmp_path / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    for name in [name for row in rows for name in row.get("images", [row.get("image")])]:
        tiny_image().save(tmp_path / name)
    if "question" in rows[0]:
        read = json_steps.load(split="train", file=str(tmp_path / "{split}.json"), image_root=tmp_path)
        assert read["question"] == [row["question"] for row in rows]
        return
    options = {"file": str(tmp_path / "train.json"), "image_root": str(tmp_path), "fractions": [1, 0, 0]}
    for row, read in zip(rows, llava_instruct.load(split="train", **options), strict=True):
        assert len(read["history"]) + 1 == len(row.get("conversations", row.get("messages"))) / 2


@pytest.mark.slow
def test_the_first_training_command_runs_as_it_stands(user):
    """Not in this process as above, but by the console script."""
    readme = [block for block in BLOCKS if block.page.name == "README.md" and block.language == "bash"]
    commands = [words for block in readme for words in commands_of(block.text)]
    words = next(words for words in commands if "--smoke_test" in words)
    assert words[:2] == ["mmcoconut", "train"]
    command = [sys.executable, "-m", "mmcoconut_cli", *words[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=user, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (user / "outputs/gpt2_clip_aokvqa-smoke/results.json").is_file()


def is_output(block: Block) -> bool:
    """Return True if the block before this one, in the same section, holds the commands or the program."""
    before = [other for other in BLOCKS if other.page == block.page and other.line < block.line]
    if not before or before[-1].language not in ("bash", "python"):
        return False
    end = before[-1].line + before[-1].text.count("\n")
    between = block.page.read_text(encoding="utf-8").splitlines()[end : block.line]
    return not any(line.startswith("#") for line in between)


def test_every_block_has_a_language_that_is_run_or_is_an_output_or_a_drawing():
    assert {block.language for block in BLOCKS} == {"python", "bash", "yaml", "json", "text", ""}
    shown = [block for block in BLOCKS if block.language in ("", "text")]
    assert [block.page.name for block in shown if not is_output(block)] == ["README.md", "conversations.md"]


def test_only_these_blocks_are_not_run():
    found = {}
    for block in BLOCKS:
        if block.reason is not None:
            found.setdefault(str(block.page.relative_to(ROOT)), []).append(block.reason)
    assert found == REASONS


def anchors_of(page: Path) -> set[str]:
    """What `#…` may name in a page, spelt as code hosts do."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_link_within_the_repository_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(file), target


def test_the_front_page_is_short_and_names_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 173
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in readme, page.name


@pytest.mark.parametrize(
    "command",
    [
        "make quickstat",
        "pip install .[audits]",
        "pip install numpyy",
        "source .nothing/activate",
        "python train.py",
        "python -m mmcoconut.audits",
        "mmcoconut audits",
    ],
)
def test_a_command_that_does_not_exist_is_noticed(command, user):
    with pytest.raises((AssertionError, subprocess.CalledProcessError, ImportError)):
        run(shlex.split(command))
