"""The processes of one run, one per GPU: who writes, what they agree on, what they add up.

`accelerate launch` and `torchrun` start them and say in the environment which is which. With one process everything
here is the identity, and torch's distributed package is never touched.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from apo_lora.errors import TrainingStopped

Item = TypeVar("Item")


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """The one that prints, and that writes all files of the run."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the functions below can be called. Every process calls them in the same order."""
    if num_processes() == 1:
        yield
        return
    import torch
    from accelerate import PartialState

    from apo_lora.machine.compat import let_gloo_finish, load_onto_numbered_cpus

    state = PartialState(cpu=not torch.cuda.is_available())  # NCCL between GPUs, gloo between CPU processes
    if state.backend == "gloo":
        load_onto_numbered_cpus()
    yield
    # Not after an error: the others may be waiting inside a collective call, and the launcher ends them.
    if state.backend == "gloo":
        let_gloo_finish()
    state.destroy_process_group()


@contextmanager
def lost_process_as_one_line(kept: str) -> Iterator[None]:
    """Turns the error that a collective call raises when another process has ended into a TrainingStopped."""
    try:
        yield
    except RuntimeError as error:
        if num_processes() == 1 or not any(words in str(error) for words in _LOST):
            raise
        raise TrainingStopped(
            f"another process of this run has ended, so this one stops; the other's own message, if any, says why. "
            f"{kept}; continue with the same number of processes and --resume auto"
        ) from error


# gloo's messages; NCCL ends the process from its own thread.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")


def wait() -> None:
    """Until every process is here."""
    summed({"here": 1.0})


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """Each value's sum over the processes, which all give the same keys in the same order."""
    if num_processes() == 1:
        return dict(values)
    import torch

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return dict(zip(values, total.tolist(), strict=True))


def any_rank(flag: bool) -> bool:
    """Whether the flag is up on at least one process."""
    return summed({"flag": float(flag)})["flag"] > 0


def gathered(items: Sequence[Item]) -> list[Item]:
    """All processes' items, in the order of the ranks, on every one of them. Items are pickled: no tensors."""
    if num_processes() == 1:
        return list(items)
    import torch

    parts: list[Sequence[Item] | None] = [None] * num_processes()
    torch.distributed.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def sum_gradients(parameters: Sequence) -> None:
    """Adds every parameter's gradient up over the processes, in place; one message for all of them.

    A sum, not a mean: the loss is divided by the counts of the whole optimizer step already.
    """
    if num_processes() == 1:
        return
    import torch

    flat = torch.cat([p.grad.flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = total.view_as(parameter).to(parameter.dtype)
