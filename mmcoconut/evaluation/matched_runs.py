"""The runs of a comparison, one per variant and seed: trained, evaluated and audited in separate processes.

A run is finished when its results.json and evaluation.json exist and, if its thoughts are audited, its audit.json.
Finished steps are never repeated; training resumes from a checkpoint. Audits come last, because an audit compares
a run with its controls.
"""

import copy
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TextIO

import torch
import yaml

from mmcoconut.arguments.fields import default_of
from mmcoconut.arguments.recipes import recipe_text
from mmcoconut.arguments.variants import Variant, known_objectives, variants_of
from mmcoconut.errors import UsageError
from mmcoconut.progress import Pace
from mmcoconut.records import RECIPE_FILE, RESULTS_FILE, read_json
from mmcoconut.training.checkpoints import newest_whole


# One process each, whatever `accelerate config` says on this machine.
LAUNCH = ("-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", "--num_machines", "1")
LAUNCH += ("--gpu_ids", "all", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no")
LOG_LINES = 8
AUDITED_ROWS = 300
CONTROLS = ("pause", "markers")  # modes that an audit compares with a run of the same seed


class ComparisonError(RuntimeError):
    """Runs failed; the message holds the end of each log."""


@dataclass(frozen=True)
class Run:
    """One variant with one seed: its folder and its recipe."""

    variant: Variant
    seed: int
    folder: Path
    recipe: str

    def __str__(self) -> str:
        return f"{self.variant.name} seed {self.seed}"

    @property
    def recipe_file(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.yaml")

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation"

    @property
    def is_trained(self) -> bool:
        return (self.folder / RESULTS_FILE).exists()

    @property
    def is_evaluated(self) -> bool:
        return self.is_trained and (self.evaluation / "evaluation.json").exists()

    @property
    def audit(self) -> Path:
        return self.folder / "audit"

    @cached_property
    def has_thoughts(self) -> bool:
        """True if an audit can replace thoughts: they are fed back, before a single answer."""
        values = yaml.safe_load(self.recipe)
        return values["mode"] == "coconut" and not values.get("thoughts_per_turn")

    @property
    def is_audited(self) -> bool:
        """True if there is an audit, or none is possible because training ended before the first thought."""
        if not self.has_thoughts or (self.audit / "audit.json").exists():
            return True
        return self.is_trained and read_json(self.folder / "processor_config.json").get("num_latents", 0) == 0

    @property
    def is_finished(self) -> bool:
        return self.is_evaluated and self.is_audited

    @cached_property
    def is_control(self) -> bool:
        return yaml.safe_load(self.recipe)["mode"] in CONTROLS

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint that training can resume from exactly."""
        return newest_whole(self.folder)


def with_fields(part, values: dict):
    """Return a copy of a dataclass with those values that are among its fields."""
    return replace(part, **{each.name: values[each.name] for each in fields(part) if each.name in values})


def plan_runs(model_args, data_args, curriculum_args, run_args) -> list[Run]:
    """Return every variant with every seed, seed by seed; the runs differ in these and in their folder."""
    runs = []
    given = {**vars(model_args), **vars(curriculum_args)}
    for seed in range(run_args.seed, run_args.seed + run_args.seeds):
        for variant in variants_of(run_args.compare, known_objectives()):
            name = f"{variant.name}-seed{seed}"
            model, curriculum = (with_fields(part, variant.settings(given)) for part in (model_args, curriculum_args))
            own = copy.copy(run_args)  # not dataclasses.replace, which would set up the device again
            own.seed, own.output_dir = seed, str(Path(run_args.output_dir, name))
            own.run_name = "-".join(filter(None, [run_args.run_name, name]))
            own.disable_tqdm, own.smoke_test = True, False
            recipe = recipe_text(model, data_args, curriculum, own)
            runs.append(Run(variant, seed, Path(own.output_dir), recipe))
    return runs


def evaluation_options(data_args, run_args) -> list[str]:
    """Return the options of `mmcoconut.evaluation` for a recipe, other than the recipe itself."""
    options = {
        "split": data_args.test_split or data_args.eval_split,
        "max_samples": data_args.max_eval_samples,
        "batch_size": run_args.per_device_eval_batch_size,
    }
    return [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]


def without(options: list[str], key: str) -> list[str]:
    """Return the words of a command line, pairs of key and value, without those of a key."""
    pairs = zip(options[::2], options[1::2])
    return [word for pair in pairs if pair[0] != key for word in pair]


def differences(run: Run) -> list[str]:
    """Return the keys in which the recipe of an earlier run in this folder differs, with both values."""
    file = run.folder / RECIPE_FILE
    earlier = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    wanted = yaml.safe_load(run.recipe)
    keys = [key for key in wanted | earlier if earlier.get(key, default_of(key)) != wanted.get(key, default_of(key))]
    return [f"{key}: {earlier.get(key, 'not set')!r} there, {wanted.get(key, 'not set')!r} now" for key in keys]


def check_folders(runs: list[Run]) -> None:
    """Refuse to mix runs of two recipes in one table; runs without a checkpoint may be replaced.

    Raises:
        ValueError: names the differing keys, both values and the runs.
    """
    folder = runs[0].folder.parent
    if (folder / RECIPE_FILE).exists():
        raise UsageError(f"{folder} is the folder of a single run. Set another --output_dir for the comparison.")
    found = {}
    for run in runs:
        for difference in differences(run) if run.is_trained or run.checkpoint else ():
            found.setdefault(difference, []).append(run.folder.name)
    if found:
        lines = [f"{difference} ({', '.join(names)})" for difference, names in found.items()]
        raise UsageError(
            "\n  - ".join([f"{folder} holds runs of another recipe:", *lines])
            + "\nSet --overwrite true to delete and repeat them, or another --output_dir."
        )


def clear(runs: list[Run]) -> None:
    """Delete earlier runs, and nothing else."""
    for run in runs:
        if (run.folder / RECIPE_FILE).exists():
            shutil.rmtree(run.folder)
        run.log.unlink(missing_ok=True)


def device_of_runs(device) -> str:
    """Return the device of all runs for CUDA_VISIBLE_DEVICES: the first CUDA device, or none."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if device.type == "cuda" else ""


@contextmanager
def terminated_as_interrupted():
    """Make SIGTERM, and SIGHUP unless ignored as under nohup, end the comparison like Ctrl-C."""
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


class Runner:
    """Run training, evaluation and audit of runs, `jobs` of them at a time, each in separate processes.

    Args:
        script: path of train_hf.py.
        options: options of the evaluations.
        device: CUDA_VISIBLE_DEVICES of the runs.
        jobs: runs at a time; they share the threads of this process.
    """

    def __init__(self, script: str, *, options: list[str], device: str, jobs: int = 1):
        self.script, self.options, self.device, self.jobs = script, options, device, jobs
        self.threads = str(max(1, torch.get_num_threads() // jobs))
        self.runs, self.num_done, self.pace = [], 0, Pace(0)
        self.lock, self.processes, self.is_ended = Lock(), set(), False

    def train_command(self, run: Run) -> list[str]:
        checkpoint = run.checkpoint
        start = ["--overwrite", "true"] if checkpoint is None else ["--resume_from_checkpoint", str(checkpoint)]
        threads = ["--num_cpu_threads_per_process", self.threads]
        return [sys.executable, *LAUNCH, *threads, self.script, str(run.recipe_file), *start]

    def evaluation_command(self, run: Run) -> list[str]:
        command = [sys.executable, "-m", "mmcoconut.evaluation", "--model", str(run.folder)]
        command += ["--recipe", str(run.folder / RECIPE_FILE), "--output_dir", str(run.evaluation)]
        return [*command, *self.options]

    def audit_command(self, run: Run) -> list[str]:
        """Return the command of an audit with the rows and interventions that the table needs."""
        command = [sys.executable, "-m", "mmcoconut.audit", "--model", str(run.folder), "--output_dir", str(run.audit)]
        command += ["--parts", "verdict,necessity,positions,probe", "--overwrite", "true"]
        if any(other.is_control and other.is_evaluated and other.seed == run.seed for other in self.runs):
            command += ["--controls", str(run.folder.parent)]
        return [*command, *without(self.options, "--max_samples"), "--max_samples", str(AUDITED_ROWS)]

    def environment(self) -> dict[str, str]:
        """Return this process's environment with the runs' device and threads, and the running package."""
        paths = [str(Path(self.script).parent), os.environ.get("PYTHONPATH")]
        values = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": self.threads}
        return os.environ | values | {"CUDA_VISIBLE_DEVICES": self.device}

    def start(self, command: list[str], log: TextIO) -> subprocess.Popen:
        """Start a command and log its words.

        Raises:
            CancelledError: all commands were ended.
        """
        with self.lock:
            if self.is_ended:
                raise CancelledError
            # A separate session, so that a signal reaches the launcher's children too.
            options = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
            process = subprocess.Popen(command, env=self.environment(), **options)
            self.processes.add(process)
        return process

    def call(self, command: list[str], run: Run) -> None:
        """Run a command to its end and log its words.

        Raises:
            CalledProcessError: the command failed.
        """
        with run.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            process = self.start(command, log)
            status = process.wait()
        with self.lock:
            self.processes.discard(process)
        if status != 0:
            raise subprocess.CalledProcessError(status, command)

    def end(self) -> None:
        """End every running command with its children, and prevent new ones."""
        with self.lock:
            self.is_ended = True
            for process in self.processes:
                with suppress(ProcessLookupError):  # it ended in the meantime
                    os.killpg(process.pid, signal.SIGTERM)

    def say(self, run: Run, what: str) -> None:
        """Print a line for a run whose state changed, with the number of finished runs."""
        print(f"{run}: {what} ({self.num_done} of {len(self.runs)} runs done)\n", end="", flush=True)

    def say_time_left(self, unit: str) -> None:
        """Print how much time is left, if any is."""
        if (text := self.pace.text(unit)) is not None:
            print(f"{text}\n", end="", flush=True)

    def train_and_evaluate(self, run: Run) -> None:
        """Train and evaluate, unless already done."""
        if not run.is_trained:
            self.say(run, "training …" if run.checkpoint is None else f"resuming from {run.checkpoint.name} …")
            for folder in (run.evaluation, run.audit):  # they belong to the weights that are about to be replaced
                shutil.rmtree(folder, ignore_errors=True)
            run.recipe_file.write_text(run.recipe, encoding="utf-8")
            self.call(self.train_command(run), run)
        if not run.is_evaluated:
            self.say(run, "evaluating …")
            self.call(self.evaluation_command(run), run)

    def audit(self, run: Run) -> None:
        self.say(run, "auditing …")
        self.call(self.audit_command(run), run)

    def attempt(self, step: Callable[[Run], None], run: Run, unit: str) -> int:
        """Run a step of a run; return the exit status of a failed command, or 0."""
        began = time.monotonic()
        try:
            step(run)
            with self.lock:
                self.pace.add(time.monotonic() - began)
                self.num_done += run.is_audited
            if run.is_audited:
                self.say(run, "done")
            self.say_time_left(unit)
        except subprocess.CalledProcessError as error:
            with self.lock:
                self.pace.leave_out()
            if not self.is_ended:
                self.say(run, f"failed, see {run.log}")
            return error.returncode
        return 0

    def finish_all(self, runs: list[Run]) -> dict[Run, int]:
        """Finish every run; return the exit status of failed runs. Ctrl-C ends the runs in progress."""
        self.runs, self.num_done = runs, sum(run.is_finished for run in runs)
        unfinished = [run for run in runs if not run.is_evaluated]
        failed = self.each(self.train_and_evaluate, unfinished, "runs trained and evaluated")
        without_controls = {run.seed for run in failed if run.is_control}  # which the same command repeats
        audits = [run for run in runs if run.is_evaluated and not run.is_audited and run.seed not in without_controls]
        return failed | self.each(self.audit, audits, "runs audited")

    def each(self, step: Callable[[Run], None], runs: list[Run], unit: str) -> dict[Run, int]:
        """Run a step for every run, `jobs` at a time; return the exit status of failed runs.

        Args:
            unit: what the runs are after this step, for the line about the remaining time.
        """
        self.pace = Pace(len(runs), self.jobs)
        with terminated_as_interrupted(), ThreadPoolExecutor(self.jobs) as pool:
            try:
                started = {run: pool.submit(self.attempt, step, run, unit) for run in runs}
                return {run: status for run, future in started.items() if (status := future.result()) != 0}
            except BaseException:
                self.end()
                pool.shutdown(cancel_futures=True)
                raise


def check_finished(failed: dict[Run, int], num_runs: int) -> None:
    """Raise ComparisonError with the failed runs and the end of each log."""
    if not failed:
        return
    message = [f"{len(failed)} of {num_runs} runs failed. The same command repeats only these; the others are kept."]
    for run, status in failed.items():
        lines = run.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        message += [f"{run} ended with status {status}; {run.log} ends with", *(f"    {line}" for line in lines)]
    raise ComparisonError("\n".join(message))
