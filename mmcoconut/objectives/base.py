"""What supervises a thought: the interface of objectives that are added to the loss of the answer.

    loss = ce_loss + Σ weight · mean over the batch's rows of Objective.loss

An objective is a loss on a view of the thoughts (ThoughtView). Where it needs more of a row than the model reads, it
encodes that beside the batch; where it needs weights, they are its sub-modules: trained with the model, kept in its
checkpoints, and never a part of the model that is saved.

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
    """Hold what an objective encodes: the rows of a batch as the collator lays them out.

    rows: of `mmcoconut.data`. steps (B, N), places (B, N): see ThoughtView. counts (B,): latents of each row.
    processor: the layout.
    labelled: called with a function row → RowPlan, returns the same rows and images under other plans, as the model's
        labelled inputs.
    """

    rows: Sequence[Mapping]
    steps: torch.Tensor
    places: torch.Tensor
    counts: torch.Tensor
    processor: object
    labelled: Callable[[Callable[[Mapping], RowPlan]], dict]


def without_adapters(model: nn.Module) -> nn.Module:
    """Return a model in its own class."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def features_reader(model: nn.Module) -> Callable | None:
    """Return the method of a model, with or without adapters, that gives features of images; None without one."""
    return getattr(without_adapters(model).base_model, "get_image_features", None)


@dataclass(frozen=True)
class Run:
    """Give what an objective may ask of the model in training beside the view of the thoughts.

    forward: the model's, called without what attaches objectives to it. images: what it reads of the batch's.
    model: asked for features of other images.
    """

    model: nn.Module
    forward: Callable
    images: Inputs

    def __call__(self, inputs: Mapping):
        """Return the output of another forward of the same model, on inputs and the batch's images."""
        return self.forward(**self.images, **inputs)

    @property
    def without_logits(self) -> dict:
        """The arguments of a forward that makes as few logits as the model can."""
        taken = inspect.signature(without_adapters(self.model).forward).parameters
        return {"logits_to_keep": 1} if "logits_to_keep" in taken else {}

    def image_features(self, images: Inputs) -> torch.Tensor:
        """Return what the decoder would read of other images (F, D), in reading order; no gradients."""
        read = features_reader(self.model)
        taken = inspect.signature(read).parameters
        with torch.no_grad():
            features = read(**{name: value for name, value in images.items() if name in taken})
        features = getattr(features, "pooler_output", features)
        if not isinstance(features, torch.Tensor):
            features = torch.cat([each.flatten(0, -2) for each in features])
        return features.flatten(0, -2).detach()


class Objective(nn.Module):
    """A loss on the thoughts of a batch, beside the answer's.

    Class attributes, of each objective:
        name: in recipes. paper: its address.
        fields: what a row must have, such as `steps` or `boxes`; an option may set it.
        default_weight: the paper's.
        needs_hidden_states: whether the view must hold those of all layers.
        needs_images: whether it reads image features among the columns of the text.
        needs_own_thoughts: whether it teaches nothing where another objective gives what latents read.
        forwards: further forward passes of the model in an update.

    Args:
        weight: of the term; a list gives one a stage, the last number repeating. 0: the term is not computed.
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
            raise ValueError(f"objectives.{self.name}.weight={weight} must be a number of at least 0, or one a stage.")

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
        """Return True if latents read in training what `given` says, in the place of thoughts."""
        return False

    @property
    def settings(self) -> dict:
        """Return the options that make it again, the weight aside; of one with modules with the sizes of these."""
        return {}

    def build(self, model: nn.Module) -> None:
        """Make the modules that the sizes of a model decide; drawn from a generator of their own."""

    def save(self, folder: Path) -> None:
        """Write the modules of this objective into a folder, `<name>.safetensors` and its settings; nothing without.

        They are for whoever examines a run, and never a part of the model.
        """
        if not (weights := self.state_dict()):
            return
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / f"{self.name}.safetensors")
        (folder / f"{self.name}.json").write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")

    def check(self, row: Mapping, processor) -> None:
        """Raise ValueError for a row, with its pictures, that this cannot learn from; asked of all before training.

        That rows have its `fields` is checked without it. processor: the run's.
        """

    def plans(self, plan: RowPlan, num_steps: int) -> Iterable[RowPlan]:
        """Return the other plans that `encode` lays a row of num_steps steps out by, where its stage has `plan`.

        Rows are measured under these too before training, so that none is too long in the middle of a run.
        """
        return ()

    def encode(self, batch: RowsOfBatch) -> dict:
        """Return what `loss` reads of a batch's rows beside the view: tensors with the rows first."""
        return {}

    def given(self, inputs: Inputs, run: Run) -> Callable | None:
        """Return what latents read in training in the place of states, `given_thoughts` of a model's forward."""
        return None

    def loss(self, view: ThoughtView, inputs: Inputs, run: Run) -> torch.Tensor:
        """Return the loss of each row (B,): the mean over what it supervises there, 0 where that is nothing.

        inputs: what `encode` gave. run: the same model on other inputs.
        """
        raise NotImplementedError


def mean_by_row(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the means (B,) of values (B, N) where mask (B, N) is True; 0 where it is True nowhere.

    >>> mean_by_row(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[True, True], [False, False]]))
    tensor([2., 0.])
    """
    return torch.where(mask, values, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
