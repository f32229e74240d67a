"""mmcoconut: continuous-thought (Coconut) reasoning for vision-language models; public names, imported when used.

After `import mmcoconut` transformers' Auto classes load a checkpoint with this package's code, and no code from the
checkpoint.

The model files are in the repository's root, because a checkpoint on the Hub ships them there; the root is added to
this package's path, so they are `mmcoconut.modeling_mmcoconut` and so on wherever the package is installed.
"""

import importlib
from pathlib import Path


__path__.append(str(Path(__file__).resolve().parent.parent))
__version__ = "0.2.0"

PUBLIC_NAMES = {
    "MMCoconutConfig": "configuration_mmcoconut",
    "MMCoconutForConditionalGeneration": "modeling_mmcoconut",
    "MMCoconutForSeq2SeqLM": "seq2seq_mmcoconut",
    "MMCoconutModel": "modeling_mmcoconut",
    "MMCoconutProcessor": "processing_mmcoconut",
    "processor_from_backbones": "build",
    "processor_from_vlm": "build",
    "Curriculum": "training.curriculum",
    "CurriculumCallback": "training.callbacks",
    "CurriculumCollator": "training.collator",
    "CurriculumTrainer": "training.trainer",
    "Example": "data",
    "composed_from_vlm": "build",
    "composed_processor_from_vlm": "build",
    "load_examples": "data",
    "from_backbones": "build",
    "from_vlm": "build",
}
__all__ = ["__version__", *PUBLIC_NAMES]

importlib.import_module("mmcoconut.auto_classes").register()  # after __path__, where the model files are found
importlib.import_module("mmcoconut.kernels")  # registers its attention functions


def __getattr__(name: str):
    if name in PUBLIC_NAMES:
        return getattr(importlib.import_module(f"mmcoconut.{PUBLIC_NAMES[name]}"), name)
    raise AttributeError(f"module 'mmcoconut' has no attribute {name!r}")


def __dir__():
    return __all__
