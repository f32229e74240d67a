"""Options of a processor's calls under transformers' conventions: flat or in groups, checked by name, with precedence.

Flat options and those in `text_kwargs` and `images_kwargs` win over `common_kwargs`, and these over what the tokenizer
was made with. A prompt is never cut: a cut could fall into an image or the thoughts.
"""

import difflib
import inspect
import operator
import re
from collections.abc import Iterable, Sequence


TEXT_OPTIONS = ("return_tensors", "padding", "max_length", "pad_to_multiple_of", "padding_side", "truncation")
TEXT_OPTIONS += ("return_mm_token_type_ids", "return_attention_mask")
OPTION_GROUPS = ("text_kwargs", "images_kwargs", "common_kwargs")
CALL_OPTIONS = ("images", "text", "num_latents", "history", "rendered")
# Of `apply_chat_template`, beside the variables of the template.
RENDER_OPTIONS = ("add_generation_prompt", "continue_final_message", "tools", "documents")
CHAT_ARGUMENTS = ("num_latents", "tokenize", "return_dict", "return_assistant_tokens_mask", "sanitize_control_tokens")
# What callers of any processor pass, with the values under which they mean what this one does anyway.
NEUTRAL = {"videos": (None,), "audio": (None,), "add_special_tokens": (None, False)}
NEUTRAL |= {"load_audio_from_video": (None, False)}
# Those that a tokenizer may have been made with.
TOKENIZER_OPTIONS = ("padding", "max_length", "pad_to_multiple_of")
NO_TRUNCATION = (None, False, "do_not_truncate")
LARGEST_LENGTH = 10**9  # a tokenizer without a limit says more than this


def whole_number(value, name: str = "num_latents") -> int:
    """Return any kind of integer from 0 on as an int.

    Raises:
        ValueError: another value, a bool among them.
    """
    error = ValueError(f"{name}={value!r} is no number of latents: give a whole one from 0 on.")
    if isinstance(value, bool):
        raise error
    try:
        number = operator.index(value)
    except TypeError:
        raise error from None
    if number < 0:
        raise error
    return number


def unknown(name: str, what: str, known: Iterable[str]) -> ValueError:
    """Return the error about a name that is not known, with the nearest one that is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}."
    return ValueError(f"{name} is no {what}: {hint}")


def check_arguments(cls, kwargs: Iterable[str], *others: str) -> None:
    """Refuse names that `__init__` of a class does not have; others may be what was meant.

    Raises:
        ValueError: names the nearest one.
    """
    known = inspect.signature(cls.__init__).parameters.keys() - {"self", "kwargs"}
    for name in kwargs:
        if name not in known:
            raise unknown(name, f"argument of {cls.__name__}", {*known, *others})


def without_neutral(kwargs: dict) -> dict:
    """Return options without those that change nothing.

    Raises:
        ValueError: one of them with a value that would.
    """
    for name, values in NEUTRAL.items():
        if kwargs.get(name) not in values:
            raise ValueError(f"{name}={kwargs[name]!r} is nothing that this processor does: leave it out.")
    return {name: value for name, value in kwargs.items() if name not in NEUTRAL}


def image_options_of(image_processor) -> set[str]:
    """Return the names of an image processor's options."""
    return set(image_processor.valid_kwargs.__annotations__) - {"return_tensors"}


