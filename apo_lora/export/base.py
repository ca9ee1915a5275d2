"""The base that an adapter is merged into, original or as it was trained on: where it is, or its download. No torch."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from apo_lora.errors import ModelError
from apo_lora.run.adapter import CONFIG, FOUR_BIT, AdapterSource

# What stands beside the weights and is needed to run them: config, generation config, tokenizer, processor.
COMPANIONS = (".json", ".jinja", ".txt", ".model")

INDEX = "model.safetensors.index.json"
MOST_GROWTH = 3
"""About what a 4-bit repository grows by in 16 bits, for the room that is asked for before its download."""

_FOUR_BIT_NAME = re.compile(r"(-unsloth)?-bnb-4bit$")


def sixteen_bit_name(name: str) -> str:
    """The repository with the weights that a 4-bit one was made of; a name without that ending stays as it is."""
    return _FOUR_BIT_NAME.sub("", name)


@dataclass(frozen=True)
class Base:
    """What an adapter is merged into."""

    folder: Path
    onto: str | None = None
    """One of ONTO; None where training was on the 16-bit weights, and there is no choice."""
    is_packed: bool = False
    """Whether the folder itself holds bitsandbytes' 4-bit weights."""
    rounded: Mapping[str, Any] | None = None
    """What FOUR_BIT says, where loading put 16-bit weights of the folder into 4 bits."""

    @property
    def is_4bit(self) -> bool:
        return self.is_packed or self.rounded is not None


def find_base(
    source: AdapterSource,
    onto: str | None = None,
    require_room: Callable[[int, int], None] = lambda fetched, weights: None,
) -> Base:
    """The base of an adapter, downloaded if it is not here yet. Raises ModelError.

    `onto`: one of ONTO; None is `trained` where it is known what was trained on, and says so where it is not. Before a
    download `require_room` gets the bytes to fetch and about those that a merge writes, and may raise.
    """
    name = sixteen_bit_name(source.base_name) if onto == "original" else source.base_name
    folder = _folder(source, name, require_room)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; an export needs the complete Hugging Face folder of the base")
    quantised = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if quantised:
        if onto == "original" or not _is_packed(quantised):
            raise ModelError(
                f"{name}: its weights are quantised, and a merge would lose the adapter to rounding; set "
                f"base_model_name_or_path in {source.folder / CONFIG} to the 16-bit base"
            )
        return Base(folder, "trained", is_packed=True)
    if onto == "original":
        return Base(folder, None if _is_trained_in_16_bits(source) else "original")
    if (source.folder / FOUR_BIT).is_file():
        record = json.loads((source.folder / FOUR_BIT).read_text(encoding="utf-8"))
        return Base(folder, "trained", rounded=record)
    if _is_trained_in_16_bits(source):
        if onto:
            print("--onto trained: it was trained on the 16-bit weights, so this is the same as --onto original.")
        return Base(folder)
    unknown = f"{source.folder}: no {FOUR_BIT}, so it is not known whether it was trained on {name} in 4 bits"
    if onto:
        raise ModelError(f"{unknown}; use --onto original")
    print(f"{unknown}; merging into the 16-bit weights, as with --onto original.")
    return Base(folder, "original")


def _is_trained_in_16_bits(source: AdapterSource) -> bool:
    recipe = source.recipe
    is_4bit = sixteen_bit_name(source.base_name) != source.base_name or (source.folder / FOUR_BIT).is_file()
    return recipe is not None and not recipe.model.load_in_4bit and not is_4bit


def _is_packed(quantization_config: Mapping[str, Any]) -> bool:
    config = quantization_config
    return config.get("quant_method") == "bitsandbytes" and bool(config.get("load_in_4bit"))


def _folder(source: AdapterSource, name: str, require_room: Callable[[int, int], None]) -> Path:
    if (folder := Path(name)).is_dir():
        return folder
    other = ", or use --onto original" if name != sixteen_bit_name(name) else ""
    if folder.is_absolute() or name.startswith("."):
        raise ModelError(
            f"{source.folder}: its base {name} does not exist here; put it there, or correct {CONFIG}{other}"
        )
    config = json.loads((source.folder / CONFIG).read_text(encoding="utf-8"))
    growth = MOST_GROWTH if other else 1
    return _download(
        name,
        config.get("revision") if name == source.base_name else None,
        lambda fetched, weights: require_room(fetched, growth * weights),
    )


def _download(name: str, revision: str | None, require_room: Callable[[int, int], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    wanted = {"revision": revision, "allow_patterns": ["*.safetensors", *(f"*{suffix}" for suffix in COMPANIONS)]}
    try:
        try:
            files = snapshot_download(name, dry_run=True, tqdm_class=_NoBar, **wanted)
        except DryRunError:
            files = []  # no connection: the cache may serve, and if not, the next call says why
        if fetched := sum(file.file_size or 0 for file in files if file.will_download):
            require_room(fetched, sum(file.file_size or 0 for file in files if file.filename.endswith(".safetensors")))
        return Path(snapshot_download(name, **wanted))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{name}: the base cannot be downloaded ({reason}); download it with a network connection, "
            f"for instance by `hf download {name}`"
        ) from error


class _NoBar(tqdm):
    """Hides the bar of a dry run, whose title "[dry-run] Fetching" would confuse."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options | {"disable": True})


def weight_files(base: Path) -> list[Path]:
    """The base's shards. Raises ModelError where one is missing."""
    if (base / INDEX).is_file():
        listed = json.loads((base / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = [base / name for name in sorted(set(listed.values()))]
    else:
        files = [base / "model.safetensors"]
    if missing := [path.name for path in files if not path.is_file()]:
        raise ModelError(f"{base}: {', '.join(missing)} is missing; an export needs the safetensors files of the base")
    return files


def weight_bytes(base: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(base))
