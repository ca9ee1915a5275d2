"""What a program asks of the null GPU, for models that would be too much for the CPU.

Operations on small tensors are computed, so that whatever decides on lengths, masks and counts goes the way it does on
a GPU; those on large ones are left out, and their results are zeros or anything. Either way the card is asked for
every operation as well: its memory and its launches are a real one's.
"""

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_map

from tools.null_gpu.on_cpu import ComputedOnCPU, compute, launches, result_on_cpu, same_memory, tensors_in

LARGEST = {True: 300_000, False: 30_000_000}
"""Values in the tensors of an operation that is computed: floating-point ones, and others."""

NEVER_COMPUTED = ("attention", "bitsandbytes::", "::_fused", "mm", "convolution", "multinomial")
SHAPED_BY_VALUES = {
    "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "masked_scatter_backward",
    "repeat_interleave", "bincount", "equal",
}  # fmt: skip
WRITTEN_ONLY = {
    "fill_", "zero_", "zeros", "ones", "full", "arange", "zeros_like", "ones_like", "full_like", "new_full",
    "new_zeros",
}  # fmt: skip


class Work(NamedTuple):
    operations: int = 0
    bytes: int = 0
    """Read and written; a tensor that an operation reads or writes counts once."""
    launches: int = 0

    def plus(self, other: "Work") -> "Work":
        return Work(*(mine + its for mine, its in zip(self, other, strict=True)))


class Counting(ComputedOnCPU):
    def __init__(self):
        super().__init__()
        self.work: dict[str, Work] = defaultdict(Work)

    def take(self) -> dict[str, Work]:
        """The work since the last call, by operation."""
        taken, self.work = self.work, defaultdict(Work)
        return dict(taken)

    def run(self, func: OpOverload, args: tuple, kwargs: dict) -> Any:
        before, name = launches(), func._schema.name
        short = name.partition("::")[2]
        result = _result(name, short, func, args, kwargs)
        moved = _bytes_moved(short, args, kwargs, result)
        if short == "gemm_4bit" and (dequantised := _dequantised_bytes(args)):
            short, moved = "gemm_4bit, dequantised", moved + dequantised
        self.work[short] = self.work[short].plus(Work(1, moved, launches() - before))
        return result


def _result(name: str, short: str, func: OpOverload, args: tuple, kwargs: dict) -> Any:
    if short in SHAPED_BY_VALUES:
        return compute(func, args, kwargs)
    if short in ("index", "index_put_", "index_put", "_index_put_impl_"):
        args = (args[0], _positions(args[1]), *args[2:])
    is_small = _is_small(args, kwargs) and not any(part in name for part in NEVER_COMPUTED)
    result = _without_cudnn(func, args, kwargs) if short == "convolution" else func(*args, **kwargs)
    made = tensors_in(result)
    if is_small:
        try:
            on_cpu, _ = result_on_cpu(func, args, kwargs)
        except (NotImplementedError, RuntimeError):  # the CPU has no such kernel
            return result
        for tensor, value in zip(made, tensors_in(on_cpu), strict=True):
            target = same_memory(tensor) if tensor.is_cuda else tensor
            if target.data_ptr() != value.data_ptr():
                target.copy_(value)
    else:
        given = set(map(id, tensors_in(args, kwargs)))
        for tensor in made:
            if tensor.is_cuda and id(tensor) not in given and tensor.numel() <= LARGEST[True]:
                same_memory(tensor).zero_()
    return result


def _is_small(args: tuple, kwargs: dict) -> bool:
    values = {True: 0, False: 0}
    for tensor in tensors_in(args, kwargs):
        values[tensor.is_floating_point()] += tensor.numel()
    if not any(values.values()) and args and isinstance(args[0], (list, tuple)):  # a tensor of this shape is made
        floating = (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point
        values[floating] = torch.Size(x for x in args[0] if isinstance(x, int)).numel()
    return all(values[kind] <= LARGEST[kind] for kind in values)


def _positions(indices: Any) -> list[Tensor | None]:
    """With the places of True values instead of masks, which the card would count."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            places = (same_memory(index) if index.is_cuda else index).nonzero(as_tuple=True)
            for place in places:
                found.append(torch.empty_like(place, device="cuda"))
                same_memory(found[-1]).copy_(place)
        else:
            found.append(index)
    return found


def _without_cudnn(func: OpOverload, args: tuple, kwargs: dict) -> Tensor:
    args, kwargs = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
    return torch.empty_like(func(*args, **kwargs), device="cuda")


def _bytes_moved(short: str, args: tuple, kwargs: dict, result: Any) -> int:
    given = [tensor for tensor in tensors_in(args, kwargs) if tensor.is_cuda]
    made = [tensor for tensor in tensors_in(result) if tensor.is_cuda]
    if short in WRITTEN_ONLY:
        return sum(map(_size, made))
    if short in ("embedding", "index_select", "gather", "index"):  # not the whole table
        return 2 * sum(map(_size, made))
    if short in ("copy_", "index_copy_", "index_put_", "_index_put_impl_", "scatter_add_"):  # nor all of the target
        return 2 * sum(map(_size, given[1:]))
    return sum(map(_size, given)) + sum(map(_size, made))


def _size(tensor: Tensor) -> int:
    """Bytes of memory behind it: an expanded dimension is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _dequantised_bytes(args: tuple) -> int:
    """Of a product with a 4-bit matrix: the 16-bit one, written and read, where no kernel takes it as it is."""
    from bitsandbytes.backends.cuda import ops

    given, _, (outputs, inputs) = args[:3]
    rows = given.numel() // inputs
    fits = rows <= ops._gemm_4bit_custom_max_m and ops._gemm_4bit_use_custom_fn(0, given.dtype, rows, outputs, inputs)
    return 0 if fits else 4 * outputs * inputs
