"""What the benchmarks share: language models that think, turns of which the fastest counts, files of results."""

import argparse
import csv
import json
import math
import platform
import shlex
import sys
import time
from datetime import date
from pathlib import Path

import torch
import transformers
from tables import read_rows
from transformers import CLIPVisionConfig, GPT2Config
from transformers.configuration_utils import PreTrainedConfig

from mmcoconut.build import from_backbones
from mmcoconut.data.tokenizer import train_tokenizer
from mmcoconut.kernels import choose_attention
from mmcoconut.modeling_mmcoconut import MMCoconutForConditionalGeneration
from mmcoconut.training.deferred import defer_weight_gradients


RESULTS = Path(__file__).resolve().with_name("results")
DRY_RUN = "tiny sizes on a CPU: no measurement"
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where results go and what they are called."""
    parser.add_argument("--machine", default="laptop-2c", help="name of the machine, in the file of the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--dry_run", action="store_true", help="mark every row as no measurement; needs --results")


def thinking_model(text_config: PreTrainedConfig) -> MMCoconutForConditionalGeneration:
    """Return a language model of this configuration with random weights, and the smallest of vision towers.

    Attention and weight gradients are those that train_hf chooses by default.
    """
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a b"], vocab_size=300)
    tokenizer.add_tokens([f"<filler {number}>" for number in range(text_config.vocab_size - len(tokenizer) - 5)])
    vision_config = CLIPVisionConfig(**VISION, image_size=8, patch_size=8)
    model = from_backbones(vision_config=vision_config, text_config=text_config, tokenizer=tokenizer)
    choose_attention(model)
    defer_weight_gradients(model)
    return model


def thinking_gpt2(arguments, *, num_positions: int) -> MMCoconutForConditionalGeneration:
    """Return a GPT-2 of `num_layers`, `hidden_size` and `vocab_size`, with heads of 64 and no dropout."""
    text_config = GPT2Config(
        vocab_size=arguments.vocab_size,
        n_embd=arguments.hidden_size,
        n_layer=arguments.num_layers,
        n_head=arguments.hidden_size // 64,
        n_positions=num_positions,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return thinking_model(text_config)


def seconds_of(call, device: str) -> float:
    if device == "cpu":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3


def fastest(calls: dict, *, repeats: int, device: str) -> dict:
    """Return seconds of the fastest repeat of every call; they take turns, and the first round does not count.

    A call that runs out of the GPU's memory gets infinity, and no further turn.
    """
    seconds = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            if math.inf in seconds[name]:
                continue
            try:
                seconds[name].append(seconds_of(call, device))
            except torch.OutOfMemoryError:
                seconds[name].append(math.inf)
                torch.cuda.empty_cache()
                print(f"{name}: out of memory", flush=True)
    return {name: math.inf if math.inf in taken else min(taken[1:]) for name, taken in seconds.items()}


def write_results(rows: list[dict], arguments, /, *, replaces: str | None = None, **made_with) -> Path:
    """A CSV of this script's and this machine's names, with what the figures were made with in every row.

    Args:
        arguments: with `gpu` and what `add_output_options` adds.
        replaces: a column of whole numbers or names; rows of the file whose value is not among the new ones stay.
    """
    script = Path(sys.argv[0]).stem
    if arguments.dry_run and arguments.results.resolve() == RESULTS:
        raise SystemExit("--dry_run: its figures are no measurements; give it a folder of its own by --results.")
    file = arguments.results / f"{script}_{'dry-run' if arguments.dry_run else arguments.machine}.csv"
    made_with |= {
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if arguments.gpu else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{script}.py", *sys.argv[1:]]),
    }
    rows = [({"dry_run": DRY_RUN} if arguments.dry_run else {}) | row | made_with for row in rows]
    if replaces is not None and file.exists():
        measured = {str(row[replaces]) for row in rows}
        rows += [row for row in read_rows(file) if row[replaces] not in measured]
        rows.sort(key=lambda row: (len(str(row[replaces])), str(row[replaces])))  # numbers by their size
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=[*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    return file


def history_of(run: Path) -> list[dict]:
    """Return the log of a training run, out of its newest checkpoint."""
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((newest / "trainer_state.json").read_text())["log_history"]
