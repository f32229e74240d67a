"""Encode chats so that user text never becomes a control token; sort the options of a processor's call.

A chat is rendered with marks around each string that is a control token of the tokenizer; such strings are encoded as
text. The marks are code points that are no characters in Unicode; they are first removed from messages.
"""

import difflib
import inspect
import re
from collections.abc import Iterable, Sequence
from itertools import accumulate

from transformers.utils.chat_template_utils import render_jinja_template

from .configuration_mmcoconut import LATENT_TOKEN, THOUGHT_TOKENS


ANSWER_MARKER = "###"
QUOTES, WRITTEN, SAMPLE = ("\ufdd0", "\ufdd1"), ("\ufdd2", "\ufdd3"), "\ufdd4"
MARKS = re.compile("[\ufdd0-\ufdef]")
GENERATION = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")
ANSWER_LINE = re.compile(rf"^(?:{ANSWER_MARKER}#*\s*)+", re.MULTILINE)  # also GSM8K's four; also written twice
IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")  # keys under which a part of a message holds its image
MARKERS = ("both", "start", "none")
TEXT_OPTIONS = ("return_tensors", "padding", "max_length", "pad_to_multiple_of", "padding_side", "truncation")
TEXT_OPTIONS += ("return_mm_token_type_ids", "return_attention_mask")
CALL_OPTIONS = ("images", "text", "num_latents", "history", "rendered")
RENDER_OPTIONS = ("add_generation_prompt", "continue_final_message")  # in addition to the template's variables
CHAT_ARGUMENTS = ("num_latents", "tokenize", "return_dict", "return_assistant_tokens_mask", "sanitize_control_tokens")
# Options that generic callers pass as None or False, which matches what this processor does.
NEUTRAL = ("videos", "audio", "add_special_tokens", "load_audio_from_video", "tools", "documents")
LARGEST_LENGTH = 10**9  # a tokenizer without a limit reports more than this


class RenderedPrompt(str):
    """A chat as `apply_chat_template(tokenize=False)` renders it, a slice of one, or one with text added to it."""

    def __getitem__(self, place) -> "RenderedPrompt":
        return RenderedPrompt(str.__getitem__(self, place))

    def __add__(self, other: str) -> "RenderedPrompt":
        return RenderedPrompt(str(self) + other)

    def __radd__(self, other: str) -> "RenderedPrompt":
        return RenderedPrompt(other + str(self))


def user_message(text: str, num_images: int = 0) -> dict:
    return {"role": "user", "content": [{"type": "image"}] * num_images + [{"type": "text", "text": text}]}


def messages_of(question: str, history: Sequence[tuple[str, str]], num_images: int) -> list[dict]:
    """Return a chat up to its last question: images first, earlier answers as the model writes them."""
    messages = []
    for asked, answer in history:
        written = [{"type": "text", "text": f"{ANSWER_MARKER} {answer}"}]
        messages += [user_message(asked, 0 if messages else num_images), {"role": "assistant", "content": written}]
    return [*messages, user_message(question, 0 if messages else num_images)]


def conversations_of(conversation) -> tuple[list[list[dict]], list[list], bool]:
    """Return chats with images replaced by placeholders, each chat's images, and True if there were several chats."""
    is_batch = bool(conversation) and isinstance(conversation[0], (list, tuple))
    chats, images = [], []
    for chat in conversation if is_batch else [conversation]:
        if not chat or not all(isinstance(message, dict) and "role" in message for message in chat):
            kinds = ", ".join(sorted({type(message).__name__ for message in chat})) or "none"
            raise ValueError(f"A chat has messages of type {kinds}: give each chat as a list of dicts with a role.")
        images.append([])
        chats.append([_without_images(message, images[-1]) for message in chat])
    return chats, images, is_batch


