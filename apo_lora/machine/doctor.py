"""`apo-lora doctor`: can this machine train, and what differs from what was tested? Plain text, fit for an issue.

Each check turns what `host.look` found into a row; a new check is a function and a line in CHECKS.
Nothing printed holds a token, a user name or the path of a home folder.
"""

import getpass
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from apo_lora import __version__
from apo_lora.machine.host import CACHE_PACKAGES, LLAMA_CPP, Gpu, Host, look
from apo_lora.machine.versions import VLLM

GiB = 2**30

# What a row on a package turns bad for: training needs it always, only where there is a GPU, or never.
PACKAGES = {
    "torch": "always",
    "torchvision": "always",
    "transformers": "always",
    "trl": "always",
    "peft": "always",
    "accelerate": "always",
    "datasets": "always",
    "unsloth-zoo": "gpu",
    "bitsandbytes": "gpu",
    "triton": "never",
}
OWN_ROWS = (*PACKAGES, "unsloth", "xformers")
TORCH_FAMILY = ("torch", "torchvision", "triton", "xformers")  # built for each other: installed in one line


@dataclass(frozen=True)
class Row:
    name: str
    status: Literal["ok", "note", "bad"]
    """bad: training could not work here at all."""
    found: str
    remedy: str = ""

    def lines(self) -> list[str]:
        return [f"{self.status:<5} {self.name:<15} {self.found}", *([f"      -> {self.remedy}"] if self.remedy else [])]


# --- the checks ------------------------------------------------------------------------------------------------------


def check_python(version: tuple[int, int]) -> Row:
    found = ".".join(map(str, version))
    if version in ((3, 11), (3, 12)):
        return Row("python", "ok", found)
    return Row("python", "bad", f"{found}; 3.11 and 3.12 work", "make a virtual environment with Python 3.12")


def check_apo_lora(version: str, broken: Mapping[str, str]) -> Row:
    if "apo-lora" in broken:
        remedy = "see the rows below; pip install --constraint constraints.txt --editable . in the checkout"
        return Row("apo-lora", "bad", f"{version}: its trainer does not import: {broken['apo-lora']}", remedy)
    return Row("apo-lora", "ok", version)


def check_tested_set(installed: Mapping[str, str], tested: Mapping[str, str]) -> Row:
    """The packages behind those that have a row of their own."""
    if not tested:
        return Row("tested set", "note", "constraints.txt cannot be read", "install apo-lora again")
    rest = {name: installed[name] for name in tested if name in installed and name not in OWN_ROWS}
    other = [name for name, version in rest.items() if not _same(version, tested[name])]
    if not other:
        return Row("other packages", "ok", f"all {len(rest)} as tested")
    shown = ", ".join(f"{name} {rest[name]}" for name in other[:6]) + (" ..." if len(other) > 6 else "")
    return Row("other packages", "note", f"{len(other)} of {len(rest)} not as tested: {shown}", _pip(tested, *other))


def check_package(
    name: str,
    needed: bool,
    installed: Mapping[str, str],
    tested: Mapping[str, str],
    broken: Mapping[str, str],
) -> Row:
    install = _pip(tested, *(TORCH_FAMILY if name in TORCH_FAMILY else (name,)))
    if name not in installed:
        return Row(name, "bad" if needed else "note", "not installed", install)
    if name in broken:
        found = f"{installed[name]} does not import: {broken[name]}"
        return Row(name, "bad" if needed else "note", found, install + " --force-reinstall --no-deps")
    if name in tested and not _same(installed[name], tested[name]):
        return Row(name, "note", f"{installed[name]}; tested with {tested[name]}", install)
    return Row(name, "ok", installed[name] + (", as tested" if name in tested else ""))


def check_torchvision_match(torch: str | None, wanted: str | None, tested: Mapping[str, str]) -> Row | None:
    """Each torchvision is built for one torch; the image processor of Qwen2.5-VL runs through it."""
    if torch is None or wanted is None or _same(torch, wanted):
        return None
    return Row("torch pair", "bad", f"torchvision wants torch {wanted}, found {torch}", _pip(tested, *TORCH_FAMILY))


def check_unsloth(
    has_gpu: bool, installed: Mapping[str, str], tested: Mapping[str, str], broken: Mapping[str, str]
) -> Row:
    row = check_package("unsloth", has_gpu, installed, tested, broken)
    return row if has_gpu else replace(row, found=f"{row.found}; imports only where there is a GPU")


def check_xformers(installed: Mapping[str, str], tested: Mapping[str, str], broken: Mapping[str, str]) -> Row:
    row = check_package("xformers", False, installed, tested, broken)
    if "xformers" in broken or "xformers" not in installed:
        return replace(row, found=f"{row.found}; PyTorch's attention serves instead")
    return row


