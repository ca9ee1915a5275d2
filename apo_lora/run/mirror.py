"""Copies of a run's record and last checkpoint: in a folder, for instance on Google Drive, or a repository on the Hub.

A mirror that cannot be reached causes one warning, and training continues; the next checkpoint is tried again. Copying
runs in the background, one copy at a time per mirror. If the run directory is missing, `--resume auto` restores it
from a mirror.
"""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm.auto import tqdm

from apo_lora.errors import RunDirError, UserError
from apo_lora.machine.hub import hub_api
from apo_lora.run.checkpoints import COMPLETE, checkpoints_in, is_whole, remove_checkpoint
from apo_lora.run.directory import RunDir
from apo_lora.run.files import replacing

HUB = "hub:"
LAST_COPY_SECONDS = 600
"""How long a finished run waits for copies in progress."""


def files_to_mirror(run_dir: RunDir) -> list[Path]:
    """Relative paths: the record, then the last whole checkpoint with its complete.json at the very end.

    In this order a copy that was cut has a record that is ahead of its checkpoint, which a resume rewinds.
    """
    folders = (run_dir.images, run_dir.plots, run_dir.adapter, run_dir.adapter_best)
    inner = [file for folder in folders for file in sorted(folder.rglob("*"))]
    record = [file for file in [*sorted(run_dir.path.iterdir()), *inner] if file.is_file()]
    last = run_dir.last_checkpoint()
    state = sorted((f for f in last.rglob("*") if f.is_file()), key=lambda f: (f.name == COMPLETE, f)) if last else []
    return [f.relative_to(run_dir.path) for f in [*record, *state] if not f.name.startswith(".")]


class FolderPlace:
    def __init__(self, path: str):
        self.run_dir = RunDir(path)

    def holds_run(self) -> bool:
        """Raises UserError if that cannot be determined."""
        self._require_mounted()
        return bool(self.run_dir.valid_checkpoints())

    def _require_mounted(self) -> None:
        # No parents are made: under a mount point without its drive they would fill this machine's own disk.
        parent = self.run_dir.path.absolute().parent
        if not parent.is_dir():
            raise RunDirError(f"{parent} does not exist; mount it, or create it once")

    def send(self, run_dir: RunDir) -> None:
        self._require_mounted()
        self.run_dir.remove_temporaries()
        files = files_to_mirror(run_dir)
        for file in files:
            source, target = run_dir.path / file, self.run_dir.path / file
            there, here = (path.stat() if path.exists() else None for path in (target, source))
            if there is None or (there.st_size, int(there.st_mtime)) != (here.st_size, int(here.st_mtime)):
                with replacing(target) as temporary:
                    shutil.copy2(source, temporary)
        sent = {file.parent.name for file in files if file.name == COMPLETE}
        if any(not is_whole(self.run_dir.checkpoints / name) for name in sent):
            raise RunDirError("the copied checkpoint is not complete")
        for path in checkpoints_in(self.run_dir.checkpoints):
            if path.name not in sent:
                remove_checkpoint(path)

    def fetch(self, target: Path) -> None:
        """Into an empty folder."""
        shutil.copytree(self.run_dir.path, target, dirs_exist_ok=True)


class HubPlace:
    """One commit per checkpoint, so that the repository holds a whole one at any time. It is private."""

    def __init__(self, repo: str):
        self.repo = repo

    def holds_run(self) -> bool:
        with hub_api(self.repo) as hub:
            return hub.repo_exists(self.repo) and any(COMPLETE in file for file in hub.list_repo_files(self.repo))

    def send(self, run_dir: RunDir) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        files = [file.as_posix() for file in files_to_mirror(run_dir)]
        with hub_api(self.repo) as hub:
            hub.create_repo(self.repo, private=True, exist_ok=True)
            if not hub.repo_info(self.repo).private:
                raise RunDirError(f"{self.repo}: is public, and a mirror contains completions; make it private")
            old = _checkpoint_folders(hub.list_repo_files(self.repo)) - _checkpoint_folders(files)
            hub.create_commit(
                self.repo,
                [CommitOperationAdd(name, run_dir.path / name) for name in files]
                + [CommitOperationDelete(folder, is_folder=True) for folder in sorted(old)],
                commit_message=f"Mirror of {run_dir.path.name}",
            )

    def fetch(self, target: Path) -> None:
        with hub_api(self.repo) as hub:
            hub.snapshot_download(self.repo, local_dir=target)
        shutil.rmtree(target / ".cache", ignore_errors=True)


