"""RUN/evaluations/NAME: what was asked for (settings.json), every answer (answers.jsonl), the figures (eval.json).

Items are answered in batches. A batch counts only as a whole, and has its own seed, so an interrupted evaluation ends
with the result it would have had.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from apo_lora.data.examples import Example
from apo_lora.errors import RunDirError
from apo_lora.evaluation.figures import MODELS, AnswerRow
from apo_lora.run.files import append_jsonl, locked, read_jsonl, write_json, write_jsonl

Key = tuple[str, str, int, int]


class EvaluationBatch(NamedTuple):
    model: str
    title: str
    """Of the set."""
    sample: int
    """0 is the greedy completion, 1 and on are sampled ones."""
    examples: Sequence[Example]

    @property
    def keys(self) -> list[Key]:
        return [(self.title, self.model, example.row, self.sample) for example in self.examples]

    def seed(self, seed: int) -> int:
        """The same for both models, so that they differ by skill and not by chance."""
        words = f"{seed}/{self.title}/{self.sample}/{self.examples[0].row}"
        return int.from_bytes(hashlib.sha256(words.encode()).digest()[:6], "big")


def planned(sets: Mapping[str, Sequence[Example]], samples: int, batch_size: int) -> list[EvaluationBatch]:
    """Every batch, in the order in which they are answered."""
    return [
        EvaluationBatch(model, title, sample, examples[start : start + batch_size])
        for model in MODELS
        for title, examples in sets.items()
        for sample in range(samples + 1)
        for start in range(0, len(examples), batch_size)
    ]


class EvaluationFolder:
    def __init__(self, folder: Path):
        self.folder = folder
        self.settings = folder / "settings.json"
        self.answers = folder / "answers.jsonl"
        self.figures = folder / "eval.json"
        self.gallery = folder / "gallery.html"
        self.images = folder / "images"

    def open(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Records the settings, or finds the same ones there. Raises RunDirError for other ones.

        `settings["tuned"]` is left out where only the base is evaluated; the tuned model can be added later. Returns
        the settings with what the folder knows of it.
        """
        if self.rows():
            there = self._read_settings()
            settings, there = _tuned(there) | settings, _tuned(settings) | there
            if changed := _differences(there, settings):
                raise RunDirError(
                    f"{self.folder}: has answers with other settings ({'; '.join(changed[:3])}); choose another "
                    "--name, or remove that folder"
                )
        write_json(self.settings, settings)
        return settings

    def _read_settings(self) -> dict[str, Any]:
        try:
            return json.loads(self.settings.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise RunDirError(
                f"{self.folder}: has answers but no readable {self.settings.name}; remove the folder"
            ) from None

    def rows(self) -> list[dict[str, Any]]:
        return list(read_jsonl(self.answers)) if self.answers.is_file() else []

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder, and keeps another evaluation out of it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirError(f"{self.folder}: cannot be created ({error.strerror}); choose another --name") from None
        with locked(self.folder):
            yield

    def add(self, rows: Iterable[AnswerRow]) -> None:
        append_jsonl(self.answers, rows)

    def drop_parts(self, plan: Sequence[EvaluationBatch]) -> set[Key]:
        """Takes out what a kill left of a batch. Returns the keys of all answers that stay."""
        rows = {_key(row): row for row in self.rows()}
        whole = {key for batch in plan if all(key in rows for key in batch.keys) for key in batch.keys}
        kept = [row for key, row in rows.items() if key in whole]
        if self.answers.is_file():  # also without its unfinished last line
            write_jsonl(self.answers, kept)
        return whole


def _tuned(settings: dict[str, Any]) -> dict[str, Any]:
    return {"tuned": settings["tuned"]} if settings.get("tuned") else {}


def _key(row: AnswerRow) -> Key:
    return row["set"], row["model"], row["row"], row["sample"]


def _differences(there: Any, now: Any, name: str = "") -> list[str]:
    """`recipe.grpo.temperature: 1.0 before, 0.7 now`, for every value that is not the same."""
    if isinstance(there, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*there, *now]))
        return [d for key in keys for d in _differences(there.get(key), now.get(key), f"{name}.{key}".lstrip("."))]
    return [] if there == now else [f"{name}: {_short(there)} before, {_short(now)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
