"""Build processors for new models: from backbones, or from a whole vision-language model.

A checkpoint's own processor is loaded with `from_pretrained`, which needs none of this.
"""

import contextlib
import copy
import logging

from jinja2 import TemplateError
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.processing_utils import ProcessorMixin
from transformers.video_processing_utils import BaseVideoProcessor

from mmcoconut import vlm_processing_mmcoconut
from mmcoconut.build.gguf import load_tokenizer
from mmcoconut.build.timm import MODEL_TYPE as TIMM_MODEL_TYPE
from mmcoconut.build.timm import timm_image_processor
from mmcoconut.build.tokens import SAMPLE_TURNS, add_special_tokens, image_token_of, turn_end_of
from mmcoconut.chat_template_mmcoconut import check_arguments, check_names, render, user_message
from mmcoconut.configuration_mmcoconut import (
    END_LATENT_TOKEN,
    IMAGE_TOKEN,
    LATENT_TOKEN,
    START_LATENT_TOKEN,
    THOUGHT_TOKENS,
    TOKEN_ID_FIELDS,
)
from mmcoconut.errors import UsageError
from mmcoconut.images_mmcoconut import makes_tiles
from mmcoconut.processing_mmcoconut import MMCoconutProcessor
from mmcoconut.vlm_processing_mmcoconut import thinking_processor_class


logger = logging.getLogger("mmcoconut")

SET_THOUGHTS = (
    "{%- set thoughts = ('<|start-latent|>' if markers | default('both') != 'none' else '')"
    " ~ '<|latent|>' * (num_latents | default(0))"
    " ~ ('<|end-latent|>' if markers | default('both') == 'both' else '') -%}"
)
CHAT_TEMPLATE = (
    SET_THOUGHTS + "{%- macro said(content) -%}{%- if content is string -%}{{- content -}}{%- else -%}"
    "{%- for part in content -%}{{- '<image>' if part['type'] == 'image' else part['text'] -}}{%- endfor -%}"
    "{%- endif -%}{%- endmacro -%}{{- BOS -}}"
    "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
    "{{- thoughts -}}{%- generation -%}{{- said(message['content']) ~ eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- said(message['content']) ~ '\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- thoughts -}}{%- endif -%}"
)
# Before a vision-language model's template: its own processor, which knows no latents, writes no thoughts.
IF_ASKED = "{%- if num_latents is not defined -%}{%- set markers = 'none' -%}{%- endif -%}"
# For a vision-language model without one: images, the question, a line end, the thoughts and the answer.
PLAIN_TEMPLATE = (
    "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
    "{%- if message['content'] is string -%}{%- set said = message['content'] -%}"
    "{%- else -%}{%- set said = message['content'] | map(attribute='text') | join -%}{%- endif -%}"
    "{%- generation -%}{{- said ~ eos_token -}}{%- endgeneration -%}"
    "{%- elif message['content'] is string -%}{{- (BOS if loop.first else '') ~ message['content'] ~ '\n' -}}"
    "{%- else -%}{%- for part in message['content'] if part['type'] == 'image' -%}{{- 'IMAGE' -}}{%- endfor -%}"
    "{{- BOS if loop.first else '' -}}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}{{- '\n' -}}"
    "{%- endif -%}{%- endfor -%}"
)
BOS_BEHIND_IMAGES = ("PaliGemmaProcessor",)  # which put their bos token there
# Before another model's template: assistant messages get the thoughts in front of their text.
THINKING_MESSAGES = (
    "{%- set thinking = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set content = message['content'] -%}"
    "{%- if message['role'] == 'assistant' and content is string -%}{%- set content = thoughts ~ content -%}"
    "{%- elif message['role'] == 'assistant' and content -%}"
    "{%- if content[0]['type'] != 'text' -%}"
    "{{- raise_exception('An assistant message must begin with text, for thoughts stand before it.') -}}"
    "{%- endif -%}"
    "{%- set content = [dict(content[0], text=thoughts ~ content[0]['text'])] + content[1:] -%}"
    "{%- endif -%}"
    "{%- set thinking.messages = thinking.messages + [dict(message, content=content)] -%}"
    "{%- endfor -%}"
    "{%- set messages = thinking.messages -%}"
)
# Before the template of a text-only model, which joins a message's content with strings: it gets one string.
CONTENT_AS_TEXT = (
    "{%- set of_text = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set written = namespace(text='') -%}"
    "{%- if message['content'] is string -%}{%- set written.text = message['content'] -%}"
    "{%- elif message['content'] -%}{%- for part in message['content'] -%}"
    "{%- set written.text = written.text ~ ('<image>' if part['type'] == 'image' else part['text']) -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set of_text.messages = of_text.messages + [dict(message, content=written.text)] -%}"
    "{%- endfor -%}"
    "{%- set messages = of_text.messages -%}{{ '' }}"
)
CHAT_TEMPLATES = ("own", "plain")
OTHER_TEMPLATE = "give chat_template='plain', or a template."


