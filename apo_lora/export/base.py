"""The 16-bit base of an adapter: where it is, or its download. No torch."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from apo_lora.errors import ModelError
from apo_lora.run.adapter import CONFIG, AdapterSource

# What stands beside the weights and is needed to run them: config, generation config, tokenizer, processor.
COMPANIONS = (".json", ".jinja", ".txt", ".model")

_INDEX = "model.safetensors.index.json"
_FOUR_BIT_NAME = re.compile(r"(-unsloth)?-bnb-4bit$")


def sixteen_bit_name(name: str) -> str:
    """The repository with the weights that a 4-bit one was made of; a name without that ending stays as it is."""
    return _FOUR_BIT_NAME.sub("", name)


def base_folder(
    source: AdapterSource, require_room: Callable[[int, int], None] = lambda fetched, weights: None
) -> Path:
    """The unquantised base of an adapter, downloaded if it is not here yet. Raises ModelError.

    Before a download `require_room` gets the bytes to fetch and those of the base's weights, and may raise.
    """
    name = sixteen_bit_name(source.base_name)
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith("."):
            raise ModelError(f"{source.folder}: its base {name} does not exist here; put it there, or correct {CONFIG}")
        config = json.loads((source.folder / CONFIG).read_text(encoding="utf-8"))
        folder = _download(name, config.get("revision") if name == source.base_name else None, require_room)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; an export needs the complete Hugging Face folder of the base")
    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        raise ModelError(
            f"{name}: its weights are quantised, and a merge would lose the adapter to rounding; set "
            f"base_model_name_or_path in {source.folder / CONFIG} to the 16-bit base"
        )
    return folder


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
            f"{name}: the 16-bit base cannot be downloaded ({reason}); download it with a network connection, "
            f"for instance by `hf download {name}`"
        ) from error


class _NoBar(tqdm):
    """Hides the bar of a dry run, whose title "[dry-run] Fetching" would confuse."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options | {"disable": True})


def weight_files(base: Path) -> list[Path]:
    """The base's shards. Raises ModelError where one is missing."""
    if (base / _INDEX).is_file():
        listed = json.loads((base / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = [base / name for name in sorted(set(listed.values()))]
    else:
        files = [base / "model.safetensors"]
    if missing := [path.name for path in files if not path.is_file()]:
        raise ModelError(f"{base}: {', '.join(missing)} is missing; an export needs the safetensors files of the base")
    return files


def weight_bytes(base: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(base))
