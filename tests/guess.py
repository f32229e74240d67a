"""An objective of the tests that uses all that one may: weights, another forward, states of all layers, thoughts.

Recipes name it guess:Guess. Shapes: B rows, N latents, D hidden.
"""

import torch
from torch import nn

from mmcoconut.data.targets import RowPlan, answer_columns, predicted
from mmcoconut.objectives.base import Objective, mean_by_row


class Guess(Objective):
    """From the state at each latent, a layer of its own guesses the state before the answer of the written row.

    gives: whether latents read zeros in training.
    """

    name = "guess"
    paper = "none"
    fields = ("steps",)
    needs_hidden_states = True
    forwards = 1

    def __init__(self, weight=None, *, gives: bool = False):
        super().__init__(weight)
        self.gives = gives

    @property
    def settings(self) -> dict:
        return {"gives": self.gives}

    def build(self, model) -> None:
        size = model.config.get_text_config().hidden_size
        self.layer = nn.Linear(size, size)
        generator = torch.Generator().manual_seed(0)
        for weight in self.layer.parameters():
            nn.init.uniform_(weight, -0.3, 0.3, generator=generator)

    def plans(self, plan, num_steps):
        return [RowPlan(0, 0)]

    def encode(self, batch) -> dict:
        written = batch.labelled(lambda row: RowPlan(0, 0))
        latents = batch.steps.new_ones(batch.steps.shape, dtype=torch.bool)
        columns = answer_columns(batch.rows, predicted(written.pop("labels"), batch.processor), batch.processor)
        return {"written": written, "column": columns, "latents": latents}

    def given(self, inputs, run):
        if not self.gives:
            return None

        def zeros(read, image_mask):
            latents = inputs["latents"]
            return read.new_zeros(*latents.shape, read.shape[-1]), latents

        return zeros

    def loss(self, view, inputs, run):
        outputs = run({**inputs["written"], "output_view": True})
        rows = torch.arange(len(inputs["column"]))
        wanted = outputs.view.states[rows, inputs["column"]].detach()  # (B, D)
        distances = (self.layer(view.after) - wanted[:, None]).square().mean(dim=-1)  # (B, N)
        return mean_by_row(distances.float(), view.mask) + view.answer_states().float().square().mean(dim=(1, 2))