def _without_images(message: dict, images: list) -> dict:
    """Return a message with images replaced by placeholders; append the images to `images`."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return {**message, "content": content}
    parts = []
    for part in content:
        kind = part.get("type")
        if kind not in ("text", "image", "image_url"):
            raise ValueError(f"A part of a message has type={kind!r}: this model reads 'text' and 'image'.")
        if kind != "text":
            given = [part[key] for key in IMAGE_KEYS if part.get(key) is not None]
            images += [image["url"] if isinstance(image, dict) else image for image in given[:1]]
            part = {key: value for key, value in part.items() if key not in IMAGE_KEYS} | {"type": "image"}
        parts.append(part)
    return {**message, "content": parts}


def control_tokens_of(tokenizer, chat_template: str) -> re.Pattern:
    """Return a pattern of what user text may not contain: special tokens, and added tokens of the template."""
    # White space is ordinary text, though some tokenizers add it. The longest come first, for one may begin another.
    added = [token for token in tokenizer.added_tokens_decoder.values() if not token.content.isspace()]
    tokens = {token.content for token in added if token.special or token.content in chat_template}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def quoted(value, tokens: re.Pattern | None):
    """Return a value with marks around the control tokens in all its strings, and no other marks."""
    if isinstance(value, str):
        text = MARKS.sub("", value)
        return text if tokens is None else tokens.sub(f"{QUOTES[0]}\\g<0>{QUOTES[1]}", text)
    if isinstance(value, dict):
        return {key: quoted(item, tokens) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [quoted(item, tokens) for item in value]
    return value


def _marked(message: dict) -> dict:
    """Return a message with marks around every text of it that the assistant writes."""
    if message["role"] != "assistant":
        return message
    mark, content = "{}".join(WRITTEN).format, message["content"]
    if not isinstance(content, str):
        marked = [{**part, "text": mark(part["text"])} if "text" in part else part for part in content]
    return {**message, "content": mark(content) if isinstance(content, str) else marked}


def render(tokenizer, chat_template: str, messages: Sequence[dict], variables: dict, *, with_spans: bool = False):
    """Return a chat of `conversations_of` as text and, with_spans, the spans that the assistant writes.

    Spans are `{% generation %}` blocks, or without these the messages' texts, each with its end token.
    """
    options = {**tokenizer.special_tokens_map, **variables, "chat_template": chat_template}
    by_template = with_spans and GENERATION.search(chat_template) is not None
    [text], spans = render_jinja_template([list(messages)], return_assistant_tokens_mask=by_template, **options)
    if by_template or not with_spans:
        return text, spans[0] if spans else []
    [marked], _ = render_jinja_template([[*map(_marked, messages)]], **options)
    pieces = re.split(f"[{''.join(WRITTEN)}]", marked)
    if "".join(pieces) != text:
        remedy = "put {% generation %} … {% endgeneration %} around it in the template"
        raise ValueError(f"The chat template changes what the assistant wrote, such as the space around it: {remedy}.")
    ends, eos = [*accumulate(map(len, pieces))], tokenizer.eos_token
    return text, [(start, end + len(eos) * text.startswith(eos, end)) for start, end in zip(ends[:-1:2], ends[1::2])]


def rendered_prompts(tokenizer, chat_template: str, chats: list, variables: dict, *, sanitized: bool) -> list:
    """Return chats of `conversations_of` as RenderedPrompts; if sanitized, control tokens raise ValueError."""
    chats, variables = said = quoted([chats, variables], None)
    if sanitized and quoted(said, control_tokens_of(tokenizer, chat_template)) != said:
        problem = "A message contains the string of a special token, which rendered text cannot tell from a real one"
        raise ValueError(f"{problem}: call apply_chat_template with tokenize=True, return_dict=True.")
    return [RenderedPrompt(render(tokenizer, chat_template, chat, variables)[0]) for chat in chats]


def is_rendered(text: str, processor, is_question: bool) -> bool:
    """Return True for a RenderedPrompt, or a string that ends as the processor's template begins an answer.

    Such an end has complete thoughts and control tokens. A string of only image tokens is rendered too: serving
    engines measure images with it. Raise ValueError for other strings with control tokens, except questions.
    """
    tokenizer, chat_template = processor.tokenizer, processor.chat_template
    found = set(control_tokens_of(tokenizer, chat_template).findall(text))
    if isinstance(text, RenderedPrompt) or is_question or not found:
        return isinstance(text, RenderedPrompt)
    layout = {**processor.layout(1), "add_generation_prompt": True}
    prompt, _ = render(tokenizer, chat_template, [user_message(SAMPLE)], layout)
    latent, ending = re.escape(LATENT_TOKEN), re.escape(prompt.rpartition(SAMPLE)[2])
    ending = re.search(rf"{ending.replace(latent, f'(?:{latent})*')}\Z", text)
    are_images = found == {processor.image_token} and (ending or not text.replace(processor.image_token, ""))
    if are_images or (ending and any(token in ending[0] for token in found)):
        return True
    problem = f"A plain string holds {', '.join(sorted(found))}: pass rendered=True if apply_chat_template wrote it"
    raise ValueError(f"{problem}, or rendered=False if it is a question, in which they stay text.")


def _encode_piece(tokenizer, text: str, *, follows: bool, **options) -> tuple[list, list]:
    """Return the ids of a piece of a chat, and their offsets if the options ask for them."""
    front = "\n" if follows else ""  # SentencePiece adds its space before this, and not before a piece that follows
    encoded = tokenizer(front + text, add_special_tokens=False, **options)
    ids, breaks = encoded["input_ids"], tokenizer(front, add_special_tokens=False)["input_ids"]
    if ids[: len(breaks)] != breaks:
        return _encode_piece(tokenizer, text, follows=False, **options)
    spans = encoded.get("offset_mapping", [(0, 0)] * len(ids))[len(breaks) :]
    return ids[len(breaks) :], [(start - len(front), end - len(front)) for start, end in spans]


def _encode_quote(tokenizer, token: str, **options) -> tuple[list, list]:
    """Encode the string of a control token as text; one that is not special is matched whole, not in halves."""
    options |= {"split_special_tokens": True}
    token_id = tokenizer.convert_tokens_to_ids(token)
    ids, spans = _encode_piece(tokenizer, token, **options)
    if token_id in ids:
        ids, spans = _encode_piece(tokenizer, token[:1], **options)
        rest, rest_spans = _encode_piece(tokenizer, token[1:], **{**options, "follows": True})
        ids, spans = ids + rest, spans + [(start + 1, end + 1) for start, end in rest_spans]
    if token_id in ids:
        raise ValueError(f"A message holds {token!r}, which this tokenizer cannot read as text: leave it out.")
    return ids, spans


def encode_marked(tokenizer, chat: str, spans: Sequence = (), *, follows: bool = False) -> tuple[list, list]:
    """Return the ids of a chat of `quoted` messages, or of its end, and 1 at ids in spans except thoughts."""
    ids, mask = [], []
    thought_ids = tokenizer.convert_tokens_to_ids(list(THOUGHT_TOKENS))
    options = {"split_special_tokens": False, "return_offsets_mapping": bool(spans)}
    for piece in re.finditer(f"[^{''.join(QUOTES)}]+", chat):
        begins, ends = piece.span()
        # A mark whose partner a template cut off (it kept only the text after a token) quotes nothing.
        is_quote = (chat[max(begins - 1, 0) : begins], chat[ends : ends + 1]) == QUOTES
        encode = _encode_quote if is_quote and piece[0] in tokenizer.get_added_vocab() else _encode_piece
        piece_ids, places = encode(tokenizer, piece[0], follows=follows or bool(ids), **options)
        ids += piece_ids
        for token_id, (start, end) in zip(piece_ids, places):
            is_inside = any(begins + start < last and begins + end > first for first, last in spans)
            mask.append(int(is_inside and token_id not in thought_ids))
    return ids, mask


def parse_answer(text: str) -> str:
    """Return the text after the first line that begins with `###`, else after the last `###`, else ''.

    >>> parse_answer("B2\\n### red"), parse_answer("B2 ### red"), parse_answer("### 24+24=48 ### 48")
    ('red', 'red', '24+24=48 ### 48')
    """
    line = ANSWER_LINE.search(text)
    if line is None:
        return text.rpartition(ANSWER_MARKER)[2].strip() if ANSWER_MARKER in text else ""
    return text[line.end() :].strip()


def check_names(names: Iterable[str], what: str, known: Iterable[str], others: Iterable[str] = ()) -> None:
    """Raise ValueError for an unknown name, with the nearest known one; others are further suggestions."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, [*known, *others], n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}."
            raise ValueError(f"{name} is no {what}: {hint}")


