"""`mmcoconut doctor`: check if this machine can run mmcoconut, and print remedies.

Reads versions and ranges from the metadata of the installed packages, so it works if one of them is missing, broken
or out of its range.
"""

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


PACKAGE = "mmcoconut"
CONSTRAINTS = Path(__file__).with_name("constraints.txt")
# Purpose of each extra; those of the tests are left out.
EXTRAS = {
    "audit": "pictures and probes of `mmcoconut audit`, tables of `mmcoconut compare`",
    "captions": "metrics of captions",
    "demo": "`mmcoconut demo`",
    "gguf": "language models out of GGUF files",
    "lora": "training adapters (`lora` in a recipe)",
    "quantization": "models in 8 or 4 bits",
    "rl": "training with rewards (GRPO, RLOO)",
    "smolvlm": "SmolVLM's processor",
    "serve": "`mmcoconut serve`",
}
# A package in no extra, because its build has to belong to that of torch.
TORCHVISION = "torchvision", "processors of Qwen-VL, SmolVLM and others that also read videos; timm's towers"
GIB = 2**30
LITTLE_SPACE = 5 * GIB


@dataclass
class Check:
    """One line of the report: the checked item, the finding, and the problem, if any."""

    name: str
    found: str
    problem: str = ""

    def __str__(self) -> str:
        mark = "PROBLEM" if self.problem else "ok"
        return f"  {mark:8} {self.name:19} {self.found}" + (f"\n{'':11}{self.problem}" if self.problem else "")


def installed(name: str) -> str | None:
    """Return the version of an installed package, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def tested_versions() -> dict[str, str]:
    """Return the versions that the tests use, by the package's normalized name."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {normalized(name): version.strip() for name, version in pins}


def normalized(name: str) -> str:
    """Return a package's normalized name, as indexes compare it.

    >>> normalized("huggingface_Hub")
    'huggingface-hub'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements_of(extra: str | None = None) -> list:
    """Return the requirements of this package, or of one of its extras, that apply to this machine."""
    from packaging.requirements import Requirement  # of transformers' own requirements, so it may be missing

    parsed = [Requirement(line) for line in importlib.metadata.requires(PACKAGE) or ()]
    for_extra = {"extra": extra or ""}

    def applies(requirement) -> bool:
        if requirement.marker is None:
            return extra is None
        without = requirement.marker.evaluate({"extra": ""})
        return without if extra is None else requirement.marker.evaluate(for_extra) and not without

    return [requirement for requirement in parsed if applies(requirement)]


def check_requirement(requirement, tested: dict[str, str]) -> Check:
    """Compare an installed version with the required range."""
    version, wanted = installed(requirement.name), str(requirement.specifier)
    install = f"pip install '{requirement.name}{wanted}'"
    if version is None:
        return Check(requirement.name, "missing", f"needs {wanted or 'any version'}: {install}")
    found = f"{version:12} needs {wanted or 'any version'}"
    if pin := tested.get(normalized(requirement.name)):
        found += f", tested with {pin}"
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(requirement.name, found, f"outside of the tested range: {install}")
    return Check(requirement.name, found)


def check_python() -> Check:
    """Compare Python's version with the required range."""
    version = platform.python_version()
    wanted = (importlib.metadata.metadata(PACKAGE) or {}).get("Requires-Python") or ""
    from packaging.specifiers import SpecifierSet

    fits = SpecifierSet(wanted).contains(version)
    return Check("python", f"{version:12} needs {wanted or 'any version'}", "" if fits else f"use Python {wanted}")


def check_versions() -> Iterator[Check]:
    """Check Python and every required package."""
    if installed(PACKAGE) is None:
        yield Check(PACKAGE, "not installed", "its requirements are unknown: pip install mmcoconut")
        return
    yield Check(PACKAGE, installed(PACKAGE))
    if installed("packaging") is None:
        yield Check("packaging", "missing", "versions cannot be compared: pip install packaging")
        return
    yield check_python()
    tested = tested_versions()
    yield from (check_requirement(requirement, tested) for requirement in requirements_of())


