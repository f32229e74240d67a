"""The package: names, docstring examples, layout, and what a clean repository must not hold."""

import configparser
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mmcoconut


ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__").removeprefix("mmcoconut.")
    for path in [*ROOT.glob("mmcoconut/**/*.py"), *ROOT.glob("*_mmcoconut.py")]
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_are_true(name):
    assert doctest.testmod(importlib.import_module(f"mmcoconut.{name}")).failed == 0


@pytest.mark.parametrize("name", mmcoconut.PUBLIC_NAMES)
def test_public_names_exist_and_say_what_they_are(name):
    assert getattr(mmcoconut, name).__doc__


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'MMCocos'"):
        mmcoconut.MMCocos  # noqa: B018


@pytest.mark.slow
def test_importing_the_package_imports_no_library_for_training():
    code = "import sys, mmcoconut; print(any(name in sys.modules for name in ('datasets', 'evaluate')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


def test_root_modules_are_all_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert set(setup["options"]["py_modules"].split()) == {
        "train_hf",
        *(path.stem for path in ROOT.glob("*_mmcoconut.py")),
    }


def test_sub_packages_are_all_installed_with_what_they_show():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = [path.parent.relative_to(ROOT) for path in ROOT.glob("mmcoconut/**/__init__.py")]
    mapped = {"mmcoconut.metrics", "mmcoconut.recipes", "mmcoconut_cli"}
    assert set(setup["options"]["packages"].split()) == {*mapped, *(".".join(f.parts) for f in folders)}
    files = [path for path in ROOT.glob("mmcoconut/**/*") if path.suffix in (".html", ".css", ".md")]
    assert len(files) == 4
    for file in files:
        patterns = setup["options.package_data"][".".join(file.parent.relative_to(ROOT).parts)].split(", ")
        assert f"*{file.suffix}" in patterns, file
    assert setup["options.package_data"]["mmcoconut.harnesses"] == "*_tasks/*"


@pytest.mark.parametrize(
    "file",
    [
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "CITATION.cff",
        "LICENSE",
        "MANIFEST.in",
        "Makefile",
        "model_card.md",
        "constraints.txt",
    ],
)
def test_repository_has(file):
    assert (ROOT / file).stat().st_size > 0


def test_citation_and_changelog_name_this_version_and_its_date():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    [newest, *_] = re.findall(r"^## .*$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert cited["version"] == mmcoconut.__version__
    assert newest == f"## {mmcoconut.__version__} ({cited['date-released']})"


def test_no_pickle_is_loaded():
    tracked = subprocess.run(["git", "ls-files", "*.py"], capture_output=True, text=True, cwd=ROOT, check=True)
    files = [name for name in tracked.stdout.split() if not name.startswith("tests/")]
    assert "mmcoconut/publish.py" in files
    for name in files:
        text = (ROOT / name).read_text()
        text = re.sub(r"torch\.load\([^()]*, weights_only=True\)", "", text)  # of the original Coconut code's files
        assert not [word for word in ("torch.load(", "pickle.load", "joblib", "np.load(") if word in text], name


def test_no_file_holds_a_path_of_one_machine():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    needles = ["/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/"]
    for name in tracked:
        text = (ROOT / name).read_text(errors="ignore")
        assert not [needle for needle in needles if needle in text], name
