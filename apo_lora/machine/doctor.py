"""`apo-lora doctor`: can this machine train, and what differs from the tested versions? Plain text for an issue.

Each function turns what `host.look` found into lines. The report contains no token, user name or path of a home folder.
"""

import getpass
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from packaging.specifiers import SpecifierSet

from apo_lora import __version__
from apo_lora.machine.host import CACHE_PACKAGES, LLAMA_CPP, Gpu, Host, look
from apo_lora.machine.vllm_environment import VERSION

GiB = 2**30

# When training needs a package: always, only where there is a GPU, or never.
PACKAGES = {
    "torch": "always", "torchvision": "always", "transformers": "always", "trl": "always", "peft": "always",
    "accelerate": "always", "datasets": "always", "unsloth-zoo": "gpu", "bitsandbytes": "gpu", "triton": "never",
    "unsloth": "gpu",
}  # fmt: skip
OWN_LINES = (*PACKAGES, "xformers")
TORCH_FAMILY = ("torch", "torchvision", "triton", "xformers")  # built for each other: installed by one command


@dataclass(frozen=True)
class DoctorLine:
    name: str
    status: Literal["ok", "note", "bad"]
    """bad: training cannot work here."""
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"\n      -> {self.remedy}" if self.remedy else ""
        return f"{self.status:<5} {self.name:<15} {self.found}{remedy}"


def examine(host: Host) -> list[DoctorLine]:
    return [*software_lines(host), *gpu_lines(host), *room_lines(host), *optional_lines(host), cache_line(host)]


def software_lines(host: Host) -> Iterator[DoctorLine]:
    if host.python in SpecifierSet(host.python_allowed):
        yield DoctorLine("python", "ok", host.python)
    else:
        remedy = f"create a virtual environment with Python {host.python_allowed}"
        yield DoctorLine("python", "bad", f"{host.python}; apo-lora needs {host.python_allowed}", remedy)
    if fault := host.broken.get("apo-lora"):
        remedy = "see the lines below; in the checkout: pip install --constraint constraints.txt --editable ."
        yield DoctorLine("apo-lora", "bad", f"{__version__}: its trainer cannot be imported: {fault}", remedy)
    else:
        yield DoctorLine("apo-lora", "ok", __version__)
    for name, when in PACKAGES.items():
        line = package_line(host, name, needed=when == "always" or (when == "gpu" and host.gpu is not None))
        if name == "unsloth" and host.gpu is None:
            line = replace(line, found=f"{line.found}; can only be imported with a GPU")
        yield line
    # Each torchvision is built for one torch; the image processor of Qwen2.5-VL runs through it.
    torch, wanted = host.installed.get("torch"), host.torch_of_torchvision
    if torch and wanted and not _same(torch, wanted):
        found = f"torchvision needs torch {wanted}, found {torch}"
        yield DoctorLine("torch pair", "bad", found, _pip(host.tested, *TORCH_FAMILY))
    yield other_packages_line(host)


def package_line(host: Host, name: str, *, needed: bool) -> DoctorLine:
    install = _pip(host.tested, *(TORCH_FAMILY if name in TORCH_FAMILY else (name,)))
    fault = "bad" if needed else "note"
    if (version := host.installed.get(name)) is None:
        return DoctorLine(name, fault, "not installed", install)
    if name in host.broken:
        found = f"{version} cannot be imported: {host.broken[name]}"
        return DoctorLine(name, fault, found, f"{install} --force-reinstall --no-deps")
    if name not in host.tested:
        return DoctorLine(name, "ok", version)
    if not _same(version, host.tested[name]):
        return DoctorLine(name, "note", f"{version}; tested with {host.tested[name]}", install)
    return DoctorLine(name, "ok", f"{version}, as tested")


def other_packages_line(host: Host) -> DoctorLine:
    """The tested packages without a line of their own."""
    if not host.tested:
        return DoctorLine("tested set", "note", "constraints.txt cannot be read", "reinstall apo-lora")
    rest = {name: host.installed[name] for name in host.tested if name in host.installed and name not in OWN_LINES}
    other = [name for name, version in rest.items() if not _same(version, host.tested[name])]
    if not other:
        return DoctorLine("other packages", "ok", f"all {len(rest)} as tested")
    shown = ", ".join(f"{name} {rest[name]}" for name in other[:6]) + (" ..." if len(other) > 6 else "")
    found = f"{len(other)} of {len(rest)} differ from the tested versions: {shown}"
    return DoctorLine("other packages", "note", found, _pip(host.tested, *other))


