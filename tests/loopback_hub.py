"""A Hub of one machine, with faults on demand: as much of it as `huggingface_hub` 2.4 and `datasets` 5.2 ask for.

    with serve(token="hf_mine", faults=Faults(rates={"put": {"503": 0.1}})) as hub:   # 127.0.0.1, a free port
        api = HfApi(endpoint=hub.address, token="hf_mine")
        hub.fail("commit", "lost")                        # the next commit is applied, its reply never arrives
        hub.down(); hub.up()                              # connections are refused; they are accepted again
        ...
        assert hub.repo("user/name").files()["a.txt"] == b"..."    # now, or .files(oid) at any commit of .commits

What was asked is in `hub.log`, counts are in `hub.seen` (kind) and `hub.given` (kind, fault), and `hub.leaks` names
every place where the token was and should not have been. As a process of its own: `python tests/loopback_hub.py -h`.

Two origins, as there: `hub.address` answers the API, `hub.storage` takes and gives the bytes of large files by
addresses that need no token. Everything is kept in memory: bytes by their hash, commits as a chain with every tree.
A commit's id is a hash, but not git's; the hashes of files are git's (a large file's is that of its pointer).
Known words of the Hub are kept where callers may look for them (412, 429, a pointer without its file). Not here:
pull requests, tags, gates, copies between repositories, uploads in several parts, names of branches with a slash.

Xet. Where `hf_xet` can be imported and HF_HUB_DISABLE_XET is not set, the client asks for `xet-write-token` and sends
the bytes of large files to the storage that is named there, whatever `preupload` said; `batch`, `put` and `verify` are
not used. Without `xet=True` this server answers 404, out of which comes a ConnectionError (the builtin one, an OSError
and no HfHubHTTPError). With it a stub takes the bytes and cannot give them back: `files()` has None, a download 404s.
With a token's address that only says 500 `hf_xet` 1.8 went on for two minutes, with such a storage for four and a half
(the client's own tries take 23 s), before that ConnectionError. Untested: reading through Xet (no X-Xet-Hash is ever
sent, so that downloads are plain here whether Xet is on or off).
"""

import argparse
import asyncio
import base64
import hashlib
import json
import math
import os
import random
import re
import socket
import stat
import string
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, quote, urlencode

import uvicorn
import yaml
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

LARGE = {"arrow", "bin", "gz", "h5", "npy", "npz", "onnx", "parquet", "pt", "safetensors", "tar", "zip", "zst"}
ATTRIBUTES = "".join(f"*.{end} filter=lfs diff=lfs merge=lfs -text\n" for end in sorted(LARGE)).encode()

XET = b"Bearer xet_of_one_hour"

# ---- what is kept -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blob:
    "A file's content, as git and the large-file storage name it"

    data: bytes | None  # None: promised by another storage, not here
    size: int
    sha256: str
    large: bool

    @cached_property
    def oid(self) -> str:
        text = self.data if not self.large else self.pointer
        return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()


def blob(data: bytes, large: bool) -> Blob:
    return Blob(data, len(data), hashlib.sha256(data).hexdigest(), large)


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    time: float
    title: str
    tree: dict[str, Blob]  # never changed once it is here


def commit(parent: Commit | None, tree: dict[str, Blob], title: str, now: float) -> Commit:
    listing = [(path, tree[path].oid) for path in sorted(tree)]
    what = json.dumps([parent.oid if parent else None, listing, title, now])
    return Commit(hashlib.sha1(what.encode()).hexdigest(), parent.oid if parent else None, now, title, tree)


@dataclass
class Repo:
    "A repository: its commits in the order of arrival, its branches, the large files it was given"

    id: str
    type: str  # "model" or "dataset"
    private: bool
    commits: list[Commit]
    branches: dict[str, str] = field(default_factory=dict)
    large: dict[str, Blob] = field(default_factory=dict)

    def at(self, revision: str = "main") -> Commit | None:
        "The commit that a branch's name, an id or its beginning stands for"
        oid = self.branches.get(revision, revision)
        return next((c for c in self.commits if len(oid) >= 5 and c.oid.startswith(oid)), None)

    @property
    def head(self) -> str:
        return self.branches["main"]

    def files(self, revision: str = "main") -> dict[str, bytes | None]:
        return {path: b.data for path, b in self.at(revision).tree.items()}


# ---- what goes wrong ----------------------------------------------------------------------------------------------

BEFORE = ("429", "ratelimit", "429-bare", "500", "503", "504", "closed")  # the request is not handled
OTHERS = ("409", "412")  # nor is it here: another commit is on its way, or was faster
AFTER = ("lost", "late-500", "late-504", "slow")  # it is handled: the connection closes, a 5xx replies, it takes long


