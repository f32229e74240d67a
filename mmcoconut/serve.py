"""`transformers serve` for a checkpoint of mmcoconut: `python -m mmcoconut.serve outputs/quickstart --port 8000`.

The options are those of `transformers serve`, which looks for a model's class, and for what it reads, by names in
transformers only; so the classes are put there, and its command is called. A request sets the number of thoughts with
`"chat_template_kwargs": {"num_latents": 3}`, the server its default by `--chat-template-kwargs` with such JSON. A
request that says no length gets that of the checkpoint's recipe, and a mistake in a request is answered with status
400 and what is wrong.
"""

import logging
import sys
from functools import lru_cache

import transformers
from jinja2 import TemplateError
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from mmcoconut.auto_classes import BOTH
from mmcoconut.configuration_mmcoconut import MMCoconutConfig
from mmcoconut.errors import run_command
from mmcoconut.evaluation.asking import NEW_TOKENS
from mmcoconut.models import CheckpointError, read_config
from mmcoconut.training.layout import recipe_of


logger = logging.getLogger("mmcoconut")

# By the arguments of build_server: what a request of each kind calls its length.
LENGTH = {"chat_handler": "max_tokens", "completion_handler": "max_tokens", "response_handler": "max_output_tokens"}
ANY_LENGTH = {"max_tokens", "max_completion_tokens", "max_output_tokens", "generation_config"}
# What processor, chat template and `generate` raise of what they are given; running out of memory is none of these.
MISTAKES = (ValueError, TypeError, KeyError, OSError, TemplateError)


@lru_cache
def new_tokens_of(model: str) -> int:
    """How many tokens a checkpoint, `name` or `name@revision`, writes where a request does not say."""
    name, _, revision = model.partition("@")
    return recipe_of(name, revision or None).get("max_new_tokens") or NEW_TOKENS


@lru_cache
def check_served(model: str) -> None:
    """Raise ValueError for a checkpoint, `name` or `name@revision`, that the server would open as the plain model."""
    name, _, revision = model.partition("@")
    config = read_config(name, revision=revision or None)
    if not isinstance(config, MMCoconutConfig):
        raise CheckpointError(
            f"{model} is a {config.model_type} in its own class, which `transformers serve` would open without its "
            "thoughts: ask it in Python, or serve an InternVL or LLaVA converted by `python -m mmcoconut.convert_vlm "
            "… --to composed`."
        )


def check_template_options(options) -> None:
    """Raise ValueError for options of a chat template that would change the checkpoint's layout."""
    if not isinstance(options, dict):
        raise ValueError(f"chat_template_kwargs must be a mapping such as {{'num_latents': 3}}, not {options!r}.")
    if "markers" in options:
        raise ValueError(f"markers={options['markers']!r}: the checkpoint decides its markers, so leave them out.")


class CheckedHandler:
    """A handler of `transformers serve` that gets requests with a length, and without a layout of their own.

    Args:
        handler: of chats, completions or responses.
        length: the field of its requests that says how many tokens are written.
        pinned: the model that the server was started with, if any.
    """

    def __init__(self, handler, length: str, pinned: str | None):
        check_template_options(handler.chat_template_kwargs)
        self.handler, self.length, self.pinned = handler, length, pinned

    async def handle_request(self, body: dict, request_id: str):
        check_template_options(body.get("chat_template_kwargs", {}))
        model = body.get("model") or self.pinned
        if model is not None:
            check_served(model)
        if model is not None and not body.keys() & ANY_LENGTH:
            body = {**body, self.length: new_tokens_of(model)}
        return await self.handler.handle_request(body, request_id)


def with_clear_errors(build_server):
    """`build_server` of `transformers serve`, whose application says what is wrong with a request."""

    def build(model_manager, chat_handler, **parts):
        from fastapi.responses import JSONResponse  # an extra

        async def answer(request, error: Exception) -> JSONResponse:
            logger.warning("a request was refused", exc_info=error)
            message = f"The request lacks {error}." if isinstance(error, KeyError) else str(error)
            body = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
            return JSONResponse({"error": body}, status_code=400)

        parts = {"chat_handler": chat_handler, **parts}
        pinned = model_manager.force_model
        parts |= {name: CheckedHandler(parts[name], length, pinned) for name, length in LENGTH.items()}
        app = build_server(model_manager, **parts)
        for mistake in MISTAKES:
            app.add_exception_handler(mistake, answer)
        return app

    return build


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not is_serve_available():
        raise SystemExit("The server needs fastapi, uvicorn and openai: pip install mmcoconut[serve]")
    if argv and not argv[0].startswith("-"):  # the model that it is pinned to
        check_served(argv[0])
    for model_class in BOTH:
        setattr(transformers, model_class.__name__, model_class)
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_class.__name__] = model_class.__name__
    from transformers.cli.serving import server  # which needs what was asked for above
    from transformers.cli.transformers import app

    server.build_server = with_clear_errors(server.build_server)
    app(["serve", *argv])


if __name__ == "__main__":
    run_command(main)
