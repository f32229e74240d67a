"""Tiny processors of vision-language models of any architecture, for smoke tests and tests: nothing is downloaded.

Which special tokens a processor needs is read from its class: the strings in its source, and the names that it asks
of its tokenizer. Its image processor gets small sizes by the names of its fields.
"""

import copy
import inspect
import re
from collections import Counter

import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ImageProcessingMixin, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.processing_utils import ProcessorMixin

from mmcoconut.build.tiny_vlms import PATCH, SIDE
from mmcoconut.build.tokens import add_special_tokens
from mmcoconut.vlm_processing_mmcoconut import NotLoaded, thinking_processor_class


TEXTS = ("What colour is the left square?\nred\ngreen\n### red", "user assistant system 0123456789")
SPECIAL_STRING = re.compile(r"""["'](<[^\s"'<>{}]+>|\[[A-Z_]+\])["']""")
MISSING = re.compile(r"attribute '?(\w+?_token)(?:_id)?\b")
BOS, EOS, PAD, UNKNOWN = "<|bos|>", "<|im_end|>", "<|pad|>", "<|unk|>"
# ChatML, as Qwen, InternVL and SmolVLM have it, with IMAGE where an image stands; some models cannot tell images apart
# between which nothing stands.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
AREA, EDGES = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}, {"shortest_edge": SIDE, "longest_edge": 2 * SIDE}
LARGEST_EDGE = 4096  # larger values of a size are areas
# Small values of fields of image processors and of processors, by name.
IMAGE_FIELDS = {"patch_size": PATCH, "max_patches": 4, "max_num_patches": 64, "max_image_tiles": 4}
IMAGE_FIELDS |= {"image_seq_length": (SIDE // PATCH) ** 2, "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
IMAGE_FIELDS |= {"min_pixels": 16 * 16, "max_pixels": 64 * 64, "pan_and_scan_min_crop_size": 16}
PROCESSOR_FIELDS = {"patch_size": PATCH, "image_seq_length": 4, "image_seq_len": 4, "num_image_tokens": 4}
PROCESSOR_FIELDS |= {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
PROCESSOR_FIELDS |= {"img_size": SIDE}
# What the names alone do not settle, by the processor's class: `image`, fields of the image processor; `own`, of the
# processor; `named`, tokens that it asks of its tokenizer when it is called; `tokens`, others; `placed`, what a chat
# template has where an image stands, if not the image token; None: there is no template.
SPECIAL: dict[str, dict] = {
    "PaliGemmaProcessor": {"image": {"image_seq_length": (SIDE // PATCH) ** 2}, "placed": None},
    "AyaVisionProcessor": {"own": {"downsample_factor": 2}},
    "Ovis2Processor": {
        "own": {"image_seq_length": (SIDE // PATCH) ** 2},
        "tokens": [f"<IMG_{name}>" for name in ("START", "ATOM", "GRID", "COL", "ROW", "END")],
    },
    "MllamaProcessor": {"tokens": [f"<|reserved_special_token_{number}|>" for number in (10, 11, 12)]},
    **dict.fromkeys(
        ("Gemma4Processor", "Gemma4UnifiedProcessor"), {"named": ("audio_token", "boa_token", "eoa_token")}
    ),
    "Idefics2Processor": {"own": {"image_seq_len": 64}},  # of its resampler
    "GraniteDoclingProcessor": {"own": {"image_seq_len": 1}},
    **dict.fromkeys(
        ("JanusProcessor", "DeepseekVLProcessor", "DeepseekVLHybridProcessor"),
        {"own": {"num_image_tokens": (SIDE // PATCH) ** 2}},
    ),
    "VideoLlavaProcessor": {"image": {name: {"height": SIDE, "width": SIDE} for name in ("size", "crop_size")}},
}
FRAMED = {"placed": "<|vision_start|><|image_pad|><|vision_end|>"}
SPECIAL |= dict.fromkeys(("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"), FRAMED)


class NoTinyProcessorError(ValueError):
    """A tiny processor of a model type cannot be made; the message says why."""


def _class_of(name: str | None, what: str, base: type):
    found = getattr(transformers, name, None) if name else None
    if not inspect.isclass(found) or not issubclass(found, base):
        missing = "is not registered" if name is None else f"{name} needs libraries that are not installed"
        raise NoTinyProcessorError(f"its {what} {missing}")
    return found


def processor_class_of(model_type: str) -> type[ProcessorMixin]:
    """Return the class of the processor of a model type; NoTinyProcessorError where there is none to use."""
    return _class_of(PROCESSOR_MAPPING_NAMES.get(model_type), "processor", ProcessorMixin)


def _image_processor_class_of(model_type: str):
    """Return the class for Pillow, of this type or of one with the same processor."""
    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    alike = [model_type, *(other for other, known in PROCESSOR_MAPPING_NAMES.items() if known == name)]
    names = [names for other in alike if (names := IMAGE_PROCESSOR_MAPPING_NAMES.get(other))]
    if not names:
        raise NoTinyProcessorError("its image processor is not registered")
    return _class_of(names[0].get("pil") or names[0].get("torchvision"), "image processor", ImageProcessingMixin)


def tiny_image_processor(model_type: str, **fields):
    """Return an image processor of a model type with sizes that fit `tiny_vlm_config`."""
    image_class = _image_processor_class_of(model_type)
    values = {}
    for name in image_class.valid_kwargs.__annotations__:
        value = getattr(image_class, name, None)
        if isinstance(value, dict) and "size" in name:
            small = PATCH if name.startswith("patch") else SIDE
            edges = AREA if max(value.values()) > LARGEST_EDGE else EDGES
            values[name] = {key: edges.get(key, small) for key in value}
        elif value is not None and name in IMAGE_FIELDS:
            values[name] = IMAGE_FIELDS[name]
    try:
        return image_class(**{**values, **fields})
    except ImportError as error:
        raise NoTinyProcessorError(f"its image processor needs a library: {str(error).strip()}") from error


def _tokenizer_with(strings: list[str], named: dict[str, str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        extra_special_tokens=named,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.add_special_tokens(
        {"extra_special_tokens": ["<|im_start|>", *strings]}, replace_extra_special_tokens=False
    )
    return tokenizer


def tiny_vlm_processor(model_type: str, *, image_fields: dict | None = None, **fields) -> ProcessorMixin:
    """Return a tiny processor of a vision-language model, without its parts for videos.

    image_fields, fields: of the image processor and of the processor, in the place of the small ones.

    Raises:
        NoTinyProcessorError: where it cannot be made, with the reason.
    """
    own_class = processor_class_of(model_type)
    special = SPECIAL.get(own_class.__name__, {})
    image_processor = tiny_image_processor(model_type, **{**special.get("image", {}), **(image_fields or {})})
    parameters = inspect.signature(own_class.__init__).parameters
    values = {
        name: value
        for name, value in {**PROCESSOR_FIELDS, **special.get("own", {}), **fields}.items()
        if name in parameters
    }
    source = "".join(inspect.getsource(each) for each in own_class.__mro__ if "processing_" in each.__module__)
    strings = [
        *special.get("tokens", ()),
        *SPECIAL_STRING.findall(source),
        *re.findall(r"<[^<>]+>", special.get("placed") or ""),
    ]
    made_class, named = thinking_processor_class(own_class), {name: f"<|{name}|>" for name in special.get("named", ())}
    while True:
        tokenizer = _tokenizer_with(list(dict.fromkeys(strings)), named)
        parts = {"image_processor": image_processor, "tokenizer": tokenizer}
        for name in own_class.get_attributes():
            parts.setdefault(name, NotLoaded())
        try:
            made = made_class(**parts, **values)
            image_token = getattr(made, "image_token", None)
            if not isinstance(image_token, str):
                raise ValueError("it has no token that stands for an image in text")
            if image_token in tokenizer.get_vocab():
                break
            strings.append(image_token)
        except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
            found = MISSING.search(str(error))
            if found is None or found[1] in named:
                raise NoTinyProcessorError(f"{own_class.__name__} cannot be made: {error}".strip()) from error
            named[found[1]] = f"<|{found[1]}|>"
    made.__class__ = own_class
    placed = special.get("placed", made.image_token)
    made.chat_template = placed and TEMPLATE.replace("IMAGE", placed)
    return made


def image_token_id_of(processor: ProcessorMixin) -> int:
    """Return the id at which a model puts an image's features: its processor's, or what mostly stands for an image."""
    asked = copy.deepcopy(processor)
    asked.__class__ = thinking_processor_class(type(processor))
    add_special_tokens(asked.tokenizer, asked.image_token)
    [[ids]] = asked.encode_images([[Image.new("RGB", (SIDE, SIDE))]])[1]
    named = processor.image_token_ids[0]
    return named if named in ids else Counter(ids).most_common(1)[0][0]
