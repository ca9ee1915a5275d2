"""What `apo-lora doctor` looks at: installed versions, whether libraries import, the GPU, memory, disk, tools.

Libraries are imported in separate processes: one that crashes, prints or hangs does no harm here, and uses none of the
free GPU memory that is reported. This process never imports torch.
"""

import json
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from apo_lora.family.lookup import FAMILIES
from apo_lora.machine import vllm_environment

CACHE_PACKAGES = ("unsloth-zoo", "unsloth", "transformers", "trl")  # in the order of a cached file's first lines
LLAMA_CPP = ("llama-mtmd-cli", "llama-quantize", "convert_hf_to_gguf.py")

_SECONDS = 180  # for one set of imports; measured: 10 to 20
_MARK = "@doctor "

# What a wheel carries inside the package (pyproject.toml puts it there), or the checkout's own.
_PACKAGE = Path(__file__).parent.parent
_CONSTRAINTS = (_PACKAGE / "constraints.txt", _PACKAGE.parent / "constraints.txt")


@dataclass(frozen=True)
class Gpu:
    name: str
    count: int
    capability: tuple[int, int]
    architectures: tuple[str, ...]
    """What this torch has kernels for: sm_90, compute_120, ..."""
    dtype: str
    free_bytes: int
    total_bytes: int
    cuda: str


@dataclass(frozen=True)
class Host:
    """The input of doctor's lines. Package names are canonical: lower case, with hyphens."""

    python: str
    python_allowed: str
    """What apo-lora's own metadata says, as >=3.11,<3.13."""
    installed: Mapping[str, str]
    tested: Mapping[str, str]
    broken: Mapping[str, str]
    """Package -> why it cannot be imported."""
    torch_of_torchvision: str | None
    gpu: Gpu | None
    gpu_problem: str | None
    """Why torch cannot use the GPU that the driver lists; None where there is neither."""
    free_ram: int
    free_disk: int
    free_hub_disk: int | None
    """Where the Hub's files go; None where that is the same disk."""
    commands: frozenset[str]
    has_token: bool
    vllm_problem: str | None
    """Why vLLM's own environment cannot be used; None where it can."""
    cache: Path
    """Unsloth's rewritten trainers."""


def look() -> Host:
    packages = distributions()
    hub, has_token = _hub()
    names = [name for name in IMPORTS if name in packages or name in ("gpu", "apo-lora")]
    tried = try_imports([name for name in names if name != "unsloth"])
    gpu = tried.pop("gpu")
    if gpu.value and "unsloth" in names:
        tried |= try_imports(["unsloth"])  # it has to come before the others, and raises where there is no GPU
    return Host(
        python="{}.{}".format(*sys.version_info),
        python_allowed=_python_of(packages.get("apo-lora")),
        installed={name: package.version for name, package in packages.items()},
        tested=tested_versions(),
        broken={name: result.problem for name, result in tried.items() if result.problem},
        torch_of_torchvision=_torch_of(packages.get("torchvision")),
        gpu=_as_gpu(gpu.value),
        gpu_problem=gpu.problem if gpu.problem and vllm_environment.driver_sees_gpu() else None,
        free_ram=_free_ram(),
        free_disk=shutil.disk_usage(".").free,
        free_hub_disk=None if os.stat(hub).st_dev == os.stat(".").st_dev else shutil.disk_usage(hub).free,
        commands=frozenset(name for name in LLAMA_CPP if shutil.which(name)),
        has_token=has_token,
        vllm_problem=vllm_environment.problem(),
        cache=Path(os.environ.get("UNSLOTH_COMPILE_LOCATION") or "unsloth_compiled_cache"),
    )


def find_gpu() -> Gpu | None:
    """The GPU that training would use, asked for in another process: this one takes none of its memory."""
    return _as_gpu(try_imports(["gpu"])["gpu"].value)


# --- versions --------------------------------------------------------------------------------------------------------


def distributions() -> dict[str, Distribution]:
    """By canonical name; of several the first on the path, which is the one that gets imported."""
    found: dict[str, Distribution] = {}
    for distribution in metadata.distributions():
        if name := distribution.metadata["Name"]:
            found.setdefault(canonicalize_name(name), distribution)
    return found


def tested_versions(locations: Sequence[Path] = _CONSTRAINTS) -> dict[str, str]:
    """Package -> version, out of constraints.txt; empty where there is none."""
    for path in locations:
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            pins = (line.partition("#")[0].strip().partition("==") for line in lines)
            return {canonicalize_name(name): version for name, equals, version in pins if equals}
    return {}


def _python_of(package: Distribution | None) -> str:
    """What it says of Python, as >=3.11,<3.13; nothing of a checkout that is only on the path."""
    return (package and package.metadata["Requires-Python"]) or ""


def _torch_of(torchvision: Distribution | None) -> str | None:
    wanted = map(Requirement, (torchvision and torchvision.requires) or [])
    pins = (pin for requirement in wanted if requirement.name == "torch" for pin in requirement.specifier)
    return next((pin.version for pin in pins if pin.operator == "=="), None)


