"""The loopback Hub as the real clients see it: uploads, commits, downloads, and every fault once."""

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import datasets
import httpx2
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import close_session, parse_ratelimit_headers
from loopback_hub import AFTER, BEFORE, OTHERS, Faults, Hub, environment, hurry, point, serve

TOKEN = "hf_" + "loopback" * 4
HUB = Path(__file__).with_name("loopback_hub.py")
WEB = httpx2.Client(trust_env=False, verify=False, follow_redirects=True)  # a client that is not the Hub's
CARD = (
    b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*.parquet\n---\n# Rows\n"
)


def parquet(**columns) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def add(path: str, data: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, data)


class Client:
    "The real client, set on one repository of a loopback Hub"

    def __init__(self, hub, repo="user/rows", token=TOKEN):
        self.api, self.at = HfApi(endpoint=hub.address, token=token), {"repo_id": repo, "repo_type": "dataset"}

    def __getattr__(self, name):
        return lambda *args, **options: getattr(self.api, name)(*args, **self.at, **options)

    def commit(self, *operations, **options):
        return self.create_commit(operations=list(operations), commit_message="more", **options)

    def upload(self, path: str, data: bytes):
        return self.upload_file(path_or_fileobj=data, path_in_repo=path)


@pytest.fixture(scope="module", autouse=True)
def nowhere_else():
    "What the clients of this process would ask elsewhere leads nowhere"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            patch.setenv(name, "http://127.0.0.1:9")
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("HF_TOKEN", TOKEN)
        close_session()  # one client serves all tests: making one reads every certificate of this machine
        yield
    close_session()


@pytest.fixture
def at_hub(monkeypatch, tmp_path):
    "Point the clients of this process at a Hub that is running"
    return lambda hub: point(monkeypatch, hub.address, tmp_path / "home")


@pytest.fixture
def hub(at_hub):
    with serve(token=TOKEN) as hub:
        at_hub(hub)
        hub.add("user/rows", {"README.md": CARD})
        yield hub


@pytest.fixture
def waits(monkeypatch):
    return hurry(monkeypatch)


# ---- repositories, commits ----------------------------------------------------------------------------------------


def test_a_repository_comes_and_goes(hub):
    client = Client(hub, "user/new")
    assert client.api.whoami()["name"] == "user"
    assert client.create_repo(private=True) == f"{hub.address}/datasets/user/new"
    with pytest.raises(HfHubHTTPError) as failed:
        client.create_repo()
    assert failed.value.response.status_code == 409
    assert client.create_repo(exist_ok=True).repo_id == "user/new"
    info = client.repo_info()
    assert (info.private, info.sha) == (True, hub.repo("user/new").head)
    assert [s.rfilename for s in info.siblings] == [".gitattributes"]
    client.create_branch(branch="side")
    client.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", revision="side")
    assert {b.name: b.target_commit == info.sha for b in client.list_repo_refs().branches} == {
        "main": True,
        "side": False,
    }
    assert not client.file_exists(filename="a.txt") and client.file_exists(filename="a.txt", revision="side")
    client.delete_repo()
    with pytest.raises(RepositoryNotFoundError):
        client.repo_info()
    client.delete_repo(missing_ok=True)