@dataclass
class Faults:
    """What goes wrong, and how often. The fate of the n-th request of a kind depends on (seed, kind, n) alone

    `429` says Retry-After, `ratelimit` says `ratelimit: "api";r=0;t=`, `429-bare` says nothing; 5xx come with a page
    of HTML, as a gateway's do; `closed` cuts the connection first, `lost` when the request has been applied."""

    rates: dict[str, dict[str, float]] = field(default_factory=dict)  # kind ("*": any other) → fault → share
    script: dict[str, dict[int, str]] = field(default_factory=dict)  # kind → number of the request, from 1 → fault
    seed: int = 0
    seconds: float = 1  # what Retry-After and t= ask for
    slow: float = 0.5  # seconds that a slow reply takes

    def fate(self, kind: str, n: int) -> str | None:
        script = {int(k): v for k, v in self.script.get(kind, {}).items()}
        if n in script:
            return script[n]
        at = random.Random(f"{self.seed}/{kind}/{n}").random()
        for fault, share in self.rates.get(kind, self.rates.get("*", {})).items():
            if (at := at - share) < 0:
                return fault
        return None


REPO = r"/api/(?:models|datasets)/[^/]+/[^/]+"
KINDS = {  # kind of request → method and address; the names that faults and counts go by
    "whoami": r"GET /api/whoami-v2",
    "create": r"POST /api/repos/create",
    "delete": r"DELETE /api/repos/delete",
    "yaml": r"POST /api/validate-yaml",
    "preupload": rf"POST {REPO}/preupload/.*",
    "commit": rf"POST {REPO}/commit/.*",
    "branch": rf"(POST|DELETE) {REPO}/branch/.*",
    "paths": rf"POST {REPO}/paths-info/.*",
    "tree": rf"GET {REPO}/tree/.*",
    "refs": rf"GET {REPO}/(refs|commits/.*)",
    "xet": rf"GET {REPO}/xet-(read|write)-token/.*",
    "cas": r"(GET|POST) /cas/.*",
    "info": rf"GET {REPO}(/revision/.*|/auth-check)?",
    "batch": r"POST .*\.git/info/lfs/objects/batch",
    "put": r"PUT /large/.*",
    "blob": r"(GET|HEAD) /large/.*",
    "verify": r"POST /verify/.*",
    "resolve": r"(GET|HEAD) /.*/resolve/.*",
}


def kind_of(method: str, path: str) -> str:
    return next((kind for kind, way in KINDS.items() if re.fullmatch(way, f"{method} {path}")), "other")


@dataclass
class Asked:
    "One request: what it was, what became of it"

    method: str
    path: str
    kind: str
    status: int | None = None  # None: it got no reply
    fault: str | None = None


# ---- the Hub ------------------------------------------------------------------------------------------------------


