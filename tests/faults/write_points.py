"""Where a run writes: every open, write, fsync, rename and removal below its folders, by the kind of file.

Python's own operations are seen through its audit events, just before they happen. What writes without Python's
knowledge (torch.save, safetensors) is wrapped.
"""

import json
import os
import re
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

KINDS = {
    "mirror": r"mirror/",
    "checkpoint": r"run/checkpoints/",
    "metrics": r"run/\.?metrics",
    "completions": r"run/\.?completions",
    "adapter": r"run/\.?adapter",
    "plots": r"run/plots/",
    "images": r"run/images/",
    "evaluation": r"run/\.?(eval|answers)",
    "model card": r"run/\.?README",
    "recipe and environment": r"run/\.?(recipe|environment|inputs|preflight)",
}

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Point:
    """The `number`-th operation on files of a kind, and how long after its beginning (ms) the signal comes."""

    kind: str
    number: int
    delay_ms: float


class WritePoints:
    """Call `install` in the process that is to be watched, before it starts to train."""

    def __init__(self, folder: Path, point: Point | None = None, number: signal.Signals | None = None, note: int = -1):
        """`note`: a pipe that is told when the point is reached; who reads it sends the signal if there is a delay."""
        self.root = str(folder.resolve()) + "/"
        self.point, self.number, self.note = point, number, note
        self.seen: Counter[str] = Counter()
        self.operations: list[tuple[str, str, str]] = []

    def install(self) -> None:
        import safetensors.torch
        import torch

        sys.addaudithook(self._audit)
        self._wrap(os, "fsync", 0, "fsync", lambda fd: os.readlink(f"/proc/self/fd/{fd}"))
        self._wrap(torch, "save", 1, "write", str)
        self._wrap(safetensors.torch, "save_file", 1, "write", str)
        import peft.peft_model

        peft.peft_model.safe_save_file = safetensors.torch.save_file  # imported by name

    def _wrap(self, module, name: str, place: int, operation: str, path_of) -> None:
        original = getattr(module, name)

        def reporting(*arguments, **options):
            if len(arguments) > place:
                self._reach(operation, path_of(arguments[place]))
            return original(*arguments, **options)

        setattr(module, name, reporting)

    def _audit(self, event: str, details: tuple) -> None:
        if event == "open" and details[2] & WRITING and isinstance(details[0], str | os.PathLike):
            self._reach("open", str(details[0]))
        elif event == "os.rename":
            self._reach("rename", str(details[1]))
        elif event in ("os.remove", "shutil.rmtree"):
            self._reach("remove", str(details[0]))

    def _reach(self, operation: str, path: str) -> None:
        path = os.path.abspath(path)
        if not path.startswith(self.root):
            return
        path = path.removeprefix(self.root)
        kind = next((kind for kind, pattern in KINDS.items() if re.match(pattern, path)), None)
        if kind is None:
            return
        self.operations.append((kind, operation, path))
        self.seen[kind] += 1
        if self.point and (kind, self.seen[kind]) == (self.point.kind, self.point.number):
            os.write(self.note, json.dumps({"kind": kind, "operation": operation, "path": path}).encode() + b"\n")
            if not self.point.delay_ms:
                os.kill(os.getpid(), self.number)