def test_uploads_become_commits(hub):
    "Three adds and a delete in one commit; every commit stays as it was"
    client, repo = Client(hub), hub.repo("user/rows")
    first = client.upload("old.txt", b"old")
    part = parquet(id=[1, 2])
    done = client.commit(
        add("data/a.parquet", part),
        add("b/c/d.txt", b"d"),
        add("manifest.json", b"{}"),
        CommitOperationDelete("old.txt"),
    )
    assert done.oid == repo.head and [c.title for c in repo.commits] == [
        "initial commit",
        first.commit_message,
        "more",
    ]
    assert repo.files() == {"README.md": CARD, "data/a.parquet": part, "b/c/d.txt": b"d", "manifest.json": b"{}"}
    assert repo.files(first.oid) == {"README.md": CARD, "old.txt": b"old"}
    gone = client.commit(CommitOperationDelete("b/"), CommitOperationDelete("manifest.json"))
    assert sorted(repo.files(gone.oid)) == ["README.md", "data/a.parquet"]
    with pytest.raises(EntryNotFoundError, match="differentiate file and folder"):
        client.commit(CommitOperationDelete("data"))
    assert [c.commit_id for c in client.list_repo_commits()] == [c.oid for c in reversed(repo.commits)]
    assert hub.seen["put"] == 1  # the one Parquet file; texts travel in the commit
    with pytest.raises(ValueError, match="Invalid metadata"):
        client.upload("README.md", b"---\na: [\n---\n")


def test_bytes_go_up_once(hub):
    "Uploaded before the commit; the same bytes again make no commit"
    client, repo = Client(hub), hub.repo("user/rows")
    adds = [add(f"data/{n}.parquet", parquet(id=[n])) for n in range(3)]
    client.preupload_lfs_files(additions=adds)
    assert (hub.seen["put"], hub.seen["verify"], len(repo.commits)) == (3, 3, 1)
    client.commit(*adds)
    assert (hub.seen["put"], len(repo.commits)) == (3, 2)
    again = client.commit(*[add(f"data/{n}.parquet", parquet(id=[n])) for n in range(3)], add("README.md", CARD))
    assert (hub.seen["put"], len(repo.commits), again.oid) == (3, 2, repo.head)
    moved = client.commit(add("data/moved.parquet", parquet(id=[0])))
    assert (hub.seen["put"], moved.oid) == (3, repo.head)
    assert not hub.leaks


def test_a_stale_parent_is_refused(hub):
    client, repo = Client(hub), hub.repo("user/rows")
    base = repo.head
    client.commit(add("a.txt", b"a"), parent_commit=base)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since. Please refresh and try again.") as failed:
        client.commit(add("b.txt", b"b"), parent_commit=base)
    assert failed.value.response.status_code == 412 and sorted(repo.files()) == ["README.md", "a.txt"]
    client.commit(add("b.txt", b"b"), parent_commit=repo.head)
    assert len(repo.commits) == 3


def test_writers_at_once_lose_nothing(hub):
    "Each rebases when it is refused: all their commits are in one chain"

    def write(name: str):
        client = Client(hub)
        for n in range(4):
            while True:
                try:
                    client.commit(add(f"{name}/{n}.txt", b"x"), parent_commit=client.repo_info().sha)
                    break
                except HfHubHTTPError as failed:
                    assert failed.response.status_code == 412

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    repo = hub.repo("user/rows")
    assert sorted(repo.files()) == ["README.md", *(f"{name}/{n}.txt" for name in "abc" for n in range(4))]
    assert [c.parent for c in repo.commits[1:]] == [c.oid for c in repo.commits[:-1]] and len(repo.commits) == 13


def test_a_commit_needs_its_bytes(hub):
    "A large file that was never uploaded is refused; half an upload is none"
    client, repo, data = Client(hub), hub.repo("user/rows"), parquet(id=[1])
    hollow = add("data/a.parquet", data)
    hollow._upload_mode, hollow._is_uploaded = "lfs", True
    with pytest.raises(HfHubHTTPError, match="pointed to a file that does not exist"):
        client.commit(hollow)
    path = f"/large/dataset/user/rows/{hollow.upload_info.sha256.hex()}"
    with socket.create_connection(("127.0.0.1", int(hub.storage.rsplit(":", 1)[1]))) as cut:
        cut.sendall(f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data) + 9}\r\n\r\n".encode() + data)
    assert WEB.put(hub.storage + path, content=b"other bytes").status_code == 400
    assert not repo.large and len(repo.commits) == 1


