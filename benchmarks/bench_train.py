"""Samples and tokens a second of training, end to end through the Trainer: data, model, optimizer.

    python benchmarks/bench_train.py [--gpu] [--rows 768 --batch 32 --stage 4]

Arrow mazes of up to six arrows, an epoch at one stage, in which a row has as many thoughts as steps that they replace.
`no_cot` writes the answer alone, `cot` all steps, `coconut` thinks the first and writes the rest, with the default
attention and with another, its rows in random order or grouped by cost. A token is one that is no padding: of the
picture, the question, the thoughts and the text. All sides take turns in one run, and each side's fastest epoch
counts. Small models on a CPU in float32; with --gpu the shapes of GPT-2 small and CLIP ViT-B/32 in bfloat16.
"""

import argparse
import logging
import tempfile
import time

import torch
import transformers
from measuring import add_output_options, write_results
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, GPT2Config, TrainerCallback
from transformers.utils import logging as library_logging

from mmcoconut.arguments.fields import RunArguments
from mmcoconut.build import from_backbones, processor_from_backbones
from mmcoconut.data import load_examples, question_text
from mmcoconut.data.tokenizer import train_tokenizer
from mmcoconut.training.callbacks import CurriculumCallback
from mmcoconut.training.collator import CurriculumCollator
from mmcoconut.training.curriculum import Curriculum
from mmcoconut.training.trainer import CurriculumTrainer


# Of each side: mode, attention or None for the default, whether rows are grouped.
SIDES = {
    "no_cot": ("no_cot", None, False),
    "cot": ("cot", None, False),
    "cot, grouped": ("cot", None, True),
    "coconut": ("coconut", None, False),
    "coconut, grouped": ("coconut", None, True),
    "coconut, sdpa": ("coconut", "sdpa", False),
    "coconut, latent": ("coconut", "latent", False),
}
SHAPES = {
    "small": {"layers": 3, "width": 96, "heads": 4, "tower_layers": 1, "image": 48, "patch": 16},
    "gpt2": {"layers": 12, "width": 768, "heads": 12, "tower_layers": 12, "image": 224, "patch": 32},
}  # the tower is as wide as the language model


