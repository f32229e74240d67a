"""The command `mmcoconut`: quick help, recipes by name, the doctor, what is launched, one question."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from mmcoconut import launching
from mmcoconut.arguments.recipe_files import located
from mmcoconut.errors import RecipeError
from mmcoconut_cli import commands, doctor, recipes


ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a new process that finds this checkout."""
    paths = os.pathsep.join([environment.pop("PYTHONPATH", ""), str(ROOT)]).strip(os.pathsep)
    values = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run([sys.executable, "-c", code], env=values, capture_output=True, text=True, timeout=300)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from mmcoconut_cli.commands import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    )
    done = python(code)
    assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in commands.COMMANDS)
    heavy = {"torch", "transformers", "numpy", "yaml", "mmcoconut", "huggingface_hub", "accelerate"}
    assert not heavy & {*done.stderr.split()}


@pytest.mark.parametrize("name", [name for name in commands.COMMANDS if name not in ("demo", "serve")])
def test_every_command_runs_what_it_names_and_shows_its_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main([name, "--help"])
        raise SystemExit(0)
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_a_misspelt_option_of_ask_names_the_one_that_is_meant(capsys):
    with pytest.raises(SystemExit, match="2"):
        commands.main(["ask", "outputs/x", "--imgae", "a.png", "What is it?"])
    assert "--imgae: no such option; did you mean --image?" in capsys.readouterr().err


def test_help_lists_inherited_options_too_and_each_once(capsys):
    with pytest.raises(SystemExit, match="0"):
        commands.main(["audit", "--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: mmcoconut audit MODEL")
    assert all(said.count(f"  --{name}: ") == 1 for name in ("model", "split", "dtype", "max_samples", "parts"))


def test_recipes_are_listed_by_name_and_found_by_it(capsys, tmp_path, monkeypatch):
    assert recipes.main([]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line and line[0] != "T"]
    assert listed == RECIPES == sorted(recipes.installed_recipes())
    monkeypatch.chdir(tmp_path)
    assert Path(located("quickstart")) == ROOT / "recipes" / "quickstart.yaml"
    (tmp_path / "quickstart").write_text("seed: 1")
    assert located("quickstart") == "quickstart"  # a file of that name comes first


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_sentence_of_a_recipe_is_the_beginning_of_its_comment(recipe):
    file = ROOT / "recipes" / f"{recipe}.yaml"
    sentence = recipes.sentence_of(file)
    assert file.read_text().startswith(f"# {sentence[:40]}") and sentence.endswith((".", "quickstart"))


def test_the_doctor_finds_this_machine_fit(capsys):
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    assert "No problems found." in said and "PROBLEM" not in said
    assert f"transformers        {importlib.metadata.version('transformers')}" in said


@pytest.mark.parametrize(
    "versions, problem",
    [
        ({"transformers": None}, "needs <6,>=5.18: pip install 'transformers<6,>=5.18'"),
        ({"transformers": "5.17.2"}, "outside of the tested range"),
        ({"torch": "2.15.0"}, "outside of the tested range"),
        ({"packaging": None}, "pip install packaging"),
        ({"mmcoconut": None}, "pip install mmcoconut"),
    ],
)
def test_the_doctor_names_what_is_missing_or_out_of_range(versions, problem, monkeypatch, capsys):
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: versions[name] if name in versions else real(name))
    assert doctor.main([]) == 1
    said = capsys.readouterr().out
    assert problem in said and f"problem(s): {[*versions][0]}" in said


def test_the_doctor_tells_what_cannot_be_imported_or_written(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor.main([]) == 1
    said = capsys.readouterr().out
    assert "problem(s): import torch" in said and "downloads" in said and "unknown without torch" in said


def test_optional_packages_that_are_missing_are_no_problem(monkeypatch):
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "peft" else real(name))
    lines = {line.split()[0]: line for line in doctor.optional_lines()}
    assert lines["lora"].endswith("lacks peft (missing): pip install 'mmcoconut[lora]'")
    assert [*lines] == [*doctor.EXTRAS, "torchvision"]
    monkeypatch.setattr(doctor, "installed", lambda name: {"torchvision": "0.28"}.get(name) or real(name))
    assert [*doctor.optional_lines()][-1].endswith("installed (0.28)")


