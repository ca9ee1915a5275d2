"""A full disk: said before a checkpoint is begun, or where one breaks off; what was saved is kept, and goes on."""

import errno
import os
import subprocess

import pytest

from apo_lora.commands.main import main
from apo_lora.errors import RunDirError
from apo_lora.run import disk
from apo_lora.run.directory import RunDir

from .tiny_runs import arguments, steady_rows


def only_line(capsys) -> str:
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if "the disk is full" in line]
    assert "Traceback" not in error
    return line


# --- parts -----------------------------------------------------------------------------------------------------------


def test_sizes_are_read_at_a_glance():
    assert [disk.size(n) for n in (999, 40_000, 2_500_000, 3_210_000_000)] == ["1 kB", "40 kB", "2.5 MB", "3.2 GB"]


def test_a_full_disk_is_one_line_and_another_error_is_itself(tmp_path):
    def write(error, needed):
        with disk.disk_errors_as_one_line(tmp_path, "All is kept", needed):
            raise error

    with pytest.raises(RunDirError, match="the disk is full: .* are free. All is kept"):
        write(OSError(errno.ENOSPC, "No space left on device"), needed=0)
    for error in (OSError(errno.EACCES, "no"), RuntimeError("file write failed")):
        with pytest.raises(type(error)):
            write(error, needed=1)
    with pytest.raises(RunDirError, match="a checkpoint needs about"):  # torch's writer does not say why it failed
        write(RuntimeError("file write failed"), needed=disk.free_bytes(tmp_path) + 2**40)


def test_room_is_asked_for_where_the_folder_will_be(tmp_path):
    assert disk.free_bytes(tmp_path / "not" / "yet") > 0
    with pytest.raises(RunDirError, match="Nothing was written. Free some space"):
        disk.require_room(tmp_path, disk.free_bytes(tmp_path) * 2, "a checkpoint", "Nothing was written")


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert main(arguments(folder)) == 0
    return RunDir(folder / "run")


def same_end(run, whole_run):
    weights = "adapter_model.safetensors"
    assert (run.adapter / weights).read_bytes() == (whole_run.adapter / weights).read_bytes()
    assert steady_rows(run.metrics) == steady_rows(whole_run.metrics)


@pytest.mark.slow
def test_nothing_is_written_where_not_even_one_checkpoint_fits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    assert main(arguments(tmp_path)) == 2
    assert "needs about 1.3 MB, and 1 kB are free. Nothing was written" in only_line(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_save_that_does_not_fit_is_not_begun(tmp_path, monkeypatch, capsys, whole_run):
    run = RunDir(tmp_path / "run")
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000 if run.valid_checkpoints() else 10**9)
    assert main(arguments(tmp_path)) == 2
    line = only_line(capsys)
    needed = disk.size(disk.checkpoint_bytes(run, ()))
    assert f"needs about {needed}, and 1 kB are free. checkpoint-2 is complete and kept" in line
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    assert main(arguments(tmp_path)) == 0
    same_end(run, whole_run)


@pytest.mark.slow
def test_a_save_that_breaks_off_leaves_the_one_before(tmp_path, monkeypatch, capsys, whole_run):
    import torch

    run, save = RunDir(tmp_path / "run"), torch.save

    def full(content, path, *rest, **options):
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return save(content, path, *rest, **options)

    monkeypatch.setattr(torch, "save", full)
    assert main(arguments(tmp_path)) == 2
    assert "checkpoint-2 is complete and kept. Free some space and continue with --resume auto" in only_line(capsys)
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    assert main(arguments(tmp_path)) == 0
    same_end(run, whole_run)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here: that wants root")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("asked_before", [True, False])
def test_a_disk_that_is_really_full(small_disk, monkeypatch, capsys, asked_before, whole_run):
    """Room for two checkpoints of three, with and without the question before a save."""
    if not asked_before:
        monkeypatch.setattr(disk, "require_room", lambda *arguments: None)
    assert main(arguments(small_disk, "output.mirror=[]", "train.save_steps=1", "train.keep_checkpoints=9")) == 2
    line, run = only_line(capsys), RunDir(small_disk / "run")
    assert "a checkpoint needs about 1." in line
    kept = run.valid_checkpoints()
    assert kept and f"{kept[-1].name} is complete and kept" in line
    assert sorted(run.checkpoints.iterdir()) == kept
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)  # room is made
    assert main(arguments(small_disk, "output.mirror=[]")) == 0
    same_end(run, whole_run)
