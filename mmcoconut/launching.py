"""What the commands of `mmcoconut` run: the mains of the modules, with a model or recipe in front of the options.

`mmcoconut eval outputs/quickstart --split test` is `python -m mmcoconut.evaluation --model outputs/quickstart --split
test`. Modules are imported when their command runs, as some need optional packages.
"""

import importlib
import importlib.util
import os

import torch
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser

from mmcoconut.arguments.recipe_files import read_overrides, read_recipe_file
from mmcoconut.arguments.recipes import parse_recipe
from mmcoconut.errors import UsageError


SCRIPT = "train_hf"
CONVERTERS = {"coconut": "mmcoconut.convert_coconut", "vlm": "mmcoconut.convert_vlm"}
# What `accelerate launch` is told where `accelerate config` has not been run.
ONE_MACHINE = ("--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no")


def main_of(module: str):
    """Return `main` of a module, imported now."""
    return importlib.import_module(module).main


def with_model(words: list[str]) -> list[str]:
    """Return a first word that is no option is the model.

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
        raise UsageError(f"mmcoconut convert {kind}: say what to convert, {' or '.join(CONVERTERS)}.")
    main_of(CONVERTERS[kind])(rest)


def compare(words: list[str]) -> None:
    """Run `mmcoconut compare RECIPE A,B,...`: a training run with the key `compare`.

    Raises:
        UsageError: neither the command nor the recipe says what is compared.
    """
    if not {"-h", "--help"} & {*words} and words:
        recipe, *rest = words
        if rest and not rest[0].startswith("-"):
            words = [recipe, "--compare", *rest]
        elif not compares(words):
            raise UsageError(f"Say what to compare: mmcoconut compare {recipe} cot,no_cot,coconut")
    main_of(SCRIPT)(words)


def compares(words: list[str]) -> bool:
    """Return True if a recipe or the words after it ask for a comparison."""
    recipe, *rest = words
    return "compare" in {**read_recipe_file(recipe).values, **read_overrides(rest, [])}


def launch_words(words: list[str], *, num_gpus: int, is_configured: bool) -> list[str]:
    """Return the words of `accelerate launch` that train on the GPUs of this machine.

    Args:
        words: recipe and options.
        num_gpus: of this machine, as CUDA_VISIBLE_DEVICES leaves them.
        is_configured: `accelerate config` has been run, and decides in place of these.
    """
    script = importlib.util.find_spec(SCRIPT).origin
    devices = [] if is_configured else ["--multi_gpu", "--num_processes", str(num_gpus), *ONE_MACHINE]
    return [*devices, script, *words]


def launch(words: list[str]) -> None:
    """Train in a process for each GPU, by accelerate's launcher, which then adds no traceback of its own.

    Raises:
        SystemExit: with the status of the first process that failed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(words))
    except ChildFailedError as error:
        raise SystemExit(abs(error.get_first_failure()[1].exitcode) or 1) from None
    except SignalException as error:
        raise KeyboardInterrupt from error


def train(words: list[str]) -> None:
    """Run `mmcoconut train RECIPE`: in this process, or in one for each of several GPUs.

    A process that a launcher started, and a comparison, which launches its runs itself, stay as they are.
    """
    num_gpus = torch.cuda.device_count()
    asks_help = not words or {"-h", "--help"} & {*words}
    if asks_help or num_gpus < 2 or "LOCAL_RANK" in os.environ or compares(words):
        main_of(SCRIPT)(words)
        return
    parse_recipe(words)  # what is wrong with the recipe is said once, not by every process
    launch(launch_words(words, num_gpus=num_gpus, is_configured=os.path.isfile(default_config_file)))
