"""A few held-out items answered by a recipe's base, before anything is trained: `python -m ... RECIPE COUNT FOLDER`."""

import sys
from pathlib import Path

from apo_lora.errors import ModelError, UserError
from apo_lora.machine.process import prepare_process
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.run.directory import append_jsonl


def answer_by_base(recipe_name: str, count: int, folder: Path, overrides: list[str]) -> None:
    """Greedy answers into folder/answers.jsonl, their pictures beside it. Raises UserError."""
    recipe = load_recipe(find_recipe(recipe_name), overrides)
    prepare_process()
    from apo_lora.policy.loading import import_engine, load_policy, needs_gpu

    if problem := needs_gpu(recipe.model):
        raise ModelError(problem)
    import_engine(recipe.model)
    from apo_lora.data.examples import load_examples
    from apo_lora.evaluation.measure import answer_rows, measure
    from apo_lora.rewards.verifier import Verifier
    from apo_lora.run.pictures import saved_images

    data, seed = recipe.data, recipe.train.seed
    spec, split = (data.eval, data.eval_split) if data.eval else (data.train, data.split)
    examples = load_examples(spec, data, split=split, limit=count, seed=seed).examples
    policy = load_policy(recipe.model, recipe.lora, data, seed=seed)
    with Verifier(seconds_per_item=recipe.rewards.seconds_per_item) as verifier:
        judged = measure(policy, examples, recipe, verifier.score, seed=seed, greedy=True)
    images = [saved_images(example.images, folder / "images", folder) for example in examples]
    append_jsonl(folder / "answers.jsonl", answer_rows("reasoning", "base", examples, judged, images, greedy=True))


def main(recipe_name: str, count: str, folder: str, *overrides: str) -> int:
    try:
        answer_by_base(recipe_name, int(count), Path(folder), list(overrides))
    except UserError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
