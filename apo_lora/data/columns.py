"""Which column of a data set holds what. Looks at names and at the kind of values; opens no file and no image."""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from apo_lora.data.text import content
from apo_lora.errors import DataError
from apo_lora.recipe.schema import DataSection

Row = Mapping[str, Any]

COLUMN_NAMES: Mapping[str, tuple[str, ...]] = {
    "problem": (
        *("problem", "question", "message", "messages", "conversations", "query", "prompt", "question_stem", "text"),
    ),
    "answer": (
        *("answer", "final_answer", "answers", "correct_answer", "gold", "gold_answer", "ground_truth", "gt"),
        *("reward_model.ground_truth", "answerKey", "answer_key", "correct_option", "correct_choice"),
        *("answer_index", "answer_idx", "correct_index", "cop", "solution", "label", "target"),
    ),
    "image": (
        *("decoded_image", "images", "image", "image_bytes", "image_path", "image_paths", "img", "imgs", "img_path"),
        *("file_name", "image_file", "image_base64", "image_url", "image_urls"),
    ),
    "choices": ("choices", "options", "option", "answer_choices", "endings"),
    "category": ("category", "task", "subject"),
}
"""Field -> its usual names; a dot looks inside a mapping. A name that hardly any row fills yields to a later one."""

OFF = "none"
"""In the recipe, in place of the name of the choices' column: the questions are open, whatever the data offer."""

_CHOICE_COLUMN = re.compile(
    r"((?:option|choice|opt?|ending|sol|ans)[_ -]?(?=\w$)|answer[_ -]?(?=[A-Z]$)|(?=[A-Z]$))([A-Za-z\d])", re.I
)
_IMAGE_SUFFIX = r"\.(?:png|jpe?g|jfif|webp|gif|bmp|tiff?|avif|jp2|ppm)"
_MEDIA_SUFFIX = r"\.(?:mp4|mkv|avi|mov|webm|m4v|wav|mp3|flac|ogg|m4a|opus)"
_MEDIA_NAME = re.compile(r"(?:video|audio)s?(?:_(?:path|file|url|bytes))?s?", re.IGNORECASE)
_MAGIC = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|BM....\0\0|II\*\0|MM\0\*|....ftypavi[fs]|P[1-6]\s|\0\0\0\x0cjP", re.DOTALL
)


@dataclass(frozen=True)
class Columns:
    """Which column holds which field; None or () where the data has no such column."""

    problem: str
    answer: str | None
    image: tuple[str, ...] = ()
    """Several where each row has its pictures in columns of their own: they are shown in this order."""
    choices: tuple[str, ...] = ()
    """The column of them all, or one column for each choice: A, B, C, or option_1, option_2."""
    category: str | None = None
    media: tuple[str, ...] = ()
    """Columns with videos or sound, which no model here is shown."""
    unused_images: tuple[str, ...] = ()
    unused_choices: str | None = None
    """The column that `choices: none` switches off."""

    def __str__(self) -> str:
        used = {"problem": self.problem, "answer": self.answer, "image": self.image, "choices": self.choices}
        named = {field: (names,) if isinstance(names, str) else names for field, names in used.items() if names}
        return ", ".join(f"{field} from {', '.join(map(repr, names))}" for field, names in named.items())


def find_columns(rows: Sequence[Row], data: DataSection, source: str) -> Columns:
    """The columns that `rows` use: those named in the recipe, else by their usual names. Raises DataError."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    named = {field: (value,) if isinstance(value, str) else value or () for field, value in data.columns}
    usual = {field: _by_usual_name(field, names, rows) for field in COLUMN_NAMES}
    is_off = named["choices"] == (OFF,)
    columns = Columns(
        problem=next(iter(named["problem"] or usual["problem"]), None),
        answer=next(iter(named["answer"] or usual["answer"]), None),
        image=named["image"] or _with_numbered(usual["image"], names, rows),
        choices=() if is_off else named["choices"] or usual["choices"] or _columns_of_choices(names, rows),
        category=next(iter(usual["category"]), None),
        media=tuple(name for name in names if _is_media(name, rows)),
        unused_choices=next(iter(usual["choices"]), None) if is_off else None,
    )
    columns = replace(columns, unused_images=tuple(_other_images(columns, names, rows)))
    if problems := list(_column_problems(columns, named, names, rows, source)):
        raise DataError(*problems)
    return columns


def _column_problems(
    columns: Columns, named: Mapping[str, Sequence[str]], names: Sequence[str], rows: Sequence[Row], source: str
) -> Iterator[str]:
    for field, wanted in named.items():
        for name in wanted:
            if name != OFF and not _count(rows, name):
                yield f"data.columns.{field}: no column {name!r} with values in {source}; found: {_list(names)}"
    is_chat = any(is_turns(pick(row, columns.problem)) for row in rows)
    for field in ("problem", "answer"):
        if getattr(columns, field) is None and not (field == "answer" and is_chat):
            yield f"{source}: no column for the {field}; set data.columns.{field} to one of: {_list(names)}"
    # Without this, an image column with an unusual name would silently make a text-only data set.
    if columns.unused_images and not columns.image and not (is_chat and _turns_bring_images(rows, columns.problem)):
        found = _list([repr(name) for name in columns.unused_images])
        yield f"{source}: column {found} seems to contain images; set data.columns.image to its name"


def pick(row: Row, name: str | None) -> Any:
    """The value of a column; `a.b` looks inside a mapping unless a column has that very name. None if there is none."""
    if name is None or name in row:
        return row.get(name) if name else None
    outer, dot, inner = name.partition(".")
    inside = content(row.get(outer)) if dot else None
    return pick(inside, inner) if isinstance(inside, Mapping) else None


def pick_choices(row: Row, names: Sequence[str]) -> Any:
    """What a row says of its choices: the value of the column, or label -> choice where each has its own column."""
    if len(names) < 2:
        return pick(row, next(iter(names), None))
    return {name[-1]: pick(row, name) for name in names} if _count_on(names) else [pick(row, name) for name in names]


def is_turns(value: Any) -> bool:
    """Chat turns, or JSON text of them."""
    if isinstance(value, str):
        return bool(re.match(r'\s*\[\s*\{[^{}\[\]]*"(?:role|from)"', value))
    return isinstance(value, list) and bool(value) and all(isinstance(t, Mapping) and role(t) for t in value)


def role(turn: Row) -> str | None:
    return turn.get("role") or turn.get("from")


def is_base64_image(text: str) -> bool:
    """Whether a text begins as an image in bare base64 does, which MMBench and many JSONL files hold."""
    head = "".join(text[:100].split())[:64]
    return bool(re.fullmatch(r"[\w+/-]{64}", head, re.ASCII)) and bool(_MAGIC.match(base64.b64decode(head, "-_")))


def looks_like_image(value: Any) -> bool:
    """True for a path that ends like an image, and for an image's bytes, bare or in base64, in a list or a mapping."""
    value = content(value)
    if isinstance(value, list):
        return bool(value) and looks_like_image(value[0])
    if isinstance(value, Mapping):
        return any(looks_like_image(value.get(key)) for key in ("bytes", "path", "url"))
    if isinstance(value, str):
        is_path = re.search(rf"{_IMAGE_SUFFIX}(?:\?|$)", value, re.IGNORECASE) and len(value.split()) == 1
        return bool(is_path) or value.startswith("data:image/") or is_base64_image(value)
    return isinstance(value, bytes) and bool(_MAGIC.match(value))


