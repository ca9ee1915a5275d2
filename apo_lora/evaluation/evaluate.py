"""`apo-lora eval`: a run's base and tuned model on the same held-out items, answer by answer into RUN/evaluations/NAME.

Cheap checks come first, then heavy imports, then data, then the model. Recorded answers are never generated again.
"""

import hashlib
import re
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo_lora.data.benchmarks import find_benchmark
from apo_lora.data.inputs import SetSpec, held_out_sets, open_inputs
from apo_lora.errors import DataError, ModelError, RecipeError, UserError
from apo_lora.evaluation.figures import all_figures
from apo_lora.evaluation.gallery import write_gallery
from apo_lora.evaluation.table import table
from apo_lora.machine import ranks
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.recipe.schema import Recipe
from apo_lora.run.adapter import WEIGHTS, AdapterSource, find_adapter, on_its_base
from apo_lora.run.directory import RunDir
from apo_lora.run.files import write_json
from apo_lora.run.inputs import fingerprint
from apo_lora.run.recipes import trained_recipe

if TYPE_CHECKING:
    from apo_lora.data.examples import Loaded

# How a model is loaded and asked. The other sections say how it was trained, which cannot be changed afterwards.
SECTIONS = ("model", "data", "rewards", "grpo")


def evaluate(
    run_path: str | Path,
    *,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    data: Sequence[str] = (),
    split: str | None = None,
    limit: int | None = None,
    base: bool = False,
    model: str | None = None,
    samples: int = 0,
    batch_size: int | None = None,
    engine: str = "transformers",
    name: str | None = None,
) -> Path:
    """Answers, verifies and compares; prints the table and returns the folder RUN/evaluations/NAME.

    `run_path`: of a run, or of its `adapter-best`. `recipe` and `overrides` change how the models are asked (see
    `evaluation_recipe`). `data` replaces the recipe's held-out sets, `split` and `limit` replace the recipe's. `base`:
    evaluate only that model; `model`: the folder of a merged export instead of the run's adapter. `samples`: sampled
    answers per item, beside the greedy one. `batch_size`: answers generated at once, by default as many as fitted in
    training. `engine`: transformers, or vllm for answers from a server, as the recipe's section rollout describes it.
    Continues an existing one.
    Raises UserError for what a user can fix, before anything is written where possible.
    """
    if ranks.num_processes() > 1:
        raise UserError("apo-lora eval: runs in one process; start it without a launcher")
    run, adapter = _run_and_adapter(Path(run_path))
    asked = evaluation_recipe(run, recipe, overrides)
    asked = asked.model_copy(update={"rollout": asked.rollout.model_copy(update={"engine": engine})})
    if engine == "vllm" and model:
        raise UserError("apo-lora eval: --engine vllm answers with the run's adapter; leave --model out")
    sets = sets_to_measure(asked, data, split, limit)
    source = None if base or model else find_adapter(adapter)
    asked = on_its_base(asked, source) if source else asked
    exported = _exported(model) if model and not base else None
    other = exported or (adapter if source and adapter != run.path else None)
    folder = run.evaluations / (name or default_name(recipe, sets if data else (), other))

    print("Loading libraries ...", flush=True)
    from apo_lora.policy.loading import import_engine, load_processor, needs_gpu
    from apo_lora.rollout.vllm.server import servers_problem, serving

    if problem := needs_gpu(asked.model) or servers_problem(asked):
        raise ModelError(problem)
    import_engine(asked.model)
    from apo_lora.evaluation.answering import answer, policies
    from apo_lora.evaluation.folder import EvaluationFolder, planned
    from apo_lora.evaluation.measure import ITEMS_PER_BATCH
    from apo_lora.rewards.functions import verifier_of

    opened = open_inputs(asked, train=False, held_out=sets)
    loaded = opened.fitting(load_processor(asked.model, asked.data), asked.data).held_out
    print("\n".join(line for of_set in loaded.values() for line in of_set.lines()), flush=True)
    batch_size = batch_size or min(ITEMS_PER_BATCH, asked.completions_per_step)
    settings = {
        "sets": {
            title: {"source": of_set.source, "items": len(of_set.examples), "sha256": fingerprint(of_set.examples)}
            for title, of_set in loaded.items()
        },
        "samples": samples,
        "batch_size": batch_size,
        "recipe": {section: getattr(asked, section).model_dump(mode="json") for section in SECTIONS},
        "seed": asked.train.seed,
        **({"engine": engine} if engine != "transformers" else {}),
        **_fingerprint_of_tuned(source, exported),
    }
    record = EvaluationFolder(folder)
    with record.locked(), verifier_of(asked.rewards) as verifier, ExitStack() as inside:
        settings = record.open(settings)
        plan = planned({title: of_set.examples for title, of_set in loaded.items()}, samples, batch_size)
        wanted = [batch for batch in plan if batch.model == "base" or not base]
        done = record.drop_parts(plan)
        todo = [batch for batch in wanted if batch.keys[0] not in done]
        if len(todo) < len(wanted):
            print(f"Continuing: {len(done)} answers are already recorded.", flush=True)
        examples = [example for of_set in loaded.values() for example in of_set.examples] if todo else []
        servers = inside.enter_context(serving(asked, run.path, examples))
        switched = policies(asked, source, exported, {batch.model for batch in todo})
        answer(todo, wanted, switched, asked, verifier.score, record, run, servers)
        if given_up := verifier.timeouts + verifier.crashes:
            print(f"{given_up} answers exceeded the verifier's time or memory limit and count as wrong.")
    rows = record.rows()
    about = {title: _about(sets[title], of_set) for title, of_set in loaded.items()}
    figures = {"sets": about} | all_figures(rows, {title: about[title]["items"] for title in about})
    write_json(record.figures, figures | {"settings": settings})
    write_gallery(rows, run.path, record.gallery)
    print("\n".join(["", *table(figures), f"Figures  {record.figures}", f"Gallery  {record.gallery}"]))
    return folder


