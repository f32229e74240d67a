"""What thoughts cost in a training step: ours, and the textbook loop, against a plain causal LM of equal length.

    python benchmarks/bench_latent_step.py [--prompts 64 256 --latents 0 4 8 16 --num_layers 12 --hidden_size 768]

GPT-2 with random weights in float32; each row is a prompt, n latents and 32 answer tokens with labels on the answer.
All sides of a line take turns in one run, and the ratio of the fastest of their repeats is what to read. `saved` is
what one step keeps for its backward pass beside the weights, every storage counted once.
"""

import argparse
import csv
import platform
import time
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers import CLIPVisionConfig, GPT2Config, GPT2LMHeadModel

from mmcoconut.modeling_mmcoconut import MMCoconutForConditionalGeneration
from mmcoconut.tokenizer import train_tokenizer


NUM_ANSWER = 32
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
RESULTS = Path(__file__).with_name("results")


def saved_bytes(step, weights) -> int:
    """Bytes that a forward pass keeps for its backward pass, the weights themselves not counted."""
    storages, of_weights = {}, {weight.untyped_storage().data_ptr() for weight in weights}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(backward=False)
    return sum(size for pointer, size in storages.items() if pointer not in of_weights)


def textbook_loss(model, input_ids, labels, latent_columns):
    """The loop as it was published: embeddings are torn apart and stacked again for each thought, the head runs on
    every position of every pass, and the cache appends. `model` is a GPT2LMHeadModel."""
    embeds, cache, logits, start = model.transformer.wte(input_ids), None, [], 0
    for end in [*latent_columns, input_ids.shape[1]]:
        outputs = model(
            inputs_embeds=embeds[:, start:end], past_key_values=cache, output_hidden_states=True, use_cache=True
        )
        logits.append(outputs.logits)
        cache = outputs.past_key_values
        if end < input_ids.shape[1]:
            thought = outputs.hidden_states[-1][:, -1]
            rows = [[embeds[b, t] for t in range(embeds.shape[1])] for b in range(embeds.shape[0])]
            for row, state in zip(rows, thought):
                row[end] = state
            embeds = torch.stack([torch.stack(row) for row in rows])
        start = end
    logits = torch.cat(logits, dim=1)[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def make_sides(arguments) -> tuple[dict, list, int]:
    """By name, a function of (input_ids, labels, latent columns) that gives a loss; all weights; the latent's id."""
    torch.manual_seed(0)
    text_config = GPT2Config(
        n_embd=arguments.hidden_size,
        n_layer=arguments.num_layers,
        n_head=arguments.hidden_size // 64,
        n_positions=max(1024, *(prompt + 64 for prompt in arguments.prompts)),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    tokenizer = train_tokenizer(["a b"], vocab_size=300)
    tokenizer.add_tokens([f"<filler {number}>" for number in range(arguments.vocab_size - len(tokenizer) - 5)])
    ours = MMCoconutForConditionalGeneration.from_backbones(
        vision_config=CLIPVisionConfig(**VISION, image_size=8, patch_size=8),
        text_config=text_config,
        tokenizer=tokenizer,
    ).train()
    text_config.vocab_size = ours.config.text_config.vocab_size
    plain = GPT2LMHeadModel(text_config).train()

    def loss_of_ours(attention, deferred):
        def loss(input_ids, labels, columns):
            ours.get_decoder().set_attn_implementation(attention)
            ours.model.defer_weight_gradients = deferred
            return ours(input_ids=input_ids, labels=labels).loss

        return loss

    def plain_loss(input_ids, labels, columns):
        return plain(input_ids=input_ids, labels=labels).loss

    def loss_of_textbook(input_ids, labels, columns):
        return textbook_loss(plain, input_ids, labels, columns)

    sides = {"plain": plain_loss, "textbook": loss_of_textbook}
    sides["ours, sdpa"] = loss_of_ours("sdpa", deferred=False)
    sides["ours, latent"] = loss_of_ours("latent", deferred=False)
    sides["ours, latent, weight gradients once"] = loss_of_ours("latent", deferred=True)
    return sides, [*plain.parameters(), *ours.parameters()], ours.config.latent_token_id


def measure(
    sides, weights: list, latent_id: int, *, batch: int, prompt: int, num_latents: int, repeats: int
) -> list[dict]:
    """Fastest seconds of a step and bytes that it saves, of every side; they take turns."""
    columns = list(range(prompt, prompt + num_latents))
    input_ids = torch.randint(0, 250, (batch, prompt + num_latents + NUM_ANSWER))
    input_ids[:, columns] = latent_id
    labels = input_ids.clone()
    labels[:, : prompt + num_latents] = -100

    def step_of(loss):
        def step(backward=True):
            value = loss(input_ids, labels, columns)
            if backward:
                value.backward()

        return step

    steps = {name: step_of(loss) for name, loss in sides.items()}
    seconds = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    return [
        {
            "side": name,
            "batch": batch,
            "prompt": prompt,
            "latents": num_latents,
            "seconds": round(min(seconds[name][1:]), 4),
            "ratio": round(min(seconds[name][1:]) / min(seconds["plain"][1:]), 2),
            "saved_mb": round(saved_bytes(step, weights) / 1e6, 1),
        }
        for name, step in steps.items()
    ]


def write_results(rows: list[dict], arguments) -> Path:
    """A CSV of this machine's name, with what the figures were made with in every row."""
    file = RESULTS / f"bench_latent_step_{arguments.machine}.csv"
    made_with = {
        "layers": arguments.num_layers,
        "width": arguments.hidden_size,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }
    file.parent.mkdir(exist_ok=True)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=[*rows[0], *made_with])
        writer.writeheader()
        writer.writerows({**row, **made_with} for row in rows)
    return file


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--hidden_size", type=int, default=768, help="a multiple of 64, the size of a head")
    parser.add_argument("--vocab_size", type=int, default=50257)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--latents", type=int, nargs="+", default=[0, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--machine", default="laptop-2c", help="name of the machine, in the file of the results")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    sides, weights, latent_id = make_sides(arguments)
    rows = []
    for prompt in arguments.prompts:
        for num_latents in arguments.latents:
            shape = {"batch": arguments.batch, "prompt": prompt, "num_latents": num_latents}
            rows += measure(sides, weights, latent_id, **shape, repeats=arguments.repeats)
            print(rows[-len(sides) :][-1], flush=True)
    print(f"written to {write_results(rows, arguments).name}\n\n| prompt | n | " + " | ".join(sides) + " | saved MB |")
    print("|---" * (len(sides) + 3) + "|")
    for index in range(0, len(rows), len(sides)):
        line = rows[index : index + len(sides)]
        cells = [f"{row['ratio']:.2f}" for row in line] + [" / ".join(f"{row['saved_mb']:.0f}" for row in line)]
        print(f"| {line[0]['prompt']} | {line[0]['latents']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
