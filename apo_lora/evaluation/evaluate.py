"""`apo-lora eval`: a run's base and tuned model on the same held-out items, answer by answer into RUN/evaluations/NAME.

Cheap checks come first, then heavy imports, then data, then the model. What was answered is never asked again.
"""

import argparse
import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from apo_lora.data.benchmarks import find_benchmark
from apo_lora.errors import DataError, ModelError, RecipeError, UserError
from apo_lora.evaluation.figures import all_figures
from apo_lora.evaluation.gallery import write_gallery
from apo_lora.evaluation.table import table
from apo_lora.machine import ranks
from apo_lora.machine.process import prepare_process
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.recipe.schema import Recipe
from apo_lora.run.adapter import WEIGHTS, AdapterSource, find_adapter
from apo_lora.run.directory import RunDir
from apo_lora.run.files import write_json
from apo_lora.run.recipes import trained_recipe

if TYPE_CHECKING:
    from apo_lora.data.examples import Loaded

# How a model is asked and loaded. What else a recipe says is how it was trained, and cannot be changed any more.
SECTIONS = ("model", "data", "rewards", "grpo")


class SetSpec(NamedTuple):
    spec: str
    """As in `data.train`."""
    split: str
    limit: int | None


def evaluate_run(options: argparse.Namespace) -> int:
    """Runs the verb. Returns 0, or 130 where it was interrupted; raises UserError for what a user can mend."""
    if ranks.num_processes() > 1:
        raise UserError("apo-lora eval: works in one process; start it without a launcher")
    run = RunDir(options.run)
    if not run.recipe.is_file():
        raise ModelError(f"{run.path}: no run (it has no {run.recipe.name}); give a run directory")
    recipe = evaluation_recipe(run, options.recipe, options.overrides)
    specs = sets_to_measure(recipe, options)
    source = None if options.base or options.model else find_adapter(run.path)
    exported = _exported(options.model) if options.model and not options.base else None

    prepare_process()
    print("Loading libraries ...", flush=True)
    from apo_lora.policy.loading import import_engine, load_processor, needs_gpu

    if problem := needs_gpu(recipe.model):
        raise ModelError(problem)
    import_engine(recipe.model)
    from apo_lora.evaluation.answering import answer, policies
    from apo_lora.evaluation.folder import EvaluationFolder, fingerprint, planned
    from apo_lora.evaluation.measure import ITEMS_PER_BATCH
    from apo_lora.rewards.verifier import Verifier

    processor = load_processor(recipe.model, recipe.data)
    loaded = {title: _load(spec, recipe, processor) for title, spec in specs.items()}
    batch_size = options.batch_size or min(ITEMS_PER_BATCH, recipe.completions_per_step)
    settings: dict[str, Any] = {
        "sets": {
            title: {"source": of_set.source, "items": len(of_set.examples), "sha256": fingerprint(of_set.examples)}
            for title, of_set in loaded.items()
        },
        "samples": options.samples,
        "batch_size": batch_size,
        "recipe": {section: getattr(recipe, section).model_dump(mode="json") for section in SECTIONS},
        "seed": recipe.train.seed,
    }
    if tuned := _fingerprint_of_tuned(source, exported):
        settings["tuned"] = tuned
    record = EvaluationFolder(run.evaluations / (options.name or default_name(options, specs)))
    settings = record.open(settings)
    plan = planned({title: of_set.examples for title, of_set in loaded.items()}, options.samples, batch_size)
    wanted = [batch for batch in plan if batch.model == "base" or not options.base]
    done = record.drop_parts(plan)
    todo = [batch for batch in wanted if batch.keys[0] not in done]
    if len(todo) < len(wanted):
        print(f"{len(done)} answers are there already.", flush=True)
    try:
        with Verifier(seconds_per_item=recipe.rewards.seconds_per_item) as verifier:
            switched = policies(recipe, source, exported, {batch.model for batch in todo})
            answer(todo, wanted, switched, recipe, verifier.score, record, run)
            if given_up := verifier.timeouts + verifier.crashes:
                print(f"{given_up} answers could not be verified (time or memory) and count as wrong.")
    except KeyboardInterrupt:
        print(f"Stopped. What was answered is kept in {record.answers}; the same command goes on.", file=sys.stderr)
        return 130
    rows = record.rows()
    about = {title: _about(specs[title], of_set) for title, of_set in loaded.items()}
    figures = {"sets": about} | all_figures(rows, {title: about[title]["items"] for title in about})
    write_json(record.figures, figures | {"settings": settings})
    write_gallery(rows, run.path, record.gallery)
    print("\n".join(["", *table(figures), f"Figures  {record.figures}", f"Gallery  {record.gallery}"]))
    return 0