def split_options(kwargs: dict, tokenizer, image_processor) -> tuple[dict, dict]:
    """Return options of the text and of the image processor, out of flat ones and `text_kwargs`, `images_kwargs`, ….

    Raises:
        ValueError: an unknown name, one that is given twice, or one without effect.
    """
    kwargs = dict(kwargs)
    groups = {name: without_neutral(dict(kwargs.pop(name, None) or {})) for name in OPTION_GROUPS}
    kwargs = without_neutral(kwargs)
    of_images = image_options_of(image_processor)
    known = {"text_kwargs": set(TEXT_OPTIONS), "images_kwargs": of_images | {"return_tensors"}}
    known["common_kwargs"] = everything = known["text_kwargs"] | of_images
    for names, valid in [(kwargs, everything), *((groups[group], known[group]) for group in OPTION_GROUPS)]:
        for name in names:
            if name not in valid:
                raise unknown(name, "option of the processor", valid | set(CALL_OPTIONS if names is kwargs else ()))
    for name in kwargs:
        for group in ("text_kwargs", "images_kwargs"):
            if name in groups[group]:
                raise ValueError(f"{name} is given twice, by itself and in {group}: give it once.")
    shared = {**groups["common_kwargs"], **kwargs}
    text = {name: value for name, value in shared.items() if name in TEXT_OPTIONS} | groups["text_kwargs"]
    images = {name: value for name, value in shared.items() if name in of_images} | groups["images_kwargs"]
    if text.get("return_tensors") is not None:
        images["return_tensors"] = text["return_tensors"]
    if text.get("max_length") is not None and not uses_length(text, tokenizer):
        raise ValueError(
            f"max_length={text['max_length']} has no effect alone: add padding='max_length', or truncation=True, "
            "which refuses longer prompts."
        )
    multiple, side = text.get("pad_to_multiple_of"), text.get("padding_side")
    if multiple is not None and text.get("padding") in (False, "do_not_pad"):
        raise ValueError(
            f"pad_to_multiple_of={multiple} has no effect with padding={text['padding']!r}: leave one out."
        )
    if side not in (None, "left", "right"):
        raise ValueError(f"padding_side={side!r} is not one of left, right: set padding_side to one of them.")
    made_with = {name: tokenizer.init_kwargs.get(name) for name in TOKENIZER_OPTIONS}
    return {**{name: value for name, value in made_with.items() if value is not None}, **text}, images


def split_chat_options(kwargs: dict, options: dict, template: str, image_processor) -> tuple[dict, dict]:
    """Return variables of a template, and options of a call, out of what `apply_chat_template` is given.

    Raises:
        ValueError: a name that is neither, or is given twice; tools or documents that the template does not write.
    """
    variables, options = {}, dict(options)
    twice = sorted(kwargs.keys() & options.keys())
    if twice:
        raise ValueError(f"{twice[0]} is given twice, by itself and in processor_kwargs: give it once.")
    called = {*TEXT_OPTIONS, *OPTION_GROUPS, *image_options_of(image_processor)}
    for name, value in without_neutral(kwargs).items():
        is_written = re.search(rf"\b{re.escape(name)}\b", template) is not None
        if name in called:
            options[name] = value
        elif name in ("tools", "documents") and value and not is_written:
            raise ValueError(f"The chat template writes no {name}: leave them out, or give a chat_template that does.")
        elif is_written or name in RENDER_OPTIONS:
            variables[name] = value
        else:
            raise unknown(name, "option of apply_chat_template", {*called, *RENDER_OPTIONS, *CHAT_ARGUMENTS})
    return variables, options


def uses_length(text: dict, tokenizer) -> bool:
    """Return True if options of the text pad to a length or ask for truncation."""
    padding = text.get("padding", tokenizer.init_kwargs.get("padding"))
    return padding == "max_length" or text.get("truncation") not in NO_TRUNCATION


def limit_of(options: dict, tokenizer) -> int | None:
    """Return how long prompts may be under options of the text; None is no limit.

    Raises:
        ValueError: padding to a length, or truncation, and no length.
    """
    pads, cuts = options.get("padding") == "max_length", options.get("truncation") not in NO_TRUNCATION
    if not pads and not cuts:
        return None
    limit = options.get("max_length")
    if limit is None and tokenizer.model_max_length < LARGEST_LENGTH:
        limit = tokenizer.model_max_length
    if limit is None and cuts:
        raise ValueError(
            f"truncation={options['truncation']!r} could cut images or thoughts, so it only refuses prompts over "
            "max_length, which is None: set it, or leave truncation out."
        )
    if limit is None:
        raise ValueError("padding='max_length' needs max_length, and the tokenizer has none: set it.")
    return limit


def check_lengths(prompts: Sequence[Sequence[int]], limit: int | None) -> None:
    """Refuse prompts that are longer than a limit.

    Raises:
        ValueError: with both numbers.
    """
    longest = max(map(len, prompts), default=0)
    if limit is not None and longest > limit:
        raise ValueError(
            f"Truncation could cut images or thoughts of a prompt of {longest} tokens, and max_length is {limit}: "
            "shorten the text before, use fewer images or latents, or raise max_length."
        )