class Epoch(TrainerCallback):
    """Seconds of an epoch's updates, and what they trained on."""

    def __init__(self, latent_token_id: int, device: torch.device):
        self.latent_token_id, self.device = latent_token_id, device
        self.counts: list[torch.Tensor] = []

    def clock(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.counts, self.began = [], self.clock()

    def count(self, inputs) -> None:
        """Note a batch's rows, real tokens, columns of all rows, and passes of the decoder."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        passes = 1 + (ids == self.latent_token_id).any(dim=0).sum()
        self.counts.append(torch.stack([*torch.tensor([len(ids), mask.numel()]).to(ids), mask.sum(), passes]))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            self.seconds = self.clock() - self.began

    def record(self) -> dict:
        rows, columns, tokens, passes = torch.stack(self.counts).sum(dim=0).tolist()
        return {
            "samples_per_second": round(rows / self.seconds, 1),
            "tokens_per_second": round(tokens / self.seconds, 1),
            "tokens_a_row": round(tokens / rows, 2),
            "padding": round(1 - tokens / columns, 4),
            "passes_an_update": round(passes / len(self.counts), 2),
        }


class CountingTrainer(CurriculumTrainer):
    """Trains epochs of one stage, and neither evaluates nor saves."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.remove_callback(CurriculumCallback)
        self.remove_callback(transformers.PrinterCallback)
        self.epoch_counts = Epoch(self.processing_class.latent_token_id, self.args.device)
        self.add_callback(self.epoch_counts)

    def training_step(self, model, inputs, *args, **kwargs):
        self.epoch_counts.count(inputs)
        return super().training_step(model, inputs, *args, **kwargs)


def build(shape: dict, texts: list[str]):
    """Model and processor of this shape, with random weights and the mazes' own tokenizer."""
    torch.manual_seed(0)
    tower = {"hidden_size": shape["width"], "intermediate_size": 4 * shape["width"]}
    tower |= {"num_hidden_layers": shape["tower_layers"], "num_attention_heads": shape["heads"]}
    text = {"n_embd": shape["width"], "n_layer": shape["layers"], "n_head": shape["heads"], "n_positions": 256}
    tokenizer = train_tokenizer(texts, vocab_size=400)
    model = from_backbones(
        vision_config=CLIPVisionConfig(**tower, image_size=shape["image"], patch_size=shape["patch"]),
        text_config=GPT2Config(**text, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        tokenizer=tokenizer,
    )
    side = {"height": shape["image"], "width": shape["image"]}
    images = CLIPImageProcessorPil(size=side, do_center_crop=False)
    return model, processor_from_backbones(config=model.config, tokenizer=tokenizer, image_processor=images)


def make_trainer(side: tuple, rows, texts: list[str], *, arguments, folder: str) -> CountingTrainer:
    mode, attention, grouped = side
    model, processor = build(SHAPES[arguments.shape], texts)
    if attention is not None:
        model.set_attn_implementation(attention)
    processor.markers = "both" if mode == "coconut" else "none"
    curriculum = Curriculum(mode=mode, max_latent_stage=7, pad_latent_to_max=False)
    collator = CurriculumCollator(curriculum, processor)
    collator.fixed_stage = arguments.stage
    options = {
        "per_device_train_batch_size": arguments.batch,
        "num_train_epochs": 1,
        "train_sampling_strategy": "group_by_length" if grouped else "random",
        "dataloader_num_workers": arguments.workers,
        "dataloader_pin_memory": arguments.gpu,
        "use_cpu": not arguments.gpu,
        "bf16": arguments.gpu,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    run = RunArguments(output_dir=folder, **options)
    return CountingTrainer(model=model, args=run, data_collator=collator, train_dataset=rows)


def measure(arguments) -> list[dict]:
    """The fastest of each side's epochs but the first; the sides take turns."""
    rows = load_examples("arrow_mazes", split="train", num_rows=arguments.rows, grid_size=3, max_hops=6)
    parts = (part for row in rows for part in (question_text(row), *row["steps"], *row["answers"]))
    texts = [*dict.fromkeys(parts)]
    found = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        made = {"arguments": arguments, "folder": folder}
        trainers = {name: make_trainer(side, rows, texts, **made) for name, side in SIDES.items()}
        for _ in range(arguments.repeats + 1):
            for name, trainer in trainers.items():
                trainer.train()
                found[name].append(trainer.epoch_counts.record())
                print(".", end="", flush=True)
    best = {name: max(records[1:], key=lambda record: record["samples_per_second"]) for name, records in found.items()}
    plain = best["no_cot"]["samples_per_second"]
    return [
        {"side": name, **record, "time_a_sample": round(plain / record["samples_per_second"], 2)}
        for name, record in best.items()
    ]


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="the shapes of GPT-2 small and CLIP ViT-B/32, in bfloat16")
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--stage", type=int, default=4, help="steps that thoughts replace; rows have two to seven")
    parser.add_argument("--workers", type=int, default=0, help="processes that read and tokenize")
    parser.add_argument("--repeats", type=int, default=2)
    add_output_options(parser)
    arguments = parser.parse_args()
    arguments.shape = "gpt2" if arguments.gpu else "small"
    if arguments.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch finds no GPU; leave it out for the small shapes on the CPU.")
    return arguments


def main() -> None:
    arguments = read_arguments()
    logging.disable(logging.WARNING)
    library_logging.disable_progress_bar()
    rows = measure(arguments)
    columns = [name for name in rows[0] if name != "side"]
    settings = {name: getattr(arguments, name) for name in ("batch", "rows", "stage", "workers")}
    settings |= {**SHAPES[arguments.shape], "dtype": "bfloat16" if arguments.gpu else "float32"}
    print(f"\nwritten to {write_results(rows, arguments, **settings).name}\n\n| side | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for row in rows:
        print(f"| {row['side']} | " + " | ".join(str(row[name]) for name in columns) + " |")


if __name__ == "__main__":
    main()
