"""Processor of MMCoconut: questions and images → input_ids with image and latent placeholders, and answers back.

The chat template is the only definition of the layout; a vision-language model's own gets the latents added:

    [<image>…] question \n <|start-latent|> <|latent|>×num_latents <|end-latent|> step \n … ### answer <eos>

In an encoder-decoder, the encoder reads the question; the decoder begins with its start token and the thoughts.
"""

import operator
from collections.abc import Sequence
from itertools import chain, compress, takewhile
from typing import SupportsIndex

import torch
from transformers import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils import ModelOutput

from .chat_template_mmcoconut import (
    MARKERS,
    check_arguments,
    control_tokens_of,
    conversations_of,
    encode_marked,
    is_rendered,
    messages_of,
    padding_options,
    parse_answer,
    quoted,
    render,
    rendered_prompts,
    split_chat_options,
    split_options,
)
from .configuration_mmcoconut import IMAGE_TOKEN, LATENT_TOKEN, THOUGHT_TOKENS
from .images_mmcoconut import flat_images, images_of_each, makes_tiles


def check_markers(markers: str) -> None:
    """Raise ValueError for markers that are not one of MARKERS."""
    if markers not in MARKERS:
        raise ValueError(f"markers={markers!r} is not one of {', '.join(MARKERS)}: set markers to one of them.")


