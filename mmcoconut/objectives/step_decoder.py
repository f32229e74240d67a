"""A small decoder that writes each step from the thoughts that replace it, and nothing else (SIM-CoT).

Shapes: B rows, N latents, D hidden of the model, W of the decoder, S steps, C latents of a step, K tokens of a step,
n steps of a batch that have latents.
"""

import json
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaModel

from mmcoconut.compat_mmcoconut import CACHE
from mmcoconut.data.targets import IGNORED, encode_step
from mmcoconut.objectives.base import Objective, RowsOfBatch, mean_by_row
from mmcoconut.passes_mmcoconut import positions_from_mask


END = -1  # end of a step in the output of `encode`; for the decoder an id after the vocabulary
LARGEST_WIDTH = 256  # by default
SEED = 0


def tokens_of_steps(batch: RowsOfBatch, max_tokens: int) -> torch.Tensor:
    """Return the ids of each row's steps that have latents (B, S, K): END after a whole step, then IGNORED."""
    found = []
    for row, steps in zip(batch.rows, batch.steps.tolist()):
        ids = [[*encode_step(batch.processor, row["steps"][number]), END] for number in range(max([*steps, -1]) + 1)]
        found.append([step[:max_tokens] for step in ids])
    num_steps = max(map(len, found), default=0)
    most = max((len(step) for row in found for step in row), default=0)
    targets = torch.full((len(found), num_steps, most), IGNORED)
    for number, row in enumerate(found):
        for place, step in enumerate(row):
            targets[number, place, : len(step)] = torch.tensor(step)
    return targets


