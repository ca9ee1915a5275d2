"""Colab's side of a notebook: cells are sent to a kernel one after the other, and what they show is kept."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpec

sys.path.insert(0, str(Path(__file__).parents[2] / "colab"))
from execute import NOTEBOOK, as_a_screen_shows, filled


@dataclass
class Cell:
    title: str
    source: str
    failed: bool = False
    seconds: float = 0.0
    outputs: list[dict] = field(default_factory=list)
    num_messages: int = 0

    def text(self) -> str:
        """What its streams and errors say, as a screen shows it: a line that was written again stands once."""
        raw = "".join(o.get("text", "") + "\n".join(o.get("traceback", ())) for o in self.outputs)
        return as_a_screen_shows(raw)

    def data(self, kind: str) -> list[Any]:
        return [output["data"][kind] for output in self.outputs if kind in output.get("data", {})]


def cells_of(form: Mapping[str, Any]) -> list[Cell]:
    """The notebook's code, with these values in its form."""
    code = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    return [Cell(source.partition("\n")[0].removeprefix("#@title "), filled(source, form)) for source in code]


class Frontend:
    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]):
        """`command` starts the kernel, in `folder`."""
        self.manager = KernelManager()
        self.manager._kernel_spec = KernelSpec(argv=[*command, "-f", "{connection_file}"], language="python")
        self.options = {"cwd": str(folder), "env": environment}

    def __enter__(self) -> "Frontend":
        self.manager.start_kernel(**self.options)
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)
        return self

    def __exit__(self, *_: Any) -> None:
        """The kernel is killed, as when its session is restarted."""
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def run_all(self, cells: list[Cell], during: Callable[[Cell], bool] = lambda cell: False) -> list[Cell]:
        """Every cell up to one that fails. Ends early where `during(cell)`, called at least each second, is true."""
        for place, cell in enumerate(cells):
            if self._run(cell, during) or cell.failed:
                return cells[: place + 1]
        return cells

    def interrupt(self) -> None:
        self.manager.interrupt_kernel()

    def _run(self, cell: Cell, during: Callable[[Cell], bool], limit: float = 600) -> bool:
        # A kernel drops what is asked for within a moment of a failure, unless it is told not to.
        started, asked = time.monotonic(), self.client.execute(cell.source, stop_on_error=False)
        while time.monotonic() - started < limit:
            cell.seconds = time.monotonic() - started
            if during(cell):
                return True
            try:
                message = self.client.get_iopub_msg(timeout=0.5)
            except Exception:  # queue.Empty: nothing was said
                continue
            if message["parent_header"].get("msg_id") != asked:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                return False
            cell.num_messages += 1
            self._add(cell, kind, content)
        raise TimeoutError(f"{cell.title}: longer than {limit:.0f} s\n{cell.text()}")

    @staticmethod
    def _add(cell: Cell, kind: str, content: dict) -> None:
        place = content.get("transient", {}).get("display_id")
        if kind == "update_display_data":
            next(output for output in cell.outputs if output.get("place") == place)["data"] = content["data"]
        elif kind == "stream" and cell.outputs and cell.outputs[-1].get("name") == content["name"]:
            cell.outputs[-1]["text"] += content["text"]
        elif kind in ("stream", "display_data", "error", "execute_result"):
            cell.outputs.append({**content, "kind": kind, "place": place})
            cell.failed |= kind == "error"


def colab_environment(python: Path, uv: Path, home: Path, asked: Path) -> dict[str, str]:
    """What Colab tells its kernel about the machine: much of it would mislead another Python."""
    kept = {name: os.environ[name] for name in os.environ if "CERT" in name or name.lower().endswith("_proxy")}
    return {
        **kept,
        "HOME": str(home),
        "LANG": "en_US.UTF-8",
        "PATH": f"{uv.parent}:{python.parent}:/usr/local/bin:/usr/bin:/bin",
        "COLAB_RELEASE_TAG": "twin",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONPATH": "/env/python",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONWARNINGS": "ignore:::pip._internal.cli.base_command",
        "UV_SYSTEM_PYTHON": "true",
        "UV_CONSTRAINT": "/nowhere/requirements.constraints",
        "UV_PRERELEASE": "if-necessary-or-explicit",
        "TWIN_ASKED": str(asked),
    }
