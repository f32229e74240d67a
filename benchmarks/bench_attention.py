"""What one latent step's attention costs: split keys read where they lie, against keys that are joined first.

    python benchmarks/bench_attention.py [--gpu] [--prefixes 64 300 3300 --tails 1 8 --threads 1]

Random numbers; a line is one layer of one step, forward or forward and backward. Sides: `joined sdpa` copies prefix
and tail together, as a cache that appends does in each step, and calls torch's attention; `split` is
`latent_attention`, on a GPU with the Triton kernels, and with a pass of its own for the prefix's gradient, though
training takes one for all steps; `definition` repeats keys and values for every head.

All sides of a line take turns in one run, and the ratio of the fastest of their repeats is what to read. GB/s: prefix
and tail, counted once a forward pass; that of a copy on the same device, reads and writes counted, is beside it.
"""

import argparse

import torch
from measuring import add_output_options, fastest, write_results

from mmcoconut.kernels.latent import Split, Step, latent_attention, latent_attention_reference
from mmcoconut.kernels.triton_kernels import triton


# batch, heads, kv_heads, head_dim
CPU_SHAPES = [(4, 12, 12, 64), (1, 14, 2, 64)]
GPU_SHAPES = [(8, 12, 12, 64), (8, 28, 4, 128), (32, 28, 4, 128), (1, 28, 4, 128)]


def joined_sdpa(query, key: Split, value: Split, *, scaling):
    return torch.nn.functional.scaled_dot_product_attention(
        query, key.joined(), value.joined(), scale=scaling, enable_gqa=query.shape[1] != key.prefix.shape[1]
    )


def of_step(attention):
    """Return the attention as a function of query, keys and values."""
    return lambda query, key, value, *, scaling: attention(Step(query, scaling), key, value)


SIDES = {
    "joined sdpa": joined_sdpa,
    "split": of_step(latent_attention),
    "definition": of_step(latent_attention_reference),
}


def random_inputs(*, batch, heads, kv_heads, prefix, tail, head_dim, device, dtype) -> tuple:
    def states(number, length):
        return torch.randn(batch, number, length, head_dim, device=device, dtype=dtype, requires_grad=True)

    query = states(heads, 1)
    key, value = (Split(states(kv_heads, prefix), states(kv_heads, tail)) for _ in range(2))
    return query, key, value


def copy_bandwidth(device: str, repeats: int) -> float:
    """GB/s, read and written, of a copy far larger than any cache."""
    source = torch.empty(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = fastest({"copy": lambda: target.copy_(source)}, repeats=repeats, device=device)["copy"]
    return 2 * source.numel() / taken / 1e9


def measure(*, repeats: int, **shape) -> list[dict]:
    """A row of every side, forward and forward with backward, of one shape."""
    query, key, value = inputs = random_inputs(**shape)
    leaves, grad_output = [query, *key, *value], torch.randn_like(query)
    scaling = shape["head_dim"] ** -0.5
    sizes = {name: size for name, size in shape.items() if name not in ("device", "dtype")}

    def forward_of(attention):
        def forward():
            with torch.no_grad():
                attention(*inputs, scaling=scaling)

        return forward

    def both_of(attention):
        def both():
            torch.autograd.grad(attention(*inputs, scaling=scaling), leaves, grad_output)

        return both

    read = sum(part.numel() * part.element_size() for part in (*key, *value))
    rows = []
    for name, make in {"forward": forward_of, "forward+backward": both_of}.items():
        calls = {side: make(attention) for side, attention in SIDES.items()}
        taken = fastest(calls, repeats=repeats, device=shape["device"])
        for side, seconds in taken.items():
            row = {"side": side, "pass": name, **sizes}
            row |= {"microseconds": round(seconds * 1e6, 1), "ratio": round(seconds / taken["joined sdpa"], 3)}
            rows.append(row | {"gb_per_s": round(read / seconds / 1e9, 2) if name == "forward" else ""})
    return rows


def print_table(rows: list[dict], bandwidth: float) -> None:
    """A line a shape and pass: what each side takes of the time of joined sdpa, and its GB/s."""
    print("\n| B, H, H', K | P | T | pass | µs of joined sdpa | " + " | ".join(SIDES) + " | GB/s |")
    print("|---" * (len(SIDES) + 6) + "|")
    for index in range(0, len(rows), len(SIDES)):
        line = rows[index : index + len(SIDES)]
        first = line[0]
        shape = ", ".join(str(first[name]) for name in ("batch", "heads", "kv_heads", "head_dim"))
        cells = [shape, first["prefix"], first["tail"], first["pass"], first["microseconds"]]
        cells += [f"{row['ratio']:.2f}" for row in line]
        cells += [" / ".join(str(row["gb_per_s"]) for row in line) if first["pass"] == "forward" else ""]
        print("| " + " | ".join(str(cell) for cell in cells) + " |")
    print(f"\ncopy of a large tensor: {bandwidth:.0f} GB/s")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="large shapes in bfloat16")
    parser.add_argument("--prefixes", type=int, nargs="+", default=[64, 300, 3300])
    parser.add_argument("--tails", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    add_output_options(parser)
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    device, dtype = ("cuda", torch.bfloat16) if arguments.gpu else ("cpu", torch.float32)
    bandwidth = copy_bandwidth(device, arguments.repeats)
    rows = []
    for batch, heads, kv_heads, head_dim in GPU_SHAPES if arguments.gpu else CPU_SHAPES:
        for prefix in arguments.prefixes:
            for tail in arguments.tails:
                shape = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "prefix": prefix, "tail": tail}
                shape |= {"head_dim": head_dim, "device": device, "dtype": dtype}
                rows += measure(repeats=arguments.repeats, **shape)
                print(rows[-1], flush=True)
    file = write_results(
        rows,
        arguments,
        dtype=str(dtype).removeprefix("torch."),
        copy_gb_per_s=round(bandwidth, 1),
        triton=triton.__version__ if triton else "",
    )
    print(f"written to {file.name}")
    print_table(rows, bandwidth)


if __name__ == "__main__":
    main()
