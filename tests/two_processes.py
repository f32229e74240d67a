"""What test_processes.py starts twice: a batch that is split raggedly, under DDP and FSDP2, on CPUs.

`torchrun --nproc_per_node 2 two_processes.py OUT` writes OUT/found.pt: the joined batch's loss and gradients as both
processes found them together, the tokens that each generated, and the errors that each raised.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import (
    TEXT_SIZES,
    batch_of,
    checkpoint_activations,
    decoder_side,
    last_labels,
    ragged_rows,
    seq2seq_batch,
    tiny_model,
    tiny_seq2seq,
    words,
)
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2Config
from transformers.distributed import DistributedConfig

from mmcoconut.training.deferred import defer_weight_gradients
from mmcoconut.training.lora import add_lora


# wrapper, decoder, whether layers are checkpointed
CASES = (
    ("ddp", "gpt2", False),
    ("ddp", "qwen2", True),
    ("ddp", "qwen2 with lora", True),
    ("ddp", "marian", False),
    ("ddp", "seq2seq", False),
    ("ddp", "gpt2 in parallel", False),
    ("ddp", "qwen2 in parallel", True),
    ("ddp", "gpt2 truncated", False),
    ("fsdp", "gpt2", False),
    ("fsdp", "gpt2 truncated", False),
    ("fsdp", "qwen2 truncated", True),
    ("fsdp", "qwen2", False),
    ("fsdp", "qwen2", True),
    ("fsdp", "marian", False),
    ("fsdp", "seq2seq", False),
)


def make_model(text: str):
    """The same in every process; an adapter is given values, as its second matrix begins with zeros."""
    if text == "seq2seq":
        return tiny_seq2seq(thought_norm="projection")
    schedule = {"thought_schedule": "jacobi", "jacobi_iterations": 2} if text.endswith(" in parallel") else {}
    name = (
        Qwen2Config(**TEXT_SIZES, num_key_value_heads=2, tie_word_embeddings=True)
        if text == "qwen2 tied"
        else text.split()[0]
    )
    model = tiny_model(name, thought_norm="projection", **schedule)
    defer_weight_gradients(model, True)
    if text.endswith(" truncated"):
        model.model.bptt_thoughts = 1
    if text.endswith(" with lora"):
        add_lora(model, {"r": 4})
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def rows_of(config, rank: int) -> list[list[int]]:
    """The rows of one process: images and latents at different columns, or a row with neither."""
    return ragged_rows(config)[:3] if rank == 0 else [words(9, 10)]


def labelled_batch(model, ranks: tuple[int, ...]) -> dict:
    """What one process has, or both together."""
    if model.config.is_encoder_decoder:  # the second process has the row without a picture
        batch = seq2seq_batch(model, order=[row for rank in ranks for row in ([0, 1, 3], [2])[rank]])
        return {**batch, "labels": last_labels(decoder_side(batch))}
    batch = batch_of(model, [row for rank in ranks for row in rows_of(model.config, rank)])
    return {**batch, "labels": last_labels(batch)}


def num_labels(model) -> int:
    return sum(int((labelled_batch(model, (rank,))["labels"] != -100).sum()) for rank in range(2))


def shard(model):
    """Each block of the decoder a unit, the rest one: as `fsdp_transformer_layer_cls_to_wrap` with the decoder's."""
    decoder = model.get_decoder()
    for block in decoder.get_submodule("h" if hasattr(decoder, "h") else "layers"):
        fully_shard(block)
    fully_shard(model)
    model.set_reduce_scatter_unused_params(True)
    return model


def whole(gradient: torch.Tensor | None):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def train(wrapper: str, text: str, checkpointed: bool) -> dict:
    """Loss and gradients of the joined batch; both wrappers average gradients, so each loss is scaled by two."""
    rank, model = dist.get_rank(), make_model(text).train()
    batch, divisor = labelled_batch(model, (rank,)), num_labels(model) / 2
    if checkpointed:
        checkpoint_activations(model)
    module = DistributedDataParallel(model, find_unused_parameters=True) if wrapper == "ddp" else shard(model)
    loss = module(**batch, num_items_in_batch=divisor).loss
    loss.backward()
    mean = loss.detach() / 2
    dist.all_reduce(mean)
    gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    return {"loss": mean, "gradients": gradients}


def prompt(model, rank: int) -> dict:
    return batch_of(model, rows_of(model.config, rank)[:1])


def generate(text: str) -> list[torch.Tensor]:
    """Tokens of both processes, whose prompts have two latents and none."""
    model = shard(make_model(text))
    register_fsdp_forward_method(model, "generate")
    tokens = model.generate(**prompt(model, dist.get_rank()), max_new_tokens=4 + dist.get_rank(), synced_gpus=True)
    gathered = [None, None]
    dist.all_gather_object(gathered, tokens)
    return gathered


def too_short() -> list[str]:
    """Both processes' errors where the sequence of one cannot be cut into as many pieces as the other has."""
    model = shard(make_model("gpt2"))
    rows = rows_of(model.config, 0)[:1] if dist.get_rank() == 0 else [words(2, 0)]
    errors = [None, None]
    try:
        model(**batch_of(model, rows))
    except ValueError as error:
        dist.all_gather_object(errors, str(error))
    return errors


def in_parallel() -> list[str]:
    """Both processes' errors where one of them alone has thoughts to update together."""
    model = shard(make_model("gpt2 in parallel"))
    errors = [None, None]
    try:
        model(**batch_of(model, rows_of(model.config, dist.get_rank())))
    except ValueError as error:
        dist.all_gather_object(errors, str(error))
    return errors


def in_tensor_parallel(tied: bool, folder: Path) -> dict:
    """Logits and tokens of a model of which each process holds half of the decoder and of its head."""
    model = make_model("qwen2 tied" if tied else "qwen2")
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    model = type(model).from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    batch = batch_of(model, ragged_rows(model.config))
    with torch.no_grad():
        logits = whole(model(**batch).logits)
    return {"logits": logits, "tokens": model.generate(**batch, max_new_tokens=4, do_sample=False)}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = {case: train(*case) for case in CASES}
    found |= {("generate", text): generate(text) for text in ("gpt2", "qwen2")}
    found |= {"too short": too_short(), "in parallel": in_parallel()}
    found |= {("tensor parallel", tied): in_tensor_parallel(tied, folder / f"tied_{tied}") for tied in (False, True)}
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
