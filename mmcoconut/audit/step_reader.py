"""What a run's step decoder reads in thoughts: the text of the step that each stands for.

It was trained beside the model to write steps out of thoughts (SIM-CoT, mmcoconut/objectives/step_decoder.py), and is
in the run's folder. So it shows what a trained reader finds in thoughts; the logit lens, what the model's own head
would write.
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
    """A decoder of steps, and how many thoughts stand for a step."""

    decoder: StepDecoder
    thoughts_per_step: int

    @classmethod
    def beside(cls, model: str | Path) -> "StepReader | None":
        """Load the step decoder beside a checkpoint; None where its folder holds none, or it is on the Hub."""
        folder, recipe = Path(model, OBJECTIVES_FOLDER), Path(model, RECIPE_FILE)
        if not (folder / f"{StepDecoder.name}.safetensors").is_file():
            return None
        said = read_recipe(recipe) if recipe.is_file() else {}
        return cls(StepDecoder.load(folder), said.get("c_thought") or default_of("c_thought"))

    def read(self, thoughts: torch.Tensor, tokenizer) -> list[str]:
        """Return the text of each step that the thoughts (N, D) of a row stand for, in order."""
        steps = thoughts.split(self.thoughts_per_step)  # (C, D) each, of the last perhaps fewer
        whole = [step for step in steps if len(step) == self.thoughts_per_step]
        groups = [group for group in (whole, steps[len(whole) :]) if group]
        return [text for group in groups for text in self.decoder.read(torch.stack(tuple(group)), tokenizer)]
