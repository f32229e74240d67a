"""What `generate()` gives in tokens a second: one prompt, batches, a prefix that is kept, and a loop without a cache.

    python benchmarks/bench_generate.py [--prompt 64 --latents 8 --new_tokens 32 --batch 16]
    python benchmarks/bench_generate.py --gpu        # bfloat16, static cache, compiled steps, larger shapes

A language model of GPT-2's shape with random weights, greedy, always `new_tokens` tokens. In the ragged batch prompts
have 20 tokens and more and thoughts are 2 and more; in the others all rows are the longest. The loop without a cache
runs the whole sequence again for each thought and for each token, one prompt at a time. With a prefix, 8 questions
follow one text of 256 tokens; the time of `prefill` is counted. The plain causal LM is the library's, of equal size,
on prompts of equal length without thoughts; `split keys` is `attn_implementation="latent"`. All sides take turns in
one run, and of each the fastest turn counts.
"""

import argparse
import sys
from functools import partial

import torch
from measuring import add_output_options, fastest, thinking_gpt2, write_results
from transformers import GPT2LMHeadModel

from mmcoconut.passes_mmcoconut import column_lists
from mmcoconut.thinking_mmcoconut import Thoughts, think_uncached


GPU_SIZES = {"num_layers": 24, "hidden_size": 1024, "prompt": 256, "latents": 16, "new_tokens": 128, "batch": 64}
NUM_QUESTIONS, QUESTION = 8, 16
SHORTEST_PROMPT, FEWEST_LATENTS = 20, 2


def batch_of(model, lengths: list[int], latents: list[int], *, prefix: int = 0) -> dict:
    """Left-padded prompts of so many words and thoughts; their first `prefix` words are the same."""
    generator = torch.Generator().manual_seed(0)
    common, rows = torch.randint(0, 250, (prefix,), generator=generator).tolist(), []
    for length, num_latents in zip(lengths, latents):
        words = torch.randint(0, 250, (length - prefix,), generator=generator).tolist()
        rows.append([*common, *words, *[model.config.latent_token_id] * num_latents, 1])
    width = max(map(len, rows))
    pad = model.generation_config.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


@torch.no_grad()
def generate_without_cache(model, input_ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy tokens (1, T + new) of one prompt; every thought and every token runs all columns before it."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    embeddings = model.get_input_embeddings()
    thoughts = Thoughts(input_ids == model.config.latent_token_id, feed=model.model.thought_feed)
    thoughts.columns = column_lists(thoughts.latents)[0]
    states, embeds = think_uncached(decoder, embeddings(input_ids), thoughts)  # (1, T, D) each
    state = states[:, -1]  # (1, D)
    for _ in range(new_tokens):
        logits = head(state).index_fill(-1, torch.tensor(forbidden(model), device=state.device), -torch.inf)
        token = logits.argmax(-1, keepdim=True)  # (1, 1)
        input_ids = torch.cat([input_ids, token], dim=1)
        embeds = torch.cat([embeds, embeddings(token)], dim=1)
        state = decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -1]  # (1, D)
    return input_ids


def forbidden(model) -> list[int]:
    """What `generate` does not give either: placeholders, markers, the end of a text."""
    return [*model.generation_config.suppress_tokens, model.generation_config.eos_token_id]


