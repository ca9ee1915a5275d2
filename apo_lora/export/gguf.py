"""A merged folder as GGUF, through llama.cpp's own converter: the text model in one file, the vision tower in another.

A missing vision file (mmproj) is an error: llama.cpp would run the rest without complaint, and see no image.
"""

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from apo_lora.errors import ModelError
from apo_lora.machine.paths import as_word

REPORT = "export_report.json"
BASE_GGUF = "base_gguf"
"""The folder, beside that of the export, with the base's own GGUF."""

CONVERTER = "convert_hf_to_gguf.py"
QUANTIZER = "llama-quantize"

BYTES_PER_16_BIT_BYTE = {"F32": 2.0, "F16": 1.0, "Q8_0": 0.6, "Q4_K_M": 1.4}
"""Largest disk use of the conversion over the size of the 16-bit model; Q4_K_M is made of an F16 file beside it."""

VISION_TYPES = {"F32", "F16", "BF16", "Q8_0"}
"""Coarser ones cost a small vision tower what it sees."""

_FALLBACKS = {"Q5_0", "Q5_1", "Q8_0", "F16"}  # replace Q4_K, Q5_K and Q6_K for rows of other sizes


Converter = Callable[[Path, Path, str, str], list[Path]]
"""(16-bit folder, folder to write into, name, quantization) -> [text model, mmproj]; raises ModelError."""


def read_report(folder: Path) -> dict[str, Any]:
    """What an export wrote about itself."""
    return json.loads((folder / REPORT).read_text(encoding="utf-8"))


def find_converter(llama_cpp: str | None, quantization: str) -> Converter:
    """That of llama.cpp. Raises ModelError where a part of it is missing, before anything heavy is done."""
    script, quantizer = find_program(CONVERTER, llama_cpp), find_program(QUANTIZER, llama_cpp)
    if script is None:
        raise ModelError(
            f"--to gguf: no {CONVERTER} {f'in {llama_cpp}' if llama_cpp else 'on the PATH'}; "
            "git clone --depth 1 https://github.com/ggml-org/llama.cpp and give that folder with --llama-cpp"
        )
    if quantization == "Q4_K_M" and quantizer is None:
        raise ModelError(
            f"--quantization Q4_K_M: needs llama.cpp's {QUANTIZER}, built in --llama-cpp DIR or on the PATH; "
            "build it, or use Q8_0, F16 or F32"
        )
    return partial(_convert, script, quantizer)


def _convert(
    script: Path, quantizer: Path | None, merged: Path, folder: Path, name: str, quantization: str
) -> list[Path]:
    text_type = "F16" if quantization == "Q4_K_M" else quantization
    vision_type = "F32" if quantization == "F32" else "F16"
    text, mmproj = folder / f"{name}-{text_type}.gguf", folder / f"mmproj-{name}-{vision_type}.gguf"
    files = [(mmproj, ["--outtype", vision_type.lower(), "--mmproj"]), (text, ["--outtype", text_type.lower()])]
    for file, options in tqdm(files, desc="converting", unit="file"):
        run([sys.executable, str(script), str(merged), "--outfile", str(file), *options], makes=file)
    if text_type != quantization:
        unquantised, text = text, folder / f"{name}-{quantization}.gguf"
        run([str(quantizer), str(unquantised), str(text), quantization], makes=text)
        unquantised.unlink()
    return [text, mmproj]


def find_program(name: str, llama_cpp: str | None) -> Path | None:
    """In `llama_cpp` (a folder of llama.cpp), or on the PATH. Raises ModelError if there is no such folder."""
    top = Path(llama_cpp) if llama_cpp else None
    if top and not top.is_dir():
        raise ModelError(f"--llama-cpp {llama_cpp}: no such folder; give the folder of a llama.cpp checkout")
    places = [top, top / "bin", top / "build" / "bin"] if top else []
    beside = next((place / name for place in places if (place / name).is_file()), None)
    return beside or (Path(found) if (found := shutil.which(name)) else None)


def run(command: list[str], makes: Path) -> None:
    """Raises ModelError with the last line of the program's output, unless it makes that file."""
    finished = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if finished.returncode or not makes.is_file():
        lines = [line for line in (finished.stdout + finished.stderr).splitlines() if line.strip()]
        program = Path(command[0] if "python" not in Path(command[0]).name else command[1]).name
        raise ModelError(
            f"{program} did not write {makes.name}: "
            f"{lines[-1].strip() if lines else f'exit code {finished.returncode}'}; nothing was kept"
        )


def describe(file: Path, llama_cpp: Path) -> dict[str, Any]:
    """Name, size and how many tensors of each type; for mmproj as well whether it holds a vision tower.

    Read by the `gguf` in the folder `llama_cpp`, else by an installed one.
    """
    reader = llama_cpp / "gguf-py"
    if reader.is_dir() and str(reader) not in sys.path:
        sys.path.insert(0, str(reader))
    try:
        reader_type = importlib.import_module("gguf").GGUFReader
    except ImportError as error:
        raise ModelError(
            f"--to gguf: {error}; give a llama.cpp folder with --llama-cpp, or pip install gguf"
        ) from error

    class Reader(reader_type):
        """Cuts the words of a vocabulary out of a plain array: out of the memory map it takes three times as long."""

        data = property(lambda self: self._data, lambda self, mapped: setattr(self, "_data", np.asarray(mapped)))

    reader = Reader(file)
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
        found.append(f"{mmproj['file']} contains no vision tower")
    elif coarse := set(mmproj["vision_matrices"]) - VISION_TYPES:
        found.append(f"{mmproj['file']} has vision layers in {', '.join(sorted(coarse))}")
    wanted = {"Q4_K_M": "Q4_K"}.get(quantization, quantization)
    if wanted not in text["tensor_types"]:
        have = ", ".join(sorted(text["tensor_types"]))
        why = "; Q4_K needs sizes that are multiples of 256" if wanted == "Q4_K" else ""
        found.append(f"{text['file']} has no {wanted} tensor, only {have}{why}")
    return found


def notes(text: dict[str, Any], quantization: str) -> list[str]:
    """What llama.cpp does silently: rows whose size is not a multiple of 256 get another type than Q4_K or Q6_K."""
    fallen = {kind: count for kind, count in text["tensor_types"].items() if kind in _FALLBACKS}
    if quantization != "Q4_K_M" or not fallen:
        return []
    counts = ", ".join(f"{count} {kind}" for kind, count in fallen.items())
    return [
        f"{text['file']}: {counts} tensors instead of Q4_K or Q6_K, because their row size is not a multiple of 256"
    ]


def commands(text: str, mmproj: str, name: str, image_tokens: dict[str, int]) -> dict[str, str]:
    """How to run the two files, from inside their folder, with images bounded as in training."""
    files = " ".join(
        [f"-m {as_word(text)} --mmproj {as_word(mmproj)}", *(f"{option} {n}" for option, n in image_tokens.items())]
    )
    model = re.sub(r"[^a-z0-9._-]+", "-", name.lower())  # what ollama takes for a name
    return {
        "llama-mtmd-cli": f'llama-mtmd-cli {files} --image image.png -p "What is this?"',
        "llama-server": f"llama-server {files}",
        "ollama": f"ollama create {model} -f Modelfile && ollama run {model}",
    }


MODELFILE = '''FROM ./{text}
FROM ./{mmproj}
TEMPLATE """{{{{- range .Messages }}}}<|im_start|>{{{{ .Role }}}}
{{{{ .Content }}}}<|im_end|>
{{{{ end }}}}<|im_start|>assistant
"""
{system}PARAMETER stop <|im_end|>
'''
