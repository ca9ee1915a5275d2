"""Answers with their images, as HTML: on the report's page, in gallery.html of `apo-lora eval`, in notebook cells.

Text from a model or a data set is escaped. A page's policy allows only gallery.js to run, which shows and hides
what is there. No torch.
"""

import base64
import functools
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from tqdm.auto import tqdm

from apo_lora.evaluation.figures import OUTCOMES, AnswerPair, AnswerRow, paired
from apo_lora.rewards.scores import FORMAT_REWARD
from apo_lora.run.files import write_atomically
from apo_lora.run.pictures import Thumbnail, thumbnail

MOST_BYTES = 5_000_000
"""Of a page."""
LONGEST_SIDE = 320
"""Pixels, longest side of an image."""
LONGEST_TEXT = 12_000
"""Characters of one text."""


@dataclass(frozen=True)
class AnswerSource:
    """What can be looked through at once: one record of answers of one run."""

    title: str
    pairs: Sequence[AnswerPair]
    root: Path
    """Paths of images start here."""
    reward_names: Sequence[str] = ()
    """Of the rewards in rows of completions.jsonl."""
    note: str = ""

    @property
    def tallies(self) -> dict[str, Counter]:
        """Set to number of pairs by outcome, of the items that both models answered."""
        counts: dict[str, Counter] = {}
        for pair in self.pairs:
            if pair.base and pair.tuned:
                counts.setdefault(pair.base["set"], Counter())[pair.outcome] += 1
        return counts


def gallery(sources: Sequence[AnswerSource], most_bytes: int) -> Markup:
    """What fits into `most_bytes`, source by source and outcome by outcome in turn, with the controls of gallery.js.

    A page contains every image once.
    """
    items: list[dict[int, Markup]] = [{} for _ in sources]
    pictures: dict[Thumbnail, int] = {}
    small_copy = functools.cache(_thumbnail)
    size = 0
    total = sum(len(source.pairs) for source in sources)
    for number, place in tqdm(_in_turn(sources), "images", total, delay=2, leave=False):
        source = sources[number]
        pair = source.pairs[place]
        wanted = [small_copy(file) for file in _picture_files(pair, source)]
        new = [picture for picture in dict.fromkeys(wanted) if picture and picture not in pictures]
        numbers = pictures | {picture: len(pictures) + n for n, picture in enumerate(new)}
        item = _item(pair, source, [(picture, numbers.get(picture)) for picture in wanted])
        size += _num_bytes(item) + sum(len(picture.url) + 100 for picture in new)
        if size > most_bytes:
            break
        items[number][place], pictures = item, numbers
    shown = [[of_source[place] for place in sorted(of_source)] for of_source in items]
    return _template().gallery(sources, shown, list(pictures))


def write_gallery(rows: Iterable[AnswerRow], run_dir_path: Path, target: Path) -> None:
    """Writes the greedy answers among `rows`, those of answers.jsonl, as a separate page, with a source per set."""
    by_set: dict[str, list[AnswerRow]] = {}
    for row in rows:
        if row["sample"] == 0:
            by_set.setdefault(row["set"], []).append(row)
    sources = [AnswerSource(title, paired(of_set), run_dir_path) for title, of_set in by_set.items()]
    style, script = page_file("page.css") + page_file("gallery.css"), page_file("gallery.js")
    title = f"{run_dir_path.resolve().name}: {target.parent.name}"
    content = gallery(sources, MOST_BYTES - 100_000)
    page = _template().page(page_head(title, "apo-lora eval", style, script), title, script, content)
    write_atomically(target, readable(page))


def static_gallery(rows: Iterable[AnswerRow], root: Path) -> str:
    """All of `rows` without a script or anything around it, for the output of a notebook's cell."""
    source = AnswerSource("", paired(rows), root)
    items = [
        _item(pair, source, [(_thumbnail(file), None) for file in _picture_files(pair, source)])
        for pair in source.pairs
    ]
    return readable(f'<style>{page_file("gallery.css")}</style><div class="gallery">{Markup().join(items)}</div>')


# --- parts of a page -------------------------------------------------------------------------------------------------


