"""What `apo-lora doctor` looks at: installed versions, whether libraries import, the GPU, memory, disk, tools.

Libraries are imported in processes of their own: one that crashes, prints or hangs harms nothing here, and the free
GPU memory is what others left. Torch is never imported in this one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

from apo_lora.family.lookup import FAMILIES

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
    """All that the checks look at. Package names are canonical: lower case, with hyphens."""

    python: tuple[int, int]
    installed: Mapping[str, str]
    tested: Mapping[str, str]
    broken: Mapping[str, str]
    """Package -> why it does not import."""
    torch_of_torchvision: str | None
    gpu: Gpu | None
    gpu_problem: str | None
    """Why torch cannot use the GPU that the driver shows; None where there is neither."""
    free_ram: int | None
    free_disk: int
    free_hub_disk: int | None
    """Where the Hub's files go; None where that is the same disk."""
    commands: frozenset[str]
    has_token: bool
    cache: Path
    """Unsloth's rewritten trainers."""
    installed_at: float
    """When the youngest of CACHE_PACKAGES was installed."""


def look() -> Host:
    installed = installed_versions()
    cache = Path(os.environ.get("UNSLOTH_COMPILE_LOCATION") or "unsloth_compiled_cache")
    hub, has_token = _hub()
    # One process for all, since each would import torch again; what may crash comes last.
    in_order = (
        "torch",
        "gpu",
        "torchvision",
        "transformers",
        "trl",
        "peft",
        "apo-lora",
        "bitsandbytes",
        "xformers",
        "flash-attn",
    )
    tried = try_out([name for name in in_order if name in installed or name in ("gpu", "apo-lora")])
    gpu = tried.pop("gpu")
    if gpu.value and "unsloth" in installed:
        tried |= try_out(["unsloth"])  # it wants to come before the others, and raises where there is no GPU
    return Host(
        python=sys.version_info[:2],
        installed=installed,
        tested=tested_versions(),
        broken={name: outcome.problem for name, outcome in tried.items() if outcome.problem},
        torch_of_torchvision=_torch_of_torchvision(),
        gpu=_as_gpu(gpu.value) if gpu.value else None,
        gpu_problem=gpu.problem if gpu.problem and _driver_sees_gpu() else None,
        free_ram=_free_ram(),
        free_disk=shutil.disk_usage(".").free,
        free_hub_disk=None if os.stat(hub).st_dev == os.stat(".").st_dev else shutil.disk_usage(hub).free,
        commands=frozenset(name for name in LLAMA_CPP if shutil.which(name)),
        has_token=has_token,
        cache=cache,
        installed_at=_installed_at(),
    )


def find_gpu() -> Gpu | None:
    """The GPU that training would use, asked for in another process: this one takes none of its memory."""
    value = try_out(["gpu"])["gpu"].value
    return _as_gpu(value) if value else None


# --- versions --------------------------------------------------------------------------------------------------------