def test_names_of_all_kinds(hub):
    client, repo = Client(hub), hub.repo("user/rows")
    names = ["a b.txt", "目 ü/b.txt", "目 ü/é %41?#&.txt", "日本.parquet"]
    client.commit(*(add(name, name.encode()) for name in names))
    hub.page = 1
    assert {e.path for e in client.list_repo_tree(path_in_repo="目 ü", recursive=True)} == set(names[1:3])
    assert {f.path for f in client.get_paths_info(paths=names)} == set(names) < set(repo.files())
    for name in names:
        assert Path(client.hf_hub_download(filename=name)).read_bytes() == name.encode()
    with pytest.raises(EntryNotFoundError):
        client.commit(CommitOperationDelete("無.txt"))


# ---- reading ------------------------------------------------------------------------------------------------------


def test_every_commit_can_be_read(hub, tmp_path):
    client, repo = Client(hub), hub.repo("user/rows")
    versions = [parquet(id=list(range(n))) for n in range(1, 4)]
    oids = [client.upload("data/a.parquet", v).oid for v in versions]
    for oid, data in zip([*oids, "main"], [*versions, versions[-1]]):
        file = client.hf_hub_download(filename="data/a.parquet", revision=oid)
        assert Path(file).read_bytes() == data
        folder = Path(client.snapshot_download(revision=oid))
        assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.*")} == repo.files(oid)
        (info,) = client.get_paths_info(paths=["data/a.parquet", "nothing"], revision=oid)
        assert (info.size, info.lfs.size, info.lfs.sha256) == (
            len(data),
            len(data),
            repo.at(oid).tree[info.path].sha256,
        )
    for error, options in (
        (EntryNotFoundError, {"filename": "nothing"}),
        (RevisionNotFoundError, {"filename": "README.md", "revision": "f" * 40}),
    ):
        with pytest.raises(error):
            client.hf_hub_download(**options)
    with pytest.raises(RepositoryNotFoundError):
        Client(hub, "user/none").hf_hub_download(filename="README.md")
    assert not hub.leaks


def test_a_tree_in_pages(hub):
    hub.page = 4
    hub.add("user/rows", {"a.txt": b"a", **{f"data/{n:02}.txt": b"%d" % n for n in range(9)}, "data/deep/x.txt": b"x"})
    client = Client(hub)
    paths = [e.path for e in client.list_repo_tree(recursive=True)]
    assert paths == ["a.txt", "data", *(f"data/{n:02}.txt" for n in range(9)), "data/deep", "data/deep/x.txt"]
    assert hub.seen["tree"] == 4
    assert [e.path for e in client.list_repo_tree()] == ["a.txt", "data"]
    assert [e.path for e in client.list_repo_tree(path_in_repo="data/deep")] == ["data/deep/x.txt"]
    client.upload("data/03.txt", b"changed")
    last = {e.path: e.last_commit.oid for e in client.list_repo_tree(recursive=True, expand=True)}
    assert {p for p, oid in last.items() if oid == hub.repo("user/rows").head} == {"data", "data/03.txt"}
    with pytest.raises(EntryNotFoundError):
        list(client.list_repo_tree(path_in_repo="none"))