def check_arguments(cls, kwargs: Iterable[str], *others: str) -> None:
    """Raise ValueError for names that are no arguments of a class's `__init__`, as `check_names` does."""
    known = inspect.signature(cls.__init__).parameters.keys() - {"self", "kwargs"}
    check_names(kwargs, f"argument of {cls.__name__}", known, others)


def _join(options: dict, others: dict | None, group: str = "") -> dict:
    """Return the union of options and a group of others, without no-ops; raise ValueError for a name in both."""
    joined = {**options, **(others or {})}
    if len(joined) < len(options) + len(others or {}):
        name = min(options.keys() & others.keys())
        raise ValueError(f"{name} is given twice, by itself and in {group}: give it once.")
    idle = [name for name in NEUTRAL if joined.get(name) is None or joined[name] is False]
    return {name: value for name, value in joined.items() if name not in idle}


def _groups_of(image_processor) -> dict[str, set[str]]:
    """Return the option names of each group; flat options may be any of `common_kwargs`."""
    text, images = set(TEXT_OPTIONS), {*image_processor.valid_kwargs.__annotations__, "return_tensors"}
    return {"text_kwargs": text, "images_kwargs": images, "common_kwargs": text | images}


def split_options(kwargs: dict, image_processor) -> tuple[dict, dict]:
    """Return text options and image options: flat ones first, then those in groups, then `common_kwargs`."""
    groups, what = _groups_of(image_processor), "option of the processor"
    options = _join({}, {name: value for name, value in kwargs.items() if name not in groups})
    check_names(options, what, groups["common_kwargs"], CALL_OPTIONS)
    for group, names in groups.items():
        given = _join({}, kwargs.get(group))
        check_names(given, what, names)
        options = {**given, **options} if group == "common_kwargs" else _join(options, given, group)
    wanted = (groups["text_kwargs"], groups["images_kwargs"])
    return tuple({name: options[name] for name in options if name in names} for names in wanted)


