"""A Hub of one machine: serves folders as model repositories, as much of it as `huggingface_hub` asks for."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "beef"


def _handler(repos: dict[str, Path], log: list[str]):
    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def reply(self, code, body=b"", **headers):
            self.send_response(code)
            for key, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            log.append(f"{self.command} {path}")
            for name, folder in repos.items():
                files = sorted(p for p in folder.iterdir() if p.is_file())
                if path in (
                    f"/api/models/{name}",
                    f"/api/models/{name}/revision/main",
                    f"/api/models/{name}/revision/{COMMIT}",
                ):
                    siblings = [{"rfilename": p.name, "size": p.stat().st_size} for p in files]
                    info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False}
                    return self.reply(200, json.dumps(info | {"tags": [], "downloads": 0, "likes": 0}).encode())
                if path.startswith(f"/api/models/{name}/tree/{COMMIT}"):
                    tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name} for p in files]
                    return self.reply(200, json.dumps(tree).encode())
                if path.startswith(f"/api/models/{name}/"):
                    return self.reply(404, X_Error_Code="RevisionNotFound")
                for p in files:
                    if path == f"/{name}/resolve/{COMMIT}/{p.name}":
                        body = p.read_bytes()
                        etag = hashlib.sha256(body).hexdigest()
                        return self.reply(200, body, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
                if path.startswith(f"/{name}/"):
                    return self.reply(404, X_Error_Code="EntryNotFound")
            self.reply(404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

    return Hub


@contextmanager
def serve(repos: dict[str, Path]):
    "Address of a Hub with these repositories, and the list of what it was asked"
    log: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(repos, log))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()
