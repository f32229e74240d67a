"""LoRA through peft: adapters on the language model, and the rows and modules that are new and so trained in full.

peft adds the adapters inside the model, whose class stays what it was. Two forms are saved: the adapter alone, in
peft's own files, and a whole model with the adapter added to its weights, which loads without peft.
Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
"""

import dataclasses
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_peft_available

from mmcoconut.configuration_mmcoconut import TOKEN_ID_FIELDS
from mmcoconut.saving import ordinary_model


if is_peft_available():  # an optional extra; recipes with `lora` are refused without it
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper, load_peft_weights, set_peft_model_state_dict


ADAPTER_FOLDER = "adapter"
ADAPTER_NAME = "default"
# What peft's files put before every name, as if the model stood inside a PeftModel.
FILE_PREFIX = "base_model.model."
# Parts that no pretrained backbone brings.
NEW_PARTS = ("multi_modal_projector", "thought_feed", "stop_head")


def lora_fields() -> set[str]:
    """What a recipe's `lora` may set."""
    return {field.name for field in dataclasses.fields(LoraConfig) if field.init}


def path_of(model, part: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is part)


def linear_layers(model) -> dict[str, nn.Module]:
    """The linear layers of the language model by their path in the whole model; GPT-2's are Conv1D."""
    prefix, decoder = path_of(model, model.get_decoder()), model.get_decoder()
    layers = {path: module for path, module in decoder.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    return {f"{prefix}.{path}": module for path, module in layers.items()}


def lora_config(model, fields: dict) -> "LoraConfig":
    """peft's configuration with these fields; for what they leave out, all linear layers of the language model, the
    rows of the special tokens, and, whatever the fields say, the new parts that `freeze` has left trainable."""
    layers = linear_layers(model)
    names = sorted({path.rpartition(".")[2] for path in layers})
    prefix = re.escape(path_of(model, model.get_decoder()))
    parts = dict(model.model.named_children())
    new_parts = [
        part for part in NEW_PARTS if part in parts and any(p.requires_grad for p in parts[part].parameters())
    ]
    defaults = {
        "target_modules": rf"{prefix}\..*\.({'|'.join(map(re.escape, names))})",
        "trainable_token_indices": sorted(getattr(model.config, field) for field in TOKEN_ID_FIELDS),
        "fan_in_fan_out": any(isinstance(layer, Conv1D) for layer in layers.values()),
    }
    modules_to_save = list(dict.fromkeys([*new_parts, *(fields.get("modules_to_save") or [])]))
    return LoraConfig(**{**defaults, **fields, "modules_to_save": modules_to_save or None})


def add_lora(model, fields: dict) -> None:
    """Put a fresh adapter into the model and stop the gradients of everything else, but for the new rows and parts."""
    model.add_adapter(lora_config(model, fields), ADAPTER_NAME)


@contextmanager
def without_adapters(model):
    """Inside, the model is what it was before `add_lora`.

    The library's own disable_adapters() and enable_adapters() leave the parts that are trained in full switched off.
    """
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)]
    for module in adapted:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in adapted:
            module.enable_adapters(True)


def load_adapter(model, folder: str | Path) -> None:
    """Set the adapter of a model that has one to the values saved in a folder.

    Raises:
        ValueError: a folder without an adapter, or with one of other layers.
    """
    if not Path(folder, "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds no adapter: remove `lora` from the recipe, or resume a run that had it.")
    saved = load_peft_weights(str(folder), device="cpu")
    weights = {name.removeprefix(FILE_PREFIX): weight for name, weight in saved.items()}
    expected = model.get_adapter_state_dict(ADAPTER_NAME).keys()
    if weights.keys() != expected:
        other = sorted(weights.keys() ^ expected)
        raise ValueError(
            f"The adapter in {folder} and the recipe's differ in {len(other)} weights, such as {other[0]}: set `lora` "
            "and `freeze` as the run was started with."
        )
    set_peft_model_state_dict(model, weights, ADAPTER_NAME)


def merged_weights(layer: "BaseTunerLayer") -> dict[str, torch.Tensor]:
    """The layer's own weights with its adapter added; the layer keeps what it has, to the bit."""
    base = layer.get_base_layer()
    own = {name: parameter.data for name, parameter in base.named_parameters()}
    layer.merge(safe_merge=True)  # into copies
    merged = {name: parameter.data for name, parameter in base.named_parameters()}
    for name, parameter in base.named_parameters():
        parameter.data = own[name]
    layer.merged_adapters.clear()
    return merged


def merged_model(model):
    """A model of the same class without adapters, with theirs added to the weights; the rest is shared, not copied."""
    weights = model.state_dict()
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            path = path.removesuffix(".token_adapter")
            weights |= {f"{path}.{name}": tensor for name, tensor in merged_weights(module).items()}
        elif isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[ADAPTER_NAME].state_dict()
            weights |= {f"{path}.{name}": tensor for name, tensor in trained.items()}
    return ordinary_model(type(model), model, weights)
