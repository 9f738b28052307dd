"""A Hub of one dataset on this machine: the few answers that listing and fetching ask for; it counts the bytes."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATASET = "someone/sources"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    served: Counter[str]

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith(f"/datasets/{DATASET}/resolve/"):
            self._file(path.removeprefix(f"/datasets/{DATASET}/resolve/").split("/", 1)[1])
        elif path.startswith(f"/api/datasets/{DATASET}/tree/"):
            folder = path.removeprefix(f"/api/datasets/{DATASET}/tree/").partition("/")[2]
            entries = [entry for entry in self._entries() if not folder or entry["path"].startswith(f"{folder}/")]
            self._json(entries if "recursive=true" in self.path.lower() else self._children(entries, folder))
        elif path in (f"/api/datasets/{DATASET}", *(f"/api/datasets/{DATASET}/revision/{r}" for r in ("main", COMMIT))):
            siblings = [{"rfilename": name} for name in self.files]
            self._json({"id": DATASET, "sha": COMMIT, "siblings": siblings, "private": False, "gated": False})
        else:
            self._missing("RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        try:
            asked = json.loads(body)["paths"]
        except ValueError:
            asked = parse_qs(body)["paths"]
        asked = [asked] if isinstance(asked, str) else asked
        self._json([entry for entry in self._entries() if entry["path"] in asked])

    def _entries(self) -> list[dict[str, Any]]:
        folders = {name.rsplit("/", 1)[0] for name in self.files if "/" in name}
        return [{"type": "directory", "path": folder, "oid": "0", "size": 0} for folder in sorted(folders)] + [
            {"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
            for name, data in sorted(self.files.items())
        ]

    def _children(self, entries: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
        depth = folder.count("/") + 1 if folder else 0
        return [entry for entry in entries if str(entry["path"]).count("/") == depth]

    def _file(self, name: str) -> None:
        if name not in self.files:
            return self._missing("EntryNotFound")
        data, status = self.files[name], 200
        whole = len(data)
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if (asked := self.headers.get("Range")) is not None:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else whole, whole)
            data, status = data[start:stop], 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{whole}"
        self._answer(status, data, headers)
        if self.command == "GET":
            self.served[name] += len(data)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._answer(404, b"{}", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

    def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_arguments: object) -> None:
        """Nothing on the terminal."""


@contextmanager
def hub_of(files: dict[str, bytes]) -> Iterator[tuple[str, Counter[str]]]:
    """Serve ``files`` as the dataset; its address, and how many bytes of each file were asked for."""
    served: Counter[str] = Counter()
    handler = type("Handler", (_Handler,), {"files": files, "served": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", served
    finally:
        server.shutdown()
        server.server_close()
