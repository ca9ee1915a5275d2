"""Held-out items with their picture and the models' answers side by side, as HTML for a cell's output."""

import html
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from apo_lora.data.thumbnails import thumbnail_url

LARGEST_SIDE = 224  # pixels of a picture in the page; the model has seen the whole

# Inherited colours and half-transparent lines are readable on a light page and on a dark one.
_CARD = "display:flex;gap:1em;flex-wrap:wrap;padding:.8em 0;border-top:1px solid rgba(128,128,128,.5)"
_QUESTION = "flex:0 1 12em;min-width:0"
_ANSWER = "flex:1 1 14em;min-width:0"
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;max-height:16em;overflow-y:auto;margin:.3em 0"


def answer_cards(rows: Iterable[Mapping[str, Any]], folder: Path) -> str:
    """One card per item. `rows` are those of answers.jsonl, an item's together; pictures are relative to `folder`."""
    return "".join(_card(list(answers), folder) for _, answers in groupby(rows, key=lambda row: row["row"]))


def _card(answers: list[Mapping[str, Any]], folder: Path) -> str:
    item = answers[0]
    pictures = "".join(_picture(folder / path) for path in item["images"])
    return (
        f'<div style="{_CARD}"><div style="flex:0 0 auto">{pictures}</div>'
        f'<div style="{_QUESTION}"><b>{html.escape(item["problem"])}</b><p>right: {html.escape(item["gold"])}</p></div>'
        + "".join(_answer(answer) for answer in answers)
        + "</div>"
    )


def _answer(answer: Mapping[str, Any]) -> str:
    verdict = "✓ right" if answer["correct"] else "✗ wrong"
    cut = ", cut" if answer["truncated"] else ""
    return (
        f'<div style="{_ANSWER}"><b>{html.escape(answer["model"])}</b>: {verdict}, {answer["length"]} tokens{cut}'
        f'<div style="{_TEXT}">{html.escape(answer["text"])}</div></div>'
    )


def _picture(path: Path) -> str:
    url = thumbnail_url(path, LARGEST_SIDE)
    return f'<img alt="picture of the item" src="{url}">' if url else "(no picture)"
