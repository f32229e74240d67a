"""Processor of MMCoconut: questions and images → input_ids with image and latent placeholders, and answers back.

One sequence layout, written once, in the chat template:

    [<image>…] question \\n <|start-latent|> <|latent|>×num_latents <|end-latent|> step \\n … ### answer <eos>

Of an encoder-decoder the encoder reads the question, and the decoder begins with its start token and the thoughts.
`markers` says which of the two markers stand around the latents. Training, evaluation, `pipeline` and chat all go
through `encode_prompt` or the template itself, so that they cannot differ. A processor from `from_vlm` keeps the
layout of the vision-language model, its turns and the frames around images, and adds the latents where the assistant
begins to write.
"""

import copy
import re
from collections.abc import Sequence
from itertools import takewhile

import torch
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from .configuration_mmcoconut import (
    END_LATENT_TOKEN,
    IMAGE_TOKEN,
    LATENT_TOKEN,
    START_LATENT_TOKEN,
    THOUGHT_TOKENS,
    TOKEN_ID_FIELDS,
    add_special_tokens,
    image_token_of,
)
from .images_mmcoconut import flat_images, read_images


logger = logging.get_logger(__name__)

ANSWER_MARKER = "###"
ANSWER_LINE = re.compile(rf"^(?:{ANSWER_MARKER}#*\s*)+", re.MULTILINE)  # also GSM8K's four; also written twice
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


def makes_tiles(image_processor) -> bool:
    """Whether this image processor can cut a picture into tiles."""
    return "crop_to_patches" in image_processor.valid_kwargs.__annotations__


def set_tiles(image_processor, *, image_size: int | None, min_tiles: int | None, max_tiles: int | None) -> None:
    """Switch tiles on where the image processor can make them, with the given side and numbers or its own.

    Raises:
        ValueError: a setting for an image processor without tiles; more tiles at least than at most.
    """
    settings = {"min_patches": min_tiles, "max_patches": max_tiles}
    settings["size"] = None if image_size is None else {"height": image_size, "width": image_size}
    given = {name: value for name, value in settings.items() if value is not None}
    if not makes_tiles(image_processor):
        if given:
            raise ValueError(
                f"{type(image_processor).__name__} cuts no tiles, so image_size={image_size}, min_tiles={min_tiles} "
                f"and max_tiles={max_tiles} have no effect: leave them out, or set up its own sizes and give it."
            )
        return
    image_processor.crop_to_patches = True
    for name, value in given.items():
        setattr(image_processor, name, value)
    if not 1 <= image_processor.min_patches <= image_processor.max_patches:
        raise ValueError(
            f"At least {image_processor.min_patches} and at most {image_processor.max_patches} tiles: set min_tiles "
            "and max_tiles so that 1 <= min_tiles <= max_tiles."
        )


def parts_of_vlm(vlm) -> tuple:
    """Tokenizer, image processor and chat template of a processor, or of the files of a checkpoint.

    The checkpoint's processor itself is not built, because it may want libraries for videos.
    """
    if isinstance(vlm, ProcessorMixin):
        return copy.deepcopy(vlm.tokenizer), copy.deepcopy(vlm.image_processor), vlm.chat_template
    tokenizer = AutoTokenizer.from_pretrained(vlm)
    chat_template = ProcessorMixin.get_processor_dict(vlm)[0].get("chat_template") or tokenizer.chat_template
    return tokenizer, AutoImageProcessor.from_pretrained(vlm), chat_template


def check_token_ids(tokenizer, config, image_token: str) -> None:
    """The tokenizer must have the placeholders and markers where the model's configuration has them."""
    for field, token in zip(TOKEN_ID_FIELDS, (image_token, *THOUGHT_TOKENS)):
        token_id = tokenizer.convert_tokens_to_ids(token)
        if token_id != getattr(config, field):
            raise ValueError(
                f"The tokenizer has {token} at {token_id}, the model's {field} is {getattr(config, field)}: use "
                "the tokenizer that the model was built with."
            )


def images_of_each(images, texts: Sequence[str]) -> list[list]:
    """Images as one list a text: nested lists as they are, a flat list one a text, or all for a single text.

    Raises:
        ValueError: a flat list whose length differs from the number of texts, or nested lists of another number.
    """
    if images is None:
        return [[] for _ in texts]
    nested = isinstance(images, (list, tuple)) and all(isinstance(image, (list, tuple)) for image in images)
    flat = list(images) if isinstance(images, (list, tuple)) else [images]
    if not nested and len(texts) == 1:
        return [flat]
    if len(flat) != len(texts):
        raise ValueError(
            f"{len(flat)} images for {len(texts)} texts: give one image a text, or a list of images for each text "
            "([[a, b], [], [c]])."
        )
    return [list(group) for group in flat] if nested else [[image] for image in flat]