def starts_with_bos(tokenizer) -> bool:
    """Return True if this tokenizer puts its bos token in front of a text (Llama does, GPT-2 and Qwen2 do not)."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def chat_template_for(tokenizer) -> str:
    """Return the chat template of a model from backbones, which begins with the bos token if the tokenizer does."""
    return CHAT_TEMPLATE.replace("BOS", "bos_token" if starts_with_bos(tokenizer) else "''")


def check_tokenizer(tokenizer, config, image_token: str) -> None:
    """Raise unless the tokenizer has the placeholders and markers at the ids of the model's configuration."""
    for field, token in zip(TOKEN_ID_FIELDS, (image_token, *THOUGHT_TOKENS)):
        token_id = tokenizer.convert_tokens_to_ids(token)
        if token_id != getattr(config, field):
            raise UsageError(
                f"The tokenizer has {token} at {token_id}, the model's {field} is {getattr(config, field)}: use "
                "the tokenizer that the model was built with."
            )


def with_thoughts(chat_template: str | None, tokenizer, image_token: str, *, if_asked: bool = False) -> str:
    """Return another model's chat template with the latents and markers where the assistant begins to write.

    The bos token is written in front if the tokenizer would add it and the template does not.

    Args:
        if_asked: a call that says no num_latents gets no markers either, as of a processor that knows neither.

    Raises:
        ValueError: no template, or one that does not write the image token once per image.
    """
    if isinstance(chat_template, dict):
        chat_template = chat_template.get("default")
    if not isinstance(chat_template, str):
        raise UsageError(f"The chat template is {type(chat_template).__name__}, not text: give chat_template=….")
    sample = tokenizer.apply_chat_template([user_message("a", 1)], chat_template=chat_template, tokenize=False)
    if sample.count(image_token) != 1:
        raise UsageError(
            f"The chat template writes {image_token} {sample.count(image_token)} times per image, not "
            "once: give a chat_template=… that writes it once."
        )
    lacks_bos = starts_with_bos(tokenizer) and not sample.startswith(tokenizer.bos_token)
    bos = "{{ bos_token }}" if lacks_bos else "{{ '' }}"  # an expression, after which no white space is cut
    end = "{{ thoughts if add_generation_prompt else '' }}"
    begin = (IF_ASKED if if_asked else "") + SET_THOUGHTS + THINKING_MESSAGES
    return begin + bos + chat_template.removesuffix("\n") + end


def plain_template_for(processor) -> str:
    """Return a chat template for a vision-language model's processor that has none."""
    bos = "bos_token" if type(processor).__name__ in BOS_BEHIND_IMAGES else "''"
    return PLAIN_TEMPLATE.replace("IMAGE", processor.image_token).replace("BOS", bos)


def check_image_options(vlm: str, options: dict | None) -> None:
    """Raise ValueError for a setting that the image processor of a vision-language model does not know."""
    if options:
        image_class = type(own_processor(vlm, AutoConfig.from_pretrained(vlm).model_type).image_processor)
        check_names(options, f"option of {image_class.__name__}", image_class.valid_kwargs.__annotations__)


def set_image_options(processor, options: dict) -> None:
    """Give the image processor of a vision-language model's processor other settings, under its own names for them.

    Those that the processor overrides by its own at every call are kept beside num_latents and markers.

    Raises:
        ValueError: a name that the image processor does not know, with the nearest that it does.
    """
    image_class = type(processor.image_processor)
    check_names(options, f"option of {image_class.__name__}", image_class.valid_kwargs.__annotations__)
    processor.image_processor = image_class.from_dict(processor.image_processor.to_dict(), **options)
    overridden = getattr(processor, "images_kwargs", {})
    processor.image_options |= {name: value for name, value in options.items() if name in overridden}


