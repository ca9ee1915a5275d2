"""What the kernel cannot make by itself, since it has none of apo-lora's packages: made here, shown there.

`python -m apo_lora.notebook.worker WHAT JSON`, in the environment that apo-lora is in. The arguments name a file,
`out`, for what comes of it; what only the user can mend goes into `out`.problems, one line each, with exit code 2.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from apo_lora.data.sources import refuse_missing
from apo_lora.errors import ModelError, UserError
from apo_lora.evaluation.evaluate import SECTIONS
from apo_lora.evaluation.gallery import static_gallery
from apo_lora.evaluation.table import table
from apo_lora.machine.host import Gpu, find_gpu
from apo_lora.machine.paths import at_home
from apo_lora.notebook.form import as_name
from apo_lora.recipe.files import find_recipe, load_recipe, override
from apo_lora.recipe.schema import Recipe
from apo_lora.run.directory import RunDir
from apo_lora.run.files import read_jsonl, replacing, write_atomically, write_json

OTHER_DATA = ("data.eval=null", "data.general=null", "data.columns={}")
"""What the recipe says of its own data."""


# --- the machine -----------------------------------------------------------------------------------------------------

GiB = 2**30


def machine(out: str) -> None:
    """The banner, and {recipe, vram in GiB or null}."""
    gpu = find_gpu()
    name = suited_recipe(gpu)
    lines = banner(gpu, name)
    write_json(Path(out), {"lines": lines, "recipe": name, "vram": gpu and gpu.total_bytes / GiB})


def suited_recipe(gpu: Gpu | None) -> str:
    """Name of the shipped recipe: the largest 3B recipe that the GPU allows, the embedded model without a GPU."""
    if gpu is None:
        return "tiny_cpu"
    if gpu.total_bytes < 14 * GiB:
        return "gpu_8gb"
    if gpu.total_bytes < 22 * GiB or gpu.dtype == "float16":
        return "colab_t4"
    return "single_gpu"


def banner(gpu: Gpu | None, recipe_name: str) -> list[str]:
    """GPU, memory, number format and recipe, a line each."""
    if gpu is None:
        return [
            "No GPU here: the embedded tiny model trains on the CPU, which shows every step at a small scale.",
            "For Qwen2.5-VL-3B choose Runtime > Change runtime type > T4 GPU, then Run all again.",
            f"Recipe    {recipe_name}.yaml",
        ]
    return [
        f"GPU       {gpu.name}",
        f"Memory    {gpu.total_bytes / GiB:.1f} GiB, {gpu.free_bytes / GiB:.1f} free",
        f"Precision {gpu.dtype}",
        f"Recipe    {recipe_name}.yaml",
    ]


# --- the form and the run --------------------------------------------------------------------------------------------


def form(
    out: str, recipe: str, dataset: str, held_out: str, steps: int, num_generations: int, apo: bool, folder: str
) -> None:
    """The form as a recipe with a few keys changed. Empty and 0 leave its own value. Raises RecipeError, DataError.

    Writes {overrides, run, max_steps, held_out, samples: [data, split], lines}, the first as training takes them. Into
    a run directory beside the run goes the recipe of the base's samples; samples of other settings are removed.
    """
    overrides = [
        "train.evaluate=false",  # the notebook measures in a cell of its own
        *([override("data.train", dataset), *OTHER_DATA] if dataset else []),
        *([f"train.max_steps={steps}"] if steps else []),
        *(_group_size(recipe, num_generations) if num_generations else []),
        *([] if apo else ["apo.dads=null", "apo.stcr=null"]),
    ]
    filled = load_recipe(find_recipe(recipe), [*overrides, *([override("data.eval", held_out)] if held_out else [])])
    data = filled.data
    for spec in filter(None, (data.train, data.eval)):
        refuse_missing(spec)
    # Runs of other settings get other names, but not of another length: a longer run continues a shorter one.
    parts = [recipe, dataset, "apo" if apo else "grpo", f"g{filled.grpo.num_generations}"]
    run = Path(at_home(folder)) / "-".join(map(as_name, filter(None, parts)))
    _prepare_samples(RunDir(f"{run}-base"), filled)
    write_json(
        Path(out),
        {
            "overrides": [*overrides, override("output.dir", str(run))],
            "run": str(run),
            "max_steps": filled.train.max_steps,
            "held_out": data.eval,
            "samples": [data.eval, data.eval_split] if data.eval else [data.train, data.split],
            "lines": [f"{filled.method} with {recipe}.yaml on {data.train}, into {run}"],
        },
    )


def _prepare_samples(base: RunDir, recipe: Recipe) -> None:
    asked = Recipe(**{section: getattr(recipe, section) for section in SECTIONS}).to_yaml()
    if not base.recipe.is_file() or base.recipe.read_text(encoding="utf-8") != asked:
        shutil.rmtree(base.path, ignore_errors=True)
        write_atomically(base.recipe, asked)


def _group_size(recipe: str, num_generations: int) -> list[str]:
    """With the largest number of completions per pass, up to the recipe's, that divides a step evenly."""
    grpo = load_recipe(find_recipe(recipe)).grpo
    completions = grpo.prompts_per_step * num_generations
    per_pass = max((n for n in range(1, grpo.completions_per_pass + 1) if completions % n == 0), default=1)
    return [f"grpo.num_generations={num_generations}", f"grpo.completions_per_pass={per_pass}"]