def check_gpu(gpu: Gpu | None, problem: str | None) -> Row:
    if gpu is not None:
        which = "" if gpu.count == 1 else f", the first of {gpu.count}"
        return Row("GPU", "ok", f"{gpu.name}{which}, CUDA {gpu.cuda}")
    works = "the embedded default, tiny_cpu.yaml, trains on the CPU"
    if problem is None:
        return Row("GPU", "note", f"none; {works}", "the recipes for Qwen2.5-VL-3B need a CUDA GPU, or Colab's")
    remedy = "see that CUDA_VISIBLE_DEVICES is unset, torch built for CUDA, and the driver new enough for that CUDA"
    return Row("GPU", "note", f"the driver shows one that torch cannot use: {problem}; {works}", remedy)


def check_capability(gpu: Gpu | None, tested: Mapping[str, str]) -> Row | None:
    if gpu is None:
        return None
    found = f"{gpu.capability[0]}.{gpu.capability[1]}"
    if gpu.architectures and not any(_runs_on(gpu.capability, code) for code in gpu.architectures):
        known = " ".join(gpu.architectures)
        remedy = f"{_pip(tested, *TORCH_FAMILY)}; an older card needs another machine (or CUDA_VISIBLE_DEVICES=)"
        return Row("capability", "bad", f"{found}; this torch has kernels for {known} only", remedy)
    return Row("capability", "ok", f"{found}, trains in {gpu.dtype}")


def check_vram(gpu: Gpu | None) -> Row | None:
    if gpu is None:
        return None
    found = f"{_gib(gpu.free_bytes)} free of {_gib(gpu.total_bytes)}"
    holder = "nvidia-smi lists the processes that hold the rest"
    if gpu.free_bytes < 1 * GiB:
        return Row("VRAM", "bad", found, f"{holder}; or train tiny_cpu.yaml with CUDA_VISIBLE_DEVICES= on the CPU")
    if gpu.free_bytes < 7 * GiB:
        return Row("VRAM", "note", found, f"gpu_8gb.yaml, the smallest 3B recipe, is for 8 GB; {holder}")
    return Row("VRAM", "ok", found)


def check_ram(free: int | None) -> Row:
    if free is None:
        return Row("RAM", "note", "not known", "the embedded run takes 1.7 GiB, merging a 3B model 8")
    if free < 2 * GiB:
        return Row("RAM", "bad", f"{_gib(free)} free; the embedded run takes 1.7 GiB", "close other programs")
    if free < 8 * GiB:
        return Row(
            "RAM", "note", f"{_gib(free)} free", "merging a 3B model in 16 bits takes 8 GiB; close other programs"
        )
    return Row("RAM", "ok", f"{_gib(free)} free")


def check_disk(free: int) -> Row:
    """Where runs are written."""
    if free < GiB // 5:
        return Row("disk here", "bad", f"{_gib(free)} free", "make room, or start from a folder on another disk")
    if free < 20 * GiB:
        remedy = (
            "a 3B model takes 3 GiB in 4-bit, its merged copy 8 and its GGUF files 8 more: output.dir chooses the disk"
        )
        return Row("disk here", "note", f"{_gib(free)} free", remedy)
    return Row("disk here", "ok", f"{_gib(free)} free")


def check_hub_disk(free: int | None) -> Row | None:
    if free is None:
        return None
    if free < 10 * GiB:
        return Row("disk, Hub cache", "note", f"{_gib(free)} free", "models are downloaded there; HF_HOME moves it")
    return Row("disk, Hub cache", "ok", f"{_gib(free)} free")


def check_flash_attention(installed: Mapping[str, str], broken: Mapping[str, str]) -> Row:
    remedy = "not needed: xformers or PyTorch's attention serves; it must be built for this torch"
    if "flash-attn" not in installed:
        return Row("flash attention", "note", "not installed", remedy)
    if "flash-attn" in broken:
        found = f"{installed['flash-attn']} does not import: {broken['flash-attn']}"
        return Row("flash attention", "note", found, f"pip uninstall flash-attn ({remedy})")
    return Row("flash attention", "ok", installed["flash-attn"])


def check_vllm(installed: Mapping[str, str]) -> Row:
    if "vllm" not in installed:
        remedy = f"not needed, and off by default: pip install {VLLM} (it brings an older numpy: ask doctor again)"
        return Row("vLLM", "note", "not installed", remedy)
    return Row("vLLM", "ok", f"{installed['vllm']}; off by default, and there LoRA is on language layers only")


def check_llama_cpp(commands: frozenset[str]) -> Row:
    if absent := [name for name in LLAMA_CPP if name not in commands]:
        remedy = "only for GGUF: build https://github.com/ggml-org/llama.cpp and put it and its scripts on PATH"
        return Row("llama.cpp", "note", f"not on PATH: {', '.join(absent)}", remedy)
    return Row("llama.cpp", "ok", ", ".join(LLAMA_CPP))


def check_hub_token(present: bool) -> Row:
    if present:
        return Row("Hub token", "ok", "present (not shown)")
    return Row("Hub token", "note", "none", "only for gated or private models, and to push: hf auth login")


