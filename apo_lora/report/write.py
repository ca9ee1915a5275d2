"""The verb `apo-lora report`: runs in, one HTML file out."""

from collections.abc import Sequence
from pathlib import Path

from apo_lora.errors import RunDirError
from apo_lora.evaluation.gallery import readable
from apo_lora.report.page import GENERATOR, render
from apo_lora.report.runs import read_runs
from apo_lora.run.directory import RunDir
from apo_lora.run.files import write_atomically


def report(paths: Sequence[str], out: str | None = None) -> Path:
    """Writes the page and returns its path: `out`, else report.html in the run, or here where there are several.

    Raises RunDirError before anything is written. An earlier report is replaced, no other file is.
    """
    target = Path(out) if out else RunDir(paths[0] if len(paths) == 1 else "").report
    _check(target)
    page = readable(render(read_runs(paths)))
    try:
        write_atomically(target, page)
    except OSError as error:
        raise RunDirError(f"{target}: cannot be written ({error.strerror}); choose another with --out") from None
    return target


def _check(target: Path) -> None:
    if target.suffix.lower() not in (".html", ".htm"):
        raise RunDirError(f"--out {target}: must end in .html; give another name")
    if target.is_dir():
        raise RunDirError(f"--out {target}: is a folder; give the name of a file")
    if target.exists() and GENERATOR not in target.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise RunDirError(f"{target}: already exists and is not a report; choose another with --out FILE.html")
