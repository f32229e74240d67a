"""What it costs that rows of a batch have different prompts and numbers of thoughts, in a training step.

    python benchmarks/bench_ragged_step.py [--gpu]

GPT-2 small with random weights, a batch of prompts from 20 to 64 tokens with 2 to 8 thoughts and 32 answer tokens,
against one of the same size in which every row has 64 and 8. The collator pads prompts on the left, so that the first
thoughts share a column; `apart` are rows as they come, padded on the right, whose thoughts share none. Sides take
turns in one run, and the ratio of the fastest of their repeats counts.
"""

import torch
from bench_latent_step import NUM_ANSWER, make_sides, read_arguments, settings_of
from measuring import fastest, write_results


SIDE = "latent, weight gradients once"
PROMPT, LATENTS, SHORTEST, FEWEST = 64, 8, 20, 2


def rows_of(batch: int, *, ragged: bool) -> list[tuple[int, int]]:
    """Prompt tokens and thoughts of each row: evenly from few to many, long prompts with few and many thoughts."""
    if not ragged:
        return [(PROMPT, LATENTS)] * batch
    share = [row / (batch - 1) for row in range(batch)]
    prompts = [round(PROMPT - part * (PROMPT - SHORTEST)) for part in share]
    latents = [round(FEWEST + part * (LATENTS - FEWEST)) for part in share]
    return list(zip(prompts[::2] + prompts[1::2], latents))


def batch_of(rows: list[tuple[int, int]], latent_id: int, *, aligned: bool) -> dict:
    """input_ids, attention_mask and labels (B, T) of rows with these numbers of prompt tokens and thoughts."""
    length = PROMPT + LATENTS + NUM_ANSWER
    input_ids, mask = torch.randint(0, 250, (len(rows), length)), torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(input_ids, -100)
    for row, (prompt, latents) in enumerate(rows):
        first = PROMPT if aligned else prompt  # latent
        last = first + latents + NUM_ANSWER
        input_ids[row, first : first + latents] = latent_id
        mask[row, first - prompt : last] = 1
        labels[row, last - NUM_ANSWER : last] = input_ids[row, last - NUM_ANSWER : last]
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def main() -> None:
    arguments = read_arguments()
    arguments.prompts, arguments.sides = [PROMPT], [SIDE]
    sides, latent_id = make_sides(arguments)
    batches = {
        "aligned": batch_of(rows_of(arguments.batch, ragged=False), latent_id, aligned=True),
        "ragged, first thoughts aligned": batch_of(rows_of(arguments.batch, ragged=True), latent_id, aligned=True),
        "ragged, thoughts apart": batch_of(rows_of(arguments.batch, ragged=True), latent_id, aligned=False),
    }

    def step_of(batch: dict):
        batch = {key: value.to(arguments.device) for key, value in batch.items()}
        return lambda: sides[SIDE](**batch, columns=None).backward()

    steps = {name: step_of(batch) for name, batch in batches.items()}
    seconds = fastest(steps, repeats=arguments.repeats, device=arguments.device)
    shape = {"batch": arguments.batch, "prompt": PROMPT, "latents": LATENTS}
    rows = [
        {"batch_of": name, **shape, "seconds": round(taken, 4), "ratio": round(taken / seconds["aligned"], 2)}
        for name, taken in seconds.items()
    ]
    file = write_results(rows, arguments, **settings_of(arguments))
    print(f"written to {file.name}\n\n| batch of | ratio |\n|---|---|")
    for row in rows:
        print(f"| {row['batch_of']} | {row['ratio']:.2f} |")


if __name__ == "__main__":
    main()
