"""Parts of a model by the names in recipes: the end of a path or, in a vision-language model, a role.

    vision_tower             the image encoder, without the projector that some towers contain
    multi_modal_projector    maps the tower's features to embeddings
    language_model           the decoder, without its head

A role is looked up where no part has that name: Qwen2.5-VL's tower is `visual`, and its projector `visual.merger`.
"""

import re

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from mmcoconut.data import nearest
from mmcoconut.vlm_mmcoconut import THOUGHT_MODULES, ThinkingVLM


PROJECTORS_INSIDE = re.compile("merger|projector|connector")


def path_of(model, part: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is part)


def is_named(path: str, name: str) -> bool:
    """Return True if a path ends with a name, in whole components."""
    return path == name or path.endswith(f".{name}")


def _projector_paths(model: ThinkingVLM, tower: nn.Module | None) -> list[str]:
    """Return modules of the base model other than tower and decoder, or else the tower's modules with a usual name."""
    others = {tower, model.get_decoder(), model.get_output_embeddings()}
    beside = [
        child
        for name, child in model.base_model.named_children()
        if name not in THOUGHT_MODULES and not isinstance(child, PreTrainedModel) and not others & {*child.modules()}
    ]
    inside = [] if tower is None else [c for name, c in tower.named_children() if PROJECTORS_INSIDE.search(name)]
    return [path_of(model, child) for child in beside or inside]


def roles_of(model) -> dict[str, list[str]]:
    """Return the paths of modules and parameters by role, for a vision-language model in its own class; else none."""
    if not isinstance(model, ThinkingVLM):
        return {}
    tower = model.get_encoder(modality="image")
    tower = None if tower in (model, model.base_model) else tower
    projector, towers = _projector_paths(model, tower), []
    if tower is not None:
        prefix = path_of(model, tower)
        parts = (*tower.named_children(), *tower.named_parameters(recurse=False))
        paths = [f"{prefix}.{name}" for name, _ in parts]
        towers = [path for path in paths if path not in projector] if {*projector} & {*paths} else [prefix]
    roles = {"vision_tower": towers, "multi_modal_projector": projector}
    return {**roles, "language_model": [path_of(model, model.get_decoder())]}


def paths_named(model, name: str) -> list[str]:
    """Return the paths that a name refers to: modules whose path ends with it, or else a role; empty if unknown."""
    own = [path for path, _ in model.named_modules() if path and is_named(path, name)]
    return own or roles_of(model).get(name, [])


def parameters_named(model, name: str) -> dict[str, nn.Parameter]:
    """Return the parameters that a name refers to, by path."""
    inside = tuple(f"{path}." for path in paths_named(model, name))
    return {path: weight for path, weight in model.named_parameters() if f"{path}.".startswith(inside)}


def nearest_part(model, name: str) -> str:
    """Return the hint of an error message about an unknown part: the nearest name, or all names."""
    base = model.base_model if isinstance(model, PreTrainedModel) else model
    return nearest(name, list(dict.fromkeys([*(part for part, _ in base.named_children()), *roles_of(model)])))