def holds(row: Row, name: str) -> bool:
    """Whether a column has more than a number or nothing."""
    value = content(pick(row, name))
    if isinstance(value, Mapping):
        return any(inner is not None for inner in value.values())
    return isinstance(value, str | bytes | list) and bool(value)


def _count(rows: Sequence[Row], name: str) -> int:
    return sum(pick(row, name) is not None for row in rows)


def _by_usual_name(field: str, names: Sequence[str], rows: Sequence[Row]) -> tuple[str, ...]:
    """The first of the usual names that at least a twentieth as many rows fill as any other does."""
    spelled = {name.lower(): name for name in reversed(names)} | {name: name for name in names}
    found = [spelled.get(name) or spelled.get(name.lower(), name) for name in COLUMN_NAMES[field]]
    counts = {name: _count(rows, name) for name in found if name.partition(".")[0] in spelled}
    most = max(counts.values(), default=0)
    return next(((name,) for name, count in counts.items() if most and count * 20 >= most), ())


def _columns_of_choices(names: Sequence[str], rows: Sequence[Row]) -> tuple[str, ...]:
    """Columns A, B, C, D, or option1, option2, ..., or the like: one after the other from A, a, 0 or 1 on."""
    families: dict[str, list[str]] = {}
    for name in names:
        if (match := _CHOICE_COLUMN.fullmatch(name)) and (match[1] or match[2].isupper()):
            families.setdefault(match[1], []).append(name)
    for family in families.values():
        family.sort()
        starts = family[0][-1] in "Aa01" and len(family) > 1 and all(_count(rows, name) for name in family[:2])
        if starts and _count_on(family):
            return tuple(family)
    return ()


def _count_on(names: Sequence[str]) -> bool:
    """Whether the last characters are one after the other: a, b, c or 1, 2, 3."""
    return [name[-1] for name in names] == [chr(ord(names[0][-1]) + i) for i in range(len(names))]


def _with_numbered(found: tuple[str, ...], names: Sequence[str], rows: Sequence[Row]) -> tuple[str, ...]:
    """`image` with image2, image_3 and so on; the numbered ones alone where there is no `image`."""
    for stem in found or COLUMN_NAMES["image"]:
        numbered = {name: int(match[1]) for name in names if (match := re.fullmatch(rf"{stem}[_-]?(\d+)", name))}
        images = [
            name for name in sorted(numbered, key=numbered.get) if any(looks_like_image(r.get(name)) for r in rows)
        ]
        if images:
            return (*found, *images)
    return found


def _is_media(name: str, rows: Sequence[Row]) -> bool:
    if _MEDIA_NAME.fullmatch(name):
        return any(holds(row, name) for row in rows)
    return any(_is_media_path(row.get(name)) for row in rows)


def _is_media_path(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and _is_media_path(value[0])
    path = value.get("path") if isinstance(value, Mapping) else value
    return isinstance(path, str) and bool(re.fullmatch(rf"\S{{1,500}}{_MEDIA_SUFFIX}", path, re.IGNORECASE))


def _other_images(columns: Columns, names: Sequence[str], rows: Sequence[Row]) -> Iterator[str]:
    """Columns that look like images and are not read; not the path or the URL of an image that is."""
    used = {columns.problem, columns.answer, columns.category, *columns.image, *columns.choices}
    for name in names:
        row = next((row for row in rows if row.get(name) is not None), {})
        if name in used or not looks_like_image(row.get(name)):
            continue
        pair = [_file_name(value) for value in (row[name], pick(row, next(iter(columns.image), None)))]
        is_the_same = pair[0] == pair[1] if all(pair) else columns.image and name in COLUMN_NAMES["image"]
        if not is_the_same:
            yield name


def _file_name(value: Any) -> str | None:
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return value.rsplit("/", 1)[-1] if isinstance(value, str) and len(value) < 500 else None


def _turns_bring_images(rows: Sequence[Row], problem: str) -> bool:
    return any(re.search(r"['\"]type['\"]: ?['\"]image", str(pick(row, problem))) for row in rows)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
