"""Thoughts for any vision-language model of transformers, in its own class: `from_vlm`.

The requirements are checked through transformers' own interfaces, so that models of later releases need no code here;
`reason_against` says what a model lacks. What interfaces do not show is checked by running it, see check.py.
"""

import difflib
import inspect
import logging
from types import SimpleNamespace

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from mmcoconut.build.check import check_thoughts, inputs_of_check
from mmcoconut.build.models import (
    as_dtype,
    cast_weights,
    generation_config_of,
    load_config,
    settle_tying,
    start_rows,
)
from mmcoconut.build.tokens import add_special_tokens, image_token_of
from mmcoconut.configuration_mmcoconut import (
    THOUGHT_FIELDS,
    THOUGHT_TOKENS,
    TOKEN_ID_FIELDS,
    VERSION,
    check_thought_values,
)
from mmcoconut.errors import UsageError
from mmcoconut.vlm_mmcoconut import ThinkingVLM, give_thoughts_to_vlm


logger = logging.getLogger("mmcoconut")

OTHER_PLACEHOLDERS = ("video_token_id", "audio_token_id")
CHOSEN_FIELDS = tuple(name for name in THOUGHT_FIELDS if name not in TOKEN_ID_FIELDS)
JOIN_INSTEAD = "take another vision-language model, or join a vision tower and a language model with from_backbones"


def _reason_against_class(own_class: type[PreTrainedModel]) -> str | None:
    if not own_class.can_generate():
        return f"{own_class.__name__} does not generate"
    lacking = {"input_ids", "inputs_embeds"} - inspect.signature(own_class.forward).parameters.keys()
    return f"{own_class.__name__}.forward takes no {' and no '.join(sorted(lacking))}" if lacking else None


def _reason_against_parts(vlm: PreTrainedModel) -> str | None:
    name, decoder, head = type(vlm).__name__, vlm.get_decoder(), vlm.get_output_embeddings()
    if vlm.config.is_encoder_decoder or vlm.config.get_text_config(decoder=True).is_encoder_decoder:
        return f"{name} is an encoder-decoder, in which thoughts would stand beside the text that is read"
    if getattr(vlm.config.get_text_config(), "hidden_size", None) is None:
        return f"the configuration of {name} does not say how wide its language model is (hidden_size)"
    if head is None or vlm.get_input_embeddings() is None:
        return f"{name} does not say which its embeddings and its head are (get_output_embeddings)"
    if decoder is vlm or decoder is vlm.base_model or not isinstance(decoder, PreTrainedModel):
        return f"{name} has no decoder apart from what reads the images (get_decoder)"
    if any(module is head for module in decoder.modules()):
        return f"the decoder of {name}, {type(decoder).__name__}, is not apart from its head"
    if "inputs_embeds" not in inspect.signature(decoder.forward).parameters:
        return f"the decoder of {name}, {type(decoder).__name__}, takes no inputs_embeds"
    return None


def reason_against(vlm: PreTrainedConfig | type[PreTrainedModel] | PreTrainedModel) -> str | None:
    """Return why a vision-language model cannot be given thoughts, or None.

    vlm: a configuration, from which the model is made on the meta device; a model; or a class, for which only the
        checks without a model run.
    """
    if isinstance(vlm, type):
        return _reason_against_class(vlm)
    if isinstance(vlm, PreTrainedConfig):
        if vlm.is_encoder_decoder:
            return "it is an encoder-decoder, in which thoughts would stand beside the text that is read"
        try:
            with torch.device("meta"):
                vlm = AutoModelForImageTextToText.from_config(vlm)
        except ValueError:
            return "transformers has no AutoModelForImageTextToText of it"
        except ImportError as error:
            return f"it needs a package that is not installed ({str(error).strip().splitlines()[0]})"
    return _reason_against_class(type(vlm)) or _reason_against_parts(vlm)


def _check_takes(vlm: PreTrainedConfig | PreTrainedModel) -> None:
    config = vlm if isinstance(vlm, PreTrainedConfig) else vlm.config
    if isinstance(vlm, ThinkingVLM) or getattr(config, "latent_token_id", None) is not None:
        raise UsageError(
            f"from_vlm was given a {config.model_type} that has thoughts already: load it as it is, with "
            "mmcoconut.models.load_model or as `model` in a recipe."
        )
    reason = reason_against(vlm)
    if reason is not None:
        raise UsageError(f"from_vlm cannot take over a {config.model_type}: {reason}; {JOIN_INSTEAD}.")