def check_turns(chat_template: str, tokenizer) -> None:
    """Check that a template with thoughts keeps earlier answers, each right after its thoughts, and ends with some.

    Raises:
        ValueError: names what the template does instead, or that it rejects an ordinary chat of three messages.
    """
    (question, answer), (further, _) = SAMPLE_TURNS
    chat = [user_message(question, 1), {"role": "assistant", "content": answer}, user_message(further)]
    thoughts = "".join((START_LATENT_TOKEN, LATENT_TOKEN, END_LATENT_TOKEN))
    text, _ = render(tokenizer, chat_template, chat, {"num_latents": 1, "add_generation_prompt": True})
    found = {
        f"{text.count(thoughts)} times thoughts in a chat of two turns": text.count(thoughts) != 2,
        f"an earlier answer without {thoughts} directly before it": f"{thoughts}{answer}" not in text,
        f"a prompt that ends as {text[-30:]!r}, without thoughts": not text.endswith(thoughts),
        f"{text.count(IMAGE_TOKEN)} times {IMAGE_TOKEN} for an image": text.count(IMAGE_TOKEN) != 1,
    }
    for problem, is_met in found.items():
        if is_met:
            raise UsageError(
                f"The tokenizer's chat template writes {problem}: give chat_template='plain', or another."
            )


def own_template(tokenizer) -> str:
    """Return the chat template of an instruct language model's tokenizer with images as text, and thoughts.

    Raises:
        ValueError: a template that cannot be used so.
    """
    try:
        chat_template = with_thoughts(CONTENT_AS_TEXT + tokenizer.get_chat_template(), tokenizer, IMAGE_TOKEN)
        check_turns(chat_template, tokenizer)
    except TemplateError as error:
        raise UsageError(
            f"The tokenizer's chat template refuses an ordinary chat ({error}): {OTHER_TEMPLATE}"
        ) from error
    return chat_template


def settle_template(chat_template: str | None, tokenizer) -> str:
    """Return a Jinja template as it is, or the one that is meant by `own` or `plain`; None: own, if there is one.

    With the tokenizer's own, what ends its turns becomes its eos token, which training writes behind an answer.

    Raises:
        ValueError: `own` for a tokenizer without a chat template, or with one that cannot be used.
    """
    if chat_template not in (None, *CHAT_TEMPLATES):
        return chat_template
    if chat_template == "own" and tokenizer.chat_template is None:
        raise UsageError("chat_template='own', but the tokenizer has none: give 'plain', or leave it out.")
    if chat_template == "plain" or tokenizer.chat_template is None:
        return chat_template_for(tokenizer)
    if SET_THOUGHTS in tokenizer.get_chat_template():  # the tokenizer of a checkpoint, which has the thoughts already
        return tokenizer.get_chat_template()
    chat_template, tokenizer.eos_token = own_template(tokenizer), turn_end_of(tokenizer)
    return chat_template


def set_tiles(image_processor, *, image_size: int | None, min_tiles: int | None, max_tiles: int | None) -> None:
    """Enable tiles if the image processor supports them, with the given side and numbers or its own.

    Raises:
        ValueError: a setting for an image processor without tiles; more tiles at least than at most.
    """
    settings = {"min_patches": min_tiles, "max_patches": max_tiles}
    settings["size"] = None if image_size is None else {"height": image_size, "width": image_size}
    given = {name: value for name, value in settings.items() if value is not None}
    if not makes_tiles(image_processor):
        if given:
            raise UsageError(
                f"{type(image_processor).__name__} cuts no tiles, so image_size={image_size}, min_tiles={min_tiles} "
                f"and max_tiles={max_tiles} have no effect: leave them out (a vlm may have image_options)."
            )
        return
    image_processor.crop_to_patches = True
    for name, value in given.items():
        setattr(image_processor, name, value)
    if not 1 <= image_processor.min_patches <= image_processor.max_patches:
        raise UsageError(
            f"At least {image_processor.min_patches} and at most {image_processor.max_patches} tiles: set min_tiles "
            "and max_tiles so that 1 <= min_tiles <= max_tiles."
        )


def parts_of_vlm(vlm) -> tuple:
    """Return tokenizer, image processor and chat template of a processor, or of the files of a checkpoint.

    The checkpoint's processor itself is not built, because it may want libraries for videos.
    """
    if isinstance(vlm, ProcessorMixin):
        return copy.deepcopy(vlm.tokenizer), copy.deepcopy(vlm.image_processor), vlm.chat_template
    tokenizer = AutoTokenizer.from_pretrained(vlm)
    chat_template = ProcessorMixin.get_processor_dict(vlm)[0].get("chat_template") or tokenizer.chat_template
    return tokenizer, AutoImageProcessor.from_pretrained(vlm), chat_template