def test_ranges(hub):
    data = bytes(range(256))
    hub.add("user/rows", {"small.json": data[128:], "large.bin": data})

    def get(name: str, asked: str):
        auth = {"Authorization": f"Bearer {TOKEN}", "Range": asked}
        return WEB.get(f"{hub.address}/datasets/user/rows/resolve/main/{name}", headers=auth)

    for asked, part in (("0-9", data[:10]), ("250-", data[250:]), ("-6", data[-6:]), ("7-7", data[7:8])):
        got = get("large.bin", f"bytes={asked}")
        assert (got.status_code, got.content) == (206, part)
    assert get("large.bin", "bytes=7-7").headers["Content-Range"] == "bytes 7-7/256"
    assert get("large.bin", "bytes=256-").status_code == 416
    assert not hub.leaks  # the client keeps the token from the storage that it is sent on to


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_data_sets_at_every_commit(hub):
    "What `datasets` and `pandas` see, streamed or not, as soon as a commit is there"
    client = Client(hub)
    for n in range(2):
        extra = {"manifest.json": b'{"parts": [%d]}' % n, "_job/plan.parquet": parquet(shard=[n])}
        part = add(f"data/part-{n}.parquet", parquet(id=[2 * n, 2 * n + 1]))
        client.commit(part, *(add(path, data) for path, data in extra.items()))
        rows = datasets.load_dataset("user/rows", split="train")
        assert rows["id"] == list(range(2 * n + 2))
        assert [r["id"] for r in datasets.load_dataset("user/rows", split="train", streaming=True)] == list(rows["id"])
    before = hub.repo("user/rows").commits[1].oid
    assert len(datasets.load_dataset("user/rows", split="train", revision=before)) == 2
    assert list(pd.read_parquet("hf://datasets/user/rows/data/part-1.parquet")["id"]) == [2, 3]
    datasets.Dataset.from_dict({"x": [1, 2, 3]}).push_to_hub("user/pushed", private=True)
    assert datasets.load_dataset("user/pushed", split="train")["x"] == [1, 2, 3]
    assert hub.repo("user/pushed").private and len(hub.repo("user/pushed").commits) == 2
    assert not hub.leaks


def test_what_the_card_is_for(hub):
    """Without `data_files` in a card every Parquet file is data, the plan too, and the data set cannot be read

    A folder that begins with a dot or two underscores is passed over, card or not; so is a manifest."""
    data = {
        "manifest.json": b'{"parts": ["a"]}',
        "data/0.parquet": parquet(id=[0, 1]),
        "data/1.parquet": parquet(id=[2]),
    }
    plan = parquet(shard=[0], rows=[3])
    hub.add("user/card", data | {"_job/plan.parquet": plan, "README.md": CARD})
    hub.add("user/bare", data | {"_job/plan.parquet": plan})
    hub.add("user/dotted", data | {".job/plan.parquet": plan})
    hub.add("user/special", data | {"__job/plan.parquet": plan})
    for name in ("card", "dotted", "special"):
        assert datasets.load_dataset(f"user/{name}", split="train")["id"] == [0, 1, 2]
        assert len(list(datasets.load_dataset(f"user/{name}", split="train", streaming=True))) == 3
        assert len(pd.read_parquet(f"hf://datasets/user/{name}/data/0.parquet")) == 2
    with pytest.raises(datasets.exceptions.DatasetGenerationError):
        datasets.load_dataset("user/bare")
    with pytest.raises(datasets.table.CastError):
        list(datasets.load_dataset("user/bare", split="train", streaming=True))


# ---- who may --------------------------------------------------------------------------------------------------------


def status(call) -> int:
    with pytest.raises(HfHubHTTPError) as failed:
        call()
    return failed.value.response.status_code


def test_who_may(hub):
    hub.add("user/secret", {"a.txt": b"a"}, private=True)
    hub.add("other/rows", {"a.txt": b"a"})
    hub.add("other/secret", {"a.txt": b"a"}, private=True)
    wrong, none = Client(hub, token="hf_wrong"), Client(hub, token=False)
    assert status(lambda: wrong.upload("a.txt", b"a")) == 401
    assert status(lambda: none.upload("a.txt", b"a")) == 401
    assert status(lambda: none.create_repo()) == 401
    assert status(lambda: wrong.api.whoami()) == 401
    assert none.repo_info().sha and status(lambda: Client(hub, "user/secret", False).repo_info()) == 401
    assert Client(hub, "user/secret").repo_info().private
    assert status(lambda: Client(hub, "other/rows").upload("a.txt", b"b")) == 403
    assert status(lambda: Client(hub, "other/new").create_repo()) == 403
    assert Client(hub, "other/rows").create_repo(exist_ok=True).repo_id == "other/rows"
    with pytest.raises(RepositoryNotFoundError):
        Client(hub, "other/secret").repo_info()
    hub.may_write = False
    assert status(lambda: Client(hub).upload("a.txt", b"a")) == 403
    assert not hub.leaks