def answers(out: str, run: str, evaluation: str, shown: int) -> None:
    """HTML: the greedy answers to the first items."""
    directory = RunDir(run)
    rows = [row for row in read_jsonl(directory.evaluations / evaluation / "answers.jsonl") if row["greedy"]]
    items = list(dict.fromkeys((row["set"], row["row"]) for row in rows))[:shown]
    html = static_gallery([row for row in rows if (row["set"], row["row"]) in items], directory.path)
    write_atomically(Path(out), html)


def figures(out: str, file: str) -> None:
    """The table of an evaluation."""
    write_atomically(Path(out), "\n".join(table(json.loads(Path(file).read_text(encoding="utf-8")))))


def curves(png: str, run: str, watch: bool, out: str | None = None) -> None:
    """Drawn again when there are new steps: until this process is ended, or once."""
    from apo_lora.run.plots import overview

    directory, drawn = RunDir(run), 0
    while True:
        started = time.monotonic()
        size = directory.metrics.stat().st_size if directory.metrics.is_file() else 0
        if size != drawn and (picture := overview(directory)):
            with replacing(Path(png)) as temporary:
                temporary.write_bytes(picture)
        drawn = size
        if not watch:
            return
        time.sleep(max(1, 9 * (time.monotonic() - started)))  # at most a tenth of a core is taken from the training


def trained(out: str, weights: str) -> None:
    """Raises ModelError unless every B matrix of a LoRA has changed from zero, where it starts."""
    import torch
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as file:
        matrices = [file.get_tensor(name) for name in file.keys() if ".lora_B." in name]  # noqa: SIM118 # no mapping
    still = sum(not (matrix.any() and torch.isfinite(matrix).all()) for matrix in matrices)
    if still or not matrices:
        raise ModelError(
            f"The LoRA has not trained: {still} of {len(matrices)} B matrices are 0 or not finite; train again."
        )
    write_atomically(Path(out), f"The LoRA has trained: all {len(matrices)} B matrices have changed from zero.")


KINDS = {kind.__name__: kind for kind in (machine, form, answers, figures, curves, trained)}


def main(what: str, arguments: str) -> int:
    options: dict[str, Any] = json.loads(arguments)
    try:
        KINDS[what](**options)
    except UserError as error:
        write_atomically(Path(f"{options['out']}.problems"), "\n".join(error.problems))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
