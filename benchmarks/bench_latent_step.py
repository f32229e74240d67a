"""What thoughts cost in a training step: ours, and the textbook loop, against a plain causal LM of equal length.

    python benchmarks/bench_latent_step.py [--prompts 64 --latents 0 8 16 --repeats 3]
    python benchmarks/bench_latent_step.py --gpu

GPT-2 small with random weights in float32; each row is a prompt, n latents and 32 answer tokens with labels on the
answer. All sides of a line take turns in one run, and the ratio of the fastest of their repeats is what counts. `kept`
is what is allocated in a forward pass and still there after it, whoever holds it. `--gpu`: bfloat16, batch 32, prompts
of 64, 300 and 3300 tokens, and what torch's allocator had at most. A side that runs out of memory has `inf`.
"""

import argparse
import copy
import math
import sys

import torch
from measuring import add_output_options, fastest, thinking_gpt2, write_results
from transformers import GPT2LMHeadModel

from mmcoconut.training.deferred import defer_weight_gradients


NUM_ANSWER = 32
GPU_SIZES = {"batch": 32, "prompts": [64, 300, 3300], "latents": [0, 2, 4, 8, 16, 32]}


def kept_bytes(step, device: str) -> int:
    """Bytes that a forward pass allocates and that are still there when it has returned its loss."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        loss = step(backward=False)
        return torch.cuda.memory_allocated() - before - loss.nbytes
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = step(backward=False)
    assert loss.requires_grad  # and with it the graph, until here
    return sum(event.self_cpu_memory_usage for event in profile.events())


def textbook_loss(model, input_ids, labels, latent_columns):
    """The loop as it was published: embeddings are torn apart and stacked again for each thought, the head runs on
    every position of every pass, and the cache appends. `model` is a GPT2LMHeadModel."""
    embeds, cache, logits, start = model.transformer.wte(input_ids), None, [], 0
    mask, positions = torch.ones_like(input_ids), torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    for end in [*latent_columns, input_ids.shape[1]]:
        outputs = model(
            inputs_embeds=embeds[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            output_hidden_states=True,
            use_cache=True,
        )
        logits.append(outputs.logits)
        cache = outputs.past_key_values
        if end < input_ids.shape[1]:
            thought = outputs.hidden_states[-1][:, -1]
            rows = [[embeds[b, t, :] for t in range(embeds.shape[1])] for b in range(embeds.shape[0])]
            for row, state in zip(rows, thought):
                row[end] = state
            embeds = torch.stack([torch.stack(row) for row in rows])
        start = end
    logits = torch.cat(logits, dim=1)[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def make_sides(arguments) -> tuple[dict, int]:
    """By name, a function of (input_ids, labels, latent columns) that gives a loss; and the latent's id."""
    num_positions = max(1024, *(prompt + 64 for prompt in arguments.prompts))
    ours = thinking_gpt2(arguments, num_positions=num_positions).train()
    plain = GPT2LMHeadModel(copy.deepcopy(ours.config.text_config)).train()
    for model in (ours, plain):
        model.to(arguments.device, arguments.dtype)

    def ours_with(attention: str, deferred: bool, checkpointed: str | None = None):
        def loss(input_ids, labels, columns, **kwargs):
            ours.get_decoder().set_attn_implementation(attention)
            defer_weight_gradients(ours, deferred)
            if checkpointed is not None:
                ours.activation_checkpointing_enable()
                ours.model.checkpointed_passes = checkpointed
            try:
                return ours(input_ids=input_ids, labels=labels, **kwargs).loss
            finally:
                if checkpointed is not None:
                    ours.activation_checkpointing_disable()

        return loss

    sides = {
        "plain": lambda input_ids, labels, columns: plain(input_ids=input_ids, labels=labels).loss,
        "textbook": lambda *batch: textbook_loss(plain, *batch),
        "sdpa": ours_with("sdpa", deferred=False),
        "sdpa, weight gradients once": ours_with("sdpa", deferred=True),
        "latent": ours_with("latent", deferred=False),
        "latent, weight gradients once": ours_with("latent", deferred=True),
        "the same, first pass checkpointed": ours_with("latent", deferred=True, checkpointed="first"),
    }
    return {name: side for name, side in sides.items() if name in (arguments.sides or sides)}, (
        ours.config.latent_token_id
    )