def check_unsloth_cache(cache: Path, installed: Mapping[str, str], installed_at: float) -> Row:
    """Unsloth writes rewritten trainers into a folder, and on top of each file the versions that it was made by."""
    files = sorted(cache.glob("*.py")) if cache.is_dir() else []
    if not files:
        return Row("Unsloth cache", "ok", "none")
    made_by = [found for file in files if (found := _recorded_versions(file))]
    now = {name: installed.get(name, "0") for name in CACHE_PACKAGES}  # "0" is what Unsloth writes for an absent one
    stale = sorted(
        {f"{name} {was}" for versions in made_by for name, was in versions.items() if not _same(was, now[name])}
    )
    if not made_by and max(file.stat().st_mtime for file in files) < installed_at:
        stale = ["something older than what is installed"]
    if stale:
        return Row("Unsloth cache", "note", f"made by {', '.join(stale)}", f"rm -r {_shown_cache()}")
    return Row("Unsloth cache", "ok", f"{len(files)} files, made by the installed versions")


CHECKS: tuple[Callable[[Host], Row | None], ...] = (
    lambda host: check_python(host.python),
    lambda host: check_apo_lora(__version__, host.broken),
    *(
        # name=name: a lambda looks its names up when called
        lambda host, name=name, need=need: check_package(
            name, need == "always" or (need == "gpu" and bool(host.gpu)), host.installed, host.tested, host.broken
        )
        for name, need in PACKAGES.items()
    ),
    lambda host: check_unsloth(host.gpu is not None, host.installed, host.tested, host.broken),
    lambda host: check_torchvision_match(host.installed.get("torch"), host.torch_of_torchvision, host.tested),
    lambda host: check_tested_set(host.installed, host.tested),
    lambda host: check_gpu(host.gpu, host.gpu_problem),
    lambda host: check_capability(host.gpu, host.tested),
    lambda host: check_vram(host.gpu),
    lambda host: check_ram(host.free_ram),
    lambda host: check_disk(host.free_disk),
    lambda host: check_hub_disk(host.free_hub_disk),
    lambda host: check_xformers(host.installed, host.tested, host.broken),
    lambda host: check_flash_attention(host.installed, host.broken),
    lambda host: check_vllm(host.installed),
    lambda host: check_llama_cpp(host.commands),
    lambda host: check_hub_token(host.has_token),
    lambda host: check_unsloth_cache(host.cache, host.installed, host.installed_at),
)


def examine(host: Host) -> list[Row]:
    return [row for check in CHECKS if (row := check(host)) is not None]


def report(rows: Sequence[Row], where: str) -> str:
    """Text to paste: the rows and a verdict."""
    bad, notes = (sum(row.status == status for row in rows) for status in ("bad", "note"))
    verdict = f"Training cannot work here: {bad} to mend." if bad else f"Training works here, on the {where}."
    head = f"apo-lora {__version__} on {platform.system()} {platform.machine()}"
    lines = [head, "", *(line for row in rows for line in row.lines()), "", f"{verdict} Notes: {notes}."]
    return without_private_names("\n".join(lines))


def without_private_names(text: str, home: str | None = None, user: str | None = None) -> str:
    home, user = home or str(Path.home()), user or _user_name()
    if len(home) > 1:
        text = text.replace(home, "~")
    return re.sub(rf"(?<=/){re.escape(user)}(?=/)", "USER", text) if user else text


def doctor() -> int:
    """Prints the report. Returns 1 if training could not work here."""
    print("Importing the libraries, in a process of their own ...", file=sys.stderr)
    host = look()
    rows = examine(host)
    print(report(rows, "GPU" if host.gpu else "CPU"))
    return int(any(row.status == "bad" for row in rows))


# --- words -----------------------------------------------------------------------------------------------------------


def _same(version: str, other: str) -> bool:
    """2.10.0+cu128 is 2.10.0, built for CUDA 12.8."""
    return version.partition("+")[0] == other.partition("+")[0]


def _pip(tested: Mapping[str, str], *names: str) -> str:
    return "pip install " + " ".join(f"{name}=={tested[name]}" if name in tested else name for name in names)


def _gib(count: int) -> str:
    return f"{count / GiB:.1f} GiB"


def _runs_on(capability: tuple[int, int], architecture: str) -> bool:
    """Machine code (sm_86) runs on its own generation from there on, PTX (compute_90) on everything later.

    A letter behind it (sm_90a) ties it to exactly that one.
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", architecture)
    if match is None:
        return False
    kind, built_for, exact = match[1], (int(match[2]), int(match[3])), bool(match[4])
    if exact:
        return built_for == capability
    return built_for <= capability and (kind == "compute" or built_for[0] == capability[0])


def _recorded_versions(file: Path) -> dict[str, str] | None:
    head, mark, _ = file.read_text(encoding="utf-8", errors="replace").partition("__UNSLOTH_VERSIONING__")
    versions = head.replace('"', "").split()
    return dict(zip(CACHE_PACKAGES, versions, strict=False)) if mark else None


def _shown_cache() -> str:
    return '"$UNSLOTH_COMPILE_LOCATION"' if os.environ.get("UNSLOTH_COMPILE_LOCATION") else "unsloth_compiled_cache"


def _user_name() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry in the password file
        return None
