"""The layout as a chat template, and rendered chats as ids in which user text never becomes a control token.

A chat is rendered with marks around each string in it that is a control token of the tokenizer, which is then encoded
as text. Where a mask of what the assistant writes is asked for and the template has no `{% generation %}`, marks stand
around that too. The marks are code points that stand for no character, taken out of messages before.
"""

import re
from collections.abc import Sequence

from transformers.utils.chat_template_utils import render_jinja_template

from .configuration_mmcoconut import THOUGHT_TOKENS


ANSWER_MARKER = "###"
# Code points that are no characters in Unicode, and will be none.
QUOTES = ("\ufdd0", "\ufdd1")
WRITTEN = ("\ufdd2", "\ufdd3")
MARKS = re.compile("[\ufdd0-\ufdef]")
GENERATION = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")
ANSWER_LINE = re.compile(rf"^(?:{ANSWER_MARKER}#*\s*)+", re.MULTILINE)  # also GSM8K's four; also written twice
# Under these names a part of a message holds its image.
IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")
MARKERS = ("both", "start", "none")
SET_THOUGHTS = (
    "{%- set thoughts = ('<|start-latent|>' if markers | default('both') != 'none' else '')"
    " ~ '<|latent|>' * (num_latents | default(0))"
    " ~ ('<|end-latent|>' if markers | default('both') == 'both' else '') -%}"
)
CHAT_TEMPLATE = (
    SET_THOUGHTS + "{%- macro said(content) -%}"
    "{%- if content is string -%}{{- content -}}"
    "{%- else -%}{%- for part in content -%}"
    "{{- '<image>' if part['type'] == 'image' else part['text'] -}}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    "{{- BOS -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{- thoughts -}}"
    "{%- generation -%}{{- said(message['content']) ~ eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- said(message['content']) ~ '\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- thoughts -}}{%- endif -%}"
)
# Before another model's template: assistant messages get the thoughts in front of their text.
THINKING_MESSAGES = (
    "{%- set thinking = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set content = message['content'] -%}"
    "{%- if message['role'] == 'assistant' and content is string -%}{%- set content = thoughts ~ content -%}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{%- if content[0]['type'] != 'text' -%}"
    "{{- raise_exception('An assistant message must begin with text, for thoughts stand before it.') -}}"
    "{%- endif -%}"
    "{%- set content = [dict(content[0], text=thoughts ~ content[0]['text'])] + content[1:] -%}"
    "{%- endif -%}"
    "{%- set thinking.messages = thinking.messages + [dict(message, content=content)] -%}"
    "{%- endfor -%}"
    "{%- set messages = thinking.messages -%}"
)
# A turn before another one, which shows what a template writes between them.
SAMPLE_HISTORY = (("a", "a"),)
# A chat that is rendered to see how a template begins and writes an image.
SAMPLE_CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]