def canonical(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def installed_versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        if name := distribution.metadata["Name"]:
            found.setdefault(canonical(name), distribution.version)  # the first on the path is what gets imported
    return found


def tested_versions(locations: Sequence[Path] = _CONSTRAINTS) -> dict[str, str]:
    """Package -> version, out of constraints.txt; empty where there is none."""
    for path in locations:
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            pins = (line.partition("#")[0].strip().partition("==") for line in lines)
            return {canonical(name): version for name, equals, version in pins if equals}
    return {}


def _torch_of_torchvision() -> str | None:
    try:
        wanted = metadata.requires("torchvision") or []
    except metadata.PackageNotFoundError:
        return None
    pins = (re.fullmatch(r"torch\s*\(?==([\w.+]+)\)?", line.partition(";")[0].strip()) for line in wanted)
    return next((pin[1] for pin in pins if pin), None)


def _installed_at() -> float:
    times = [0.0]
    for name in CACHE_PACKAGES:
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            continue
        times += [Path(file.locate()).stat().st_mtime for file in files if file.name == "METADATA"]
    return max(times)


# --- what imports ----------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    problem: str | None
    value: Any = None


def try_out(names: Sequence[str], seconds: float = _SECONDS) -> dict[str, Outcome]:
    """Runs the PROBES of these names in another process, in this order; in a fresh one after a crash or a time-out."""
    outcomes: dict[str, Outcome] = {}
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    environment.pop("UNSLOTH_COMPILE_LOCATION", None)  # what Unsloth writes goes into the temporary folder
    while left := [name for name in names if name not in outcomes]:
        command = [sys.executable, "-c", f"from apo_lora.machine.host import answer; answer({left!r})"]
        with tempfile.TemporaryDirectory() as folder:
            try:
                finished = subprocess.run(
                    command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL, timeout=seconds,
                )  # fmt: skip
                output, ending = finished.stdout, f"it ended the interpreter (exit code {finished.returncode})"
            except subprocess.TimeoutExpired as error:
                output, ending = error.stdout or b"", f"no answer within {seconds:.0f} seconds"
        for line in output.decode(errors="replace").splitlines():
            if line.startswith(_MARK):
                name, problem, value = json.loads(line.removeprefix(_MARK))
                outcomes[name] = Outcome(problem, value)
        if silent := [name for name in left if name not in outcomes]:
            outcomes[silent[0]] = Outcome(ending)
    return outcomes


def answer(names: Sequence[str]) -> None:
    """The other process: one marked line per name, among whatever the libraries print."""
    for name in names:
        problem = value = None
        try:
            value = PROBES[name]()
        except (Exception, SystemExit) as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"[:240]
        print(f"\n{_MARK}{json.dumps([name, problem, value])}", flush=True)


def _importing(module: str, *attributes: str) -> Callable[[], None]:
    """Several packages load their parts when they are asked for them: so ask."""

    def probe() -> None:
        imported = import_module(module)
        for attribute in attributes:
            getattr(imported, attribute)

    return probe


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


def _gpu() -> dict[str, Any] | None:
    import torch

    from apo_lora.machine.device import choose_dtype

    if torch.version.cuda is None:
        raise RuntimeError("this torch is built without CUDA")
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


def _as_gpu(value: Mapping[str, Any]) -> Gpu:
    """Out of JSON, where tuples are lists."""
    return Gpu(**{key: tuple(item) if isinstance(item, list) else item for key, item in value.items()})


PROBES: dict[str, Callable[[], Any]] = {
    "apo-lora": _importing("apo_lora.trainer"),
    "torch": _importing("torch"),
    "torchvision": _importing("torchvision"),
    "transformers": _importing("transformers", *(family.model_class for family in FAMILIES.values())),
    "trl": _importing("trl", "GRPOTrainer"),
    "peft": _importing("peft", "get_peft_model"),
    "bitsandbytes": _bitsandbytes,
    "xformers": _xformers,
    "flash-attn": _importing("flash_attn", "flash_attn_func"),
    "unsloth": _importing("unsloth", "FastVisionModel"),
    "gpu": _gpu,
}


# --- the machine -----------------------------------------------------------------------------------------------------


def _driver_sees_gpu() -> bool:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and b"GPU" in listed.stdout


def _free_ram() -> int | None:
    try:
        import psutil  # accelerate brings it
    except ImportError:
        return None
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's, which psutil does not see
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(free, int(text)) if text.isdigit() else free


def _hub() -> tuple[Path, bool]:
    """The folder that holds the Hub's files (or will: then the one above it), and whether there is a token."""
    try:
        from huggingface_hub import get_token
        from huggingface_hub.constants import HF_HUB_CACHE
    except Exception:  # whatever a broken installation raises; the rows on transformers and trl say that it is broken
        folder, has_token = Path.home(), bool(os.environ.get("HF_TOKEN"))
    else:
        folder, has_token = Path(HF_HUB_CACHE).absolute(), get_token() is not None
    return next(path for path in (folder, *folder.parents) if path.is_dir()), has_token
