"""Provenance of a result: machine, versions, the commit of the code, the command."""

import datetime
import os
import platform
import resource
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

import mmcoconut


ROOT = Path(__file__).resolve().parent.parent


def commit() -> str | None:
    """Return the commit of this code's checkout, with "+changes" if files differ; None outside a checkout."""
    if not (ROOT / ".git").exists():
        return None
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a checkout that it does not trust
        return None
    return f"{head}+changes" if changed else head


def machine(device) -> str:
    """Return architecture, number of cores, threads in use and the device's name."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {name}"


def versions() -> dict[str, str]:
    return {
        "mmcoconut": mmcoconut.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def peak_memory_mb(device) -> float:
    """Return the peak memory: torch's on a CUDA device, the whole process's on the CPU. In MB (10⁶ bytes)."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def without_tokens(words: Sequence[str]) -> list[str]:
    """Return the words of a command line without secrets, because the output may be pushed.

    >>> without_tokens(["--hub_token", "hf_1", "--hub_token=hf_1", "--tokenizer", "train"])
    ['--hub_token', 'hidden', '--hub_token=hidden', '--tokenizer', 'train']
    """
    shown = []
    for before, word in zip(["", *words], words):
        key, equals, _ = word.partition("=")
        if before.startswith("--") and before.endswith("token") and not word.startswith("--"):
            word = "hidden"
        elif equals and key.startswith("--") and key.endswith("token"):
            word = f"{key}=hidden"
        shown.append(word)
    return shown


def command() -> str:
    """Return the command that started this process, quoted for a shell."""
    spec = sys.modules["__main__"].__spec__  # of `python -m module`
    program = [Path(sys.argv[0]).name] if spec is None else ["python", "-m", spec.name.removesuffix(".__main__")]
    return shlex.join([*program, *without_tokens(sys.argv[1:])])


def provenance(device) -> dict:
    """Return the provenance of a result: command, date, machine, versions, commit."""
    return {
        "command": command(),
        "date": datetime.date.today().isoformat(),
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
    }