# --- what imports ----------------------------------------------------------------------------------------------------


class ImportResult(NamedTuple):
    problem: str | None
    value: Any = None


def try_imports(names: Sequence[str], seconds: float = _SECONDS) -> dict[str, ImportResult]:
    """Tries these of IMPORTS in another process, in this order; in a fresh one after a crash or a time-out."""
    results: dict[str, ImportResult] = {}
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    environment.pop("UNSLOTH_COMPILE_LOCATION", None)  # what Unsloth writes goes into the temporary folder
    while left := [name for name in names if name not in results]:
        command = [sys.executable, "-c", f"from apo_lora.machine.host import print_results; print_results({left!r})"]
        with tempfile.TemporaryDirectory() as folder:
            try:
                finished = subprocess.run(
                    command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL, timeout=seconds,
                )  # fmt: skip
                output, ending = finished.stdout, f"the interpreter crashed (exit code {finished.returncode})"
            except subprocess.TimeoutExpired as error:
                output, ending = error.stdout or b"", f"no answer within {seconds:.0f} seconds"
        for line in output.decode(errors="replace").splitlines():
            if line.startswith(_MARK):
                name, problem, value = json.loads(line.removeprefix(_MARK))
                results[name] = ImportResult(problem, value)
        if silent := [name for name in left if name not in results]:
            results[silent[0]] = ImportResult(ending)
    return results


def print_results(names: Sequence[str]) -> None:
    """The other process: one marked line per name, among whatever the libraries print."""
    for name in names:
        problem = value = None
        try:
            if isinstance(wanted := IMPORTS[name], str):
                pkgutil.resolve_name(wanted)
            else:
                value = wanted()
        except (Exception, SystemExit) as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"[:240]
        print(f"\n{_MARK}{json.dumps([name, problem, value])}", flush=True)


def _gpu() -> dict[str, Any] | None:
    import torch

    from apo_lora.machine.device import choose_dtype

    if torch.version.cuda is None:
        raise RuntimeError("this torch build has no CUDA support")
    torch.cuda.init()  # says why, where is_available() only says no
    free_bytes, total_bytes = torch.cuda.mem_get_info(0)
    properties = torch.cuda.get_device_properties(0)
    dtype = choose_dtype("auto", True, torch.cuda.is_bf16_supported(including_emulation=False))
    return asdict(
        Gpu(
            name=properties.name,
            count=torch.cuda.device_count(),
            capability=(properties.major, properties.minor),
            architectures=tuple(torch.cuda.get_arch_list()),
            dtype=str(dtype).removeprefix("torch."),
            free_bytes=free_bytes,
            total_bytes=total_bytes,
            cuda=torch.version.cuda,
        )
    )


def _as_gpu(value: Mapping[str, Any] | None) -> Gpu | None:
    """Out of JSON, where tuples are lists."""
    if value is None:
        return None
    return Gpu(**{key: tuple(item) if isinstance(item, list) else item for key, item in value.items()})


def _xformers() -> None:
    """Built for another torch it imports, without its kernels and with a warning."""
    problem = import_module("xformers._cpp_lib")._cpp_library_load_exception
    if problem is not None:
        raise problem
    import_module("xformers.ops")


def _bitsandbytes() -> None:
    """Without a library for this CUDA it imports too, and raises when first used."""
    import torch

    library = import_module("bitsandbytes.cextension").lib
    if torch.cuda.is_available() and "ErrorHandlerMock" in type(library).__name__:
        raise RuntimeError(library.formatted_error)


def _transformers() -> None:
    for family in FAMILIES.values():
        pkgutil.resolve_name(f"transformers:{family.model_class}")


# A name to import, or a function. Several packages load their parts when they are asked for them: so a part is named.
# In this order in one process, since each would import torch again; what may crash comes last.
IMPORTS: dict[str, str | Callable[[], Any]] = {
    "torch": "torch",
    "gpu": _gpu,
    "torchvision": "torchvision",
    "transformers": _transformers,
    "trl": "trl:GRPOTrainer",
    "peft": "peft:get_peft_model",
    "apo-lora": "apo_lora.trainer",
    "bitsandbytes": _bitsandbytes,
    "xformers": _xformers,
    "flash-attn": "flash_attn:flash_attn_func",
    "unsloth": "unsloth:FastVisionModel",
}


# --- the machine -----------------------------------------------------------------------------------------------------


def _free_ram() -> int:
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's, which psutil does not see
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(free, int(text)) if text.isdigit() else free


def _hub() -> tuple[Path, bool]:
    """The folder that holds the Hub's files (or will: then the one above it), and whether there is a token."""
    try:
        from huggingface_hub import get_token
        from huggingface_hub.constants import HF_HUB_CACHE
    except Exception:  # whatever a broken installation raises; the lines on transformers and trl say that it is broken
        folder, has_token = Path.home(), bool(os.environ.get("HF_TOKEN"))
    else:
        folder, has_token = Path(HF_HUB_CACHE).absolute(), get_token() is not None
    return next(path for path in (folder, *folder.parents) if path.is_dir()), has_token
