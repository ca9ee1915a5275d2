"""A row of a data set -> the fields of an example. Pure functions: no file is touched, no image is opened.

What is read, and where it comes from:

| format | problem | images | gold |
|---|---|---|---|
| columns (Hub, EasyR1, R1-V) | `problem`, `question`, ... | `image`, `images`, ... | `answer`, `solution`, ... |
| View-R1, LMM-R1 | `message`: chat turns, or JSON text of them | in the turns | `answer` |
| ms-swift, TRL | `messages` or `prompt`: chat turns | `images` | `solution`, or the assistant's turn |
| VLM-R1, LLaVA | `conversations`: from / value turns | `image` | `answer`, or the gpt turn |
| verl | `prompt`: chat turns | `images` | `reward_model.ground_truth` |

All but the names is shared, so another format is a name in COLUMN_NAMES. Each field uses the first name of its list
that holds a value in the data; a name with a dot looks inside a mapping.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apo_lora.errors import DataError, printable
from apo_lora.family.lookup import reserved_tokens
from apo_lora.recipe.schema import DataSection

IMAGE_MARK = "<image>"

COLUMN_NAMES: Mapping[str, tuple[str, ...]] = {
    "problem": ("problem", "question", "message", "messages", "conversations", "query", "prompt", "text"),
    "answer": ("answer", "solution", "gold", "ground_truth", "reward_model.ground_truth", "label", "target"),
    "image": (
        *("decoded_image", "images", "image", "image_path", "image_paths", "img", "imgs", "img_path", "file_name"),
        *("image_file", "image_url"),
    ),
    "choices": ("choices", "options"),
    "category": ("category", "task", "subject"),
}

_USER_ROLES, _ASSISTANT_ROLES = ("user", "human"), ("assistant", "gpt")
_IMAGE_SUFFIX = re.compile(r"\.(?:png|jpe?g|webp|gif|bmp|tiff?)$", re.IGNORECASE)


class BadRow(Exception):
    """A row that cannot be used: `reason` is counted, `detail` says what was found, in one short line."""

    def __init__(self, reason: str, detail: str):
        self.reason, self.detail = reason, _one_line(detail)
        super().__init__(f"{reason}: {self.detail}")


@dataclass(frozen=True)
class Columns:
    """Which column holds which field; None where the data has no such column."""

    problem: str
    answer: str | None
    image: str | None
    choices: str | None
    category: str | None


@dataclass(frozen=True)
class Fields:
    """A row's content. `images` holds paths, bytes, mappings or references, as the row gave them."""

    problem: str
    answer: str
    choices: tuple[str, ...] | None
    images: Any
    category: str | None
    system: str | None


@dataclass(frozen=True)
class Chat:
    """One exchange: what is asked (images marked in the text), and the reply in the data, if any."""

    problem: str
    images: tuple[Any, ...] = ()
    system: str | None = None
    reply: Any = None


def find_columns(rows: Sequence[Mapping[str, Any]], data: DataSection, source: str) -> Columns:
    """The columns that `rows` (a sample) use: those named in the recipe, else the first usual name with a value."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    chosen: dict[str, str | None] = {}
    problems = []
    for field, usual in COLUMN_NAMES.items():
        wanted = getattr(data, f"{field}_column", None)
        if wanted is not None and not any(_holds(row, wanted) for row in rows):
            problems.append(f"data.{field}_column: no column {wanted!r} with values in {source}; found: {_list(names)}")
        chosen[field] = wanted or next((name for name in usual if any(_holds(row, name) for row in rows)), None)
    is_chat = any(_is_chat(pick(row, chosen["problem"])) for row in rows)
    if chosen["problem"] is None:
        problems.append(f"{source}: no column for the problem; set data.problem_column to one of: {_list(names)}")
    if chosen["answer"] is None and not is_chat:
        problems.append(f"{source}: no column for the answer; set data.answer_column to one of: {_list(names)}")
    # Without this, an image column with an unusual name would silently make a text-only data set.
    images = [name for name in names if any(looks_like_image(row.get(name)) for row in rows)]
    if chosen["image"] is None and images and not is_chat:
        problems.append(f"{source}: column {images[0]!r} seems to contain images; set data.image_column to its name")
    if problems:
        raise DataError(*problems)
    return Columns(**chosen)


def read_row(row: Any, columns: Columns) -> Fields:
    """The fields of one row. Raises BadRow."""
    if isinstance(row, BadRow):  # its source has refused it
        raise row
    if not isinstance(row, Mapping):
        raise BadRow("not a mapping", f"the row is {_short(row)}")
    chat = read_problem(pick(row, columns.problem))
    choices = read_choices(pick(row, columns.choices))
    texts = f"{chat.problem} {chat.system} {choices}"
    if found := next((token for token in reserved_tokens() if token in texts), None):
        raise BadRow("reserved token", f"the text contains {found}")
    gold = pick(row, columns.answer)
    fields = Fields(
        problem=chat.problem,
        answer=read_answer(chat.reply if gold is None else gold, choices),
        choices=choices,
        images=list(chat.images) or pick(row, columns.image),
        category=as_text(pick(row, columns.category)) or None,
        system=chat.system,
    )
    try:  # JSON can encode half a character (\ud800), which neither a tokenizer nor a file accepts
        "".join([fields.problem, fields.answer, fields.system or "", fields.category or "", *(choices or ())]).encode()
    except UnicodeEncodeError:
        raise BadRow("broken text", "an unpaired surrogate character") from None
    return fields


def pick(row: Mapping[str, Any], name: str | None) -> Any:
    """The value of a column; `a.b` looks inside a mapping unless a column has that very name. None if there is none."""
    if name is None or name in row:
        return row.get(name) if name else None
    outer, dot, inner = name.partition(".")
    inside = row.get(outer)
    return pick(inside, inner) if dot and isinstance(inside, Mapping) else None


# --- the problem -----------------------------------------------------------------------------------------------------


def read_problem(value: Any) -> Chat:
    """The problem from plain text, from chat turns, or from JSON text of chat turns."""
    if isinstance(value, str) and re.match(r'\s*\[\s*\{[^{}\[\]]*"(?:role|from)"', value):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow("message is not JSON", str(error)) from None
    if isinstance(value, list | Mapping) and not _is_chat(value):
        raise BadRow("no problem", f"must be text or chat turns, not {_short(value)}")
    chat = _read_turns(value) if _is_chat(value) else Chat(as_text(value))
    if not chat.problem.replace(IMAGE_MARK, "").strip():
        raise BadRow("no problem", "the problem is empty")
    return chat


def _is_chat(value: Any) -> bool:
    if isinstance(value, str):
        return bool(re.match(r'\s*\[\s*\{[^{}\[\]]*"(?:role|from)"', value))
    return isinstance(value, list) and bool(value) and all(isinstance(t, Mapping) and _role(t) for t in value)


def _role(turn: Mapping[str, Any]) -> str | None:
    return turn.get("role") or turn.get("from")


def _read_turns(turns: Sequence[Mapping[str, Any]]) -> Chat:
    asked, system, reply = [], None, None
    for turn in turns:
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        role = _role(turn)
        if role in _USER_ROLES:
            asked.append(_read_content(content))
        elif role in _ASSISTANT_ROLES:
            reply = content if not isinstance(content, list) else _read_content(content)[0]
        elif role == "system":
            system = _read_content(content)[0].strip() or None
        else:
            raise BadRow("unknown role", f"a turn has the role {role!r}")
    if len(asked) != 1:
        raise BadRow("not one question", f"{len(asked)} user turns; one is needed")
    problem, images = asked[0]
    return Chat(problem.strip(), tuple(images), system, reply)


def _read_content(content: Any) -> tuple[str, list[Any]]:
    """Text with a mark for each image part, and the images that the parts carry."""
    if isinstance(content, Mapping):
        raise BadRow("unsupported content", f"a turn with {_short(content)}")
    if not isinstance(content, list):
        return as_text(content), []
    texts, images, num_parts = [], [], 0
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise BadRow("unsupported content", f"a part that is {_short(part)}")
        # Arrow gives every part every key, None where it was absent: the type decides.
        kind = part.get("type") or ("image" if part.get("image") is not None else "text")
        if kind in ("image", "image_url"):
            payloads = (part.get(key) for key in ("image", "image_url", "path", "url", "bytes"))
            images += [payload for payload in payloads if payload is not None][:1]
            texts.append(None)
            num_parts += 1
        elif kind == "text":
            texts.append(as_text(part.get("text") if part.get("text") is not None else part.get("content")))
        else:
            raise BadRow("unsupported content", f"a part of type {kind!r}")
    if num_parts:  # then the parts are the images, and a mark in the text is only text left over
        texts = [text.replace(IMAGE_MARK, "") if text is not None else IMAGE_MARK for text in texts]
    return "".join(texts), images


# --- gold and choices ------------------------------------------------------------------------------------------------


def read_answer(value: Any, choices: tuple[str, ...] | None) -> str:
    """Gold as text: out of its <answer> tags; a whole number that is not a choice's text counts choices from 0."""
    if isinstance(value, list):
        values = [item for item in value if item is not None]
        if len(values) > 1:
            raise BadRow("several answers", f"the answer is a list of {len(values)}")
        value = values[0] if values else None
    if isinstance(value, Mapping):
        raise BadRow("no answer", f"the answer is a mapping with {_list(value)}; name one of them, as in 'answer.text'")
    text = as_text(value).strip()
    if "<answer>" in text:
        text = text.rsplit("<answer>", 1)[1].split("</answer>", 1)[0].strip()
    if not text:
        raise BadRow("no answer", "the answer is empty")
    if choices and isinstance(value, int) and not isinstance(value, bool) and text not in choices:
        if not 0 <= value < len(choices):
            raise BadRow("unparsable gold", f"{value} is not a position among {len(choices)} choices, counted from 0")
        return _letter(value)
    return text


