"""The interface of objectives: losses on thoughts that are added to the loss of the answer.

    loss = ce_loss + Σ weight · mean over the batch's rows of Objective.loss

An objective is a loss on a view of the thoughts (ThoughtView). If it needs data that the model does not read, it
encodes them with the batch. If it needs weights, they are its sub-modules: trained with the model, kept in training
checkpoints, and never part of the saved model.

Shapes: B rows, N latents, D hidden.
"""

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import nn

from mmcoconut.data.targets import RowPlan
from mmcoconut.views_mmcoconut import ThoughtView


Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class RowsOfBatch:
    """The rows of a batch in the collator's layout, for objectives to encode.

    rows: of `mmcoconut.data`. steps (B, N), places (B, N): see ThoughtView. counts (B,): latents of each row.
    processor: the layout.
    labelled: called with a function row → RowPlan, returns the model's labelled inputs for the same rows and images
        under these plans.
    """

    rows: Sequence[Mapping]
    steps: torch.Tensor
    places: torch.Tensor
    counts: torch.Tensor
    processor: object
    labelled: Callable[[Callable[[Mapping], RowPlan]], dict]


def without_adapters(model: nn.Module) -> nn.Module:
    """Return the model inside adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def features_reader(model: nn.Module) -> Callable | None:
    """Return a model's method for image features, with or without adapters; None if it has none."""
    return getattr(without_adapters(model).base_model, "get_image_features", None)


@dataclass(frozen=True)
class Run:
    """Access to the model in training, for objectives that need more than the view of the thoughts.

    forward: the model's, without the objectives' hooks. images: the batch's image inputs.
    model: computes features of other images.
    """

    model: nn.Module
    forward: Callable
    images: Inputs

    def __call__(self, inputs: Mapping):
        """Return the output of another forward of the same model, on inputs and the batch's images."""
        return self.forward(**self.images, **inputs)

    @property
    def without_logits(self) -> dict:
        """Return the arguments of a forward with as few logits as the model allows."""
        taken = inspect.signature(without_adapters(self.model).forward).parameters
        return {"logits_to_keep": 1} if "logits_to_keep" in taken else {}

    def image_features(self, images: Inputs) -> torch.Tensor:
        """Return the features (F, D) that the decoder would read of other images, in reading order; no gradients."""
        read = features_reader(self.model)
        taken = inspect.signature(read).parameters
        with torch.no_grad():
            features = read(**{name: value for name, value in images.items() if name in taken})
        features = getattr(features, "pooler_output", features)
        if not isinstance(features, torch.Tensor):
            features = torch.cat([each.flatten(0, -2) for each in features])
        return features.flatten(0, -2).detach()


class Objective(nn.Module):
    """A loss on the thoughts of a batch, added to the answer's loss.

    Class attributes, of each objective:
        name: in recipes. paper: its address.
        fields: required fields of a row, such as `steps` or `boxes`; an option may set it.
        default_weight: the paper's.
        needs_hidden_states: whether the view must hold the hidden states of all layers.
        needs_images: whether it reads image features among the columns of the text.
        needs_own_thoughts: whether it is ineffective if another objective provides what latents read.
        forwards: additional forward passes of the model per update.

    Args:
        weight: of the term; a list gives one per stage, the last number repeating. 0: the term is not computed.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    fields: ClassVar[tuple[str, ...]] = ()
    default_weight: ClassVar[float] = 1.0
    needs_hidden_states: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False
    needs_own_thoughts: ClassVar[bool] = False
    forwards: ClassVar[int] = 0

    def __init__(self, weight: float | Sequence[float] | None = None):
        super().__init__()
        weight = self.default_weight if weight is None else weight
        self.weights = [weight] if isinstance(weight, (int, float)) else [*weight]
        if not self.weights or min(self.weights) < 0:
            raise ValueError(
                f"objectives.{self.name}.weight={weight} must be a number of at least 0, or one per stage."
            )

    def weight_at(self, stage: int) -> float:
        """Return the weight of the term at a stage.

        >>> class Nothing(Objective):
        ...     name = "nothing"
        >>> [Nothing(weight=[0, 0.5]).weight_at(stage) for stage in range(4)], Nothing().weight_at(0)
        ([0, 0.5, 0.5, 0.5], 1.0)
        """
        return self.weights[min(stage, len(self.weights) - 1)]

    @property
    def is_used(self) -> bool:
        """Return True if the term has a weight at any stage."""
        return max(self.weights) > 0

    @property
    def gives_thoughts(self) -> bool:
        """Return True if in training latents read the vectors of `given` instead of thoughts."""
        return False

    @property
    def settings(self) -> dict:
        """Return the options to recreate it, without the weight; with modules, also their sizes."""
        return {}

    def build(self, model: nn.Module) -> None:
        """Make the modules whose sizes depend on the model, with a separate random generator."""

    def save(self, folder: Path) -> None:
        """Write this objective's modules, if any, and settings into a folder, as `<name>.safetensors`.

        They are for examining a run, and never part of the model.
        """
        if not (weights := self.state_dict()):
            return
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / f"{self.name}.safetensors")
        (folder / f"{self.name}.json").write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")

    def check(self, row: Mapping, processor) -> None:
        """Raise ValueError for a row, with its pictures, that this cannot learn from; called for all before training.

        The presence of `fields` is checked elsewhere. processor: the run's.
        """

    def plans(self, plan: RowPlan, num_steps: int) -> Iterable[RowPlan]:
        """Return the additional plans with which `encode` lays out a row of num_steps steps at the stage of `plan`.

        Rows are also measured under these before training, so that a run does not fail halfway on a long row.
        """
        return ()

    def encode(self, batch: RowsOfBatch) -> dict:
        """Return the inputs of `loss` other than the view: tensors with rows as the first axis."""
        return {}

    def given(self, inputs: Inputs, run: Run) -> Callable | None:
        """Return the vectors that latents read in training instead of states: `given_thoughts` of the forward."""
        return None

    def loss(self, view: ThoughtView, inputs: Inputs, run: Run) -> torch.Tensor:
        """Return the loss of each row (B,): the mean over its supervised items, 0 if there are none.

        inputs: output of `encode`. run: the same model, for other inputs.
        """
        raise NotImplementedError


def mean_by_row(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the means (B,) of values (B, N) where mask (B, N) is True; 0 if it is True nowhere.

    >>> mean_by_row(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[True, True], [False, False]]))
    tensor([2., 0.])
    """
    return torch.where(mask, values, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