class ThinkingProcessor:
    """Base mixin of the processors of composed and vision-language models: prompts with thoughts, and answers.

    A subclass has tokenizer, image_processor, chat_template; image_token and its id, latent_token_id;
    num_latents, markers, decoder_start_token_id; and `encode_images` and `image_ids`. num_tiles is what these return
    and take per image: its number of tiles, or the ids of its placeholders.
    """

    # Maximum number of tiles per image; None: the placeholders depend on the image's size.
    most_tiles: int | None = None
    # Names in the output of `column_inputs`.
    column_names: Sequence[str] = ()

    def column_inputs(self, input_ids, attention_mask, images: dict | None = None, written=None) -> dict:
        """Return additional model inputs with one entry per token; none by default.

        input_ids, attention_mask: of the padded batch (B, T), tensors or lists; the result has the same type.
        images: output of `encode_images` for the rows. written (B, T): True where the assistant writes.
        """
        return {}

    @property
    def prompt_names(self) -> tuple[str, str]:
        """Return the model's argument names of the ids with the thoughts, and of their mask."""
        prefix = "" if self.decoder_start_token_id is None else "decoder_"
        return f"{prefix}input_ids", f"{prefix}attention_mask"

    def layout(self, num_latents: int | None) -> dict:
        """Return the template's variables: num_latents, an integer and no bool, and markers."""
        count = self.num_latents if num_latents is None else num_latents
        if not isinstance(count, SupportsIndex) or isinstance(count, bool) or operator.index(count) < 0:
            raise ValueError(f"num_latents={count!r} must be a non-negative integer: set it to 6, for example.")
        return {"num_latents": operator.index(count), "markers": self.markers}

    def encode_prompt(self, question: str, *, num_images=1, num_latents=None, num_tiles=None, history=()) -> list[int]:
        """Return the ids of everything before the predicted text; strings of special tokens are encoded as text.

        num_tiles: per image, from `encode_images`; default: num_images images of one tile.
        history: question and answer of each earlier turn; thoughts come before every answer.
        """
        tiles = [1] * num_images if num_tiles is None else list(num_tiles)
        variables = {**self.layout(num_latents), "add_generation_prompt": True}
        return self.encode_chat(messages_of(question, history, len(tiles)), tiles, variables)[0]

    def encode_chat(self, chat, num_tiles, variables: dict, *, template=None, sanitized=True, masked=False):
        """Return the ids of a chat with images of num_tiles tiles and, if masked, 1 where the assistant writes."""
        template = template or self.chat_template
        tokens = control_tokens_of(self.tokenizer, template) if sanitized else None
        text, spans = render(self.tokenizer, template, *quoted([chat, variables], tokens), with_spans=masked)
        return self.encode_rendered(text, num_tiles, spans)

    def encode_rendered(self, chat: str, num_tiles: Sequence[int], spans: Sequence = ()) -> tuple[list, list]:
        """Return the ids of a rendered chat with images of num_tiles tiles, and 1 inside its spans, else 0."""
        ids, mask = encode_marked(self.tokenizer, chat, spans)
        placeholder = self.tokenizer.convert_tokens_to_ids(self.image_token)
        wanted = f"{ids.count(placeholder)} {self.image_token}"
        if ids.count(placeholder) != len(num_tiles):
            raise ValueError(f"The text has {wanted}, but {len(num_tiles)} images are given: give one image for each.")
        images = (self.image_ids(number) for number in num_tiles)
        pieces = [next(images) if token_id == placeholder else [token_id] for token_id in ids]
        masks = [[value] * len(piece) for value, piece in zip(mask, pieces)]
        return [*chain(*pieces)], [*chain(*masks)]

    def split_prompt(self, prompt: list[int]) -> tuple[list[int], list[int]]:
        """Split a prompt into the encoder's ids, [] without an encoder, and the decoder's first ids.

        Raise ValueError for thoughts before other text, as in a chat with answers: an encoder cannot think.
        """
        if self.decoder_start_token_id is None:
            return [], prompt
        thought_ids = self.tokenizer.convert_tokens_to_ids(list(THOUGHT_TOKENS))
        end = len(prompt) - len([*takewhile(thought_ids.__contains__, reversed(prompt))])
        if any(token in thought_ids for token in prompt[:end]):
            remedy = "leave assistant messages out, and pass add_generation_prompt=True"
            raise ValueError(f"An encoder-decoder's prompt has text after its thoughts: {remedy}.")
        return [*prompt[:end], self.tokenizer.eos_token_id], [self.decoder_start_token_id, *prompt[end:]]

    def pad_prompts(self, prompts: Sequence[list[int]], *, padding_side: str | None = None, **kwargs) -> dict:
        """Return padded ids and masks (B, T) of prompts as `model_input_names`; encoders pad on the right."""
        if self.decoder_start_token_id is None:
            side = padding_side or self.tokenizer.padding_side
            return dict(self.tokenizer.pad({"input_ids": list(prompts)}, padding_side=side, **kwargs))
        if padding_side is not None:
            remedy = "leave it out, because encoders are padded on the right and decoders on the left"
            raise ValueError(f"padding_side={padding_side!r} has no effect with an encoder-decoder: {remedy}.")
        encoder, decoder = zip(*map(self.split_prompt, prompts))
        begun = self.tokenizer.pad({"input_ids": list(decoder)}, padding_side="left", **kwargs)
        batch = dict(zip(self.prompt_names, begun.values()))
        return {**batch, **self.tokenizer.pad({"input_ids": list(encoder)}, padding_side="right", **kwargs)}

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of ordinary text, without adding or parsing special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def __call__(
        self, images=None, text=None, *, num_latents=None, history=None, rendered: bool | None = None, **kwargs
    ) -> BatchFeature:
        """Make prompts for `generate`: images first, then the question, then the latents.

        Args:
            images: one per text, or a list for each text, or all for a single text; see `read_images`.
            text (`str | list[str]`): questions, or prompts of `apply_chat_template(..., tokenize=False)`.
            num_latents (`int | list[int]`): latents before every answer, for all texts or each; default: as saved.
            history: question and answer of each text's earlier turns; the first turn has the images.
            rendered: True: texts are such prompts. False: texts are questions, in which special tokens remain text
                (for user input). None: `is_rendered` decides; with num_latents or history they are questions.
            kwargs: options of the text and of the image processor, flat or in groups; see `split_options`.

        Returns the outputs of pad_prompts and encode_images. Raises ValueError for arguments that do not fit together.
        """
        text_options, image_options = split_options(kwargs, self.image_processor)
        if text is None:
            raise ValueError("text is None: give a question for each image ('' for none), or use encode_images.")
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"text={texts!r:.80} is no list of texts: give at least one question, each as a string.")
        is_question = num_latents is not None or history is not None
        flags = [is_rendered(each, self, is_question) if rendered is None else rendered for each in texts]
        if any(flags) and is_question:
            raise ValueError("num_latents and history have no effect on rendered text: give apply_chat_template both.")
        counts = num_latents if isinstance(num_latents, (list, tuple)) else [num_latents] * len(texts)
        histories = [()] * len(texts) if history is None else history
        for name, values in (("num_latents", counts), ("history", histories)):
            if len(values) != len(texts):
                raise ValueError(f"{len(values)} entries in {name} for {len(texts)} texts: give one per text.")
        shares = [prompt.count(self.image_token) for prompt in texts] if all(flags) else ()
        pixels, tiles = self.encode_images(images_of_each(images, len(texts), shares), **image_options)
        input_ids = [
            self.encode_rendered(quoted(prompt, None), num_tiles)[0]
            if flag
            else self.encode_prompt(prompt, num_tiles=num_tiles, num_latents=count, history=earlier)
            for prompt, flag, num_tiles, count, earlier in zip(texts, flags, tiles, counts, histories)
        ]
        return self._batch_of(input_ids, pixels, text_options)

    def _batch_of(self, input_ids: list[list[int]], pixels: dict, options: dict, masks=()) -> BatchFeature:
        """Make a batch of prompts and pixels with the text options; masks: 1 where the assistant writes."""
        longest = max(len(part) for prompt in input_ids for part in self.split_prompt(prompt))
        options = padding_options(options, self.tokenizer, num_rows=len(input_ids), longest=longest)
        return_tensors, with_types = options.pop("return_tensors", None), options.pop("return_mm_token_type_ids", None)
        batch = self.pad_prompts(input_ids, **options)
        if masks:
            is_left = (options.get("padding_side") or self.tokenizer.padding_side) == "left"
            pads = [[0] * (len(row) - len(mask)) for row, mask in zip(batch["input_ids"], masks)]
            batch["assistant_masks"] = [pad + mask if is_left else mask + pad for pad, mask in zip(pads, masks)]
        if with_types:
            batch["mm_token_type_ids"] = self.create_mm_token_type_ids(batch["input_ids"])
        columns = self.column_inputs(*(batch.get(name) for name in self.prompt_names), pixels)
        return BatchFeature({**batch, **columns, **pixels}, tensor_type=return_tensors)

    def apply_chat_template(
        self,
        conversation,
        chat_template=None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        sanitize_control_tokens: bool = True,
        **kwargs,
    ):
        """Render or tokenize chats with this processor's latents and markers; control tokens in messages are text.

        Args:
            conversation: messages of one chat, or of several; images under `image`, `url`, `path` or `base64`.
            tokenize: False returns a `RenderedPrompt` per chat; control tokens in messages then raise ValueError.
            return_dict: True returns the same as `__call__`, False a list of ids per chat, even for one chat.
            return_assistant_tokens_mask: also return `assistant_masks`, 1 where the assistant writes; see `render`.
            sanitize_control_tokens: False parses control tokens in messages.
            kwargs: `num_latents`; template variables, `add_generation_prompt`, `tools`, …; options of a call, also in
                `processor_kwargs`, with `images` (a list per chat) if messages hold only their placeholders.
        """
        chats, groups, is_batch = conversations_of(conversation)
        template = chat_template or self.chat_template
        variables, options = split_chat_options(kwargs, template, self.image_processor)
        variables |= self.layout(options.pop("num_latents", None))
        groups = images_of_each(options.pop("images"), len(chats)) if "images" in options else groups
        text_options, image_options = split_options(options, self.image_processor)
        if not tokenize:
            chats = rendered_prompts(self.tokenizer, template, chats, variables, sanitized=sanitize_control_tokens)
            return chats if is_batch else chats[0]
        if return_assistant_tokens_mask and self.decoder_start_token_id is not None:
            raise ValueError("An encoder-decoder reads no assistant messages: leave return_assistant_tokens_mask out.")
        pixels, tiles = self.encode_images(groups, **image_options)
        how = {"template": template, "sanitized": sanitize_control_tokens, "masked": return_assistant_tokens_mask}
        rows = (self.encode_chat(chat, num_tiles, variables, **how) for chat, num_tiles in zip(chats, tiles))
        input_ids, masks = zip(*rows)
        batch = self._batch_of(input_ids, pixels, text_options, masks if return_assistant_tokens_mask else ())
        return batch if return_dict else batch["input_ids"]

    def decode_answers(self, generated, inputs=None) -> list[str]:
        """Return the answers in the output of `generate`, as found by `parse_answer`; '' if there is none.

        generated: ids (rows, T), or an output of `generate` with `sequences`.
        inputs: those of `generate`, to cut off the prompts; others raise ValueError. None: there are no prompts.
        """
        ids = generated["sequences"] if isinstance(generated, ModelOutput) else generated
        if inputs is not None:
            prompts = torch.as_tensor(inputs[self.prompt_names[0]], device=ids.device)  # (B, P)
            begun, ids = ids[:, : prompts.shape[1]], ids[:, prompts.shape[1] :]
            if not torch.equal(begun, prompts.repeat_interleave(len(ids) // len(prompts), dim=0)):
                given = f"{len(prompts)} prompts of {prompts.shape[1]} tokens"
                raise ValueError(f"{len(ids)} generated rows do not begin with the {given}: pass generate's inputs.")
        return [parse_answer(text) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


class MMCoconutProcessor(ThinkingProcessor, ProcessorMixin):
    """Processor of composed models: a tokenizer and an image processor with the layout of this file.

    Args:
        image_processor, tokenizer: of the backbones; the tokenizer must hold the special tokens.
        image_seq_length (`int`): placeholders of one image or tile, `config.image_seq_length` of the model.
        num_latents (`int`): default number of latents per prompt; a trained checkpoint has its last stage's.
        markers (`str`): `both` (the paper) | `start` | `none`, the markers around the latents.
        chat_template (`str`): the layout, as the functions of mmcoconut.build write it.
        image_token, start_image_token, end_image_token (`str`): image placeholder, and tokens around it, or None.
        use_thumbnail (`bool`): whether an image of several tiles also gives the whole picture, as the last tile.
        decoder_start_token_id (`int`): first token of an encoder-decoder's decoder; None for a decoder-only model.

    Raises ValueError for a tokenizer without the special tokens, or invalid `markers`, `num_latents` or arguments.
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
        check_arguments(type(self), kwargs)
        wanted = (image_token, *THOUGHT_TOKENS, start_image_token, end_image_token)
        missing = sorted({*wanted} - {None, *tokenizer.get_vocab()}, key=wanted.index)
        remedy = "build the processor with processor_from_backbones or composed_processor_from_vlm"
        if missing:
            raise ValueError(f"The tokenizer lacks the special tokens {', '.join(missing)}: {remedy}, which add them.")
        if chat_template is None:
            raise ValueError(f"chat_template is None: {remedy}, which write one.")
        check_markers(markers)
        # Saved tokenizers forget the side. Answers follow their prompts; encoders count columns from the question's.
        tokenizer.padding_side = "left" if decoder_start_token_id is None else "right"
        self.image_seq_length, self.use_thumbnail = image_seq_length, use_thumbnail
        self.num_latents, self.markers = num_latents, markers
        self.num_latents = self.layout(None)["num_latents"]
        self.image_token, self.image_token_id = image_token, tokenizer.convert_tokens_to_ids(image_token)
        self.start_image_token, self.end_image_token = start_image_token, end_image_token
        self.decoder_start_token_id = decoder_start_token_id
        self.latent_token_id = tokenizer.convert_tokens_to_ids(LATENT_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def encode_images(self, groups: Sequence[Sequence], **kwargs) -> tuple[dict, list[list[int]]]:
        """Return pixel_values (images, channels, height, width) of groups of images, and the tiles per image.

        If the image processor makes tiles: (tiles, channels, height, width), with num_tiles (images,).
        """
        groups = [flat_images(group) for group in groups]
        images = [*chain(*groups)]
        if not images:
            return {}, [[] for _ in groups]
        if not makes_tiles(self.image_processor):
            return dict(self.image_processor(images, **kwargs)), [[1] * len(group) for group in groups]
        return_tensors = kwargs.pop("return_tensors", None)
        inputs = dict(self.image_processor(images, **kwargs))
        tiles, counts = inputs["pixel_values"], inputs.pop("num_patches")
        if not self.use_thumbnail:  # drop the last tile of images with several
            kept = [place < max(1, count - 1) for count in counts for place in range(count)]
            tiles, counts = [*compress(tiles, kept)], [max(1, count - 1) for count in counts]
        each = iter(counts)
        inputs = BatchFeature({**inputs, "pixel_values": tiles, "num_tiles": counts}, tensor_type=return_tensors)
        return dict(inputs), [[next(each) for _ in group] for group in groups]

    def _get_num_multimodal_tokens(self, image_sizes: Sequence[tuple[int, int]] = (), **kwargs):
        """Return tokens and tiles of images (height, width) under a call's options; serving engines call it."""
        _, options = split_options(kwargs, self.image_processor)
        if options.get("size") is not None:
            options["patch_size"] = options["size"]  # the image processor's name for the side of a tile
        tiles = [1] * len(image_sizes)
        if makes_tiles(self.image_processor):
            count = self.image_processor.get_number_of_image_patches
            tiles = [count(height, width, options) for height, width in image_sizes]
            if not self.use_thumbnail:  # counted if there are several tiles
                tiles = [number - (number > 1) for number in tiles]
        return MultiModalData(num_image_tokens=[len(self.image_ids(n)) for n in tiles], num_image_patches=tiles)

    def image_ids(self, num_tiles: int) -> list[int]:
        """Return the ids of an image: its placeholders, and the tokens around them."""
        frame = (self.start_image_token, self.end_image_token)
        start, end = ([] if token is None else [self.tokenizer.convert_tokens_to_ids(token)] for token in frame)
        return [*start, *[self.image_token_id] * (self.image_seq_length * num_tiles), *end]

    @property
    def most_tiles(self) -> int:
        """Return the maximum number of tiles per image, thumbnail included."""
        cuts = makes_tiles(self.image_processor) and self.image_processor.crop_to_patches
        return self.image_processor.max_patches + 1 if cuts else 1

    def create_mm_token_type_ids(self, input_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return 1 at image placeholders, 0 elsewhere."""
        image_ids = set(self.image_ids(1))
        return [[int(token in image_ids) for token in row] for row in input_ids]

    @property
    def model_input_names(self) -> list[str]:
        """Return the names of a call's outputs for text with images."""
        text = dict.fromkeys(("input_ids", "attention_mask", *self.prompt_names))
        return [*text, "pixel_values", *(["num_tiles"] if makes_tiles(self.image_processor) else [])]


MMCoconutProcessor.register_for_auto_class()

__all__ = ["MMCoconutProcessor", "parse_answer"]
