"""Find GGUF files (the format of llama.cpp) of language models, and load them as ordinary weights."""

from pathlib import Path

from transformers import AutoTokenizer, GgufConfig
from transformers.utils import cached_file, is_gguf_available

from mmcoconut.errors import UsageError


def find_gguf(text: str | None, gguf_file: str) -> str:
    """Return the path of a GGUF file in a folder, or in a repository of the Hub, from where it is downloaded.

    Raises:
        ValueError: there is no folder, no such file, or no package gguf.
    """
    if text is None:
        raise UsageError(f"gguf_file={gguf_file!r} is a file of a language model: name its folder or Hub id as text.")
    if not is_gguf_available():
        raise UsageError(f"gguf_file={gguf_file!r} needs the package gguf: pip install 'mmcoconut[gguf]'.")
    try:
        return cached_file(text, gguf_file)
    except OSError as error:
        held = sorted(path.name for path in Path(text).glob("*.gguf")) if Path(text).is_dir() else []
        reason = f"it has {', '.join(held)}" if held else str(error).strip().partition("\n")[0]
        raise UsageError(
            f"gguf_file={gguf_file!r} is no file of the language model {text!r} ({reason}): correct one of them."
        ) from error


def load_tokenizer(text: str | None, gguf_file: str | None = None):
    """Return the tokenizer of a language model, out of its GGUF file if one is named."""
    if gguf_file is None:
        return AutoTokenizer.from_pretrained(text)
    find_gguf(text, gguf_file)
    return AutoTokenizer.from_pretrained(text, gguf_file=gguf_file)


def load_gguf(text: str, gguf_file: str, auto_class, *, config, dtype) -> tuple:
    """Return the model with a GGUF file's weights in a dtype, quantized ones unpacked, and what was missing.

    It is saved and trained like any other, without a quantization configuration.
    """
    model, info = auto_class.from_pretrained(
        text,
        config=config,
        gguf_file=gguf_file,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    vars(model.config).pop("quantization_config", None)  # some releases leave it
    return model, info