def _checkpoint_folders(files: Iterable[str]) -> set[str]:
    return {f"{'/'.join(parts[:2])}/" for file in files if (parts := file.split("/"))[0] == "checkpoints" and parts[2:]}


def place_of(destination: str) -> FolderPlace | HubPlace:
    """`hub:ORG/NAME`, or a folder."""
    repo = destination.removeprefix(HUB)
    return HubPlace(repo) if repo != destination else FolderPlace(destination)


class Mirrors:
    """All mirrors of one run."""

    def __init__(self, destinations: Iterable[str], run_dir: RunDir, warn: Callable[[str], None] = tqdm.write):
        self.run_dir = run_dir
        self.warn = warn
        self.places = {destination: place_of(destination) for destination in destinations}
        self.failing: set[str] = set()
        self.unasked: set[str] = set()
        self.copying: dict[str, threading.Thread] = {}
        self.in_use: Path | None = None
        """The checkpoint that is being copied: it must stay where it is."""

    def refuse_existing(self) -> None:
        """For a new run. Raises RunDirError if a mirror already contains a run; warns if one cannot be reached.

        Such a mirror is checked again before the first copy: it may contain a run that could not be seen.
        """
        for destination in self.places:
            if self._holds_run(destination):
                raise RunDirError(
                    f"output.mirror: {destination} already contains a run; continue it with --resume auto, or choose "
                    "another mirror"
                )
        self.unasked = set(self.failing)

    def copy(self) -> None:
        """Begins to copy the run as it is now, to every place that has finished with the copy before."""
        if not any(thread.is_alive() for thread in self.copying.values()):
            self.in_use = self.run_dir.last_checkpoint()
        for destination in self.places:
            if destination not in self.copying or not self.copying[destination].is_alive():
                thread = threading.Thread(target=self._send, args=(destination,), daemon=True)
                self.copying[destination] = thread
                thread.start()

    def _send(self, destination: str) -> None:
        try:
            if destination in self.unasked and self.places[destination].holds_run():
                raise RunDirError("it contains another run, which could not be reached when this one started")
            self.unasked.discard(destination)
            self.places[destination].send(self.run_dir)
        except (UserError, OSError) as error:
            self._failed(destination, error)
        else:
            if destination in self.failing:
                self.failing.remove(destination)
                self.warn(f"output.mirror: {destination} is available again and up to date.")

    def _failed(self, destination: str, error: Exception) -> None:
        if destination not in self.failing:  # once, until it is back
            self.failing.add(destination)
            reason = error.problems[0] if isinstance(error, UserError) else error
            self.warn(
                f"warning: output.mirror: cannot copy to {destination} ({reason}); training continues, and the next "
                "checkpoint is tried again."
            )

    def finish(self, seconds: float = LAST_COPY_SECONDS) -> None:
        """One last copy, waited for."""
        self._wait(seconds)
        self.copy()
        self._wait(seconds)
        for destination, thread in self.copying.items():
            if thread.is_alive():
                self.warn(f"warning: output.mirror: copying to {destination} was stopped after {seconds:.0f} s.")

    def _wait(self, seconds: float) -> None:
        for thread in self.copying.values():
            thread.join(seconds)

    def restore(self) -> str | None:
        """Restores the run directory from the first mirror that has it. Returns which; None if none has."""
        for destination, place in self.places.items():
            try:
                if self._holds_run(destination):
                    self._fetch(place)
                    return destination
            except (UserError, OSError) as error:
                self._failed(destination, error)
        return None

    def wait_for_restored(self, seconds: float = LAST_COPY_SECONDS) -> None:
        """What the other processes do while the main one restores."""
        deadline = time.monotonic() + seconds
        while self.run_dir.is_absent() and any(self._holds_run(d) for d in self.places) and time.monotonic() < deadline:
            time.sleep(1)

    def _holds_run(self, destination: str) -> bool:
        try:
            return self.places[destination].holds_run()
        except UserError as error:
            self._failed(destination, error)
            return False

    def _fetch(self, place: FolderPlace | HubPlace) -> None:
        parent = self.run_dir.path.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=parent) as folder:
            fetched = Path(folder) / "run"
            fetched.mkdir()
            place.fetch(fetched)
            if not RunDir(fetched).valid_checkpoints():
                raise RunDirError("the restored copy contains no complete checkpoint")
            if self.run_dir.path.is_dir():
                self.run_dir.path.rmdir()  # empty: only an absent run is restored
            fetched.rename(self.run_dir.path)
