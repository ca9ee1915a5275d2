"""`apo-lora export`: an adapter as what people deploy. Every target checks what it wrote before it says done."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apo_lora.errors import ModelError
from apo_lora.export.disk import Need, require_disk
from apo_lora.export.gguf import BASE_GGUF, BYTES_PER_16_BIT_BYTE, REPORT
from apo_lora.export.image_limits import image_token_limits
from apo_lora.family.lookup import family_of_base
from apo_lora.machine.process import prepare_process
from apo_lora.run.adapter import RECIPE_ON_HUB, AdapterSource, find_adapter
from apo_lora.run.files import write_json


class ExportFailed(ModelError):
    """What was written is not the adapter model; it is not kept."""

    exit_code = 1


def export(options: argparse.Namespace) -> int:
    """Runs the verb. Returns 0; raises ModelError for what a user can mend, ExportFailed where the check fails."""
    prepare_process()
    source = find_adapter(options.source)
    TARGETS[options.to](source, options)
    return 0


def to_merged(source: AdapterSource, options: argparse.Namespace) -> None:
    from apo_lora.export.merged import base_folder, refuse_existing, weight_bytes, whole_or_nothing

    out = out_folder(source, options, "merged")
    refuse_existing(out)
    require_room = room(out, merged=1.0)
    base = base_folder(source, require_room)
    require_room(0, weight_bytes(base))
    with whole_or_nothing(out) as folder:
        report = merge_and_check(source, base, folder)
        write_json(folder / REPORT, report)
    print(f"{out}: the merged model, a folder that transformers, vLLM and llama.cpp's converter read.")


def to_gguf(source: AdapterSource, options: argparse.Namespace) -> None:
    from apo_lora.export.merged import base_folder, refuse_existing, weight_bytes, whole_or_nothing

    out = out_folder(source, options, "gguf")
    refuse_existing(out)
    convert = gguf_converter(source, options)
    require_room = room(out, merged=1.0, gguf=BYTES_PER_16_BIT_BYTE[options.quantization])
    base = base_folder(source, require_room)
    require_room(0, weight_bytes(base))
    with whole_or_nothing(out) as folder:
        merged = folder / "merged"
        merged.mkdir()
        report = merge_and_check(source, base, merged)
        files = convert(merged, folder, source.name)
        shutil.rmtree(merged)
        finish_gguf(source, options, folder, report, files, source.name)
    show_gguf(out)


def to_base_gguf(source: AdapterSource, options: argparse.Namespace) -> None:
    """The base alone, for `apo-lora chat --gguf` to show beside the tuned model."""
    from apo_lora.export.gguf import find_llama_cpp
    from apo_lora.export.merged import base_folder, refuse_existing, sixteen_bit_name, weight_bytes, whole_or_nothing

    out = out_folder(source, options, BASE_GGUF)
    refuse_existing(out)
    convert = find_llama_cpp(options.llama_cpp, options.quantization).convert
    require_room = room(out, gguf=BYTES_PER_16_BIT_BYTE[options.quantization])
    base = base_folder(source, require_room)
    require_room(0, weight_bytes(base))
    name = Path(sixteen_bit_name(source.base_name)).name
    with whole_or_nothing(out) as folder:
        files = convert(base, folder, name, options.quantization)
        finish_gguf(source, options, folder, {"base": str(base)}, files, name)
    show_gguf(out)


def room(out: Path, **written: float) -> Callable[[int, int], None]:
    """Asks whether a download and what is made of it fit. `written`: what, and its size over that of the base."""

    def require_room(fetched: int, weights: int) -> None:
        from huggingface_hub.constants import HF_HUB_CACHE

        downloads = [Need("download", Path(HF_HUB_CACHE), fetched)] if fetched else []
        require_disk(*downloads, *(Need(what, out, int(weights * ratio)) for what, ratio in written.items()))

    return require_room


def gguf_converter(source: AdapterSource, options: argparse.Namespace) -> Callable[[Path, Path, str], list[Path]]:
    """llama.cpp's converter; where none was named or found and Unsloth is the engine, Unsloth's. Raises ModelError."""
    from apo_lora.export import by_unsloth, gguf

    quantization = options.quantization
    try:
        tools = gguf.find_llama_cpp(options.llama_cpp, quantization)
    except ModelError:
        if options.llama_cpp or not by_unsloth.is_possible(source.recipe):
            raise
        return lambda merged, folder, name: by_unsloth.convert(merged, folder, name, quantization)
    return lambda merged, folder, name: tools.convert(merged, folder, name, quantization)


def finish_gguf(
    source: AdapterSource,
    options: argparse.Namespace,
    folder: Path,
    report: dict[str, Any],
    files: list[Path],
    name: str,
) -> None:
    """Checks [text model, mmproj] and writes the report with the commands to run them. Raises ExportFailed."""
    from apo_lora.export import by_unsloth, gguf

    converter = gguf.find_program(gguf.CONVERTER, options.llama_cpp)
    llama_cpp = converter.parent if converter else by_unsloth.llama_cpp_folder()
    text, mmproj = (gguf.describe(file, [llama_cpp]) for file in files)
    if wrong := gguf.problems(text, mmproj, options.quantization):
        raise ExportFailed(*(f"export of {source.folder}: {problem}; nothing was kept" for problem in wrong))
    limits = image_token_limits(source.recipe.data if source.recipe else None, family_of_base(source.base_name))
    commands = gguf.commands(text["file"], mmproj["file"], name, limits)
    modelfile = gguf.MODELFILE.format(text=text["file"], mmproj=mmproj["file"])
    (folder / "Modelfile").write_text(modelfile, encoding="utf-8")
    if source.recipe:  # how to ask it; a push puts the same file there
        (folder / RECIPE_ON_HUB).write_text(source.recipe.to_yaml(), encoding="utf-8")
    notes = gguf.notes(text, options.quantization)
    write_json(folder / REPORT, report | {"files": [text, mmproj], "notes": notes, "commands": commands})


def show_gguf(out: Path) -> None:
    report = json.loads((out / REPORT).read_text(encoding="utf-8"))
    for file in report["files"]:
        types = ", ".join(f"{count} {kind}" for kind, count in file["tensor_types"].items())
        print(f"{out / file['file']}: {file['bytes'] / 1e6:,.1f} MB; tensors: {types}")
    print(
        "\n".join(
            [*report["notes"], f"Run it inside {out}:", *(f"  {command}" for command in report["commands"].values())]
        )
    )


def merge_and_check(source: AdapterSource, base: Path, folder: Path) -> dict[str, Any]:
    """Merges into `folder`, reloads it, compares. Returns the report. Raises ModelError, ExportFailed."""
    from apo_lora.export.check import compare
    from apo_lora.export.merged import merge, weight_bytes

    merge(source, base, folder)
    print("Reloading it, and asking it and the adapter model the same ...", flush=True)
    comparisons = compare(folder, base, source.folder)
    print("\n".join(comparison.line() for comparison in comparisons))
    if problems := [problem for comparison in comparisons if (problem := comparison.problem())]:
        raise ExportFailed(*(f"export of {source.folder}: {problem}; nothing was kept" for problem in problems))
    return {
        "adapter": str(source.folder),
        "trained_on": source.base_name,
        "merged_into": str(base),
        "bytes": weight_bytes(base),
        "checks": [comparison.as_dict() for comparison in comparisons],
    }


def out_folder(source: AdapterSource, options: argparse.Namespace, name: str) -> Path:
    """--out, else `name` beside the adapter."""
    return Path(options.out) if options.out else source.folder.absolute().parent / name


def to_hub(source: AdapterSource, options: argparse.Namespace) -> None:
    """The adapter, or a merged or GGUF export: the one that is there already, or made now."""
    from apo_lora.export.hub import push

    if options.repo is None:
        raise ModelError("--to hub: where to? Give --repo ORG/NAME")
    folder = None
    if options.what != "adapter":
        folder = out_folder(source, options, options.what)
        if not folder.exists():
            TARGETS[options.what](source, options)
        elif not (folder / REPORT).is_file():
            raise ModelError(f"{folder}: no checked export (no {REPORT}); remove it, or give another with --out")
    url = push(source, repo=options.repo, private=options.private, what=options.what, folder=folder)
    print(f"{url}: the {options.what}, {'private' if options.private else 'public'}.")


TARGETS: dict[str, Callable[[AdapterSource, argparse.Namespace], None]] = {
    "merged": to_merged,
    "gguf": to_gguf,
    "ollama": to_gguf,
    "base-gguf": to_base_gguf,
    "hub": to_hub,
}
"""What --to can be."""