def make_sides(model, arguments) -> dict:
    """By name: what to run, the tokens that it generates, and its shape."""
    new, batch = arguments.new_tokens, arguments.batch
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    options |= {"cache_implementation": "static"} if arguments.gpu else {}
    spread = torch.linspace(0, 1, batch)
    lengths = (SHORTEST_PROMPT + spread * (arguments.prompt - SHORTEST_PROMPT)).long().tolist()
    latents = (FEWEST_LATENTS + spread.flip(0) * (arguments.latents - FEWEST_LATENTS)).long().tolist()
    aligned = batch_of(model, [arguments.prompt] * batch, [arguments.latents] * batch)
    one = batch_of(model, [arguments.prompt], [arguments.latents])
    ragged = batch_of(model, [*lengths[:-1], arguments.prompt], [arguments.latents, *latents[1:]])
    asked = [arguments.prefix + QUESTION] * NUM_QUESTIONS
    questions = batch_of(model, asked, [arguments.latents] * NUM_QUESTIONS, prefix=arguments.prefix)

    def generate(inputs, *, attention="sdpa"):
        def run():
            model.get_decoder().set_attn_implementation(attention)
            return model.generate(**inputs, **options)

        return run

    def behind_prefix():
        model.get_decoder().set_attn_implementation("sdpa")
        prefix = model.prefill(**questions, num_tokens=arguments.prefix)
        return model.generate(**questions, prefix=prefix, **options)

    sides = {
        "batch 1": (generate(one), new),
        f"batch {batch}": (generate(aligned), batch * new),
        f"batch {batch}, ragged": (generate(ragged), batch * new),
        f"batch {batch}, split keys": (generate(aligned, attention="latent"), batch * new),
        "batch 1, no cache": (lambda: generate_without_cache(model, one["input_ids"], new), new),
        f"{NUM_QUESTIONS} questions": (generate(questions), NUM_QUESTIONS * new),
        f"{NUM_QUESTIONS} questions, split keys": (generate(questions, attention="latent"), NUM_QUESTIONS * new),
        f"{NUM_QUESTIONS} questions, prefix kept": (behind_prefix, NUM_QUESTIONS * new),
    }
    plain = GPT2LMHeadModel(model.config.text_config).eval().to(model.device, model.dtype)
    plain.generation_config = model.generation_config
    for name, inputs in {"batch 1": one, f"batch {batch}": aligned}.items():
        words = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.latent_token_id, 1)
        run = partial(plain.generate, **{**inputs, "input_ids": words}, **options)
        sides[f"plain causal LM, {name}"] = (run, sides[name][1])
    return sides


def check_sides(sides: dict) -> None:
    """Sides that must give the same tokens do."""
    for one, other in (
        ("batch 1", "batch 1, no cache"),
        (f"{NUM_QUESTIONS} questions", f"{NUM_QUESTIONS} questions, prefix kept"),
    ):
        same = (sides[one][0]() == sides[other][0]()).float().mean().item()
        print(f"{one} and {other}: {100 * same:.1f} % of the tokens are the same", flush=True)


def rows_of(sides: dict, seconds: dict[str, float], arguments) -> list[dict]:
    """A line a side: tokens a second, and times those of one prompt and of the loop without a cache."""
    rates = {name: tokens / seconds[name] for name, (_, tokens) in sides.items()}
    shape = {name: getattr(arguments, name) for name in ("prompt", "latents", "new_tokens", "prefix")}
    return [
        {
            "side": name,
            **shape,
            "tokens": sides[name][1],
            "seconds": round(seconds[name], 4),
            "tokens_per_second": round(rate, 2),
            "times_batch_1": round(rate / rates["batch 1"], 2),
            "times_no_cache": round(rate / rates["batch 1, no cache"], 2),
        }
        for name, rate in rates.items()
    ]


def print_table(rows: list[dict], batch: int) -> None:
    print("\n| side | seconds | tokens/s | times batch 1 | times no cache |\n|---|---|---|---|---|")
    for row in rows:
        figures = [f"{row[name]:.2f}" for name in ("seconds", "tokens_per_second", "times_batch_1", "times_no_cache")]
        print("| " + " | ".join([row["side"], *figures]) + " |")
    seconds = {row["side"]: row["seconds"] for row in rows}
    asked = f"{NUM_QUESTIONS} questions"
    print(f"ragged / aligned time {seconds[f'batch {batch}, ragged'] / seconds[f'batch {batch}']:.2f}", end=", ")
    print(f"without prefix / with it {seconds[asked] / seconds[f'{asked}, prefix kept']:.2f}")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--hidden_size", type=int, default=768, help="a multiple of 64, the size of a head")
    parser.add_argument("--vocab_size", type=int, default=50257)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt, of the longest if ragged")
    parser.add_argument("--latents", type=int, default=8, help="thoughts of a prompt, at most")
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=256, help="tokens that the questions share")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help=f"on CUDA, and by default with {GPU_SIZES}")
    add_output_options(parser)
    if "--gpu" in sys.argv:
        parser.set_defaults(**GPU_SIZES)
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    device, dtype = ("cuda", torch.bfloat16) if arguments.gpu else ("cpu", torch.float32)
    sides = make_sides(thinking_gpt2(arguments, num_positions=4096).to(device, dtype), arguments)
    check_sides(sides)
    calls = {name: run for name, (run, _) in sides.items()}
    rows = rows_of(sides, fastest(calls, repeats=arguments.repeats, device=device), arguments)
    file = write_results(
        rows,
        arguments,
        layers=arguments.num_layers,
        width=arguments.hidden_size,
        vocabulary=arguments.vocab_size,
        dtype=str(dtype).removeprefix("torch."),
    )
    print(f"written to {file.name}")
    print_table(rows, arguments.batch)


if __name__ == "__main__":
    main()