def gpu_lines(host: Host) -> Iterator[DoctorLine]:
    gpu = host.gpu
    if gpu is None:
        works = "the embedded model, tiny_cpu.yaml, trains on the CPU"
        found, remedy = f"none; {works}", "the recipes for Qwen2.5-VL-3B need a CUDA GPU, for example Colab's"
        if host.gpu_problem:
            found = f"the driver lists a GPU that torch cannot use: {host.gpu_problem}; {works}"
            remedy = (
                "check that CUDA_VISIBLE_DEVICES is unset and that torch is built for a CUDA version of this driver"
            )
        yield DoctorLine("GPU", "note", found, remedy)
        return
    which = "" if gpu.count == 1 else f", the first of {gpu.count}"
    yield DoctorLine("GPU", "ok", f"{gpu.name}{which}, CUDA {gpu.cuda}")
    yield capability_line(gpu, host.tested)
    holders = "nvidia-smi lists the processes that use it"
    yield room_line(
        "GPU memory",
        gpu.free_bytes,
        bad=(1, f"{holders}; or train tiny_cpu.yaml on the CPU by setting CUDA_VISIBLE_DEVICES="),
        note=(7, f"the smallest 3B recipe, gpu_8gb.yaml, needs 8 GB; {holders}"),
        total=gpu.total_bytes,
    )


def capability_line(gpu: Gpu, tested: Mapping[str, str]) -> DoctorLine:
    found = ".".join(map(str, gpu.capability))
    if gpu.architectures and not any(_runs_on(gpu.capability, code) for code in gpu.architectures):
        found = f"{found}; this torch build has kernels only for {' '.join(gpu.architectures)}"
        remedy = f"{_pip(tested, *TORCH_FAMILY)}; if the GPU is older than these, use another machine or the CPU"
        return DoctorLine("capability", "bad", found, f"{remedy} (CUDA_VISIBLE_DEVICES=)")
    return DoctorLine("capability", "ok", f"{found}, trains in {gpu.dtype}")


def room_lines(host: Host) -> Iterator[DoctorLine]:
    yield room_line(
        "RAM",
        host.free_ram,
        bad=(2, "training the embedded model takes 1.7 GiB; close other programs"),
        note=(8, "merging a 3B model in 16 bits takes 8 GiB; close other programs"),
    )
    yield room_line(
        "disk here",
        host.free_disk,
        bad=(0.2, "free some space, or start from a folder on another disk"),
        note=(
            20,
            "a 3B model takes 3 GiB in 4-bit, its merged copy 8 GiB and its GGUF files 8 GiB more; set output.dir "
            "to use another disk",
        ),
    )
    if host.free_hub_disk is not None:
        note = (10, "models are downloaded there; set HF_HOME to use another disk")
        yield room_line("disk, Hub cache", host.free_hub_disk, note=note)


def room_line(
    name: str, free: int, *, bad: tuple[float, str] = (0, ""), note: tuple[float, str], total: int | None = None
) -> DoctorLine:
    """`bad`, `note`: below how many free GiB, and the remedy."""
    found = f"{free / GiB:.1f} GiB free" + (f" of {total / GiB:.1f} GiB" if total else "")
    if free < bad[0] * GiB:
        return DoctorLine(name, "bad", found, bad[1])
    return DoctorLine(name, "note", found, note[1]) if free < note[0] * GiB else DoctorLine(name, "ok", found)


