"""`transformers serve` for a checkpoint of mmcoconut: `python -m mmcoconut.serve outputs/quickstart --port 8000`.

The options are those of `transformers serve`, which looks up the classes of models and processors by name in
transformers; so the classes are added there, and its command is called. A vision-language model in its own class is
loaded with its thoughts, which the server's Auto classes would omit. A request sets the number of thoughts with
`"chat_template_kwargs": {"num_latents": 3}`, the server its default with `--chat-template-kwargs` and such JSON. A
request without a length uses that of the checkpoint's recipe, and an invalid request is answered with status
400 and an explanation. Files of the server's machine are read only with `--allow-local-files`.
"""

import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from types import SimpleNamespace

import transformers
from jinja2 import TemplateError
from transformers import AutoModelForMultimodalLM, AutoProcessor, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from mmcoconut.addresses import check_can_listen
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
MEDIA = {"image_url", "video_url", "audio_url"}
FILE_KEYS = ("url", "path", "file")
REMOTE = ("http://", "https://", "data:")
LOCAL_FILES = "--allow-local-files"
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


def urls_in(content) -> Iterator[str]:
    """Yield the address of each picture, video and sound in a request's messages, which may be malformed."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if key in MEDIA:
                yield str(value.get("url", "")) if isinstance(value, Mapping) else str(value)
            elif isinstance(value, list | Mapping):
                yield from urls_in(value)
    elif isinstance(content, list):
        for part in content:
            yield from urls_in(part)


def check_urls(body: Mapping) -> None:
    """Raise UsageError for a picture that is a file of the server's machine."""
    assets = body.get("assets")  # of typed decisions: pictures by name
    assets = [*assets.values()] if isinstance(assets, Mapping) else []
    named = [asset[key] for asset in assets if isinstance(asset, Mapping) for key in FILE_KEYS if key in asset]
    named += [asset for asset in assets if isinstance(asset, str)]
    for url in [*map(str, named), *urls_in([body.get("messages"), body.get("input")])]:
        if not url.lower().startswith(REMOTE):
            raise UsageError(
                f"image {url[:60]!r}: this server reads no files of its machine. Send the picture itself, as "
                f"data:image/png;base64,… or its http(s) address; or start the server with {LOCAL_FILES}."
            )


class CheckedDecisions:
    """The handler of typed decisions of `transformers serve`, whose requests name no files of the server's machine."""

    def __init__(self, handler):
        self.handler = handler

    async def handle_request(self, body: dict, request_id: str):
        check_urls(body)
        return await self.handler.handle_request(body, request_id)


class CheckedHandler:
    """A handler of `transformers serve` whose requests have a length, no layout of their own and no local files.

    Args:
        handler: handler of chats, completions or responses.
        length: the field of its requests for the number of tokens.
        pinned: the model that the server was started with, if any.
        local_files: whether a request may name files of the server's machine.
    """

    def __init__(self, handler, length: str, pinned: str | None, *, local_files: bool = False):
        check_template_options(handler.chat_template_kwargs)
        self.handler, self.length, self.pinned, self.local_files = handler, length, pinned, local_files

    async def handle_request(self, body: dict, request_id: str):
        check_template_options(body.get("chat_template_kwargs", {}))
        if not self.local_files:
            check_urls(body)
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
    check_can_listen(host, port, options="--port or --host")


def in_words_of_a_request(text: str) -> str:
    """Return an explanation in which the options of `generate` have the names of a request's fields."""
    return text.replace("max_new_tokens", "max_tokens")


def with_clear_errors(build_server, *, local_files: bool = False):
    """Wrap `build_server` of `transformers serve` so that its application explains invalid requests."""

    def build(model_manager, chat_handler, **parts):
        from fastapi.responses import JSONResponse  # an extra

        async def answer(request, error: Exception) -> JSONResponse:
            status, message = refusal_of(error)
            own = status >= 500  # a client's mistake needs no traceback
            logger.warning("a request was answered with status %d: %s", status, error, exc_info=error if own else None)
            kind = "invalid_request_error" if status < 500 else "server_error"
            body = {"message": in_words_of_a_request(message), "type": kind, "param": None, "code": None}
            return JSONResponse({"error": body}, status_code=status)

        parts = {"chat_handler": chat_handler, **parts}
        pinned = model_manager.force_model
        parts |= {
            name: CheckedHandler(parts[name], length, pinned, local_files=local_files)
            for name, length in LENGTH.items()
        }
        if not local_files and "systemone_handler" in parts:
            parts["systemone_handler"] = CheckedDecisions(parts["systemone_handler"])
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
    if {"-h", "--help"} & {*argv}:
        print(f"usage: mmcoconut serve MODEL [{LOCAL_FILES}] [--key value ...]\n")
        print(f"  {LOCAL_FILES}: let requests name pictures by paths of this machine.")
        print("The other options are those of `transformers serve`:\n")
    local_files = LOCAL_FILES in argv
    argv = [word for word in argv if word != LOCAL_FILES]
    for model_class in BOTH:
        setattr(transformers, model_class.__name__, model_class)
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_class.__name__] = model_class.__name__
    let_vlms_think()
    from transformers.cli.serving import server  # needs the packages checked above
    from transformers.cli.transformers import app

    server.build_server = with_clear_errors(server.build_server, local_files=local_files)
    app(["serve", *argv])


if __name__ == "__main__":
    run_command(main)
