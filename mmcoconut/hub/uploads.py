"""Upload a folder as a revision of a Hub repository; upload a run during training, where a failure never ends the run.

A revision is complete: weights as safetensors, configurations, processor, the code that reads them, README.md.
"""

import itertools
import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from mmcoconut.records import ADAPTER_FOLDER, COURSE_FILE, OBJECTIVES_FILE, RECIPE_FILE


logger = logging.getLogger("mmcoconut")

# Published files of a run's folder: by name, since logs, data and secrets may be there too.
PUBLISHED = ("*.json", "*.safetensors", "*.py", "*.jinja", "merges.txt", "vocab.txt", "*.model", "*.spm", RECIPE_FILE)
# Weights of an earlier revision, which would remain if the number of shards changes.
STALE = ["model*.safetensors", "model.safetensors.index.json"]
STATE_FILES = (TRAINER_STATE_NAME, COURSE_FILE, OBJECTIVES_FILE)
LAST_CHECKPOINT = "last-checkpoint"
MAIN = "main"
NOT_ALLOWED = (401, 403)
PATIENCE = 120  # seconds; timeout of the Hub
HTTP_LOGGERS = ("httpx", "httpx2")  # they log every request


def quiet_requests() -> None:
    """Remove the dozens of requests of an upload from the log."""
    for name in HTTP_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def copy_model(source: Path, target: Path) -> None:
    """Copy the published files of a checkpoint, its adapter's too; no pickles, and no state of the run."""
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        wanted = any(fnmatch(file.name, pattern) for pattern in PUBLISHED) and file.name not in STATE_FILES
        if wanted and file.is_file():
            shutil.copyfile(file, target / file.name)
    if (source / ADAPTER_FOLDER).is_dir():
        copy_model(source / ADAPTER_FOLDER, target / ADAPTER_FOLDER)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy all files that a run resumes from, but not its pickled arguments, which hold the Hub's token."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(TRAINING_ARGS_NAME))


class Repository:
    """A model repository on the Hub, created on first use.

    Args:
        name: `owner/name`, or the name alone for the token's user.
        private: visibility of a new repository; None uses the owner's default.
    """

    def __init__(self, name: str, *, private: bool | None = None, token: str | None = None):
        self.name, self.private = name, private
        self.api, self.is_made = HfApi(token=token), False

    def make(self) -> None:
        """Create the repository if necessary; `name` is its full name afterwards.

        Raises:
            ValueError: it exists with the other visibility.
        """
        get_session().timeout = PATIENCE  # by default an upload, and with it the end of a run, would wait forever
        if self.is_made:
            return
        self.name = self.api.create_repo(self.name, private=self.private, exist_ok=True).repo_id
        if self.private is not None and self.api.model_info(self.name).private != self.private:
            found, wanted = ("public", "private") if self.private else ("private", "public")
            raise ValueError(
                f"{self.name} exists and is {found}. Make it {wanted} in its settings, or set another name."
            )
        self.is_made = True

    def upload(self, folder: Path, *, message: str, branch: str | None = None, replace: bool = False) -> str:
        """Upload the files in a folder as a commit; return its address. `replace`: delete all other files there."""
        self.make()
        if branch is not None:
            self.api.create_branch(self.name, branch=branch, exist_ok=True)
        commit = self.api.upload_folder(
            repo_id=self.name,
            folder_path=folder,
            revision=branch,
            commit_message=message,
            delete_patterns=["*"] if replace else STALE,
        )
        return commit.commit_url


class Revision(NamedTuple):
    """A folder that waits for its upload."""

    folder: Path
    message: str


class Uploads:
    """Uploads of a run, one after the other in the background.

    Each upload is copied first, so training may continue to write. A failed upload is retried with the next, unless
    the same branch has a newer one by then; `errors` holds the reasons by branch.

    Args:
        repository: target of the uploads.
        folder: for the copies; deleted at the end.
        main: branch of the latest model; None uses the repository's default.
    """

    def __init__(self, repository: Repository, folder: Path, *, main: str | None = None):
        self.repository, self.folder, self.main = repository, folder, main or MAIN
        self.waiting: dict[str, Revision] = {}
        self.errors: dict[str, str] = {}
        self.stages: set[str] = set()
        self.numbers, self.lock, self.pool = itertools.count(), threading.Lock(), ThreadPoolExecutor(1)

    def attempt(self, what: str, action: Callable[[], None]) -> bool:
        """Run an action and return True if it succeeded; any error is only logged, so that training continues."""
        try:
            action()
        except Exception as error:
            self.errors[what] = reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            logger.warning("%s is not uploaded (%s); the next save tries again", what, reason)
            logger.debug("traceback:", exc_info=True)
            return False
        self.errors.pop(what, None)
        return True

    def start(self) -> None:
        """Create the repository; if the Hub does not answer, only log it.

        Raises:
            ValueError, HfHubHTTPError: an invalid name or token, which no later attempt could fix.
        """
        try:
            self.repository.make()
        except Exception as error:
            refused = isinstance(error, HfHubHTTPError) and error.response.status_code in NOT_ALLOWED
            if refused or isinstance(error, ValueError):
                raise
            message = "%s cannot be created on the Hub now (%s); training starts, and every save tries again"
            logger.warning(message, self.repository.name, error)

    @property
    def branches(self) -> list[str]:
        """The branches of stages that exist."""
        with self.lock:
            return sorted(self.stages)

    def add(self, branch: str, fill: Callable[[Path], None], message: str) -> None:
        """Queue a revision of a branch: `fill` writes its folder; it replaces a waiting revision of the branch."""
        folder = self.folder / str(next(self.numbers))
        if self.attempt(branch, partial(fill, folder)):
            with self.lock:
                older, self.waiting[branch] = self.waiting.get(branch), Revision(folder, message)
            if older is not None:
                shutil.rmtree(older.folder)

    def begin(self) -> Future:
        """Upload the waiting revisions in the background; the future is done when all were tried."""
        return self.pool.submit(self.upload_waiting)

    def upload_waiting(self) -> None:
        """Try to upload every waiting revision once; failed ones wait again."""
        with self.lock:
            revisions, self.waiting = self.waiting, {}
        for branch, revision in revisions.items():
            if self.attempt(branch, partial(self.upload, branch, revision)):
                shutil.rmtree(revision.folder)
                continue
            with self.lock:
                newer = self.waiting.setdefault(branch, revision) is not revision
            if newer:
                shutil.rmtree(revision.folder)

    def upload(self, branch: str, revision: Revision) -> None:
        if branch == self.main:
            self.repository.upload(
                revision.folder, message=revision.message, branch=None if branch == MAIN else branch
            )
        else:
            self.repository.upload(revision.folder, message=revision.message, branch=branch, replace=True)
            with self.lock:
                self.stages.add(branch)

    def finish(self, run: Path) -> None:
        """Make the last attempt and log the result; `run` is the folder that holds everything anyway."""
        self.begin().result()
        shutil.rmtree(self.folder, ignore_errors=True)
        name = self.repository.name
        if not self.errors:
            logger.info("uploaded to %s: %s", name, ", ".join([self.main, *self.branches]))
            return
        failed = "; ".join(f"{branch} ({error})" for branch, error in sorted(self.errors.items()))
        remedy = f"python -m mmcoconut.publish --model {run} --repo_id {name}"
        logger.error("not uploaded to %s: %s. All files are in %s. Upload them with: %s", name, failed, run, remedy)
