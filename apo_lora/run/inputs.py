"""inputs.json: fingerprints of a run's data, of the adapter that it starts from and of its own rewards, so that all its
parts are one run.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apo_lora.data.examples import Example, Loaded
from apo_lora.errors import RunDirError
from apo_lora.recipe.schema import Recipe
from apo_lora.rewards.plugins import source_files
from apo_lora.run.adapter import CONFIG, WEIGHTS
from apo_lora.run.directory import RunDir
from apo_lora.run.start import named_in_errors, start_adapter


def fingerprint(examples: Iterable[Example]) -> str:
    """Of what is asked and what counts as right."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.row, example.problem, example.answer, example.choices]).encode())
    return digest.hexdigest()


def start_of(recipe: Recipe) -> dict[str, str] | None:
    """The adapter in lora.start, where there is one: its name, and the fingerprint of its files."""
    if recipe.lora.start is None:
        return None
    with named_in_errors():
        folder = start_adapter(recipe).folder
    return {"name": recipe.lora.start, "sha256": _sha256_of(folder / name for name in (CONFIG, WEIGHTS))}


def recorded_start(run_dir: RunDir) -> dict[str, str] | None:
    """What `start_of` said when the run was started, where it is on record."""
    try:
        return json.loads(run_dir.inputs.read_text(encoding="utf-8")).get("start")
    except (OSError, ValueError, AttributeError):
        return None


def inputs_of(
    train: Loaded,
    held_out: Mapping[str, Sequence[Example]],
    rewards: Sequence[str],
    start: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """`rewards`: the names in rewards.functions, which have been loaded. `start`: see start_of. Pictures count by their
    size.
    """
    sets = {"data.train": train.examples, **held_out}
    return {
        "sets": {
            title: {
                "rows": len(examples),
                "sha256": fingerprint(examples),
                "pictures": hashlib.sha256(repr([_pictures(example) for example in examples]).encode()).hexdigest(),
            }
            for title, examples in sets.items()
        },
        "rewards": {name: _sha256_of(files) for name in rewards if (files := source_files(name))},
        **({"start": start} if start else {}),
    }


def _pictures(example: Example) -> list[tuple[Any, ...]]:
    """Width and height of each, and the bytes of its file where it is one."""
    return [(*image.size, image.path.stat().st_size if image.path else 0) for image in example.images]


def _sha256_of(files: Iterable[Path]) -> str:
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def changes_of_inputs(run_dir: RunDir, now: Mapping[str, Any]) -> list[str]:
    """What to say before a run goes on. Raises RunDirError for other data: rows are recorded and drawn by number."""
    try:
        before = json.loads(run_dir.inputs.read_text(encoding="utf-8"))
        sets, rewards = before["sets"], before["rewards"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # of a version that did not record it
    problems = [
        f"{title}: {sets[title]['rows']} rows until now, {here['rows']} now" + (", with other contents" * same)
        for title, here in now["sets"].items()
        if (there := sets.get(title, here)) != here
        for same in [there["rows"] == here["rows"]]
    ]
    if now.get("start") and now["start"]["sha256"] != before.get("start", now["start"])["sha256"]:
        problems.append(f"lora.start: the adapter {now['start']['name']} is not the one that the run started from")
    if problems:
        raise RunDirError(
            f"--resume: inputs of {run_dir.path} have changed; restore them, or start a new run with output.dir=DIR "
            f"(or remove {run_dir.inputs}, to go on all the same)",
            *problems,
        )
    other = [name for name, here in now["rewards"].items() if rewards.get(name, here) != here]
    return [f"Changed since the run started: the code of {name}. The run continues with it." for name in other]
