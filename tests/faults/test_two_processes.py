"""Two processes of one run: one of them killed ends it in words, and what was saved goes on, to the bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest
from conftest import PROJECT
from forks import Forked, two_processes

from apo_lora.errors import TrainingStopped
from apo_lora.machine import ranks
from apo_lora.report.recomputed import recomputed_credit
from apo_lora.report.runs import read_run
from apo_lora.run.directory import RunDir

from .tiny_runs import arguments, steady_rows

pytestmark = pytest.mark.slow

MOST_SECONDS = 60
"""From the death of one process to the end of the run."""


def start(folder: Path, *overrides: str) -> list[Forked]:
    return two_processes(["-m", "apo_lora", *arguments(folder, "output.mirror=[]", *overrides)])


def finish(processes: list[Forked]) -> tuple[list[int], str]:
    outputs = ["".join(process.communicate(timeout=900)) for process in processes]
    return [process.returncode for process in processes], "".join(outputs)


def launch(folder: Path, *overrides: str) -> subprocess.Popen:
    """By the launcher that users take."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    _, *training = arguments(folder, "output.mirror=[]", *overrides)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, "--main_process_port", "0", "-m", "apo_lora.train", *training],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


def wait_for_step(folder: Path, step: int, *processes: Forked | subprocess.Popen) -> None:
    metrics, deadline = RunDir(folder / "run").metrics, time.monotonic() + 600
    while not (metrics.exists() and metrics.read_text().count("\n") >= step):
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    codes, output = finish(start(folder))
    assert codes == [0, 0], output[-4000:]
    return RunDir(folder / "run")


def kill(rank: int, folder: Path, step: int) -> None:
    """Goes on with the run to this step, and kills one of its processes there."""
    processes = start(folder)
    wait_for_step(folder, step, *processes)
    processes[rank].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    codes, output = finish(processes)
    seconds = time.monotonic() - killed
    print(f"{seconds:.1f} s from the kill of rank {rank} to the end of the run")
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] not in (0, -signal.SIGKILL) and seconds < MOST_SECONDS
    assert "another process of this run has ended, so this one stops" in output, output[-4000:]
    assert "continue with the same number of processes and --resume auto" in output
    assert RunDir(folder / "run").valid_checkpoints()


def interrupt(folder: Path, step: int) -> None:
    """The launcher passes the signal on to its processes, and ends them after 30 s whatever they do."""
    launcher = launch(folder, "train.save_steps=6")
    wait_for_step(folder, step, launcher)
    launcher.send_signal(signal.SIGINT)
    output, _ = launcher.communicate(timeout=900)
    run = RunDir(folder / "run")
    last = steady_rows(run.metrics)[-1]["step"]
    assert launcher.returncode and [path.name for path in run.valid_checkpoints()] == [f"checkpoint-{last}"], output
    assert output.count("Stopping after this step and saving a checkpoint") == 1
    assert f"after step {last} of 6; a checkpoint is saved, continue with --resume auto" in output


def test_a_run_that_is_interrupted_and_killed_ends_as_the_whole_one_and_goes_on_alone(tmp_path, whole):
    interrupt(tmp_path, step=1)
    kill(0, tmp_path, step=3)
    kill(1, tmp_path, step=5)
    codes, output = finish(start(tmp_path))
    assert codes == [0, 0] and "Continuing from" in output, output[-4000:]
    run, weights = RunDir(tmp_path / "run"), "adapter_model.safetensors"
    assert (run.adapter / weights).read_bytes() == (whole.adapter / weights).read_bytes()
    assert [row["step"] for row in steady_rows(run.metrics)] == [1, 2, 3, 4, 5, 6]
    for record in ("metrics", "completions"):
        assert steady_rows(getattr(run, record)) == steady_rows(getattr(whole, record))
    assert not list(run.path.rglob(".*"))

    alone = forks.run(["-m", "apo_lora", *arguments(tmp_path, "train.max_steps=7")])
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert "Changed since the run started: processes from 2 to 1" in alone.stdout
    assert [row["step"] for row in steady_rows(run.metrics)] == [1, 2, 3, 4, 5, 6, 7]
    assert recomputed_credit(read_run(run.path)).text.endswith("equal to the record")  # of two processes, then of one


def test_what_a_lost_process_raises_is_told_from_other_errors(monkeypatch):
    def fail(words):
        with ranks.lost_process_as_one_line("All is kept"):
            raise RuntimeError(words)

    with pytest.raises(RuntimeError, match="Connection closed"):
        fail("Connection closed by peer")  # one process has no peer
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingStopped, match="All is kept"):
        fail("[../third_party/gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(RuntimeError, match="shape"):
        fail("shape mismatch")
