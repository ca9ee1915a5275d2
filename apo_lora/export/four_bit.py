"""A base as training held it in 4 bits: its weights one by one, dequantised by bitsandbytes, and the model itself.

Either a repository holds them packed, or loading packed the 16-bit ones; then `FOUR_BIT` beside the adapter says how.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Params4bit
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from apo_lora.errors import ModelError
from apo_lora.export.base import Base, weight_bytes, weight_files
from apo_lora.machine.compat import dequantize_blocks_across_rows_on_cpu, fix_4bit_on_cpu
from apo_lora.policy.loading import nf4_config
from apo_lora.run.adapter import four_bit_layers

SHARD_BYTES = 2 * 2**30
"""Of what is written for a packed base; a base in 16 bits keeps its own shards."""

_PART = re.compile(r"(.+\.weight)\.(.+)")  # x.weight.absmax and others, beside the packed x.weight


def device() -> torch.device:
    """Where weights are packed and unpacked; on a CPU as correctly as in training."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    dequantize_blocks_across_rows_on_cpu()
    return torch.device("cpu")


def through_4_bits(weight: Tensor, how: Mapping[str, Any]) -> Tensor:
    """What a layer computes with whose `weight` was packed while it was loaded, in the dtype of `weight`."""
    packed = Params4bit(
        weight.to(getattr(torch, how["dtype"])),
        requires_grad=False,
        quant_type=how["quant_type"],
        compress_statistics=how["double_quant"],
    ).to(device())
    return dequantize_bnb_weight(packed).to("cpu", weight.dtype)


class PackedWeights:
    """Those of a folder with bitsandbytes' 4-bit weights, read one at a time."""

    split: StateDictSplit
    """The files of at most SHARD_BYTES that hold all of it unpacked."""

    def __init__(self, folder: Path):
        files = [safe_open(path, "pt") for path in weight_files(folder)]
        self._file = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        self._parts: dict[str, dict[str, str]] = {}
        for name in self._file:
            if part := _PART.fullmatch(name):
                self._parts.setdefault(part[1], {})[part[2]] = name
        empty = {name: self._without_data(name) for name in self._file if not _PART.fullmatch(name)}
        self.split = split_torch_state_dict_into_shards(empty, max_shard_size=SHARD_BYTES)

    def shards(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Each file's name and weights, in the dtypes that their layers compute in."""
        for file, names in self.split.filename_to_tensors.items():
            yield file, {name: self._read(name) for name in names}

    def _read(self, name: str) -> Tensor:
        weight = self._file[name].get_tensor(name)
        if name not in self._parts:
            return weight
        packed = Params4bit.from_prequantized(weight, self._read_parts(name), device=device())
        return dequantize_bnb_weight(packed).cpu()

    def _read_parts(self, name: str) -> dict[str, Tensor]:
        return {part: self._file[key].get_tensor(key) for part, key in self._parts[name].items()}

    def _without_data(self, name: str) -> Tensor:
        if name not in self._parts:
            return self._file[name].get_tensor(name).to("meta")
        state = QuantState.from_dict(self._read_parts(name), device=torch.device("cpu"))
        return torch.empty(state.shape, dtype=state.dtype, device="meta")


def merged_bytes(base: Base) -> int:
    """Of the weights that a merge writes."""
    return PackedWeights(base.folder).split.metadata["total_size"] if base.is_packed else weight_bytes(base.folder)


def load_as_trained(base: Base) -> nn.Module:
    """The base by plain transformers, with the layers in 4 bits that were so in training. Raises ModelError."""
    options: dict[str, Any] = {"dtype": "auto"}
    if base.rounded:
        dtype, layers = getattr(torch, base.rounded["dtype"]), base.rounded["layers"]
        others = rf"(?!({'|'.join(map(re.escape, layers))})$)"  # transformers reads it as the start of a name
        options = {"dtype": dtype, "quantization_config": nf4_config(dtype, [others])}
    model = AutoModelForImageTextToText.from_pretrained(
        base.folder, device_map={"": device()}, trust_remote_code=False, use_safetensors=True, **options
    )
    if base.rounded and four_bit_layers(model) != base.rounded:
        raise ModelError(f"{base.folder}: loads with other layers in 4 bits than were trained on; use --onto original")
    if device().type == "cpu":
        fix_4bit_on_cpu(model)
    return model.eval()
