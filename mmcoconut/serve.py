"""`transformers serve` for a checkpoint of mmcoconut: `python -m mmcoconut.serve outputs/quickstart --port 8000`.

The options are those of `transformers serve`, which looks up the classes of models and processors by name in
transformers; so the classes are added there, and its command is called. A vision-language model in its own class is
loaded with its thoughts, which the server's Auto classes would omit. A request sets the number of thoughts with
`"chat_template_kwargs": {"num_latents": 3}`, the server its default with `--chat-template-kwargs` and such JSON. A
request without a length uses that of the checkpoint's recipe, and an invalid request is answered with status
400 and an explanation.
"""

import logging
import re
import socket
import sys
from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace

import transformers
from jinja2 import TemplateError
from transformers import AutoModelForMultimodalLM, AutoProcessor, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from mmcoconut.auto_classes import BOTH
from mmcoconut.configuration_mmcoconut import THOUGHT_TOKENS
from mmcoconut.errors import UsageError, explanation_of, run_command
from mmcoconut.evaluation.asking import NEW_TOKENS
from mmcoconut.models import CheckpointError, class_of, is_composed, load_processor, read_config
from mmcoconut.training.layout import recipe_of


logger = logging.getLogger("mmcoconut")

# By argument of build_server: the field for the length in requests of each kind.
LENGTH = {"chat_handler": "max_tokens", "completion_handler": "max_tokens", "response_handler": "max_output_tokens"}
ANY_LENGTH = {"max_tokens", "max_completion_tokens", "max_output_tokens", "generation_config"}
# Errors of processor, chat template and `generate` for invalid input or missing memory.
MISTAKES = (ValueError, TypeError, KeyError, OSError, TemplateError, RuntimeError, MemoryError)
# Absolute paths in a text: in quotes, before a colon, or up to a space; no part of a URL.
QUOTED = r"""(?<=')[/~][^'\n]*(?=')|(?<=")[/~][^"\n]*(?=")"""
ABSOLUTE = re.compile(QUOTED + r"|^(?:/|~/)[^:\n]*(?=: )|(?<![\w:/.])(?:/|~/)[\w.~/+@=-]+")
INTERNAL = "The server failed to answer this request. Its log has the reason."
DEFAULT_ADDRESS = ("localhost", 8000)  # default of `transformers serve`


@lru_cache
def new_tokens_of(model: str) -> int:
    """Return the maximum tokens that a checkpoint, `name` or `name@revision`, generates by default."""
    name, _, revision = model.partition("@")
    return recipe_of(name, revision or None).get("max_new_tokens") or NEW_TOKENS


def check_template_options(options) -> None:
    """Raise ValueError for chat-template options that would change the checkpoint's layout."""
    if not isinstance(options, dict):
        raise ValueError(f"chat_template_kwargs must be a mapping such as {{'num_latents': 3}}, not {options!r}.")
    if "markers" in options:
        raise ValueError(f"markers={options['markers']!r}: the checkpoint decides its markers. Remove this option.")


class CheckedHandler:
    """A handler of `transformers serve` whose requests have a length, and no layout of their own.

    Args:
        handler: handler of chats, completions or responses.
        length: the field of its requests for the number of tokens.
        pinned: the model that the server was started with, if any.
    """

    def __init__(self, handler, length: str, pinned: str | None):
        check_template_options(handler.chat_template_kwargs)
        self.handler, self.length, self.pinned = handler, length, pinned

    async def handle_request(self, body: dict, request_id: str):
        check_template_options(body.get("chat_template_kwargs", {}))
        model = body.get("model") or self.pinned
        if model is not None and not body.keys() & ANY_LENGTH:
            body = {**body, self.length: new_tokens_of(model)}
        return await self.handler.handle_request(body, request_id)


def without_folders(text: str) -> str:
    """Return a text whose absolute paths are cut to their last part, because clients may not know the server's files.

    >>> without_folders("/srv/models/maze/config.json: not JSON. See https://hub.test/a")
    'config.json: not JSON. See https://hub.test/a'
    """
    return ABSOLUTE.sub(lambda path: path[0].rstrip("/").rpartition("/")[2], text)