def image_processor_of(vision: str | None, vision_config):
    """Return the image processor of a pretrained tower, of a timm backbone by what its checkpoint says."""
    if vision_config.model_type == TIMM_MODEL_TYPE:
        return timm_image_processor(vision_config)
    return AutoImageProcessor.from_pretrained(vision)


def processor_from_backbones(
    vision: str | None = None, text: str | None = None, *, config, gguf_file: str | None = None, **kwargs
):
    """Build the processor of a model from `from_backbones`: both parts by name, or given as objects.

    Args:
        vision, text: Hub ids or folders, as for the model; not needed for a part that is given.
        config: the model's configuration; its image_seq_length is taken, its token ids are checked.
        gguf_file: the file of `text` that holds the tokenizer, as for the model.
        kwargs: `image_processor`, `tokenizer`, and the arguments of `MMCoconutProcessor`. `chat_template` may be a
            template, `own` or `plain`: that of an instruct model's tokenizer, which is taken where there is one, with
            thoughts where the assistant begins to write; or ours, question and answer alone.

    Raises:
        ValueError: the tokenizer's ids differ from the configuration's; a chat template that cannot be used.
    """
    check_arguments(MMCoconutProcessor, kwargs, "vision", "text", "config", "gguf_file")
    tokenizer = kwargs.pop("tokenizer", None) or load_tokenizer(text, gguf_file)
    image_processor = kwargs.pop("image_processor", None) or image_processor_of(vision, config.vision_config)
    add_special_tokens(tokenizer)
    check_tokenizer(tokenizer, config, IMAGE_TOKEN)
    if isinstance(tokenizer.chat_template, dict):  # a saved processor has one template, or all that its tokenizer has
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    kwargs["chat_template"] = settle_template(kwargs.get("chat_template"), tokenizer)
    if config.is_encoder_decoder:
        kwargs.setdefault("decoder_start_token_id", config.text_config.decoder_start_token_id)
    return MMCoconutProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length, **kwargs)


def own_processor(vlm, model_type: str) -> ProcessorMixin:
    """Return a copy of a vision-language model's processor, or load it from a Hub id or folder.

    Where its parts for videos or sound cannot be loaded it is loaded for images alone, which is logged.

    Raises:
        ValueError: there is no processor.
        ImportError, OSError, ValueError: images cannot be read either, for want of a library or of files.
    """
    if isinstance(vlm, ProcessorMixin):
        return copy.deepcopy(vlm)
    try:
        processor = AutoProcessor.from_pretrained(vlm)
    except (ImportError, OSError, ValueError) as error:
        name = PROCESSOR_MAPPING_NAMES.get(model_type)
        try:
            processor = getattr(vlm_processing_mmcoconut, str(name)).from_pretrained(vlm)
        except AttributeError:
            raise error from None
        reason = str(error).strip().splitlines()[0]
        logger.warning("%s of %s is loaded for images alone, without videos and sound: %s", name, vlm, reason)
    if not isinstance(processor, ProcessorMixin):
        raise UsageError(f"{vlm} has a {type(processor).__name__} and no processor: give the processor itself.")
    return processor


def keep_video_settings(processor: ProcessorMixin, vlm) -> None:
    """Keep the settings of a part for videos that is not loaded, so that the own processor opens where it can be.

    Older checkpoints have them in the image processor's file, where transformers looks for them too.
    """
    part = getattr(processor, "video_processor", None)
    if isinstance(vlm, ProcessorMixin) or not isinstance(part, vlm_processing_mmcoconut.NotLoaded) or part:
        return
    with contextlib.suppress(OSError):  # a checkpoint without any
        part.update(BaseVideoProcessor.get_video_processor_dict(vlm)[0])


def settle_text(processor: ProcessorMixin, config, chat_template: str | None) -> None:
    """Give a processor the template with thoughts, and its tokenizer the tokens of the model's configuration.

    Raises:
        ValueError: a processor without a token for images, a template or a tokenizer that does not fit.
    """
    tokenizer = processor.tokenizer
    if not isinstance(getattr(processor, "image_token", None), str):
        problem = f"{type(processor).__name__} has no token that stands for an image in text"
        raise UsageError(f"{problem}: this vision-language model cannot have thoughts.")
    chat_template = chat_template or processor.chat_template or plain_template_for(processor)
    processor.chat_template = with_thoughts(chat_template, tokenizer, processor.image_token, if_asked=True)
    placeholder = image_token_of(tokenizer, config.image_token_id)
    add_special_tokens(tokenizer, placeholder, model_type=config.model_type)
    check_tokenizer(tokenizer, config, placeholder)
    if processor.image_token not in tokenizer.get_vocab():  # which no model reads: other ids stand for it
        tokens = {"extra_special_tokens": [processor.image_token]}
        tokenizer.add_special_tokens(tokens, replace_extra_special_tokens=False)