def optional_lines() -> Iterator[str]:
    """Yield a line per extra: its purpose, and which packages are missing or out of range. These are not problems."""
    if installed(PACKAGE) is None or installed("packaging") is None:
        return
    tested = tested_versions()
    for extra, purpose in EXTRAS.items():
        checks = [check_requirement(requirement, tested) for requirement in requirements_of(extra)]
        lacking = [f"{check.name} ({check.found.split()[0]})" for check in checks if check.problem]
        state = f"lacks {', '.join(lacking)}: pip install 'mmcoconut[{extra}]'" if lacking else "installed"
        yield f"  {extra:13} {purpose}: {state}"
    name, purpose = TORCHVISION
    found = installed(name)
    yield f"  {name:13} {purpose}: {f'installed ({found})' if found else f'missing: pip install {name}'}"


def imported(name: str) -> tuple[object | None, Check]:
    """Import a module; return it and the result. A broken installation may raise any error."""
    try:
        module = importlib.import_module(name)
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return None, Check(f"import {name}", type(error).__name__, reason)
    return module, Check(f"import {name}", "works")


def device_lines(torch) -> Iterator[str]:
    """Yield the processors that models can run on."""
    yield f"  CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads in use"
    for index in range(torch.cuda.device_count()):
        try:
            found = torch.cuda.get_device_properties(index)
        except RuntimeError as error:  # such as a driver that is too old for this build of torch
            yield f"  GPU {index}: cannot be used: {str(error).strip().partition(chr(10))[0]}"
            continue
        yield f"  GPU {index}: {found.name}, {found.total_memory / GIB:.0f} GiB"
    if torch.backends.mps.is_available():
        yield "  GPU: Apple's, by mps"
    if not torch.accelerator.is_available():
        yield "  no GPU: small models train and answer on the CPU; the large recipes need a GPU"


def folders() -> dict[str, Path]:
    """Return the folders for output: downloads, prepared data sets, results, temporary files."""
    home = Path(os.environ.get("HF_HOME", Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")))
    home = home.expanduser()
    return {
        "downloads": Path(os.environ.get("HF_HUB_CACHE", home / "hub")),
        "data sets": Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")),
        "outputs": Path("outputs"),
        "temporary files": Path(tempfile.gettempdir()) if any_temporary_folder() else Path("tmp"),
    }


def any_temporary_folder() -> bool:
    """Return False if no folder for temporary files is writable."""
    try:
        return bool(tempfile.gettempdir())
    except FileNotFoundError:
        return False


def check_folder(name: str, folder: Path) -> Check:
    """Try to write to a folder, or to its nearest existing parent, and measure the free space."""
    place = folder.absolute()
    try:
        existing = next(each for each in (place, *place.parents) if each.exists())
        with tempfile.TemporaryFile(dir=existing):
            free = shutil.disk_usage(existing).free
    except OSError as error:
        remedy = f"{error.strerror or error}: change its permissions, or set HF_HOME, TMPDIR or --output_dir"
        return Check(name, f"{folder}, not writable", remedy)
    little = free < LITTLE_SPACE
    problem = "little space for models and checkpoints: free some" if little and free < GIB else ""
    return Check(name, f"{folder}, {free / GIB:.0f} GiB free" + (", little space" if little else ""), problem)


def report() -> tuple[list[str], list[Check]]:
    """Return the lines of the report, and the problems among them."""
    versions = [*check_versions()]
    modules = {name: imported(name) for name in ("torch", "transformers", PACKAGE)}
    imports = [check for _, check in modules.values()]
    paths = [check_folder(name, folder) for name, folder in folders().items()]
    torch = modules["torch"][0]
    lines = [f"{platform.system()} {platform.machine()}, {sys.executable}", "", "Required:", *map(str, versions)]
    lines += ["Imports:", *map(str, imports), "Devices:"]
    lines += ["  unknown without torch"] if torch is None else [*device_lines(torch)]
    lines += ["Folders:", *map(str, paths), "Optional:", *optional_lines()]
    return lines, [check for check in (*versions, *imports, *paths) if check.problem]


def main(words: list[str]) -> int:
    """Print the report; return 0 without problems, else 1."""
    if {"-h", "--help"} & {*words}:
        print("usage: mmcoconut doctor\n\nCheck versions, devices, folders and optional packages; status 1 if not ok.")
        return 0
    lines, problems = report()
    print("\n".join(lines))
    names = ", ".join(check.name for check in problems)
    print(f"\n{len(problems)} problem(s): {names}" if problems else "\nNo problems found.")
    return 1 if problems else 0
