"""A GGUF asked through llama.cpp's server on this machine: its own program, or the one inside the package xllamacpp.

Both have the same HTTP API, of which this is the part that a chat needs. No torch.
"""

import importlib.util
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from apo_lora.errors import ModelError
from apo_lora.export.gguf import REPORT, find_program

SERVER = "llama-server"
START_SECONDS = 600  # a large model from a slow disk
_HERE = {"timeout": START_SECONDS, "trust_env": False}  # a proxy knows nothing of this machine


@dataclass(frozen=True)
class Gguf:
    text: Path
    mmproj: Path


def find_gguf(folder: Path) -> Gguf:
    """The two files of an export, by its report, or of any folder that holds just two. Raises ModelError."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; create it with `apo-lora export ... --to gguf`")
    if (folder / REPORT).is_file():
        files = json.loads((folder / REPORT).read_text(encoding="utf-8")).get("files", [])
        named = [folder / file["file"] for file in files]
        if len(named) == 2 and all(path.is_file() for path in named):
            return Gguf(*named)
    found = sorted(folder.glob("*.gguf"))
    mmproj = [path for path in found if "mmproj" in path.name.lower()]
    text = [path for path in found if path not in mmproj]
    if len(text) != 1 or len(mmproj) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ModelError(f"{folder}: must contain one model and one mmproj .gguf file; found {names}")
    return Gguf(text[0], mmproj[0])


def find_server(llama_cpp: str | None) -> Path | None:
    """llama-server in `llama_cpp` or on the PATH; None means the package xllamacpp. Raises ModelError for neither."""
    if program := find_program(SERVER, llama_cpp):
        return program
    if llama_cpp is None and importlib.util.find_spec("xllamacpp"):
        return None
    raise ModelError(
        f"--gguf: no {SERVER} {f'in {llama_cpp}' if llama_cpp else 'on the PATH, and no package xllamacpp'}; install "
        "llama.cpp and give its folder with --llama-cpp DIR, or pip install xllamacpp"
    )


@contextmanager
def serving(gguf: Gguf, program: Path | None, *, context: int, image_tokens: dict[str, int]) -> Iterator[str]:
    """Inside, a server of these two files listens at the address given, only on this machine.

    `context`: tokens of prompt and answer; `image_tokens`: see image_limits.image_token_limits. Raises ModelError.
    """
    serve = _served_by_package(gguf, context, image_tokens) if program is None else None
    if serve is not None:
        yield serve.listening_address
        return
    with socket.socket() as free, tempfile.TemporaryFile() as log:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        options = {"-m": gguf.text, "--mmproj": gguf.mmproj, "-c": context, "-np": 1, **image_tokens}
        command = [program, "--host", "127.0.0.1", "--port", port, *(part for pair in options.items() for part in pair)]
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for(url, process, log, gguf)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _served_by_package(gguf: Gguf, context: int, image_tokens: dict[str, int]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = str(gguf.text), str(gguf.mmproj)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, -1
    params.image_min_tokens = image_tokens.get("--image-min-tokens", -1)
    params.image_max_tokens = image_tokens.get("--image-max-tokens", -1)
    try:
        return xllamacpp.Server(params)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{gguf.text}: llama.cpp cannot load it ({str(error).strip().splitlines()[0]})") from error


def _wait_for(url: str, process: subprocess.Popen, log: Any, gguf: Gguf) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with suppress(httpx.HTTPError):  # not listening yet; 503 while it loads
            if httpx.get(f"{url}/health", **_HERE).is_success:
                return
        time.sleep(0.1)
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()] or lines
    raise ModelError(f"{gguf.text}: {SERVER} did not start ({errors[0] if errors else 'no output'})")


class StreamedAnswer:
    """One streamed answer: iterate for its text, piece by piece; then its lengths are known."""

    length = 0
    """Tokens, the end token included."""
    prompt_length = 0
    """Tokens, those of images included."""
    truncated = False

    def __init__(self, url: str, messages: list[dict[str, Any]], **options: Any):
        self._url = url
        self._request = {
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "reasoning_format": "none",  # else what stands between <think> tags does not come as text
            **options,
        }

    def __iter__(self) -> Iterator[str]:
        try:
            with httpx.stream("POST", f"{self._url}/v1/chat/completions", json=self._request, **_HERE) as response:
                if response.is_error:
                    response.read()
                    raise ModelError(f"llama.cpp did not answer: {_reason(response)}")
                for line in response.iter_lines():
                    data = line.removeprefix("data:").strip()
                    if data and data != "[DONE]":
                        yield from self._read(json.loads(data))
        except (httpx.HTTPError, ValueError) as error:
            raise ModelError(
                f"llama.cpp: the connection was lost ({type(error).__name__}: {error}); ask again"
            ) from error

    def _read(self, event: dict[str, Any]) -> Iterator[str]:
        if "error" in event:
            raise ModelError(f"llama.cpp did not answer: {event['error'].get('message', event['error'])}")
        if usage := event.get("usage"):
            self.length, self.prompt_length = usage["completion_tokens"], usage["prompt_tokens"]
        for choice in event["choices"]:
            self.truncated = choice["finish_reason"] == "length" or self.truncated
            if text := choice["delta"].get("content"):
                yield text


def tokens_of(url: str, text: str) -> list[int]:
    """Ids under the served model's vocabulary, special tokens included."""
    body = {"content": text, "parse_special": True}
    return httpx.post(f"{url}/tokenize", json=body, **_HERE).raise_for_status().json()["tokens"]


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"
