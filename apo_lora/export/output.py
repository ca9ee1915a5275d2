"""Is there room for an export? Asked before the base is downloaded, and again before anything is written. No torch."""

import shutil
from pathlib import Path
from typing import NamedTuple

from apo_lora.errors import ModelError

SPARE_BYTES = 2**28
"""Left free on a disk, for the small files and the file system itself."""


class Need(NamedTuple):
    what: str
    place: Path
    """May not exist yet."""
    num_bytes: int


def require_disk(*needs: Need) -> None:
    """Prints one line per disk: what is needed, what is there. Raises ModelError, in the same words, if it is less."""
    disks: dict[int, list[Need]] = {}
    for need in needs:
        place = need.place.absolute()
        while not place.exists():
            place = place.parent
        disks.setdefault(place.stat().st_dev, []).append(need._replace(place=place))
    lines, short = [], []
    for on_disk in disks.values():
        needed = sum(need.num_bytes for need in on_disk) + SPARE_BYTES
        free = shutil.disk_usage(on_disk[0].place).free
        parts = ", ".join(
            f"{what} {size / 1e9:.2f}" for what, _, size in [*on_disk, Need("spare", Path(), SPARE_BYTES)]
        )
        line = f"{on_disk[0].place}: {needed / 1e9:.2f} GB needed ({parts}), {free / 1e9:.2f} GB free"
        lines.append(line)
        if free < needed:
            short.append(f"{line}; free some, or choose another disk with --out DIR (for the download with HF_HOME)")
    if short:
        raise ModelError(*short)
    print("\n".join(f"Disk {line}" for line in lines), flush=True)
