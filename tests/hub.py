"""A Hub on loopback, held in memory: what huggingface_hub asks of huggingface.co to create, upload, list and download.

    with Hub() as hub:
        hub.fail("commit", "user/name", times=2)  # answered with 503
        subprocess.run(command, env={**os.environ, **hub.environment(tmp_path / "hf")})
        hub.files("user/name", "main")["README.md"]

Every token but `hf_wrong` is good, and belongs to `user`. Large files go the way of Git LFS; there is no xet.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


USER = "user"
WRONG_TOKEN = "hf_wrong"
LARGE = 4096  # bytes from which a file goes by LFS
REPOSITORY = r"(?P<name>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>model|dataset|space)s/{REPOSITORY}"
PAGE = rf"/(?:(?P<kind>dataset|space)s/)?{REPOSITORY}"
ROUTES = {
    "whoami": ("GET", r"/api/whoami-v2"),
    "create": ("POST", r"/api/repos/create"),
    "validate": ("POST", r"/api/validate-yaml"),
    "refs": ("GET", rf"{API}/refs"),
    "tree": ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?"),
    "preupload": ("POST", rf"{API}/preupload/(?P<revision>[^/]+)"),
    "commit": ("POST", rf"{API}/commit/(?P<revision>[^/]+)"),
    "branch": ("POST", rf"{API}/branch/(?P<revision>[^/]+)"),
    "info": ("GET", rf"{API}(?:/revision/(?P<revision>[^/]+))?"),
    "batch": ("POST", rf"{PAGE}\.git/info/lfs/objects/batch"),
    "store": ("PUT", r"/lfs/(?P<oid>\w+)"),
    "resolve": ("GET", rf"{PAGE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
}


class Refusal(Exception):
    """What the server answers in the place of a result: a status, and the Hub's word for the error."""

    def __init__(self, status: int, code: str = ""):
        self.status, self.code = status, code


@dataclass
class Commit:
    """A revision: its files, and which of them went by LFS."""

    title: str
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)

    @property
    def oid(self) -> str:
        return hashlib.sha1(repr((self.title, sorted(self.files.items()))).encode()).hexdigest()

    def entry(self, path: str) -> dict:
        content = self.files[path]
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        lfs = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
        return entry | ({"lfs": lfs} if path in self.large else {})


@dataclass
class Repository:
    """Commits from the oldest to the newest, and the branches' latest."""

    private: bool
    commits: dict[str, Commit]
    branches: dict[str, Commit]

    def commit(self, revision: str | None) -> Commit:
        found = self.branches.get(revision or "main") or self.commits.get(revision)
        if found is None:
            raise Refusal(404, "RevisionNotFound")
        return found


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def metadata_errors(content: str) -> list[str]:
    """What the Hub's rules for a model card's first block are here: a mapping, lists of text, a whole model-index."""
    block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    metadata = yaml.safe_load(block.group(1)) if block else None
    if not isinstance(metadata, dict):
        return ["metadata must be a mapping"]
    errors = [
        f'"{key}" must be a list' for key in ("tags", "datasets", "metrics") if isinstance(metadata.get(key), str)
    ]
    for model in metadata.get("model-index", []):
        for result in model["results"]:
            named = result.get("task", {}).get("type") and {"name", "type"} <= result.get("dataset", {}).keys()
            if not named or any({"type", "value"} - metric.keys() for metric in result["metrics"]):
                errors.append(f"model-index: {result} needs task, dataset and metrics")
    return errors