# --- what to measure -------------------------------------------------------------------------------------------------


def evaluation_recipe(run: RunDir, name: str | None, overrides: Sequence[str]) -> Recipe:
    """The run's recipe with `overrides`; of a second recipe, what it sets in SECTIONS, and `overrides` to that.

    Raises RecipeError, also for overrides of how the run was trained.
    """
    if bad := [text for text in overrides if text.partition(".")[0] not in SECTIONS]:
        raise RecipeError(
            *(f"override {text!r}: of a trained model, only {', '.join(SECTIONS)} can be changed" for text in bad)
        )
    if name is None:
        return trained_recipe(run, overrides)
    recipe, other = trained_recipe(run), load_recipe(find_recipe(name), overrides)
    changed = {}
    for section in SECTIONS:
        keys = getattr(other, section)
        update = {key: getattr(keys, key) for key in keys.model_fields_set}
        changed[section] = getattr(recipe, section).model_copy(update=update)
    return recipe.model_copy(update=changed)


def sets_to_measure(recipe: Recipe, options: argparse.Namespace) -> dict[str, SetSpec]:
    """Title -> data set: those of --data, else the recipe's benchmarks, else its eval and general."""
    data = recipe.data
    split = options.split or data.eval_split
    named = options.data or data.benchmarks
    if named:
        specs = [(title_of(spec), SetSpec(spec, split, options.limit)) for spec in named]
    else:
        held_out = {"reasoning": data.eval, "general": data.general}
        limit = options.limit or data.eval_limit
        specs = [(title, SetSpec(spec, split, limit)) for title, spec in held_out.items() if spec]
    if not specs:
        raise DataError("data.eval: the run's recipe names no held-out data; give some with --data D")
    titles = [title for title, _ in specs]
    if twice := sorted({title for title in titles if titles.count(title) > 1}):
        raise DataError(f"--data: two data sets would both be called {twice[0]}; measure them one at a time")
    return dict(specs)


def title_of(spec: str) -> str:
    """A data set's short name: of a benchmark its own, of a file its stem, of another that of the Hub with dashes."""
    if find_benchmark(spec):
        return spec.partition(":")[0]
    name = Path(spec).stem if Path(spec).exists() else spec
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data"


def default_name(options: argparse.Namespace, specs: Mapping[str, SetSpec]) -> str:
    """Of the folder below evaluations/."""
    what = Path(options.recipe).stem if options.recipe else "-".join(specs) if options.data else "held_out"
    return f"{what}-{Path(options.model).resolve().name}" if options.model and not options.base else what


def _exported(path: str) -> Path:
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"--model {folder}: no exported model (no config.json); make one with apo-lora export --to merged"
        )
    return folder


def _fingerprint_of_tuned(source: AdapterSource | None, exported: Path | None) -> dict[str, str] | None:
    """Tells whether answers on disk are this model's; an export's weights by their names, sizes and times."""
    if source:
        return {"adapter": hashlib.sha256((source.folder / WEIGHTS).read_bytes()).hexdigest()}
    if exported:
        files = sorted(exported.glob("*.safetensors"))
        facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return {"model": str(exported.resolve()), "files": hashlib.sha256(repr(facts).encode()).hexdigest()}
    return None


# --- libraries and data ----------------------------------------------------------------------------------------------


def _load(spec: SetSpec, recipe: Recipe, processor: Any) -> "Loaded":
    from apo_lora.data.examples import drop_long_prompts, drop_undecodable, load_examples

    rows = load_examples(spec.spec, recipe.data, split=spec.split, limit=spec.limit, seed=recipe.train.seed)
    # A damaged picture must not stop an evaluation after hours.
    loaded = drop_undecodable(drop_long_prompts(rows, processor, recipe.data))
    if not loaded.examples:
        raise DataError(f"{loaded.summary()}; nothing is left to measure")
    print(loaded.summary(), flush=True)
    return loaded


def _about(spec: SetSpec, loaded: "Loaded") -> dict[str, Any]:
    """What eval.json says of a set: `items` were measured, of `rows` that its source has up to `limit`."""
    return {
        "source": loaded.source,
        "rows": loaded.num_rows,
        "items": len(loaded.examples),
        "limit": spec.limit,
        "dropped": {reason: len(bad) for reason, bad in loaded.dropped.items()},
    }