class Hub:
    "The state of the Hub and the hands that a test lays on it; all requests are handled in one thread, one at a time"

    def __init__(
        self, token=None, user="user", faults=None, commits_per_hour=None, clock=time.time, page=1000, xet=False
    ):
        self.token, self.user, self.may_write = token, user, True
        self.faults = faults or Faults()
        self.commits_per_hour, self.clock, self.page = commits_per_hour, clock, page
        self.xorbs: dict[str, bytes] | None = {} if xet else None  # what the stub of a Xet storage was given
        self.repos: dict[tuple[str, str], Repo] = {}
        self.log: list[Asked] = []
        self.seen: Counter[str] = Counter()  # requests of each kind
        self.given: Counter[tuple[str, str]] = Counter()  # faults given: (kind, fault)
        self.leaks: list[str] = []  # where the token was and should not have been
        self.broken: list[Exception] = []  # what this server itself did wrong
        self._next: dict[str, deque[str]] = defaultdict(deque)
        self._landed: deque[float] = deque()  # when commits were accepted

    def repo(self, id: str, type: str = "dataset") -> Repo:
        return self.repos[type, id]

    def fail(self, kind: str, *faults: str):
        "These faults for the next requests of this kind, one each, before anything that rates or the script say"
        assert kind in (*KINDS, "other") and set(faults) <= {*BEFORE, *OTHERS, *AFTER}, (kind, faults)
        self._next[kind].extend(faults)

    def add(self, id: str, files: dict[str, bytes], type: str = "dataset", private: bool = False) -> Repo:
        "A repository with these files in its first commit"
        tree = {path: blob(data, is_large(path, len(data), data[:512])) for path, data in files.items()}
        first = commit(None, tree, "initial commit", self.clock())
        repo = Repo(id, type, private, [first], {"main": first.oid}, {b.sha256: b for b in tree.values() if b.large})
        self.repos[type, id] = repo
        return repo

    def state(self) -> dict:
        "What a process beside this one may want to know"
        repos = {
            f"{r.type}s/{r.id}": {"head": r.head, "commits": [c.oid for c in r.commits], "files": sorted(r.files())}
            for r in self.repos.values()
        }
        given = {f"{kind} {fault}": n for (kind, fault), n in self.given.items()}
        return {"repos": repos, "seen": dict(self.seen), "given": given, "leaks": self.leaks}

    def fate(self, kind: str) -> str | None:
        self.seen[kind] += 1
        fault = self.faults.fate(kind, self.seen[kind])
        if self._next[kind]:
            fault = self._next[kind].popleft()
        if fault:
            self.given[kind, fault] += 1
        return fault

    def quota(self) -> float:
        "Seconds until another commit is allowed; 0: now"
        now = self.clock()
        while self._landed and now - self._landed[0] >= 3600:
            self._landed.popleft()
        full = self.commits_per_hour is not None and len(self._landed) >= self.commits_per_hour
        return self._landed[0] + 3600 - now if full else 0

    # the two switches, and the way in and out

    def down(self):
        "Refuse every connection, and cut those that are open"
        self._call(self._close())

    def up(self):
        self._call(self._listen())

    def start(self, port: int = 0):
        socket.create_server(("127.0.0.1", port)).close()  # somebody else's port is an error; `reserve` would share it
        self._held = [reserve(port), reserve(0)]  # bound, never listening: the ports stay ours while the Hub is down
        self._ports = [s.getsockname()[1] for s in self._held]
        self.address, self.storage = (f"http://127.0.0.1:{port}" for port in self._ports)
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(ready)), daemon=True)
        self._thread.start()
        assert ready.wait(30), "the loopback Hub did not start"

    def stop(self):
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)
        for sock in self._held:
            sock.close()

    def _call(self, what):
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(10)

    async def _main(self, ready: threading.Event):
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        app = Door(self, build(self))
        quiet = dict(log_config=None, log_level="critical", access_log=False)
        config = uvicorn.Config(app, http="h11", ws="none", lifespan="off", timeout_keep_alive=600, **quiet)
        self._server = uvicorn.Server(config)
        config.load()
        self._server.lifespan = config.lifespan_class(config)
        await self._listen()
        ready.set()
        await self._over.wait()

    async def _listen(self):
        if not getattr(self._server, "servers", None):
            await self._server.startup(sockets=[reserve(port) for port in self._ports])

    async def _close(self):
        for server in self._server.servers:
            server.close()
        self._server.servers = []
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)

    def cut(self, client):
        "Close the connection that this client holds, with nothing more said"
        for connection in list(self._server.server_state.connections):
            if connection.client == tuple(client):
                connection.transport.abort()


def reserve(port: int) -> socket.socket:
    sock = socket.socket(proto=socket.IPPROTO_TCP)  # named, or asyncio leaves Nagle's delay of 40 ms on
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    return sock


class Door:
    "Every request passes here: counted, given its fate, watched for the token; then the application answers"

    def __init__(self, hub: Hub, app):
        self.hub, self.app = hub, app

    async def __call__(self, scope, receive, send):
        hub, path = self.hub, scope["path"]
        kind = kind_of(scope["method"], path)
        asked = Asked(scope["method"], path, kind, fault=hub.fate(kind))
        hub.log.append(asked)
        if asked.fault == "closed":
            return await self.cut(scope, receive)
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return  # half a request is none
            body += message.get("body", b"")
            more = message.get("more_body", False)
        body = bytes(body)
        self.watch(scope, asked, body)
        if asked.fault in (*BEFORE, *OTHERS):
            return await self.say(asked, error(asked.fault, hub.faults.seconds), scope, receive, send)
        waiting = deque([{"type": "http.request", "body": body, "more_body": False}])
        reply = []

        async def read():
            return waiting.popleft() if waiting else await receive()

        async def keep(message):
            reply.append(message)

        try:
            await self.app(scope, read, keep)
        except Exception as broken:  # a 500 is on its way to the client; `serve` raises this at its end
            hub.broken.append(broken)
        if asked.fault == "lost":
            return await self.cut(scope, receive)
        if asked.fault in ("late-500", "late-504"):
            return await self.say(asked, error(asked.fault.removeprefix("late-"), 0), scope, receive, send)
        if asked.fault == "slow":
            await asyncio.sleep(hub.faults.slow)
        asked.status = reply[0]["status"]
        for message in reply:
            await send(message)

    async def say(self, asked: Asked, response: Response, scope, receive, send):
        asked.status = response.status_code
        await response(scope, receive, send)

    async def cut(self, scope, receive):
        self.hub.cut(scope["client"])
        while (await receive())["type"] != "http.disconnect":
            pass

    def watch(self, scope, asked: Asked, body: bytes):
        "Note where the token is sent: anywhere but in the one header, or to the storage at all"
        at_storage = scope["server"][1] == self.hub._ports[1]
        headers = dict(scope["headers"])
        if at_storage and headers.get(b"authorization", XET) != XET:
            self.hub.leaks.append(f"{asked.method} {asked.path}: a token sent to the storage")
        headers.pop(b"authorization", None)
        for what, text in (
            ("address", scope["raw_path"] + scope["query_string"]),
            ("headers", b"".join(headers.values())),
            ("body", body),
        ):
            self.scan(text, f"{asked.method} {asked.path}: in the {what}")

    def scan(self, text: bytes, where: str):
        if self.hub.token and self.hub.token.encode() in text:
            self.hub.leaks.append(where)


