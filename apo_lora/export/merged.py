"""An adapter merged into its 16-bit base: a Hugging Face folder, written one shard at a time.

W + alpha / r * B A is computed in float32 per layer and rounded once to the base's own dtype. Memory holds one shard of
the base and the adapter; no model is built.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from apo_lora.errors import ModelError
from apo_lora.export.image_limits import write_image_limits
from apo_lora.family.lookup import family_of_base
from apo_lora.run.adapter import CONFIG, WEIGHTS, AdapterSource

# What stands beside the weights and is needed to run them: config, generation config, tokenizer, processor.
_COMPANIONS = (".json", ".jinja", ".txt", ".model")
_INDEX = "model.safetensors.index.json"
_FOUR_BIT_NAME = re.compile(r"(-unsloth)?-bnb-4bit$")

# Ways of training that plain B A does not describe: attribute of the adapter's config, what it is called.
_NOT_PLAIN = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save (whole layers beside the low-rank ones)",
    "target_parameters": "target_parameters",
    "lora_bias": "lora_bias",
    "layer_replication": "layer_replication",
    "trainable_token_indices": "trainable_token_indices",
    "fan_in_fan_out": "fan_in_fan_out",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
}


BeforeDownload = Callable[[int, int], None]


def sixteen_bit_name(name: str) -> str:
    """The repository with the weights that a 4-bit one was made of; a name without that ending stays as it is."""
    return _FOUR_BIT_NAME.sub("", name)


def base_folder(source: AdapterSource, before_download: BeforeDownload = lambda fetched, weights: None) -> Path:
    """The unquantised base of an adapter, downloaded where it is not here yet. Raises ModelError.

    `before_download` gets the bytes to fetch and the bytes of the base's weights, and may raise.
    """
    name = sixteen_bit_name(source.base_name)
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith("."):
            raise ModelError(f"{source.folder}: its base {name} is not here; put it there, or mend {CONFIG}")
        revision = _config(source)["revision"] if name == source.base_name else None
        folder = _download(name, revision, before_download)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; an export needs the base's whole Hugging Face folder")
    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        raise ModelError(
            f"{name}: its weights are quantised, and merging into them would round the adapter away; name the 16-bit "
            f"base as base_model_name_or_path in {source.folder / CONFIG}"
        )
    return folder


def _download(name: str, revision: str | None, before_download: BeforeDownload) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    wanted = {"revision": revision, "allow_patterns": ["*.safetensors", *(f"*{suffix}" for suffix in _COMPANIONS)]}
    try:
        try:
            files = snapshot_download(name, dry_run=True, tqdm_class=_NoBar, **wanted)
        except DryRunError:
            files = []  # no connection: the cache may serve, and if not, the next call says why
        fetched = sum(file.file_size or 0 for file in files if file.will_download)
        if fetched:
            weights = [file.file_size or 0 for file in files if file.filename.endswith(".safetensors")]
            before_download(fetched, sum(weights))
        return Path(snapshot_download(name, **wanted))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{name}: the 16-bit base cannot be fetched ({reason}); download it once with a connection, "
            f"for instance `hf download {name}`"
        ) from error


class _NoBar(tqdm):
    """For what takes no time; "[dry-run] Fetching" would puzzle."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options | {"disable": True})


