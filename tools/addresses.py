"""Brings every published address in line with pyproject.toml: `python tools/addresses.py`, after an edit of its urls.

A fork changes `urls.repository` and runs this. The address that is replaced is the one in the notebook's install cell.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

NOTEBOOK = "colab/apo_lora_qwen2_5_vl.ipynb"


def repository(project: Path) -> str:
    """OWNER/NAME on GitHub, by pyproject.toml."""
    url = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["repository"]
    return url.removeprefix("https://github.com/")


def published(project: Path) -> str:
    """OWNER/NAME, by the notebook."""
    return re.search(r'SOURCE = \\"https://github\.com/([\w.-]+/[\w.-]+)\\"', (project / NOTEBOOK).read_text("utf-8"))[
        1
    ]


def files_that_name(repository: str, project: Path) -> list[Path]:
    """Text files under version control with an address in it, on GitHub or in Colab."""
    addresses = [f"github.com/{repository}", f"colab.research.google.com/github/{repository}"]
    patterns = [word for address in addresses for word in ("-e", address)]
    command = ["git", "grep", "--name-only", "--fixed-strings", "-I", *patterns]
    found = subprocess.run(command, cwd=project, capture_output=True, text=True).stdout
    return [project / name for name in found.splitlines()]


def main(project: Path) -> int:
    old, new = published(project), repository(project)
    for path in files_that_name(old, project):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(rf"github(\.com)?/{re.escape(old)}\b", rf"github\1/{new}", text), encoding="utf-8")
        print(f"{path.relative_to(project)}: {old} is {new} now")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
