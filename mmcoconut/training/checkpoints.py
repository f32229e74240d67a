"""Save checkpoints so that a killed run leaves a complete one, and choose the checkpoint to resume from.

A checkpoint is written to .saving/checkpoint-n, described by course.json with the size of each file, flushed to disk,
and then renamed to checkpoint-n.
"""

import json
import logging
import re
import shutil
import zipfile
from collections.abc import Container, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mmcoconut.errors import UsageError
from mmcoconut.records import COURSE_FILE, read_json, sync, write_json


logger = logging.getLogger("mmcoconut")

ASIDE = ".saving"
# The files that resuming reads, by what wrote them: one process, FSDP, DeepSpeed.
STATE = {
    "weights": ("*model*.safetensors", "pytorch_model*", "global_step*"),
    "optimizer.pt": ("optimizer*", "global_step*"),
    "scheduler.pt": ("scheduler.pt", "global_step*"),
    "rng_state.pth": ("rng_state*.pth",),
    TRAINER_STATE_NAME: (TRAINER_STATE_NAME,),
}


def files_of(folder: Path) -> dict[str, int]:
    """Return the bytes of each file that resuming may read, by path; the pickled arguments are not read."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    return {name: size for name, size in sizes.items() if name not in (COURSE_FILE, TRAINING_ARGS_NAME)}


def describe(folder: Path, course: Mapping) -> None:
    """Write course.json: a checkpoint's contents, the size of each file and the run's course. Call this last."""
    write_json(folder / COURSE_FILE, {"course": course, "files": files_of(folder)})


def start_aside(folder: Path) -> Path:
    """Return a temporary folder for an incomplete checkpoint or model; delete what a killed run left there."""
    aside = folder / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def put_in_place(written: Path, folder: Path) -> None:
    """Flush a complete folder to disk and rename it to its final path; then delete an earlier folder of that path."""
    for path in written.rglob("*"):
        if path.is_file():
            sync(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    replaced = written.with_name(f"{written.name}.replaced")
    if folder.exists():
        folder.rename(replaced)
    written.rename(folder)
    if replaced.exists():
        shutil.rmtree(replaced)


def checkpoints_of(folder: Path) -> list[Path]:
    """Return the folders checkpoint-n of a run, newest first."""
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = [(match, path) for path in folder.glob("*") if (match := pattern.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found, key=lambda pair: int(pair[0][1]), reverse=True)]


def rotate(folder: Path, limit: int | None, *, keep: Container[Path]) -> None:
    """Delete the oldest checkpoints over the limit, damaged ones first, never those to keep; None or 0 keeps all."""
    if not limit:
        return
    found = checkpoints_of(folder)
    others = [path for path in reversed(found) if path not in keep]
    others.sort(key=lambda path: not damage(path))  # stable: each kind stays sorted from the oldest
    for path in others[: max(0, len(found) - limit)]:
        shutil.rmtree(path)


def is_cut(file: Path) -> bool:
    """Return True if the end of a file is missing, for formats that show it."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                return False
        except SafetensorError:
            return True
    if file.suffix == ".json":
        try:
            read_json(file)
        except json.JSONDecodeError:
            return True
    return file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file)


def damage(checkpoint: Path) -> list[str]:
    """Return the reasons why a run cannot resume from a checkpoint; empty for a complete checkpoint.

    Checkpoints of earlier versions have no course.json: their files are opened instead.
    """
    record, sizes = checkpoint / COURSE_FILE, files_of(checkpoint)
    if record.is_file() and is_cut(record):
        return [f"{COURSE_FILE} is cut"]
    if record.is_file():
        wanted = read_json(record)["files"]
        found = [f"{name} is missing" for name in wanted if name not in sizes]
        pairs = [(name, sizes[name], size) for name, size in wanted.items() if name in sizes]
        found += [f"{name} has {has} bytes instead of {size}" for name, has, size in pairs if has != size]
    else:
        found = [f"{name} is cut" for name in sizes if is_cut(checkpoint / name)]
    missing = [name for name, patterns in STATE.items() if not any(any(checkpoint.glob(p)) for p in patterns)]
    known = {message.partition(" ")[0] for message in found}
    return found + [f"{name} is missing" for name in missing if name not in known]


def newest_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run that is complete."""
    return next((path for path in checkpoints_of(folder) if not damage(path)), None)


def report_of(checkpoints: list[Path], folder: Path) -> list[str]:
    """Return a line for each checkpoint that cannot be resumed from, and for each that was being written."""
    found = {path: damage(path) for path in checkpoints}
    lines = [f"{path}: {', '.join(parts[:3])}{' …' * (len(parts) > 3)}" for path, parts in found.items() if parts]
    unfinished = sorted((folder / ASIDE).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    return lines + [f"{folder / path.name}: the run ended while it was being saved" for path in unfinished]


def choose_checkpoint(folder: Path, wanted: bool | str) -> Path:
    """Return the checkpoint to resume from: the named one, or with True the newest complete one in the folder.

    Warn of newer checkpoints that are incomplete.

    Raises:
        ValueError: the named checkpoint is incomplete, or all are; lists what each lacks.
    """
    if wanted is not True:
        found = damage(Path(wanted))
        if found:
            whole = newest_whole(Path(wanted).parent)
            remedy = f"resume from {whole}" if whole else "take another checkpoint"
            raise UsageError(f"{wanted} cannot be resumed from: {', '.join(found)}. Instead {remedy}.")
        return Path(wanted)
    chosen, found = newest_whole(folder), checkpoints_of(folder)
    newer = found if chosen is None else found[: found.index(chosen)]
    lines = report_of(newer, folder)
    if chosen is None:
        message = "\n  - ".join([f"{folder} holds no checkpoint to resume from", *lines])
        raise UsageError(f"{message}\nStart anew with --overwrite true, which deletes what is there.")
    for line in lines:
        logger.warning("not resumed from: %s", line)
    return chosen
