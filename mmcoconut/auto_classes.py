"""The library's Auto classes know this package's: a checkpoint then loads without running code out of its folder."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
)

from mmcoconut.configuration_mmcoconut import MMCoconutConfig
from mmcoconut.modeling_mmcoconut import MMCoconutForConditionalGeneration
from mmcoconut.processing_mmcoconut import MMCoconutProcessor
from mmcoconut.seq2seq_mmcoconut import MMCoconutForSeq2SeqLM


# Of several classes the library takes the one that a checkpoint's `architectures` name, else the first.
BOTH = (MMCoconutForConditionalGeneration, MMCoconutForSeq2SeqLM)
MODEL_CLASSES = {
    AutoModel: BOTH,
    AutoModelForImageTextToText: BOTH,
    AutoModelForCausalLM: (MMCoconutForConditionalGeneration,),
    AutoModelForSeq2SeqLM: (MMCoconutForSeq2SeqLM,),
}


def register() -> None:
    """Make the Auto classes give this package's classes for `model_type` mmcoconut."""
    AutoConfig.register(MMCoconutConfig.model_type, MMCoconutConfig)
    for auto_class, classes in MODEL_CLASSES.items():
        auto_class.register(MMCoconutConfig, classes)
    AutoProcessor.register(MMCoconutConfig, MMCoconutProcessor)
