"""Decode thoughts with a run's step decoder: the text of the step that each group of thoughts replaces.

It was trained together with the model to write steps from thoughts (SIM-CoT, mmcoconut/objectives/step_decoder.py),
and is in the run's folder. It shows what a trained decoder finds in thoughts; the logit lens shows what the model's
own head would write.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from mmcoconut.arguments.fields import default_of
from mmcoconut.arguments.recipes import read_recipe
from mmcoconut.objectives.step_decoder import StepDecoder
from mmcoconut.records import OBJECTIVES_FOLDER, RECIPE_FILE


@dataclass
class StepReader:
    """A decoder of steps, and the number of thoughts per step."""

    decoder: StepDecoder
    thoughts_per_step: int

    @classmethod
    def beside(cls, model: str | Path) -> "StepReader | None":
        """Load the step decoder next to a checkpoint; None if its folder has none, or it is on the Hub."""
        folder, recipe = Path(model, OBJECTIVES_FOLDER), Path(model, RECIPE_FILE)
        if not (folder / f"{StepDecoder.name}.safetensors").is_file():
            return None
        said = read_recipe(recipe) if recipe.is_file() else {}
        return cls(StepDecoder.load(folder), said.get("c_thought") or default_of("c_thought"))

    def read(self, thoughts: torch.Tensor, tokenizer) -> list[str]:
        """Return the text of each step that a row's thoughts (N, D) replace, in order."""
        steps = thoughts.split(self.thoughts_per_step)  # (C, D) each, the last perhaps shorter
        whole = [step for step in steps if len(step) == self.thoughts_per_step]
        groups = [group for group in (whole, steps[len(whole) :]) if group]
        return [text for group in groups for text in self.decoder.read(torch.stack(tuple(group)), tokenizer)]
