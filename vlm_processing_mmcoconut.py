"""Add thoughts to the processor of any vision-language model of transformers, in a subclass of its own class.

    thinking_processor_class(Qwen2_5_VLProcessor)       the class, under the same name
    vlm_processing_mmcoconut.Qwen2_5_VLProcessor        the same, as `auto_map` names it in a checkpoint

The model's own processor provides each image's placeholder ids: it is called with texts in which a marker separates a
row's images, so frames, rows of tiles, breaks and their texts come from it, and so do all tensors except those with
one entry per token, which `column_inputs` makes from the final ids. num_latents and markers are saved with its own
fields; without this code the own processor is loaded, whose chat template then writes no thoughts.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from itertools import pairwise

import torch
import transformers
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature
from transformers.processing_utils import ProcessorMixin

from .chat_template_mmcoconut import QUOTES
from .configuration_mmcoconut import LATENT_TOKEN, START_LATENT_TOKEN, THOUGHT_TOKENS
from .images_mmcoconut import flat_images
from .processing_mmcoconut import ThinkingProcessor, check_markers


FIELDS = ("num_latents", "markers", "image_options")
LOADERS = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}


class NotLoaded(dict):
    """Settings of a part (such as a video processor) whose libraries are not installed; saved unchanged."""

    _auto_class, model_input_names = None, []

    def __getattr__(self, name: str):
        """Return a setting; None if it is unknown."""
        if name.startswith("_"):
            raise AttributeError(name)
        return self.get(name)


def types_of_prefix(processor, input_ids, written, images) -> list[list[int]]:
    """Return 0 in the bidirectional part, which ends where thoughts or answers begin, and 1 after it."""
    thoughts = set(processor.tokenizer.convert_tokens_to_ids(list(THOUGHT_TOKENS)))
    types = []
    for row, said in zip(input_ids, written):
        begins = (column for column, (token, is_said) in enumerate(zip(row, said)) if is_said or token in thoughts)
        start = next(begins, len(row))
        types.append([0] * start + [1] * (len(row) - start))
    return types


def cross_attention_mask(processor, input_ids, written, images) -> list | None:
    """Return (B, T, images, tiles), 1 where a token attends to a tile of an earlier image."""
    from transformers.models.mllama import processing_mllama as own

    if "aspect_ratio_mask" not in (images or {}):
        return None
    seen = [own.get_cross_attention_token_mask(row, processor.image_token_id) for row in input_ids]
    tiles = torch.as_tensor(images["aspect_ratio_mask"]).sum(-1).tolist()  # (B, images)
    most = processor.image_processor.max_image_tiles
    return own.convert_sparse_cross_attention_mask_to_dense(seen, tiles, most, max(map(len, input_ids))).tolist()


# Processor outputs with one entry per token, and how they are made from the final ids: by the own processor's method,
# or by a function here, for one processor or for all.
COLUMNS: dict[str, str | Callable] = {
    "mm_token_type_ids": "create_mm_token_type_ids",
    "moe_mm_token_type_ids": "create_moe_mm_token_type_ids",
    "token_type_ids": "create_mm_token_type_ids",
    "PaliGemmaProcessor.token_type_ids": types_of_prefix,
    "MllamaProcessor.cross_attention_mask": cross_attention_mask,
}
BY_ROW = ("MllamaProcessor",)  # its tensors have an entry per row, even without images
FLAT = ("GotOcr2Processor",)  # it does not take lists of lists of images
SHARED_FRAMES = ("Idefics2Processor",)  # one frame between neighbours, and a space between an image and a word


class ThinkingVLMProcessor(ThinkingProcessor):
    """Mixin that adds thoughts to a vision-language model's processor; see `thinking_processor_class`.

    Fields, saved with its own: num_latents and markers as in MMCoconutProcessor; image_options, for every call of the
    own image processor.
    """

    own_class: type[ProcessorMixin]
    num_latents, markers, image_options = 0, "both", {}
    decoder_start_token_id = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a processor without video or audio parts that cannot be loaded or have no files."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (ImportError, OSError, ValueError):  # raised again if images need it too
            settings, unused = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
            parts = [
                LOADERS[name].from_pretrained(pretrained_model_name_or_path, **kwargs)
                if name in LOADERS
                else NotLoaded(settings.get(name) or {})
                for name in cls.get_attributes()
            ]
            return cls.from_args_and_dict(parts, settings, **unused)

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict, **kwargs):
        """Make a processor from its parts and the fields of processor_config.json."""
        given = {**processor_dict, **kwargs}
        fields = {name: given.pop(name) for name in FIELDS if name in given}
        is_pair = given.pop("return_unused_kwargs", False)
        made, unused = super().from_args_and_dict(args, given, return_unused_kwargs=True)
        made.set_up(**fields)
        return (made, unused) if is_pair else made

    def set_up(self, num_latents: int = 0, markers: str = "both", image_options: dict | None = None) -> None:
        """Set the thought fields; raise ValueError for unknown markers or an invalid num_latents."""
        check_markers(markers)
        self.markers, self.image_options = markers, dict(image_options or {})
        self.num_latents = self.layout(num_latents)["num_latents"]
        self.tokenizer.padding_side = "left"  # saved tokenizers forget it; answers follow their prompts

    def to_dict(self) -> dict:
        """Return the fields of processor_config.json."""
        own = super().to_dict()
        for name in self.get_attributes():
            if isinstance(getattr(self, name), NotLoaded):
                own[name] = {key: value for key, value in getattr(self, name).items() if key != "auto_map"}
                own = {key: value for key, value in own.items() if key != name or value}
        return own | {name: getattr(self, name) for name in FIELDS}

    def check_argument_for_proper_class(self, argument_name, argument):
        """Check the class of a part, except of a part that is not loaded."""
        return (
            None
            if isinstance(argument, NotLoaded)
            else super().check_argument_for_proper_class(argument_name, argument)
        )

    @property
    def latent_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(LATENT_TOKEN)

    @cached_property
    def column_names(self) -> list[str]:
        """Return the names of the own processor's outputs with one entry per token.

        Raises:
            ValueError: a name that this code cannot make for text with thoughts.
        """
        grey = flat_images(torch.full((64, 64), 127, dtype=torch.uint8))
        inputs = self._own_inputs([grey], " a" * 99, {})
        known, text_names = {name.rpartition(".")[2] for name in COLUMNS}, {"input_ids", "attention_mask", "labels"}
        shape = torch.as_tensor(inputs["input_ids"]).shape  # (1, T)
        for name, value in inputs.items():
            if name not in text_names | known and getattr(value, "shape", ())[:2] == shape:
                problem = f"{self.own_class.__name__} returns {name} with one entry per token, which is not supported"
                raise ValueError(f"{problem}: this vision-language model cannot have thoughts.")
        return sorted(known & {*inputs, *self.model_input_names} - set(self.tokenizer.model_input_names))

    def _own_inputs(self, groups: Sequence[Sequence], behind: str, options: dict) -> dict:
        """Return the own processor's output for rows of images with marks around each, then other text."""
        marked = (
            START_LATENT_TOKEN + (self.image_token + START_LATENT_TOKEN) * len(group) + behind for group in groups
        )
        as_ids = {"padding": True, "return_tensors": None, "add_special_tokens": False}
        images = [image for group in groups for image in group] if type(self).__name__ in FLAT else groups
        options = {"images_kwargs": {"return_tensors": "pt", **self.image_options, **options}, "text_kwargs": as_ids}
        return dict(self.own_class.__call__(self, images=images, text=[*marked], **options))

    def encode_images(self, groups: Sequence[Sequence], **kwargs) -> tuple[dict, list[list[tuple]]]:
        """Return the own processor's tensors for groups of images, and the placeholder ids of each image.

        Outputs with one entry per token are left out; `column_inputs` makes them.
        """
        groups = [flat_images(group) for group in groups]
        given = [group for group in groups if group]
        if not given:
            return {}, [[] for _ in groups]
        tensor_type = kwargs.pop("return_tensors", None)
        inputs = self._own_inputs(given, "", kwargs)
        rows = torch.as_tensor(inputs["input_ids"]).tolist()
        text_names = {"input_ids", "attention_mask", "labels", *self.tokenizer.model_input_names, *self.column_names}
        inputs = {name: value for name, value in inputs.items() if name not in text_names}
        handles = iter([self._between_marks(row, len(group)) for row, group in zip(rows, given)])
        if type(self).__name__ in BY_ROW and len(given) < len(groups):
            inputs = {name: self._for_all_rows(torch.as_tensor(value), groups) for name, value in inputs.items()}
        inputs = BatchFeature(inputs, tensor_type=tensor_type)
        return dict(inputs), [next(handles) if group else [] for group in groups]

    def _between_marks(self, ids: list[int], num_images: int) -> list[tuple[int, ...]]:
        """Return the ids of each image of a row, without the bos token, which belongs to the text."""
        mark, bos = self.tokenizer.convert_tokens_to_ids(START_LATENT_TOKEN), self.tokenizer.bos_token_id
        places = [place for place, token_id in enumerate(ids) if token_id == mark]
        outside = {*ids[: places[0]], *ids[places[-1] + 1 :]} if places else set()
        if len(places) != num_images + 1 or outside & {*self.image_token_ids}:
            found = (
                f"{self.own_class.__name__} moved or dropped marks around {num_images} images, or put images elsewhere"
            )
            raise ValueError(f"{found}, so the placeholders of each are unknown: this processor cannot have thoughts.")
        return [tuple(i for i in ids[start + 1 : end] if i != bos) for start, end in pairwise(places)]

    @staticmethod
    def _for_all_rows(tensor: torch.Tensor, groups: Sequence[Sequence]) -> torch.Tensor:
        """Return a tensor with one entry per row, from entries of the rows with images; zeros for the others."""
        whole = tensor.new_zeros(len(groups), *tensor.shape[1:])
        whole[[row for row, group in enumerate(groups) if group]] = tensor
        return whole

    def image_ids(self, num_tiles: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ids of an image, as returned by `encode_images`."""
        if not isinstance(num_tiles, tuple):
            remedy = "pass what encode_images returned, because placeholders depend on an image's size"
            raise ValueError(f"num_tiles={num_tiles!r} are not the ids of an image: {remedy}.")
        return num_tiles

    def encode_rendered(self, chat: str, num_tiles: Sequence[tuple], spans: Sequence = ()) -> tuple[list, list]:
        """Return the ids of a rendered chat with images, and 1 at those in its spans, as in ThinkingProcessor."""
        if type(self).__name__ in SHARED_FRAMES:
            image = f"(?<!{QUOTES[0]}){re.escape(self.image_token)}"
            places = [found.end() for found in re.finditer(f"{image}(?=[^\\s<{QUOTES[0]}])", chat)]
            ends = [found.span() for found in re.finditer(image, chat)]
            follows = [False, *(end == start for (_, end), (start, _) in pairwise(ends))]
            num_tiles = [ids[is_next:] for ids, is_next in zip(num_tiles, follows)] + [*num_tiles[len(ends) :]]
            spans = [tuple(edge + sum(place < edge for place in places) for edge in span) for span in spans]
            cuts = pairwise([0, *places, len(chat)])
            chat = " ".join(chat[start:end] for start, end in cuts)
        return super().encode_rendered(chat, num_tiles, spans)

    def column_inputs(self, input_ids, attention_mask, images: dict | None = None, written=None) -> dict:
        """Return additional model inputs with one entry per token, as in ThinkingProcessor."""
        is_tensor = isinstance(input_ids, torch.Tensor)
        rows = input_ids.tolist() if is_tensor else input_ids
        said = [[False] * len(row) for row in rows] if written is None else torch.as_tensor(written).tolist()
        columns = {}
        for name in self.column_names:
            maker = COLUMNS.get(f"{self.own_class.__name__}.{name}") or COLUMNS.get(name)
            made = getattr(self, maker)(rows) if isinstance(maker, str) else maker(self, rows, said, images)
            if made is not None:
                columns[name] = torch.tensor(made, device=input_ids.device) if is_tensor else made
        return columns


@cache
def thinking_processor_class(own_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Return the class of a vision-language model's processor with thoughts, under the name of its own class."""
    body = {"__module__": __name__, "__qualname__": own_class.__name__, "__doc__": ThinkingVLMProcessor.__doc__}
    made = type(own_class.__name__, (ThinkingVLMProcessor, own_class), {**body, "own_class": own_class})
    made.register_for_auto_class()
    return made


def __getattr__(name: str):
    """Return the thinking class of a processor of transformers by its name, as `auto_map` in a checkpoint says."""
    own_class = None if name.startswith("_") else getattr(transformers, name, None)
    if inspect.isclass(own_class) and issubclass(own_class, ProcessorMixin):
        return thinking_processor_class(own_class)
    missing = "" if own_class is None else " without libraries that are not installed, such as torchvision"
    raise AttributeError(
        f"transformers {transformers.__version__} has no class {name}{missing}: install them, or a newer one."
    )
