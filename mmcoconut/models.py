"""Find the class of a recipe or checkpoint, and load it completely or not at all, with its processor.

A checkpoint has one of the two public classes, or a vision-language model's own class with thoughts, which is
recognized by the fields of its thoughts in config.json.
"""

from collections.abc import Callable
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

from mmcoconut import vlm_mmcoconut, vlm_processing_mmcoconut
from mmcoconut.build.gguf import find_gguf
from mmcoconut.build.timm import MODEL_TYPE as TIMM_MODEL_TYPE
from mmcoconut.build.timm import check_timm
from mmcoconut.configuration_mmcoconut import THOUGHT_FIELDS, MMCoconutConfig
from mmcoconut.errors import UsageError, folder_remedy, is_missing_folder
from mmcoconut.explanations import explain_causes, first_line
from mmcoconut.modeling_mmcoconut import MMCoconutForConditionalGeneration
from mmcoconut.processing_mmcoconut import MMCoconutProcessor
from mmcoconut.seq2seq_mmcoconut import MMCoconutForSeq2SeqLM


def model_class(image_fusion: str) -> type[MMCoconutForConditionalGeneration]:
    """Return the class of a fusion: with `encoder` an encoder-decoder, otherwise a decoder alone."""
    return MMCoconutForSeq2SeqLM if image_fusion == "encoder" else MMCoconutForConditionalGeneration


def is_composed(config: PreTrainedConfig) -> bool:
    """Return True if a model has one of the two public classes, and no vision-language model's own class."""
    return config.model_type == MMCoconutConfig.model_type


class CheckpointError(UsageError):
    """There is no checkpoint of the required kind at this name."""


def _found(key: str, name: str, read: Callable):
    """Return the result of `read()`, which reads the files of a folder or Hub id.

    Raises:
        CheckpointError: the files are missing or cannot be reached.
    """
    if is_missing_folder(name):
        raise CheckpointError(f"{key} = {name!r}: no such folder: {folder_remedy(name)}")
    remedy = "Give an existing folder or a Hub id."
    if (Path(name) / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{key} = {name!r}: it holds only adapters. Give the run's whole model, its output_dir or "
            "stages/stage-s in it, or resume the run with `resume_from_checkpoint`."
        )
    try:
        found = read()
    except OSError as error:
        explained = explain_causes(error)
        reason = first_line(error) if explained is None else explained.text
        if explained is not None and explained.status in (401, 403):
            remedy = ""  # the name is right
        raise CheckpointError(f"{key} = {name!r}: {reason} {remedy}".rstrip()) from error
    if not found:
        raise CheckpointError(f"{key} = {name!r}: there is no config.json. {remedy}")
    return found


def _config_values(key: str, name: str, revision: str | None = None) -> dict:
    """Read the config.json of a folder or Hub id."""
    options = {} if revision is None else {"revision": revision}
    return _found(key, name, lambda: PreTrainedConfig.get_config_dict(name, **options)[0])


def read_config(name: str, *, revision: str | None = None) -> PreTrainedConfig:
    """Read the configuration of a checkpoint, a folder or Hub id: MMCoconutConfig, or a vision-language model's own.

    Raises:
        CheckpointError: no such name, or another kind of model.
    """
    values = _config_values("model", name, revision)
    model_type, options = values.get("model_type"), {} if revision is None else {"revision": revision}
    if values.keys() >= THOUGHT_FIELDS.keys() and model_type != MMCoconutConfig.model_type:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
    if model_type != MMCoconutConfig.model_type:
        raise CheckpointError(
            f"model = {name!r} is a {model_type!r}, not an mmcoconut checkpoint. Name the folder or "
            "Hub id of a trained one, or start from this model with `text_model`, `vision_model` or `vlm`."
        )
    return MMCoconutConfig.from_pretrained(name, trust_remote_code=False, **options)


def class_of(config: PreTrainedConfig) -> type:
    """Return the class of a checkpoint with this configuration.

    Raises:
        CheckpointError: this release of transformers does not have the class.
    """
    if isinstance(config, MMCoconutConfig):
        return model_class(config.image_fusion)
    try:
        return getattr(vlm_mmcoconut, (config.architectures or [""])[0])
    except AttributeError as error:
        raise CheckpointError(f"architectures = {config.architectures!r}: {error}") from error


def _checked(check: Callable, *args) -> None:
    """Run a check; raise its errors as CheckpointError."""
    try:
        check(*args)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def check_sources(model_args) -> None:
    """Check that the models that a recipe starts from exist, before anything is built.

    Raises:
        CheckpointError: a missing model.
    """
    gguf_file = model_args.gguf_file
    for key in ("vlm", "vision_model", "text_model"):
        name = getattr(model_args, key)
        of_gguf = key == "text_model" and gguf_file is not None
        values = {} if name is None or of_gguf else _config_values(key, name)
        if values.get("model_type") == TIMM_MODEL_TYPE:
            _checked(check_timm, f"{key} = {name!r}")
    if gguf_file is not None:
        _checked(find_gguf, model_args.text_model, gguf_file)
    name = model_args.tokenizer
    if name not in (None, "train"):
        _found("tokenizer", name, lambda: cached_file(name, "tokenizer_config.json"))


def load_model(name: str, *, dtype="auto", revision: str | None = None, new_parts=(), **config_fields):
    """Load the model of a folder or Hub id; no code from the checkpoint is run.

    Args:
        new_parts: sub-modules that the checkpoint may lack, and that are then initialized.
        config_fields: fields that override the checkpoint's configuration.

    Raises:
        CheckpointError: no checkpoint of that name, or one that lacks weights, which transformers would initialize
            at random.
    """
    options = {"trust_remote_code": False} | ({} if revision is None else {"revision": revision})
    model, info = class_of(read_config(name, revision=revision)).from_pretrained(
        name, dtype=dtype, output_loading_info=True, **options, **config_fields
    )
    missing = sorted(key for key in info["missing_keys"] if not {*key.split(".")} & {*new_parts})
    if missing:
        raise CheckpointError(f"{name} lacks {len(missing)} weights, such as {missing[0]}. Give a whole checkpoint.")
    return model


def load_processor(name: str, *, revision: str | None = None, **options) -> ProcessorMixin:
    """Load the processor of a checkpoint, a folder or Hub id; no code from the checkpoint is run.

    options: of `from_pretrained`, such as backend.
    """
    options |= {"trust_remote_code": False} | ({} if revision is None else {"revision": revision})
    where = {} if revision is None else {"revision": revision}
    own = ProcessorMixin.get_processor_dict(name, **where)[0].get("processor_class", MMCoconutProcessor.__name__)
    if own == MMCoconutProcessor.__name__:
        return MMCoconutProcessor.from_pretrained(name, **options)
    return getattr(vlm_processing_mmcoconut, own).from_pretrained(name, **options)
