"""An adapter merged into its 16-bit base: a Hugging Face folder, written one shard at a time.

PEFT says what the adapter adds to a weight. That is added in float32 and rounded once to the base's own dtype. Memory
holds one shard of the base and the adapter; the model that PEFT puts its layers into has no weights.
"""

import shutil
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
from apo_lora.export.base import COMPANIONS, weight_bytes, weight_files
from apo_lora.export.image_limits import write_image_limits
from apo_lora.family.lookup import family_of_base
from apo_lora.policy.tuned import load_adapter, lora_config
from apo_lora.run.adapter import CONFIG, WEIGHTS, AdapterSource

_PAIR = (".lora_A.weight", ".lora_B.weight")


def merge(source: AdapterSource, base: Path, folder: Path) -> None:
    """Writes base + adapter into the existing `folder`: weights, configs, tokenizer, processor. Raises ModelError."""
    weight_name = family_of_base(str(base)).weight_name
    layers = {weight_name(name): layer for name, layer in lora_layers(source, base).items()}
    unused = set(layers)
    with tqdm(total=weight_bytes(base), unit="B", unit_scale=True, desc="merging") as bar:
        for path in weight_files(base):
            with safe_open(path, "pt") as shard:
                tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
                metadata = shard.metadata()
            for name, weight in tensors.items():
                if (layer := weight_name(name.removesuffix(".weight"))) in layers:
                    unused.discard(layer)
                    tensors[name] = merged_weight(layer, weight, layers[layer])
            save_file(tensors, folder / path.name, metadata=metadata)
            bar.update(path.stat().st_size)
    if unused:
        raise ModelError(
            f"{base}: has no weights for {len(unused)} of the adapter's layers, such as {min(unused)}; use the base "
            "that it was trained on"
        )
    for path in base.iterdir():
        if path.suffix in COMPANIONS and path.is_file():
            shutil.copyfile(path, folder / path.name)
    if recipe := source.recipe:
        write_image_limits(folder, recipe.data)


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
