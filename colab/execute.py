"""Runs the notebook from top to bottom without a GPU and keeps its outputs: `python colab/execute.py`.

The committed notebook holds the outputs of such a run. The tests execute it with `executed`.
"""

import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("apo_lora_qwen2_5_vl.ipynb")


def executed(folder: Path, form: Mapping[str, Any] | None = None) -> nbformat.NotebookNode:
    """The notebook after Run all, in `folder`; `form` are values of its fields, by name. Raises CellExecutionError."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        for field, value in (form or {}).items():
            line = f"{field} = {value!r}"  # no backslash in it
            cell.source = re.sub(rf"(?m)^{field} = .*?(?=  #@param)", line, cell.source)
    # The install cell asks the pip on the PATH, as in Colab.
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"]))
    client = NotebookClient(
        notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env={**os.environ, "PATH": path})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day, which are nobody's business
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
    return notebook


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
