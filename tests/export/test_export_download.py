"""The base of an export comes from a Hub on this machine: room is asked for first, then it is fetched."""

import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import forks
import pytest

from apo_lora.run.adapter import CONFIG
from apo_lora.tiny import BASE_DIR

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub():
    """Serves the tiny base as me/base. `hub.size` is what it claims each weight file to have."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            server.asked.append((self.command, self.path))
            files = [path for path in BASE_DIR.iterdir() if path.is_file()]
            if "/tree/" in self.path:
                tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": COMMIT} for f in files]
                body = json.dumps(tree).encode()
                self.send_response(200)
            elif self.path.startswith("/api/models/me/base"):
                siblings = [{"rfilename": path.name} for path in files]
                body = json.dumps({"id": "me/base", "sha": COMMIT, "siblings": siblings}).encode()
                self.send_response(200)
            else:
                path = BASE_DIR / self.path.rpartition("/")[2]
                body = path.read_bytes()
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                if server.size and path.suffix == ".safetensors":
                    self.send_header("X-Linked-Size", str(server.size))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.size = [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def adapter(load_tiny, stir_adapter, tmp_path):
    policy = load_tiny()
    stir_adapter(policy.model, scale=0.05)
    policy.model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    config["base_model_name_or_path"] = "me/base-unsloth-bnb-4bit"
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config))
    return tmp_path / "adapter"


def export(adapter, hub):
    """In a fork: huggingface_hub reads its environment once."""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(adapter.parent / "home"), "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    options = ["--to", "merged", "--onto", "original"]
    return forks.run(["-m", "apo_lora.commands.main", "export", adapter, *options], env=environment, timeout=300)


def fetched(hub):
    return [path for method, path in hub.asked if method == "GET" and "/resolve/" in path]


def test_the_16_bit_base_is_fetched_and_merged_into(adapter, hub):
    finished = export(adapter, hub)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "(download 0.00, merged 0.00, spare 0.27)" in finished.stdout
    assert any(path.endswith("model.safetensors") for path in fetched(hub))
    assert (adapter.parent / "merged" / "model.safetensors").is_file()
    hub.asked.clear()
    (adapter.parent / "merged").rename(adapter.parent / "first")
    again = export(adapter, hub)
    assert again.returncode == 0 and "download" not in again.stdout and not fetched(hub)  # it is in the cache


def test_a_base_that_does_not_fit_is_not_fetched(adapter, hub):
    hub.size = 10**15
    finished = export(adapter, hub)
    assert finished.returncode == 2
    assert "(download 1000000.00, merged 1000000.00, spare 0.27)" in finished.stderr and "GB free" in finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1
    assert not fetched(hub) and not (adapter.parent / "merged").exists()