def refusal_of(error: Exception) -> tuple[int, str]:
    """Return the HTTP status and the text of the answer to a request that raised an error.

    A user error has the same text as in a command, without the folders of its files. Other errors that a request can
    cause are answered with their message and status 400. A RuntimeError is the server's own: status 500, and its text
    stays in the log.
    """
    explained = explanation_of(error)
    if explained is not None and not isinstance(error, KeyError):
        return explained.status, without_folders(explained.text)
    if isinstance(error, KeyError):
        return 400, f"The request lacks {error}."
    return (500, INTERNAL) if isinstance(error, RuntimeError) else (400, without_folders(str(error)))


def check_address(words: Sequence[str]) -> None:
    """Raise UsageError if the server cannot listen at `--host` and `--port`, before a model is loaded."""
    if {"-h", "--help"} & {*words}:
        return
    given = dict(zip(words, words[1:])) | dict(word.split("=", 1) for word in words if "=" in word)
    host, port = given.get("--host", DEFAULT_ADDRESS[0]), given.get("--port", DEFAULT_ADDRESS[1])
    try:
        with socket.create_server((host, int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except (OSError, OverflowError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"No server at {host}, port {port} ({reason}). Set another --port or --host.") from error


def with_clear_errors(build_server):
    """Wrap `build_server` of `transformers serve` so that its application explains invalid requests."""

    def build(model_manager, chat_handler, **parts):
        from fastapi.responses import JSONResponse  # an extra

        async def answer(request, error: Exception) -> JSONResponse:
            status, message = refusal_of(error)
            logger.warning("a request was answered with status %d", status, exc_info=error)
            kind = "invalid_request_error" if status < 500 else "server_error"
            body = {"message": message, "type": kind, "param": None, "code": None}
            return JSONResponse({"error": body}, status_code=status)

        parts = {"chat_handler": chat_handler, **parts}
        pinned = model_manager.force_model
        parts |= {name: CheckedHandler(parts[name], length, pinned) for name, length in LENGTH.items()}
        app = build_server(model_manager, **parts)
        for mistake in MISTAKES:
            app.add_exception_handler(mistake, answer)
        return app

    return build


def config_of_vlm(name: str, options: dict) -> PreTrainedConfig | None:
    """Return the configuration of a vision-language model's own class with thoughts; None for any other model.

    options: arguments of loading, including the revision.
    """
    try:
        config = read_config(name, revision=options.get("revision"))
    except CheckpointError:
        return None
    return None if is_composed(config) else config


def begin_answers_behind_thoughts(processor, config: PreTrainedConfig) -> None:
    """Make the server not read thoughts at the end of a prompt as the beginning of the answer."""
    from transformers.cli.serving.utils import get_response_template

    template = get_response_template(processor, SimpleNamespace(config=config)) or {}
    if "start_anchor" in template:
        own = template["start_anchor"]
        anchors = [*([own] if isinstance(own, str) else own), *THOUGHT_TOKENS]
        processor.tokenizer.response_template = {**template, "start_anchor": anchors}


def let_vlms_think() -> None:
    """Make the server's Auto classes load vision-language models with their thoughts."""
    own_model, own_processor = AutoModelForMultimodalLM.from_pretrained, AutoProcessor.from_pretrained

    def model_of(name: str, **options):
        config = config_of_vlm(name, options)
        if config is None:
            return own_model(name, **options)
        return class_of(config).from_pretrained(name, **{**options, "trust_remote_code": False})

    def processor_of(name: str, **options):
        config = config_of_vlm(name, options)
        if config is None:
            return own_processor(name, **options)
        processor = load_processor(name, **{**options, "trust_remote_code": False})
        begin_answers_behind_thoughts(processor, config)
        return processor

    AutoModelForMultimodalLM.from_pretrained, AutoProcessor.from_pretrained = model_of, processor_of


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not is_serve_available():
        raise UsageError("The server needs fastapi, uvicorn and openai: pip install mmcoconut[serve]")
    if argv and not argv[0].startswith("-"):  # the model that it is pinned to
        name, _, revision = argv[0].partition("@")
        read_config(name, revision=revision or None)
    check_address(argv)
    for model_class in BOTH:
        setattr(transformers, model_class.__name__, model_class)
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_class.__name__] = model_class.__name__
    let_vlms_think()
    from transformers.cli.serving import server  # needs the packages checked above
    from transformers.cli.transformers import app

    server.build_server = with_clear_errors(server.build_server)
    app(["serve", *argv])


if __name__ == "__main__":
    run_command(main)