def error(fault: str, seconds: float) -> Response:
    "The reply to a request that is not handled"
    if fault in ("429", "ratelimit", "429-bare"):
        wait = str(math.ceil(seconds))
        policy = {"ratelimit": f'"api";r=0;t={wait}', "ratelimit-policy": '"fixed window";"api";q=1000;w=300'}
        headers = {"429": {"Retry-After": wait}, "ratelimit": policy, "429-bare": {}}[fault]
        return JSONResponse({"error": "We had to rate limit you."}, 429, headers)
    if fault in OTHERS:
        words = {"409": "Another commit operation is in progress", "412": "A commit has happened since"}[fault]
        return JSONResponse({"error": f"{words}. Please refresh and try again."}, int(fault))
    page = f"<html><body><h1>{fault}</h1><p>The request could not be satisfied.</p></body></html>"
    return Response(page, int(fault), media_type="text/html")


# ---- the application ----------------------------------------------------------------------------------------------


def refuse(status: int, message: str, code: str | None = None, **more):
    "Leave a handler with an error as the Hub words it"
    headers = (
        {"X-Error-Message": quote(message, safe=string.punctuation + " ")}
        | ({"X-Error-Code": code} if code else {})
        | more
    )
    raise HTTPException(status, message, headers)


def is_large(path: str, size: int, sample: bytes) -> bool:
    return size > 0 and (path.rsplit(".", 1)[-1] in LARGE or size > 10 << 20 or b"\0" in sample)


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def build(hub: Hub) -> FastAPI:
    "The application that answers for this Hub"
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(StarletteHTTPException)
    async def _(request, failed):
        return JSONResponse({"error": failed.detail}, failed.status_code, failed.headers)

    add_accounts(app, hub)
    add_reading(app, hub)
    add_uploads(app, hub)
    if hub.xorbs is not None:
        add_xet(app, hub)

    @app.api_route("/api/{type}/{name}", methods=["GET"])  # no owner, no repository
    @app.api_route("/{name}/resolve/{path:path}", methods=["GET", "HEAD"])
    async def nobody(name: str):
        refuse(404, "Repository not found", "RepoNotFound")

    return app


def who(hub: Hub, request: Request) -> str | None:
    "The user that a request's token belongs to; None: it carries none"
    sent = request.headers.get("authorization")
    if hub.token is None:
        return hub.user
    if sent is not None and sent != f"Bearer {hub.token}":
        refuse(401, "Invalid credentials in Authorization header")
    return hub.user if sent else None


def find(hub: Hub, request: Request, type: str, id: str, write: bool = False) -> Repo:
    "The repository, if it is there and whoever asks may have it"
    user, repo = who(hub, request), hub.repos.get((type.rstrip("s"), id))
    mine = user is not None and id.split("/")[0] == user
    if write and user is None:
        refuse(401, "Invalid username or password.")
    if repo is None or repo.private and not mine:
        refuse(404 if user else 401, "Repository not found", "RepoNotFound")
    if write and not (mine and hub.may_write):
        refuse(403, "Forbidden: you must use a write token to upload to a repository.")
    return repo


def look(repo: Repo, revision: str) -> Commit:
    found = repo.at(revision)
    if found is None:
        refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return found