class Answers(BaseHTTPRequestHandler):
    """One request; its method of the route's name gives what is answered as JSON."""

    hub: "Hub"
    protocol_version = "HTTP/1.1"

    def respond(self) -> None:
        method, path = {"HEAD": "GET"}.get(self.command, self.command), unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            for name, (verb, pattern) in ROUTES.items():
                if verb == method and (match := re.fullmatch(pattern, path)):
                    found = match.groupdict()
                    self.hub.misbehave(name, self.asked_name() if name == "create" else found.get("name"))
                    with self.hub.lock:
                        answer = getattr(self, name)(**found)
                    return self.send(*answer)
            raise Refusal(404)
        except Refusal as refusal:
            self.send({"error": refusal.code}, {"X-Error-Code": refusal.code}, refusal.status)

    do_GET = do_HEAD = do_POST = do_PUT = respond

    def send(self, content, headers=None, status: int = 200) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else content)

    def log_message(self, *args) -> None:
        """Nothing: a test's output is its own."""

    def asked_name(self) -> str:
        asked = json.loads(self.body)
        return f"{asked.get('organization') or USER}/{asked['name']}"

    def repository(self, kind: str | None, name: str) -> Repository:
        found = self.hub.repositories.get((kind or "model", name))
        if found is None or (found.private and "Authorization" not in self.headers):
            raise Refusal(404, "RepoNotFound")
        return found

    def whoami(self):
        return ({"type": "user", "name": USER, "fullname": USER, "orgs": []},)

    def create(self):
        asked, name = json.loads(self.body), self.asked_name()
        kind = asked.get("type") or "model"
        if self.headers.get("Authorization") in (None, f"Bearer {WRONG_TOKEN}"):
            raise Refusal(401)
        known = (kind, name) in self.hub.repositories
        if not known:
            first = Commit("initial commit", {".gitattributes": b""})
            private = asked.get("visibility") == "private"
            self.hub.repositories[kind, name] = Repository(private, {first.oid: first}, {"main": first})
        path = name if kind == "model" else f"{kind}s/{name}"
        return {"url": f"{self.hub.url}/{path}", "name": name, "id": name}, {}, 409 if known else 200

    def validate(self):
        errors = [{"message": error} for error in metadata_errors(json.loads(self.body)["content"])]
        return {"errors": errors, "warnings": []}, {}, 400 if errors else 200

    def refs(self, kind, name):
        branches = self.repository(kind, name).branches.items()
        listed = [{"name": key, "ref": f"refs/heads/{key}", "targetCommit": commit.oid} for key, commit in branches]
        return ({"branches": listed, "tags": [], "converts": []},)

    def info(self, kind, name, revision=None):
        repository = self.repository(kind, name)
        commit = repository.commit(revision)
        siblings = [{"rfilename": path} for path in commit.files]
        return ({"id": name, "sha": commit.oid, "private": repository.private, "siblings": siblings, "tags": []},)

    def tree(self, kind, name, revision, path=None):
        commit = self.repository(kind, name).commit(revision)
        return ([commit.entry(file) for file in commit.files if file.startswith(f"{path}/" if path else "")],)

    def preupload(self, kind, name, revision):
        self.repository(kind, name).commit(revision)
        asked = [
            (file["path"], "lfs" if file["size"] >= LARGE else "regular") for file in json.loads(self.body)["files"]
        ]
        return ({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in asked]},)

    def batch(self, kind, name):
        self.repository(kind, name)
        objects = json.loads(self.body)["objects"]
        for large in objects:
            large["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{large['oid']}"}}
        return ({"transfer": "basic", "objects": objects},)

    def store(self, oid):
        if sha256(self.body) != oid:
            raise Refusal(400)
        self.hub.large[oid] = self.body
        return ({},)

    def branch(self, kind, name, revision):
        repository = self.repository(kind, name)
        if revision in repository.branches:
            raise Refusal(409)
        repository.branches[revision] = repository.commit(json.loads(self.body or b"{}").get("startingPoint"))
        return ({},)

    def commit(self, kind, name, revision):
        repository = self.repository(kind, name)
        if revision not in repository.branches:
            raise Refusal(404, "RevisionNotFound")
        earlier, header, *changes = repository.branches[revision], *map(json.loads, self.body.splitlines())
        commit = Commit(header["value"]["summary"], {**earlier.files}, {*earlier.large})
        for change in changes:
            value = change["value"]
            commit.files.pop(value["path"], None)
            commit.large.discard(value["path"])
            if change["key"] == "file":
                commit.files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                commit.files[value["path"]] = self.hub.large[value["oid"]]
                commit.large.add(value["path"])
        repository.commits[commit.oid] = repository.branches[revision] = commit
        return ({"commitOid": commit.oid, "commitUrl": f"{self.hub.url}/{name}/commit/{commit.oid}"},)

    def resolve(self, kind, name, revision, path):
        commit = self.repository(kind, name).commit(revision)
        if path not in commit.files:
            raise Refusal(404, "EntryNotFound")
        content = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{sha256(content)}"'}
        wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted is None:
            return content, headers
        start = int(wanted.group(1))
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return content[start:], headers, 206


class Server(ThreadingHTTPServer):
    """Takes all connections that a client opens at once; one that waits too long is forgotten."""

    request_queue_size = 128
    daemon_threads = True


class Hub:
    """The server and what it holds."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.failures: dict[tuple[str, str], int] = {}
        self.lock = threading.RLock()
        self.silent: set[tuple[str, str]] = set()
        self.closed = threading.Event()
        self.server = Server(("127.0.0.1", 0), type("Handler", (Answers,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home) -> dict[str, str]:
        """Of a process for which this is the Hub, with an empty cache."""
        variables = {"HF_ENDPOINT": self.url, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return {**variables, "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), "NO_PROXY": "127.0.0.1"}

    def fail(self, operation: str, name: str, *, times: int) -> None:
        """Answer the next so many requests of this kind about this repository with 503."""
        self.failures[operation, name] = times

    def fall_silent(self, operation: str, name: str) -> None:
        """Never answer such a request."""
        self.silent.add((operation, name))

    def misbehave(self, operation: str, name: str | None) -> None:
        """As was asked for."""
        if (operation, name) in self.silent:
            self.closed.wait()
        with self.lock:
            left = self.failures.get((operation, name), 0)
            self.failures[operation, name] = max(0, left - 1)
        if left:
            raise Refusal(503)

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        return self.repositories[kind, name].commit(revision).files

    def titles(self, name: str) -> list[str]:
        """Of all commits, from the oldest."""
        return [commit.title for commit in self.repositories["model", name].commits.values()]
