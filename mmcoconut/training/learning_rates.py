"""Separate learning rates for parts of a model, such as vision tower and decoder."""

from collections.abc import Mapping

import torch
from torch import nn

from mmcoconut.errors import UsageError
from mmcoconut.training.parts import nearest_part, parameters_named


def parts_of_parameters(model: nn.Module, names) -> dict[nn.Parameter, str]:
    """Return the named part of each parameter; in several, the part with the fewest parameters."""
    found = {name: parameters_named(model, name) for name in names}
    order = sorted(found, key=lambda name: (-len(found[name]), len(name)))
    return {parameter: name for name in order for parameter in found[name].values()}


def set_learning_rates(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Split the optimizer's groups so that parameters of a named part use its rate and the others keep theirs.

    Raises:
        ValueError: a part without trained parameters.
    """
    part = parts_of_parameters(model, rates)
    trained = {part.get(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name in rates.keys() - trained:
        frozen = "all are frozen: remove it here or from `freeze`; with `lora` name it in lora.modules_to_save"
        remedy = frozen if parameters_named(model, name) else nearest_part(model, name)
        raise UsageError(f"learning_rates: no trained parameter lies in {name!r}: {remedy}")
    groups = []
    for group in optimizer.param_groups:
        for name in dict.fromkeys(part.get(parameter) for parameter in group["params"]):
            parameters = [parameter for parameter in group["params"] if part.get(parameter) == name]
            groups.append({**group, "params": parameters, "lr": rates.get(name, group["lr"])})
    optimizer.param_groups[:] = groups