@pytest.mark.slow
@pytest.mark.parametrize("folder", sorted((ROOT / ".releases").glob("*")))
def test_the_doctor_runs_on_other_releases(folder):
    done = python("from mmcoconut_cli.commands import main; main(['doctor'])", PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"^  ok +transformers +{re.escape(folder.name)} ", done.stdout, re.MULTILINE), done.stdout


def test_a_package_that_cannot_be_loaded_leads_to_the_doctor(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mmcoconut.errors", None)
    with pytest.raises(SystemExit) as ended:
        commands.main(["train", "quickstart"])
    assert ended.value.code == 2 and "mmcoconut doctor" in capsys.readouterr().err


@pytest.mark.parametrize(
    "num_gpus, words, rank, launches",
    [
        (0, ["quickstart"], None, False),
        (1, ["quickstart"], None, False),
        (4, ["quickstart", "--seed", "3"], None, True),
        (4, ["quickstart"], "0", False),
        (4, ["quickstart", "--compare", "cot,coconut"], None, False),
        (4, ["--help"], None, False),
    ],
)
def test_training_takes_a_process_for_each_gpu(num_gpus, words, rank, launches, monkeypatch):
    ran, launched = [], []
    monkeypatch.setattr(launching.torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(launching, "main_of", lambda module: ran.append)
    monkeypatch.setattr(launching, "launch_command", launched.append)
    monkeypatch.setattr(launching, "default_config_file", "nowhere")
    monkeypatch.setattr("mmcoconut.arguments.recipes.RunArguments", None)  # it would take a GPU in this process too
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    launching.train(words)
    assert (ran == [words], len(launched)) == (not launches, int(launches))
    for given in launched:
        assert (given.multi_gpu, given.num_processes, given.training_script_args) == (True, 4, words)
        assert given.training_script == str(ROOT / "train_hf.py")


def test_a_wrong_recipe_is_refused_before_anything_is_launched(monkeypatch):
    monkeypatch.setattr(launching.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launching, "launch_command", lambda arguments: pytest.fail("it was launched"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(RecipeError, match="sed = '3': no such key; did you mean `seed`"):
        launching.train(["quickstart", "--sed", "3"])


def test_what_accelerate_config_says_goes_first():
    words = launching.launch_words(["quickstart"], num_gpus=2, is_configured=True)
    given = launch_command_parser().parse_args(words)
    assert given.num_processes is None and given.training_script_args == ["quickstart"]


def test_words_in_front_of_the_options_are_model_recipe_or_variants(monkeypatch):
    ran = []
    monkeypatch.setattr(launching, "main_of", lambda module: lambda words: ran.append((module, words)))
    launching.evaluate(["out/run", "--split", "test"])
    launching.audit(["--model", "out/run"])
    launching.compare(["quickstart", "cot,coconut", "--seeds", "2"])
    launching.convert(["vlm", "a", "b"])
    assert ran == [
        ("mmcoconut.evaluation.evaluate", ["--model", "out/run", "--split", "test"]),
        ("mmcoconut.audit.command", ["--model", "out/run"]),
        ("train_hf", ["quickstart", "--compare", "cot,coconut", "--seeds", "2"]),
        ("mmcoconut.convert_vlm", ["a", "b"]),
    ]


def test_one_question_gets_answer_thoughts_and_time(tmp_path, capsys):
    from tiny import tiny_image, tiny_model, tiny_processor

    model = tiny_model()
    processor = tiny_processor(model)
    processor.num_latents = 2
    for part in (model, processor):
        part.save_pretrained(tmp_path / "run")
    tiny_image().save(tmp_path / "a.png")
    commands.main(["ask", str(tmp_path / "run"), "--image", str(tmp_path / "a.png"), "What is left?"])
    lines = capsys.readouterr().out.splitlines()
    names = ("answer", "thought 1, logit lens", "thought 2, logit lens", "time")
    assert [line.split(": ")[0] for line in lines if line.startswith(names)] == [*names]
    assert "thoughts: 2" in lines[-1]
