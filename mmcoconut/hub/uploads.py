"""To the Hub: a folder as a revision of a repository; and the uploads of a run, of which none can end it.

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

# Of a run's folder, what is published: by name, since logs, data and secrets may lie there too.
PUBLISHED = ("*.json", "*.safetensors", "*.py", "*.jinja", "merges.txt", "vocab.txt", "*.model", "*.spm", RECIPE_FILE)
# Weights of an earlier revision, which another number of shards would leave beside the new ones.
STALE = ["model*.safetensors", "model.safetensors.index.json"]
STATE_FILES = (TRAINER_STATE_NAME, COURSE_FILE, OBJECTIVES_FILE)
LAST_CHECKPOINT = "last-checkpoint"
MAIN = "main"
NOT_ALLOWED = (401, 403)
PATIENCE = 120  # seconds that the Hub may say nothing
HTTP_LOGGERS = ("httpx", "httpx2")  # they name every request


def quiet_requests() -> None:
    """Keep the requests of an upload, some dozens, out of a log that shows what happens."""
    for name in HTTP_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def copy_model(source: Path, target: Path) -> None:
    """The files of a checkpoint that are published, its adapter's too; no pickles, and nothing of a run's state."""
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        wanted = any(fnmatch(file.name, pattern) for pattern in PUBLISHED) and file.name not in STATE_FILES
        if wanted and file.is_file():
            shutil.copyfile(file, target / file.name)
    if (source / ADAPTER_FOLDER).is_dir():
        copy_model(source / ADAPTER_FOLDER, target / ADAPTER_FOLDER)


def copy_checkpoint(source: Path, target: Path) -> None:
    """All that a run resumes from; not its arguments, which resuming does not read: a pickle with the Hub's token."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(TRAINING_ARGS_NAME))


class Repository:
    """A model repository on the Hub, made when it is first needed.

    Args:
        name: `owner/name`, or the name alone for one of the token's user.
        private: of a repository that is made; None leaves it to the owner's default.
    """

    def __init__(self, name: str, *, private: bool | None = None, token: str | None = None):
        self.name, self.private = name, private
        self.api, self.is_made = HfApi(token=token), False

    def make(self) -> None:
        """Make sure that it is there; `name` is its whole one from then on.

        Raises:
            ValueError: it is there already, and private or public where it should be the other.
        """
        get_session().timeout = PATIENCE  # the library would wait for ever, and with it the end of a run
        if self.is_made:
            return
        self.name = self.api.create_repo(self.name, private=self.private, exist_ok=True).repo_id
        if self.private is not None and self.api.model_info(self.name).private != self.private:
            found, wanted = ("public", "private") if self.private else ("private", "public")
            raise ValueError(
                f"{self.name} is there already, and {found}: make it {wanted} in its settings, or give another name."
            )
        self.is_made = True

    def upload(self, folder: Path, *, message: str, branch: str | None = None, replace: bool = False) -> str:
        """Return a commit of all files in the folder; its address. `replace`: the branch then holds nothing else."""
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
    """A folder that waits to be uploaded."""

    folder: Path
    message: str


class Uploads:
    """The uploads of a run, one after the other behind training's back.

    What is uploaded is copied first, so that training may go on writing. What fails stays, unless the same branch has
    something newer by then, and is tried again with the next; `errors` holds why, by branch.

    Args:
        repository: where to.
        folder: for the copies; it is deleted at the end.
        main: the branch of the latest model; None is the repository's own.
    """

    def __init__(self, repository: Repository, folder: Path, *, main: str | None = None):
        self.repository, self.folder, self.main = repository, folder, main or MAIN
        self.waiting: dict[str, Revision] = {}
        self.errors: dict[str, str] = {}
        self.stages: set[str] = set()
        self.numbers, self.lock, self.pool = itertools.count(), threading.Lock(), ThreadPoolExecutor(1)

    def attempt(self, what: str, action: Callable[[], None]) -> bool:
        """Whether it went well; the one place where whatever goes wrong is only noted, for training to go on."""
        try:
            action()
        except Exception as error:
            self.errors[what] = reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            logger.warning("%s is not uploaded (%s); it is tried again with the next save", what, reason)
            logger.debug("where that was:", exc_info=True)
            return False
        self.errors.pop(what, None)
        return True

    def start(self) -> None:
        """Make the repository; a Hub that does not answer is only noted.

        Raises:
            ValueError, HfHubHTTPError: a name or a token that no later attempt could do better with.
        """
        try:
            self.repository.make()
        except Exception as error:
            refused = isinstance(error, HfHubHTTPError) and error.response.status_code in NOT_ALLOWED
            if refused or isinstance(error, ValueError):
                raise
            message = "%s cannot be made on the Hub now (%s); training starts, and every save tries again"
            logger.warning(message, self.repository.name, error)

    @property
    def branches(self) -> list[str]:
        """Those of stages that are there."""
        with self.lock:
            return sorted(self.stages)

    def add(self, branch: str, fill: Callable[[Path], None], message: str) -> None:
        """A revision of that branch: `fill` makes its folder; it takes the place of one that still waits."""
        folder = self.folder / str(next(self.numbers))
        if self.attempt(branch, partial(fill, folder)):
            with self.lock:
                older, self.waiting[branch] = self.waiting.get(branch), Revision(folder, message)
            if older is not None:
                shutil.rmtree(older.folder)

    def begin(self) -> Future:
        """Upload what waits, behind the caller's back; the future is done when everything was tried."""
        return self.pool.submit(self.upload_waiting)

    def upload_waiting(self) -> None:
        """Every revision that waits, once; those that fail wait again."""
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
        """The last attempt, and what came of it; `run` is the folder that holds everything anyway."""
        self.begin().result()
        shutil.rmtree(self.folder, ignore_errors=True)
        name = self.repository.name
        if not self.errors:
            logger.info("uploaded to %s: %s", name, ", ".join([self.main, *self.branches]))
            return
        failed = "; ".join(f"{branch} ({error})" for branch, error in sorted(self.errors.items()))
        remedy = f"python -m mmcoconut.publish --model {run} --repo_id {name}"
        logger.error("not uploaded to %s: %s. All of it is in %s: %s", name, failed, run, remedy)
