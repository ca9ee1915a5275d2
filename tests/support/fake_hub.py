"""A Hugging Face Hub on 127.0.0.1, of the endpoints that huggingface_hub calls to make a repository, commit to it and
download it.

Large files go the basic LFS way: preupload tells which are large, the batch endpoint which are still to be sent.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

LARGE = (".safetensors", ".gguf", ".pt", ".pth", ".bin")
SHA = "0" * 40


class FakeHub:
    """Repositories with their files as bytes, what was asked for, and what is to go wrong."""

    def __init__(self, token, namespaces):
        self.token, self.namespaces = token, namespaces
        self.repos = {}  # ORG/NAME -> {"private": bool, "files": {path: bytes}, "commits": int}
        self.large = {}  # sha256 -> bytes that arrived
        self.requests = []  # (method, path)
        self.refused = {}  # beginning of a path -> status
        self.drop_next_commit = False
        self.hold = None  # content whose PUT never ends
        self.holding = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def sent(self):
        """Addresses of the large files that were put, in order of arrival, held ones included."""
        return [path for method, path in self.requests if method == "PUT"]


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status, content=None, **headers):
        body = json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def accepted(self):
        """Whether the request may go on; it was answered otherwise."""
        path = self.path.split("?")[0]
        self.hub.requests.append((self.command, path))
        status = next((code for start, code in self.hub.refused.items() if path.startswith(start)), None)
        token = self.headers.get("Authorization")
        # The address of a large file is signed, and the token is not for it.
        if status is None and token != (None if self.command == "PUT" else f"Bearer {self.hub.token}"):
            status = 401
        if status:
            self.body()
            self.close_connection = True  # a body in chunks may be unread
            self.answer(status, {"error": f"refused with {status}"})
        return status is None

    def do_GET(self):
        if not self.accepted():
            return
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/\w+/(.+)", path):
            return self.download(match[1], match[2])
        if match := re.fullmatch(r"/api/models/(.+)/tree/\w+", path):
            files = self.hub.repos.get(match[1], {"files": {}})["files"]
            return self.answer(200, [
                {"type": "file", "path": file, "size": len(content), "oid": _oid(file, content)}
                for file, content in files.items()
            ])  # fmt: skip
        name = re.sub(r"/revision/\w+$", "", path.removeprefix("/api/models/"))
        if name not in self.hub.repos:
            return self.answer(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": file} for file in self.hub.repos[name]["files"]]
        self.answer(200, {"id": name, "private": self.hub.repos[name]["private"], "sha": SHA, "siblings": siblings})

    do_HEAD = do_GET

    def download(self, name, file):
        content = self.hub.repos[name]["files"].get(file)
        if content is None:
            return self.answer(404, {"error": "Entry not found"}, **{"X-Error-Code": "EntryNotFound"})
        self.send_response(200)
        for header, value in {
            "X-Repo-Commit": SHA, "ETag": f'"{_oid(file, content)}"', "Content-Length": len(content),
        }.items():  # fmt: skip
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_POST(self):
        if not self.accepted():
            return
        body, path = self.body(), self.path.split("?")[0]
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.validate(json.loads(body)["content"])
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            self.preupload(match[1], json.loads(body)["files"])
        elif re.fullmatch(r"/.+\.git/info/lfs/objects/batch", path):
            self.batch(json.loads(body)["objects"])
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.answer(404)

    def create(self, wanted):
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] not in self.hub.namespaces:
            return self.answer(404, {"error": "Namespace not found"})
        exists = name in self.hub.repos
        if not exists:
            self.hub.repos[name] = {"private": wanted["visibility"] == "private", "files": {}, "commits": 0}
        self.answer(409 if exists else 200, {"url": f"{self.hub.url}/{name}"})

    def validate(self, card):
        """As the Hub does: the front matter is YAML, and ids in it are ids."""
        front_matter = yaml.safe_load(card.split("---\n")[1])
        ids = [*front_matter.get("datasets", []), *filter(None, [front_matter.get("base_model")])]
        errors = [{"message": f'"{i}" is not a valid id'} for i in ids if not re.fullmatch(r"[\w.-]+/[\w.-]+", i)]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, name, files):
        there = self.hub.repos[name]["files"]
        self.answer(200, {"files": [
            {"path": f["path"], "shouldIgnore": False, "oid": _oid(f["path"], there.get(f["path"])),
             "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular"}
            for f in files
        ]})  # fmt: skip

    def batch(self, objects):
        self.answer(200, {"transfer": "basic", "objects": [
            o if o["oid"] in self.hub.large else
            o | {"actions": {"upload": {"href": f"{self.hub.url}/large/{o['oid']}?signature=SIGNED"}}}
            for o in objects
        ]})  # fmt: skip

    def do_PUT(self):
        if not self.accepted():
            return
        oid = self.path.split("?")[0].removeprefix("/large/")
        if self.hub.hold == oid:
            self.rfile.read(1)
            self.hub.holding.set()
            threading.Event().wait(60)  # the client is gone before
            return
        content = self.body() if self.headers.get("Content-Length") else self.chunks()
        if hashlib.sha256(content).hexdigest() != oid:
            return self.answer(400, {"error": "not the announced bytes"})
        self.hub.large[oid] = content
        self.answer(200)

    def chunks(self):
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def commit(self, name, lines):
        if self.hub.drop_next_commit:
            self.hub.drop_next_commit = False
            self.close_connection = True
            return self.connection.close()
        repo = self.hub.repos[name]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFolder":
                kept = {path: c for path, c in repo["files"].items() if not path.startswith(value["path"])}
                repo["files"] = kept
                continue
            content = self.hub.large[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
            repo["files"][value["path"]] = content
        repo["commits"] += 1
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/1", "commitOid": "1" * 40})


def _oid(path, content):
    """As the Hub gives it for a file that is there: SHA-256 of a large one, git's hash of another."""
    if content is None:
        return None
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