def read_choices(value: Any) -> tuple[str, ...] | None:
    """Choices without their letters, from a list, a mapping of letters, or text (JSON, or one choice a line)."""
    if isinstance(value, str):
        value = _list_in_text(value)
    if isinstance(value, Mapping):
        value = [value[key] for key in sorted(value) if value[key] is not None]
    if not isinstance(value, list | tuple):
        return None
    if odd := [item for item in value if isinstance(item, Mapping | list | bytes)]:
        raise BadRow("unsupported choices", f"a choice must be text, not {_short(odd[0])}")
    texts = [as_text(item).strip() for item in value if item is not None]
    if len(texts) > 26:
        raise BadRow("too many choices", f"{len(texts)}; at most 26 are supported")
    labels = [re.match(rf"(?:\({_letter(i)}\)|{_letter(i)}\s*[.):])\s*(?=\S)", text) for i, text in enumerate(texts)]
    if len(texts) > 1 and all(labels):
        texts = [text[label.end() :] for text, label in zip(texts, labels, strict=True)]
    return tuple(texts) or None


def _list_in_text(text: str) -> list[Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        value = [line for line in text.splitlines() if line.strip()]
    return value if isinstance(value, list) and len(value) > 1 else None


def choice_lines(problem: str, choices: tuple[str, ...] | None) -> str:
    """`A. first` and so on, a line each; empty where the problem shows its choices already."""
    if not choices:
        return ""
    squeezed = " ".join(problem.split())
    shown = (rf"(?<!\w){_letter(i)}\s*[.):]\s*{re.escape(' '.join(c.split()))}" for i, c in enumerate(choices))
    if all(re.search(pattern, squeezed) for pattern in shown):
        return ""
    return "\n".join(f"{_letter(i)}. {choice}" for i, choice in enumerate(choices))


def _letter(index: int) -> str:
    return chr(ord("A") + index)


# --- small things ----------------------------------------------------------------------------------------------------


def as_text(value: Any) -> str:
    """Text of a scalar: 3.0 is "3", and what holds nothing (None, NaN) is ""."""
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return "" if value is None else str(value)


def looks_like_image(value: Any) -> bool:
    """True for a path that ends like an image, for bytes, and for whatever can be read as an image lazily."""
    if isinstance(value, list):
        return bool(value) and looks_like_image(value[0])
    if isinstance(value, str):
        return bool(_IMAGE_SUFFIX.search(value)) and len(value.split()) == 1
    return isinstance(value, bytes) or hasattr(value, "read")


def _holds(row: Mapping[str, Any], name: str) -> bool:
    return pick(row, name) is not None


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _short(value: Any) -> str:
    return _one_line(repr(value), 60)


def _one_line(text: str, most: int = 300) -> str:
    text = printable(" ".join(text.split()))
    return text if len(text) <= most else f"{text[: most - 3]}..."
