"""The built-in boards, a benchmark, a file, a folder, or the Hub -> numbered rows, with images left where they are."""

import errno
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
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
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR}
_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?(?::[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    name: str
    folders: tuple[Path, ...]
    """Where image paths start: the folder of the table, and that of the whole data set."""
    rows: list[tuple[int, Any]]
    """(number, row) each: numbers count from 1, and are those of the lines in JSONL. A row may be a BadRow already."""
    own_columns: bool = False
    """Its columns have our names; the recipe's column names do not apply."""


def open_source(spec: str, *, split: str, limit: int | None, seed: int) -> Source:
    """The first `limit` rows of a data set. Relative paths start at the working directory."""
    refuse_missing(spec)
    if spec in BOARDS:
        return _boards(spec, split, limit or BOARDS_ROWS, seed)
    if (found := find_benchmark(spec)) is not None:
        return _benchmark(*found, limit)
    path = _local_path(spec)
    if path is None:
        return _from_hub(spec, split, limit)
    if path.is_dir():
        return _from_folder(path, split, limit)
    return _from_files([path], limit, path.parent)


def refuse_missing(spec: str) -> None:
    """Raises DataError for what names nothing that could be opened. Opens nothing, and asks no network."""
    if not spec.strip():
        raise DataError("data: the name is empty; give `boards`, a file, a folder or a Hugging Face id")
    if spec not in BOARDS and find_benchmark(spec) is None:
        _local_path(spec)


def _local_path(spec: str) -> Path | None:
    """The existing file or folder that `spec` names; None if it has the form of a Hub id."""
    path = Path(spec).expanduser()
    if path.exists():
        return Path(os.path.abspath(path))
    if path.suffix.lower() in READERS or not _HUB_ID.fullmatch(spec) or spec.startswith("."):
        raise DataError(f"{spec}: no such file or folder (relative to {Path.cwd()}); check the path")
    return None


# --- the built-in task -----------------------------------------------------------------------------------------------


def _boards(spec: str, split: str, num_rows: int, seed: int) -> Source:
    from apo_lora.tiny import boards

    if split not in boards.SPLITS:
        raise DataError(f"{spec}: no split {split!r}; set {_SPLIT_KEYS} to {' or '.join(boards.SPLITS)}")
    if spec.endswith(":general"):
        made = boards.general_rows(num_rows, split=split, seed=seed)
    else:
        level = int(spec[-1]) if spec[-1].isdigit() else None
        made = boards.reasoning_rows(num_rows, split=split, seed=seed, level=level)
    rows = []
    for number, row in enumerate(made, start=1):
        image = row["image"]
        rows.append((number, {**row, "image": ImageRef(f"{spec}/{split}/{number}", image.size, image)}))
    return Source(f"{spec} ({split})", (), rows, own_columns=True)


def _benchmark(benchmark: Benchmark, path: str | None, limit: int | None) -> Source:
    """All its parts from the Hub, or a file or folder of the same schema; numbered on from part to part."""
    specs = (
        [path] if path else [f"{benchmark.hub_id}:{part}" if part else benchmark.hub_id for part in benchmark.configs]
    )
    rows: list[tuple[int, Any]] = []
    for spec in specs:
        if limit is not None and len(rows) >= limit:
            break
        left = None if limit is None else limit - len(rows)
        source = open_source(spec, split=benchmark.split, limit=left, seed=0)
        rows += [(len(rows) + place, row) for place, (_, row) in enumerate(source.rows, start=1)]
    name = f"{benchmark.title} ({path or benchmark.hub_id}, {benchmark.split})"
    return Source(name, source.folders, converted_rows(benchmark, rows, name), own_columns=True)


# --- files and folders -----------------------------------------------------------------------------------------------

_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> how files and folders spell it, as `datasets` reads them."""
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")


def _from_files(paths: list[Path], limit: int | None, folder: Path) -> Source:
    """One file, or the shards of one Parquet data set."""
    path = paths[0]
    name = str(path) if len(paths) == 1 else f"{path.parent} ({len(paths)} files)"
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unsupported file type {path.suffix or '(no suffix)'}; use {', '.join(READERS)}")
    if any(p.stat().st_size == 0 for p in paths):
        raise DataError(f"{name}: the file is empty; write it again, or use another")
    return Source(name, tuple(dict.fromkeys([path.parent, folder])), reader(paths, limit))


def _from_folder(folder: Path, split: str, limit: int | None) -> Source:
    """The files of the split. Only a folder whose files name no split at all is read whatever the split is."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return Source(str(folder), (folder,), table_rows(_saved_dataset(folder, split), limit))
    subfolders = [path for path in (*folder.glob("*/"), *folder.glob("data/*/")) if _words_of_split(path.name)]
    places = [folder, folder / "data", *sorted(subfolders)]
    files = [file for place in places for file in sorted(place.glob("*")) if file.suffix.lower() in READERS]
    splits = {file: _splits_of(file.relative_to(folder)) for file in files}
    # Other JSON is too common beside a data set to be taken for one.
    files = [file for file in files if file.suffix != ".json" or splits[file] or file.stem in ("data", "metadata")]
    named = {name for file in files for name in splits[file]}
    found = [file for file in files if _canonical(split) in splits[file]] if named else files
    if named and not found:
        raise DataError(f"{folder}: no split {split!r}; it has {', '.join(sorted(named))}; set {_SPLIT_KEYS}")
    if not found:
        raise DataError(
            f"{folder}: contains no {', '.join(READERS)} file for split {split!r}; give the path of the file"
        )
    for stem in (split, "data", "metadata"):
        if exact := [file for file in found if file.stem == stem and file.parent == folder]:
            found = exact
            break
    shards = {(file.parent, file.suffix, re.sub(r"\d+", "", file.stem)) for file in found}
    if len(shards) > 1 or len(found) > 1 and found[0].suffix != ".parquet":
        names = ", ".join(str(file.relative_to(folder)) for file in found[:_MAX_LISTED])
        raise DataError(f"{folder}: several files match split {split!r} ({names}); give the path of one of them")
    return _from_files(found, limit, folder)


_SPLIT_KEYS = "data.split or data.eval_split"


def _splits_of(path: Path) -> set[str]:
    """The splits that a file's name speaks of (`train-00000-of-00002`, `a_test`), else those that its folder does."""
    if shard := _SHARD.fullmatch(path.stem):
        return _words_of_split(shard[1]) or {shard[1]}
    return _words_of_split(path.stem) or _words_of_split(path.parent.name)


def _words_of_split(name: str) -> set[str]:
    words = set(re.split(r"[^a-z\d]+", name.lower()))
    return {split for split, spellings in _SPLIT_WORDS.items() if words & set(spellings)}


def _canonical(split: str) -> str:
    return next((name for name, spellings in _SPLIT_WORDS.items() if split.lower() in spellings), split)


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
        raise DataError(f"{folder}: no split {split!r}; it has {', '.join(saved)}; set {_SPLIT_KEYS}")
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
    except (OSError, ValueError) as error:
        raise DataError(
            f"{paths[0]}: cannot be read as Parquet ({_first_line(error)}); write or download it again"
        ) from error
    try:
        # Unpacked once into the Arrow cache of `datasets`, so that images can be fetched one by one from disk.
        table = datasets.load_dataset("parquet", data_files=[str(path) for path in paths], split="train")
    except Exception as error:  # damaged files surface as errors of many libraries
        _blame_the_cache(error)
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
        _blame_the_cache(error)
        raise DataError(
            f"{spec}: neither a local path nor a data set on the Hub with split {split!r} "
            f"({_first_line(error)}); check the id, data.split / data.eval_split, the network and `hf auth login`"
        ) from error
    # Image paths of a Hub data set point into the cache that it was downloaded to.
    return Source(f"{spec} ({split})", (Path(datasets.config.HF_CACHE_HOME),), table_rows(table, limit))


def _blame_the_cache(error: BaseException | None) -> None:
    """Raises DataError where what went wrong is that the cache of `datasets` cannot be written."""
    import datasets

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    while error is not None and getattr(error, "errno", None) not in _NOT_WRITABLE:
        file = getattr(error, "filename", None)
        if isinstance(file, str) and (cache.is_relative_to(file) or Path(file).is_relative_to(cache)):
            break
        error = error.__cause__ or error.__context__
    if error is not None:
        raise DataError(
            f"{cache}: the cache of `datasets` cannot be written "
            f"({_first_line(error)}); make room, or set HF_HOME or HF_DATASETS_CACHE to a folder that can be written"
        ) from error


def _quiet_datasets() -> ModuleType:
    """The library without progress bars outside a terminal, and without its own messages: errors are reported by us."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


def table_rows(table: "datasets.Dataset", limit: int | None) -> list[tuple[int, dict[str, Any]]]:
    """Rows of an Arrow table on disk; columns that hold bytes stay there, a Cell in their place."""
    table = table.select(range(min(limit or len(table), len(table)))).with_format("arrow")
    schema = table.features.arrow_schema
    heavy = {f.name: table.select_columns([f.name]).with_format("arrow") for f in schema if _holds_bytes(f.type)}
    light = [name for name in table.column_names if name not in heavy]
    rows: list[dict[str, Any]] = [{} for _ in range(len(table))]
    if light:
        batches = table.select_columns(light).with_format("arrow").iter(1024)
        rows = [row for batch in batches for row in batch.to_pylist()]
    labels = {name: feature for name, feature in table.features.items() if "ClassLabel" in repr(feature)}
    for index, row in enumerate(rows):
        row.update({name: Cell(column, index) for name, column in heavy.items()})
        row.update({name: _with_names(row[name], feature) for name, feature in labels.items()})
    return list(enumerate(rows, start=1))


def _with_names(value: Any, feature: Any) -> Any:
    """A value of an Arrow table with the names of classes in place of their numbers, at any depth."""
    import datasets

    if value is None or isinstance(value, Cell):
        return value
    if isinstance(feature, datasets.ClassLabel):
        return feature.int2str(value) if 0 <= value < feature.num_classes else None
    if isinstance(feature, Mapping):
        return {key: _with_names(value.get(key), inner) for key, inner in feature.items()}
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return [_with_names(item, inner) for item in value] if isinstance(value, list) else value


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
