"""gallery.html: items with their pictures and both models' answers, in one file, without a script. No torch."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apo_lora.data.thumbnails import thumbnail_url
from apo_lora.run.directory import write_atomically

ITEMS_PER_GROUP = 24
"""Of each set and each of GROUPS: bounds the file to some megabytes."""
THUMBNAIL = 320  # pixels
TEXT_LIMIT = 6000  # characters

GROUPS = ("Right by the tuned model alone", "Right by the base alone", "Wrong by both", "Right by both")
BASE_ALONE = ("Wrong", "Right")

Row = Mapping[str, Any]
Item = dict[str, Row]
"""Model -> its greedy answer."""

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 70em; margin: 1.5em auto; padding: 0 1em; color: #222 }}
article {{ border-top: 1px solid #ccc; padding: .8em 0; display: grid; grid-template-columns: 20em 1fr; gap: 1em }}
img {{ max-width: 100%; display: block; margin-bottom: .5em }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.4 ui-monospace, monospace; margin: .3em 0 }}
.answers {{ display: grid; grid-template-columns: repeat({models}, 1fr); gap: 1em }}
.right {{ border-left: 4px solid #2a7 }} .wrong {{ border-left: 4px solid #c43 }}
.answers > div {{ padding-left: .7em }}
summary {{ cursor: pointer; font-weight: 600; margin: .6em 0 }} small {{ color: #666 }}
@media (max-width: 50em) {{ article, .answers {{ grid-template-columns: 1fr }} }}
</style>
<h1>{title}</h1>
<p>Greedy answers. Of each group the first {most} items.</p>
{sections}
</html>
"""


def write_gallery(rows: Sequence[Row], run_dir_path: Path, target: Path) -> None:
    """Writes the page to `target`. `rows` are those of answers.jsonl; their pictures are found from the run directory.

    All text is escaped, pictures are small and inside the file; there is no script.
    """
    items: dict[str, dict[int, Item]] = {}
    for row in rows:
        if row["sample"] == 0:
            items.setdefault(row["set"], {}).setdefault(row["row"], {})[row["model"]] = row
    models = max((len(item) for of_set in items.values() for item in of_set.values()), default=1)
    sections = [_section(title, list(of_set.values()), run_dir_path) for title, of_set in items.items()]
    title = html.escape(f"{run_dir_path.resolve().name}: {target.parent.name}")
    page = PAGE.format(title=title, models=models, most=ITEMS_PER_GROUP, sections="\n".join(sections))
    write_atomically(target, page)


def _section(title: str, items: Sequence[Item], root: Path) -> str:
    paired = all(len(item) == 2 for item in items)
    names = GROUPS if paired else BASE_ALONE
    groups: dict[str, list[Item]] = {name: [] for name in names}
    for item in items:
        groups[_group(item) if paired else BASE_ALONE[next(iter(item.values()))["correct"]]].append(item)
    parts = []
    for place, (name, members) in enumerate(groups.items()):
        shown = "\n".join(_article(item, root) for item in members[:ITEMS_PER_GROUP])
        is_open = " open" if place == 0 else ""
        parts.append(f"<details{is_open}><summary>{name}: {len(members)} of {len(items)}</summary>\n{shown}</details>")
    return f"<h2>{html.escape(title)}</h2>\n" + "\n".join(parts)


def _group(item: Item) -> str:
    base, tuned = item["base"]["correct"], item["tuned"]["correct"]
    if base != tuned:
        return GROUPS[0] if tuned else GROUPS[1]
    return GROUPS[3] if base else GROUPS[2]


def _article(item: Item, root: Path) -> str:
    about = next(iter(item.values()))
    pictures = "".join(_picture(root / path) for path in about["images"])
    choices = "".join(f"\n{chr(65 + i)}. {choice}" for i, choice in enumerate(about["choices"] or []))
    answers = "".join(_answer(model, item[model]) for model in ("base", "tuned") if model in item)
    category = f", {html.escape(about['category'])}" if about["category"] else ""
    return (
        f"<article><div>{pictures}<small>row {about['row']}{category}</small>"
        f"<pre>{_text(about['problem'] + choices)}</pre><b>gold: {_text(about['gold'])}</b></div>"
        f'<div class="answers">{answers}</div></article>'
    )


def _answer(model: str, row: Row) -> str:
    verdict = "right" if row["correct"] else "wrong"
    marks = [f"{row['length']} tokens", *(["truncated"] if row["truncated"] else [])]
    found = _text(row["answer"]) if row["answer"] is not None else "none found"
    return (
        f'<div class="{verdict}"><b>{model}: {verdict}</b> <small>{", ".join(marks)}</small>'
        f"<pre>{_text(row['text'])}</pre><small>answer read: {found}</small></div>"
    )


def _text(text: str) -> str:
    cut = text if len(text) <= TEXT_LIMIT else f"{text[:TEXT_LIMIT]} ... ({len(text) - TEXT_LIMIT} more characters)"
    return html.escape(cut)


def _picture(path: Path) -> str:
    """A thumbnail; a word where the file is gone or damaged."""
    url = thumbnail_url(path, THUMBNAIL)
    return f'<img alt="" src="{url}">' if url else f"<small>(no picture at {html.escape(str(path))})</small>"