def add_accounts(app: FastAPI, hub: Hub):
    "Who am I; repositories that come and go"

    @app.get("/api/whoami-v2")
    async def whoami(request: Request):
        if "authorization" not in request.headers or who(hub, request) is None:
            refuse(401, "Invalid username or password.")
        role = "write" if hub.may_write else "read"
        auth = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": role}}
        return {"type": "user", "id": "0" * 24, "name": hub.user, "fullname": hub.user, "orgs": [], "auth": auth}

    def named(request: Request, asked: dict) -> tuple[str, str]:
        user = who(hub, request)
        if user is None:
            refuse(401, "Invalid username or password.")
        owner = asked.get("organization") or user
        if owner != user or not hub.may_write:
            refuse(403, f'You don\'t have the rights to create a repository under the namespace "{owner}"')
        return asked.get("type") or "model", f"{owner}/{asked['name']}"

    @app.post("/api/repos/create")
    async def create(request: Request):
        asked = await request.json()
        type, id = named(request, asked)
        url = f"{hub.address}/{'datasets/' if type == 'dataset' else ''}{id}"
        if (type, id) in hub.repos:
            return JSONResponse({"error": f"You already created this {type} repo", "url": url}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        hub.add(id, {".gitattributes": ATTRIBUTES}, type, private)
        return {"url": url, "name": id, "id": id}

    @app.delete("/api/repos/delete")
    async def delete(request: Request):
        key = named(request, await request.json())
        if hub.repos.pop(key, None) is None:
            refuse(404, "Repository not found", "RepoNotFound")
        return {}

    @app.post("/api/validate-yaml")
    async def validate(request: Request):
        text = (await request.json())["content"]
        found = re.match(r"---\r?\n(.*?)\r?\n---", text, re.S)
        warnings = [] if found else [{"message": "empty or missing yaml metadata in repo card"}]
        try:
            yaml.safe_load(found[1] if found else "")
        except yaml.YAMLError as broken:
            return JSONResponse({"errors": [{"message": str(broken)}], "warnings": warnings}, 400)
        return {"errors": [], "warnings": warnings}

    @app.post("/api/{type}/{owner}/{name}/branch/{branch}")
    async def branch(request: Request, type: str, owner: str, name: str, branch: str):
        repo = find(hub, request, type, f"{owner}/{name}", write=True)
        asked = json.loads(await request.body() or b"{}")
        if branch in repo.branches:
            refuse(409, f"Reference already exists: {branch}")
        repo.branches[branch] = look(repo, asked.get("startingPoint", "main")).oid
        return {}

    @app.delete("/api/{type}/{owner}/{name}/branch/{branch}")
    async def no_branch(request: Request, type: str, owner: str, name: str, branch: str):
        repo = find(hub, request, type, f"{owner}/{name}", write=True)
        if branch == "main" or repo.branches.pop(branch, None) is None:
            refuse(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return {}


def entry(repo: Repo, at: Commit, path: str, expand: bool = False) -> dict | None:
    "What the Hub says of a file or folder; None: there is none of this name"
    if b := at.tree.get(path):
        large = {"lfs": {"oid": b.sha256, "size": b.size, "pointerSize": len(b.pointer)}} if b.large else {}
        said = {"type": "file", "oid": b.oid, "size": b.size, "path": path} | large
        safe = {"status": "safe", "avScan": None, "pickleImportScan": None}
    else:
        below = sorted((p, b.oid) for p, b in at.tree.items() if p.startswith(path + "/"))
        if not below:
            return None
        oid, safe = hashlib.sha1(json.dumps(below).encode()).hexdigest(), None
        said = {"type": "directory", "oid": oid, "size": 0, "path": path}
    if expand:
        last = changed(repo, at, path)
        said["lastCommit"] = {"id": last.oid, "title": last.title, "date": iso(last.time)}
        said |= {"securityFileStatus": safe} if safe else {}
    return said


def changed(repo: Repo, at: Commit, path: str) -> Commit:
    "The last commit up to this one in which a file, or something below a folder, became what it is"

    def part(c: Commit) -> dict:
        return {p: b.oid for p, b in c.tree.items() if p == path or p.startswith(path + "/")}

    while at.parent and part(repo.at(at.parent)) == part(at):
        at = repo.at(at.parent)
    return at


def add_reading(app: FastAPI, hub: Hub):
    "What a repository holds, at any of its commits"

    @app.get("/api/{type}/{owner}/{name}")
    async def info(request: Request, type: str, owner: str, name: str):
        return about(request, type, f"{owner}/{name}", "main")

    @app.get("/api/{type}/{owner}/{name}/revision/{revision}")
    async def info_at(request: Request, type: str, owner: str, name: str, revision: str):
        return about(request, type, f"{owner}/{name}", revision)

    def about(request: Request, type: str, id: str, revision: str) -> dict:
        repo = find(hub, request, type, id)
        at = look(repo, revision)
        siblings = []
        for path, b in sorted(at.tree.items()):
            large = {"lfs": {"sha256": b.sha256, "size": b.size, "pointerSize": len(b.pointer)}} if b.large else {}
            more = {"size": b.size, "blobId": b.oid} | large if request.query_params.get("blobs") else {}
            siblings.append({"rfilename": path} | more)
        said = {"_id": "0" * 24, "id": id, "author": id.split("/")[0], "sha": at.oid, "private": repo.private}
        said |= {"createdAt": iso(repo.commits[0].time), "lastModified": iso(at.time), "siblings": siblings}
        said |= {"gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        return said | ({"modelId": id} if repo.type == "model" else {})

    @app.get("/api/{type}/{owner}/{name}/auth-check")
    async def auth_check(request: Request, type: str, owner: str, name: str):
        find(hub, request, type, f"{owner}/{name}")
        return {}

    @app.get("/api/{type}/{owner}/{name}/refs")
    async def refs(request: Request, type: str, owner: str, name: str):
        repo = find(hub, request, type, f"{owner}/{name}")
        heads = sorted(repo.branches.items())
        branches = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": oid} for b, oid in heads]
        return {"branches": branches, "converts": [], "tags": [], "pullRequests": []}

    @app.get("/api/{type}/{owner}/{name}/commits/{revision}")
    async def commits(request: Request, type: str, owner: str, name: str, revision: str):
        repo = find(hub, request, type, f"{owner}/{name}")
        at, said = look(repo, revision), []
        while at:
            author = [{"user": hub.user}]
            said.append({"id": at.oid, "title": at.title, "message": "", "authors": author, "date": iso(at.time)})
            at = at.parent and repo.at(at.parent)
        return said

    @app.get("/api/{type}/{owner}/{name}/tree/{revision}")
    @app.get("/api/{type}/{owner}/{name}/tree/{revision}/{path:path}")
    async def tree(request: Request, type: str, owner: str, name: str, revision: str, path: str = ""):
        repo = find(hub, request, type, f"{owner}/{name}")
        at, asked = look(repo, revision), request.query_params
        recursive, expand = (asked.get(k, "").lower() in ("true", "1") for k in ("recursive", "expand"))
        start = path.strip("/") + "/" if path.strip("/") else ""
        below = [p[len(start) :].split("/") for p in at.tree if p.startswith(start)]
        if start and not below:
            refuse(404, f"{path} does not exist on {revision}", "EntryNotFound")
        deep = max(map(len, below), default=0) if recursive else 1
        paths = sorted({start + "/".join(p[:n]) for p in below for n in range(1, min(deep, len(p)) + 1)})
        size, first = min(hub.page, 50) if expand else hub.page, int(asked.get("cursor", 0))
        page = [entry(repo, at, p, expand) for p in paths[first : first + size]]
        headers = {}
        if first + size < len(paths):
            query = urlencode({**asked, "cursor": first + size})
            headers["Link"] = f'<{hub.address}{quote(request.scope["path"])}?{query}>; rel="next"'
        return JSONResponse(page, headers=headers)

    @app.post("/api/{type}/{owner}/{name}/paths-info/{revision}")
    async def paths_info(request: Request, type: str, owner: str, name: str, revision: str):
        repo = find(hub, request, type, f"{owner}/{name}")
        at, text = look(repo, revision), (await request.body()).decode()
        if request.headers.get("content-type", "").startswith("application/json"):
            asked = json.loads(text)
            paths, expand = asked["paths"], bool(asked.get("expand"))
        else:
            asked = parse_qs(text)
            paths, expand = asked.get("paths", []), asked.get("expand", [""])[0].lower() in ("true", "1")
        if len(paths) > 1000:
            refuse(413, "too many parameters")
        return [said for p in paths if (said := entry(repo, at, p.strip("/"), expand))]

    @app.api_route("/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    async def resolve_model(request: Request, owner: str, name: str, revision: str, path: str):
        return resolve(request, "models", f"{owner}/{name}", revision, path)

    @app.api_route("/datasets/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    async def resolve_dataset(request: Request, owner: str, name: str, revision: str, path: str):
        return resolve(request, "datasets", f"{owner}/{name}", revision, path)

    def resolve(request: Request, type: str, id: str, revision: str, path: str) -> Response:
        repo = find(hub, request, type, id)
        at = look(repo, revision)
        headers = {"X-Repo-Commit": at.oid, "Accept-Ranges": "bytes"}
        b = at.tree.get(path)
        if b is None:
            refuse(404, "Entry not found", "EntryNotFound", **headers)
        if not b.large:
            return part(request, b.data, headers | {"ETag": f'"{b.oid}"'})
        headers |= {"X-Linked-Size": str(b.size), "X-Linked-Etag": f'"{b.sha256}"', "ETag": f'"{b.oid}"'}
        return Response(None, 302, headers | {"Location": f"{hub.storage}/large/{repo.type}/{id}/{b.sha256}"})

    @app.api_route("/large/{type}/{owner}/{name}/{sha256}", methods=["GET", "HEAD"])
    async def large(request: Request, type: str, owner: str, name: str, sha256: str):
        repo = hub.repos.get((type, f"{owner}/{name}"))
        if repo is None or sha256 not in repo.large or repo.large[sha256].data is None:
            refuse(404, "no such object in the storage")
        return part(request, repo.large[sha256].data, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})


def part(request: Request, data: bytes, headers: dict[str, str]) -> Response:
    "The whole of the data, or the range that is asked for"
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    status = 200
    if asked and (asked[1] or asked[2]):
        start = int(asked[1]) if asked[1] else max(0, len(data) - int(asked[2]))
        end = min(int(asked[2]) if asked[1] and asked[2] else len(data) - 1, len(data) - 1)
        if start >= len(data) or end < start:
            return Response(None, 416, headers | {"Content-Range": f"bytes */{len(data)}"})
        headers = headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"}
        status, data = 206, data[start : end + 1]
    length = {"Content-Length": str(len(data))}
    body = data if request.method == "GET" else None
    return Response(body, status, headers | length, media_type="application/octet-stream")


def add_uploads(app: FastAPI, hub: Hub):
    "The way of bytes into a repository: asked for, stored, verified, committed"

    @app.post("/api/{type}/{owner}/{name}/preupload/{revision}")
    async def preupload(request: Request, type: str, owner: str, name: str, revision: str):
        repo = find(hub, request, type, f"{owner}/{name}", write=True)
        at, said = look(repo, revision), []
        for asked in (await request.json())["files"]:
            large = is_large(asked["path"], asked["size"], base64.b64decode(asked["sample"]))
            said.append({"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            if b := at.tree.get(asked["path"]):
                said[-1]["oid"] = b.sha256 if b.large else b.oid
        return {"files": said, "commitOid": at.oid}

    @app.post("/datasets/{owner}/{name}.git/info/lfs/objects/batch")
    async def batch_dataset(request: Request, owner: str, name: str):
        return await batch(request, "dataset", f"{owner}/{name}")

    @app.post("/{owner}/{name}.git/info/lfs/objects/batch")
    async def batch_model(request: Request, owner: str, name: str):
        return await batch(request, "model", f"{owner}/{name}")

    async def batch(request: Request, type: str, id: str):
        repo, objects = find(hub, request, type, id, write=True), []
        for asked in (await request.json())["objects"]:
            sha256 = asked["oid"]
            put, verify = f"{hub.storage}/large/{type}/{id}/{sha256}", f"{hub.address}/verify/{type}/{id}"
            actions = {"actions": {"upload": {"href": put}, "verify": {"href": verify}}}
            objects.append(asked | ({} if sha256 in repo.large else actions))
        return {"transfer": "basic", "objects": objects}

    @app.put("/large/{type}/{owner}/{name}/{sha256}")
    async def put(request: Request, type: str, owner: str, name: str, sha256: str):
        b = blob(await request.body(), large=True)
        repo = hub.repos.get((type, f"{owner}/{name}"))
        if repo is None or b.sha256 != sha256:
            refuse(400, "XAmzContentSHA256Mismatch")
        repo.large[sha256] = b
        return Response(None, 200, {"ETag": f'"{sha256}"'})

    @app.post("/verify/{type}/{owner}/{name}")
    async def verify(request: Request, type: str, owner: str, name: str):
        repo, asked = find(hub, request, type, f"{owner}/{name}", write=True), await request.json()
        b = repo.large.get(asked["oid"])
        if b is None or b.size != asked["size"]:
            refuse(404, "the object is not in the storage, or has another size")
        return {}

    @app.post("/api/{type}/{owner}/{name}/commit/{revision}")
    async def commit_to(request: Request, type: str, owner: str, name: str, revision: str):
        repo = find(hub, request, type, f"{owner}/{name}", write=True)
        lines = [json.loads(line) for line in (await request.body()).splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if request.query_params.get("create_pr") or revision not in repo.branches:
            refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if wait := hub.quota():
            left = str(math.ceil(wait))
            words = f"You have exceeded the rate limit for repository commits ({hub.commits_per_hour} per hour)."
            refuse(429, f"{words} Retry in {left} seconds.", **{"Retry-After": left, "ratelimit": '"api";r=990;t=120'})
        head = look(repo, revision)
        if not head.oid.startswith(header.get("parentCommit") or ""):
            refuse(412, "A commit has happened since. Please refresh and try again.")
        new = commit(head, changes(repo, head, lines, hub), header["summary"], hub.clock())
        repo.commits.append(new)
        repo.branches[revision] = new.oid
        hub._landed.append(new.time)
        prefix = "datasets/" if repo.type == "dataset" else ""
        url = f"{hub.address}/{prefix}{repo.id}/commit/{new.oid}"
        return {"success": True, "commitOid": new.oid, "commitUrl": url, "hookOutput": ""}


def changes(repo: Repo, head: Commit, lines: list[dict], hub: Hub) -> dict[str, Blob]:
    "The tree after the operations of a commit, in their order"
    tree = dict(head.tree)
    for line in lines:
        key, path = line["key"], line["value"].get("path", "").rstrip("/")
        if key != "header" and (not path or {"", ".", "..", ".git"} & set(path.split("/"))):
            refuse(400, f"Invalid path: {path!r}")
        if key == "file":
            data = base64.b64decode(line["value"]["content"])
            if hub.token and hub.token.encode() in data:
                hub.leaks.append(f"commit: in {path}")
            tree[path] = blob(data, large=False)
        elif key == "lfsFile":
            oid, size = line["value"]["oid"], line["value"].get("size", 0)
            if oid not in repo.large and hub.xorbs is not None:
                repo.large[oid] = Blob(None, size, oid, True)
            if oid not in repo.large:
                words = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
                refuse(400, f"{words} Offending file: {path}")
            tree[path] = repo.large[oid]
        elif key in ("deletedFile", "deletedFolder"):
            gone = [p for p in tree if (p == path if key == "deletedFile" else p.startswith(path + "/"))]
            if not gone:
                refuse(404, f"A {key[7:].lower()} with this name doesn't exist: {path}", "EntryNotFound")
            for p in gone:
                del tree[p]
        elif key != "header":
            refuse(400, f"Unknown operation: {key}")
    return tree


def add_xet(app: FastAPI, hub: Hub):
    "The stub of a Xet storage: takes what is sent, knows nothing beforehand, gives nothing back"

    @app.get("/api/{type}/{owner}/{name}/xet-write-token/{revision}")
    async def xet_token(request: Request, type: str, owner: str, name: str, revision: str):
        find(hub, request, type, f"{owner}/{name}", write=True)
        end = int(time.time()) + 3600
        said = {"casUrl": hub.storage + "/cas", "accessToken": XET.decode().split()[1], "exp": end}
        names = {"casUrl": "X-Xet-Cas-Url", "accessToken": "X-Xet-Access-Token", "exp": "X-Xet-Token-Expiration"}
        return JSONResponse(said, headers={names[key]: str(value) for key, value in said.items()})

    @app.post("/cas/v1/xorbs/default/{hash}")
    async def xorb(request: Request, hash: str):
        hub.xorbs[hash] = await request.body()
        return {"was_inserted": True}

    @app.post("/cas/v1/shards")
    async def shard(request: Request):
        return {"result": 1}


# ---- ways to run it -----------------------------------------------------------------------------------------------


@contextmanager
def serve(models: dict[str, Path] | None = None, *, port: int = 0, **options):
    """A Hub that runs while the block does, with these folders as its model repositories

    Options: token, user, faults, commits_per_hour, clock, page (see `Hub`)."""
    hub = Hub(**options)
    for id, folder in (models or {}).items():
        hub.add(id, {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.is_file()}, "model")
    hub.start(port)
    try:
        yield hub
    finally:
        hub.stop()
    if hub.broken:
        raise hub.broken[0]


def point(monkeypatch, address: str, home: Path, offline: bool = False):
    "Point the clients that are imported already (they read the environment once) at this Hub and caches of one's own"
    home = Path(home)
    constants = {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": True,
    }
    config = {
        "HF_ENDPOINT": address,
        "HF_DATASETS_CACHE": home / "datasets",
        "DOWNLOADED_DATASETS_PATH": home / "datasets" / "downloads",
        "HF_MODULES_CACHE": home / "modules",
        "HF_HUB_OFFLINE": offline,
        "HF_UPDATE_DOWNLOAD_COUNTS": False,
    }
    for module, values in (("huggingface_hub.constants", constants), ("datasets.config", config)):
        if module in sys.modules:
            for key, value in values.items():
                monkeypatch.setattr(f"{module}.{key}", value)


def hurry(monkeypatch) -> list[float]:
    "The client's own waits, which from here on take no time"
    waits = []
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        clock = SimpleNamespace(**{**vars(time), "sleep": waits.append})
        monkeypatch.setattr(f"{module}.time", clock)
    return waits


def environment(address: str, home: Path, **more: str) -> dict[str, str]:
    "The environment for a process that is to talk to this Hub and to nothing else"
    mine = {k: v for k, v in os.environ.items() if not k.upper().startswith(("HF_", "HUGGING")) and "PROXY" not in k}
    own = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    return mine | own | nowhere | quiet | {"NO_PROXY": "127.0.0.1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"} | more


def main():
    "One Hub as a process: prints its address as JSON; obeys lines of JSON, and leaves when they end"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--token")
    parser.add_argument("--user", default="user")
    parser.add_argument("--commits-per-hour", type=int)
    parser.add_argument("--faults", type=json.loads, default={}, help="fields of Faults, as JSON")
    asked = vars(parser.parse_args())
    faults = Faults(**asked.pop("faults"))
    with serve(faults=faults, **asked) as hub:
        print(json.dumps({"address": hub.address, "storage": hub.storage}), flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            if order["do"] == "faults":
                hub.faults = Faults(**(asdict(hub.faults) | order["faults"]))
            elif order["do"] == "fail":
                hub.fail(order["kind"], *order["faults"])
            elif order["do"] in ("down", "up"):
                getattr(hub, order["do"])()
            print(json.dumps(hub.state()), flush=True)
        if stat.S_ISCHR(os.fstat(0).st_mode):  # started without an input to obey
            threading.Event().wait()


if __name__ == "__main__":
    main()
