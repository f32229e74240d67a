"""The layout as a chat template, and rendered chats as ids in which user text never becomes a control token.

A chat is rendered with marks around what its messages say: around each string in them that is a control token of the
tokenizer, which is then encoded as text, and around what the assistant writes, for its mask. The marks are characters
of Unicode's private use, taken out of messages before.
"""

import re
from collections.abc import Sequence


ANSWER_MARKER = "###"
QUOTES = ("\ue000", "\ue001")
WRITTEN = ("\ue002", "\ue003")
MARKS = re.compile("[\ue000-\ue003]")
MARKERS = ("both", "start", "none")
SET_THOUGHTS = (
    "{%- set thoughts = ('<|start-latent|>' if markers | default('both') != 'none' else '')"
    " ~ '<|latent|>' * (num_latents | default(0))"
    " ~ ('<|end-latent|>' if markers | default('both') == 'both' else '') -%}"
)
CHAT_TEMPLATE = (
    SET_THOUGHTS + "{{- BOS -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{- thoughts -}}{%- endif -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{{- '<image>' if part['type'] == 'image' else part['text'] -}}"
    "{%- endfor -%}{%- endif -%}"
    "{{- eos_token if message['role'] == 'assistant' else '\n' -}}"
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
    """Whether this tokenizer puts its bos token in front of a text (Llama does, GPT-2 and Qwen2 do not)."""
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


def texts_of(conversation) -> list[str]:
    """All texts in the messages of a conversation, or of a list of them."""
    if isinstance(conversation, str):
        return [conversation]
    if isinstance(conversation, dict):
        return texts_of(conversation.get("content", conversation.get("text", "")))
    return [text for part in conversation for text in texts_of(part)]


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


class RenderedPrompt(str):
    """A chat as `apply_chat_template(tokenize=False)` renders it; its control tokens are meant. Text may follow it."""

    def __add__(self, other: str) -> "RenderedPrompt":
        return RenderedPrompt(str(self) + other)

    def __reduce__(self):
        return RenderedPrompt, (str(self),)


def conversations_of(conversation) -> tuple[list[list[dict]], bool]:
    """Return a list of chats, and whether there were several."""
    is_batch = bool(conversation) and not isinstance(conversation[0], dict)
    return list(conversation) if is_batch else [conversation], is_batch


def images_of(messages: Sequence[dict]) -> list:
    """Return the images in a chat, in order: under `image`, `url`, `path`, `base64` or `image_url`."""
    found = []
    for message in messages:
        parts = message["content"] if not isinstance(message["content"], str) else []
        for part in parts:
            if part["type"] in ("image", "image_url"):
                values = [part.get(key) for key in ("image", "url", "path", "base64", "image_url")]
                value = next((value for value in values if value is not None), None)
                found.append(value["url"] if isinstance(value, dict) else value)
    return [image for image in found if image is not None]


def control_tokens_of(tokenizer) -> re.Pattern:
    """Match any token that the tokenizer reads whole out of a text, the longest first."""
    tokens = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def marked(messages: Sequence[dict], tokenizer, *, quotes: bool = True) -> list[dict]:
    """Return messages with marks around control tokens in them, unless quotes is False, and the assistant's text."""
    tokens = control_tokens_of(tokenizer)

    def mark(text: str, role: str) -> str:
        text = MARKS.sub("", text)
        if quotes:
            text = tokens.sub(f"{QUOTES[0]}\\g<0>{QUOTES[1]}", text)
        return f"{WRITTEN[0]}{text}{WRITTEN[1]}" if role == "assistant" else text

    result = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            content = mark(content, message["role"])
        else:
            content = [
                {**part, "text": mark(part["text"], message["role"])} if part.get("text") is not None else part
                for part in content
            ]
        result.append({**message, "content": content})
    return result


def encode_piece(tokenizer, text: str, *, quoted: bool, follows: bool, with_spans: bool) -> tuple[list, list]:
    """Return the ids of a piece of a chat and, if wanted, where each begins and ends in it.

    quoted: control tokens in it are text. follows: it stands behind another piece, so it is encoded behind a line
    break, before which SentencePiece adds its space.
    """
    front = "\n" if follows else ""
    options = {"add_special_tokens": False, "split_special_tokens": quoted, "return_offsets_mapping": with_spans}
    encoded = tokenizer(front + text, **options)
    ids, breaks = encoded["input_ids"], tokenizer(front, add_special_tokens=False)["input_ids"] if front else []
    if ids[: len(breaks)] != breaks:
        return encode_piece(tokenizer, text, quoted=quoted, follows=False, with_spans=with_spans)
    spans = encoded["offset_mapping"][len(breaks) :] if with_spans else [(0, 0)] * (len(ids) - len(breaks))
    return ids[len(breaks) :], [(start - len(front), end - len(front)) for start, end in spans]


def encode_marked(tokenizer, chat: str, *, with_mask: bool = False) -> tuple[list[int], list[int]]:
    """Return the ids of a chat rendered from `marked` messages and, with_mask, 1 at what the assistant writes.

    The end token directly behind what it writes is part of that; without with_mask all are 0.
    """
    ids, mask, is_written = [], [], False
    for number, piece in enumerate(re.split(f"[{''.join(QUOTES)}]", chat)):
        text, written = "", []  # written: of each character, whether the assistant writes it
        for part in re.split(f"([{''.join(WRITTEN)}])", piece):
            if part in WRITTEN:
                is_written = part == WRITTEN[0]
            else:
                text, written = text + part, written + [is_written] * len(part)
        if text:
            layout = {"quoted": number % 2 == 1, "follows": bool(ids), "with_spans": with_mask}
            piece_ids, spans = encode_piece(tokenizer, text, **layout)
            ids += piece_ids
            mask += [int(any(written[max(start, 0) : end])) for start, end in spans]
    ends = [column for column in range(1, len(ids)) if mask[column - 1] and ids[column] == tokenizer.eos_token_id]
    for column in ends:
        mask[column] = 1
    return ids, mask
