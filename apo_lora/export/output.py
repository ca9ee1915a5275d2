"""The folder that an export writes: it must fit on the disk, and exists completely or not at all. No torch."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from apo_lora.errors import ModelError
from apo_lora.export.base import Base, find_base
from apo_lora.run.adapter import AdapterSource
from apo_lora.run.files import locked

SPARE_BYTES = 2**28
"""Left free on a disk, for the small files and the file system itself."""


@contextmanager
def new_folder(
    out: Path, source: AdapterSource, onto: str | None = None, **ratios: float
) -> Iterator[tuple[Base, Path]]:
    """(the adapter's base, a folder to write into, which becomes `out` at the end).

    `onto`: see find_base. `ratios`: what is written, and its size over that of the merged weights; whether it fits is
    asked before the base is downloaded, and again before anything is written. After an error, no part of it is there.
    Raises ModelError.
    """

    def require_room(fetched: int, weights: int) -> None:
        from huggingface_hub.constants import HF_HUB_CACHE

        downloads = [DiskNeed("download", Path(HF_HUB_CACHE), fetched)] if fetched else []
        require_disk(*downloads, *(DiskNeed(what, out, int(weights * ratio)) for what, ratio in ratios.items()))

    if out.exists():
        raise ModelError(f"--out {out}: already exists; remove it, or choose another folder")
    base = find_base(source, onto, require_room)
    from apo_lora.export.four_bit import merged_bytes  # imports torch, after what may refuse at once

    require_room(0, merged_bytes(base))
    with _whole_or_nothing(out) as folder:
        yield base, folder


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, renamed to it at the end.

    What a kill leaves behind is the hidden temporary folder, which the next export of that name clears away.
    """
    temporary = out.absolute().with_name(f".{out.name}.tmp")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        with locked(temporary):
            try:
                for left in temporary.iterdir():
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                yield temporary
                temporary.rename(out)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ModelError(f"--out {out}: could not be written ({error.strerror or error}); nothing was kept") from error


class DiskNeed(NamedTuple):
    what: str
    place: Path
    """May not exist yet."""
    num_bytes: int


def require_disk(*needs: DiskNeed) -> None:
    """Prints one line per disk: what is needed, what is there. Raises ModelError, in the same words, if it is less."""
    disks: dict[int, list[DiskNeed]] = {}
    for need in needs:
        place = next(folder for folder in [need.place.absolute(), *need.place.absolute().parents] if folder.exists())
        disks.setdefault(place.stat().st_dev, []).append(need._replace(place=place))
    lines, short = [], []
    for on_disk in disks.values():
        place = on_disk[0].place
        parts = [*on_disk, DiskNeed("spare", place, SPARE_BYTES)]
        needed, free = sum(part.num_bytes for part in parts), shutil.disk_usage(place).free
        listed = ", ".join(f"{part.what} {part.num_bytes / 1e9:.2f}" for part in parts)
        lines.append(f"{place}: {needed / 1e9:.2f} GB needed ({listed}), {free / 1e9:.2f} GB free")
        if free < needed:
            short.append(
                f"{lines[-1]}; free some space, or use another disk with --out DIR (for the download: HF_HOME)"
            )
    if short:
        raise ModelError(*short)
    print("\n".join(f"Disk {line}" for line in lines), flush=True)