def optional_lines(host: Host) -> Iterator[DoctorLine]:
    xformers = package_line(host, "xformers", needed=False)
    if "xformers" in host.broken or "xformers" not in host.installed:
        xformers = replace(xformers, found=f"{xformers.found}; PyTorch's attention is used instead")
    yield xformers
    remedy = "optional: xformers or PyTorch's attention is used instead; it must be built for this torch version"
    if "flash-attn" in host.broken:
        remedy = f"pip uninstall flash-attn ({remedy})"
    flash = package_line(host, "flash-attn", needed=False)
    yield replace(flash, name="flash attention", remedy="" if flash.status == "ok" else remedy)
    if host.vllm_problem:
        yield DoctorLine("vLLM", "note", host.vllm_problem, "optional: for rollout.engine=vllm")
    else:
        yield DoctorLine("vLLM", "ok", f"{VERSION}, in an environment of its own; off by default")
    if absent := [name for name in LLAMA_CPP if name not in host.commands]:
        remedy = (
            "needed only for GGUF: build https://github.com/ggml-org/llama.cpp and put it and its scripts on the PATH"
        )
        yield DoctorLine("llama.cpp", "note", f"not on the PATH: {', '.join(absent)}", remedy)
    else:
        yield DoctorLine("llama.cpp", "ok", ", ".join(LLAMA_CPP))
    if host.has_token:
        yield DoctorLine("Hub token", "ok", "present (not shown)")
    else:
        yield DoctorLine(
            "Hub token", "note", "none", "needed only for gated or private models and to push: hf auth login"
        )


def cache_line(host: Host) -> DoctorLine:
    """Unsloth writes rewritten trainers to a folder, with the versions that produced each file in its first lines."""
    files = sorted(host.cache.glob("*.py")) if host.cache.is_dir() else []
    if not files:
        return DoctorLine("Unsloth cache", "ok", "none")
    made_by = [found for file in files if (found := _recorded_versions(file))]
    now = {name: host.installed.get(name, "0") for name in CACHE_PACKAGES}  # "0": what Unsloth writes for an absent one
    stale = sorted(
        {f"{name} {was}" for versions in made_by for name, was in versions.items() if not _same(was, now[name])}
    )
    if stale or not made_by:  # the Unsloth that is asked for records them in what it writes
        folder = '"$UNSLOTH_COMPILE_LOCATION"' if os.environ.get("UNSLOTH_COMPILE_LOCATION") else host.cache.name
        found = f"written by {', '.join(stale) or 'an older installation'}"
        return DoctorLine("Unsloth cache", "note", found, f"rm -r {folder}")
    return DoctorLine("Unsloth cache", "ok", f"{len(files)} files, written by the installed versions")


# --- the report ------------------------------------------------------------------------------------------------------


def report(lines: Sequence[DoctorLine], where: str) -> str:
    """The lines and a verdict, as text to paste."""
    bad, notes = (sum(line.status == status for line in lines) for status in ("bad", "note"))
    verdict = (
        f"Training cannot work here: {bad} problem{'s' * (bad > 1)} to fix."
        if bad
        else f"Training works here, on the {where}."
    )
    head = f"apo-lora {__version__} on {platform.system()} {platform.machine()}"
    return without_private_names("\n".join([head, "", *map(str, lines), "", f"{verdict} Notes: {notes}."]))


def without_private_names(text: str, home: str | None = None, user: str | None = None) -> str:
    home, user = home or str(Path.home()), user or _user_name()
    if len(home) > 1:
        text = text.replace(home, "~")
    return re.sub(rf"(?<=/){re.escape(user)}(?=/)", "USER", text) if user else text


def _user_name() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry in the password file
        return None


def doctor() -> int:
    """Prints the report. Returns 1 if training cannot work here."""
    print("Importing the libraries in a separate process ...", file=sys.stderr)
    host = look()
    lines = examine(host)
    print(report(lines, "GPU" if host.gpu else "CPU"))
    return int(any(line.status == "bad" for line in lines))


# --- versions --------------------------------------------------------------------------------------------------------


def _same(version: str, other: str) -> bool:
    """2.10.0+cu128 is 2.10.0, built for CUDA 12.8."""
    return version.partition("+")[0] == other.partition("+")[0]


def _pip(tested: Mapping[str, str], *names: str) -> str:
    return "pip install " + " ".join(f"{name}=={tested[name]}" if name in tested else name for name in names)


def _runs_on(capability: Sequence[int], architecture: str) -> bool:
    """Machine code (sm_86) runs on later GPUs of its generation, PTX (compute_90) on every later GPU.

    A letter suffix (sm_90a) restricts it to exactly that GPU.
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
