"""Register this package's classes with transformers' Auto classes: checkpoints load without code from their folder."""

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


# Of several classes transformers uses the one in a checkpoint's `architectures`, else the first.
BOTH = (MMCoconutForConditionalGeneration, MMCoconutForSeq2SeqLM)
MODEL_CLASSES = {
    AutoModel: BOTH,
    AutoModelForImageTextToText: BOTH,
    AutoModelForCausalLM: (MMCoconutForConditionalGeneration,),
    AutoModelForSeq2SeqLM: (MMCoconutForSeq2SeqLM,),
}


def register() -> None:
    """Register this package's classes for `model_type` mmcoconut with the Auto classes."""
    AutoConfig.register(MMCoconutConfig.model_type, MMCoconutConfig)
    for auto_class, classes in MODEL_CLASSES.items():
        auto_class.register(MMCoconutConfig, classes)
    AutoProcessor.register(MMCoconutConfig, MMCoconutProcessor)