def without_thumbnails(inputs: dict) -> dict:
    """pixel_values, a list of tiles, and num_tiles, a list, without the last tile of every image that has several."""
    kept, counts, first = [], [], 0
    for number in inputs["num_tiles"]:
        last = first + max(1, number - 1)
        kept, counts = [*kept, *inputs["pixel_values"][first:last]], [*counts, last - first]
        first += number
    return {**inputs, "pixel_values": kept, "num_tiles": counts}


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


def last_place(part: Sequence[int], whole: Sequence[int]) -> int:
    """Where ids stand in others for the last time; -1 if nowhere.

    >>> last_place([1, 2], [1, 2, 0, 1, 2]), last_place([2, 1], [1, 2])
    (3, -1)
    """
    starts = range(len(whole) - len(part), -1, -1)
    return next((start for start in starts if whole[start : start + len(part)] == part), -1)


class MMCoconutProcessor(ProcessorMixin):
    r"""
    A tokenizer and an image processor under the layout of this file.

    Args:
        image_processor, tokenizer: of the backbones; the tokenizer must hold the special tokens.
        image_seq_length (`int`): placeholders of one image or tile, `config.image_seq_length` of the model.
        num_latents (`int`): latents of a prompt where a call does not say otherwise; a trained checkpoint carries the
            number of its last stage.
        markers (`str`): `both` (the paper) | `start` | `none`, which markers stand around the latents.
        image_token (`str`): the placeholder, in the chat template once an image.
        start_image_token, end_image_token (`str`): what frames the placeholders of an image; None is nothing.
        use_thumbnail (`bool`): whether an image cut into several tiles also gives the whole picture, as its last.
        decoder_start_token_id (`int`): of an encoder-decoder, what its decoder begins with; None for a decoder alone.

    Raises:
        ValueError: a tokenizer without the special tokens; unknown `markers`; a negative `num_latents`.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_seq_length: int | None = None,
        num_latents: int = 0,
        markers: str = "both",
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
        start_image_token: str | None = None,
        end_image_token: str | None = None,
        use_thumbnail: bool = True,
        decoder_start_token_id: int | None = None,
        **kwargs,
    ):
        frame = [token for token in (start_image_token, end_image_token) if token is not None]
        missing = [token for token in (image_token, *THOUGHT_TOKENS, *frame) if token not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(
                f"The tokenizer lacks the special tokens {', '.join(missing)}: build model and tokenizer with "
                "from_backbones or from_vlm, which add them and grow the embeddings."
            )
        if markers not in MARKERS:
            raise ValueError(f"markers={markers!r} is not one of {', '.join(MARKERS)}: set markers to one of them.")
        if num_latents < 0:
            raise ValueError(f"num_latents={num_latents} is negative: give 0 for no latents, or a number of them.")
        # A saved tokenizer forgets it. An answer follows its prompt; an encoder counts columns from the question's.
        tokenizer.padding_side = "left" if decoder_start_token_id is None else "right"
        self.image_seq_length = image_seq_length
        self.num_latents = num_latents
        self.markers = markers
        self.image_token, self.image_token_id = image_token, tokenizer.convert_tokens_to_ids(image_token)
        self.start_image_token, self.end_image_token = start_image_token, end_image_token
        self.use_thumbnail = use_thumbnail
        self.decoder_start_token_id = decoder_start_token_id
        self.latent_token_id = tokenizer.convert_tokens_to_ids(LATENT_TOKEN)
        if chat_template is None:
            chat_template = CHAT_TEMPLATE.replace("BOS", "bos_token" if starts_with_bos(tokenizer) else "''")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_backbones(cls, vision: str | None = None, text: str | None = None, *, config, **kwargs):
        """The processor of a model from `from_backbones`: both parts by name, or given as objects.

        Args:
            vision, text: Hub ids or folders, as for the model; not needed for a part that is given.
            config: the model's configuration; its image_seq_length is taken, its token ids are checked.
            kwargs: `image_processor`, `tokenizer`, and the arguments of this class.

        Raises:
            ValueError: the tokenizer's ids differ from the configuration's.
        """
        tokenizer = kwargs.pop("tokenizer", None) or AutoTokenizer.from_pretrained(text)
        image_processor = kwargs.pop("image_processor", None) or AutoImageProcessor.from_pretrained(vision)
        add_special_tokens(tokenizer)
        check_token_ids(tokenizer, config, IMAGE_TOKEN)
        if config.is_encoder_decoder:
            kwargs.setdefault("decoder_start_token_id", config.text_config.decoder_start_token_id)
        return cls(image_processor, tokenizer, image_seq_length=config.image_seq_length, **kwargs)

    @classmethod
    def from_vlm(cls, vlm, *, config, min_tiles: int | None = None, max_tiles: int | None = None, **kwargs):
        """The processor of a model from `from_vlm`: the VLM's tokenizer, image processor and chat template.

        Args:
            vlm: Hub id or folder, or the VLM's processor, which stays as it is.
            config: the model's configuration; its image token, image_seq_length and image_size are taken.
            min_tiles, max_tiles: tiles that an image is cut into, its thumbnail not counted; default: the VLM's. An
                image processor that can make tiles does so.
            kwargs: the arguments of this class, among them `tokenizer`, `image_processor` and `chat_template` in the
                place of the VLM's, and `start_image_token`, `end_image_token`, by default those that the tokenizer
                names, as InternVL's does.

        Raises:
            ValueError: the tokenizer's ids differ from the configuration's; no chat template; settings of tiles for
                an image processor that makes none.
        """
        tokenizer, image_processor, chat_template = (
            kwargs.pop(name, None) or part
            for name, part in zip(("tokenizer", "image_processor", "chat_template"), parts_of_vlm(vlm))
        )
        set_tiles(image_processor, image_size=config.image_size, min_tiles=min_tiles, max_tiles=max_tiles)
        image_token = image_token_of(tokenizer, config.image_token_id)
        chat_template = with_thoughts(chat_template, tokenizer, image_token)
        add_special_tokens(tokenizer, image_token)
        check_token_ids(tokenizer, config, image_token)
        kwargs.setdefault("start_image_token", getattr(tokenizer, "start_image_token", None))
        kwargs.setdefault("end_image_token", getattr(tokenizer, "end_image_token", None))
        return cls(
            image_processor,
            tokenizer,
            image_seq_length=config.image_seq_length,
            image_token=image_token,
            chat_template=chat_template,
            **kwargs,
        )

    def encode_images(self, groups: Sequence[Sequence], **kwargs) -> tuple[dict, list[list[int]]]:
        """What the model reads for groups of images, and the number of tiles of each image of each group.

        Returns:
            pixel_values (images, channels, height, width) of all groups in order. Of an image processor that makes
            tiles: (tiles, channels, height, width), and num_tiles (images,).
        """
        groups = [flat_images(group) for group in groups]
        images = [image for group in groups for image in group]
        if not images:
            return {}, [[] for _ in groups]
        return_tensors = kwargs.pop("return_tensors", None)
        if not makes_tiles(self.image_processor):
            inputs = dict(self.image_processor(images, return_tensors=return_tensors, **kwargs))
            return inputs, [[1] * len(group) for group in groups]
        inputs = dict(self.image_processor(images, **kwargs))
        inputs["num_tiles"] = inputs.pop("num_patches")
        if not self.use_thumbnail:
            inputs = without_thumbnails(inputs)
        tiles = iter(inputs["num_tiles"])
        return dict(BatchFeature(inputs, tensor_type=return_tensors)), [[next(tiles) for _ in g] for g in groups]

    def prepare_inputs_layout(self, images=None, **kwargs):
        """Read images before transformers, which would clip 16 bits and drop transparency."""
        return super().prepare_inputs_layout(images=None if images is None else read_images(images), **kwargs)

    def _process_images(self, images, **kwargs) -> tuple[dict, list[str]]:
        """As the library's, which replaces each image token of a rendered text by what this says."""
        inputs, [num_tiles] = self.encode_images([images], **kwargs)
        return inputs, [self.replace_image_token(inputs, index, num_tiles=n) for index, n in enumerate(num_tiles)]

    def replace_image_token(self, image_inputs: dict, image_idx: int, *, num_tiles: int = 1, **kwargs) -> str:
        placeholders = self.image_token * (self.image_seq_length * num_tiles)
        return f"{self.start_image_token or ''}{placeholders}{self.end_image_token or ''}"

    def image_ids(self, num_tiles: int) -> list[int]:
        """Ids of an image: its placeholders, and what frames them."""
        frame = [
            [] if token is None else [self.tokenizer.convert_tokens_to_ids(token)]
            for token in (self.start_image_token, self.end_image_token)
        ]
        return [*frame[0], *[self.image_token_id] * (self.image_seq_length * num_tiles), *frame[1]]

    def layout(self, num_latents: int | None) -> dict:
        """The template's variables: how many latents and which markers."""
        num_latents = self.num_latents if num_latents is None else num_latents
        if type(num_latents) is not int or num_latents < 0:
            raise ValueError(f"num_latents={num_latents!r} is no number of latents: give a whole one from 0 on.")
        return {"num_latents": num_latents, "markers": self.markers}

    def encode_prompt(
        self,
        question: str,
        *,
        num_images: int = 1,
        num_latents: int | None = None,
        num_tiles: Sequence[int] | None = None,
        history: Sequence[tuple[str, str]] = (),
    ) -> list[int]:
        """Ids of all that comes before the predicted text; strings of special tokens in it are text.

        num_tiles: the tiles of each image, as `encode_images` gives them; without, num_images images of one.
        history: question and answer of each earlier turn; thoughts stand before every answer.
        """
        tiles = [1] * num_images if num_tiles is None else list(num_tiles)
        return self.encode_messages(messages_of(question, history, len(tiles)), tiles, num_latents)

    def encode_messages(self, messages: list[dict], num_tiles: Sequence[int], num_latents: int | None) -> list[int]:
        """Ids of messages with images of so many tiles; after a user's message the assistant is to write."""
        ids = self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.chat_template,
            add_generation_prompt=messages[-1]["role"] == "user",
            sanitize_control_tokens=True,
            return_dict=False,
            **self.layout(num_latents),
        )
        images = (self.image_ids(number) for number in num_tiles)
        pieces = (next(images) if token_id == self.image_token_id else [token_id] for token_id in ids)
        return [token_id for piece in pieces for token_id in piece]

    def encode_turns(
        self,
        question: str,
        history: Sequence[tuple[str, str]],
        *,
        num_tiles: Sequence[int] = (),
        num_latents: int | None = None,
    ) -> tuple[list[tuple[list[int], list[int]]], list[int]]:
        """`encode_prompt` in pieces: of each earlier turn its prompt and what is to be written; the last prompt.

        What is to be written is the answer and, where the chat template has it, the end token.

        Raises:
            ValueError: a chat template that writes an answer otherwise than `encode_answer`.
        """
        messages = messages_of(question, history, len(num_tiles))
        whole, turns, start = self.encode_messages(messages, num_tiles, num_latents), [], 0
        for number, (_, answer) in enumerate(history, start=1):
            so_far = self.encode_messages(messages[: 2 * number], num_tiles, num_latents)
            written = self.encode_text(f"{ANSWER_MARKER} {answer}")
            same = takewhile(lambda pair: pair[0] == pair[1], zip(whole, so_far))
            first = last_place(written, [token_id for token_id, _ in same])
            if first < start:
                raise ValueError(
                    f"The chat template does not write the answer of turn {number}, {answer!r}, as the model does: "
                    "give a chat_template that keeps earlier answers, with no space added in front of them."
                )
            end = first + len(written)
            end += whole[end] == self.tokenizer.eos_token_id
            turns.append((whole[start:first], whole[first:end]))
            start = end
        return turns, whole[start:]

    @property
    def prompt_names(self) -> tuple[str, str]:
        """What the model calls the ids, and their mask, that the thoughts stand in and the answer follows."""
        prefix = "" if self.decoder_start_token_id is None else "decoder_"
        return f"{prefix}input_ids", f"{prefix}attention_mask"

    def split_prompt(self, prompt: list[int]) -> tuple[list[int], list[int]]:
        """A prompt as what the encoder reads and what the decoder begins with; a decoder alone begins with all.

        Raises:
            ValueError: thoughts before other text, as in a chat with answers, which an encoder would read as text.
        """
        if self.decoder_start_token_id is None:
            return [], prompt
        thought_ids = self.tokenizer.convert_tokens_to_ids(list(THOUGHT_TOKENS))
        end = len(prompt)
        while end > 0 and prompt[end - 1] in thought_ids:
            end -= 1
        if any(token in thought_ids for token in prompt[:end]):
            raise ValueError(
                "The prompt goes on after its thoughts, and an encoder-decoder has them at its end: leave assistant "
                "messages out, and pass add_generation_prompt=True."
            )
        return [*prompt[:end], self.tokenizer.eos_token_id], [self.decoder_start_token_id, *prompt[end:]]

    def pad_prompts(self, prompts: Sequence[list[int]], **kwargs) -> dict:
        """Prompts as one batch: padded on the left where the answer follows, on the right for an encoder.

        Returns:
            input_ids, attention_mask (B, T), and of an encoder-decoder decoder_input_ids, decoder_attention_mask.
        """
        encoder, decoder = zip(*map(self.split_prompt, prompts))
        padded = self.tokenizer.pad({"input_ids": list(decoder)}, padding_side="left", **kwargs)
        batch = dict(zip(self.prompt_names, padded.values()))
        if self.decoder_start_token_id is None:
            return batch
        return {**batch, **self.tokenizer.pad({"input_ids": list(encoder)}, padding_side="right", **kwargs)}

    def encode_text(self, text: str) -> list[int]:
        """Ids of ordinary text: no special tokens are added, and none are read out of it."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_step(self, step: str) -> list[int]:
        """Ids of a written step, on its line."""
        return self.encode_text(f"{step}\n")

    def encode_answer(self, answer: str) -> list[int]:
        """Ids of `### answer`, eos."""
        return [*self.encode_text(f"{ANSWER_MARKER} {answer}"), self.tokenizer.eos_token_id]

    def encode_target(self, steps: Sequence[str], answer: str) -> list[int]:
        """Ids of the predicted text: each step on its line, `### answer`, eos; tokenized apart, as in the paper."""
        return [token_id for step in steps for token_id in self.encode_step(step)] + self.encode_answer(answer)

    def __call__(
        self, images=None, text=None, *, num_latents=None, history=None, rendered: bool = False, **kwargs
    ) -> BatchFeature:
        """Prompts for `generate`: images first, then the question, then the latents.

        Args:
            images: one a text, or a list for each text, or all for a single text, or None. Each is a path, a URL,
                base64 text, a PIL image, an array or a tensor; all but the last two are read by `read_images`.
            text (`str | list[str]`): questions. They are user text: a special token's string in them stays text.
            num_latents (`int | list[int]`): latents of every prompt, or of each; default `self.num_latents`. In a
                conversation they stand before every answer.
            history: for each text question and answer of the turns before it, of which the first has the images.
            rendered: the text comes out of `apply_chat_template(..., tokenize=False)`: its special tokens are meant.
            kwargs: of the tokenizer's `pad` (`return_tensors`, `padding`) or, if rendered, of the library's call.

        Returns:
            what pad_prompts and encode_images give.

        Raises:
            ValueError: images, histories and texts differ in number; an image cannot be read.
        """
        if rendered and (num_latents is not None or history is not None):
            raise ValueError(
                "num_latents and history have no effect on rendered text: give them to apply_chat_template instead."
            )
        if rendered or kwargs.get("sanitize_control_tokens"):
            return self.split_batch(super().__call__(images=images, text=text, **kwargs))
        if kwargs.get("truncation"):
            raise ValueError(
                "truncation=True could cut images or thoughts: shorten the text before, and leave it out."
            )
        if text is None:
            raise ValueError("text is None: give a question for each image ('' for none).")
        texts = [text] if isinstance(text, str) else list(text)
        if any(token in question for token in (self.image_token, *THOUGHT_TOKENS) for question in texts):
            logger.warning_once(
                "A question contains the string of a special token, which is read as plain text; pass rendered=True "
                "for text that apply_chat_template(tokenize=False) made."
            )
        groups = images_of_each(images, texts)
        counts = list(num_latents) if isinstance(num_latents, (list, tuple)) else [num_latents] * len(texts)
        if len(counts) != len(texts):
            raise ValueError(f"{len(counts)} entries in num_latents for {len(texts)} texts: give one a text, or one.")
        histories = [()] * len(texts) if history is None else list(history)
        if len(histories) != len(texts):
            raise ValueError(
                f"{len(histories)} entries in history for {len(texts)} texts: give one a text ([] for none)."
            )
        return_tensors, padding = kwargs.pop("return_tensors", None), kwargs.pop("padding", len(texts) > 1)
        pixels, tiles = self.encode_images(groups, return_tensors=return_tensors, **kwargs)
        input_ids = [
            self.encode_prompt(question, num_tiles=num_tiles, num_latents=count, history=earlier)
            for question, num_tiles, count, earlier in zip(texts, tiles, counts, histories)
        ]
        batch = self.pad_prompts(input_ids, padding=padding, return_tensors=return_tensors)
        return BatchFeature({**batch, **pixels}, tensor_type=return_tensors)

    def further_turn(
        self, sequences, attention_mask, text: Sequence[str], *, num_latents: int | None = None
    ) -> BatchFeature:
        """Prompts of a further turn for `generate`, over the `past_key_values` that it returned with the last one.

            q q <lat> a a eos · · · · q q q <lat>        the mask hides what a row generated after its end, and the
            q q <lat> a a a a a eos q q q q <lat>        padding in front of its new question

        Args:
            sequences (B, T): ids as `generate` returned them, their prompts included.
            attention_mask (B, prompt): of those prompts.
            text: the next question of each row; special tokens' strings in it stay text.
            num_latents: latents before the next answers; default `self.num_latents`.

        Returns:
            input_ids, attention_mask (B, T + new).

        Raises:
            ValueError: sequences, masks and texts differ in number; an encoder-decoder.
        """
        if self.decoder_start_token_id is not None:
            raise ValueError("An encoder-decoder reads one question, and no further turn: ask anew.")
        if not len(sequences) == len(attention_mask) == len(text):
            raise ValueError(
                f"{len(sequences)} sequences, {len(attention_mask)} masks and {len(text)} texts: give one text a row, "
                "and one generated sequence (num_beams and num_return_sequences of 1)."
            )
        prompt_length, eos = attention_mask.shape[1], self.tokenizer.eos_token_id
        masks, turns = [], []
        for written, question in zip(sequences[:, prompt_length:].tolist(), text):
            [(_, answer)], turn = self.encode_turns(question, SAMPLE_HISTORY, num_latents=num_latents)
            num_ends = int(answer[-1] == eos)  # that the template writes behind an answer
            ended = eos in written
            length = written.index(eos) + num_ends if ended else len(written)
            masks.append([1] * length + [0] * (len(written) - length))
            turns.append([*([] if ended else [eos] * num_ends), *turn])
        padded = self.tokenizer.pad({"input_ids": turns}, padding_side="left", return_tensors="pt").to(
            sequences.device
        )
        seen = torch.tensor(masks, dtype=attention_mask.dtype, device=sequences.device)  # (B, T - prompt)
        return BatchFeature(
            {
                "input_ids": torch.cat([sequences, padded["input_ids"]], dim=1),  # (B, T + new)
                "attention_mask": torch.cat([attention_mask, seen, padded["attention_mask"]], dim=1),
            }
        )

    def split_batch(self, batch: BatchFeature) -> BatchFeature:
        """A rendered batch as an encoder-decoder takes it; as it is for a decoder alone."""
        if self.decoder_start_token_id is None:
            return batch
        is_list = isinstance(batch["input_ids"], list)
        rows = zip(batch.pop("input_ids"), batch.pop("attention_mask"))
        prompts = [[int(token) for token, real in zip(*row) if real] for row in rows]
        padded = self.pad_prompts(prompts, padding=True, return_tensors=None if is_list else "pt")
        return BatchFeature({**batch, **padded})

    def apply_chat_template(self, conversation, chat_template=None, *, num_latents: int | None = None, **kwargs):
        """As the library's, with this processor's latents and markers; control tokens in messages are plain text.

        Raises:
            ValueError: such a token in a message with tokenize=False, whose text could no longer tell it from ours.
        """
        if kwargs.get("tokenize"):
            kwargs.setdefault("sanitize_control_tokens", True)
        elif any(token in text for token in self.tokenizer.all_special_tokens for text in texts_of(conversation)):
            raise ValueError(
                "A message contains the string of a special token, which rendered text cannot tell from a real one: "
                "call apply_chat_template with tokenize=True, return_dict=True."
            )
        return super().apply_chat_template(conversation, chat_template, **{**self.layout(num_latents), **kwargs})

    def decode_answers(self, generated_ids) -> list[str]:
        """The answers in generated ids (B, new tokens), as `parse_answer` finds them; '' where there is none."""
        texts = self.tokenizer.batch_decode(generated_ids, skip_special_tokens=True)
        return [parse_answer(text) for text in texts]


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


MMCoconutProcessor.register_for_auto_class()

__all__ = ["MMCoconutProcessor", "parse_answer", "START_LATENT_TOKEN", "END_LATENT_TOKEN"]
