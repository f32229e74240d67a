"""LoRA through peft: adapters on the language model; new rows and modules are trained in full.

peft adds the adapters inside the model, which keeps its class. Two forms are saved: the adapter alone, in peft's
format, and a whole model with the adapter merged into its weights, which loads without peft.
Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
"""

import dataclasses
import re
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_peft_available

from mmcoconut.configuration_mmcoconut import TOKEN_ID_FIELDS
from mmcoconut.data import nearest
from mmcoconut.errors import UsageError
from mmcoconut.records import read_json
from mmcoconut.training.parts import is_named, path_of, paths_named
from mmcoconut.training.saving import ordinary_model
from mmcoconut.vlm_mmcoconut import THOUGHT_MODULES, ThinkingVLM


if is_peft_available():  # an optional extra; recipes with `lora` are refused without it
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper, load_peft_weights, set_peft_model_state_dict


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_NAME = "default"
# Prefix of every name in peft's files, as if the model were inside a PeftModel.
FILE_PREFIX = "base_model.model."
# Parts that no pretrained backbone includes; a vision-language model in its own class has a projector.
NEW_PARTS = ("multi_modal_projector", *THOUGHT_MODULES)
ALL_LINEAR = "all-linear"
# Fields of an adapter's configuration that define its weights and how they are read.
SHAPING = ("r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save", "trainable_token_indices")
SHAPING += ("bias", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform")


def linear_layers(model) -> dict[str, nn.Module]:
    """Return the linear layers of the language model by their full path in the model; GPT-2's are Conv1D."""
    prefix, decoder = path_of(model, model.get_decoder()), model.get_decoder()
    layers = {path: module for path, module in decoder.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    return {f"{prefix}.{path}": module for path, module in layers.items()}


def targets(model, wanted: str | list[str] | None) -> dict:
    """Return peft's `target_modules` and `exclude_modules`; a bare name means layers of the language model.

    Names with a dot and regular expressions apply to the whole model, as in peft.

    Raises:
        ValueError: the language model has no layer of that bare name; lists the existing names.
    """
    layers = linear_layers(model)
    known = sorted({path.rpartition(".")[2] for path in layers})
    prefix = path_of(model, model.get_decoder())
    if wanted in (None, ALL_LINEAR):
        return {"target_modules": rf"{re.escape(prefix)}\..*\.({'|'.join(map(re.escape, known))})"}
    if isinstance(wanted, str) and not wanted.isidentifier():
        return {"target_modules": wanted}
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    bare, full = [name for name in wanted if "." not in name], [name for name in wanted if "." in name]
    paths = [path for path, _ in model.named_modules()]
    inside = [path for path in paths if path.startswith(f"{prefix}.")]
    for name in bare:
        if not any(is_named(path, name) for path in inside):
            raise UsageError(
                f"lora.target_modules: the language model has no layer {name!r}: {nearest(name, known)}. Name layers "
                "of other parts by a longer name, such as encoder.layers.0.self_attn.q_proj, or by a regular "
                "expression."
            )
    outside = [path for path in paths if path not in inside and any(is_named(path, name) for name in bare)]
    excluded = [path for path in outside if not any(is_named(path, name) for name in full)]
    return {"target_modules": wanted, **({"exclude_modules": excluded} if excluded else {})}


def merged_exclusions(ours: list[str], own: str | list[str] | None) -> str | list[str]:
    """Return the union of two exclusions in peft's format."""
    if not isinstance(own, str):
        return [*ours, *(own or [])]
    return "|".join([f"({own})", *map(re.escape, ours)])


def names_of_modules(paths: list[str]) -> set[str]:
    """Return the last components of paths, without layer numbers."""
    return {name for path in paths if not (name := path.rpartition(".")[2]).isdigit()}


def token_rows(model, fields: dict, *, whole: bool, tied: bool) -> list[int] | None:
    """Return the embedding rows to train: by default those of the special tokens.

    Return None with `whole`, because the table is trained in full. If the head is tied to it, return all rows,
    because peft keeps single rows tied but not whole modules.

    Raises:
        ValueError: rows are named although the whole table is trained.
    """
    num_rows, named = len(model.get_input_embeddings().weight), fields.get("trainable_token_indices")
    if whole and named:
        raise UsageError(
            f"lora.trainable_token_indices names {len(named)} rows of the embedding, and lora.modules_to_save = "
            f"{fields['modules_to_save']} trains all {num_rows}: remove one of the two."
        )
    if whole:
        return list(range(num_rows)) if tied else None
    new = TOKEN_ID_FIELDS[1:] if isinstance(model, ThinkingVLM) else TOKEN_ID_FIELDS  # it has an image's token
    return fields.get("trainable_token_indices", sorted(getattr(model.config, field) for field in new))


def trained_in_full(model, fields: dict) -> dict:
    """Return peft's `modules_to_save` and `trainable_token_indices`; trained new parts are always included.

    Raises:
        ValueError: no module of that name.
    """
    wanted, paths = [], [path for path, _ in model.named_modules() if path]
    for name in fields.get("modules_to_save") or []:
        known = any(is_named(path, name) for path in paths)
        found = [name] if known else [path for path in paths_named(model, name) if path in paths]
        if not found:
            raise UsageError(f"lora.modules_to_save: no module {name!r}: {nearest(name, names_of_modules(paths))}")
        wanted += found
    parts = dict(model.base_model.named_children())
    names = THOUGHT_MODULES if isinstance(model, ThinkingVLM) else NEW_PARTS
    new = [part for part in names if part in parts and any(p.requires_grad for p in parts[part].parameters())]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    tables = [path_of(model, embedding), *([path_of(model, head)] if tied else [])]
    whole = [name for name in wanted if any(is_named(path, name) for path in tables)]
    names = [name for name in dict.fromkeys([*new, *wanted]) if not (tied and name in whole)]
    rows = token_rows(model, fields, whole=bool(whole), tied=tied)
    return {"modules_to_save": names or None, "trainable_token_indices": rows}


def lora_config(model, fields: dict) -> "LoraConfig":
    """Return peft's configuration with these fields. Defaults: all linear layers of the language model, and the rows
    of the special tokens; new parts that `freeze` leaves trainable are always included.

    Raises:
        ValueError: names that the model does not have.
    """
    named = targets(model, fields.get("target_modules"))
    if "exclude_modules" in named:
        named["exclude_modules"] = merged_exclusions(named["exclude_modules"], fields.get("exclude_modules"))
    defaults = {"fan_in_fan_out": any(isinstance(layer, Conv1D) for layer in linear_layers(model).values())}
    return LoraConfig(**{**defaults, **fields, **named, **trained_in_full(model, fields)})


def describe_trained(path: str, module: nn.Module) -> str:
    """Return the path of a part that is trained in full; for an embedding with the number of its rows."""
    if isinstance(module, ModulesToSaveWrapper):
        return path
    return f"{len(module.token_indices[ADAPTER_NAME])} rows of {path.removesuffix('.token_adapter')}"


def describe_adapters(model) -> str:
    """Return a line with the number of adapted layers per part, and the parts that are trained in full."""
    found, whole = {}, []
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            part = next((name for name, _ in model.base_model.named_children() if f".{name}." in f".{path}."), "model")
            found.setdefault(part, Counter())[path.rpartition(".")[2]] += 1
        elif isinstance(module, ModulesToSaveWrapper | TrainableTokensLayer):
            whole.append(describe_trained(path, module))
    parts = [
        f"{sum(names.values())} layers of {part} ({', '.join(f'{number} {name}' for name, number in names.items())})"
        for part, names in found.items()
    ]
    return f"adapters on {'; '.join(parts)}; trained in full: {', '.join(whole) or 'nothing'}"


def add_lora(model, fields: dict) -> None:
    """Add a new adapter to the model and stop all other gradients, except for the new rows and parts.

    Uses peft's own function: the method of transformers 5.24 requires peft 0.22, which is not published, and needs
    nothing from it.
    """
    config = lora_config(model, fields)
    config.base_model_name_or_path = model.name_or_path
    inject_adapter_in_model(config, model, ADAPTER_NAME)


def has_lora(model) -> bool:
    return is_peft_available() and any(isinstance(module, BaseTunerLayer) for module in model.modules())


def save_adapter(model, folder: Path) -> None:
    """Write a model's adapter in peft's format, so that `PeftModel.from_pretrained` reads it too."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    weights = {f"{FILE_PREFIX}{name}": weight.contiguous() for name, weight in weights.items()}
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    dataclasses.replace(model.peft_config[ADAPTER_NAME], inference_mode=True).save_pretrained(folder)


@contextmanager
def without_adapters(model):
    """Within this context the model is as before `add_lora`.

    transformers' disable_adapters() and enable_adapters() leave the parts that are trained in full disabled.
    """
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)]
    for module in adapted:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in adapted:
            module.enable_adapters(True)


def settings_of(config: dict) -> dict:
    """Return the settings that define an adapter, from peft's configuration as JSON or as an object."""
    values = {key: config.get(key) for key in SHAPING}
    return {key: sorted(value) if isinstance(value, set | list) else value for key, value in values.items()}


def check_adapter(model, folder: Path) -> None:
    """Refuse an adapter whose settings differ from the model's.

    Raises:
        ValueError: names each setting with both values.
    """
    saved = settings_of(read_json(folder / ADAPTER_CONFIG))
    present = settings_of(model.peft_config[ADAPTER_NAME].to_dict())
    keys = [key for key in SHAPING if saved[key] != present[key]]
    changed = [f"{key} is {saved[key]!r} there and {present[key]!r} here" for key in keys]
    if changed:
        raise UsageError(
            f"The adapter in {folder} differs from the recipe's: {'; '.join(changed)}. Set `lora` and `freeze` as the "
            "run was started with."
        )


def check_whole_model(folder: str | Path) -> None:
    """Refuse a checkpoint that holds only an adapter, for a model that has none.

    Raises:
        ValueError: names its settings.
    """
    file = Path(folder, ADAPTER_CONFIG)
    if file.is_file():
        saved = read_json(file)
        raise UsageError(
            f"{folder} holds an adapter with r = {saved['r']}, lora_alpha = {saved['lora_alpha']}, and the recipe's "
            "`lora` is not set: set it as the run was started with."
        )


def load_adapter(model, folder: str | Path) -> None:
    """Load an adapter from a folder into a model that has one.

    Raises:
        ValueError: the folder has no adapter, or one with other settings or layers.
    """
    if not Path(folder, ADAPTER_CONFIG).is_file():
        raise UsageError(f"{folder} holds no adapter: remove `lora` from the recipe, or resume a run that had it.")
    check_adapter(model, Path(folder))
    saved = load_peft_weights(str(folder), device="cpu")
    weights = {name.removeprefix(FILE_PREFIX): weight for name, weight in saved.items()}
    expected = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False).keys()
    if weights.keys() != expected:
        other = sorted(weights.keys() ^ expected)
        raise UsageError(
            f"The adapter in {folder} and the recipe's differ in {len(other)} weights, such as {other[0]}: set `lora` "
            "and `freeze` as the run was started with."
        )
    set_peft_model_state_dict(model, weights, ADAPTER_NAME)


def merged_weights(layer: "BaseTunerLayer") -> dict[str, torch.Tensor]:
    """Return the layer's weights with its adapter merged; the layer itself is unchanged, bit for bit."""
    base = layer.get_base_layer()
    own = {name: parameter.data for name, parameter in base.named_parameters()}
    layer.merge(safe_merge=True)  # merges into copies
    merged = {name: parameter.data for name, parameter in base.named_parameters()}
    for name, parameter in base.named_parameters():
        parameter.data = own[name]
    layer.merged_adapters.clear()
    return merged


def merged_model(model):
    """Return a model of the same class with its adapters merged into the weights; other tensors are shared."""
    weights = model.state_dict()
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            path = path.removesuffix(".token_adapter")
            weights |= {f"{path}.{name}": tensor for name, tensor in merged_weights(module).items()}
        elif isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[ADAPTER_NAME].state_dict()
            weights |= {f"{path}.{name}": tensor for name, tensor in trained.items()}
    return ordinary_model(type(model), model, weights)
