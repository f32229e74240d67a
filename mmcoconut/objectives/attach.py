"""Attach objectives to a model, so that their losses are computed in its forward.

    attach(model, objectives, processor)
    losses = model(**batch, objective_inputs=…).objective_losses    # {name: (B,)}

The objectives become a sub-module of the model, so that wrappers (DDP) and optimizers see their weights. Two hooks are
added: one takes `objective_inputs` out of a batch and requests the view of the thoughts; the other computes the losses
after the model's own forward. A call without `objective_inputs` does not change. A model is saved, copied and merged
without its objectives.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, make_dataclass
from functools import cache

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mmcoconut.errors import UsageError
from mmcoconut.objectives.base import Objective, Run, without_adapters
from mmcoconut.passes_mmcoconut import READ_ONCE
from mmcoconut.records import OBJECTIVES_FILE
from mmcoconut.vlm_mmcoconut import IMAGE_TOKENS


NAME = "objectives"  # of the sub-module
INPUTS = "objective_inputs"  # of a batch
LOSSES = "objective_losses"  # of an output
OF_ALL = ("steps", "places", "answer_column")  # entries of INPUTS other than those named by objective
OF_A_CALL = ("num_items_in_batch", "logits_to_keep", "alignment_input_ids", "alignment_attention_mask")


@dataclass
class Call:
    """A running call of the model: INPUTS of its batch, and what objectives may request from it."""

    inputs: Mapping
    run: Run


class Objectives(nn.ModuleDict):
    """The objectives of a run by name, and the hooks that run them in their model's forward.

    Args:
        objectives: with their modules.
        text_names: inputs of the model other than images.
    """

    # Set by the trainer: the hooks run outside the context that it puts around the forward.
    autocast: Callable[[], AbstractContextManager] = nullcontext

    def __init__(self, objectives: Sequence[Objective] = (), *, text_names: Sequence[str] = ()):
        super().__init__({objective.name: objective for objective in objectives})
        self.text_names = (*text_names, *OF_A_CALL)
        self.call: Call | None = None

    def __deepcopy__(self, memo) -> "Objectives":
        """Return no objectives: a model is copied without them."""
        return Objectives()

    @property
    def has_weights(self) -> bool:
        return any(True for _ in self.parameters())

    def present(self, inputs: Mapping) -> list[Objective]:
        """Return the objectives that have inputs in this batch."""
        return [objective for name, objective in self.items() if name in inputs]

    def given(self, call: Call) -> dict:
        """Return `given_thoughts` of a training call, if an objective provides them.

        Raises:
            ValueError: two objectives provide them.
        """
        found = {each.name: each.given(call.inputs[each.name], call.run) for each in self.present(call.inputs)}
        found = {name: given for name, given in found.items() if given is not None}
        if len(found) > 1:
            raise UsageError(
                f"objectives {', '.join(found)} each give the thoughts that latents read in training: keep one of "
                "them, or set the others to keep the model's own thoughts."
            )
        return dict(zip(["given_thoughts"], found.values()))

    @torch.compiler.disable
    def before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        """Take INPUTS out of the arguments and request the view instead."""
        self.call = None
        if INPUTS not in kwargs:
            return None
        inputs = kwargs.pop(INPUTS)
        images = {name: value for name, value in kwargs.items() if name not in self.text_names}
        self.call = Call(inputs, Run(model, model.forward, images))
        kwargs["output_view"] = True
        if any(objective.needs_hidden_states for objective in self.present(inputs)):
            kwargs["output_hidden_states"] = True
        if model.training:
            with self.autocast():
                kwargs |= self.given(self.call)
        return args, kwargs

    @torch.compiler.disable
    def after_forward(self, model: nn.Module, args: tuple, kwargs: dict, outputs):
        """Return the output with LOSSES instead of the view."""
        call, self.call = self.call, None
        if call is None:
            return None
        view, inputs = outputs["view"], call.inputs
        view.step, view.place, view.answer_column = (inputs[name] for name in OF_ALL)
        losses = {}
        with self.autocast():
            for objective in self.present(inputs):
                losses[objective.name] = objective.loss(view, inputs[objective.name], call.run)
        for name, loss in losses.items():
            if loss.shape != (len(view.mask),):
                raise ValueError(
                    f"objectives.{name} returned a loss of shape {(*loss.shape,)} for {len(view.mask)} rows: return "
                    "one number per row, (B,)."
                )
        kept = {each.name: outputs.get(each.name) for each in fields(outputs)} | {"view": None}
        made = output_class(type(outputs))
        known = {each.name for each in fields(made)}
        return made(**{name: value for name, value in kept.items() if name in known}, **{LOSSES: losses})


@cache
def output_class(own: type) -> type:
    """Return an output's class with LOSSES among its fields, because wrappers rebuild outputs from their fields."""
    return make_dataclass(own.__name__, [(LOSSES, dict | None, None)], bases=(own,))


