"""A mistake of the user ends every command with status 2 and what to do, not a traceback, which `--debug` shows."""

import errno
import json
import os
import re
import socket
import sys
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub import errors as hub
from safetensors import SafetensorError, safe_open

from mmcoconut import launching
from mmcoconut.errors import RESUME, UsageError, explanation_of, run_command
from mmcoconut.explanations import BY_NUMBER
from mmcoconut.images_mmcoconut import UnreadableImageError
from mmcoconut_cli import commands


HEAVY = [name for name, command in commands.COMMANDS.items() if not command.is_light]


def answered(kind, status: int, path: str = "api/models/owner/private"):
    """An error as huggingface_hub raises it where a server answers with this status."""
    request = httpx.Request("GET", f"http://hub.test/{path}")
    return kind(f"{status} Client Error.", response=httpx.Response(status, request=request))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


ERRORS = {
    "gated": (lambda: answered(hub.GatedRepoError, 403), "owner/private: .*Request it.*hf auth login", 403),
    "wrapped": (
        lambda: caused(OSError("You are trying to access a gated repo."), answered(hub.GatedRepoError, 401)),
        "owner/private: .*Request it",
        403,
    ),
    "no token": (lambda: hub.LocalTokenNotFoundError("Token is required"), "a token is required.*HF_TOKEN", 401),
    "no model": (lambda: answered(hub.RepositoryNotFoundError, 404), "owner/private: not found.*Correct", 404),
    "no revision": (lambda: answered(hub.RevisionNotFoundError, 404), "no such revision.*branch, tag", 404),
    "forbidden": (lambda: answered(hub.HfHubHTTPError, 403), "has no permission.*hf auth login", 403),
    "no network": (lambda: httpx.ConnectError("Name or service not known"), "No answer from.*Check the network", 424),
    "offline": (lambda: hub.OfflineModeIsEnabled("offline mode is enabled."), "offline mode.*HF_HUB_OFFLINE", 404),
    "full disk of torch": (
        lambda: RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        "A file: could not be written to its end, as when the disk is full. Free",
        507,
    ),
    "full disk": (lambda: OSError(errno.ENOSPC, "No space", "run/a.bin"), "run/a.bin: the disk is full. Free", 507),
    "full disk in Rust": (
        lambda: SafetensorError("I/O error: No space left on device (os error 28)"),
        "disk is full. Free",
        507,
    ),
    "no permission": (lambda: PermissionError(errno.EACCES, "denied", "/data"), "/data: no permission. Change", 400),
    "busy port": (lambda: OSError(errno.EADDRINUSE, "in use"), "The port is in use. Give another --port", 400),
    "GPU memory": (lambda: torch.OutOfMemoryError("CUDA out of memory."), "Out of memory.*--batch_size", 413),
    "memory": (lambda: MemoryError(), "Out of memory.*--max_length", 413),
    "extra": (lambda: ModuleNotFoundError("no peft", name="peft"), r"pip install mmcoconut\[lora\]", 400),
    "usage": (lambda: UsageError("dataset = 'x': did you mean `y`?"), "^dataset = 'x': did you mean `y`\\?$", 400),
}  # fmt: skip


@pytest.fixture(params=HEAVY)
def failing(request, monkeypatch):
    """A function that runs a command whose work raises an error."""

    def run(error: BaseException, *words: str) -> None:
        def work(_):
            raise error

        monkeypatch.setattr(commands, "load", lambda target, debug: (run_command, work))
        commands.main([request.param, *words])

    run.name = request.param
    return run


@pytest.mark.parametrize("kind", ERRORS)
def test_every_command_explains_an_error_of_the_user(failing, kind, capsys):
    make, message, _ = ERRORS[kind]
    with pytest.raises(SystemExit) as ended:
        failing(make())
    said = capsys.readouterr().err
    assert ended.value.code == 2 and ended.value.__suppress_context__
    assert "Traceback" not in said and said.strip()
    assert any(re.search(message, line) for line in said.splitlines()), said


