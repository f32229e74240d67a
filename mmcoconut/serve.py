"""`transformers serve` for a checkpoint of this library: `python -m mmcoconut.serve outputs/quickstart --port 8000`.

The options are those of `transformers serve`, which looks for a model's class, and for what it reads, by names in the
library only; so the classes are put there, and its command is called. A request sets the number of thoughts with
`"chat_template_kwargs": {"num_latents": 3}`, the server its default by `--chat-template-kwargs` with such JSON.
"""

import sys

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from mmcoconut.auto_classes import BOTH


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not is_serve_available():
        raise SystemExit("The server needs fastapi, uvicorn and openai: pip install mmcoconut[serve]")
    for model_class in BOTH:
        setattr(transformers, model_class.__name__, model_class)
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_class.__name__] = model_class.__name__
    from transformers.cli.transformers import app  # which needs what was asked for above

    app(["serve", *argv])


if __name__ == "__main__":
    main()
