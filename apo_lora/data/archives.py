"""Images in a zip or tar beside the table, read where they are: nothing is unpacked to disk."""

import tarfile
import threading
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from apo_lora.data.text import BadRow

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_MAX_MEMBER = 256 * 2**20
_MAX_COMPRESSED_TAR = 256 * 2**20  # it has to be read from its start for every image


@dataclass(frozen=True)
class Member:
    """A file in an archive."""

    archive: Path
    name: str

    def read(self) -> bytes:
        return _archive(self.archive).read(self.name)


def find_member(text: str, folder: Path) -> Member | None:
    """The file that an image path names in one of the folder's archives; None if there is none. Raises BadRow."""
    if not folder.is_dir():
        return None
    archives = _archives_in(folder, folder.stat().st_mtime_ns)
    found = [Member(path, name) for path in archives for name in _archive(path).names_for(text)]
    if len(found) > 1:
        places = ", ".join(f"{member.archive.name}/{member.name}" for member in found[:2])
        raise BadRow("image missing", f"{text} may be one of {len(found)} files in archives ({places}); unpack them")
    return found[0] if found else None


@lru_cache(maxsize=64)
def _archives_in(folder: Path, changed: int) -> tuple[Path, ...]:
    return tuple(sorted(path for path in folder.iterdir() if path.name.lower().endswith(SUFFIXES)))


class _Archive:
    def __init__(self, path: Path):
        self._lock = threading.Lock()  # several threads decode images
        try:
            if path.suffix.lower() == ".zip":
                self._file = zipfile.ZipFile(path)
                self._sizes = {info.filename: info.file_size for info in self._file.infolist() if not info.is_dir()}
            else:
                if path.suffix.lower() != ".tar" and path.stat().st_size > _MAX_COMPRESSED_TAR:
                    raise tarfile.ReadError("compressed and large: reading it would take hours")
                self._file = tarfile.open(path)  # noqa: SIM115  lives as long as the process
                self._sizes = {info.name: info.size for info in self._file.getmembers() if info.isfile()}
        except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
            raise BadRow("image missing", f"{path.name} beside the data cannot be read ({error}); unpack it") from None
        self._by_file_name = defaultdict(list)
        for name in self._sizes:
            self._by_file_name[PurePosixPath(name).name].append(name)

    def names_for(self, text: str) -> list[str]:
        """The name itself, else those that differ from it only by folders in front of the one or the other."""
        wanted = PurePosixPath(text.lstrip("/")).parts
        if "/".join(wanted) in self._sizes:
            return ["/".join(wanted)]
        near = []
        for name in self._by_file_name.get(wanted[-1], ()) if wanted else ():
            parts = PurePosixPath(name).parts
            shared = min(len(parts), len(wanted))
            if parts[-shared:] == wanted[-shared:]:
                near.append(name)
        return near

    def read(self, name: str) -> bytes:
        if self._sizes[name] > _MAX_MEMBER:
            raise OSError(f"over {_MAX_MEMBER:,} bytes in its archive")
        with self._lock:
            if isinstance(self._file, zipfile.ZipFile):
                return self._file.read(name)
            return self._file.extractfile(name).read()


def _archive(path: Path) -> _Archive:
    return _opened(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _opened(path: Path, changed: int) -> _Archive:
    return _Archive(path)
