"""Examples: what a data set becomes before it is trained on or measured.

`load_examples` reads any source (sources.py) in any format (columns.py, formats.py), decides what its gold answers name
(golds.py), drops and counts the rows that cannot be used, and leaves images undecoded (images.py). `drop_long_prompts`
counts tokens without decoding; items.py hands the examples to TRL.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from apo_lora.data.choices import choice_lines
from apo_lora.data.columns import Columns, find_columns
from apo_lora.data.formats import IMAGE_MARK, Fields, read_row
from apo_lora.data.golds import Answer, Reading, find_reading, resolve
from apo_lora.data.images import Cell, ImageRef, image_refs
from apo_lora.data.notices import unused_columns, unusual_golds
from apo_lora.data.sources import open_source
from apo_lora.data.text import BadRow, row_numbers
from apo_lora.errors import DataError, printable
from apo_lora.machine import ranks
from apo_lora.recipe.schema import ColumnsSection, DataSection
from apo_lora.rewards.scores import accepted, gold_is_parsable

Message = dict[str, Any]
Dropped = dict[str, list[tuple[int, str]]]
"""Reason -> (row, what was found) of each row dropped for it."""


@dataclass(frozen=True)
class Example:
    """One problem with its images and gold answer."""

    row: int
    """Number in the source, from 1; of a JSONL file, the line."""
    problem: str
    """`<image>` marks where an image goes; images beyond the marks go first."""
    answer: Answer
    """For the verifier: a text, or several that are each right."""
    choices: tuple[str, ...] | None
    """By letter, from A on; "" for a letter that the row does not use."""
    images: tuple[ImageRef, ...]
    category: str | None = None
    system: str | None = None
    """System message that the row itself brought."""
    columns: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """What else is in the row, for the user's own rewards; no images."""

    @property
    def answers(self) -> tuple[str, ...]:
        """Every text that is right."""
        return accepted(self.answer)

    @property
    def gold(self) -> str:
        """The answer as one text, for a reader."""
        return " or ".join(self.answers)

    def messages(self, data: DataSection) -> list[Message]:
        """Chat messages without image payloads: the system's (the recipe's, else the row's), then the user's parts."""
        system = self.system if data.system_prompt is None else data.system_prompt
        user = {"role": "user", "content": self._parts(data.instruction)}
        return [{"role": "system", "content": [_text(system)]}, user] if system else [user]

    def _parts(self, instruction: str | None) -> list[dict[str, str]]:
        texts = self.problem.strip().split(IMAGE_MARK)
        parts = [{"type": "image"}] * (len(self.images) - (len(texts) - 1))
        for position, text in enumerate(texts):
            parts += [{"type": "image"}] * (position > 0)
            if text.strip():
                is_first = all(part["type"] == "image" for part in parts)
                parts.append(_text(text.lstrip() if is_first else text))
        ending = "\n".join(text for text in (choice_lines(self.problem, self.choices), instruction) if text)
        if ending and parts[-1]["type"] == "text":
            parts[-1] = _text(f"{parts[-1]['text']}\n{ending}")
        elif ending:
            parts.append(_text(ending))
        return [dict(part) for part in parts]


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


@dataclass(frozen=True)
class Loaded:
    """Usable examples of a data set, and why the other rows were dropped."""

    source: str
    examples: list[Example]
    dropped: Dropped
    num_rows: int
    warnings: tuple[str, ...] = ()
    """What was read but may not be meant, each with a count and rows."""

    @property
    def num_dropped(self) -> int:
        return sum(len(rows) for rows in self.dropped.values())

    def summary(self) -> str:
        """One line: "908 rows of data.jsonl; 3 dropped (2 prompt too long: rows 4, 9; 1 unparsable gold: row 7)"."""
        reasons = [
            f"{len(rows)} {reason}: {row_numbers(number for number, _ in rows)}"
            for reason, rows in self.dropped.items()
        ]
        dropped = f"{self.num_dropped} dropped ({'; '.join(reasons)})" if reasons else "none dropped"
        return f"{self.num_rows} rows of {self.source}; {dropped}"

    def lines(self) -> list[str]:
        """The summary, and a line for each warning."""
        return [self.summary(), *(f"warning: {warning}" for warning in map(printable, self.warnings))]


