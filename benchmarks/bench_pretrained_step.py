"""Seconds and peak memory of a training step (forward, backward, AdamW) at the size of pretrained models.

    python benchmarks/bench_pretrained_step.py smollm2_135m [--weights FOLDER] [--gpu]
    python benchmarks/bench_pretrained_step.py qwen2_1_5b [--gpu]

float32 weights and autocast to bfloat16, as a recipe's `bf16: true` trains; fused AdamW on all weights. A row is a
prompt, n thoughts, and answer tokens with labels; `no thoughts` reads as many tokens of text in their place. The sides
take turns, and the fastest of their repeats counts; its ratio to `no thoughts` is what to read. Weights are random
unless --weights names a folder with the pretrained ones (examples/real_weights.py writes one), whose shape must be the
named one. On a CPU there is no peak of memory, and --tiny leaves two narrow layers of the shape.
"""

import argparse
import math

import torch
from measuring import VISION, add_output_options, fastest, thinking_model, write_results
from transformers import CLIPVisionConfig, LlamaConfig, Qwen2Config

from mmcoconut.build import from_backbones
from mmcoconut.kernels import choose_attention
from mmcoconut.training.deferred import defer_weight_gradients


# Field by field the config.json of HuggingFaceTB/SmolLM2-135M-Instruct and of Qwen/Qwen2-1.5B, as far as it decides
# shapes and time.
SHAPES = {
    "smollm2_135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    ),
    "qwen2_1_5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
    ),
}
TINY = {"vocab_size": 400, "intermediate_size": 64, "num_hidden_layers": 2}  # heads stay, of 8 numbers each
COMPARED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
# Of each side: attention, and whether it thinks.
SIDES = {"no thoughts": ("sdpa", False), "thoughts, sdpa": ("sdpa", True), "thoughts, latent": ("latent", True)}


def build(arguments):
    """Return the model, with random weights or those of a folder.

    Raises:
        SystemExit: a folder whose model has another shape.
    """
    config = SHAPES[arguments.model]
    if arguments.tiny:
        config.update({**TINY, "hidden_size": 8 * config.num_attention_heads, "head_dim": 8})
    if arguments.weights is None:
        return thinking_model(config)
    vision_config = CLIPVisionConfig(**VISION, image_size=8, patch_size=8)
    model = from_backbones(vision_config=vision_config, text=arguments.weights, gguf_file=arguments.gguf_file)
    found = {name: getattr(model.config.text_config, name) for name in COMPARED}
    expected = {name: getattr(config, name) for name in COMPARED}
    if found != expected:
        raise SystemExit(f"--weights {arguments.weights} has {found}, and {arguments.model} is {expected}.")
    choose_attention(model)
    defer_weight_gradients(model)
    return model


def batch_of(arguments, latent_id: int, *, thinks: bool, device: str) -> dict:
    """Return input_ids and labels (B, prompt + n + answer); only the answer has labels."""
    first = arguments.prompt + arguments.latents
    input_ids = torch.randint(0, 250, (arguments.batch, first + arguments.answer))
    if thinks:
        input_ids[:, arguments.prompt : first] = latent_id
    labels = input_ids.clone()
    labels[:, :first] = -100
    return {"input_ids": input_ids.to(device), "labels": labels.to(device)}


def make_step(model, optimizer, batch: dict, *, attention: str, device: str):
    """Return one update, as a function that gives the loss."""

    def step() -> torch.Tensor:
        model.get_decoder().set_attn_implementation(attention)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def peak_gigabytes(step) -> float:
    """Return the most that was allocated on the GPU during an update: weights, moments, gradients, activations."""
    torch.cuda.reset_peak_memory_stats()
    step()
    return round(torch.cuda.max_memory_allocated() / 1e9, 2)


def measure(model, arguments, device: str) -> list[dict]:
    """Return a row of each side: seconds, ratios to the side without thoughts, and peak memory."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device != "cpu")
    steps = {}
    for name, (attention, thinks) in SIDES.items():
        batch = batch_of(arguments, model.config.latent_token_id, thinks=thinks, device=device)
        steps[name] = make_step(model, optimizer, batch, attention=attention, device=device)
    seconds = fastest(steps, repeats=arguments.repeats, device=device)
    fitting = [name for name, taken in seconds.items() if math.isfinite(taken)]
    peaks = {name: peak_gigabytes(steps[name]) for name in fitting} if device != "cpu" else {}
    losses = {name: steps[name]().item() for name in fitting}
    if not all(map(math.isfinite, losses.values())):
        raise SystemExit(f"The losses are {losses}: a step is broken.")
    plain = peaks.get("no thoughts")
    return [
        {
            "model": arguments.model,
            "side": name,
            "seconds": round(seconds[name], 4),
            "ratio": round(seconds[name] / seconds["no thoughts"], 3),
            "peak_gb": peaks.get(name, ""),
            "peak_ratio": round(peaks[name] / plain, 3) if plain and name in peaks else "",
        }
        for name in SIDES
    ]


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--weights", help="folder of a pretrained model of this shape")
    parser.add_argument("--gguf_file", help="the file in --weights that holds them as GGUF")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=256, help="tokens before the thoughts")
    parser.add_argument("--latents", type=int, default=8, help="thoughts")
    parser.add_argument("--answer", type=int, default=64, help="labelled tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gpu", action="store_true", help="on CUDA")
    parser.add_argument("--tiny", action="store_true", help=f"random weights and {TINY}")
    add_output_options(parser)
    arguments = parser.parse_args()
    if arguments.tiny and arguments.weights is not None:
        parser.error("--tiny: the weights of --weights have their own size; leave one of the two out.")
    if arguments.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch finds no GPU; leave it out to run on the CPU.")
    return arguments


def main() -> None:
    arguments = read_arguments()
    device = "cuda" if arguments.gpu else "cpu"
    model = build(arguments).train().to(device)
    settings = {name: getattr(arguments, name) for name in ("batch", "prompt", "latents", "answer", "tiny")}
    settings |= {"weights": "pretrained" if arguments.weights else "random", "dtype": "float32, autocast to bfloat16"}
    settings["parameters"] = model.num_parameters()
    rows = measure(model, arguments, device)
    file = write_results(rows, arguments, replaces="model", **settings)
    print(f"written to {file.name}")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