def split_chat_options(kwargs: dict, template: str, image_processor) -> tuple[dict, dict]:
    """Split the arguments of `apply_chat_template` into template variables and options of a call."""
    options = kwargs.pop("processor_kwargs", None) or {}
    groups, given = _groups_of(image_processor), _join(kwargs, options, "processor_kwargs")
    called = {*groups, *groups["common_kwargs"], *options, "num_latents"}
    variables = {name: given[name] for name in given if name not in called}
    written = {name for name in variables if re.search(rf"\b{re.escape(name)}\b", template)}
    check_names(variables, "option of apply_chat_template", {*RENDER_OPTIONS, *written}, {*called, *CHAT_ARGUMENTS})
    return variables, {name: given[name] for name in given if name in called}


def padding_options(given: dict, tokenizer, *, num_rows: int, longest: int) -> dict:
    """Return padding options for rows of at most `longest` tokens, with the tokenizer's defaults; never truncate."""
    made_with = {name: tokenizer.init_kwargs.get(name) for name in ("padding", "max_length", "pad_to_multiple_of")}
    options = {name: value for name, value in made_with.items() if value is not None} | given
    multiple, side = options.get("pad_to_multiple_of"), options.get("padding_side")
    padding = options.setdefault("padding", num_rows > 1 or multiple is not None)
    truncation, limit = options.pop("truncation", None), options.get("max_length") or tokenizer.model_max_length
    is_limited = padding == "max_length" or truncation not in (None, False, "do_not_truncate")
    is_endless, is_over = is_limited and limit >= LARGEST_LENGTH, is_limited and longest > limit
    is_alone = given.get("max_length") is not None and not is_limited
    is_idle = given.get("pad_to_multiple_of") is not None and padding in (False, "do_not_pad")
    problems = {
        f"max_length={limit} has no effect alone: add padding='max_length', or truncation=True": is_alone,
        f"pad_to_multiple_of={multiple} has no effect with padding={padding!r}: leave one out": is_idle,
        f"padding_side={side!r} is not one of left, right: choose one": side not in (None, "left", "right"),
        "padding='max_length' needs max_length, which is not set: set it": is_endless and padding == "max_length",
        f"truncation={truncation!r} could cut images or thoughts: leave it out, or set max_length": is_endless,
        f"Nothing is cut out of a prompt of {longest} tokens, and max_length is {limit}: shorten it": is_over,
    }
    for problem, is_met in problems.items():
        if is_met:
            raise ValueError(f"{problem}.")
    return {name: value for name, value in options.items() if name != "max_length" or padding == "max_length"}