def starts_with_bos(tokenizer) -> bool:
    """Return True if this tokenizer puts its bos token in front of a text (Llama does, GPT-2 and Qwen2 do not)."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def with_thoughts(chat_template: str | None, tokenizer, image_token: str) -> str:
    """A chat template of another model with the latents and markers where the assistant begins to write.

    The bos token is written in front where the tokenizer would put it and the template does not.

    Raises:
        ValueError: no template, or one that does not write the image token once an image.
    """
    if not isinstance(chat_template, str):
        raise ValueError(f"The chat template is {type(chat_template).__name__}, not text: give chat_template=….")
    sample = tokenizer.apply_chat_template(SAMPLE_CHAT, chat_template=chat_template, tokenize=False)
    if sample.count(image_token) != 1:
        raise ValueError(
            f"The chat template writes {image_token} {sample.count(image_token)} times for an image, and once is "
            "wanted: give a chat_template=… that does."
        )
    lacks_bos = starts_with_bos(tokenizer) and not sample.startswith(tokenizer.bos_token)
    bos = "{{ bos_token }}" if lacks_bos else "{{ '' }}"  # an expression, after which no white space is cut
    end = "{{ thoughts if add_generation_prompt else '' }}"
    return SET_THOUGHTS + THINKING_MESSAGES + bos + chat_template.removesuffix("\n") + end


def user_message(text: str, num_images: int = 0) -> dict:
    return {"role": "user", "content": [{"type": "image"}] * num_images + [{"type": "text", "text": text}]}


def messages_of(question: str, history: Sequence[tuple[str, str]], num_images: int) -> list[dict]:
    """A chat up to its last question: the images first, each earlier answer as the model writes it."""
    messages = []
    for asked, answer in history:
        written = [{"type": "text", "text": f"{ANSWER_MARKER} {answer}"}]
        messages += [user_message(asked), {"role": "assistant", "content": written}]
    messages.append(user_message(question))
    messages[0] = user_message(history[0][0] if history else question, num_images)
    return messages


def last_place(part: Sequence[int], whole: Sequence[int]) -> int:
    """Where ids stand in others for the last time; -1 if nowhere.

    >>> last_place([1, 2], [1, 2, 0, 1, 2]), last_place([2, 1], [1, 2])
    (3, -1)
    """
    starts = range(len(whole) - len(part), -1, -1)
    return next((start for start in starts if whole[start : start + len(part)] == part), -1)


def conversations_of(conversation) -> tuple[list[list[dict]], bool]:
    """Return a list of chats with images under type `image` and text under every content, and if there were several.

    Raises:
        ValueError: no message, one that is no mapping with a role, or a part that is neither text nor image.
    """
    is_batch = bool(conversation) and isinstance(conversation[0], (list, tuple))
    chats = list(conversation) if is_batch else [conversation]
    for chat in chats:
        if not chat or not all(isinstance(message, dict) and "role" in message for message in chat):
            kinds = ", ".join(sorted({type(message).__name__ for message in chat})) or "none"
            raise ValueError(
                f"A chat has messages of type {kinds}: give each chat as a list of "
                "{'role': …, 'content': …}, with at least one."
            )
    return [[_normal(message) for message in chat] for chat in chats], is_batch


def _normal(message: dict) -> dict:
    content = message.get("content") or ""
    if isinstance(content, str):
        return {**message, "content": content}
    for part in content:
        if part.get("type") not in ("text", "image", "image_url"):
            raise ValueError(
                f"A part of a message has type={part.get('type')!r}: this model reads 'text' and 'image'."
            )
    parts = [{**part, "type": "image"} if part["type"] == "image_url" else part for part in content]
    return {**message, "content": parts}


def images_of(messages: Sequence[dict]) -> list:
    """Return the images in a chat, in order: under `image`, `url`, `path`, `base64` or `image_url`."""
    found = []
    for message in messages:
        parts = message["content"] if not isinstance(message["content"], str) else []
        for part in parts:
            if part["type"] == "image":
                values = [part.get(key) for key in IMAGE_KEYS]
                value = next((value for value in values if value is not None), None)
                found.append(value["url"] if isinstance(value, dict) else value)
    return [image for image in found if image is not None]


def without_images(messages: Sequence[dict]) -> list[dict]:
    """Return messages whose images are left out but for their places: a template sees that there is one."""
    result = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {key: value for key, value in part.items() if key not in IMAGE_KEYS or part["type"] != "image"}
                for part in content
            ]
        result.append({**message, "content": content})
    return result


def control_tokens_of(tokenizer, chat_template: str) -> re.Pattern:
    """Match what user text may not write: special tokens, and other added tokens that the template writes.

    The longest come first, for one may begin another. White space is ordinary text, though some tokenizers add it.
    """
    added = [token for token in tokenizer.added_tokens_decoder.values() if not token.content.isspace()]
    tokens = {token.content for token in added if token.special or token.content in chat_template}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def unquoted(text: str) -> str:
    """Return a text without characters that are marks here."""
    return MARKS.sub("", text)


def quoted(value, tokens: re.Pattern | None):
    """Return a value with marks around control tokens in every string in it: messages, tools, documents, variables.

    tokens: None gives strings without marks of any kind.
    """
    if isinstance(value, str):
        text = unquoted(value)
        return text if tokens is None else tokens.sub(f"{QUOTES[0]}\\g<0>{QUOTES[1]}", text)
    if isinstance(value, dict):
        return {key: quoted(item, tokens) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [quoted(item, tokens) for item in value]
    return value


def written(messages: Sequence[dict]) -> list[dict]:
    """Return messages with marks around every text of the assistant."""

    def mark(text: str) -> str:
        return f"{WRITTEN[0]}{text}{WRITTEN[1]}"

    result = []
    for message in messages:
        content = message["content"]
        if message.get("role") != "assistant":
            result.append(message)
        elif isinstance(content, str):
            result.append({**message, "content": mark(content)})
        else:
            parts = [{**part, "text": mark(part["text"])} if part["type"] == "text" else part for part in content]
            result.append({**message, "content": parts})
    return result


def render(tokenizer, chat_template: str, messages: Sequence[dict], variables: dict, *, with_spans: bool = False):
    """Render one chat.

    Args:
        messages: of `conversations_of`, with or without marks of `quoted`.
        variables: of the template, `add_generation_prompt`, `continue_final_message`, `tools`, `documents`.
        with_spans: whether the places of what the assistant writes are wanted.

    Returns:
        the text, and where in it the assistant's texts begin and end: what the template puts into `{% generation %}`,
        or, in a template without that, the messages' texts.

    Raises:
        ValueError: a template without `{% generation %}` that changes the assistant's text.
    """
    options = {**tokenizer.special_tokens_map, **variables}
    by_template = with_spans and GENERATION.search(chat_template) is not None
    [text], spans = render_jinja_template(
        [list(messages)], chat_template=chat_template, return_assistant_tokens_mask=by_template, **options
    )
    if by_template or not with_spans:
        return text, spans[0] if spans else []
    [marked], _ = render_jinja_template([written(messages)], chat_template=chat_template, **options)
    pieces = re.split(f"[{''.join(WRITTEN)}]", marked)
    if "".join(pieces) != text:
        raise ValueError(
            "The chat template changes what the assistant wrote, such as the space around it, so there is no telling "
            "which tokens it writes: put {% generation %} … {% endgeneration %} around them in the template."
        )
    ends = [sum(map(len, pieces[: number + 1])) for number in range(len(pieces))]
    spans = list(zip(ends[:-1:2], ends[1::2]))
    eos = tokenizer.eos_token
    return text, [(start, end + len(eos) * text.startswith(eos, end)) for start, end in spans]


def encode_piece(tokenizer, text: str, *, follows: bool, with_spans: bool, as_text: bool = False) -> tuple[list, list]:
    """Return the ids of a piece of a chat and, if wanted, where each begins and ends in it.

    as_text: control tokens in it are text. follows: it stands behind another piece, so it is encoded behind a line
    break, before which SentencePiece adds its space.
    """
    front = "\n" if follows else ""
    options = {"add_special_tokens": False, "split_special_tokens": as_text, "return_offsets_mapping": with_spans}
    encoded = tokenizer(front + text, **options)
    ids, breaks = encoded["input_ids"], tokenizer(front, add_special_tokens=False)["input_ids"] if front else []
    if ids[: len(breaks)] != breaks:
        return encode_piece(tokenizer, text, as_text=as_text, follows=False, with_spans=with_spans)
    spans = encoded["offset_mapping"][len(breaks) :] if with_spans else [(0, 0)] * (len(ids) - len(breaks))
    return ids[len(breaks) :], [(start - len(front), end - len(front)) for start, end in spans]


def encode_quote(tokenizer, token: str, *, follows: bool, with_spans: bool) -> tuple[list, list]:
    """Encode the string of a control token as text, as `encode_piece` does.

    An added token that is not special is found in text too, but not in its halves.

    Raises:
        ValueError: the tokenizer makes the token out of any text.
    """
    options = {"as_text": True, "with_spans": with_spans}
    token_id = tokenizer.convert_tokens_to_ids(token)
    ids, spans = encode_piece(tokenizer, token, follows=follows, **options)
    if token_id in ids:
        (first, first_spans), (rest, rest_spans) = (
            encode_piece(tokenizer, token[:1], follows=follows, **options),
            encode_piece(tokenizer, token[1:], follows=True, **options),
        )
        ids, spans = first + rest, first_spans + [(start + 1, end + 1) for start, end in rest_spans]
    if token_id in ids:
        raise ValueError(f"A message holds {token!r}, which this tokenizer cannot read as text: leave it out.")
    return ids, spans


def pieces_of(chat: str, tokenizer) -> list[tuple[str, bool, int]]:
    """Return the pieces between the marks of `quoted`, whether each is a quote, and where it begins.

    A mark whose partner a template cut off, as by taking only what follows a token, quotes nothing.
    """
    pieces = []
    for match in re.finditer(f"[^{''.join(QUOTES)}]+", chat):
        around = chat[max(match.start() - 1, 0) : match.start()], chat[match.end() : match.end() + 1]
        is_quote = around == QUOTES and match[0] in tokenizer.get_added_vocab()
        pieces.append((match[0], is_quote, match.start()))
    return pieces


def encode_marked(tokenizer, chat: str, spans: Sequence[tuple[int, int]] = ()) -> tuple[list[int], list[int]]:
    """Return the ids of a chat rendered from `quoted` messages, and 1 at those that lie in the given spans of it.

    Thoughts are no text of anybody: 0, wherever a template puts them.
    """
    ids, mask = [], []
    thought_ids = tokenizer.convert_tokens_to_ids(list(THOUGHT_TOKENS))
    for piece, is_quote, begins in pieces_of(chat, tokenizer):
        encode = encode_quote if is_quote else encode_piece
        piece_ids, places = encode(tokenizer, piece, follows=bool(ids), with_spans=bool(spans))
        ids += piece_ids
        for token_id, (start, end) in zip(piece_ids, places):
            is_inside = any(begins + start < last and begins + end > first for first, last in spans)
            mask.append(int(is_inside and token_id not in thought_ids))
    return ids, mask


def parse_answer(text: str) -> str:
    """Return the text after the first line that begins with `###`, else after the last `###`, else ''.

    Steps stand on lines of their own before that line, and an answer may hold `###` itself, except at its beginning:
    a marker that is written twice counts once. Surrounding space is removed.

    >>> parse_answer("B2\\n### red"), parse_answer("B2 ### red"), parse_answer("red")
    ('red', 'red', '')
    >>> parse_answer("### 48+24=72 #### 72")
    '48+24=72 #### 72'
    """
    line = ANSWER_LINE.search(text)
    if line is not None:
        return text[line.end() :].strip()
    return text.rpartition(ANSWER_MARKER)[2].strip() if ANSWER_MARKER in text else ""
