"""A merged folder as GGUF through Unsloth's save_pretrained_gguf, for a GPU host with a network and no llama.cpp.

Unsloth downloads or builds llama.cpp itself (into ~/.unsloth/llama.cpp, or UNSLOTH_LLAMA_CPP_PATH) and runs its
converter. It is given our merged folder, which was checked, as a model without an adapter: then it converts the folder
that it loaded, as it lies there. It treats the vision file as optional; here its absence is an error.

This file is also the program that does it: Unsloth rewrites transformers and PEFT, which this process has imported.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from apo_lora.errors import ModelError
from apo_lora.recipe.schema import Recipe

_PROGRAM = ("-m", __name__)
_RESULT = "files.json"


def is_possible(recipe: Recipe | None) -> bool:
    """Whether Unsloth is this machine's engine: a CUDA GPU, and a recipe (if any) that does not say otherwise."""
    import torch

    return torch.cuda.is_available() and (recipe is None or recipe.model.engine != "transformers")


def llama_cpp_folder() -> Path:
    """Where Unsloth keeps its llama.cpp."""
    return Path(os.environ.get("UNSLOTH_LLAMA_CPP_PATH") or Path.home() / ".unsloth" / "llama.cpp")


def convert(merged: Path, folder: Path, name: str, quantization: str) -> list[Path]:
    """Writes [text model, mmproj] of `merged` into `folder`, under our names. Raises ModelError."""
    work = folder / "unsloth"
    work.mkdir()
    # There, since Unsloth writes its intermediate files into the working directory.
    command = [sys.executable, *_PROGRAM, str(merged.absolute()), quantization]
    finished = subprocess.run(command, cwd=work, stderr=subprocess.PIPE, text=True, errors="replace")
    if finished.returncode:
        lines = [line.strip() for line in finished.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)] or lines
        reason = errors[-1] if errors else f"exit code {finished.returncode}"
        raise ModelError(
            f"--to gguf: Unsloth failed ({reason}); nothing was kept. Convert with your own llama.cpp instead: "
            "--llama-cpp DIR"
        )
    made = [Path(file) for file in json.loads((work / _RESULT).read_text(encoding="utf-8"))]
    files = _under_our_names(made, folder, name, quantization)
    shutil.rmtree(work)
    return files


def _under_our_names(made: list[Path], folder: Path, name: str, quantization: str) -> list[Path]:
    """From Base.Q8_0.gguf and Base.BF16-mmproj.gguf, as of Unsloth 2026.10."""
    mmproj = [file for file in made if file.stem.lower().endswith("-mmproj")]
    text = [file for file in made if file not in mmproj and file.stem.upper().endswith(f".{quantization}")]
    if len(mmproj) != 1 or len(text) != 1:
        names = ", ".join(file.name for file in made) or "nothing"
        missing = "no vision file (mmproj)" if not mmproj else f"not one {quantization} model"
        raise ModelError(
            f"--to gguf: Unsloth wrote {names}: {missing}; nothing was kept. Convert with --llama-cpp DIR instead"
        )
    vision_type = mmproj[0].stem.removesuffix("-mmproj").rpartition(".")[2]
    return [
        text[0].rename(folder / f"{name}-{quantization}.gguf"),
        mmproj[0].rename(folder / f"mmproj-{name}-{vision_type}.gguf"),
    ]


def main(merged: str, quantization: str) -> None:
    """Runs inside the working directory, and leaves there the list of what it made."""
    from unsloth import FastVisionModel

    model, processor = FastVisionModel.from_pretrained(
        merged,
        load_in_4bit=True,  # what is converted is the folder; the loaded model needs only to be small
        use_exact_model_name=True,
        use_gradient_checkpointing=False,
        trust_remote_code=False,
    )
    made = model.save_pretrained_gguf("made", processor, quantization_method=quantization.lower())
    files = [str(Path(file).absolute()) for file in made["gguf_files"]]
    Path(_RESULT).write_text(json.dumps(files), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
