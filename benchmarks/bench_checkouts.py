"""A training step of this checkout against one of another checkout: time and memory, both with default settings.

    git worktree add ../before d2dc1bd
    python benchmarks/bench_checkouts.py ../before [--prompts 64 256 --latents 0 8 16 --repeats 7]

Each checkout has a process of its own, which builds GPT-2 small with random weights by that checkout's
`measuring.thinking_gpt2`. The processes take turns, a step each, and every turn gives a ratio. The median of the
ratios is what counts, and beside it the quartiles. `cpu_ratio` is that of the CPU seconds, which other processes on
the machine disturb less. Each row of a batch is a prompt, n latents and 32 answer tokens with labels on the answer.
`kept_mb` is what a forward pass leaves allocated, and `mb_per_latent` its growth from the first number of latents on.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


HERE = Path(__file__).resolve().parent.parent
NUM_ANSWER = 32
SIDES = ("here", "there")


def batch_of(model, *, batch: int, prompt: int, num_latents: int) -> dict:
    import torch

    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 250, (batch, prompt + num_latents + NUM_ANSWER), generator=generator)
    input_ids[:, prompt : prompt + num_latents] = model.config.latent_token_id
    labels = input_ids.clone()
    labels[:, : prompt + num_latents] = -100
    return {"input_ids": input_ids, "labels": labels}


def kept_megabytes(model, inputs: dict) -> float:
    """Return what a forward pass allocates and has not freed when it returns its loss."""
    import torch

    with torch.profiler.profile(profile_memory=True) as profile:
        loss = model(**inputs).loss
    assert loss.requires_grad  # and with it the graph, until here
    return sum(event.self_cpu_memory_usage for event in profile.events()) / 1e6


def work(root: Path, arguments) -> None:
    """Answer each line of standard input, a shape, with the seconds of a step of the checkout in root."""
    sys.path[:0] = [str(root), str(root / "benchmarks")]
    import torch
    from measuring import thinking_gpt2

    torch.set_num_threads(arguments.threads)
    model = thinking_gpt2(arguments, num_positions=max(arguments.prompts) + 64 + max(arguments.latents)).train()
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        task = json.loads(line)
        inputs = batch_of(model, **task["shape"])
        if task["what"] == "kept":
            answer = kept_megabytes(model, inputs)
        else:
            began = time.perf_counter(), time.process_time()
            model(**inputs).loss.backward()
            answer = [time.perf_counter() - began[0], time.process_time() - began[1]]
            model.zero_grad(set_to_none=True)
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A process that runs the steps of one checkout."""

    def __init__(self, root: Path):
        command = [sys.executable, __file__, *sys.argv[1:], "--work_on", str(root)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __call__(self, what: str, shape: dict):
        print(json.dumps({"what": what, "shape": shape}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended: run it by itself to see why.")
        return json.loads(line)


def measure(workers: dict, shape: dict, repeats: int) -> dict:
    """Return medians over turns in which each side makes one step, after one turn that does not count."""
    turns = []
    for turn in range(repeats + 1):
        order = SIDES if turn % 2 else SIDES[::-1]
        taken = {side: workers[side]("step", shape) for side in order}
        turns.append([taken[side] for side in SIDES])
    turns = turns[1:]
    ratios, cpu_ratios = (sorted(here[i] / there[i] for here, there in turns) for i in range(2))
    kept = {f"kept_mb_{side}": round(workers[side]("kept", shape), 1) for side in SIDES}
    return {
        "prompt": shape["prompt"],
        "latents": shape["num_latents"],
        "seconds_there": round(statistics.median(there[0] for _, there in turns), 2),
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": " to ".join(f"{ratios[round(share * (len(ratios) - 1))]:.2f}" for share in (0.25, 0.75)),
        "cpu_ratio": round(statistics.median(cpu_ratios), 3),
        **kept,
    }


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("against", type=Path, help="folder of the other checkout")
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--hidden_size", type=int, default=768, help="a multiple of 64, the size of a head")
    parser.add_argument("--vocab_size", type=int, default=50257)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--latents", type=int, nargs="+", default=[0, 8, 16])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work_on", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    if arguments.work_on is not None:
        return work(arguments.work_on, arguments)
    workers = {"here": Worker(HERE), "there": Worker(arguments.against.resolve())}
    columns = None
    for prompt in arguments.prompts:
        first = None
        for num_latents in arguments.latents:
            shape = {"batch": arguments.batch, "prompt": prompt, "num_latents": num_latents}
            row = measure(workers, shape, arguments.repeats)
            first = first or row
            for side in SIDES:
                grown, further = row[f"kept_mb_{side}"] - first[f"kept_mb_{side}"], num_latents - first["latents"]
                row[f"mb_per_latent_{side}"] = round(grown / further, 2) if further else ""
            if columns is None:
                columns = [*row]
                print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
            print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
    for worker in workers.values():
        worker.process.stdin.close()
        worker.process.wait()


if __name__ == "__main__":
    main()
