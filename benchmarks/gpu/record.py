"""What one measurement has found, on disk after every part of it: what comes later can fail or run out of time."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apo_lora.run.files import write_json

Finding = tuple[bool, Any]
"""Is it as it should be, and what was found (a number, or words)."""


class Record:
    """A JSON file of values and named checks."""

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[str, Any] = {"checks": []}

    def put(self, **values: Any) -> None:
        self.values.update(values)
        write_json(self.path, self.values)

    def check(self, name: str, look: Callable[[], Finding]) -> None:
        """Looks, and writes down what was found. A look that raises is a failed check, not the end of the others."""
        try:
            ok, found = look()
        except Exception as error:
            traceback.print_exc()
            ok, found = False, f"{type(error).__name__}: {error}"
        print(f"{'ok  ' if ok else 'FAIL'}  {name}: {found}", flush=True)
        self.values["checks"].append({"name": name, "ok": bool(ok), "found": found})
        self.put()
