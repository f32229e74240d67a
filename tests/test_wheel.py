"""A release holds everything: the wheel works without the repository, and the sdist contains and builds all of it."""

import os
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest

import mmcoconut


ROOT = Path(__file__).resolve().parent.parent
NAME = f"mmcoconut-{mmcoconut.__version__}"
PIP = [sys.executable, "-m", "pip", "-q"]
SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
ROWS = ["--dataset_options.num_rows", "40", "--max_samples", "4"]
WORK = f"""
import sys
from pathlib import Path
import mmcoconut
from mmcoconut_cli.commands import main

assert Path(mmcoconut.__file__).is_relative_to(sys.argv[1]), mmcoconut.__file__
main(["train", "quickstart", "--smoke_test", "--output_dir", "run"])
main(["eval", "run-smoke", "--output_dir", "evaluation", *{ROWS!r}])
main(["audit", "run-smoke", "--output_dir", "audit", "--parts", "verdict", *{ROWS!r}])
import mmcoconut.serve
"""


def environment(**values: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": "", **values}


def call(words: list[str], folder: Path, **values: str) -> str:
    """Run a command in a folder; what it printed."""
    options = {"cwd": folder, "env": environment(**values), "timeout": 1200}
    done = subprocess.run(words, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def tracked_files() -> list[str]:
    return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


def wheel_of(source: Path, folder: Path) -> Path:
    """Build the wheel of a source folder, as `python -m build` does."""
    call([*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), "."], source)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The tracked files alone, without what else lies in a checkout."""
    folder = tmp_path_factory.mktemp("source")
    archive = str(tmp_path_factory.mktemp("archive") / "source.tar")
    call(["tar", "-cf", archive, *tracked_files()], ROOT)
    call(["tar", "-xf", archive], folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return wheel_of(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked_sdist(source, tmp_path_factory) -> Path:
    """The folder out of the sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    call([sys.executable, "-c", SDIST, str(folder)], source)
    with tarfile.open(folder / f"{NAME}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / NAME


def is_answered(url: str, process: subprocess.Popen, seconds: float) -> bool:
    """Wait until a server answers, ends or the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return b"gradio" in answer.read()
        except urllib.error.URLError:
            time.sleep(0.5)
    return False


@pytest.mark.slow
def test_the_wheel_works_without_the_repository(wheel, tmp_path):
    installed = tmp_path / "installed"
    call([*PIP, "install", "--no-deps", "--no-index", "--target", str(installed), str(wheel)], tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    away = {"PYTHONPATH": str(installed)}
    command = [sys.executable, str(installed / "bin" / "mmcoconut")]
    listed = call([*command, "recipes"], elsewhere, **away)
    assert listed.startswith("captioner") and f"{installed}" in listed
    call([sys.executable, "-c", WORK, str(installed)], elsewhere, **away)
    for file in ("run-smoke/results.json", "evaluation/evaluation.json", "audit/audit.json"):
        assert (elsewhere / file).is_file()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (tmp_path / "demo.log").open("w") as log:
        words = [*command, "demo", "run-smoke", "--port", str(port)]
        demo = subprocess.Popen(words, cwd=elsewhere, env=environment(**away), stdout=log, stderr=subprocess.STDOUT)
        try:
            answered = is_answered(f"http://127.0.0.1:{port}/", demo, 300)
        finally:
            demo.terminate()
            demo.wait(30)
    assert answered, (tmp_path / "demo.log").read_text()[-4000:]


@pytest.mark.slow
def test_the_sdist_contains_everything_tracked(unpacked_sdist):
    found = {str(path.relative_to(unpacked_sdist)) for path in unpacked_sdist.rglob("*") if path.is_file()}
    written = {name for name in found if name == "PKG-INFO" or name.startswith("mmcoconut.egg-info/")}
    assert found - written == {name for name in tracked_files() if not name.startswith(".")}


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(unpacked_sdist, wheel, tmp_path):
    again = wheel_of(unpacked_sdist, tmp_path)
    assert again.name == wheel.name == f"{NAME}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        names = one.namelist()
        assert {"mmcoconut/recipes/quickstart.yaml", "mmcoconut_cli/constraints.txt"} <= {*names}
        assert sorted(names) == sorted(other.namelist())
        for name in names:
            assert name.endswith("/RECORD") or one.read(name) == other.read(name), name
