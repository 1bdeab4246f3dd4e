"""A Hub of our own on this machine: answers of its API that a download needs, and faults on demand."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMITS = {"main": "1" * 40, "v1": "2" * 40}


class HubStandIn(ThreadingHTTPServer):
    """Serves repositories {"owner/name": {file: bytes}}, models or data sets, at both revisions until closed.

    Attributes:
        requests: (method, path, Range header or None) of every request.
        breaks: file -> for each GET in turn, after how many bytes the connection is cut (None: never); the
            last one stays.
        stalls: files whose answers stop half-way and never end.
        gated: repositories whose terms nobody has accepted.
        sizes: file -> the size that is listed instead of its own.
        down: files that are answered by an error of the server.
    """

    daemon_threads = True

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories, self.requests, self.breaks, self.sizes = repositories, [], {}, {}
        self.stalls, self.gated, self.down = set(), set(), set()
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self):
        """Files that were asked for by GET."""
        return [
            path.rsplit("/", 1)[1]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path
        ]

    def close(self):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that was killed is no news."""


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path, hub = self.path.split("?")[0], self.server
        if hub.closing.is_set():  # connections that were kept alive end too
            self.close_connection = True
            return None
        hub.requests.append((self.command, path, self.headers.get("Range")))
        api = re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(?:revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        if not match or match[1] not in hub.repositories:
            return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if match[1] in hub.gated:
            return self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        revision = match[2] or "main"
        commit = COMMITS.get(revision, revision if revision in COMMITS.values() else None)
        if commit is None:
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        files = hub.repositories[match[1]]
        if api:
            sizes = {name: len(data) for name, data in files.items()} | hub.sizes
            siblings = [
                {"rfilename": name, "size": sizes[name], "blobId": digest(data)}
                for name, data in files.items()
            ]
            tree = [
                {"type": "file", "path": name, "size": sizes[name], "oid": digest(data)}
                for name, data in files.items()
            ]
            info = {"id": match[1], "modelId": match[1], "sha": commit, "private": False, "tags": []}
            answer = tree if "/tree/" in path else info | {"siblings": siblings}
            return self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body)
        if file[3] in hub.down:
            return self.reply(500, b"{}", {}, body)
        if file[3] not in files:
            return self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, body)
        return self.send_file(
            file[3], files[file[3]], {"X-Repo-Commit": commit, "ETag": f'"{digest(files[file[3]])}"'}, body
        )

    def send_file(self, name, data, headers, body):
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        first = int(start[1]) if start else 0
        if start:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        part, cut = data[first:], None
        if body and name in self.server.breaks:
            left = self.server.breaks[name]
            cut = left.pop(0) if len(left) > 1 else left[0]
        self.send_response(206 if start else 200)
        for key, value in {**headers, "Accept-Ranges": "bytes", "Content-Length": str(len(part))}.items():
            self.send_header(key, value)
        self.end_headers()
        if not body:
            return
        if name in self.server.stalls:
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.server.closing.wait()
        self.wfile.write(part if cut is None else part[:cut])
        self.wfile.flush()
        if cut is not None:
            self.close_connection = True

    def reply(self, status, data, headers, body):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        """Silent."""


def digest(data):
    return hashlib.sha1(data).hexdigest()
