"""The built-in boards, a benchmark, a file, a folder, or the Hub -> numbered rows, with images left where they are."""

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from apo_lora.data.benchmarks import Benchmark, converted_rows, find_benchmark
from apo_lora.data.images import Cell, ImageRef
from apo_lora.errors import DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow

BOARDS = ("boards", "boards:reasoning", "boards:level1", "boards:level2", "boards:level3", "boards:general")
BOARDS_ROWS = 2048
"""Rows of the built-in task where no limit is given."""
_MAX_LISTED = 3
_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?(?::[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    name: str
    folder: Path | None
    """Where image paths start."""
    rows: list[tuple[int, Any]]
    """(number, row) each: numbers count from 1, and are those of the lines in JSONL. A row may be a BadRow already."""
    own_columns: bool = False
    """Its columns have our names; the recipe's column names do not apply."""


def open_source(spec: str, *, split: str, limit: int | None, seed: int, base_dir: Path | None) -> Source:
    """The first `limit` rows of a data set. Relative paths start at `base_dir`, or else at the working directory."""
    if not spec.strip():
        raise DataError("data: the name is empty; give `boards`, a file, a folder or a Hugging Face id")
    if spec in BOARDS:
        return _boards(spec, split, limit or BOARDS_ROWS, seed)
    if (found := find_benchmark(spec)) is not None:
        return _benchmark(*found, limit, base_dir)
    path = _local_path(spec, base_dir)
    if path is None:
        return _from_hub(spec, split, limit)
    if path.is_dir():
        return _from_folder(path, split, limit)
    return _from_files([path], limit)


def _local_path(spec: str, base_dir: Path | None) -> Path | None:
    """The existing file or folder that `spec` names; None if it has the form of a Hub id."""
    path = Path(spec).expanduser()
    for candidate in (Path(base_dir or ".") / path, path):
        if candidate.exists():
            return Path(os.path.abspath(candidate))
    if path.suffix.lower() in READERS or not _HUB_ID.fullmatch(spec) or spec.startswith("."):
        raise DataError(
            f"{spec}: no such file or folder (relative to {Path(base_dir or '.').resolve()}); check the path"
        )
    return None


# --- the built-in task -----------------------------------------------------------------------------------------------


def _boards(spec: str, split: str, num_rows: int, seed: int) -> Source:
    from apo_lora.tiny import boards

    if split not in boards.SPLITS:
        raise DataError(
            f"{spec}: no split {split!r}; set data.split or data.eval_split to {' or '.join(boards.SPLITS)}"
        )
    if spec.endswith(":general"):
        made = boards.general_rows(num_rows, split=split, seed=seed)
    else:
        level = int(spec[-1]) if spec[-1].isdigit() else None
        made = boards.reasoning_rows(num_rows, split=split, seed=seed, level=level)
    rows = []
    for number, row in enumerate(made, start=1):
        image = row["image"]
        rows.append((number, {**row, "image": ImageRef(f"{spec}/{split}/{number}", image.size, image)}))
    return Source(f"{spec} ({split})", None, rows, own_columns=True)


def _benchmark(benchmark: Benchmark, path: str | None, limit: int | None, base_dir: Path | None) -> Source:
    """All its parts from the Hub, or a file or folder of the same schema; numbered on from part to part."""
    specs = (
        [path] if path else [f"{benchmark.hub_id}:{part}" if part else benchmark.hub_id for part in benchmark.configs]
    )
    rows: list[tuple[int, Any]] = []
    for spec in specs:
        if limit is not None and len(rows) >= limit:
            break
        left = None if limit is None else limit - len(rows)
        source = open_source(spec, split=benchmark.split, limit=left, seed=0, base_dir=base_dir)
        rows += [(len(rows) + place, row) for place, (_, row) in enumerate(source.rows, start=1)]
    name = f"{benchmark.title} ({path or benchmark.hub_id}, {benchmark.split})"
    return Source(name, source.folder, converted_rows(benchmark, rows, name), own_columns=True)


# --- files and folders -----------------------------------------------------------------------------------------------


def _from_files(paths: list[Path], limit: int | None) -> Source:
    """One file, or the shards of one Parquet data set."""
    path = paths[0]
    name = str(path) if len(paths) == 1 else f"{path.parent} ({len(paths)} files)"
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unsupported file type {path.suffix or '(no suffix)'}; use {', '.join(READERS)}")
    if any(p.stat().st_size == 0 for p in paths):
        raise DataError(f"{name}: the file is empty; write it again, or use another")
    return Source(name, path.parent, reader(paths, limit))


def _from_folder(folder: Path, split: str, limit: int | None) -> Source:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return Source(str(folder), folder, table_rows(_saved_dataset(folder, split), limit))
    patterns = (f"{split}{{}}", f"{split}-*{{}}", f"data/{split}-*{{}}", "data{}", "metadata{}", "*{}", "data/*{}")
    for pattern in patterns:
        # Other JSON is too common beside a data set to be taken for one.
        endings = [e for e in READERS if e != ".json"] if "*" in pattern else list(READERS)
        found = [files for ending in endings if (files := sorted(folder.glob(pattern.format(ending))))]
        if len(found) > 1 or found and found[0][0].suffix != ".parquet" and len(found[0]) > 1:
            names = ", ".join(path.name for files in found for path in files[:_MAX_LISTED])
            raise DataError(f"{folder}: several files match split {split!r} ({names}); give the path of one of them")
        if found:
            return _from_files(found[0], limit)
    raise DataError(f"{folder}: contains no {', '.join(READERS)} file for split {split!r}; give the path of the file")


def _saved_dataset(folder: Path, split: str) -> "datasets.Dataset":
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # damaged files surface as errors of many libraries
        reason = _first_line(error)
        raise DataError(f"{folder}: saved by `datasets`, but cannot be read ({reason}); save it again") from error
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise DataError(f"{folder}: no split {split!r}; it has {', '.join(saved)}; set data.split or data.eval_split")
    return saved[split]


def _read_jsonl(paths: list[Path], limit: int | None) -> list[tuple[int, Any]]:
    return _parse_lines(paths[0], enumerate(_text(paths[0]).split("\n"), start=1), limit)


def _parse_lines(path: Path, lines: Iterator[tuple[int, str]], limit: int | None) -> list[tuple[int, Any]]:
    rows, problems = [], []
    for number, line in lines:
        if limit is not None and len(rows) >= limit:
            break
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            problems.append(f"{path} line {number}: not valid JSON ({_json_error(error)}); fix or remove the line")
    if problems:
        more = len(problems) - _MAX_LISTED
        raise DataError(*problems[:_MAX_LISTED], *([f"{path}: and {more} more lines like these"] if more > 0 else []))
    return rows


def _read_json(paths: list[Path], limit: int | None) -> list[tuple[int, Any]]:
    path, text = paths[0], _text(paths[0])
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        # Files with one object per line are often named .json.
        if getattr(error, "msg", "") == "Extra data" and text.lstrip().startswith("{"):
            return _parse_lines(path, enumerate(text.split("\n"), start=1), limit)
        raise DataError(f"{path}: not valid JSON ({_json_error(error)}); fix it there") from None
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise DataError(f"{path}: contains no list of rows; write [{{...}}, {{...}}], or one object per line")
    return list(enumerate(value[:limit], start=1))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); save it as UTF-8") from None


def _json_error(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, line {error.lineno} column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _read_parquet(paths: list[Path], limit: int | None) -> list[tuple[int, Any]]:
    import pyarrow.parquet

    datasets = _quiet_datasets()
    try:
        if not any(pyarrow.parquet.ParquetFile(path).metadata.num_rows for path in paths):
            return []
        # Unpacked once into the Arrow cache of `datasets`, so that images can be fetched one by one from disk.
        table = datasets.load_dataset("parquet", data_files=[str(path) for path in paths], split="train")
    except Exception as error:  # damaged files surface as errors of many libraries
        reason = _first_line(error.__cause__ or error)
        raise DataError(f"{paths[0]}: cannot be read as Parquet ({reason}); write or download it again") from error
    return table_rows(table, limit)


READERS: dict[str, Callable[[list[Path], int | None], list[tuple[int, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
"""File ending -> reader. The order is that of preference in messages only; a folder with two is refused."""


# --- the Hub, and Arrow tables ---------------------------------------------------------------------------------------


def _from_hub(spec: str, split: str, limit: int | None) -> Source:
    datasets = _quiet_datasets()
    name, _, config = spec.partition(":")
    try:
        table = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the network, the Hub and the files each have their own errors
        raise DataError(
            f"{spec}: neither a local path nor a data set on the Hub with split {split!r} "
            f"({_first_line(error)}); check the id, data.split / data.eval_split, the network and `hf auth login`"
        ) from error
    # Image paths of a Hub data set point into the cache that it was downloaded to.
    return Source(f"{spec} ({split})", Path(datasets.config.HF_CACHE_HOME), table_rows(table, limit))


def _quiet_datasets() -> ModuleType:
    """The library without progress bars outside a terminal, and without its own messages: errors are reported by us."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


def table_rows(table: "datasets.Dataset", limit: int | None) -> list[tuple[int, dict[str, Any]]]:
    """Rows of an Arrow table on disk; columns that hold bytes stay there, a Cell in their place."""
    import datasets

    table = table.select(range(min(limit or len(table), len(table)))).with_format("arrow")
    schema = table.features.arrow_schema
    heavy = {f.name: table.select_columns([f.name]).with_format("arrow") for f in schema if _holds_bytes(f.type)}
    light = [name for name in table.column_names if name not in heavy]
    rows: list[dict[str, Any]] = [{} for _ in range(len(table))]
    if light:
        batches = table.select_columns(light).with_format("arrow").iter(1024)
        rows = [row for batch in batches for row in batch.to_pylist()]
    labels = {name: f for name, f in table.features.items() if isinstance(f, datasets.ClassLabel)}
    for index, row in enumerate(rows):
        row.update({name: Cell(column, index) for name, column in heavy.items()})
        row.update({name: f.int2str(row[name]) for name, f in labels.items() if row[name] is not None})
    return list(enumerate(rows, start=1))


def _holds_bytes(kind: "pyarrow.DataType") -> bool:
    import pyarrow

    if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
        return True
    if pyarrow.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    return is_list and _holds_bytes(kind.value_type)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