def peak_megabytes(step) -> float:
    """The most that was allocated on the GPU during a step."""
    torch.cuda.reset_peak_memory_stats()
    step()
    return round(torch.cuda.max_memory_allocated() / 1e6, 1)


def measure(
    sides, latent_id: int, *, batch: int, prompt: int, num_latents: int, repeats: int, device: str = "cpu"
) -> list[dict]:
    """Fastest seconds of a step and bytes that it keeps, of every side; they take turns."""
    columns = list(range(prompt, prompt + num_latents))
    input_ids = torch.randint(0, 250, (batch, prompt + num_latents + NUM_ANSWER))
    input_ids[:, columns] = latent_id
    labels = input_ids.clone()
    labels[:, : prompt + num_latents] = -100
    input_ids, labels = input_ids.to(device), labels.to(device)

    def step_of(loss):
        def step(backward=True):
            value = loss(input_ids, labels, columns)
            if backward:
                value.backward()
            return value

        return step

    steps = {name: step_of(loss) for name, loss in sides.items()}
    seconds = fastest(steps, repeats=repeats, device=device)
    fitting = [name for name, taken in seconds.items() if math.isfinite(taken)]
    peaks = {name: peak_megabytes(steps[name]) for name in fitting} if device != "cpu" else {}
    kept = {name: round(kept_bytes(steps[name], device) / 1e6, 1) for name in fitting}
    return [
        {
            "side": name,
            "batch": batch,
            "prompt": prompt,
            "latents": num_latents,
            "seconds": round(seconds[name], 4),
            "ratio": round(seconds[name] / seconds["plain"], 2),
            "kept_mb": kept.get(name, math.inf),
            "peak_mb": peaks.get(name),
        }
        for name in steps
    ]


def settings_of(arguments) -> dict:
    """What stands beside the figures of a step."""
    dtype = str(arguments.dtype).removeprefix("torch.")
    return {"layers": arguments.num_layers, "width": arguments.hidden_size, "dtype": dtype}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--hidden_size", type=int, default=768, help="a multiple of 64, the size of a head")
    parser.add_argument("--vocab_size", type=int, default=50257)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompts", type=int, nargs="+", default=[64])
    parser.add_argument("--latents", type=int, nargs="+", default=[0, 8, 16])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", nargs="+", help="some of the sides, `plain` among them; default: all")
    parser.add_argument("--gpu", action="store_true", help=f"bfloat16 on CUDA, and by default {GPU_SIZES}")
    add_output_options(parser)
    if "--gpu" in sys.argv:
        parser.set_defaults(**GPU_SIZES)
    arguments = parser.parse_args()
    arguments.device, arguments.dtype = ("cuda", torch.bfloat16) if arguments.gpu else ("cpu", torch.float32)
    return arguments


def main() -> None:
    arguments = read_arguments()
    sides, latent_id = make_sides(arguments)
    rows = []
    for prompt in arguments.prompts:
        for num_latents in arguments.latents:
            shape = {"batch": arguments.batch, "prompt": prompt, "num_latents": num_latents}
            rows += measure(sides, latent_id, **shape, repeats=arguments.repeats, device=arguments.device)
            print(rows[-len(sides) :][-1], flush=True)
    file = write_results(rows, arguments, replaces="prompt", **settings_of(arguments))
    print(f"written to {file.name}\n\n| prompt | n | " + " | ".join(sides) + " | kept MB |")
    print("|---" * (len(sides) + 3) + "|")
    for index in range(0, len(rows), len(sides)):
        line = rows[index : index + len(sides)]
        cells = [f"{row['ratio']:.2f}" for row in line] + [" / ".join(f"{row['kept_mb']:.0f}" for row in line)]
        print(f"| {line[0]['prompt']} | {line[0]['latents']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
