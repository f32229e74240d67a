"""Explain errors that the user can fix: what happened, where, and what to do.

Any other error is a bug in the code, and keeps its traceback. Classes of other libraries are looked up among the
loaded modules: a library that was never imported cannot have raised an error.
"""

import errno
import linecache
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse


OWN_FOLDER = Path(__file__).resolve().parent
SCRIPTS = ("train_hf.py",)
NO_SPACE = "Free some space, or write elsewhere: --output_dir, HF_HOME for downloads, TMPDIR for temporary files."
NO_PERMISSION = "Change its permissions, or name another place: --output_dir, or HF_HOME for downloads."
LESS_MEMORY = (
    "Use fewer rows per batch (--batch_size, --per_device_train_batch_size, --per_device_eval_batch_size), "
    "shorten rows (--max_length), use --dtype bfloat16, --activation_checkpointing true in training, or a larger "
    "device."
)
NO_NETWORK = "Check the network (and HF_HUB_OFFLINE), or download it on another machine and give its folder."
SIGN_IN = "Sign in with `hf auth login`, or set HF_TOKEN to a token with access."
NO_MODEL = "Correct the name; if it is private, sign in with `hf auth login`."
BROKEN_FILE = "It was truncated or changed: download it again, or save it again."
# Explanation and remedy by the errno of an OSError; its file or address is added.
BY_NUMBER = {
    errno.ENOSPC: ("the disk is full", NO_SPACE),
    errno.EDQUOT: ("the quota of the disk is used up", NO_SPACE),
    errno.EACCES: ("no permission", NO_PERMISSION),
    errno.EPERM: ("not permitted", NO_PERMISSION),
    errno.EROFS: ("the file system is read-only", NO_PERMISSION),
    errno.EADDRINUSE: ("the port is in use", "Give another --port, or end the program that listens there."),
    errno.EADDRNOTAVAIL: ("this machine has no such address", "Give an address of this machine."),
    errno.ENOENT: ("no such file or folder", "Correct the path."),
    errno.EISDIR: ("it is a folder, not a file", "Correct the path."),
    errno.ENOTDIR: ("a part of this path is a file, not a folder", "Correct the path."),
    errno.EEXIST: ("it exists already", "Name another, or remove it."),
    errno.EMFILE: ("too many open files", "Raise the limit: ulimit -n 4096."),
}
# The extra that installs each module.
EXTRA_OF = {"matplotlib": "audit", "sklearn": "audit", "gradio": "demo", "gguf": "gguf", "peft": "lora"}
EXTRA_OF |= {"bitsandbytes": "quantization", "trl": "rl", "num2words": "smolvlm", "fastapi": "serve"}
EXTRA_OF |= {"uvicorn": "serve", "openai": "serve", "pycocoevalcap": "captions", "rouge_score": "captions"}
EXTRA_OF |= {"sacrebleu": "captions"}
# What torch.save raises, on a full disk and whenever else a file cannot be written to its end.
UNFINISHED_FILE = re.compile(r"inline_container\.cc.*unexpected pos|PytorchStreamWriter failed writing", re.DOTALL)
OF_A_WORKER = re.compile(r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback")
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # in messages of libraries written in Rust
# Types that our code raises on purpose, with a message for the user.
OWN_KINDS = (ValueError, ImportError, OSError, RuntimeError)


class Explanation(NamedTuple):
    """One text that says what happened, where and what to do, and the HTTP status for a server."""

    text: str
    status: int = 400


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and its causes, nearest first.

    An error that was raised while another one was handled is explained by that one only if libraries report it so: a
    bug in an `except` block is a bug.
    """
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        hides = isinstance(error, OSError | ImportError) and not error.__suppress_context__
        error = error.__cause__ or (error.__context__ if hides else None)


def is_of(error: BaseException, module: str, *names: str) -> bool:
    """Return True if an error is of one of the classes of a module, which need not be loaded."""
    classes = [getattr(sys.modules.get(module), name, None) for name in names]
    return isinstance(error, tuple(each for each in classes if isinstance(each, type)))


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's message, or its class if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def repository_of(error: BaseException) -> str:
    """Return the name of the repository of a Hub error; empty if unknown.

    >>> repository_of(ValueError("no answer"))
    ''
    """
    url = getattr(getattr(error, "response", None), "url", None)
    parts = [part for part in urlparse(str(url or "")).path.split("/") if part and part not in ("api", "models")]
    return "/".join(parts[:3] if parts[:1] in (["datasets"], ["spaces"]) else parts[:2])


def explain_hub(error: BaseException) -> Explanation | None:
    """Explain an error of the Hub, or a missing answer."""
    module, where = "huggingface_hub.errors", repository_of(error)
    where = f"{where}: " if where else ""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if is_of(error, module, "GatedRepoError"):
        return Explanation(f"{where}access is on request. Request it on its page. {SIGN_IN}", 403)
    if is_of(error, module, "LocalTokenNotFoundError") or "token" in str(error) and status == 401:
        return Explanation(f"{where}a token is required. {SIGN_IN}", 401)
    if is_of(error, module, "RevisionNotFoundError"):
        return Explanation(f"{where}no such revision. Correct the branch, tag or commit.", 404)
    if is_of(error, module, "RepositoryNotFoundError"):
        return Explanation(f"{where}not found on the Hub. {NO_MODEL}", 404)
    if is_of(error, module, "HfHubHTTPError") and status in (401, 403):
        return Explanation(f"{where}the token has no permission (status {status}). {SIGN_IN}", status)
    if is_of(error, module, "OfflineModeIsEnabled", "LocalEntryNotFoundError"):
        return Explanation(f"{first_line(error)} {NO_NETWORK}", 404)
    if is_of(error, module, "HfHubHTTPError") and not is_of(error, module, "EntryNotFoundError"):
        passes = status is None or status == 429 or status >= 500
        later = " Try again later; finished work is kept." if passes else ""
        return Explanation(f"{where}{first_line(error)}{later}", 424)
    if is_of(error, "httpx", "TransportError") or is_of(error, "requests.exceptions", "ConnectionError"):
        return Explanation(f"No answer from the network: {first_line(error)}. {NO_NETWORK}", 424)
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if main memory, or that of an accelerator, is exhausted."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or is_of(error, "torch", "OutOfMemoryError")
        or (
            isinstance(error, RuntimeError)
            and ("out of memory" in text or "can't allocate memory" in text)
            and not is_raised_here(error)
        )
    )


def file_in_frames(error: BaseException, ending: str) -> str:
    """Return the file with this ending that the innermost function handled; some libraries' messages name none."""
    found, traceback = "", error.__traceback__
    while traceback is not None:
        paths = [str(value) for value in traceback.tb_frame.f_locals.values() if isinstance(value, str | Path)]
        found = next((path for path in paths if path.endswith(ending)), found)
        traceback = traceback.tb_next
    return found


def explain_file(error: BaseException) -> Explanation | None:
    """Explain an incomplete or invalid file."""
    if is_of(error, "safetensors", "SafetensorError") and not OS_ERROR.search(str(error)):
        name = file_in_frames(error, ".safetensors") or "a .safetensors file"
        return Explanation(f"{name}: not a complete file of weights ({first_line(error)}). {BROKEN_FILE}")
    if is_of(error, "pyarrow.lib", "ArrowInvalid"):
        name = file_in_frames(error, ".parquet") or file_in_frames(error, ".arrow")
        return Explanation(f"{name}: not a complete file ({first_line(error)}). {BROKEN_FILE}") if name else None
    if isinstance(error, UnicodeDecodeError) or is_of(error, "json.decoder", "JSONDecodeError"):
        name = file_in_frames(error, ".json") or file_in_frames(error, ".jsonl")
        return Explanation(f"{name}: not JSON ({first_line(error)}). {BROKEN_FILE}") if name else None
    return None


def explain_system(error: BaseException) -> Explanation | None:
    """Explain an error of the operating system by its number; other OSErrors have complete messages."""
    in_text = OS_ERROR.search(str(error))
    if isinstance(error, RuntimeError) and UNFINISHED_FILE.search(str(error)):
        where = file_in_frames(error, ".pt") or file_in_frames(error, ".bin")
        what = "could not be written to its end, as when the disk is full"
        return Explanation(f"{where or 'A file'}: {what}. {NO_SPACE}", 507)
    if not isinstance(error, OSError) and not in_text:
        return None
    number = int(in_text[1]) if in_text else error.errno
    if number not in BY_NUMBER:
        return Explanation(str(error).strip() or type(error).__name__) if isinstance(error, OSError) else None
    what, remedy = BY_NUMBER[number]
    where = getattr(error, "filename", None) or file_in_frames(error, ".safetensors")
    status = 507 if remedy is NO_SPACE else 400
    return Explanation(f"{where}: {what}. {remedy}" if where else f"{what[0].upper()}{what[1:]}. {remedy}", status)


def explain_import(error: BaseException) -> Explanation | None:
    """Explain a missing package, if an extra, or the message itself, says how to install it."""
    if not isinstance(error, ImportError):
        return None
    module = (error.name or "").partition(".")[0]
    if module in EXTRA_OF and isinstance(error, ModuleNotFoundError) and error.name == module:
        return Explanation(f"{module} is not installed: pip install mmcoconut[{EXTRA_OF[module]}]")
    return Explanation(str(error).strip()) if "pip install" in str(error) else None


def is_raised_here(error: BaseException) -> bool:
    """Return True if a `raise` in this package raised an error: its message is for the user."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None or not isinstance(error, OWN_KINDS) or isinstance(error, NotImplementedError):
        return False
    file = Path(traceback.tb_frame.f_code.co_filename)
    ours = OWN_FOLDER in file.resolve().parents or file.stem.endswith("_mmcoconut") or file.name in SCRIPTS
    return ours and linecache.getline(str(file), traceback.tb_lineno).lstrip().startswith("raise ")


def message_of_worker(error: BaseException) -> str | None:
    """Return the message of one of our errors that a worker of a DataLoader raised, without its traceback; else None.

    torch raises such an error again with the worker's whole traceback as its message.
    """
    ours = type(error).__module__.partition(".")[0] == "mmcoconut" or type(error).__module__.endswith("_mmcoconut")
    if not ours or not OF_A_WORKER.match(str(error)):
        return None
    return re.split(rf"^[\w.]*\b{type(error).__name__}: ", str(error), flags=re.MULTILINE)[-1].strip()


def explain_causes(error: BaseException) -> Explanation | None:
    """Explain an error by its first cause in the Hub, the network or a broken file."""
    chain = [*causes(error)]
    return next(filter(None, map(explain_hub, chain)), None) or next(filter(None, map(explain_file, chain)), None)


def explain(error: BaseException) -> Explanation | None:
    """Explain an error to the user; None if it is a bug in the code."""
    if is_out_of_memory(error):
        return Explanation(f"Out of memory: {first_line(error)}. {LESS_MEMORY}", 413)
    caused = explain_causes(error)
    if is_raised_here(error) and str(error).strip():
        return Explanation(str(error), 400 if caused is None else caused.status)
    if caused:
        return caused
    if is_of(error, "wandb.errors", "Error") or is_of(error, "jinja2.exceptions", "TemplateError"):
        return Explanation(str(error))
    if explained := explain_import(error):
        return explained
    numbered = (each for each in causes(error) if isinstance(each, OSError) and each.errno in BY_NUMBER)
    return explain_system(next(numbered, error))