# --- loading ---------------------------------------------------------------------------------------------------------


def load_examples(
    spec: str,
    data: DataSection,
    *,
    split: str,
    limit: int | None = None,
    seed: int = 0,
) -> Loaded:
    """Reads the first `limit` rows of `spec` (see `DataSection.train` for its forms).

    Rows that cannot be used are dropped and counted; more than half of them is a DataError. `split` matters to
    `boards`, folders and Hub ids, `seed` to `boards`.
    """
    source = open_source(spec, split=split, limit=limit, seed=seed)
    rows = [row for _, row in source.rows if isinstance(row, Mapping)]
    if not rows:
        raise DataError(f"{source.name}: {_no_rows(source.rows)}")
    own = {"columns": ColumnsSection(), "answer_as": None} if source.own_columns else {}
    columns = find_columns(rows, data.model_copy(update=own), source.name)
    folders = _image_folder(data) or source.folders
    dropped: Dropped = {}
    read = list(_usable(source.rows, lambda _, row: read_row(row, columns), dropped))
    reading = find_reading(
        [(number, row.gold, row.gold_is_text, row.choices) for number, row in read if row.choices],
        source.name,
        None if source.own_columns else data.answer_as,
    )
    whole = dict(source.rows)

    def example(number: int, fields: Fields) -> Example:
        return _example(number, fields, _others(whole[number], columns), reading, folders)

    made = _usable(read, example, dropped)
    examples = [example for _, example in made]
    dropped = dict(sorted(dropped.items(), key=lambda found: found[1][0]))
    warnings = [
        *unused_columns(columns, source.rows, named=bool(data.columns.image)),
        *unusual_golds(examples),
    ]
    warnings = tuple(f"{source.name}: {warning}" for warning in warnings)
    loaded = Loaded(source.name, examples, dropped, len(source.rows), warnings)
    remedy = "fix them, or name the columns in data.columns (choices: none for open questions)"
    _refuse_mostly_bad(loaded, f"(read {columns}); {remedy}")
    return loaded


def _usable(
    rows: Iterable[tuple[int, Any]], use: Callable[[int, Any], Any], dropped: Dropped
) -> Iterator[tuple[int, Any]]:
    """(number, what `use` makes of the row); rows for which it raises BadRow go to `dropped`."""
    for number, row in rows:
        try:
            yield number, use(number, row)
        except BadRow as bad:
            dropped.setdefault(bad.reason, []).append((number, bad.detail))


def _no_rows(rows: Sequence[Any]) -> str:
    found = "no row is a mapping of columns" if rows else "contains no rows"
    return f"{found}; write a row for each problem, with its answer"


def _image_folder(data: DataSection) -> tuple[Path, ...]:
    if data.image_folder is None:
        return ()
    folder = Path(data.image_folder).expanduser().absolute()
    if not folder.is_dir():
        raise DataError(
            f"data.image_folder: no folder {folder}; give the folder that the image paths in the data start from"
        )
    return (folder,)


def _example(
    number: int, fields: Fields, others: Mapping[str, Any], reading: Reading, folders: tuple[Path, ...]
) -> Example:
    choices = fields.choices.texts if fields.choices else None
    answer = resolve(fields.gold, fields.choices, reading)
    if not gold_is_parsable(answer, choices):
        among = f" among {[choice for choice in choices if choice]}" if choices else ""
        raise BadRow("unparsable gold", f"{answer!r}{among}")
    images = image_refs(fields.images, folders=folders, row=number)
    marks = fields.problem.count(IMAGE_MARK)
    if marks > len(images):
        raise BadRow("image missing", f"{marks} {IMAGE_MARK} marks in the problem, but {len(images)} images")
    return Example(number, fields.problem, answer, choices, images, fields.category, fields.system, others)