def _check_fields(fields: dict) -> None:
    for name in fields:
        if name in CHOSEN_FIELDS:
            continue
        if name in ("image_size", "min_tiles", "max_tiles", "use_thumbnail"):
            remedy = "set up the images by image_options of processor_from_vlm"
        elif name in TOKEN_ID_FIELDS:
            remedy = "the tokenizer decides it, so leave it out"
        else:
            close = difflib.get_close_matches(name, CHOSEN_FIELDS, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"what it takes are {', '.join(CHOSEN_FIELDS)}"
        raise UsageError(f"from_vlm takes no {name!r}: {remedy}.")
    check_thought_values(SimpleNamespace(**{**THOUGHT_FIELDS, **fields}))  # before tokenizer and model are changed


def _load(vlm: str | PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """Load a plain vision-language model; whether it can think is checked before its weights are loaded."""
    if isinstance(vlm, PreTrainedModel):
        _check_takes(vlm)
        return vlm
    _check_takes(load_config(vlm, "vision-language model"))
    return AutoModelForImageTextToText.from_pretrained(vlm, dtype=dtype or torch.get_default_dtype())


def _add_tokens(vlm: PreTrainedModel, tokenizer, new_token_init: str | None) -> dict[str, int]:
    """Add the thought tokens to tokenizer and embeddings; return their ids by configuration field."""
    image_token_id = getattr(vlm.config, "image_token_id", None)
    if image_token_id is None:
        raise UsageError(
            f"The configuration of this {vlm.config.model_type} has no image_token_id, by which images are found in "
            "a text: set it to that of its processor."
        )
    num_known, known = len(tokenizer), tokenizer.get_vocab()
    model_type = vlm.config.model_type
    add_special_tokens(tokenizer, image_token_of(tokenizer, image_token_id), model_type=model_type)
    ids = tokenizer.convert_tokens_to_ids(list(THOUGHT_TOKENS))
    renamed = [number for token, number in zip(THOUGHT_TOKENS, ids) if token not in known and number < num_known]
    new_ids = [*renamed, *range(num_known, len(tokenizer))]
    start_rows(vlm, new_ids, tokenizer, new_token_init=new_token_init)
    return dict(zip(TOKEN_ID_FIELDS, [image_token_id, *ids]))


def from_vlm(
    vlm: str | PreTrainedModel,
    *,
    processor=None,
    tokenizer=None,
    new_token_init: str | None = None,
    dtype: torch.dtype | str | None = None,
    check: bool = True,
    **thought_fields,
):
    """Return a pretrained vision-language model that can think, in a subclass of its own class.

    Args:
        vlm: Hub id or folder, e.g. "Qwen/Qwen2.5-VL-7B-Instruct", or the model itself, which then thinks in place.
        processor, or tokenizer: loaded from `vlm` by default; the tokenizer gets the latent and the two markers where
            it lacks them, and the embeddings grow to its length where they have no spare rows.
        new_token_init: a token whose embedding the new tokens start from; None takes the mean of the old ones.
        dtype: of all weights, e.g. torch.bfloat16; None: the model's own, or torch's default for one by name.
        check: whether thoughts behind a blank image are compared with their definition, which costs a few short
            passes; with a tokenizer alone those behind a text are.
        thought_fields: thought_mode, thought_norm, thought_schedule, jacobi_iterations, answer_sees and stop_head, as
            in MMCoconutConfig.

    Raises:
        ValueError: a model that lacks a part, or that fails the check, with what differed; a model without its
            tokenizer; an unknown `new_token_init`, dtype or field.
    """
    if tokenizer is None and processor is None and isinstance(vlm, PreTrainedModel):
        raise UsageError("A model object has no tokenizer: also give processor or tokenizer.")
    _check_fields(thought_fields)
    dtype = as_dtype(dtype)
    source = vlm if processor is None and tokenizer is None else processor
    model = _load(vlm, dtype)
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(vlm) if processor is None else processor.tokenizer
    settle_tying(model)
    token_ids = _add_tokens(model, tokenizer, new_token_init)
    for name, value in {**THOUGHT_FIELDS, **token_ids, **thought_fields, "mmcoconut_version": VERSION}.items():
        setattr(model.config, name, value)
    others = (getattr(model.config, name, None) for name in OTHER_PLACEHOLDERS)  # no answer may contain these either
    others = [number for number in others if number is not None and number < len(tokenizer)]
    suppressed = [*(model.generation_config.suppress_tokens or ()), *token_ids.values(), *others]
    give_thoughts_to_vlm(model)
    model.generation_config = generation_config_of(model, tokenizer, list(dict.fromkeys(suppressed)))
    if dtype is not None:
        cast_weights(model, dtype)
    model.eval()
    if check:
        check_thoughts(model, inputs_of_check(model, source, tokenizer))
    return model