def check_reads_images(processor) -> None:
    """Raise ValueError unless a processor with thoughts can read an image, and makes nothing that is not known."""
    try:
        processor.column_inputs([[0]], [[1]])
    except (AttributeError, KeyError, TypeError) as error:
        problem = f"{type(processor).__name__} cannot read an image ({type(error).__name__}: {error})"
        raise UsageError(
            f"{problem}: correct image_options, or give the processor itself with all its fields, such as patch_size."
        ) from error


def processor_from_vlm(
    vlm,
    *,
    config,
    num_latents: int = 0,
    markers: str = "both",
    min_tiles: int | None = None,
    max_tiles: int | None = None,
    image_size: int | None = None,
    image_options: dict | None = None,
    chat_template: str | None = None,
    tokenizer=None,
):
    """Build the processor of a model from `from_vlm`: the vision-language model's own with thoughts, a subclass.

    Args:
        vlm: Hub id or folder, or the VLM's processor, which stays as it is.
        config: the model's configuration, whose token ids are checked.
        num_latents, markers: as in `MMCoconutProcessor`.
        min_tiles, max_tiles, image_size: tiles that an image is cut into, its thumbnail not counted, and their side in
            pixels, of an image processor that calls them so, as InternVL's; default: the VLM's.
        image_options: other settings of the image processor under its own names, such as max_pixels of Qwen2-VL,
            do_image_splitting of SmolVLM or do_pan_and_scan of Gemma 3.
        chat_template, tokenizer: replace the VLM's. One without a template gets `PLAIN_TEMPLATE`.

    Raises:
        ValueError: the tokenizer's ids differ from the configuration's; a chat template that does not write the image
            token once per image; settings that the image processor does not know; a processor that cannot have
            thoughts, with the reason.
    """
    processor = own_processor(vlm, config.model_type)
    keep_video_settings(processor, vlm)
    if tokenizer is not None:
        processor.tokenizer = tokenizer
    settle_text(processor, config, chat_template)
    processor.__class__ = thinking_processor_class(getattr(processor, "own_class", type(processor)))
    processor.set_up(num_latents, markers)
    if image_options:
        set_image_options(processor, image_options)
    if (min_tiles, max_tiles, image_size) != (None, None, None):
        set_tiles(processor.image_processor, image_size=image_size, min_tiles=min_tiles, max_tiles=max_tiles)
    check_reads_images(processor)
    return processor


def composed_processor_from_vlm(vlm, *, config, min_tiles: int | None = None, max_tiles: int | None = None, **kwargs):
    """Build the processor of a composed model from a VLM: its tokenizer, image processor and chat template.

    Args:
        vlm: Hub id or folder, or the VLM's processor, which stays as it is.
        config: the model's configuration; its image token, image_seq_length and image_size are taken.
        min_tiles, max_tiles: tiles that an image is cut into, its thumbnail not counted; default: the VLM's. An image
            processor that can make tiles does so.
        kwargs: the arguments of `MMCoconutProcessor`, among them `tokenizer`, `image_processor` and `chat_template` in
            the place of the VLM's, and `start_image_token`, `end_image_token`, by default those that the tokenizer
            names, as InternVL's does.

    Raises:
        ValueError: the tokenizer's ids differ from the configuration's; no chat template; settings of tiles for an
            image processor that makes none.
    """
    check_arguments(MMCoconutProcessor, kwargs, "vlm", "config", "min_tiles", "max_tiles")
    names = ("tokenizer", "image_processor", "chat_template")
    tokenizer, image_processor, chat_template = (
        kwargs.pop(name, None) or part for name, part in zip(names, parts_of_vlm(vlm))
    )
    set_tiles(image_processor, image_size=config.image_size, min_tiles=min_tiles, max_tiles=max_tiles)
    image_token = image_token_of(tokenizer, config.image_token_id)
    chat_template = with_thoughts(chat_template, tokenizer, image_token)
    add_special_tokens(tokenizer, image_token)
    check_tokenizer(tokenizer, config, image_token)
    kwargs |= {"image_token": image_token, "chat_template": chat_template}
    for name in ("start_image_token", "end_image_token"):
        kwargs.setdefault(name, getattr(tokenizer, name, None))
    return MMCoconutProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length, **kwargs)