def test_a_token_astray_is_noted(hub):
    client, auth = Client(hub), {"Authorization": f"Bearer {TOKEN}"}
    client.upload("log.txt", b"used " + TOKEN.encode())
    client.upload("a.parquet", TOKEN.encode())
    client.commit(add("b.txt", b"b"), commit_description=TOKEN)
    WEB.get(f"{hub.address}/api/datasets/user/rows?token={TOKEN}")
    WEB.get(f"{hub.storage}/large/dataset/user/rows/0", headers=auth)
    places = [leak.split(": ", 1)[1] for leak in hub.leaks]
    assert places == ["in log.txt", "in the body", "in the body", "in the address", "a token sent to the storage"]


# ---- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [*BEFORE, *AFTER])
@pytest.mark.parametrize("kind", ["preupload", "put", "verify"])
def test_the_client_itself_tries_again(hub, waits, kind, fault):
    "Before the commit every fault is made good inside the client"
    hub.faults = Faults(seconds=3, slow=0.1)
    client, start = Client(hub), time.monotonic()
    hub.fail(kind, fault)
    client.upload("a.parquet", b"PAR1")
    assert fault != "slow" or time.monotonic() - start >= 0.1
    assert hub.given == {(kind, fault): 1} and len(hub.repo("user/rows").commits) == 2
    assert waits == {"429": [4.0], "ratelimit": [4.0], "slow": []}.get(fault, [1])


@pytest.mark.parametrize("fault", [*BEFORE, *OTHERS, *AFTER])
def test_the_commit_is_the_callers(hub, waits, fault):
    "The client sends a commit once; whether it landed shows only in the repository, and again makes no second one"
    hub.faults = Faults(seconds=3, slow=0.1)
    client, repo = Client(hub), hub.repo("user/rows")
    hub.fail("commit", fault)
    if fault == "slow":
        client.upload("a.txt", b"a")
    else:
        with pytest.raises((HfHubHTTPError, httpx2.TransportError)) as failed:
            client.upload("a.txt", b"a")
        code = {"429": 429, "ratelimit": 429, "429-bare": 429, "late-504": 504, "late-500": 500}
        code |= {"closed": None, "lost": None}
        reply = getattr(failed.value, "response", None)
        assert (reply.status_code if reply is not None else None) == code.get(fault, fault.isdigit() and int(fault))
        if fault == "ratelimit":
            assert parse_ratelimit_headers(reply.headers).reset_in_seconds == 3
        assert reply is None or reply.headers.get("Retry-After") == ("3" if fault == "429" else None)
    assert len(repo.commits) == (2 if fault in AFTER else 1) and waits == []
    client.upload("a.txt", b"a")
    assert len(repo.commits) == 2 and repo.files()["a.txt"] == b"a"


# kind of request → how often the client tries, what it raises in the end
TRIES = {
    "whoami": (1, HfHubHTTPError),
    "create": (1, HfHubHTTPError),
    "info": (1, HfHubHTTPError),
    "paths": (1, HfHubHTTPError),
    "tree": (6, HfHubHTTPError),
    "yaml": (1, json.JSONDecodeError),  # every reply to this is taken for JSON
    "preupload": (6, HfHubHTTPError),
    "batch": (6, HfHubHTTPError),
    "put": (6, RuntimeError),  # with the HfHubHTTPError as its cause
    "verify": (6, RuntimeError),
    "commit": (1, HfHubHTTPError),
    "resolve": (7, LocalEntryNotFoundError),
    "blob": (1, HfHubHTTPError),
}