def test_debug_shows_where_an_error_was_raised(failing):
    with pytest.raises(UsageError):
        failing(UsageError("no"), "--debug")
    with pytest.raises(KeyboardInterrupt):
        failing(KeyboardInterrupt(), "--debug")


def test_processes_of_a_command_with_debug_show_it_too(failing, monkeypatch):
    monkeypatch.setenv("MMCOCONUT_DEBUG", "1")
    with pytest.raises(UsageError):
        failing(UsageError("no"))


def test_a_bug_in_an_except_block_is_a_bug():
    def look():
        try:
            Path("/nowhere/at/all").read_text()
        except FileNotFoundError:
            return None.name

    with pytest.raises(AttributeError) as caught:
        look()
    assert explanation_of(caught.value) is None


def test_a_mistake_in_the_code_keeps_its_traceback(failing):
    with pytest.raises(AssertionError):
        failing(AssertionError("a bug"))
    with pytest.raises(ValueError, match="from elsewhere"):
        failing(ValueError("from elsewhere"))


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(failing, capsys):
    with pytest.raises(SystemExit) as ended:
        failing(KeyboardInterrupt())
    assert ended.value.code == 130
    said = capsys.readouterr().err
    assert said.startswith("\nInterrupted.") and RESUME.get(failing.name, "") in said


@pytest.mark.parametrize("kind", ERRORS)
def test_the_server_answers_with_the_same_text_and_its_status(kind):
    from mmcoconut.serve import refusal_of, without_folders

    make, _, status = ERRORS[kind]
    assert refusal_of(make()) == (status, without_folders(explanation_of(make()).text))


@pytest.mark.parametrize(
    "error, text",
    [
        (UsageError("/srv/models/maze: no such folder. Correct it."), "maze: no such folder. Correct it."),
        (UsageError("'/srv/my models/maze.png': not a picture"), "'maze.png': not a picture"),
        (FileNotFoundError(errno.ENOENT, "no", "/srv/x y/a.bin"), "a.bin: no such file or folder. Correct the path."),
        (ValueError(f"{Path.home()}/a/c.json lacks 'x' (~/d/e.json)"), "c.json lacks 'x' (e.json)"),
        (ValueError("see https://hub.test/a/b, 3/4 and num_latents"), "see https://hub.test/a/b, 3/4 and num_latents"),
    ],
)
def test_the_server_names_files_without_its_folders(error, text):
    from mmcoconut.serve import refusal_of

    assert refusal_of(error) == (400, text)


@pytest.mark.parametrize("kind, status", [(KeyError, 400), (TypeError, 400), (RuntimeError, 500)])
def test_the_server_answers_what_a_request_lacks_and_keeps_its_own_errors_to_itself(kind, status):
    from mmcoconut.serve import refusal_of

    given, text = refusal_of(kind("messages"))
    assert given == status and ("messages" in text) == (status < 500)