def page_file(name: str) -> Markup:
    """One of our own files in page/, to stand inside a page as it is."""
    return Markup(files("apo_lora.evaluation").joinpath("page", name).read_text(encoding="utf-8"))


def page_head(title: str, generator: str, style: Markup, script: Markup) -> Markup:
    """A page's beginning up to its body, whose only script is to be `script`."""
    return _template().head(title, generator, style, _content_policy(style, script))


def _content_policy(style: str, script: str) -> str:
    """Content-Security-Policy that allows these two elements and embedded images, and nothing else."""

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; img-src data:; style-src {digest(style)}; script-src {digest(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def readable(page: str) -> str:
    """Without unpaired surrogates, which a model can write but a file cannot hold."""
    return page.encode("utf-8", "replace").decode()


@functools.cache
def _template() -> Any:
    """The macros of gallery.html as functions that return Markup."""
    environment = Environment(
        loader=PackageLoader("apo_lora.evaluation", "page"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("gallery.html").module


# --- items -----------------------------------------------------------------------------------------------------------


def _in_turn(sources: Sequence[AnswerSource]) -> Iterator[tuple[int, int]]:
    """(source, place of the pair): one of each source and then the next of each, and so with the outcomes of a source.

    Where not all fit, every filter has something to show.
    """

    def by_outcome(source: AnswerSource) -> Iterator[int]:
        places = ([n for n, pair in enumerate(source.pairs) if pair.outcome == outcome] for outcome in OUTCOMES)
        return (place for turn in zip_longest(*places) for place in turn if place is not None)

    turns = zip_longest(*map(by_outcome, sources))
    return ((number, place) for turn in turns for number, place in enumerate(turn) if place is not None)


def _item(pair: AnswerPair, source: AnswerSource, pictures: Sequence[tuple[Thumbnail | None, int | None]]) -> Markup:
    """`pictures` come with their number on the page, or None where each is embedded in its item."""
    answers = [
        {
            "model": "in training" if "step" in row else row["model"],
            "row": row,
            "text": _cut(row.get("text", row.get("completion", ""))),
            "facts": _facts(row, source.reward_names),
        }
        for row in pair
        if row is not None
    ]
    return _template().item(_heading(pair.either), pair.outcome, pair.either, pictures, answers)


def _heading(row: AnswerRow) -> str:
    if "step" in row:
        return f"step {row['step']}, row {row['row']}"
    sample = f", sample {row['sample']}" if row.get("sample") else ""
    category = f", {row['category']}" if row.get("category") else ""
    return f"{row['set']} {row['row']}{sample}{category}"


def _cut(text: str) -> str:
    excess = len(text) - LONGEST_TEXT
    return text if excess <= 0 else f"{text[:LONGEST_TEXT]} ... ({excess:,} more characters)"


def _facts(row: AnswerRow, reward_names: Sequence[str]) -> list[str]:
    """What the completion earned, and in training what it weighed."""
    rewards = dict(zip(reward_names, row.get("rewards", ()), strict=False)) or {
        "accuracy": int(bool(row["correct"])),
        "format": FORMAT_REWARD if row.get("well_formatted") else 0,
    }
    facts = ["rewards: " + ", ".join(f"{name} {value:g}" for name, value in rewards.items())]
    if row.get("greedy"):
        facts.append("greedy")
    if row.get("entropy") is not None:
        facts.append(f"entropy {row['entropy']:.3f} nats per token")
    if "advantage" in row:
        facts.append(f"advantage {row['advantage']:+.2f}")
        facts.append(f"KL weight {row['kl_weight']:.2f}")
        facts.append(f"STCR x {row['stcr_multiplier']:.3g}")
    return facts


def _picture_files(pair: AnswerPair, source: AnswerSource) -> list[Path | None]:
    """None for a file that is gone. Paths are from the source's root on, or from here."""
    places = [(source.root / path, Path(path)) for path in pair.either.get("images") or []]
    return [next((file.resolve() for file in of_picture if os.path.isfile(file)), None) for of_picture in places]


def _thumbnail(file: Path | None) -> Thumbnail | None:
    return thumbnail(file, LONGEST_SIDE) if file else None


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))
