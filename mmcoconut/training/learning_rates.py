"""Learning rates of their own for parts of a model, such as a vision tower and a decoder of different age."""

from collections.abc import Mapping

import torch
from torch import nn

from mmcoconut.data import nearest


def part_of(path: str, parts) -> str | None:
    """The most specific of the named parts that a parameter's path lies in; a part is named by the end of its path.

    >>> part_of("model.vision_tower.encoder.weight", ["vision_tower", "vision_tower.encoder"])
    'vision_tower.encoder'
    """
    found = [part for part in parts if f".{part}." in f".{path}."]
    return max(found, key=len, default=None)


def set_learning_rates(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Split the optimizer's groups so that parameters in a named part have its rate and the others keep theirs.

    Raises:
        ValueError: a part that no trained parameter lies in.
    """
    part = {parameter: part_of(path, rates) for path, parameter in model.named_parameters()}
    trained = {part[parameter] for group in optimizer.param_groups for parameter in group["params"]}
    for name in rates.keys() - trained:
        parts = [path for path, _ in model.base_model.named_children()]
        raise ValueError(f"learning_rates: no trained parameter lies in {name!r}: {nearest(name, parts)}")
    groups = []
    for group in optimizer.param_groups:
        for name in dict.fromkeys(part[parameter] for parameter in group["params"]):
            parameters = [parameter for parameter in group["params"] if part[parameter] == name]
            groups.append({**group, "params": parameters, "lr": rates.get(name, group["lr"])})
    optimizer.param_groups[:] = groups