class Unreadable(torch.utils.data.Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize("kind, shown", [(UnreadableImageError, True), (UsageError, True), (KeyError, False)])
def test_an_error_in_a_worker_of_the_data_loader_is_told_as_here(kind, shown):
    message = "row 3: a.png is no image.\nReplace it, or set unreadable_images: skip"
    with pytest.raises(kind) as caught:
        list(torch.utils.data.DataLoader(Unreadable(kind(message)), num_workers=1))
    explained = explanation_of(caught.value)
    assert (explained.text == message) if shown else explained is None


def test_a_file_of_torch_that_cannot_be_written_to_its_end_is_named(tmp_path):
    """torch.save into a full device, which reports no number of the system."""

    def save(folder):
        file = str(Path(folder) / "optimizer.pt")
        os.symlink("/dev/full", file)
        torch.save({"a": torch.zeros(100_000)}, file)

    with pytest.raises(RuntimeError) as caught:
        save(tmp_path)
    explained = explanation_of(caught.value)
    assert explained.status == 507 and explained.text.startswith(f"{tmp_path / 'optimizer.pt'}: could not be written")


@pytest.mark.parametrize("number", BY_NUMBER)
def test_errors_of_the_system_are_told_by_number(number):
    said = explanation_of(OSError(number, os.strerror(number), "a/file"))
    assert said.text.startswith(f"a/file: {BY_NUMBER[number][0]}. ") and said.text.endswith(".")


def test_an_error_that_this_package_raises_on_purpose_is_told_and_one_that_happens_in_it_is_not():
    from mmcoconut.data.arrow_mazes import load
    from mmcoconut.training.curriculum import Curriculum

    with pytest.raises(ValueError) as on_purpose:
        Curriculum(mode="none")
    assert explanation_of(on_purpose.value).text == str(on_purpose.value)
    with pytest.raises(TypeError) as mistake:
        Curriculum(epochs_per_stage=None)
    assert explanation_of(mistake.value) is None and callable(load)


def test_a_broken_file_of_weights_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\x08")

    def read(checkpoint_file):
        with safe_open(checkpoint_file, framework="pt"):
            pass

    with pytest.raises(SafetensorError) as caught:
        read(str(file))
    said = explanation_of(caught.value).text
    assert said.startswith(f"{file}: not a complete file of weights") and "download it again" in said


def test_a_broken_json_file_is_named(tmp_path):
    from mmcoconut.records import read_json

    file = tmp_path / "results.json"
    file.write_text("{")
    with pytest.raises(json.JSONDecodeError) as caught:
        read_json(file)
    assert explanation_of(caught.value).text.startswith(f"{file}: not JSON")


WITHOUT_A_MODEL = {
    "eval": ["--dataset", "arrow_mazes"],
    "audit": ["--dataset", "arrow_mazes"],
    "demo": ["--max_samples", "1"],
    "ask": ["What?"],
    "serve": [],
    "publish": ["--repo_id", "a/b", "--dry_run", "out"],
}


@pytest.mark.parametrize("name", WITHOUT_A_MODEL)
@pytest.mark.parametrize("model", ["./nowhere", "nobody/nothing"])
def test_a_model_that_does_not_exist_is_named_by_every_command(name, model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        commands.main([name, model, *WITHOUT_A_MODEL[name]])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "nowhere" in said or "nobody/nothing" in said
    assert "Traceback" not in said


def test_a_busy_port_is_told_before_a_model_is_loaded():
    from mmcoconut.serve import check_address

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words in (["--host", "127.0.0.1", "--port", port], ["--host=127.0.0.1", f"--port={port}"]):
            with pytest.raises(UsageError, match=f"No server at 127.0.0.1, port {port} .*Set another --port"):
                check_address(["model", *words])
    check_address(["model", "--host", "127.0.0.1", "--port", port])


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "quikstart"], "did you mean `quickstart`"),
        (["train", "nowhere.yaml"], "no such file"),
        (["train", "quickstart", "--dataset", "arow_mazes"], "did you mean `arrow_mazes`"),
        (["compare", "quickstart"], "Nothing to compare"),
        (["convert", "everything"], "unknown kind"),
        (["ask", "model", "Q?", "--image", "none.png"], "none.png: no such file"),
        (["evla"], "Did you mean 'eval'"),
    ],
)
def test_a_command_line_that_is_wrong_ends_with_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_launcher_ends_with_the_status_of_the_process_that_failed(monkeypatch):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    failure = ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file="none")

    def fail(_):
        raise ChildFailedError("train_hf.py", {1: failure})

    monkeypatch.setattr(launching, "launch_command", fail)
    with pytest.raises(SystemExit) as ended:
        launching.launch(launching.launch_words(["quickstart"], num_gpus=2, is_configured=False))
    assert ended.value.code == 2 and ended.value.__suppress_context__
    assert sys.exc_info() == (None, None, None)
