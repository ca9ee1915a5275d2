"""`apo-lora export`: an adapter in the formats that people deploy. Every target checks what it wrote."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apo_lora.errors import ModelError
from apo_lora.export import by_unsloth, gguf
from apo_lora.export.base import Base, sixteen_bit_name, weight_bytes
from apo_lora.export.gguf import REPORT
from apo_lora.export.image_limits import image_token_limits
from apo_lora.export.output import new_folder
from apo_lora.family.lookup import family_of_base
from apo_lora.run.adapter import RECIPE_ON_HUB, AdapterSource
from apo_lora.run.files import write_json


class ExportFailed(ModelError):
    """The result does not match the adapter model, and was removed."""

    exit_code = 1


def export_merged(source: AdapterSource, out: Path | None = None, *, onto: str | None = None) -> Path:
    """Base and adapter as one model in the new folder `out` (default: merged/ beside the adapter), which is returned.

    `onto`: see find_base. Raises ModelError for what a user can fix, ExportFailed where the merged model does not
    answer as the adapter's.
    """
    out = out or _beside(source, "merged")
    with new_folder(out, source, onto, merged=1.0) as (base, folder):
        write_json(folder / REPORT, _merge_and_check(source, base, folder))
    print(f"{out}: the merged model, for transformers, vLLM and llama.cpp's converter.")
    return out


def export_gguf(
    source: AdapterSource,
    out: Path | None = None,
    *,
    onto: str | None = None,
    quantization: str = "Q8_0",
    llama_cpp: str | None = None,
) -> Path:
    """The merged model as two GGUF files and a Modelfile in the new folder `out` (default: gguf/ beside the adapter).

    By llama.cpp, in the folder `llama_cpp` or on the PATH; where neither is there and Unsloth is the engine, by it.
    Raises ModelError, ExportFailed.
    """
    out = out or _beside(source, "gguf")
    convert = _converter(source, quantization, llama_cpp)
    ratios = {"merged": 1.0, "gguf": gguf.BYTES_PER_16_BIT_BYTE[quantization]}
    with new_folder(out, source, onto, **ratios) as (base, folder):
        merged = folder / "merged"
        merged.mkdir()
        report = _merge_and_check(source, base, merged)
        files = convert(merged, folder, source.name, quantization)
        shutil.rmtree(merged)
        report |= _check_gguf(source, folder, files, source.name, quantization, llama_cpp)
        write_json(folder / REPORT, report)
    _print_gguf(out, report)
    return out


def export_base_gguf(
    source: AdapterSource, out: Path | None = None, *, quantization: str = "Q8_0", llama_cpp: str | None = None
) -> Path:
    """Only the base, for `apo-lora chat --gguf` to compare with the tuned model. Raises ModelError, ExportFailed."""
    out = out or _beside(source, gguf.BASE_GGUF)
    convert = gguf.find_converter(llama_cpp, quantization)
    name = Path(sixteen_bit_name(source.base_name)).name
    ratios = {"gguf": gguf.BYTES_PER_16_BIT_BYTE[quantization]}
    with new_folder(out, source, "original", **ratios) as (base, folder):
        files = convert(base.folder, folder, name, quantization)
        report = {"base": str(base.folder)} | _check_gguf(source, folder, files, name, quantization, llama_cpp)
        write_json(folder / REPORT, report)
    _print_gguf(out, report)
    return out


def export_to_hub(
    source: AdapterSource,
    repo: str | None,
    *,
    what: str = "adapter",
    private: bool = True,
    out: Path | None = None,
    onto: str | None = None,
    quantization: str = "Q8_0",
    llama_cpp: str | None = None,
) -> str:
    """Pushes `what` (adapter, merged, gguf) to the repository ORG/NAME and returns its URL.

    An export goes as it lies in `out` (default: beside the adapter), or is made there first. Raises HubError,
    ModelError, ExportFailed.
    """
    from apo_lora.export.hub import push

    if repo is None:
        raise ModelError("--to hub: no repository given; add --repo ORG/NAME")
    folder = None
    if what != "adapter":
        folder = out or _beside(source, what)
        if folder.exists() and not (folder / REPORT).is_file():
            raise ModelError(
                f"{folder}: not a checked export (no {REPORT}); remove it, or give another folder with --out"
            )
        if not folder.exists() and what == "merged":
            export_merged(source, folder, onto=onto)
        elif not folder.exists():
            export_gguf(source, folder, onto=onto, quantization=quantization, llama_cpp=llama_cpp)
        elif onto and (made := gguf.read_report(folder).get("onto")) not in (onto, None):
            raise ModelError(f"{folder}: was exported with --onto {made}; remove it, or give another folder with --out")
    url = push(source, repo=repo, private=private, what=what, folder=folder)
    print(f"{url}: the {what}, {'private' if private else 'public'}.")
    return url


# --- parts of it -----------------------------------------------------------------------------------------------------


def _beside(source: AdapterSource, name: str) -> Path:
    return source.folder.absolute().parent / name


def _merge_and_check(source: AdapterSource, base: Base, folder: Path) -> dict[str, Any]:
    """Merges into `folder`, reloads it, compares. Returns the report. Raises ModelError, ExportFailed."""
    from apo_lora.export.comparison import compare
    from apo_lora.export.merged import merge

    merge(source, base, folder)
    print("Reloading the merged model and comparing it with the adapter model ...", flush=True)
    comparisons = compare(folder, base, source)
    print("\n".join(comparison.line() for comparison in comparisons))
    if problems := [problem for comparison in comparisons if (problem := comparison.problem())]:
        raise ExportFailed(*(f"export of {source.folder}: {problem}; nothing was kept" for problem in problems))
    return {
        "adapter": str(source.folder),
        "trained_on": source.base_name,
        "merged_into": str(base.folder),
        "onto": base.onto,
        "bytes": weight_bytes(folder),
        "checks": [asdict(comparison) for comparison in comparisons],
    }


def _converter(source: AdapterSource, quantization: str, llama_cpp: str | None) -> gguf.Converter:
    """llama.cpp's; where none was named or found and Unsloth is the engine, Unsloth's. Raises ModelError."""
    try:
        return gguf.find_converter(llama_cpp, quantization)
    except ModelError:
        if llama_cpp or not by_unsloth.is_possible(source.recipe):
            raise
        return by_unsloth.convert


def _check_gguf(
    source: AdapterSource, folder: Path, files: list[Path], name: str, quantization: str, llama_cpp: str | None
) -> dict[str, Any]:
    """Puts beside [text model, mmproj] how to run them. Returns that, for the report. Raises ExportFailed."""
    converter = gguf.find_program(gguf.CONVERTER, llama_cpp)
    reader = converter.parent if converter else by_unsloth.llama_cpp_folder()
    text, mmproj = (gguf.describe(file, reader) for file in files)
    if wrong := gguf.problems(text, mmproj, quantization):
        raise ExportFailed(*(f"export of {source.folder}: {problem}; nothing was kept" for problem in wrong))
    recipe, family = source.recipe, family_of_base(source.base_name)
    own = recipe and recipe.data.system_prompt
    prompt = family.system_prompt if own is None else own
    system = f'SYSTEM """{prompt}"""\n' if prompt else ""
    modelfile = gguf.MODELFILE.format(text=text["file"], mmproj=mmproj["file"], system=system)
    (folder / "Modelfile").write_text(modelfile, encoding="utf-8")
    if recipe:  # how to ask it; a push puts the same file there
        (folder / RECIPE_ON_HUB).write_text(recipe.to_yaml(), encoding="utf-8")
    limits = image_token_limits(recipe and recipe.data, family)
    return {
        "files": [text, mmproj],
        "notes": gguf.notes(text, quantization),
        "commands": gguf.commands(text["file"], mmproj["file"], name, limits),
    }


def _print_gguf(out: Path, report: dict[str, Any]) -> None:
    for file in report["files"]:
        types = ", ".join(f"{count} {kind}" for kind, count in file["tensor_types"].items())
        print(f"{out / file['file']}: {file['bytes'] / 1e6:,.1f} MB; tensors: {types}")
    commands = [f"  {command}" for command in report["commands"].values()]
    print("\n".join([*report["notes"], f"To run it, inside {out}:", *commands]))
