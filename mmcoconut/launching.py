"""Run the commands of `mmcoconut`: the mains of the modules, with a model or recipe before the options.

`mmcoconut eval outputs/quickstart --split test` is `python -m mmcoconut.evaluation --model outputs/quickstart --split
test`. Modules are imported when their command runs, because some need optional packages.
"""

import importlib
import importlib.util
import os
import subprocess

import torch
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser

from mmcoconut.arguments.recipe_files import read_overrides, read_recipe_file
from mmcoconut.arguments.recipes import check_recipe
from mmcoconut.errors import UsageError


SCRIPT = "train_hf"
CONVERTERS = {"coconut": "mmcoconut.convert_coconut", "vlm": "mmcoconut.convert_vlm"}
# Options of `accelerate launch` if `accelerate config` has not been run.
ONE_MACHINE = ("--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no")


def main_of(module: str):
    """Import a module and return its `main`."""
    return importlib.import_module(module).main


def with_model(words: list[str]) -> list[str]:
    """Return the words with `--model` before a first word that is not an option.

    >>> with_model(["outputs/run", "--split", "test"])
    ['--model', 'outputs/run', '--split', 'test']
    """
    return ["--model", *words] if words and not words[0].startswith("-") else words


def evaluate(words: list[str]) -> None:
    """Run `mmcoconut eval MODEL`."""
    main_of("mmcoconut.evaluation.evaluate")(with_model(words))


def audit(words: list[str]) -> None:
    """Run `mmcoconut audit MODEL`."""
    main_of("mmcoconut.audit.command")(with_model(words))


def demo(words: list[str]) -> None:
    """Run `mmcoconut demo MODEL`."""
    main_of("mmcoconut.demo.page")(with_model(words))


def publish(words: list[str]) -> None:
    """Run `mmcoconut publish MODEL`."""
    main_of("mmcoconut.publish")(with_model(words))


def convert(words: list[str]) -> None:
    """Run `mmcoconut convert coconut|vlm`, with the options of the converter.

    Raises:
        UsageError: another word.
    """
    kind, *rest = words or [""]
    if kind in ("-h", "--help"):
        print("usage: mmcoconut convert coconut|vlm ...\n")
        print("  coconut  a checkpoint of the original Coconut code; options: mmcoconut convert coconut --help")
        print("  vlm      InternVL or LLaVA with thoughts, to their own class or back: mmcoconut convert vlm --help")
        return
    if kind not in CONVERTERS:
        raise UsageError(f"mmcoconut convert {kind}: unknown kind. Choose {' or '.join(CONVERTERS)}.")
    main_of(CONVERTERS[kind])(rest)


def compare(words: list[str]) -> None:
    """Run `mmcoconut compare RECIPE A,B,...`: a training run with the key `compare`.

    Raises:
        UsageError: neither the command nor the recipe names variants.
    """
    if not {"-h", "--help"} & {*words} and words:
        recipe, *rest = words
        if rest and not rest[0].startswith("-"):
            words = [recipe, "--compare", *rest]
        elif not compares(words):
            raise UsageError(f"Nothing to compare. Name the variants: mmcoconut compare {recipe} cot,no_cot,coconut")
    main_of(SCRIPT)(words)


def compares(words: list[str]) -> bool:
    """Return True if a recipe or the words after it request a comparison."""
    recipe, *rest = words
    return "compare" in {**read_recipe_file(recipe).values, **read_overrides(rest, [])}


def launch_words(words: list[str], *, num_gpus: int, is_configured: bool) -> list[str]:
    """Return the words of `accelerate launch` to train on the GPUs of this machine.

    Args:
        words: recipe and options.
        num_gpus: GPUs of this machine that CUDA_VISIBLE_DEVICES allows.
        is_configured: True if `accelerate config` has been run; it then decides.
    """
    script = importlib.util.find_spec(SCRIPT).origin
    devices = [] if is_configured else ["--multi_gpu", "--num_processes", str(num_gpus), *ONE_MACHINE]
    return [*devices, script, *words]


def launch(words: list[str]) -> None:
    """Train in one process per GPU with accelerate's launcher, without an additional traceback of the launcher.

    Raises:
        SystemExit: with the status of the first failed process.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(words))
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        raise SystemExit((128 - status if status < 0 else status) or 1) from None  # as a shell, after a signal
    except subprocess.CalledProcessError as error:  # of a configuration with one process
        raise SystemExit(error.returncode) from None
    except SignalException as error:
        raise KeyboardInterrupt from error


def train(words: list[str]) -> None:
    """Run `mmcoconut train RECIPE` in this process, or in one process per GPU.

    Processes started by a launcher, and comparisons, which launch their own runs, stay in this process.
    """
    num_gpus = torch.cuda.device_count()
    asks_help = not words or {"-h", "--help"} & {*words}
    if asks_help or num_gpus < 2 or "LOCAL_RANK" in os.environ or compares(words):
        main_of(SCRIPT)(words)
        return
    check_recipe(words)  # reports problems of the recipe once, not in every process, and sets up no device
    launch(launch_words(words, num_gpus=num_gpus, is_configured=os.path.isfile(default_config_file)))
