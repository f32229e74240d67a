"""Put objectives into the forward of the model that they train: what they compute is a part of that call.

    attach(model, objectives, processor)
    losses = model(**batch, objective_inputs=…).objective_losses    # {name: (B,)}

The objectives become a sub-module of the model, so that whatever wraps it (DDP) and whatever updates it knows their
weights, and two hooks: one takes `objective_inputs` out of a batch and asks for the view of the thoughts, the other
computes the losses when the model's own forward has ended. A call without `objective_inputs` is what it was before.
A model is saved, copied and merged without them.
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
OF_ALL = ("steps", "places", "answer_column")  # of INPUTS, beside those by the objectives' names
OF_A_CALL = ("num_items_in_batch", "logits_to_keep", "alignment_input_ids", "alignment_attention_mask")


@dataclass
class Call:
    """A call of the model that is going on: INPUTS of its batch, and what objectives may ask of it."""

    inputs: Mapping
    run: Run


class Objectives(nn.ModuleDict):
    """The objectives of a run by name, and the hooks that run them with the model they stand in.

    Args:
        objectives: with their modules.
        text_names: inputs of the model that are no images.
    """

    # Set by the trainer: the hooks run outside of what it puts around the forward.
    autocast: Callable[[], AbstractContextManager] = nullcontext

    def __init__(self, objectives: Sequence[Objective] = (), *, text_names: Sequence[str] = ()):
        super().__init__({objective.name: objective for objective in objectives})
        self.text_names = (*text_names, *OF_A_CALL)
        self.call: Call | None = None

    def __deepcopy__(self, memo) -> "Objectives":
        """Return none: the copy of a model is a model alone."""
        return Objectives()

    @property
    def has_weights(self) -> bool:
        return any(True for _ in self.parameters())

    def present(self, inputs: Mapping) -> list[Objective]:
        """Return the objectives whose term a batch has."""
        return [objective for name, objective in self.items() if name in inputs]

    def given(self, call: Call) -> dict:
        """Return `given_thoughts` of a call in training, if an objective gives some.

        Raises:
            ValueError: two that do.
        """
        found = {each.name: each.given(call.inputs[each.name], call.run) for each in self.present(call.inputs)}
        found = {name: given for name, given in found.items() if given is not None}
        if len(found) > 1:
            raise UsageError(
                f"objectives {', '.join(found)} each give the thoughts that latents read in training: keep one of "
                "them, or let the others leave the model's own thoughts in place."
            )
        return dict(zip(["given_thoughts"], found.values()))

    @torch.compiler.disable
    def before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        """Take INPUTS out of the arguments and ask for the view in their place."""
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
        """Return the output with LOSSES in the place of the view."""
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
                    "one number a row, (B,)."
                )
        kept = {each.name: outputs.get(each.name) for each in fields(outputs)} | {"view": None}
        made = output_class(type(outputs))
        known = {each.name for each in fields(made)}
        return made(**{name: value for name, value in kept.items() if name in known}, **{LOSSES: losses})


@cache
def output_class(own: type) -> type:
    """Return an output's class with LOSSES among its fields, which wrappers take apart and put together by these."""
    return make_dataclass(own.__name__, [(LOSSES, dict | None, None)], bases=(own,))


def reads_images_in_text(model: nn.Module) -> bool:
    """Return True if image features stand among the columns of a model's text."""
    model = without_adapters(model)
    beside = model.config.is_encoder_decoder or getattr(model.base_model, "cross_attends", False)
    beside = beside or not {*READ_ONCE}.isdisjoint(model.get_decoder().own_arguments)
    return not beside and any(getattr(model.config, name, None) is not None for name in IMAGE_TOKENS)


def check_images(model: nn.Module, objectives: Sequence[Objective]) -> None:
    """Refuse objectives that read image features in the text, of a model which reads them elsewhere.

    Raises:
        ValueError: names the first one.
    """
    kind = type(without_adapters(model)).__name__
    for objective in objectives:
        if objective.needs_images and not reads_images_in_text(model):
            raise UsageError(
                f"objectives.{objective.name} reads image features in the text, and this {kind} reads its images "
                "beside it (cross-attention or an encoder does): remove it, or take image_fusion 'replace'."
            )


def attach(model: nn.Module, objectives: Sequence[Objective], processor) -> Objectives:
    """Build the modules of objectives in a model's dtype and on its device, and let its forward compute their losses.

    Raises:
        ValueError: an objective that cannot read what this model's view holds.
    """
    check_images(model, objectives)
    for objective in objectives:
        with torch.random.fork_rng(devices=[]):  # a run draws the same without it
            objective.build(model)
    names = ("input_ids", "attention_mask", "labels", *processor.prompt_names, *processor.column_names)
    attached = Objectives(objectives, text_names=names).to(model.device, model.dtype)
    model.add_module(NAME, attached)
    model.register_forward_pre_hook(attached.before_forward, with_kwargs=True)
    model.register_forward_hook(attached.after_forward, with_kwargs=True)
    return attached


def attached_to(model: nn.Module) -> Objectives | None:
    """Return the objectives that stand in a model."""
    return model._modules.get(NAME)


@contextmanager
def without_objectives(model: nn.Module) -> Iterator[Objectives | None]:
    """Inside, the model has no objectives; what is yielded is what it had."""
    attached = model._modules.pop(NAME, None)
    try:
        yield attached
    finally:
        if attached is not None:
            model._modules[NAME] = attached


def own_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model without those of its objectives."""
    with without_objectives(model):
        return [*model.parameters()]


def save_weights(attached: Objectives, folder) -> None:
    """Write the weights of all objectives into a checkpoint, OBJECTIVES_FILE, if there are any."""
    weights = {name: tensor.contiguous() for name, tensor in attached.state_dict().items()}
    if weights:
        save_file(weights, folder / OBJECTIVES_FILE, metadata={"format": "pt"})


def load_weights(attached: Objectives, folder) -> None:
    """Set the weights of all objectives to those of a checkpoint.

    Raises:
        ValueError: a checkpoint without them, or with others.
    """
    expected, file = attached.state_dict(), folder / OBJECTIVES_FILE
    if not expected:
        return
    remedy = "set `objectives` as the run was started with, or start anew with --overwrite true"
    try:
        weights = load_file(file)
    except (FileNotFoundError, SafetensorError) as error:
        raise UsageError(
            f"{folder} has no readable {OBJECTIVES_FILE}, and {', '.join(attached)} have {len(expected)} weights in "
            f"this run: {remedy}."
        ) from error
    other = sorted(weights.keys() ^ expected.keys())
    other = other or [name for name in expected if weights[name].shape != expected[name].shape]
    if other:
        raise UsageError(
            f"The objectives' weights in {file} and the recipe's differ in {len(other)}, such as {other[0]}: {remedy}."
        )
    attached.load_state_dict(weights)
