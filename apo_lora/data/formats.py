"""A row of a data set -> the fields of an example. Pure functions: no file is touched, no image is opened.

What is read, and where it comes from:

| format | problem | images | gold |
|---|---|---|---|
| columns (Hub, EasyR1, R1-V) | `problem`, `question`, ... | `image`, `images`, ... | `answer`, `solution`, ... |
| View-R1, LMM-R1 | `message`: chat turns, or JSON text of them | in the turns | `answer` |
| ms-swift, TRL | `messages` or `prompt`: chat turns | `images` | `solution`, or the assistant's turn |
| VLM-R1, LLaVA | `conversations`: from / value turns | `image` | `answer`, or the gpt turn |
| verl | `prompt`: chat turns | `images` | `reward_model.ground_truth` |
| MMMU | `question` with `<image 2>`, options with them | `image_1`, `image_2`, ... | `answer` |

All but the names (columns.py) is shared. Choices are read in choices.py; which of them the gold names is decided by all
rows of a data set together (golds.py).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from apo_lora.data.choices import Choices, letter, read_choices
from apo_lora.data.columns import Columns, holds, is_turns, pick, pick_choices, role
from apo_lora.data.golds import gold_items
from apo_lora.data.images import single_values
from apo_lora.data.notices import is_lost_letter
from apo_lora.data.text import BadRow, as_text, short
from apo_lora.family.lookup import reserved_tokens

IMAGE_MARK = "<image>"

_USER_ROLES, _ASSISTANT_ROLES = ("user", "human"), ("assistant", "gpt")
_NUMBERED_MARK = re.compile(r"<image[ _]?(\d{1,2})>")
_MEDIA_MARK = re.compile(r"<(?:video|audio)(?:[ _]?\d{1,2})?>", re.IGNORECASE)


@dataclass(frozen=True)
class Fields:
    """A row's content. `images` holds paths, bytes, mappings or references, as the row gave them, or a list of them."""

    problem: str
    gold: tuple[str, ...]
    """As the row has it, several texts where it is a list; golds.py makes the answer of it."""
    gold_is_text: bool
    """Not a number of the file's format."""
    choices: Choices | None
    images: tuple[Any, ...]
    category: str | None
    system: str | None


@dataclass(frozen=True)
class Chat:
    """One exchange: what is asked (images marked in the text), and the reply in the data, if any."""

    problem: str
    images: tuple[Any, ...] = ()
    system: str | None = None
    reply: Any = None


def read_row(row: Any, columns: Columns) -> Fields:
    """The fields of one row. Raises BadRow."""
    if isinstance(row, BadRow):  # its source has refused it
        raise row
    if not isinstance(row, Mapping):
        raise BadRow("not a mapping", f"the row is {short(row)}")
    chat = read_problem(pick(row, columns.problem))
    choices = read_choices(pick_choices(row, columns.choices))
    images = chat.images or tuple(pick(row, name) for name in columns.image)
    marked = _MEDIA_MARK.search(chat.problem)
    media = marked[0] if marked else next((name for name in columns.media if holds(row, name)), None)
    if media and not chat.images and not any(holds(row, name) for name in columns.image):
        raise BadRow("video or sound", f"the row has {media!r} and no image; the model is shown only images")
    gold = pick(row, columns.answer)
    gold = chat.reply if gold is None else gold
    fields = Fields(
        problem=chat.problem,
        gold=gold_items(gold, choices),
        gold_is_text=isinstance(gold, str),
        choices=choices,
        images=images,
        category=as_text(pick(row, columns.category)) or None,
        system=chat.system,
    )
    off = columns.unused_choices
    if off and holds(row, off) and is_lost_letter(", ".join(fields.gold), fields.problem):
        raise BadRow(
            "choices not read", f"the answer is a letter of {off!r}, which data.columns.choices=none leaves out"
        )
    fields = _with_marks(fields)
    texts = "\n".join([fields.problem, fields.system or "", *(choices.texts if choices else ())])
    if found := next((token for token in reserved_tokens() if token in texts), None):
        raise BadRow("reserved token", f"the text contains {found}")
    try:  # JSON can encode half a character (\ud800), which neither a tokenizer nor a file accepts
        "".join([texts, *fields.gold, fields.category or ""]).encode()
    except UnicodeEncodeError:
        raise BadRow("broken text", "an unpaired surrogate character") from None
    return fields


def _with_marks(fields: Fields) -> Fields:
    """`<image 2>` names the second image: its first mention becomes a mark, and the images follow the mentions."""
    options = fields.choices.texts if fields.choices else ()
    problem = fields.problem
    if any(map(_NUMBERED_MARK.search, options)):  # the images belong where the options mention them
        problem += "".join(f"\n{letter(place)}. {option}" for place, option in enumerate(options) if option)
    numbers = list(dict.fromkeys(int(number) for number in _NUMBERED_MARK.findall(problem)))
    if not numbers:
        return fields
    given = [item for value in fields.images for item in (value if isinstance(value, list) else [value])]
    images = [image for item in given for image in single_values(item) or [None]]
    if absent := [n for n in numbers if not 1 <= n <= len(images) or images[n - 1] is None]:
        raise BadRow("image missing", f"the text refers to image {absent[0]}, which the row does not have")
    seen: set[str] = set()

    def mark(found: re.Match) -> str:
        again = found[1] in seen
        seen.add(found[1])
        return f"image {found[1]}" if again else IMAGE_MARK  # an image is shown once

    problem = _NUMBERED_MARK.sub(mark, problem)
    texts = tuple(_NUMBERED_MARK.sub(IMAGE_MARK, option) for option in options)
    choices = fields.choices and replace(fields.choices, texts=texts)
    return replace(fields, problem=problem, images=tuple(images[n - 1] for n in numbers), choices=choices)


# --- the problem -----------------------------------------------------------------------------------------------------


def read_problem(value: Any) -> Chat:
    """The problem from plain text, from chat turns, or from JSON text of chat turns."""
    if isinstance(value, str) and is_turns(value):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow("message is not JSON", str(error)) from None
    if isinstance(value, list | Mapping) and not is_turns(value):
        raise BadRow("no problem", f"must be text or chat turns, not {short(value)}")
    chat = _read_turns(value) if is_turns(value) else Chat(as_text(value))
    if not chat.problem.replace(IMAGE_MARK, "").strip():
        raise BadRow("no problem", "the problem is empty")
    return chat


def _read_turns(turns: Sequence[Mapping[str, Any]]) -> Chat:
    asked, system, reply = [], None, None
    for turn in turns:
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        who = role(turn)
        if who in _USER_ROLES:
            asked.append(_read_content(content))
        elif who in _ASSISTANT_ROLES:
            reply = content if not isinstance(content, list) else _read_content(content)[0]
        elif who == "system":
            system = _read_content(content)[0].strip() or None
        else:
            raise BadRow("unknown role", f"a turn has the role {who!r}")
    if len(asked) != 1:
        raise BadRow("not one question", f"{len(asked)} user turns; one is needed")
    problem, images = asked[0]
    return Chat(problem.strip(), tuple(images), system, reply)


def _read_content(content: Any) -> tuple[str, list[Any]]:
    """Text with a mark for each image part, and the images that the parts carry."""
    if isinstance(content, Mapping):
        raise BadRow("unsupported content", f"a turn with {short(content)}")
    if not isinstance(content, list):
        return as_text(content), []
    texts, images, num_parts = [], [], 0
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise BadRow("unsupported content", f"a part that is {short(part)}")
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
