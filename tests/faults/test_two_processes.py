"""Two processes of one run: one of them killed ends it in words, and what was saved goes on, to the bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROJECT

from apo_lora.errors import TrainingStopped
from apo_lora.machine import ranks
from apo_lora.run.directory import RunDir

from .tiny_runs import arguments, steady_rows

pytestmark = pytest.mark.slow

MOST_SECONDS = 60
"""From the death of one process to the end of the run."""


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    _, *training = arguments(folder, "output.mirror=[]", *overrides)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, "--main_process_port", "0", "-m", "apo_lora.train", *training],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, errors = process.communicate(timeout=900)
    return process.returncode, output + errors


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    metrics, deadline = RunDir(folder / "run").metrics, time.monotonic() + 600
    while not (metrics.exists() and metrics.read_text().count("\n") >= step):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def process_of_rank(rank: int, launcher: subprocess.Popen) -> int:
    """Among the processes whose session the launcher began or that it started: the one with that RANK."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == launcher.pid and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    raise AssertionError(f"no process of rank {rank}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    code, output = finish(start(folder))
    assert code == 0, output[-4000:]
    return RunDir(folder / "run")


def assert_same_end(run: RunDir, whole: RunDir) -> None:
    weights = "adapter_model.safetensors"
    assert (run.adapter / weights).read_bytes() == (whole.adapter / weights).read_bytes()
    assert [row["step"] for row in steady_rows(run.metrics)] == [1, 2, 3, 4, 5, 6]
    assert steady_rows(run.metrics) == steady_rows(whole.metrics) and steady_rows(run.completions) == steady_rows(
        whole.completions
    )
    assert not list(run.path.rglob(".*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_one_killed_process_ends_the_run_with_one_line_and_it_goes_on(tmp_path, whole, rank):
    process = start(tmp_path)
    wait_for_step(tmp_path, 3, process)
    os.kill(process_of_rank(rank, process), signal.SIGKILL)
    killed = time.monotonic()
    code, output = finish(process)
    seconds = time.monotonic() - killed
    print(f"{seconds:.1f} s from the kill of rank {rank} to the end of the run")
    assert code != 0 and seconds < MOST_SECONDS
    assert "another process of this run has ended, so this one stops" in output, output[-4000:]
    assert "continue with the same number of processes and --resume auto" in output
    run = RunDir(tmp_path / "run")
    assert run.valid_checkpoints()
    code, output = finish(start(tmp_path))
    assert code == 0 and "Continuing from" in output, output[-4000:]
    assert_same_end(run, whole)


def test_ctrl_c_in_the_launcher_saves_once_and_goes_on(tmp_path, whole):
    """The launcher passes the signal on to its processes, and ends them after 30 s whatever they do."""
    process = start(tmp_path, "train.save_steps=6")
    wait_for_step(tmp_path, 2, process)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    run = RunDir(tmp_path / "run")
    steps = [row["step"] for row in steady_rows(run.metrics)]
    assert code != 0 and [path.name for path in run.valid_checkpoints()] == [f"checkpoint-{steps[-1]}"], output[-4000:]
    assert output.count("Stopping after this step and saving a checkpoint") == 1
    assert f"after step {steps[-1]} of 6; a checkpoint is saved, continue with --resume auto" in output
    code, output = finish(start(tmp_path))
    assert code == 0, output[-4000:]
    assert_same_end(run, whole)


def test_fewer_processes_go_on_and_say_what_changes(tmp_path):
    code, output = finish(start(tmp_path, "train.max_steps=2"))
    assert code == 0, output[-4000:]
    finished = subprocess.run(
        [sys.executable, "-m", "apo_lora.commands.main", *arguments(tmp_path, "output.mirror=[]")],
        capture_output=True, text=True, cwd=PROJECT,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "Changed since the run started: processes from 2 to 1" in finished.stdout
    assert [row["step"] for row in steady_rows(RunDir(tmp_path / "run").metrics)] == [1, 2, 3, 4, 5, 6]


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
