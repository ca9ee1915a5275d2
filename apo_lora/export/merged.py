"""An adapter merged into its base: a Hugging Face folder in 16 bits, written one shard at a time.

PEFT says what the adapter adds to a weight. That is added in float32 and rounded once to the base's own dtype. Memory
holds one shard of the base and the adapter; the model that PEFT puts its layers into has no weights.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText

from apo_lora.errors import ModelError
from apo_lora.export.base import COMPANIONS, INDEX, Base, weight_files
from apo_lora.export.four_bit import PackedWeights, merged_bytes, through_4_bits
from apo_lora.export.image_limits import write_image_limits
from apo_lora.family.lookup import family_of_base
from apo_lora.policy.tuned import load_adapter, lora_config
from apo_lora.run.adapter import CONFIG, WEIGHTS, AdapterSource
from apo_lora.run.files import write_json

_PAIR = (".lora_A.weight", ".lora_B.weight")


def merge(source: AdapterSource, base: Base, folder: Path) -> None:
    """Writes base + adapter into the existing `folder`: weights, configs, tokenizer, processor. Raises ModelError."""
    weight_name = family_of_base(str(base.folder)).weight_name
    layers = {weight_name(name): layer for name, layer in lora_layers(source, base.folder).items()}
    in_4_bits = {weight_name(name) for name in base.rounded["layers"]} if base.rounded else set()
    unused, file_of = layers.keys() | in_4_bits, {}
    with tqdm(total=merged_bytes(base), unit="B", unit_scale=True, desc="merging") as bar:
        for file, tensors in _shards(base):
            file_of |= dict.fromkeys(tensors, file)
            for name, weight in tensors.items():
                layer = weight_name(name.removesuffix(".weight"))
                unused.discard(layer)
                if layer in in_4_bits:
                    tensors[name] = weight = through_4_bits(weight, base.rounded)
                if layer in layers:
                    tensors[name] = merged_weight(layer, weight, layers[layer])
            save_file(tensors, folder / file, metadata={"format": "pt"})
            bar.update((folder / file).stat().st_size)
    if unused:
        raise ModelError(
            f"{base.folder}: has no weights for {len(unused)} of the adapter's layers, such as {min(unused)}; use the "
            "base that it was trained on"
        )
    for path in base.folder.iterdir():
        if path.suffix in COMPANIONS and path.is_file():
            shutil.copyfile(path, folder / path.name)
    if base.is_packed:
        _describe_unpacked(folder, file_of)
    if recipe := source.recipe:
        write_image_limits(folder, recipe.data)


def _shards(base: Base) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Of each file to write, its name and the base's weights."""
    if base.is_packed:
        yield from PackedWeights(base.folder).shards()
        return
    for path in weight_files(base.folder):
        with safe_open(path, "pt") as shard:
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        yield path.name, tensors


def _describe_unpacked(folder: Path, file_of: dict[str, str]) -> None:
    """Corrects the files of a packed base in `folder`: the weights are in 16 bits now, and in files of their own."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    write_json(folder / "config.json", config)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": file_of})


def merged_weight(name: str, weight: Tensor, layer: LoraLayer) -> Tensor:
    """`weight` and what its layer adds to it, in the dtype of `weight`. Raises ModelError where that cannot hold it."""
    merged = (weight.float() + layer.get_delta_weight(layer.active_adapter[0])).to(weight.dtype)
    if not merged.isfinite().all():
        raise ModelError(
            f"{name}: base and adapter add up to values that {weight.dtype} cannot represent; check the adapter"
        )
    return merged


def lora_layers(source: AdapterSource, base: Path) -> dict[str, LoraLayer]:
    """PEFT's layers of the adapter by their name in the model, their matrices in float32. Raises ModelError.

    Only of adapters that are all low-rank pairs: what else training may have changed would be lost.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(base, trust_remote_code=False))
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    try:
        adapted = PeftModel(model, lora_config(source), low_cpu_mem_usage=True)
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(f"{source.folder / CONFIG}: PEFT cannot use it on {base} ({error})") from error
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        if layer.lora_variant:
            variant = type(next(iter(layer.lora_variant.values()))).__name__
            raise ModelError(f"{source.folder}: trained with PEFT's {variant}; only plain LoRA layers can be merged")
        if is_tied and name.endswith(("lm_head", "embed_tokens")):
            raise ModelError(
                f"{source.folder}: adapts {name}, whose weight this base uses for both embeddings and lm_head, so a "
                "merge would change both; train without it"
            )
        # PEFT puts matrices where the weight of their base layer is: one number, repeated, takes no memory there.
        layer.get_base_layer().weight = nn.Parameter(torch.zeros(()).expand(layer.weight.shape))
    load_adapter(adapted, source, assign=True)
    with safe_open(source.folder / WEIGHTS, "pt") as weights:
        if others := [name for name in weights.keys() if not name.endswith(_PAIR)]:  # noqa: SIM118
            raise ModelError(
                f"{source.folder}: {min(others)} is not part of a LoRA pair; only plain LoRA layers can be merged"
            )
    return layers