def reads_images_in_text(model: nn.Module) -> bool:
    """Return True if image features are among the columns of a model's text."""
    model = without_adapters(model)
    beside = model.config.is_encoder_decoder or getattr(model.base_model, "cross_attends", False)
    beside = beside or not {*READ_ONCE}.isdisjoint(model.get_decoder().own_arguments)
    return not beside and any(getattr(model.config, name, None) is not None for name in IMAGE_TOKENS)


def check_images(model: nn.Module, objectives: Sequence[Objective]) -> None:
    """Raise if an objective reads image features in the text, but the model reads them elsewhere.

    Raises:
        ValueError: names the first such objective.
    """
    kind = type(without_adapters(model)).__name__
    for objective in objectives:
        if objective.needs_images and not reads_images_in_text(model):
            raise UsageError(
                f"objectives.{objective.name} reads image features in the text, but this {kind} reads its images by "
                "cross-attention or in an encoder: remove it, or set image_fusion to 'replace'."
            )


def attach(model: nn.Module, objectives: Sequence[Objective], processor) -> Objectives:
    """Build objectives' modules in a model's dtype and on its device, and compute their losses in its forward.

    Raises:
        ValueError: an objective needs something that this model's view does not hold.
    """
    check_images(model, objectives)
    for objective in objectives:
        with torch.random.fork_rng(devices=[]):  # keeps the run's random numbers unchanged
            objective.build(model)
    names = ("input_ids", "attention_mask", "labels", *processor.prompt_names, *processor.column_names)
    attached = Objectives(objectives, text_names=names).to(model.device, model.dtype)
    model.add_module(NAME, attached)
    model.register_forward_pre_hook(attached.before_forward, with_kwargs=True)
    model.register_forward_hook(attached.after_forward, with_kwargs=True)
    return attached


def attached_to(model: nn.Module) -> Objectives | None:
    """Return the objectives attached to a model."""
    return model._modules.get(NAME)


@contextmanager
def without_objectives(model: nn.Module) -> Iterator[Objectives | None]:
    """Detach the model's objectives inside this context, and yield them."""
    attached = model._modules.pop(NAME, None)
    try:
        yield attached
    finally:
        if attached is not None:
            model._modules[NAME] = attached


def own_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return a model's parameters without those of its objectives."""
    with without_objectives(model):
        return [*model.parameters()]


def save_weights(attached: Objectives, folder) -> None:
    """Write the weights of all objectives into a checkpoint, OBJECTIVES_FILE, if there are any."""
    weights = {name: tensor.contiguous() for name, tensor in attached.state_dict().items()}
    if weights:
        save_file(weights, folder / OBJECTIVES_FILE, metadata={"format": "pt"})


def load_weights(attached: Objectives, folder) -> None:
    """Load the weights of all objectives from a checkpoint.

    Raises:
        ValueError: the checkpoint has no such weights, or others.
    """
    expected, file = attached.state_dict(), folder / OBJECTIVES_FILE
    if not expected:
        return
    remedy = "set `objectives` as when the run was started, or restart with --overwrite true"
    try:
        weights = load_file(file)
    except (FileNotFoundError, SafetensorError) as error:
        raise UsageError(
            f"{folder} has no readable {OBJECTIVES_FILE}, but {', '.join(attached)} have {len(expected)} weights in "
            f"this run: {remedy}."
        ) from error
    other = sorted(weights.keys() ^ expected.keys())
    other = other or [name for name in expected if weights[name].shape != expected[name].shape]
    if other:
        raise UsageError(
            f"The objectives' weights in {file} and the recipe's differ in {len(other)}, such as {other[0]}: {remedy}."
        )
    attached.load_state_dict(weights)
