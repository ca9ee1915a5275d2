"""`apo-lora export`: an adapter as what people deploy. Every target checks what it wrote before it says done."""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apo_lora.adapter_source import AdapterSource, find_adapter
from apo_lora.errors import ModelError
from apo_lora.process import prepare_process
from apo_lora.run_dir import write_json

REPORT = "export_report.json"


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
    from apo_lora.export.merged import base_folder, refuse_existing, whole_or_nothing

    out = out_folder(source, options, "merged")
    refuse_existing(out)
    base = base_folder(source)
    with whole_or_nothing(out) as folder:
        report = merge_and_check(source, base, folder)
        write_json(folder / REPORT, report)
    print(f"{out}: the merged model, a folder that transformers, vLLM and llama.cpp's converter read.")


def to_gguf(source: AdapterSource, options: argparse.Namespace) -> None:
    from apo_lora.export import gguf
    from apo_lora.export.merged import base_folder, refuse_existing, weight_files, whole_or_nothing

    out = out_folder(source, options, "gguf")
    refuse_existing(out)
    quantization = options.quantization
    tools = gguf.find_llama_cpp(options.llama_cpp, quantization)
    base = base_folder(source)
    name = (source.run.path if source.run else source.folder).resolve().name
    more = sum(path.stat().st_size for path in weight_files(base)) * gguf.BYTES_PER_16_BIT_BYTE[quantization]
    with whole_or_nothing(out) as folder:
        merged = folder / "merged"
        merged.mkdir()
        report = merge_and_check(source, base, merged, more_bytes=int(more))
        text, mmproj = gguf.convert(merged, folder, name, quantization, tools)
        shutil.rmtree(merged)
        described = [gguf.describe(file, tools) for file in (text, mmproj)]
        if wrong := gguf.problems(*described, quantization):
            raise ExportFailed(*(f"export of {source.folder}: {problem}; nothing was kept" for problem in wrong))
        commands = gguf.commands(text.name, mmproj.name, name)
        if options.to == "ollama":
            modelfile = gguf.MODELFILE.format(text=text.name, mmproj=mmproj.name)
            (folder / "Modelfile").write_text(modelfile, encoding="utf-8")
        else:
            del commands["ollama"]
        write_json(folder / REPORT, report | {"files": described, "commands": commands})
    for file in described:
        types = ", ".join(f"{count} {kind}" for kind, count in file["tensor_types"].items())
        print(f"{out / file['file']}: {file['bytes'] / 1e6:,.1f} MB; tensors: {types}")
    print("\n".join([f"Run it inside {out}:", *(f"  {command}" for command in commands.values())]))


def merge_and_check(source: AdapterSource, base: Path, folder: Path, more_bytes: int = 0) -> dict[str, Any]:
    """Merges into `folder`, reloads it, compares. Returns the report.

    `more_bytes`: what else will be written to the same disk. Raises ModelError, and ExportFailed for a bad merge.
    """
    from apo_lora.export.check import compare
    from apo_lora.export.merged import merge, require_disk, weight_files

    size = sum(path.stat().st_size for path in weight_files(base))
    require_disk(folder, size + more_bytes)
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
        "bytes": size,
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
    "hub": to_hub,
}
"""What --to can be."""
