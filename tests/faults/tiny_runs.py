"""Runs of a few steps, each in a fork of a process that has the heavy imports done, and what two of them must share."""

import contextlib
import importlib
import json
import os
import select
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.blank_plots import blank_plots

from .write_points import Point, WritePoints

STEPS = 6
LONGEST_SECONDS = 300
"""A run that takes so long hangs."""

# The figures of the machine and the hour.
UNSTEADY = ("seconds", "tokens_per_second", "peak_memory")


def arguments(folder: Path, *overrides: str) -> list[str]:
    reward = Path(__file__).with_name("rewards.py")
    return [
        "train", "--recipe", "tiny_cpu", "--resume", "auto",
        "grpo.prompts_per_step=2", "grpo.num_generations=2", "grpo.completions_per_pass=2",
        "grpo.max_completion_length=10", f"rewards.functions=[accuracy,'{reward}:by_text']",
        f"train.max_steps={STEPS}", "train.save_steps=2", "train.preflight=false",
        "data.limit=16", "data.eval_limit=2", "data.general=null",
        f"output.dir={folder}/run", f"output.mirror=[{folder}/mirror]", *overrides,
    ]  # fmt: skip


def prepare() -> None:
    """Imports what a run imports, in a process that will fork: it must have no thread that holds a lock."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background is started without it
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    import tqdm

    tqdm.tqdm.monitor_interval = 0  # else a bar starts a thread
    # tqdm's own lock is one for all forks: killed while it holds it, one would stop the others for ever.
    tqdm.tqdm.set_lock(threading.RLock())
    from apo_lora.machine.process import prepare_process

    prepare_process()
    for name in (
        "data.examples", "evaluation.held_out", "policy.loading", "preflight.checks", "rewards.functions",
        "rewards.plugins", "rollout.record", "rollout.training_arguments", "run.mirror", "run.plots", "train",
        "trainer",
    ):  # fmt: skip
        importlib.import_module(f"apo_lora.{name}")
    for name in (
        "matplotlib.figure", "matplotlib.backends.backend_agg", "peft", "safetensors.torch",
        "transformers.models.qwen2_5_vl", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    ):  # fmt: skip
        importlib.import_module(name)
    blank_plots()


def import_as(modules: list[str]) -> None:
    """What a first run turned out to import as well."""
    for name in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def threads() -> list[str]:
    """Names of this process's threads but the main one. pyarrow's allocator has one that a fork does no harm to."""
    others = [task for task in os.listdir("/proc/self/task") if int(task) != os.getpid()]
    names = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in others]
    return [name for name in names if not name.startswith("jemalloc")]


@dataclass
class Ended:
    """How a run ended: its exit code (minus the signal where one killed it), and where the signal met it."""

    code: int
    seconds: float
    output: str
    reached: dict = field(default_factory=dict)
    operations: list = field(default_factory=list)
    modules: list = field(default_factory=list)
    sent: bool = False
    """Whether the signal was sent at all; a run may have ended before."""


def run(
    folder: Path,
    *overrides: str,
    number: signal.Signals | None = None,
    at_seconds: float | None = None,
    at_point: Point | None = None,
) -> Ended:
    """One `apo-lora train --resume auto` to its end, or to the signal `number` after a time or at a write."""
    folder.mkdir(parents=True, exist_ok=True)
    reader, writer = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if not child:
        os.close(reader)
        _in_child(folder, overrides, WritePoints(folder, at_point, number, writer))
    os.close(writer)
    sent, reached = False, {}
    deadline = started + (at_seconds if at_seconds is not None else LONGEST_SECONDS)
    os.set_blocking(reader, False)
    code, killed_for_time = None, False
    while True:
        code = _ended(child)
        if code is not None:
            break
        # Until the child tells that it is there, until its time has come, or for a moment.
        ready, _, _ = select.select([reader], [], [], max(0.0, min(0.02, deadline - time.monotonic())))
        if ready and not reached and (line := os.read(reader, 65536)):
            reached = json.loads(line)
            sent = True
            if at_point.delay_ms:
                time.sleep(at_point.delay_ms / 1000)
                os.kill(child, number)
        elif ready:
            time.sleep(0.005)  # it has closed the pipe and is about to end
        if time.monotonic() >= deadline and not sent and at_seconds is not None:
            os.kill(child, number)
            sent, deadline = True, started + LONGEST_SECONDS
        elif time.monotonic() >= started + LONGEST_SECONDS and not killed_for_time:
            os.kill(child, signal.SIGKILL)
            killed_for_time = True
    os.close(reader)
    output = (_content(folder / "output.log") or b"").decode(errors="replace")
    assert not killed_for_time, f"{folder} hung for {LONGEST_SECONDS} s:\n{output[-3000:]}"
    facts = folder / "facts.json"
    known = json.loads(facts.read_text()) if facts.exists() else {}
    facts.unlink(missing_ok=True)
    return Ended(code, time.monotonic() - started, output, reached, sent=sent, **known)


def _ended(child: int) -> int | None:
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def _in_child(folder: Path, overrides: tuple[str, ...], points: WritePoints) -> None:
    code = 70
    try:
        log = os.open(folder / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        points.install()
        from apo_lora.commands.main import main

        code = main(arguments(folder, *overrides))
        facts = {"operations": points.operations, "modules": sorted(sys.modules)}
        (folder / "facts.json").write_text(json.dumps(facts))
    except KeyboardInterrupt:
        code = 130  # as Python itself ends, outside of the command's own handling
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --- what two runs must share ----------------------------------------------------------------------------------------


def differences(folder: Path, reference: Path) -> list[str]:
    """In what the finished run differs from the uninterrupted one, beyond times; nothing may."""
    from apo_lora.run.directory import RunDir

    run, other = RunDir(folder / "run"), RunDir(reference / "run")
    found = []
    if _files(run.path) != _files(other.path):
        found.append(f"files: {sorted(_files(run.path) ^ _files(other.path))}")
    found += [f"stray {path}" for path in folder.rglob(".*") if path.name.startswith(".")]
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "eval.json", "answers.jsonl"):
        if _content(run.path / name) != _content(other.path / name):
            found.append(f"{name} differs")
    steps = [row["step"] for row in steady_rows(run.metrics)]
    if steps != list(range(1, STEPS + 1)):
        found.append(f"metrics.jsonl has the steps {steps}")
    for name in ("metrics.jsonl", "completions.jsonl"):
        if steady_rows(run.path / name) != steady_rows(other.path / name):
            found.append(f"{name} differs")
    last, expected = (sorted(r.valid_checkpoints(), key=lambda p: int(p.name[11:]))[-1:] for r in (run, other))
    if [p.name for p in last] != [p.name for p in expected]:
        found.append(f"the last checkpoint is {last}")
    else:
        for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            if _content(last[0] / name) != _content(expected[0] / name):
                found.append(f"{last[0].name}/{name} differs")
    if len(run.valid_checkpoints()) != len(list(run.checkpoints.iterdir())):
        found.append("a checkpoint is not whole")
    mirror = RunDir(folder / "mirror")
    if [p.name for p in mirror.valid_checkpoints()] != [p.name for p in expected]:
        found.append(f"the mirror holds {[p.name for p in mirror.valid_checkpoints()]}")
    for file in _files(run.path):
        if _content(mirror.path / file) != _content(run.path / file):
            found.append(f"the mirror's {file} differs")
    return found


def _files(run: Path) -> set[str]:
    """But checkpoints: which of them are there depends on where the run was stopped."""
    paths = (path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    return {path for path in paths if not path.startswith("checkpoints/")}


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def steady_rows(path: Path) -> list[dict]:
    from apo_lora.run.files import read_jsonl

    rows = read_jsonl(path) if path.exists() else ()
    return [{key: value for key, value in row.items() if not key.startswith(UNSTEADY)} for row in rows]


def clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
