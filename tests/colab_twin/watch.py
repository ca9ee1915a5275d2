"""What a newer Colab would change for the notebook: `python tests/colab_twin/watch.py PACKAGES [PYTHON]`. Not in CI.

PACKAGES is a newer list of what Colab's GPU machine has (`pip freeze`, as Colab publishes it in its repository
googlecolab/backend-info); PYTHON its version, such as 3.14. Compared with the twin's list, and with what the notebook
relies on.
"""

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

HERE = Path(__file__).parent
RELIED_ON = {
    "ipython": "the kernel's side shows everything through IPython.display, and one-line errors by _render_traceback_",
    "ipykernel": "interrupts, and pictures that are replaced in their cell, go through it",
    "jupyter-client": "it interrupts and restarts the kernel",
    "traitlets": "the kernel is built on it",
    "tornado": "the kernel's loop",
}
"""What a new major version of may break. No other package of Colab's is imported or replaced."""


def versions(text: str) -> dict[str, str]:
    """Of `pip freeze`, by canonical name; packages from a link have none and are left out."""
    found = {}
    for line in text.splitlines():
        try:
            requirement = Requirement(line.partition("#")[0].strip())
        except InvalidRequirement:
            continue
        pins = [pin.version for pin in requirement.specifier if pin.operator == "=="]
        if pins:
            found[canonicalize_name(requirement.name)] = pins[0]
    return found


def breaks(twin: Mapping[str, str], now: Mapping[str, str], python: str | None, allowed: str) -> Iterator[str]:
    """One line for everything that could stop the notebook. `allowed`: apo-lora's requires-python."""
    for name, why in RELIED_ON.items():
        if name not in now:
            yield f"{name} is gone: {why}"
        elif Version(now[name]).major != Version(twin[name]).major:
            yield f"{name} {twin[name]} -> {now[name]}, another major version: {why}; put it into the twin and run it"
    if python and Version(python) not in SpecifierSet(allowed):
        yield (
            f"Python {python} is not one of apo-lora's ({allowed}): where uv cannot download the tested Python, there "
            "is no other to fall back on; admit it in pyproject.toml as soon as the pinned set has wheels"
        )


def main(packages: str, python: str | None = None) -> int:
    """1 if something may break."""
    twin = versions((HERE / "packages.txt").read_text(encoding="utf-8"))
    now = versions(Path(packages).read_text(encoding="utf-8"))
    if not now:
        print(f"{packages}: has no line NAME==VERSION; give the output of pip freeze", file=sys.stderr)
        return 2
    project = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = list(breaks(twin, now, python, project["requires-python"]))
    moved = [f"{name} {old} -> {now.get(name, 'gone')}" for name, old in twin.items() if now.get(name) != old]
    print(f"{len(moved)} of the twin's {len(twin)} packages have moved{': ' if moved else ''}{', '.join(moved)}")
    print("\n".join(f"may break: {line}" for line in found) or "Nothing that the notebook relies on would break.")
    return 1 if found else 0


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or (len(sys.argv) == 3 and not re.fullmatch(r"\d+\.\d+(\.\d+)?", sys.argv[2])):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