@pytest.mark.parametrize("kind", [*TRIES])
def test_a_request_that_always_fails(hub, waits, kind):
    client = Client(hub)
    client.upload("a.parquet", b"PAR1")
    calls = {
        "whoami": lambda: client.api.whoami(),
        "create": lambda: client.create_repo(exist_ok=True),
        "info": lambda: client.repo_info(),
        "paths": lambda: client.get_paths_info(paths=["a.parquet"]),
        "tree": lambda: list(client.list_repo_tree()),
        "yaml": lambda: client.upload("README.md", CARD + b"\n"),
        "resolve": lambda: client.hf_hub_download(filename="a.parquet"),
        "blob": lambda: client.hf_hub_download(filename="a.parquet"),
    }
    hub.fail(kind, *["503"] * 8)
    tries, error = TRIES[kind]
    with pytest.raises(error) as failed:
        calls.get(kind, lambda: client.upload("b.parquet", b"PAR1b"))()
    assert hub.given == {(kind, "503"): tries} and type(failed.value) is error
    assert waits[:5] == ([1, 2, 4, 8, 8] if tries > 1 else [])
    assert error is not RuntimeError or isinstance(failed.value.__cause__, HfHubHTTPError)


def test_fates_are_drawn_once():
    "The n-th request of a kind always fares the same, whatever else is asked; the shares are kept"
    rates = {"commit": {"lost": 0.1, "503": 0.2}, "*": {"slow": 0.5}}
    a, b = (Faults(rates=rates, script={"commit": {"3": "429"}}, seed=seed) for seed in (0, 1))
    fates = [a.fate("commit", n) for n in range(1, 4001)]
    assert fates == [Faults(rates=rates, script={"commit": {3: "429"}}).fate("commit", n) for n in range(1, 4001)]
    assert fates != [b.fate("commit", n) for n in range(1, 4001)] and fates[2] == "429"
    shares = Counter(fates)
    assert (
        abs(shares["lost"] - 400) < 80
        and abs(shares["503"] - 800) < 100
        and set(shares) == {None, "lost", "503", "429"}
    )
    assert {a.fate("put", n) for n in range(1, 50)} == {None, "slow"}


def test_many_faults_and_every_byte(hub, waits):
    "A third of all requests go wrong, the third commit by script: with a caller that tries again all parts arrive"
    ill = {"503": 0.08, "429": 0.05, "closed": 0.08, "lost": 0.08, "late-504": 0.04}
    hub.faults = Faults(rates={"*": ill}, script={"commit": {3: "lost"}}, seed=3)
    client, repo, failed = Client(hub), hub.repo("user/rows"), 0
    parts = {f"data/{n}.parquet": parquet(id=[n]) for n in range(12)}
    for path, data in parts.items():
        while True:
            try:
                client.upload(path, data)
                break
            except (HfHubHTTPError, httpx2.TransportError):
                failed += 1
    assert repo.files() == {"README.md": CARD, **parts} and len(repo.commits) == 13
    assert ("commit", "lost") in hub.given and failed > 0 and sum(hub.given.values()) > 15
    assert not hub.leaks


def test_so_many_commits_an_hour(at_hub):
    "Counted by the test's own clock; the wait that is asked for is long enough and not longer"
    now = [1e9]
    with serve(commits_per_hour=3, clock=lambda: now[0]) as hub:
        at_hub(hub)
        hub.add("user/rows", {})
        client, repo = Client(hub), hub.repo("user/rows")
        for n in range(3):
            client.upload(f"{n}.txt", b"x")
            now[0] += 60
        for wait in (3600 - 180, 1):
            with pytest.raises(HfHubHTTPError, match="rate limit for repository commits") as failed:
                client.upload("3.txt", b"x")
            headers = failed.value.response.headers
            assert headers["Retry-After"] == str(wait) and parse_ratelimit_headers(headers).remaining > 0
            now[0] += wait - 1
        now[0] += 1
        client.upload("3.txt", b"x")
        assert [c.time - 1e9 for c in repo.commits] == [0, 0, 60, 120, 3600]