def _others(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """A row's columns without its media."""
    media = {*columns.image, *columns.unused_images, *columns.media}
    return {name: value for name, value in row.items() if name not in media and not isinstance(value, Cell | ImageRef)}


def _refuse_mostly_bad(loaded: Loaded, remedy: str) -> None:
    """DataError where over half of the rows are dropped; it shows three of them."""
    if loaded.num_dropped * 2 <= loaded.num_rows:
        return
    bad = sorted((number, reason, detail) for reason, rows in loaded.dropped.items() for number, detail in rows)
    raise DataError(
        f"{loaded.source}: {loaded.num_dropped} of {loaded.num_rows} rows cannot be used {remedy}",
        *(f"{loaded.source} row {number}: {reason} ({detail})" for number, reason, detail in bad[:3]),
    )


def drop_undecodable(loaded: Loaded) -> Loaded:
    """Decodes every image once and drops the rows where that fails: a damaged file must not end a run at step 700.

    Raises DataError if that leaves less than half. Decoders work beside each other, at up to 0.3 GB each.
    """
    many = [example for example in loaded.examples if any(image.needs_decoding for image in example.images)]
    with ThreadPoolExecutor(min(4, os.cpu_count())) as threads:
        reasons = threads.map(_why_undecodable, many)
        bar = tqdm(reasons, "decoding images", len(many), unit="row", leave=False, delay=2, disable=not ranks.is_main())
        bad = [(example.row, reason) for example, reason in zip(many, bar, strict=True) if reason]
    bad_rows = {row for row, _ in bad}
    kept = [example for example in loaded.examples if example.row not in bad_rows]
    checked = _without(loaded, kept, "image unreadable", bad)
    _refuse_mostly_bad(checked, "because of their images; replace the files, or remove the rows")
    return checked


def _why_undecodable(example: Example) -> str | None:
    try:
        for image in example.images:
            image.open()
    except DataError as error:
        return str(error)
    return None


def _without(loaded: Loaded, kept: list[Example], reason: str, bad: list[tuple[int, str]]) -> Loaded:
    dropped = {**loaded.dropped, reason: loaded.dropped.get(reason, []) + bad} if bad else loaded.dropped
    return replace(loaded, examples=kept, dropped=dropped)


# --- prompts ---------------------------------------------------------------------------------------------------------


def prompt_lengths(examples: Sequence[Example], processor: Any, data: DataSection) -> list[int]:
    """Tokens of each prompt, image tokens included, exactly as the processor will make them. Decodes no image."""
    if not examples:
        return []
    chats = [example.messages(data) for example in examples]
    texts = processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    ids = processor.tokenizer(texts)["input_ids"]
    # The template writes one image token for each image, which the processor then repeats.
    return [
        len(row) + sum(image_tokens(processor, image.size) - 1 for image in example.images)
        for row, example in zip(ids, examples, strict=True)
    ]


def image_tokens(processor: Any, size: tuple[int, int]) -> int:
    """Tokens of an image of this (width, height) under the processor's present pixel limits."""
    width, height = size
    patches = processor.image_processor.get_number_of_image_patches(height, width)
    return patches // processor.image_processor.merge_size**2


def drop_long_prompts(loaded: Loaded, processor: Any, data: DataSection) -> Loaded:
    """Drops prompts longer than `data.max_prompt_tokens`: a truncated one would lose its image."""
    lengths = prompt_lengths(loaded.examples, processor, data)
    kept, bad = [], []
    for example, length in zip(loaded.examples, lengths, strict=True):
        if length <= data.max_prompt_tokens:
            kept.append(example)
        else:
            bad.append((example.row, f"{length:,} tokens, data.max_prompt_tokens is {data.max_prompt_tokens:,}"))
    if bad and not kept:
        raise DataError(
            f"{loaded.source}: every prompt is longer than data.max_prompt_tokens = {data.max_prompt_tokens:,} (the "
            f"shortest has {min(lengths):,}); raise it, or lower data.max_pixels"
        )
    return _without(loaded, kept, "prompt too long", bad)
