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
from collections.abc import Sequence
from itertools import takewhile

import torch
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils import logging

from .chat_template_mmcoconut import (
    ANSWER_MARKER,
    CHAT_TEMPLATE,
    MARKERS,
    SAMPLE_HISTORY,
    control_tokens_of,
    conversations_of,
    encode_marked,
    images_of,
    last_place,
    messages_of,
    parse_answer,
    quoted,
    render,
    starts_with_bos,
    unquoted,
    with_thoughts,
    without_images,
)
from .configuration_mmcoconut import (
    END_LATENT_TOKEN,
    IMAGE_TOKEN,
    LATENT_TOKEN,
    START_LATENT_TOKEN,
    THOUGHT_TOKENS,
    add_special_tokens,
    check_tokenizer,
    image_token_of,
)
from .images_mmcoconut import flat_images, images_of_each, makes_tiles, set_tiles, without_thumbnails
from .options_mmcoconut import (
    TOKENIZER_OPTIONS,
    check_arguments,
    check_lengths,
    limit_of,
    split_chat_options,
    split_options,
    whole_number,
)
from .rendered_mmcoconut import RenderedForm, RenderedPrompt, rendered_prompt


logger = logging.get_logger(__name__)


def parts_of_vlm(vlm) -> tuple:
    """Tokenizer, image processor and chat template of a processor, or of the files of a checkpoint.

    The checkpoint's processor itself is not built, because it may want libraries for videos.
    """
    if isinstance(vlm, ProcessorMixin):
        return copy.deepcopy(vlm.tokenizer), copy.deepcopy(vlm.image_processor), vlm.chat_template
    tokenizer = AutoTokenizer.from_pretrained(vlm)
    chat_template = ProcessorMixin.get_processor_dict(vlm)[0].get("chat_template") or tokenizer.chat_template
    return tokenizer, AutoImageProcessor.from_pretrained(vlm), chat_template


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
        ValueError: a tokenizer without the special tokens; unknown `markers` or arguments; `num_latents` that is no
            integer from 0 on.
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
        check_arguments(type(self), kwargs)
        # A saved tokenizer forgets it. An answer follows its prompt; an encoder counts columns from the question's.
        tokenizer.padding_side = "left" if decoder_start_token_id is None else "right"
        self.image_seq_length = image_seq_length
        self.num_latents = whole_number(num_latents)
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
        check_arguments(cls, kwargs, "vision", "text", "config")
        tokenizer = kwargs.pop("tokenizer", None) or AutoTokenizer.from_pretrained(text)
        image_processor = kwargs.pop("image_processor", None) or AutoImageProcessor.from_pretrained(vision)
        add_special_tokens(tokenizer)
        check_tokenizer(tokenizer, config, IMAGE_TOKEN)
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
        check_arguments(cls, kwargs, "vlm", "config", "min_tiles", "max_tiles")
        tokenizer, image_processor, chat_template = (
            kwargs.pop(name, None) or part
            for name, part in zip(("tokenizer", "image_processor", "chat_template"), parts_of_vlm(vlm))
        )
        set_tiles(image_processor, image_size=config.image_size, min_tiles=min_tiles, max_tiles=max_tiles)
        image_token = image_token_of(tokenizer, config.image_token_id)
        chat_template = with_thoughts(chat_template, tokenizer, image_token)
        add_special_tokens(tokenizer, image_token)
        check_tokenizer(tokenizer, config, image_token)
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
        """Tokens and tiles of images (height, width) under a call's options, by the name that serving engines know."""
        if image_sizes is None:
            return MultiModalData()
        _, options = split_options(kwargs, self.tokenizer, self.image_processor)
        if options.get("size") is not None:
            options["patch_size"] = options["size"]  # as the image processor calls the side of a tile there
        tiles = [1] * len(image_sizes)
        if makes_tiles(self.image_processor):
            count = self.image_processor.get_number_of_image_patches
            tiles = [count(height, width, options) for height, width in image_sizes]
            if not self.use_thumbnail:  # which is counted where there are several
                tiles = [number - (number > 1) for number in tiles]
        return MultiModalData(num_image_tokens=[len(self.image_ids(n)) for n in tiles], num_image_patches=tiles)

    def image_ids(self, num_tiles: int) -> list[int]:
        """Ids of an image: its placeholders, and what frames them."""
        frame = (self.start_image_token, self.end_image_token)
        start, end = ([] if token is None else [self.tokenizer.convert_tokens_to_ids(token)] for token in frame)
        return [*start, *[self.image_token_id] * (self.image_seq_length * num_tiles), *end]

    @property
    def model_input_names(self) -> list[str]:
        """Return the names that a call gives for text with images."""
        text = ["input_ids", "attention_mask"]
        if self.decoder_start_token_id is not None:
            text += self.prompt_names
        return [*text, "pixel_values", *(["num_tiles"] if makes_tiles(self.image_processor) else [])]

    def layout(self, num_latents: int | None) -> dict:
        """The template's variables: how many latents and which markers."""
        num_latents = self.num_latents if num_latents is None else num_latents
        return {"num_latents": whole_number(num_latents), "markers": self.markers}

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
        variables = {**self.layout(num_latents), "add_generation_prompt": messages[-1]["role"] == "user"}
        tokens = control_tokens_of(self.tokenizer, self.chat_template)
        chat, _ = render(self.tokenizer, self.chat_template, quoted(messages, tokens), variables)
        return self.encode_rendered(chat, num_tiles)[0]

    def encode_rendered(
        self, chat: str, num_tiles: Sequence[int], spans: Sequence[tuple[int, int]] = ()
    ) -> tuple[list[int], list[int]]:
        """Ids of a rendered chat with images of so many tiles, and 1 at those in its spans, 0 elsewhere.

        Raises:
            ValueError: image tokens and images differ in number.
        """
        ids, mask = encode_marked(self.tokenizer, chat, spans)
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

    def pad_prompts(self, prompts: Sequence[list[int]], *, padding_side: str | None = None, **kwargs) -> dict:
        """Prompts as one batch: padded on the left where the answer follows, on the right for an encoder.

        padding_side: of a decoder alone; default: the tokenizer's, which is made to be on the left.

        Returns:
            input_ids, attention_mask (B, T), and of an encoder-decoder decoder_input_ids, decoder_attention_mask.

        Raises:
            ValueError: a padding_side for an encoder-decoder.
        """
        if self.decoder_start_token_id is None:
            return dict(
                self.tokenizer.pad(
                    {"input_ids": list(prompts)}, padding_side=padding_side or self.tokenizer.padding_side, **kwargs
                )
            )
        if padding_side is not None:
            raise ValueError(
                f"padding_side={padding_side!r} has no effect: an encoder-decoder's questions are padded on the right "
                "and what its decoder begins with on the left. Leave it out."
            )
        encoder, decoder = zip(*map(self.split_prompt, prompts))
        padded = self.tokenizer.pad({"input_ids": list(decoder)}, padding_side="left", **kwargs)
        batch = dict(zip(self.prompt_names, padded.values()))
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
                base64 text, a PIL image, an array or a tensor; all but the last two are read by `read_images`. A flat
                list for several rendered texts is shared out by their image tokens.
            text (`str | list[str]`): questions. They are user text: a special token's string in them stays text. None
                gives the images alone.
            num_latents (`int | list[int]`): latents of every prompt, or of each; default `self.num_latents`. In a
                conversation they stand before every answer.
            history: for each text question and answer of the turns before it, of which the first has the images.
            rendered: True: the text comes out of `apply_chat_template(..., tokenize=False)`, its special tokens are
                meant; False: it is a question, whatever is written in it. None: a `RenderedPrompt` is rendered, and
                so is a copy of one that is a plain string, if all of it is what the chat template writes
                (`RenderedForm`) and neither num_latents nor history is given. Pass False for text of users that you
                do not trust.
            kwargs: options of the text (`return_tensors`, `padding`, `max_length`, `pad_to_multiple_of`,
                `padding_side`, `truncation`, `return_mm_token_type_ids`, `return_attention_mask`) and of the image
                processor, flat or in `text_kwargs`, `images_kwargs` and `common_kwargs`.

        Returns:
            what pad_prompts and encode_images give.

        Raises:
            ValueError: images, histories and texts differ in number; an image cannot be read; an unknown option.
        """
        text_options, image_options = split_options(kwargs, self.tokenizer, self.image_processor)
        if text is None:
            return self.images_alone(images, text_options, image_options, num_latents=num_latents, history=history)
        texts = [text] if isinstance(text, str) else list(text)
        is_question = num_latents is not None or history is not None
        flags = self.rendered_ones(texts, rendered, is_question=is_question, with_images=images is not None)
        if any(flags) and is_question:
            raise ValueError(
                "num_latents and history have no effect on rendered text: give them to apply_chat_template instead."
            )
        shares = [prompt.count(self.image_token) for prompt in texts] if all(flags) else None
        pixels, tiles = self.encode_images(images_of_each(images, texts, shares), **image_options)
        questions = iter(
            self.encode_questions(
                [question for question, flag in zip(texts, flags) if not flag],
                [num_tiles for num_tiles, flag in zip(tiles, flags) if not flag],
                num_latents,
                history,
            )
        )
        input_ids = [
            self.encode_rendered(unquoted(prompt), num_tiles)[0] if flag else next(questions)
            for prompt, num_tiles, flag in zip(texts, tiles, flags)
        ]
        return self.batch_of(input_ids, pixels, text_options)

    def images_alone(self, images, text_options: dict, image_options: dict, **of_text) -> BatchFeature:
        """A call without text: what the model reads for the images."""
        set_by_others = ("return_tensors", *TOKENIZER_OPTIONS)
        idle = [name for name, value in of_text.items() if value is not None]
        idle += [name for name in text_options if name not in set_by_others]
        if images is None or idle:
            effect = f", so that {', '.join(idle)} would have no effect" if idle else ""
            raise ValueError(f"text is None{effect}: give a question for each image ('' for none), or images alone.")
        pixels, _ = self.encode_images([images if isinstance(images, (list, tuple)) else [images]], **image_options)
        return BatchFeature(pixels, tensor_type=text_options.get("return_tensors"))

    def rendered_ones(
        self, texts: Sequence[str], rendered: bool | None, *, is_question: bool, with_images: bool
    ) -> list[bool]:
        """Return for each text whether it is a rendered prompt; arguments as of a call."""
        if not texts or not all(isinstance(text, str) for text in texts):
            kinds = ", ".join(sorted({type(text).__name__ for text in texts}))
            what = f"a list of {kinds}" if kinds else "an empty list"
            raise ValueError(f"text is {what}: give at least one question, every one as a string.")
        if rendered is not None:
            return [rendered] * len(texts)
        found = [isinstance(prompt, RenderedPrompt) for prompt in texts]
        tokens = control_tokens_of(self.tokenizer, self.chat_template)
        if is_question or not any(tokens.search(prompt) for prompt in texts):
            return found
        layout = {"markers": self.markers, "image_token": self.image_token, "with_images": with_images}
        form = RenderedForm(self.tokenizer, self.chat_template, **layout)
        return [is_sure or form.fits(prompt) for is_sure, prompt in zip(found, texts)]

    def encode_questions(self, texts: list[str], tiles: list[list[int]], num_latents, history) -> list[list[int]]:
        """Ids of the prompts of questions; arguments as of a call, tiles of each image of each question."""
        if any(token in question for token in (self.image_token, *THOUGHT_TOKENS) for question in texts):
            logger.warning_once(
                "A question contains the string of a special token, which is read as plain text; pass rendered=True "
                "for text that apply_chat_template(tokenize=False) made and that was changed since."
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

    def batch_of(self, input_ids: list[list[int]], pixels: dict, options: dict, masks=None) -> BatchFeature:
        """Prompts and pixels as a batch under the options of the text; masks of what the assistant writes, or None.

        Raises:
            ValueError: a prompt that is too long for max_length.
        """
        options, limit = dict(options), limit_of(options, self.tokenizer)
        return_tensors, with_types, _ = (
            options.pop(name, None) for name in ("return_tensors", "return_mm_token_type_ids", "truncation")
        )
        if options.get("padding") != "max_length":
            options.pop("max_length", None)
        options.setdefault("padding", len(input_ids) > 1 or options.get("pad_to_multiple_of") is not None)
        check_lengths([part for prompt in input_ids for part in self.split_prompt(prompt)], limit)
        batch = self.pad_prompts(input_ids, **options)
        if masks is not None:
            rows = [([0] * (len(row) - len(mask)), mask) for row, mask in zip(batch["input_ids"], masks)]
            is_left = (options.get("padding_side") or self.tokenizer.padding_side) == "left"
            batch["assistant_masks"] = [[*pad, *mask] if is_left else [*mask, *pad] for pad, mask in rows]
        if with_types:
            image_ids = set(self.image_ids(1))
            batch["mm_token_type_ids"] = [[int(token in image_ids) for token in row] for row in batch["input_ids"]]
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
            return_assistant_tokens_mask: also `assistant_masks`, 1 at what the assistant writes and its end token:
                what the template puts into `{% generation %}`, or else the messages' text and an end token behind it.
            sanitize_control_tokens: False reads control tokens in messages as such.
            processor_kwargs: options of a call of this processor, and `images` (a list for each chat) where messages
                have only places for them.
            kwargs: variables of the template, `add_generation_prompt`, `continue_final_message`, `tools`,
                `documents`; also options of a call.

        Returns:
            text of each chat; tokenized, ids of each (also of a single one), or with return_dict what a call gives.

        Raises:
            ValueError: a control token in a message with tokenize=False, whose text could no longer tell it from ours;
                an unknown name; a mask of a template that changes the assistant's text.
        """
        chats, is_batch = conversations_of(conversation)
        template = chat_template or self.chat_template
        variables, options = split_chat_options(kwargs, processor_kwargs or {}, template, self.image_processor)
        if "num_latents" in options and num_latents is not None:
            raise ValueError("num_latents is given twice, by itself and in processor_kwargs: give it once.")
        variables |= self.layout(options.pop("num_latents", num_latents))
        images = options.pop("images", None)
        if return_tensors != "auto":
            options["return_tensors"] = return_tensors
        text_options, image_options = split_options(options, self.tokenizer, self.image_processor)
        if not tokenize:
            prompts = [
                rendered_prompt(self.tokenizer, template, chat, variables, sanitized=sanitize_control_tokens)
                for chat in chats
            ]
            return prompts if is_batch else prompts[0]
        if return_assistant_tokens_mask and self.decoder_start_token_id is not None:
            raise ValueError("An encoder-decoder reads no assistant messages: leave return_assistant_tokens_mask out.")
        groups = [images_of(chat) for chat in chats] if images is None else images_of_each(images, chats)
        pixels, tiles = self.encode_images(groups, **image_options)
        tokens = control_tokens_of(self.tokenizer, template) if sanitize_control_tokens else None
        rows = []
        for chat, num_tiles in zip(chats, tiles):
            said = quoted(without_images(chat), tokens)
            text, spans = render(
                self.tokenizer, template, said, quoted(variables, tokens), with_spans=return_assistant_tokens_mask
            )
            rows.append(self.encode_rendered(text, num_tiles, spans))
        input_ids, masks = map(list, zip(*rows))
        batch = self.batch_of(input_ids, pixels, text_options, masks if return_assistant_tokens_mask else None)
        return batch if return_dict else batch["input_ids"]

    def decode_answers(self, generated_ids) -> list[str]:
        """The answers in generated ids (B, new tokens), as `parse_answer` finds them; '' where there is none."""
        texts = self.tokenizer.batch_decode(generated_ids, skip_special_tokens=True)
        return [parse_answer(text) for text in texts]


MMCoconutProcessor.register_for_auto_class()

__all__ = ["MMCoconutProcessor", "parse_answer", "START_LATENT_TOKEN", "END_LATENT_TOKEN"]