def _run_and_adapter(path: Path) -> tuple[RunDir, Path]:
    """A run, and where its adapter is to be found: the run's own path, or that of its best. Raises ModelError."""
    for run in (RunDir(path), RunDir(path.parent)):
        if run.recipe.is_file() and path in (run.path, run.adapter_best):
            return run, path
    missing = RunDir(path).recipe.name
    raise ModelError(f"{path}: not a run directory (it has no {missing}); give a run directory, or its adapter-best")


def evaluation_recipe(run: RunDir, name: str | None, overrides: Sequence[str]) -> Recipe:
    """The run's recipe with `overrides`; of a second recipe, what it sets in SECTIONS, and `overrides` to that.

    Raises RecipeError, also for overrides of how the run was trained.
    """
    if bad := [text for text in overrides if text.partition(".")[0] not in SECTIONS]:
        raise RecipeError(
            *(
                f"override {text!r}: for a trained model, only keys in {', '.join(SECTIONS)} can be changed"
                for text in bad
            )
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


def sets_to_measure(
    recipe: Recipe, data: Sequence[str] = (), split: str | None = None, limit: int | None = None
) -> dict[str, SetSpec]:
    """By title: those of `data`, else the recipe's benchmarks, whole; else its held-out sets. Raises DataError."""
    split = split or recipe.data.eval_split
    if named := data or recipe.data.benchmarks:
        sets = [(title_of(spec), SetSpec(spec, split, limit)) for spec in named]
    else:
        limit = limit or recipe.data.eval_limit
        sets = [(title, SetSpec(rows.spec, split, limit)) for title, rows in held_out_sets(recipe).items()]
    if not sets:
        raise DataError("data.eval: the run's recipe has no held-out data; name some with --data D")
    titles = [title for title, _ in sets]
    if twice := sorted({title for title in titles if titles.count(title) > 1}):
        raise DataError(f"--data: two data sets have the same name, {twice[0]}; evaluate them one at a time")
    return dict(sets)


def title_of(spec: str) -> str:
    """A data set's short name: of a benchmark its own, of a file its stem, of another that of the Hub with dashes."""
    if find_benchmark(spec):
        return spec.partition(":")[0]
    name = Path(spec).stem if Path(spec).exists() else spec
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data"


def default_name(recipe: str | None, titles: Collection[str], other: Path | None) -> str:
    """Of the folder below evaluations/. `titles`: of the sets that were named, if any were. `other`: the folder of what
    answers instead of the run's adapter."""
    what = Path(recipe).stem if recipe else "-".join(titles) or "held_out"
    return f"{what}-{other.resolve().name}" if other else what


def _exported(path: str) -> Path:
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"--model {folder}: not an exported model (no config.json); create one with apo-lora export --to merged"
        )
    return folder


def _fingerprint_of_tuned(source: AdapterSource | None, exported: Path | None) -> dict[str, dict[str, str]]:
    """Identifies the model that answered; an export's weights by their names, sizes and times."""
    if source:
        return {"tuned": {"adapter": hashlib.sha256((source.folder / WEIGHTS).read_bytes()).hexdigest()}}
    if exported:
        files = sorted(exported.glob("*.safetensors"))
        facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        files_hash = hashlib.sha256(repr(facts).encode()).hexdigest()
        return {"tuned": {"model": str(exported.resolve()), "files": files_hash}}
    return {}


def _about(spec: SetSpec, loaded: "Loaded") -> dict[str, Any]:
    """What eval.json says of a set: `items` were measured, of `rows` that its source has up to `limit`."""
    return {
        "source": loaded.source,
        "rows": loaded.num_rows,
        "items": len(loaded.examples),
        "limit": spec.limit,
        "dropped": {reason: len(bad) for reason, bad in loaded.dropped.items()},
    }
