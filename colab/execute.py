"""Runs the notebook from top to bottom without a GPU and keeps its outputs: `python colab/execute.py`.

The committed notebook holds the outputs of such a run, its installation included. The tests run the notebook in a twin
of Colab (tests/colab_twin), or with `executed` where that cannot be made.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

PROJECT = Path(__file__).resolve().parent.parent
NOTEBOOK = PROJECT / "colab" / "apo_lora_qwen2_5_vl.ipynb"


def executed(
    folder: Path, form: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None
) -> nbformat.NotebookNode:
    """The notebook after Run all, in `folder`; `form` are values of its fields, by name. Raises CellExecutionError.

    It installs the working tree, unless APO_PYTHON in `environment` names an interpreter that has apo-lora.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    published = [cell.source for cell in notebook.cells]
    form = {"SOURCE": repository(folder / "repository"), **(form or {})}
    for cell in notebook.cells:
        cell.source = filled(cell.source, form)
    content = folder / "content"
    content.mkdir()
    client = NotebookClient(
        notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(content)}}
    )
    client.execute(env={**os.environ, **(environment or {})})
    for cell, source in zip(notebook.cells, published, strict=True):
        cell.source = source
        cell.metadata.pop("execution", None)  # times of day, which are nobody's business
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
    return notebook


def filled(source: str, form: Mapping[str, Any]) -> str:
    """A cell with other values in its fields; no value may hold a backslash."""
    for field, value in form.items():
        source = re.sub(rf"(?m)^{field} = .*?(?=  #@param)", f"{field} = {value!r}", source)
    return source


def repository(target: Path) -> str:
    """The working tree as a repository that can be cloned; its address."""
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=PROJECT, text=True)
    for name in filter(None, listed.split("\0")):
        if (PROJECT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, target / name)
    author = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost")
    for arguments in (["init"], ["add", "--all", "--force"], [*author, "commit", "-m", "the working tree"]):
        subprocess.run(["git", *arguments], cwd=target, check=True, capture_output=True)
    return target.as_uri()


def _joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Pieces of text between two pictures become one."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    for output in joined:
        if output.output_type == "stream":
            output.text = as_a_screen_shows(output.text)
    return joined


def as_a_screen_shows(text: str) -> str:
    """Of a progress bar, the last state alone."""
    return "\n".join(line.split("\r")[-1].rstrip() for line in text.split("\n"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        done = executed(Path(folder))
    nbformat.write(done, NOTEBOOK)
    print(f"{NOTEBOOK.name}: {sum(len(c.get('outputs', ())) for c in done.cells)} outputs", file=sys.stderr)
