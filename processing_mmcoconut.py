"""Processor of MMCoconut: questions and images → input_ids with image and latent placeholders, and answers back.

One sequence layout, written once, in the chat template:

    [<image>…] question \\n <|start-latent|> <|latent|>×num_latents <|end-latent|> step \\n … ### answer <eos>

`markers` says which of the two markers stand around the latents. Training, evaluation, `pipeline` and chat all go
through `encode_prompt` or the template itself, so that they cannot differ.
"""

from collections.abc import Sequence

from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from .configuration_mmcoconut import (
    END_LATENT_TOKEN,
    IMAGE_TOKEN,
    LATENT_TOKEN,
    SPECIAL_TOKENS,
    START_LATENT_TOKEN,
    TOKEN_ID_FIELDS,
    add_special_tokens,
)


logger = logging.get_logger(__name__)

ANSWER_MARKER = "###"
MARKERS = ("both", "start", "none")
CHAT_TEMPLATE = (
    "{%- set thoughts = ('<|start-latent|>' if markers | default('both') != 'none' else '')"
    " ~ '<|latent|>' * (num_latents | default(0))"
    " ~ ('<|end-latent|>' if markers | default('both') == 'both' else '') -%}"
    "{{- BOS -}}"
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


def starts_with_bos(tokenizer) -> bool:
    """Whether this tokenizer puts its bos token in front of a text (Llama does, GPT-2 and Qwen2 do not)."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


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


def texts_of(conversation) -> list[str]:
    """All texts in the messages of a conversation, or of a list of them."""
    if isinstance(conversation, str):
        return [conversation]
    if isinstance(conversation, dict):
        return texts_of(conversation.get("content", conversation.get("text", "")))
    return [text for part in conversation for text in texts_of(part)]


class MMCoconutProcessor(ProcessorMixin):
    r"""
    A tokenizer and an image processor under the layout of this file.

    Args:
        image_processor, tokenizer: of the backbones; the tokenizer must hold the special tokens.
        image_seq_length (`int`): `<image>` placeholders of one image, `config.image_seq_length` of the model.
        num_latents (`int`): latents of a prompt where a call does not say otherwise; a trained checkpoint carries the
            number of its last stage.
        markers (`str`): `both` (the paper) | `start` | `none`, which markers stand around the latents.

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
        **kwargs,
    ):
        missing = [token for token in SPECIAL_TOKENS if token not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(
                f"The tokenizer lacks the special tokens {', '.join(missing)}: build model and tokenizer with "
                "from_backbones, which adds them and grows the embeddings."
            )
        if markers not in MARKERS:
            raise ValueError(f"markers={markers!r} is not one of {', '.join(MARKERS)}: set markers to one of them.")
        if num_latents < 0:
            raise ValueError(f"num_latents={num_latents} is negative: give 0 for no latents, or a number of them.")
        tokenizer.padding_side = "left"  # a saved tokenizer forgets it, and prompts padded behind are answered wrongly
        self.image_seq_length = image_seq_length
        self.num_latents = num_latents
        self.markers = markers
        self.image_token, self.image_token_id = IMAGE_TOKEN, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
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
        for field, token in zip(TOKEN_ID_FIELDS, SPECIAL_TOKENS):
            token_id = tokenizer.convert_tokens_to_ids(token)
            if token_id != getattr(config, field):
                raise ValueError(
                    f"The tokenizer has {token} at {token_id}, the model's {field} is {getattr(config, field)}: use "
                    "the tokenizer that the model was built with."
                )
        return cls(image_processor, tokenizer, image_seq_length=config.image_seq_length, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.image_seq_length

    def layout(self, num_latents: int | None) -> dict:
        """The template's variables: how many latents and which markers."""
        return {"num_latents": self.num_latents if num_latents is None else num_latents, "markers": self.markers}

    def encode_prompt(self, question: str, *, num_images: int = 1, num_latents: int | None = None) -> list[int]:
        """Ids of all that comes before the predicted text; strings of special tokens in `question` are text."""
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
        ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.chat_template,
            add_generation_prompt=True,
            sanitize_control_tokens=True,
            return_dict=False,
            **self.layout(num_latents),
        )
        repeats = [self.image_seq_length if token_id == self.image_token_id else 1 for token_id in ids]
        return [token_id for token_id, repeat in zip(ids, repeats) for _ in range(repeat)]

    def encode_text(self, text: str) -> list[int]:
        """Ids of ordinary text: no special tokens are added, and none are read out of it."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_target(self, steps: Sequence[str], answer: str) -> list[int]:
        """Ids of the predicted text: each step on its line, `### answer`, eos; tokenized apart, as in the paper."""
        ids = [token_id for step in steps for token_id in self.encode_text(f"{step}\n")]
        return [*ids, *self.encode_text(f"{ANSWER_MARKER} {answer}"), self.tokenizer.eos_token_id]

    def __call__(self, images=None, text=None, *, num_latents=None, rendered: bool = False, **kwargs) -> BatchFeature:
        """Prompts for `generate`: images first, then the question, then the latents.

        Args:
            images: one a text, or a list for each text, or all for a single text, or None.
            text (`str | list[str]`): questions. They are user text: a special token's string in them stays text.
            num_latents (`int | list[int]`): latents of every prompt, or of each; default `self.num_latents`.
            rendered: the text comes out of `apply_chat_template(..., tokenize=False)`: its special tokens are meant.
            kwargs: of the tokenizer's `pad` (`return_tensors`, `padding`) or, if rendered, of the library's call.

        Returns:
            input_ids, attention_mask (B, T), padded on the left for a batch, and pixel_values of all images.

        Raises:
            ValueError: images and texts differ in number.
        """
        if rendered and num_latents is not None:
            raise ValueError("num_latents has no effect on rendered text: give it to apply_chat_template instead.")
        if rendered or kwargs.get("sanitize_control_tokens"):
            return super().__call__(images=images, text=text, **kwargs)
        if kwargs.get("truncation"):
            raise ValueError(
                "truncation=True could cut images or thoughts: shorten the text before, and leave it out."
            )
        if text is None:
            raise ValueError("text is None: give a question for each image ('' for none).")
        texts = [text] if isinstance(text, str) else list(text)
        if any(token in question for token in SPECIAL_TOKENS for question in texts):
            logger.warning_once(
                "A question contains the string of a special token, which is read as plain text; pass rendered=True "
                "for text that apply_chat_template(tokenize=False) made."
            )
        groups = images_of_each(images, texts)
        counts = list(num_latents) if isinstance(num_latents, (list, tuple)) else [num_latents] * len(texts)
        if len(counts) != len(texts):
            raise ValueError(f"{len(counts)} entries in num_latents for {len(texts)} texts: give one a text, or one.")
        input_ids = [
            self.encode_prompt(question, num_images=len(group), num_latents=count)
            for question, group, count in zip(texts, groups, counts)
        ]
        return_tensors = kwargs.pop("return_tensors", None)
        batch = self.tokenizer.pad(
            {"input_ids": input_ids}, padding=kwargs.pop("padding", len(texts) > 1), return_tensors=return_tensors
        )
        flat = make_flat_list_of_images([image for group in groups for image in group]) if any(groups) else []
        pixels = self.image_processor(flat, return_tensors=return_tensors, **kwargs) if flat else {}
        return BatchFeature({**batch, **pixels}, tensor_type=return_tensors)

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
        """The answers in generated ids (B, new tokens): the text after the last `###`, '' where there is none."""
        texts = self.tokenizer.batch_decode(generated_ids, skip_special_tokens=True)
        return [parse_answer(text) for text in texts]


def parse_answer(text: str) -> str:
    """The text after the last `###`, without surrounding space; '' where there is none.

    >>> parse_answer("B2\\n### red"), parse_answer("red")
    ('red', '')
    """
    return text.rpartition(ANSWER_MARKER)[2].strip() if ANSWER_MARKER in text else ""


MMCoconutProcessor.register_for_auto_class()

__all__ = ["MMCoconutProcessor", "parse_answer", "START_LATENT_TOKEN", "END_LATENT_TOKEN"]
