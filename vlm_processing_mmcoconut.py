"""The processor of any vision-language model of transformers with thoughts: a subclass of its own processor's class.

    thinking_processor_class(Qwen2_5_VLProcessor)       the class, under the same name
    vlm_processing_mmcoconut.Qwen2_5_VLProcessor        the same, as `auto_map` names it in a checkpoint

What stands for an image is asked of the own processor: it is called with texts in which a marker separates a row's
images, so frames, rows of tiles, breaks and their texts come from there, and so do all tensors but those with one
entry a token, which `column_inputs` makes from the final ids. num_latents and markers are saved beside the own fields;
without this code the own processor opens, whose chat template then writes no thoughts.
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
    """The settings of a part, such as a processor of videos, whose libraries are not installed; saved as they are."""

    _auto_class, model_input_names = None, []

    def __getattr__(self, name: str):
        """Return a setting, None where it is not known."""
        if name.startswith("_"):
            raise AttributeError(name)
        return self.get(name)


def types_of_prefix(processor, input_ids, written, images) -> list[list[int]]:
    """Return 0 in the part that is read both ways, which ends where thoughts or answers begin, and 1 behind."""
    thoughts = set(processor.tokenizer.convert_tokens_to_ids(list(THOUGHT_TOKENS)))
    types = []
    for row, said in zip(input_ids, written):
        begins = (column for column, (token, is_said) in enumerate(zip(row, said)) if is_said or token in thoughts)
        start = next(begins, len(row))
        types.append([0] * start + [1] * (len(row) - start))
    return types


def cross_attention_mask(processor, input_ids, written, images) -> list | None:
    """Return 1 where a token reads the tiles of an image before it (B, T, images, tiles)."""
    from transformers.models.mllama import processing_mllama as own

    if "aspect_ratio_mask" not in (images or {}):
        return None
    seen = [own.get_cross_attention_token_mask(row, processor.image_token_id) for row in input_ids]
    tiles = torch.as_tensor(images["aspect_ratio_mask"]).sum(-1).tolist()  # (B, images)
    most = processor.image_processor.max_image_tiles
    return own.convert_sparse_cross_attention_mask_to_dense(seen, tiles, most, max(map(len, input_ids))).tolist()


# What processors give with one entry a token, and how it is made of the final ids: by the own processor's method, or
# by a function here, for one processor or for all.
COLUMNS: dict[str, str | Callable] = {
    "mm_token_type_ids": "create_mm_token_type_ids",
    "moe_mm_token_type_ids": "create_moe_mm_token_type_ids",
    "token_type_ids": "create_mm_token_type_ids",
    "PaliGemmaProcessor.token_type_ids": types_of_prefix,
    "MllamaProcessor.cross_attention_mask": cross_attention_mask,
}
BY_ROW = ("MllamaProcessor",)  # whose tensors have an entry for each row, also for rows without images
FLAT = ("GotOcr2Processor",)  # which read no lists of lists of images
SHARED_FRAMES = ("Idefics2Processor",)  # one frame between neighbours, and a space between an image and a word


class ThinkingVLMProcessor(ThinkingProcessor):
    """What `thinking_processor_class` puts in front of the class of a vision-language model's processor.

    Fields, saved beside its own: num_latents and markers as in MMCoconutProcessor; image_options, of the own image
    processor at every call.
    """

    own_class: type[ProcessorMixin]
    num_latents, markers, image_options = 0, "both", {}
    decoder_start_token_id = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a processor; parts for videos or sound that cannot be loaded, or have no files, are left out."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (ImportError, OSError, ValueError):  # what images need too raises it again
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
        """Make a processor of its parts and the fields of processor_config.json."""
        given = {**processor_dict, **kwargs}
        fields = {name: given.pop(name) for name in FIELDS if name in given}
        is_pair = given.pop("return_unused_kwargs", False)
        made, unused = super().from_args_and_dict(args, given, return_unused_kwargs=True)
        made.set_up(**fields)
        return (made, unused) if is_pair else made

    def set_up(self, num_latents: int = 0, markers: str = "both", image_options: dict | None = None) -> None:
        """Set the fields of thoughts; raise ValueError for unknown markers and what is no number of latents."""
        check_markers(markers)
        self.markers, self.image_options = markers, dict(image_options or {})
        self.num_latents = self.layout(num_latents)["num_latents"]
        self.tokenizer.padding_side = "left"  # a saved tokenizer forgets it, and an answer follows its prompt

    def to_dict(self) -> dict:
        """Return the fields of processor_config.json."""
        own = super().to_dict()
        for name in self.get_attributes():
            if isinstance(getattr(self, name), NotLoaded):
                own[name] = {key: value for key, value in getattr(self, name).items() if key != "auto_map"}
                own = {key: value for key, value in own.items() if key != name or value}
        return own | {name: getattr(self, name) for name in FIELDS}

    def check_argument_for_proper_class(self, argument_name, argument):
        """Check the class of a part; one that is not loaded has none."""
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
        """Return the names of what the model reads with one entry a token, which the own processor is asked for.

        Raises:
            ValueError: a name that this code cannot make for text with thoughts.
        """
        grey = flat_images(torch.full((64, 64), 127, dtype=torch.uint8))
        inputs = self._own_inputs([grey], " a" * 99, {})
        known, text_names = {name.rpartition(".")[2] for name in COLUMNS}, {"input_ids", "attention_mask", "labels"}
        shape = torch.as_tensor(inputs["input_ids"]).shape  # (1, T)
        for name, value in inputs.items():
            if name not in text_names | known and getattr(value, "shape", ())[:2] == shape:
                problem = f"{self.own_class.__name__} gives {name} with one entry a token, which is not known"
                raise ValueError(f"{problem}: this vision-language model cannot have thoughts.")
        return sorted(known & {*inputs, *self.model_input_names} - set(self.tokenizer.model_input_names))

    def _own_inputs(self, groups: Sequence[Sequence], behind: str, options: dict) -> dict:
        """Return what the own processor gives for rows of images with marks around each, and other text behind."""
        marked = (
            START_LATENT_TOKEN + (self.image_token + START_LATENT_TOKEN) * len(group) + behind for group in groups
        )
        as_ids = {"padding": True, "return_tensors": None, "add_special_tokens": False}
        images = [image for group in groups for image in group] if type(self).__name__ in FLAT else groups
        options = {"images_kwargs": {"return_tensors": "pt", **self.image_options, **options}, "text_kwargs": as_ids}
        return dict(self.own_class.__call__(self, images=images, text=[*marked], **options))

    def encode_images(self, groups: Sequence[Sequence], **kwargs) -> tuple[dict, list[list[tuple]]]:
        """Return the tensors that the own processor makes of groups of images, and the ids that stand for each image.

        Only what has one entry a token is left out, which `column_inputs` makes.
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
        """Return the ids of each image of a row, without a bos token, which is of the text."""
        mark, bos = self.tokenizer.convert_tokens_to_ids(START_LATENT_TOKEN), self.tokenizer.bos_token_id
        places = [place for place, token_id in enumerate(ids) if token_id == mark]
        outside = {*ids[: places[0]], *ids[places[-1] + 1 :]} if places else set()
        if len(places) != num_images + 1 or outside & {*self.image_token_ids}:
            found = (
                f"{self.own_class.__name__} moved or dropped marks around {num_images} images, or put images elsewhere"
            )
            raise ValueError(f"{found}, so what stands for each is unknown: this processor cannot have thoughts.")
        return [tuple(i for i in ids[start + 1 : end] if i != bos) for start, end in pairwise(places)]

    @staticmethod
    def _for_all_rows(tensor: torch.Tensor, groups: Sequence[Sequence]) -> torch.Tensor:
        """Return a tensor with an entry for each row that has images, with zeros for the others."""
        whole = tensor.new_zeros(len(groups), *tensor.shape[1:])
        whole[[row for row, group in enumerate(groups) if group]] = tensor
        return whole

    def image_ids(self, num_tiles: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ids of an image, which `encode_images` gave."""
        if not isinstance(num_tiles, tuple):
            remedy = "give what encode_images returned, for the size of an image says what stands for it"
            raise ValueError(f"num_tiles={num_tiles!r} are no ids of an image: {remedy}.")
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
        """Return what the model reads beside the ids of a batch with one entry a token, as in ThinkingProcessor."""
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