def by_step(
    thoughts: torch.Tensor, steps: torch.Tensor, places: torch.Tensor, num_steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return thoughts (B, N, D) grouped by step (B, S, C, D), and a mask (B, S, C) of real ones.

    Steps with fewer latents than others are padded on the left, because the text follows on the right.

    >>> found, mask = by_step(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[0, 0, 1]]),
    ...                       torch.tensor([[0, 1, 0]]), 2)
    >>> found[..., 0].tolist(), mask.tolist()
    ([[[1.0, 2.0], [0.0, 3.0]]], [[[True, True], [False, True]]])
    """
    rows, latents = (steps >= 0).nonzero(as_tuple=True)  # (n · C,) each
    steps, places = steps[rows, latents], places[rows, latents]
    counts = thoughts.new_zeros(len(thoughts), num_steps, dtype=torch.long)  # (B, S)
    counts = counts.index_put((rows, steps), torch.ones_like(steps), accumulate=True)
    most = int(counts.max()) if counts.numel() else 0
    where = (rows, steps, most - counts[rows, steps] + places)
    shape = (len(thoughts), num_steps, most)
    mask = torch.zeros(shape, dtype=torch.bool, device=thoughts.device).index_put(where, torch.ones_like(rows).bool())
    found = thoughts.new_zeros(*shape, thoughts.shape[-1]).index_put(where, thoughts[rows, latents])
    return found, mask


class StepDecoder(Objective):
    """Cross-entropy of a small decoder that reads only a step's thoughts z₁ … z_C and writes the step's text.

        L = mean over the tokens of the row's steps with latents:  -log p(tᵢ | z₁ … z_C, t₁ … tᵢ₋₁)

    The decoder is trained with the model and is not part of it; `read` decodes thoughts with it. It is a Llama of a
    few layers with separate embeddings of the model's vocabulary, as in the paper; a linear layer maps thoughts to its
    width. Gradients reach the model only through the thoughts. The paper uses a second model of the language model's
    size; a small one must find more of a step in its thoughts, and costs less.

    Args:
        layers, width, heads: of the decoder; width None: the model's, at most 256.
        max_tokens: maximum tokens per step; later tokens are not learnt.

    Raises:
        ValueError: an option is no integer of at least 1; the width is no multiple of 2 · heads.

    Source: SIM-CoT, https://arxiv.org/abs/2509.20317.

    >>> from mmcoconut.views_mmcoconut import ThoughtView
    >>> objective = StepDecoder(layers=1, width=8, heads=2).make(hidden_size=4, vocab_size=9)
    >>> _ = nn.init.zeros_(objective.decoder.embed_tokens.weight)  # so all of 9 tokens and the end are equally likely
    >>> view = ThoughtView(*[None] * 7, step=torch.tensor([[0]]), place=torch.tensor([[0]]))
    >>> view.thoughts = torch.ones(1, 1, 4)
    >>> objective.loss(view, {"targets": torch.tensor([[[3, 5, END]]])}, None).detach()  # log 10
    tensor([2.3026])
    """

    name: ClassVar[str] = "step_decoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2509.20317"
    fields: ClassVar[tuple[str, ...]] = ("steps",)
    needs_own_thoughts: ClassVar[bool] = True

    def __init__(self, weight=None, *, layers: int = 2, width: int | None = None, heads=4, max_tokens=64):
        super().__init__(weight)
        numbers = {"layers": layers, "heads": heads, "max_tokens": max_tokens, "width": 1 if width is None else width}
        for option, value in numbers.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"objectives.step_decoder.{option}={value!r} must be a whole number of at least 1.")
        if width is not None and width % (2 * heads):
            raise ValueError(
                f"objectives.step_decoder.width={width} is no multiple of {2 * heads}, twice its heads={heads}: set "
                "it to one, or leave it out."
            )
        self.layers, self.width, self.heads, self.max_tokens = layers, width, heads, max_tokens

    @property
    def settings(self) -> dict:
        options = {name: getattr(self, name) for name in ("layers", "width", "heads", "max_tokens")}
        return {**options, "hidden_size": self.reader.in_features, "vocab_size": self.end_id}

    @property
    def end_id(self) -> int:
        """Return the decoder's id of a step's end, after those of the model's vocabulary."""
        return self.decoder.embed_tokens.num_embeddings - 1

    def build(self, model: nn.Module) -> None:
        config = model.config.get_text_config()
        self.make(config.hidden_size, config.vocab_size)

    def make(self, hidden_size: int, vocab_size: int) -> "StepDecoder":
        """Make the decoder for thoughts of hidden_size and a vocabulary, with weights that are the same each time."""
        if self.width is None:
            unit = 2 * self.heads
            self.width = max(unit, min(hidden_size, LARGEST_WIDTH) // unit * unit)
        config = LlamaConfig(
            vocab_size=vocab_size + 1,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            pad_token_id=None,
        )
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(SEED)  # only of the CPU, restored afterwards
            self.reader = nn.Linear(hidden_size, self.width)
            self.decoder = LlamaModel(config)
        return self

    @classmethod
    def load(cls, folder: str | Path) -> "StepDecoder":
        """Load the decoder that a run wrote into its folder `objectives`."""
        settings = json.loads((Path(folder) / f"{cls.name}.json").read_text(encoding="utf-8"))
        sizes = {name: settings.pop(name) for name in ("hidden_size", "vocab_size")}
        made = cls(**settings).make(**sizes)
        made.load_state_dict(load_file(Path(folder) / f"{cls.name}.safetensors"))
        return made.eval()

    def encode(self, batch: RowsOfBatch) -> dict:
        return {"targets": tokens_of_steps(batch, self.max_tokens)}

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return logits (…, V + 1) of the decoder's states (…, W), by its own embeddings."""
        return nn.functional.linear(states, self.decoder.embed_tokens.weight).float()

    def loss(self, view, inputs, run) -> torch.Tensor:
        targets = inputs["targets"]  # (B, S, K)
        prefixes, mask = by_step(view.thoughts, view.step, view.place, targets.shape[1])  # (B, S, C, D), (B, S, C)
        known, has_latents = targets != IGNORED, mask.any(dim=-1)  # (B, S, K), (B, S)
        known = known & has_latents[..., None]
        losses = torch.zeros(targets.shape, device=targets.device)
        if not known.any():  # every process of a run needs gradients of all weights
            unused = sum(weight.sum() * 0 for weight in self.parameters())
            return mean_by_row(losses.flatten(1), known.flatten(1)) + unused
        real, targets = known[has_latents], targets[has_latents]  # (n, K) each
        targets = torch.where(targets < 0, self.end_id, targets)
        embeds = self.reader(prefixes[has_latents].to(self.reader.weight.dtype))  # (n, C, W)
        embeds = torch.cat([embeds, self.decoder.embed_tokens(targets[:, :-1]).to(embeds.dtype)], dim=1)
        seen = torch.cat([mask[has_latents], real[:, :-1]], dim=1)  # (n, C + K - 1)
        states = self.decoder(
            inputs_embeds=embeds,
            attention_mask=seen.long(),
            position_ids=positions_from_mask(seen, seen.shape[1]),
            use_cache=False,
        ).last_hidden_state[:, mask.shape[-1] - 1 :]  # (n, K, W)
        found = nn.functional.cross_entropy(self.logits(states[real]), targets[real], reduction="none")
        return mean_by_row(losses.masked_scatter(known, found).flatten(1), known.flatten(1))

    @torch.no_grad()
    def read(self, thoughts: torch.Tensor, tokenizer) -> list[str]:
        """Return the decoder's greedy text for each of S steps from its C thoughts (S, C, D)."""
        embeds, cache, written = self.reader(thoughts.to(self.reader.weight)), None, []
        for _ in range(self.max_tokens):
            outputs = self.decoder(inputs_embeds=embeds, use_cache=True, **{CACHE: cache})
            cache = outputs[CACHE]
            written.append(self.logits(outputs.last_hidden_state[:, -1]).argmax(dim=-1))  # (S,)
            embeds = self.decoder.embed_tokens(written[-1])[:, None]  # (S, 1, W)
            if (torch.stack(written) == self.end_id).any(dim=0).all():
                break
        rows = torch.stack(written, dim=1).tolist()  # S lists
        rows = [ids[: ids.index(self.end_id)] if self.end_id in ids else ids for ids in rows]
        return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in rows]