def test_down_and_up(hub):
    client = Client(hub)
    sha = client.repo_info().sha
    for _ in range(2):
        hub.down()
        with pytest.raises(httpx2.ConnectError):
            client.repo_info()
        hub.up()
        hub.up()
        assert client.repo_info().sha == sha
    assert hub.seen["info"] == 3


def test_a_port_belongs_to_one(hub):
    with pytest.raises(OSError):
        with serve(port=int(hub.address.rsplit(":", 1)[1])):
            pass


def test_what_breaks_here_is_raised_here():
    with pytest.raises(KeyError):
        with serve() as hub:
            hub.add("user/rows", {})
            url = f"{hub.address}/api/datasets/user/rows/preupload/main"
            assert WEB.post(url, json={}).status_code == 500


# ---- a process of its own -------------------------------------------------------------------------------------------


def test_a_hub_beside_this_process(at_hub, tmp_path):
    "Faults and switches by lines of JSON; the client is another process with nothing but its environment"
    faults = {"script": {"commit": {"1": "late-504"}}}
    how = [sys.executable, str(HUB), "--token", TOKEN, "--faults", json.dumps(faults)]
    with subprocess.Popen(how, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        address = json.loads(process.stdout.readline())["address"]

        def order(do: str, **more) -> dict:
            process.stdin.write(json.dumps({"do": do} | more) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        code = (
            "from huggingface_hub import HfApi; api = HfApi(); api.create_repo('user/x', exist_ok=True);"
            "print(api.upload_file(path_or_fileobj=b'a', path_in_repo='a.txt', repo_id='user/x').oid)"
        )
        env = environment(address, tmp_path, HF_TOKEN=TOKEN)

        def client():
            return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

        failed = client()
        assert failed.returncode and "504" in failed.stderr
        state = order("state")
        head = state["repos"]["models/user/x"]["head"]
        assert state["given"] == {"commit late-504": 1} and state["repos"]["models/user/x"]["files"][-1] == "a.txt"
        assert client().stdout.strip() == head
        order("down")
        with pytest.raises(httpx2.ConnectError):
            WEB.get(address)
        order("up")
        order("fail", kind="other", faults=["503"])
        order("faults", faults={"rates": {"other": {"500": 1.0}}})
        assert [WEB.get(address).status_code for _ in range(2)] == [503, 500]
        assert order("state")["leaks"] == []
        process.stdin.close()
        assert process.wait(10) == 0


def test_xet_takes_another_way(tmp_path):
    "With Xet, bytes go neither to `batch` nor to `put`; the token for the storage is not the Hub's"
    pytest.importorskip("hf_xet")
    data = os.urandom(5000)
    (tmp_path / "a.parquet").write_bytes(data)
    code = (
        "import sys; from huggingface_hub import HfApi; HfApi().upload_file(path_or_fileobj=sys.argv[1],"
        "path_in_repo='a.parquet', repo_id='user/rows', repo_type='dataset')"
    )
    with serve(token=TOKEN, xet=True) as hub:
        hub.add("user/rows", {})
        env = environment(hub.address, tmp_path / "home", HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="0")
        how = [sys.executable, "-c", code, str(tmp_path / "a.parquet")]
        done = subprocess.run(how, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (hub.seen["batch"], hub.seen["put"], hub.seen["xet"], hub.seen["commit"]) == (0, 0, 1, 1)
        (xorb,) = hub.xorbs.values()
        assert data in xorb and not hub.leaks
        assert hub.repo("user/rows").files() == {"a.parquet": None}


def test_a_hub_by_hand():
    "Without a server: the state alone"
    hub = Hub()
    repo = hub.add("user/rows", {"a.txt": b"a"})
    assert repo.at() is repo.at(repo.head[:7]) and repo.at("abc") is None and hub.state()["leaks"] == []
    assert repo.at().tree["a.txt"].oid == "2e65efe2a145dda7ee51d1741299f848e5bf752e"  # git hash-object
    with pytest.raises(AssertionError):
        hub.fail("commit", "nonsense")