def refuse_existing(out: Path) -> None:
    """Nothing is overwritten."""
    if out.exists():
        raise ModelError(f"--out {out}: already there; remove it, or choose another folder")


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, renamed to it at the end; after an error neither is there.

    What a kill leaves behind is the hidden temporary folder, which the next export of that name clears away.
    """
    refuse_existing(out)
    temporary = out.absolute().with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(out)
    except OSError as error:
        raise ModelError(f"--out {out}: could not be finished ({error.strerror or error}); nothing was kept") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def weight_files(base: Path) -> list[Path]:
    """The base's shards. Raises ModelError where one is missing."""
    if (base / _INDEX).is_file():
        listed = json.loads((base / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = [base / name for name in sorted(set(listed.values()))]
    else:
        files = [base / "model.safetensors"]
    if missing := [path.name for path in files if not path.is_file()]:
        raise ModelError(f"{base}: {', '.join(missing)} is missing; an export needs the base's safetensors files")
    return files


def weight_bytes(base: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(base))


def merge(source: AdapterSource, base: Path, folder: Path) -> None:
    """Writes base + adapter into the existing `folder`: weights, configs, tokenizer, processor. Raises ModelError."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    deltas = Deltas(source, base)
    files = weight_files(base)
    with tqdm(total=weight_bytes(base), unit="B", unit_scale=True, desc="merging") as bar:
        for path in files:
            with safe_open(path, "pt") as shard:
                tensors = {name: deltas.added(name, shard.get_tensor(name)) for name in shard.keys()}  # noqa: SIM118
                save_file(tensors, folder / path.name, metadata=shard.metadata())
            bar.update(path.stat().st_size)
    if deltas.unused:
        raise ModelError(
            f"{source.folder}: {len(deltas.unused)} of its layers are not in {base}, first "
            f"{min(deltas.unused)}; is this the base it was trained on?"
        )
    for path in base.iterdir():
        if path.suffix in _COMPANIONS and path.is_file():
            shutil.copyfile(path, folder / path.name)
    if recipe := source.recipe:
        write_image_limits(folder, recipe.data)


class Deltas:
    """What an adapter adds to each weight of its base."""

    def __init__(self, source: AdapterSource, base: Path):
        from safetensors.torch import load_file

        self.config = _config(source)
        self.where = source.folder
        self.pairs: dict[str, dict[str, Tensor]] = {}
        for name, tensor in load_file(source.folder / WEIGHTS).items():
            layer, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
            if part not in ("A.weight", "B.weight") or tensor.ndim != 2:
                raise ModelError(f"{source.folder}: {name} is no low-rank pair of a linear layer; it cannot be merged")
            self.pairs.setdefault(layer, {})[part[0]] = tensor
        if halves := [layer for layer, pair in self.pairs.items() if len(pair) < 2]:
            raise ModelError(f"{source.folder}: {min(halves)} has a matrix without its other half; it was cut short")
        for layer in self.pairs:
            if re.search(r"(lm_head|embed_tokens)$", layer) and _is_tied(base):
                raise ModelError(
                    f"{source.folder}: it adapts {layer}, whose weight this base uses for both embeddings and lm_head; "
                    "a merge would change both. Train without it"
                )
        self.family = family_of_base(str(base))
        self.layers = {self.family.weight_name(layer): layer for layer in self.pairs}
        self.unused = set(self.layers)

    def added(self, name: str, weight: Tensor) -> Tensor:
        """`weight`, or what it becomes where the adapter has a pair for it; its dtype stays."""
        layer = self.family.weight_name(name.removesuffix(".weight"))
        if not name.endswith(".weight") or layer not in self.layers:
            return weight
        self.unused.discard(layer)
        pair = self.pairs[self.layers[layer]]
        delta = pair["B"].float() @ pair["A"].float() * self.scale(self.layers[layer], rank=len(pair["A"]))
        if delta.shape != weight.shape:
            raise ModelError(f"{self.where}: {layer} is {tuple(delta.shape)}, and {tuple(weight.shape)} in the base")
        merged = (weight.float() + delta).to(weight.dtype)
        if not merged.isfinite().all():
            raise ModelError(f"{self.where}: {layer} has values that {weight.dtype} cannot hold; is the adapter sound?")
        return merged

    def scale(self, layer: str, rank: int) -> float:
        """alpha / r as PEFT has it for this layer."""
        from peft.utils.other import get_pattern_key

        pattern = self.config["alpha_pattern"] or {}
        alpha = pattern.get(get_pattern_key(pattern, layer), self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config["use_rslora"] else rank)


def _config(source: AdapterSource) -> dict[str, Any]:
    """The adapter's config with PEFT's defaults. Raises ModelError for adapters that B A alone does not describe."""
    from peft import LoraConfig, PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(source.folder))
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(f"{source.folder / CONFIG}: PEFT cannot read it ({error})") from error
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{source.folder}: a {config.peft_type} adapter; only LoRA can be merged")
    reasons = [words for key, words in _NOT_PLAIN.items() if getattr(config, key)]
    if config.bias != "none":
        reasons.append(f"bias={config.bias}")
    if reasons:
        raise ModelError(
            f"{source.folder}: trained with {', '.join(reasons)}; only plain low-rank layers can be merged"
        )
    return config.to_dict()


def _is_tied(base: Path) -> bool:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return bool(config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", True)))
