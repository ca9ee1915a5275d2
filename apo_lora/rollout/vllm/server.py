"""The vLLM servers of a run: one that is started here and ends with the run, or those whose URLs the recipe gives.

A server of our own listens on the loopback, and answers only to a key that it gets through its environment.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from apo_lora.data.examples import Example
from apo_lora.errors import ModelError
from apo_lora.machine import ranks
from apo_lora.machine.vllm_environment import build, interpreter, problem
from apo_lora.policy.loading import base_path
from apo_lora.recipe.combinations import LORA_RANKS, vllm_problems
from apo_lora.recipe.schema import Recipe
from apo_lora.rollout.vllm.client import Endpoint, ServerFault
from apo_lora.rollout.vllm.launcher import FOLDER, PARENT

LAUNCHER = Path(__file__).with_name("launcher.py")
KEY = "VLLM_API_KEY"
CPU_CACHE_GIB = "1"
MOST_SEQUENCES = 256
"""Completions that a server computes at once; more wait for their turn."""

# A launcher's, of the trainer's processes: a server is none of them.
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class Servers(ABC):
    """What samples for one process of the run."""

    endpoints: list[Endpoint]
    base_name = "base"
    """Under which they serve the base without an adapter."""
    adapters: Path
    """Folder that this process writes its adapter to, and that its servers read."""
    adapter: str | None = None
    """Name of the one that they have loaded."""

    def load(self, folder: Path, name: str) -> None:
        """The adapter in this folder under this name; the one before is unloaded. Raises ServerFault."""
        for endpoint in self.endpoints:
            endpoint.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
            if self.adapter is not None:
                endpoint.ask("/v1/unload_lora_adapter", {"lora_name": self.adapter})
        for path in self.adapters.iterdir():
            if path != folder:
                shutil.rmtree(path, ignore_errors=True)
        self.adapter = name

    @abstractmethod
    def restart(self) -> None:
        """After a fault, as far as that is in our hands. Raises ServerFault."""

    def last_words(self) -> list[str]:
        """What is known of the end of a server, a line each."""
        return []


class LocalServer(Servers):
    """A server on this machine, from vLLM's own environment."""

    GRACE = 1.0
    """Seconds in which a process whose connection was lost ends."""

    def __init__(self, options: list[str], *, gpu: str | None, port: int, seconds: float):
        """`options`: of vLLM's command line. `gpu`: the one it uses, as in CUDA_VISIBLE_DEVICES; None is the CPU."""
        self.options, self.gpu, self.port, self.seconds = options, gpu, port, seconds
        self.python = interpreter()
        self.folder = Path(tempfile.mkdtemp(prefix="apo-lora-vllm-"))
        self.adapters, self.log = self.folder / "adapters", self.folder / "vllm.log"
        self.process: subprocess.Popen | None = None
        self.faulty = False

    def start(self) -> None:
        """Returns as soon as it answers. Raises ServerFault."""
        port = self.port or _free_port()
        self.endpoints = [Endpoint(f"http://127.0.0.1:{port}", secrets.token_urlsafe(32), self.seconds)]
        command = [
            # -P: this folder's own modules must not stand before vLLM's
            str(self.python), "-P", str(LAUNCHER),
            "--host", "127.0.0.1", "--port", str(port), *self.options,
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=self._environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.faulty = True
            self.stop()
            raise

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in (*_OF_RANKS, "PYTHONPATH")}
        cache = {"VLLM_CPU_KVCACHE_SPACE": kept.get("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)}
        return {
            **kept,
            **({"CUDA_VISIBLE_DEVICES": self.gpu} if self.gpu else cache),
            KEY: self.endpoints[0].key,
            PARENT: str(os.getpid()),
            FOLDER: str(self.folder),
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # it shares the cores with the trainer
            "VLLM_HOST_IP": "127.0.0.1",  # else its workers meet at an address of the network
            "VLLM_LOOPBACK_IP": "127.0.0.1",
            "VLLM_NO_USAGE_STATS": "1",
        }

    def _wait(self) -> None:
        deadline = time.monotonic() + self.seconds
        probe = Endpoint(self.endpoints[0].url, "", 5.0)
        hidden = None if ranks.is_main() else True  # None hides it where there is no terminal
        with tqdm(desc="starting vLLM", bar_format="{desc}: {elapsed}", leave=False, disable=hidden) as progress:
            while time.monotonic() < deadline:
                if self.process.poll() is not None:
                    raise ServerFault(f"it did not start: {self._ending()}")
                try:
                    probe.ask("/health")
                    return
                except ServerFault:
                    time.sleep(0.2)
                    progress.refresh()
        raise ServerFault(f"it did not start within rollout.server_seconds = {self.seconds:g}")

    def restart(self) -> None:
        self.faulty = True
        self._end()
        self.start()

    def _end(self) -> None:
        if self.process:
            for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(self.process.pid, number)
                    self.process.wait(timeout=patience)

    def stop(self) -> None:
        """Ends it and its workers; the log stays where there was a fault."""
        self._end()
        shutil.rmtree(self.adapters, ignore_errors=True)
        if not self.faulty:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _ending(self) -> str:
        code = self.process.returncode
        if code >= 0:
            return f"it ended with exit code {code}"
        out_of_memory = ", as when memory runs out" if code == -signal.SIGKILL else ""
        return f"it was ended by {signal.Signals(-code).name}{out_of_memory}"

    def last_words(self) -> list[str]:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.is_file() else []
        lines = [line.strip()[-300:] for line in lines if line.strip()]
        errors = [line for line in lines if "Error" in line and "ulimit" not in line]
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=self.GRACE)
        ended = [self._ending()] if self.process.returncode is not None else []
        return [*ended, f"the log of vLLM, {self.log}, ends:", *(errors[-2:] or lines[-3:])]


class RemoteServers(Servers):
    """Servers that someone else started, on this or other machines."""

    PATIENCE = 10.0
    """Seconds before they are asked again after a fault."""

    def __init__(self, urls: list[str], adapters: Path, seconds: float):
        self.endpoints = [Endpoint(url, os.environ.get(KEY, ""), seconds) for url in urls]
        self.adapters = adapters

    def check(self, base: str, length: int) -> None:
        """Raises ModelError where one is not there, or serves another base or shorter sequences."""
        for endpoint in self.endpoints:
            try:
                served = next(model for model in endpoint.ask("/v1/models")["data"] if not model.get("parent"))
            except (ServerFault, TypeError, KeyError, StopIteration) as error:
                raise ModelError(f"rollout.servers: {endpoint.url}: {error}; start it, and set {KEY}") from None
            if Path(served["root"]).name != Path(base).name:
                raise ModelError(
                    f"rollout.servers: {endpoint.url} serves {served['root']}, and the run trains {base}; start it "
                    "with the same model"
                )
            self.base_name = served["id"]
            if served["max_model_len"] < length:
                raise ModelError(
                    f"rollout.servers: {endpoint.url} takes {served['max_model_len']} tokens, and the run needs "
                    f"{length}; start it with --max-model-len {length}"
                )

    def restart(self) -> None:
        time.sleep(self.PATIENCE)

    def leave(self) -> None:
        """Nothing of this run stays with them."""
        for endpoint in self.endpoints if self.adapter else ():
            with suppress(ServerFault):
                replace(endpoint, seconds=5.0).ask("/v1/unload_lora_adapter", {"lora_name": self.adapter})
        shutil.rmtree(self.adapters, ignore_errors=True)


def servers_problem(recipe: Recipe) -> str | None:
    """Why this machine cannot sample with vLLM as the recipe asks, or None."""
    if recipe.rollout.engine != "vllm":
        return None
    if why := next(vllm_problems(recipe), None):  # of a recipe that was written for another engine
        return why
    if recipe.rollout.servers != "auto":
        return None
    if why := problem():
        return f"rollout.engine: {why}, or use rollout.engine=transformers, the default"
    if build() == "cpu" and recipe.server_in_4bit:
        return "rollout.quantization: vLLM quantises only on a GPU; use none, or rollout.engine=transformers"
    return None


def longest_sequence(recipe: Recipe) -> int:
    return recipe.data.max_prompt_tokens + recipe.grpo.max_completion_length


def command_options(recipe: Recipe, base: str, *, dtype: str, images: int, has_gpu: bool) -> list[str]:
    """vLLM's command line for this recipe. `images`: most of one prompt."""
    sequences = min(MOST_SEQUENCES, recipe.prompts_per_rollout * recipe.grpo.num_generations)
    options = {
        "model": base,
        "revision": recipe.model.revision,
        "served-model-name": "base",
        "dtype": dtype,
        "quantization": "bitsandbytes" if recipe.server_in_4bit else None,
        "max-model-len": longest_sequence(recipe),
        "max-num-seqs": sequences,
        "limit-mm-per-prompt": json.dumps({"image": images, "video": 0}),
        "max-lora-rank": next(rank for rank in LORA_RANKS if rank >= recipe.lora.r),
        "max-loras": 2,
        # Its own defaults, not the model's: a repetition penalty there would sample from another distribution.
        "generation-config": "vllm",
        # Of the distribution that it samples from: with the temperature, and without what it is told to hold back.
        "logprobs-mode": "processed_logprobs",
        "uvicorn-log-level": "warning",
        "gpu-memory-utilization": recipe.rollout.vllm_gpu_memory_utilization if has_gpu else None,
    }
    flags = ["enable-lora", "trust-request-mm-kwargs", "disable-log-stats"]
    if not has_gpu:
        # vLLM 0.31 fails where it reads a prompt in parts and there is a seed: "CPU Generator does not use offset".
        flags += ["enforce-eager", "skip-mm-profiling", "no-enable-chunked-prefill"]
    pairs = [(f"--{name}", str(value)) for name, value in options.items() if value is not None]
    return [*(part for pair in pairs for part in pair), *(f"--{flag}" for flag in flags)]


@contextmanager
def serving(recipe: Recipe, run_path: Path, examples: Sequence[Example]) -> Iterator[Servers | None]:
    """Inside, this process's servers answer; None where the recipe samples with the model's own generate(), or nothing.

    Raises ModelError where they cannot be had.
    """
    rollout, base = recipe.rollout, base_path(recipe.model.name)
    if rollout.engine != "vllm" or not examples:
        yield None
        return
    if rollout.servers != "auto":
        share = rollout.servers[ranks.rank() % len(rollout.servers) :: ranks.num_processes()]
        adapters = run_path.absolute() / f".vllm-{ranks.rank()}.tmp"  # goes with other temporaries after a kill
        servers = RemoteServers(list(share), adapters, rollout.server_seconds)
        servers.check(base, longest_sequence(recipe))
        try:
            yield servers
        finally:
            servers.leave()
        return
    local = _local_server(recipe, base, max(len(example.images) for example in examples))
    try:
        started = time.monotonic()
        _say(f"Starting vLLM in {local.python.parents[1]} (log: {local.log}) ...")
        local.start()
        _say(f"vLLM answers after {time.monotonic() - started:.0f} s, on the loopback only.")
        yield local
    except ServerFault as fault:
        raise ModelError(f"vLLM: {fault}; see `apo-lora doctor`", *local.last_words()) from None
    finally:
        local.stop()


def _say(text: str) -> None:
    if ranks.is_main():
        print(text, flush=True)


def _local_server(recipe: Recipe, base: str, images: int) -> LocalServer:
    import torch

    from apo_lora.machine.device import choose_dtype

    has_gpu = torch.cuda.is_available()
    bf16 = has_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = str(choose_dtype(recipe.model.dtype, has_gpu, bf16)).removeprefix("torch.")
    port = recipe.rollout.port and recipe.rollout.port + ranks.rank()
    options = command_options(recipe, base, dtype=dtype, images=images, has_gpu=has_gpu)
    return LocalServer(options, gpu=_own_gpu() if has_gpu else None, port=port, seconds=recipe.rollout.server_seconds)


def _own_gpu() -> str:
    """The GPU of this process, as CUDA_VISIBLE_DEVICES would name it."""
    import torch

    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    number = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    return visible[number] if visible else str(number)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
