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
import difflib
import inspect
import re
from collections.abc import Sequence
from itertools import takewhile
from numbers import Integral

import torch
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils import logging

from .chat_template_mmcoconut import (
    ANSWER_MARKER,
    CHAT_TEMPLATE,
    MARKERS,
    SAMPLE_HISTORY,
    RenderedPrompt,
    conversations_of,
    encode_marked,
    images_of,
    marked,
    messages_of,
    starts_with_bos,
    texts_of,
    with_thoughts,
)
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
from .images_mmcoconut import flat_images


logger = logging.get_logger(__name__)

TEXT_OPTIONS = ("return_tensors", "padding", "max_length", "pad_to_multiple_of", "padding_side", "truncation")
TEXT_OPTIONS += ("return_mm_token_type_ids", "return_attention_mask")
OPTION_GROUPS = ("text_kwargs", "images_kwargs", "common_kwargs")
CALL_OPTIONS = ("images", "text", "num_latents", "history", "rendered")
ANSWER_LINE = re.compile(rf"^(?:{ANSWER_MARKER}#*\s*)+", re.MULTILINE)  # also GSM8K's four; also written twice


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


def check_arguments(cls, kwargs: dict) -> None:
    """Refuse names that `__init__` of a class does not have.

    Raises:
        ValueError: names the nearest one.
    """
    known = inspect.signature(cls.__init__).parameters.keys() - {"self", "kwargs"}
    for name in kwargs.keys() - known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(sorted(known))}."
        raise ValueError(f"{name} is no argument of {cls.__name__}: {hint}")


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
        check_arguments(cls, kwargs)
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
        check_arguments(cls, kwargs)
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

    def _get_num_multimodal_tokens(self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs):
        """Tokens and tiles of images (height, width); serving engines ask every processor for them by this name."""
        if image_sizes is None:
            return MultiModalData()
        tiles = [1] * len(image_sizes)
        if makes_tiles(self.image_processor):
            count = self.image_processor.get_number_of_image_patches
            tiles = [count(height, width, kwargs) for height, width in image_sizes]
            if not self.use_thumbnail:  # which is counted where there are several
                tiles = [number - (number > 1) for number in tiles]
        return MultiModalData(num_image_tokens=[len(self.image_ids(n)) for n in tiles], num_image_patches=tiles)

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
        is_whole = isinstance(num_latents, Integral) and not isinstance(num_latents, bool)
        if not is_whole or num_latents < 0:
            raise ValueError(f"num_latents={num_latents!r} is no number of latents: give a whole one from 0 on.")
        return {"num_latents": int(num_latents), "markers": self.markers}

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
        chat = self.tokenizer.apply_chat_template(
            marked(messages, self.tokenizer),
            chat_template=self.chat_template,
            add_generation_prompt=messages[-1]["role"] == "user",
            tokenize=False,
            **self.layout(num_latents),
        )
        return self.encode_rendered(chat, num_tiles)[0]

    def encode_rendered(
        self, chat: str, num_tiles: Sequence[int], *, with_mask: bool = False
    ) -> tuple[list[int], list[int]]:
        """Ids of a rendered chat with images of so many tiles, and `encode_marked`'s mask of what is written.

        Raises:
            ValueError: image tokens and images differ in number.
        """
        ids, mask = encode_marked(self.tokenizer, chat, with_mask=with_mask)
        wanted = ids.count(self.image_token_id)
        if wanted != len(num_tiles):
            raise ValueError(
                f"The text has {wanted} {self.image_token} and {len(num_tiles)} images are given: give one image for "
                "each."
            )
        images = (self.image_ids(number) for number in num_tiles)
        pieces = [next(images) if token_id == self.image_token_id else [token_id] for token_id in ids]
        masks = [[value] * len(piece) for value, piece in zip(mask, pieces)]
        return [token_id for piece in pieces for token_id in piece], [value for values in masks for value in values]

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

    def pad_prompts(self, prompts: Sequence[list[int]], *, padding_side: str = "left", **kwargs) -> dict:
        """Prompts as one batch: padded on the left where the answer follows, on the right for an encoder.

        Returns:
            input_ids, attention_mask (B, T), and of an encoder-decoder decoder_input_ids, decoder_attention_mask.
        """
        encoder, decoder = zip(*map(self.split_prompt, prompts))
        padded = self.tokenizer.pad({"input_ids": list(decoder)}, padding_side=padding_side, **kwargs)
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
        self, images=None, text=None, *, num_latents=None, history=None, rendered: bool | None = None, **kwargs
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
                None finds it out of the type of the text, a `RenderedPrompt`, which stays one when text is added
                behind it or it is pickled; True says so of a copy, False asks a question.
            kwargs: options of the text (`return_tensors`, `padding`, `max_length`, `pad_to_multiple_of`,
                `padding_side`, `truncation`, `return_mm_token_type_ids`) and of the image processor, flat or in
                `text_kwargs`, `images_kwargs` and `common_kwargs`.

        Returns:
            what pad_prompts and encode_images give.

        Raises:
            ValueError: images, histories and texts differ in number; an image cannot be read.
        """
        if rendered and (num_latents is not None or history is not None):
            raise ValueError(
                "num_latents and history have no effect on rendered text: give them to apply_chat_template instead."
            )
        if text is None:
            raise ValueError("text is None: give a question for each image ('' for none).")
        text_options, image_options = self.options_of(kwargs)
        texts = [text] if isinstance(text, str) else list(text)
        groups = images_of_each(images, texts)
        pixels, tiles = self.encode_images(groups, **image_options)
        if rendered is None:
            rendered = all(isinstance(prompt, RenderedPrompt) for prompt in texts) and bool(texts)
        if rendered:
            input_ids = [self.encode_rendered(prompt, num_tiles)[0] for prompt, num_tiles in zip(texts, tiles)]
        else:
            input_ids = self.encode_questions(texts, tiles, num_latents, history)
        return self.batch_of(input_ids, pixels, text_options)

    def encode_questions(self, texts: list[str], tiles: list[list[int]], num_latents, history) -> list[list[int]]:
        """Ids of the prompts of questions; arguments as of a call, tiles of each image of each question."""
        if any(token in question for token in (self.image_token, *THOUGHT_TOKENS) for question in texts):
            logger.warning_once(
                "A question contains the string of a special token, which is read as plain text; pass rendered=True "
                "for text that apply_chat_template(tokenize=False) made and that was copied since."
            )
        counts = list(num_latents) if isinstance(num_latents, (list, tuple)) else [num_latents] * len(texts)
        if len(counts) != len(texts):
            raise ValueError(f"{len(counts)} entries in num_latents for {len(texts)} texts: give one a text, or one.")
        histories = [()] * len(texts) if history is None else list(history)
        if len(histories) != len(texts):
            raise ValueError(
                f"{len(histories)} entries in history for {len(texts)} texts: give one a text ([] for none)."
            )
        return [
            self.encode_prompt(question, num_tiles=num_tiles, num_latents=count, history=earlier)
            for question, num_tiles, count, earlier in zip(texts, tiles, counts, histories)
        ]

    def options_of(self, kwargs: dict) -> tuple[dict, dict]:
        """Options of the text and of the image processor, out of flat ones and `text_kwargs`, `images_kwargs`, ….

        Raises:
            ValueError: an unknown name, or one without effect.
        """
        groups = {name: dict(kwargs.pop(name, None) or {}) for name in OPTION_GROUPS}
        of_images = set(self.image_processor.valid_kwargs.__annotations__) - {"return_tensors"}
        known = {*TEXT_OPTIONS, *of_images}
        for name in [*kwargs, *(name for group in groups.values() for name in group)]:
            if name not in known:
                close = difflib.get_close_matches(name, [*known, *CALL_OPTIONS], n=1)
                hint = f"did you mean {close[0]}?" if close else f"the text has {', '.join(TEXT_OPTIONS)}."
                raise ValueError(f"{name} is no option of the processor: {hint}")
        shared = {**groups["common_kwargs"], **kwargs}
        text = {name: value for name, value in shared.items() if name in TEXT_OPTIONS} | groups["text_kwargs"]
        images = {name: value for name, value in shared.items() if name in of_images} | groups["images_kwargs"]
        if text.get("return_tensors") is not None:
            images["return_tensors"] = text["return_tensors"]
        wants_length = text.get("padding") == "max_length" or text.get("truncation")
        if text.get("max_length") is not None and not wants_length:
            raise ValueError(
                f"max_length={text['max_length']} has no effect alone: add padding='max_length', or truncation=True, "
                "which refuses longer prompts."
            )
        return text, images

    def batch_of(self, input_ids: list[list[int]], pixels: dict, options: dict, masks=None) -> BatchFeature:
        """Prompts and pixels as a batch under the options of the text; masks of what the assistant writes, or None.

        Raises:
            ValueError: truncation of a prompt that is too long, which could cut images or thoughts.
        """
        options = dict(options)
        limit, truncation = options.get("max_length"), options.pop("truncation", None)
        longest = max(map(len, input_ids), default=0)
        if truncation and (limit is None or longest > limit):
            raise ValueError(
                f"truncation={truncation!r} could cut images or thoughts of a prompt of {longest} tokens, and "
                f"max_length is {limit}: shorten the text before, use fewer images or latents, or raise max_length."
            )
        return_tensors, with_types = options.get("return_tensors"), options.pop("return_mm_token_type_ids", False)
        options.setdefault("padding", len(input_ids) > 1)
        batch = self.pad_prompts(input_ids, **options)
        ids = batch["input_ids"]
        if masks is not None:
            side = options.get("padding_side", "left")
            rows = [([0] * (len(row) - len(mask)), mask) for row, mask in zip(ids, masks)]
            rows = [[*pad, *mask] if side == "left" else [*mask, *pad] for pad, mask in rows]
            batch["assistant_masks"] = rows
        if with_types:
            is_image = [[int(token == self.image_token_id) for token in row] for row in ids]
            batch["mm_token_type_ids"] = is_image
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

    def apply_chat_template(
        self,
        conversation,
        chat_template=None,
        *,
        num_latents: int | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        sanitize_control_tokens: bool = True,
        return_tensors: str | None = "auto",
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """Render chats with this processor's latents and markers; tokenized, control tokens in messages are text.

        Args:
            conversation: messages of one chat, or of several; images under `image`, `url`, `path` or `base64`.
            tokenize: False gives a `RenderedPrompt`, which a call of this processor reads as such.
            return_assistant_tokens_mask: also `assistant_masks`, 1 at what the assistant writes and its end token.
            sanitize_control_tokens: False reads control tokens in messages as such.
            processor_kwargs, kwargs: options of a call of this processor, and variables of the template.

        Raises:
            ValueError: a control token in a message with tokenize=False, whose text could no longer tell it from ours.
        """
        chats, is_batch = conversations_of(conversation)
        layout = {**self.layout(num_latents), **kwargs}
        options = {name: layout.pop(name) for name in [*layout] if name in (*TEXT_OPTIONS, *OPTION_GROUPS)}
        options |= processor_kwargs or {}
        if return_tensors != "auto":
            options["return_tensors"] = return_tensors
        template = {"chat_template": chat_template or self.chat_template, "tokenize": False, **layout}
        if not tokenize:
            if sanitize_control_tokens and any(
                token in text for token in self.tokenizer.all_special_tokens for text in texts_of(conversation)
            ):
                raise ValueError(
                    "A message contains the string of a special token, which rendered text cannot tell from a real "
                    "one: call apply_chat_template with tokenize=True, return_dict=True."
                )
            prompts = [RenderedPrompt(self.tokenizer.apply_chat_template(chat, **template)) for chat in chats]
            return prompts if is_batch else prompts[0]
        if return_assistant_tokens_mask and self.decoder_start_token_id is not None:
            raise ValueError("An encoder-decoder reads no assistant messages: leave return_assistant_tokens_mask out.")
        text_options, image_options = self.options_of(options)
        pixels, tiles = self.encode_images([images_of(chat) for chat in chats], **image_options)
        rows = [
            self.encode_rendered(
                self.tokenizer.apply_chat_template(
                    marked(chat, self.tokenizer, quotes=sanitize_control_tokens), **template
                ),
                num_tiles,
                with_mask=return_assistant_tokens_mask,
            )
            for chat, num_tiles in zip(chats, tiles)
        ]
        input_ids, masks = map(list, zip(*rows))
        is_single = not is_batch and text_options.get("return_tensors") is None
        batch = self.batch_of(input_ids, pixels, text_options, masks if return_assistant_tokens_mask else None)
        if not return_dict:
            return batch["input_ids"][0] if is_single else batch["input_ids"]
        return batch

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
