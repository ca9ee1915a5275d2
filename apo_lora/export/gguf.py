"""A merged folder as GGUF, through llama.cpp's own converter: the text model in one file, the vision tower in another.

A missing vision file (mmproj) is an error: llama.cpp would run the rest without complaint, and see no image.
"""

import importlib
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from apo_lora.errors import ModelError

CONVERTER = "convert_hf_to_gguf.py"
QUANTIZER = "llama-quantize"

BYTES_PER_16_BIT_BYTE = {"F32": 2.0, "F16": 1.0, "Q8_0": 0.6, "Q4_K_M": 1.4}
"""Largest disk use of the conversion over the size of the 16-bit model; Q4_K_M is made of an F16 file beside it."""

VISION_TYPES = {"F32", "F16", "BF16", "Q8_0"}
"""Coarser ones cost a small vision tower what it sees."""


@dataclass(frozen=True)
class LlamaCpp:
    """The parts of a llama.cpp that an export needs."""

    converter: Path
    quantizer: Path | None
    """Only for Q4_K_M."""

    @property
    def gguf_py(self) -> Path:
        """Its reader of GGUF files; an installed `gguf` serves where it is not beside the converter."""
        return self.converter.parent / "gguf-py"


def find_llama_cpp(folder: str | None, quantization: str) -> LlamaCpp:
    """In `folder` (a llama.cpp checkout), or on the PATH. Raises ModelError, before anything heavy is done."""
    where = [Path(folder), Path(folder) / "bin", Path(folder) / "build" / "bin"] if folder else []

    def find(name: str) -> Path | None:
        beside = next((place / name for place in where if (place / name).is_file()), None)
        return beside or (Path(found) if (found := shutil.which(name)) else None)

    converter, quantizer = find(CONVERTER), find(QUANTIZER)
    if converter is None:
        raise ModelError(
            f"--to gguf: no {CONVERTER} {f'in {folder}' if folder else 'on the PATH'}; "
            "git clone --depth 1 https://github.com/ggml-org/llama.cpp, and give that folder as --llama-cpp"
        )
    if quantization == "Q4_K_M" and quantizer is None:
        raise ModelError(
            f"--quantization Q4_K_M: needs llama.cpp's {QUANTIZER}, built in --llama-cpp DIR or on the PATH; "
            "Q8_0, F16 and F32 do not"
        )
    return LlamaCpp(converter, quantizer)


def convert(merged: Path, folder: Path, name: str, quantization: str, tools: LlamaCpp) -> list[Path]:
    """Writes [text model, mmproj] of `merged` into `folder`. Raises ModelError."""
    vision_type = "F32" if quantization == "F32" else "F16"
    text = folder / f"{name}-{quantization}.gguf"
    mmproj = folder / f"mmproj-{name}-{vision_type}.gguf"
    with tqdm(total=2 + (quantization == "Q4_K_M"), desc="converting", unit="file") as bar:
        _convert_one(merged, mmproj, vision_type, tools, "--mmproj")
        bar.update()
        if quantization == "Q4_K_M":
            unquantised = folder / f"{name}-F16.gguf"
            _convert_one(merged, unquantised, "F16", tools)
            bar.update()
            _run([str(tools.quantizer), str(unquantised), str(text), quantization], makes=text)
            unquantised.unlink()
        else:
            _convert_one(merged, text, quantization, tools)
        bar.update()
    return [text, mmproj]


def _convert_one(merged: Path, file: Path, file_type: str, tools: LlamaCpp, *options: str) -> None:
    command = [sys.executable, str(tools.converter), str(merged), "--outfile", str(file)]
    _run([*command, "--outtype", file_type.lower(), *options], makes=file)


def _run(command: list[str], makes: Path) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if finished.returncode or not makes.is_file():
        said = [line for line in (finished.stdout + finished.stderr).splitlines() if line.strip()]
        raise ModelError(
            f"{Path(command[0] if 'python' not in Path(command[0]).name else command[1]).name} made no {makes.name}: "
            f"{said[-1].strip() if said else f'exit code {finished.returncode}'}; nothing was kept"
        )


def describe(file: Path, tools: LlamaCpp) -> dict[str, Any]:
    """Name, size and how many tensors of each type; for mmproj as well whether it holds a vision tower."""
    if tools.gguf_py.is_dir() and str(tools.gguf_py) not in sys.path:
        sys.path.insert(0, str(tools.gguf_py))
    try:
        reader = importlib.import_module("gguf").GGUFReader(file)
    except ImportError as error:
        raise ModelError(f"--to gguf: {error}; give a llama.cpp folder as --llama-cpp, or pip install gguf") from error
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    matrices = Counter(t.tensor_type.name for t in reader.tensors if t.name.startswith("v.") and len(t.shape) > 1)
    return {
        "file": file.name,
        "bytes": file.stat().st_size,
        "tensor_types": dict(types),
        "vision_matrices": dict(matrices),
    }


def problems(text: dict[str, Any], mmproj: dict[str, Any], quantization: str) -> list[str]:
    """What is wrong with two described files: the vision tower, and silently other types than asked for."""
    found = []
    if not mmproj["vision_matrices"]:
        found.append(f"{mmproj['file']} holds no vision tower")
    elif coarse := set(mmproj["vision_matrices"]) - VISION_TYPES:
        found.append(f"{mmproj['file']} has vision layers in {', '.join(sorted(coarse))}")
    wanted = {"Q4_K_M": "Q4_K"}.get(quantization, quantization)
    if wanted not in text["tensor_types"]:
        have = ", ".join(sorted(text["tensor_types"]))
        why = "; Q4_K needs sizes that are multiples of 256" if wanted == "Q4_K" else ""
        found.append(f"{text['file']} has no tensor in {wanted}, but {have}{why}")
    return found


def commands(text: str, mmproj: str, name: str) -> dict[str, str]:
    """How to run the two files, from inside their folder."""
    return {
        "llama-mtmd-cli": f'llama-mtmd-cli -m {text} --mmproj {mmproj} --image picture.png -p "What is this?"',
        "llama-server": f"llama-server -m {text} --mmproj {mmproj}",
        "ollama": f"ollama create {name.lower()} -f Modelfile && ollama run {name.lower()}",
    }


MODELFILE = '''FROM ./{text}
FROM ./{mmproj}
TEMPLATE """{{{{- range .Messages }}}}<|im_start|>{{{{ .Role }}}}
{{{{ .Content }}}}<|im_end|>
{{{{ end }}}}<|im_start|>assistant
"""
SYSTEM You are a helpful assistant.
PARAMETER stop <|im_end|>
'''
