"""The runs of a comparison: a mode and a seed each, trained and evaluated one after the other, in own processes.

A run is finished when its results.json and its evaluation.json are there. What is finished is never repeated; what has
a checkpoint goes on from it.
"""

import copy
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from mmcoconut.arguments.fields import compared_modes, default_of
from mmcoconut.arguments.recipes import recipe_text
from mmcoconut.records import RECIPE_FILE, RESULTS_FILE
from mmcoconut.training.checkpoints import newest_whole


# One process each, whatever `accelerate config` says of this machine.
LAUNCH = ("-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", "--num_machines", "1")
LAUNCH += ("--gpu_ids", "all", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no")
LOG_LINES = 8


class ComparisonError(RuntimeError):
    """Runs that failed, with the end of what each printed."""


@dataclass(frozen=True)
class Run:
    """One mode with one seed: its folder, and the recipe that makes it."""

    mode: str
    seed: int
    folder: Path
    recipe: str

    def __str__(self) -> str:
        return f"{self.mode} seed {self.seed}"

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
    def checkpoint(self) -> Path | None:
        """The newest checkpoint that training can go on from exactly."""
        return newest_whole(self.folder)


def plan_runs(model_args, data_args, curriculum_args, run_args) -> list[Run]:
    """Every mode with every seed, one seed after the other; the runs differ in mode, seed and folder."""
    runs = []
    for seed in range(run_args.seed, run_args.seed + run_args.seeds):
        for mode in compared_modes(run_args.compare):
            name = f"{mode}-seed{seed}"
            own = copy.copy(run_args)  # not dataclasses.replace, which would set up the device again
            own.seed, own.output_dir = seed, str(Path(run_args.output_dir, name))
            own.run_name = "-".join(filter(None, [run_args.run_name, name]))
            own.disable_tqdm, own.smoke_test = True, False
            recipe = recipe_text(model_args, data_args, replace(curriculum_args, mode=mode), own)
            runs.append(Run(mode, seed, Path(own.output_dir), recipe))
    return runs


def evaluation_options(data_args, run_args) -> list[str]:
    """Return what `mmcoconut.evaluation` is told of the recipe beside the recipe itself."""
    options = {
        "split": data_args.test_split or data_args.eval_split,
        "max_samples": data_args.max_eval_samples,
        "batch_size": run_args.per_device_eval_batch_size,
    }
    return [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]


def differences(run: Run) -> list[str]:
    """The keys in which the recipe of an earlier run in this folder differs, with both values."""
    file = run.folder / RECIPE_FILE
    earlier = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    wanted = yaml.safe_load(run.recipe)
    keys = [key for key in wanted | earlier if earlier.get(key, default_of(key)) != wanted.get(key, default_of(key))]
    return [f"{key}: {earlier.get(key, 'not set')!r} there, {wanted.get(key, 'not set')!r} now" for key in keys]


def check_folders(runs: list[Run]) -> None:
    """Refuse to mix runs of two recipes in one table; what has not reached a checkpoint may go.

    Raises:
        ValueError: names the differing keys, both values and the runs.
    """
    folder = runs[0].folder.parent
    if (folder / RECIPE_FILE).exists():
        raise ValueError(f"{folder} is the folder of a single run: give a comparison another --output_dir.")
    found = {}
    for run in runs:
        for difference in differences(run) if run.is_trained or run.checkpoint else ():
            found.setdefault(difference, []).append(run.folder.name)
    if found:
        lines = [f"{difference} ({', '.join(names)})" for difference, names in found.items()]
        raise ValueError(
            "\n  - ".join([f"{folder} holds runs of another recipe:", *lines])
            + "\nGive --overwrite true to delete and repeat them, or another --output_dir."
        )


def clear(runs: list[Run]) -> None:
    """Delete earlier runs, and nothing that is no run."""
    for run in runs:
        if (run.folder / RECIPE_FILE).exists():
            shutil.rmtree(run.folder)
        run.log.unlink(missing_ok=True)


def device_of_runs(device) -> str:
    """The one device of every run, as CUDA_VISIBLE_DEVICES names it: the first CUDA device, elsewhere none."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if device.type == "cuda" else ""


@contextmanager
def terminated_as_interrupted():
    """SIGTERM, and SIGHUP unless it is ignored as under nohup, end the comparison the way Ctrl-C does."""
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


class Runner:
    """Takes runs through training and evaluation, one after the other, each in processes of its own.

    Args:
        script: path of train_hf.py.
        options: of the evaluations.
        device: CUDA_VISIBLE_DEVICES of the runs.
    """

    def __init__(self, script: str, *, options: list[str], device: str):
        self.script, self.options, self.device = script, options, device
        self.threads = str(torch.get_num_threads())
        self.num_done = self.num_runs = 0

    def train_command(self, run: Run) -> list[str]:
        checkpoint = run.checkpoint
        start = ["--overwrite", "true"] if checkpoint is None else ["--resume_from_checkpoint", str(checkpoint)]
        threads = ["--num_cpu_threads_per_process", self.threads]
        return [sys.executable, *LAUNCH, *threads, self.script, str(run.recipe_file), *start]

    def evaluation_command(self, run: Run) -> list[str]:
        command = [sys.executable, "-m", "mmcoconut.evaluation", "--model", str(run.folder)]
        command += ["--recipe", str(run.folder / RECIPE_FILE), "--output_dir", str(run.evaluation)]
        return [*command, *self.options]

    def environment(self) -> dict[str, str]:
        """This process's own, with the runs' device and threads, and the package that is running now."""
        paths = [str(Path(self.script).parent), os.environ.get("PYTHONPATH")]
        values = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": self.threads}
        return os.environ | values | {"CUDA_VISIBLE_DEVICES": self.device}

    def call(self, command: list[str], run: Run) -> None:
        """Run a command to its end, its words in the run's log.

        Raises:
            CalledProcessError: it failed. Whatever else ends the call, such as Ctrl-C, ends the command too.
        """
        with run.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            # A session of its own, so that a signal reaches the launcher's children too.
            options = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
            process = subprocess.Popen(command, env=self.environment(), **options)
            try:
                status = process.wait()
            except BaseException:
                with suppress(ProcessLookupError):  # it ended at this moment
                    os.killpg(process.pid, signal.SIGTERM)
                process.wait()
                raise
        if status != 0:
            raise subprocess.CalledProcessError(status, command)

    def say(self, run: Run, what: str) -> None:
        """A line for a run whose state changed, with the number of runs that are done."""
        print(f"{run}: {what} ({self.num_done} of {self.num_runs} runs done)", flush=True)

    def finish(self, run: Run) -> None:
        """Train and evaluate a run where that is not done yet."""
        if not run.is_trained:
            self.say(run, "training …" if run.checkpoint is None else f"training on from {run.checkpoint.name} …")
            shutil.rmtree(run.evaluation, ignore_errors=True)  # it belongs to the weights that are replaced now
            run.recipe_file.write_text(run.recipe, encoding="utf-8")
            self.call(self.train_command(run), run)
        self.say(run, "evaluating …")
        self.call(self.evaluation_command(run), run)
        self.num_done += 1
        self.say(run, "done")

    def finish_all(self, runs: list[Run]) -> dict[Run, int]:
        """Finish every run; those that failed, with their exit status. Ctrl-C ends the run that is going on."""
        waiting = [run for run in runs if not run.is_evaluated]
        self.num_runs, self.num_done = len(runs), len(runs) - len(waiting)
        failed = {}
        with terminated_as_interrupted():
            for run in waiting:
                try:
                    self.finish(run)
                except subprocess.CalledProcessError as error:
                    failed[run] = error.returncode
                    self.say(run, f"failed, see {run.log}")
        return failed


def check_finished(failed: dict[Run, int], num_runs: int) -> None:
    """Name the runs that failed, and show how the log of each ends."""
    if not failed:
        return
    message = [f"{len(failed)} of {num_runs} runs failed. The same command repeats only these; the others are kept."]
    for run, status in failed.items():
        lines = run.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        message += [f"{run} ended with status {status}; {run.log} ends with", *(f"    {line}" for line in lines)]
    raise ComparisonError("\n".join(message))
