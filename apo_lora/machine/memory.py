"""Peak memory of this process's device: the GPU's allocator where there is one, else the process's resident set."""

import sys

import psutil
import torch


def reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Bytes. On a CPU the peak since the process began: the system keeps no other."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident_memory()


def peak_resident_memory() -> int:
    """Bytes: the largest resident set of this process so far (on Windows its largest working set)."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB
