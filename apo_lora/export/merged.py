"""An adapter merged into its 16-bit base: a Hugging Face folder, written one shard at a time.

PEFT says what the adapter adds to a weight. That is added in float32 and rounded once to the base's own dtype. Memory
holds one shard of the base and the adapter; the model that PEFT puts its layers into has no weights.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from tqdm.auto import tqdm

from apo_lora.errors import ModelError
from apo_lora.export.base import COMPANIONS, weight_bytes, weight_files
from apo_lora.export.image_limits import write_image_limits
from apo_lora.run.adapter_source import CONFIG, WEIGHTS, AdapterSource

_ADAPTER = "default"  # PEFT's name for it in memory


def merge(source: AdapterSource, base: Path, folder: Path) -> None:
    """Writes base + adapter into the existing `folder`: weights, configs, tokenizer, processor. Raises ModelError."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    layers = lora_layers(source, base)
    unused = set(layers)
    with tqdm(total=weight_bytes(base), unit="B", unit_scale=True, desc="merging") as bar:
        for path in weight_files(base):
            with safe_open(path, "pt") as shard:
                tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
                metadata = shard.metadata()
            for name, weight in tensors.items():
                if (layer := canonical(name.removesuffix(".weight"))) in layers:
                    unused.discard(layer)
                    tensors[name] = merged_weight(layer, weight, layers[layer])
            save_file(tensors, folder / path.name, metadata=metadata)
            bar.update(path.stat().st_size)
    if unused:
        raise ModelError(f"{base}: has no weights for {len(unused)} of the adapter's layers, first {min(unused)}")
    for path in base.iterdir():
        if path.suffix in COMPANIONS and path.is_file():
            shutil.copyfile(path, folder / path.name)
    if recipe := source.recipe:
        write_image_limits(folder, recipe.data)


def merged_weight(name: str, weight: Tensor, layer: LoraLayer) -> Tensor:
    """`weight` and what its layer adds to it, in the dtype of `weight`. Raises ModelError where that cannot hold it."""
    merged = (weight.float() + layer.get_delta_weight(_ADAPTER)).to(weight.dtype)
    if not merged.isfinite().all():
        raise ModelError(f"{name}: base and adapter add up to values that {weight.dtype} cannot hold; is it sound?")
    return merged


def lora_layers(source: AdapterSource, base: Path) -> dict[str, LoraLayer]:
    """PEFT's layers of the adapter by `canonical` name, their matrices in float32. Raises ModelError.

    Only adapters that are all low-rank pairs: what else training may have changed would be lost.
    """
    from peft import LoraConfig, PeftConfig, PeftModel
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    pairs = load_file(source.folder / WEIGHTS)
    if others := sorted(name for name in pairs if not name.endswith((".lora_A.weight", ".lora_B.weight"))):
        raise ModelError(f"{source.folder}: {others[0]} is not one of a low-rank pair; only those can be merged")
    try:
        config = PeftConfig.from_pretrained(str(source.folder))
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(f"{source.folder / CONFIG}: PEFT cannot read it ({error})") from error
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{source.folder}: a {config.peft_type} adapter; only LoRA can be merged")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(base, trust_remote_code=False))
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    # PEFT would load the matrices onto the base's device, which is none.
    state = {re.sub(r"weight$", f"{_ADAPTER}.weight", name): matrix.float() for name, matrix in pairs.items()}
    try:
        adapted = PeftModel(model, config, _ADAPTER, low_cpu_mem_usage=True)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        _refuse_more_than_low_rank(source, layers, is_tied)
        fit = adapted.load_state_dict(state, strict=False, assign=True)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelError(f"{source.folder}: does not fit {base} ({reason})") from error
    if astray := sorted([*(name for name in fit.missing_keys if ".lora_" in name), *fit.unexpected_keys]):
        raise ModelError(
            f"{source.folder}: {len(astray)} of its matrices are missing or belong to no layer of {base}, first "
            f"{astray[0]}; is this the base it was trained on?"
        )
    return {canonical(name): layer for name, layer in layers.items()}


def _refuse_more_than_low_rank(source: AdapterSource, layers: Mapping[str, LoraLayer], is_tied: bool) -> None:
    for name, layer in layers.items():
        if layer.lora_variant:
            variant = type(layer.lora_variant[_ADAPTER]).__name__
            raise ModelError(f"{source.folder}: trained with PEFT's {variant}; only plain LoRA layers can be merged")
        if is_tied and name.endswith(("lm_head", "embed_tokens")):
            raise ModelError(
                f"{source.folder}: it adapts {name}, whose weight this base uses for both embeddings and lm_head; "
                "a merge would change both. Train without it"
            )


def canonical(name: str) -> str:
    """A weight's name without the prefixes that differ between checkpoints and loaded models.

    Checkpoints say model.layers.0 and visual.blocks.0, transformers model.language_model.layers.0 and
    model.visual.blocks.0.
    """
    return re.sub(r"^((model|language_model)\.)+", "", name)
