"""Completions as the page shows them, with their pictures, within a size.

Everything is plain JSON, which page/gallery.js turns into cards by textContent alone.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from tqdm.auto import tqdm

from apo_lora.data.thumbnails import thumbnail_url
from apo_lora.report.answers import OUTCOMES, Pair, Tally, paired, tallies
from apo_lora.report.runs import OWN_ANSWERS, Row, Run, answer_files, is_number, prompt_groups, read_answers
from apo_lora.rewards.scores import FORMAT_REWARD

LONGEST_SIDE = 320
"""Pixels of a picture on the page."""
LONGEST_TEXT = 12_000
"""Characters of one completion on the page."""
TRAINING_GROUPS = 24
"""Prompts of the last steps that are shown."""


@dataclass(frozen=True)
class Source:
    """What can be looked through at once: one record of answers of one run."""

    title: str
    items: list[Row]
    total: int
    """Items that there are; `items` may be fewer."""
    tallies: list[Tally] = field(default_factory=list)
    is_training: bool = False
    """Completions of the last steps, where the tuned model has no held-out answers."""


@dataclass(frozen=True)
class Gallery:
    sources: list[Source]
    pictures: list[str]
    """data: URLs, each once; items name them by place."""

    def to_json(self) -> str:
        """For a script element: no character of it can end the element."""
        shown = [{"items": source.items, "total": source.total} for source in self.sources]
        return _json({"sources": shown, "pictures": self.pictures})


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def gallery(runs: Sequence[Run], most_bytes: int) -> Gallery:
    """What fits into `most_bytes`, source by source and outcome by outcome in turn."""
    found = [(run, title, pairs) for run in runs for title, pairs in _recorded(run)]
    items: list[dict[int, Row]] = [{} for _ in found]
    pictures, size = _Pictures(), 0
    order = _in_turn([pairs for _, _, pairs in found])
    for number, place in tqdm(order, "pictures", sum(len(p) for _, _, p in found), delay=2, leave=False):
        run, _, pairs = found[number]
        num_pictures = len(pictures.urls)
        item = _item(pairs[place], run, pictures)
        size += _size(item)
        if size + pictures.size > most_bytes:
            pictures.keep_first(num_pictures)
            break
        items[number][place] = item
    sources = [
        Source(
            _source_title(run, title, len(runs)),
            [of_source[place] for place in sorted(of_source)],
            total=len(pairs),
            tallies=tallies(pairs),
            is_training=title == _TRAINING,
        )
        for of_source, (run, title, pairs) in zip(items, found, strict=True)
    ]
    return Gallery(sources, pictures.urls)


def _source_title(run: Run, title: str, num_runs: int) -> str:
    if num_runs == 1:
        return title
    return run.name if title == OWN_ANSWERS else f"{run.name}, {title}"


def _in_turn(sources: Sequence[Sequence[Pair]]) -> Iterator[tuple[int, int]]:
    """(source, place of the pair): one of each source and then the next of each, and so with the outcomes of a source.

    Where not all fit, every filter has something to show.
    """

    def by_outcome(pairs: Sequence[Pair]) -> Iterator[int]:
        places = ([n for n, pair in enumerate(pairs) if pair.outcome == outcome] for outcome in OUTCOMES)
        return (place for turn in zip_longest(*places) for place in turn if place is not None)

    turns = zip_longest(*map(by_outcome, sources))
    return ((number, place) for turn in turns for number, place in enumerate(turn) if place is not None)


_TRAINING = "training, last steps"


def _recorded(run: Run) -> Iterator[tuple[str, list[Pair]]]:
    answers = {title: paired(read_answers(path)) for title, path in answer_files(run).items()}
    yield from answers.items()
    if not any(pair.tuned for pairs in answers.values() for pair in pairs):
        last: list[list[Row]] = []
        for group in prompt_groups(run):
            last = [*last[-TRAINING_GROUPS + 1 :], group]
        # Newest first; in a training row the tuned model, as far as it was, has answered.
        yield _TRAINING, [Pair(None, row) for group in reversed(last) for row in group]


def _size(value: object) -> int:
    return len(_json(value).encode("utf-8", "replace"))


def _item(pair: Pair, run: Run, pictures: "_Pictures") -> Row:
    row = pair.either
    choices = row.get("choices")
    return {
        "heading": _heading(row),
        "problem": row.get("problem", row.get("prompt", "")),
        "choices": list(map(str, choices)) if choices else None,
        "gold": str(row.get("gold", "")),
        "pictures": [pictures.place(path, run) for path in row.get("images") or []],
        "outcome": pair.outcome,
        "isRight": bool(row["correct"]),
        "answers": [
            _answer(name, row, run) for name, row in (("base", pair.base), ("tuned", pair.tuned)) if row is not None
        ],
    }


def _heading(row: Row) -> str:
    if "step" in row:
        return f"step {row['step']}, row {row['row']}"
    sample = f", sample {row['sample'] + 1}" if row.get("sample") else ""
    category = f", {row['category']}" if row.get("category") else ""
    return f"{row['set']} {row['row']}{sample}{category}"


def _answer(model: str, row: Row, run: Run) -> Row:
    text = row.get("text", row.get("completion", ""))
    cut = len(text) - LONGEST_TEXT
    return {
        "model": "in training" if "step" in row else model,
        "isRight": bool(row["correct"]),
        "answer": row.get("answer"),
        "text": text if cut <= 0 else f"{text[:LONGEST_TEXT]} ... ({cut:,} more characters)",
        "length": row.get("length"),
        "truncated": bool(row.get("truncated")),
        "facts": list(_facts(row, run)),
    }


def _facts(row: Row, run: Run) -> Iterator[str]:
    """What it earned, and in training what it weighed."""
    if "rewards" in row:
        names = run.recipe.rewards.functions
        yield "rewards: " + ", ".join(f"{n} {value:g}" for n, value in zip(names, row["rewards"], strict=False))
    else:
        form = FORMAT_REWARD if row.get("well_formatted") else 0
        yield f"rewards: accuracy {int(bool(row['correct']))}, format {form:g}"
    if row.get("greedy"):
        yield "greedy"
    if is_number(row.get("entropy")):
        yield f"entropy {row['entropy']:.3f} nats per token"
    if "advantage" in row:
        yield f"advantage {row['advantage']:+.2f}"
        yield f"KL weight {row['kl_weight']:.2f}"
        yield f"STCR x {row['stcr_multiplier']:.3g}"


_AROUND_A_URL = len('"", ')


class _Pictures:
    """Small copies, each made once and kept once. `size` is what they add to the page, in bytes."""

    def __init__(self):
        self._urls: dict[str, int] = {}
        self.size = 0
        self._places: dict[Path, int | None] = {}

    @property
    def urls(self) -> list[str]:
        return list(self._urls)

    def place(self, path: str, run: Run) -> int | None:
        """Where its URL stands; None for a file that is gone or cannot be read."""
        file = next((f for f in (run.folder.path / path, Path(path)) if f.is_file()), None)
        if file is None:
            return None
        file = file.resolve()
        if file not in self._places:
            self._places[file] = self._place_of_url(thumbnail_url(file, LONGEST_SIDE))
        return self._places[file]

    def keep_first(self, number: int) -> None:
        """Forgets those that came later."""
        for url in self.urls[number:]:
            del self._urls[url]
            self.size -= len(url) + _AROUND_A_URL
        self._places = {file: place for file, place in self._places.items() if place is None or place < number}

    def _place_of_url(self, url: str | None) -> int | None:
        if url is None:
            return None
        if url not in self._urls:  # runs of one data set hold copies of the same pictures
            self._urls[url] = len(self._urls)
            self.size += len(url) + _AROUND_A_URL
        return self._urls[url]
