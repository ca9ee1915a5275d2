"""The null GPU's library for the torch of this environment, compiled with the system's C compiler."""

import ctypes.util
import platform
import re
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
NAME = "libcuda.so.1"  # the driver's, so that whoever loads that by its name gets ours

REAL_LIBRARIES = ("cuda_runtime/lib/libcudart.so.*", "cublas/lib/libcublas.so.*", "cublas/lib/libcublasLt.so.*")
REAL_GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/proc/driver/nvidia", "/dev/dxg")


def obstacle() -> str | None:
    """Why there is no null GPU on this host, or None."""
    if (host := f"{platform.system()} {platform.machine()}") != "Linux x86_64":
        return f"the null GPU is for Linux x86_64, and this is {host}"
    if not (shutil.which("cc") and shutil.which("nm")):
        return "the null GPU is compiled with cc and nm, which are not installed"
    if ctypes.util.find_library("cuda") or any(Path(file).exists() for file in REAL_GPU_FILES):
        return "the null GPU is for hosts without a real one"
    return None


def build(folder: Path, real_gpu_files: tuple[str, ...] = REAL_GPU_FILES) -> Path:
    """Compiles the library into `folder`; it will not load where one of `real_gpu_files` exists.

    Raises RuntimeError where torch is a build without CUDA.
    """
    real = [file for pattern in REAL_LIBRARIES for file in _package("nvidia").glob(pattern)]
    headers = _package("triton") / "backends/nvidia/include"
    if not (real and headers.is_dir()):
        raise RuntimeError("the null GPU stands in for the CUDA libraries of torch, and this torch has none")
    with tempfile.TemporaryDirectory() as scratch:
        names = _functions(real) | set(re.findall(r"\bcu[A-Z]\w+", (headers / "cuda.h").read_text()))
        rest = Path(scratch) / "rest.c"  # weak: a function of runtime.c or driver.c takes its place
        rest.write_text("".join(f"__attribute__((weak)) int {name}(void) {{ return 0; }}\n" for name in sorted(names)))
        refused = ", ".join(f'"{file}"' for file in real_gpu_files)
        sources = [HERE / "runtime.c", HERE / "driver.c", rest]
        _run(
            *("cc", "-O1", "-fPIC", "-Wall", f"-I{headers}", f"-DREAL_GPU_FILES={refused}"),
            *("-shared", f"-Wl,-soname,{NAME}", *sources, "-o", folder / NAME, "-lpthread"),
        )
    return folder / NAME


def _package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    found = find_spec(name)
    return Path(found.submodule_search_locations[0]) if found else Path("absent")


def _functions(libraries: list[Path]) -> set[str]:
    """The functions of CUDA's C interface that these libraries export."""
    lines = _run("nm", "--dynamic", "--defined-only", *libraries).splitlines()
    names = {line.split()[2].partition("@")[0] for line in lines if " T " in line}
    return {name for name in names if name.lstrip("_").startswith(("cuda", "cublas"))}


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
