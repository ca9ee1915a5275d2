"""Recipes on disk: found by path or by the name of a shipped one, read as safe YAML, changed by `key=value` overrides.

Unknown keys, wrong types and impossible combinations are all reported at once, as one RecipeError.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from apo_lora.errors import RecipeError
from apo_lora.recipe.combinations import combination_problems
from apo_lora.recipe.schema import Recipe, Section


def describe_keys() -> Iterator[str]:
    """Every key with its default and meaning, section by section, as lines of text."""
    for section, field in Recipe.model_fields.items():
        yield f"{section}:"
        for key, info in field.annotation.model_fields.items():
            default = "required" if info.is_required() else _inline_yaml(info.default)
            yield f"  {key}: {default}" + (f"    # {' '.join(info.description.split())}" if info.description else "")


def _inline_yaml(value: Any) -> str:
    value = value.model_dump() if isinstance(value, Section) else value
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=float("inf")).split("\n")[0]


def override(key: str, value: Any) -> str:
    """`section.key=value` as `load_recipe` takes it, whatever is in the value."""
    return f"{key}={_inline_yaml(value)}"


# --- loading ---------------------------------------------------------------------------------------------------------

# Recipes stand beside the package in a checkout, and inside it after an install from the wheel.
_PACKAGE = Path(__file__).parents[1]
_SHIPPED_DIRS = (_PACKAGE.parent / "recipes", _PACKAGE / "recipes")


def shipped_recipes() -> dict[str, Path]:
    """Name (without .yaml) to path."""
    folder = next((d for d in _SHIPPED_DIRS if (d / "tiny_cpu.yaml").is_file()), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def find_recipe(name: str) -> Path:
    """A recipe by path, or by the name of a shipped one, with or without .yaml."""
    if Path(name).is_file():
        return Path(name)
    if Path(name).is_dir():
        raise RecipeError(f"recipe {name}: is a folder; give the .yaml file in it")
    shipped = shipped_recipes()
    stem = name.removesuffix(".yaml")
    if stem in shipped:
        return shipped[stem]
    raise RecipeError(
        f"recipe {name}: no such file, and no shipped recipe with that name{_did_you_mean(stem, shipped)}; "
        "`apo-lora recipes` lists them"
    )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies `section.key=value` overrides. Raises RecipeError with every problem found."""
    path = Path(path)
    tree = read_yaml(path, f"a recipe is a mapping of sections ({', '.join(Recipe.model_fields)})")
    problems = [problem for text in overrides if (problem := _apply_override(tree, text))]
    return _validated(tree, path.name, problems)


class _RecipeLoader(yaml.SafeLoader):
    """Safe YAML, which creates no objects; aliases, which can expand without end, and duplicate keys are errors."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases are not supported; write out the value", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Mapping:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"duplicate key {key.value}; remove one of them"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """YAML 1.1 reads 010 as 8 and 1:30 as 90, which nobody means who writes a seed or a count."""
        if re.fullmatch(r"[-+]?0[0-7_]+|.*:.*", node.value):
            meant = super().construct_yaml_int(node)
            problem = f"{node.value} would be read as {meant}; write a plain decimal number"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_yaml_int(node)


_RecipeLoader.add_constructor("tag:yaml.org,2002:int", _RecipeLoader.construct_yaml_int)


def read_yaml(path: Path, shape: str) -> dict[str, Any]:
    """A YAML file that holds a mapping, read safely. `shape` says what is expected; raises RecipeError."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_RecipeLoader)
    except RecursionError:
        raise RecipeError(f"{path}: nested too deeply; a recipe has sections, and keys in them") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{path}:{where} is not valid YAML ({reason}); fix it there") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}); save it as UTF-8 text") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: {shape}")
    return tree


def _apply_override(tree: dict[str, Any], text: str) -> str | None:
    """Sets one `section.key=value` in the tree (the value read as YAML); returns the problem, if any."""
    key, equals, value = text.partition("=")
    section, *path = key.split(".")
    if not (equals and path and section and all(path)):
        return f"override {text!r}: write it as section.key=value, for instance grpo.num_generations=4"
    try:
        parsed = yaml.load(value, Loader=_RecipeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        reason = f" ({problem})" if (problem := getattr(error, "problem", None)) else ""
        return f"override {text!r}: the value is not valid YAML{reason}; quote it"
    for name in [section, *path[:-1]]:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[path[-1]] = parsed
    return None


def _validated(tree: dict[str, Any], source: str, problems: list[str]) -> Recipe:
    # YAML has lists and no tuples; an empty section (`apo:`) reads as None and means "all defaults".
    tree = {name: {} if body is None and name in Recipe.model_fields else body for name, body in tree.items()}
    problems = list(problems)
    try:
        recipe = Recipe.model_validate(_lists_to_tuples(tree))
    except ValidationError as error:
        problems += [one_line(detail) for detail in error.errors()]
        # Also look for impossible combinations among what is valid, so that one message holds everything.
        try:
            recipe = Recipe.model_validate(_lists_to_tuples(_without(tree, error)))
        except ValidationError:
            recipe = None
    problems += combination_problems(recipe) if recipe else ()
    if problems:
        raise RecipeError(*(f"{source}: {problem}" for problem in problems))
    return recipe


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _without(tree: dict[str, Any], error: ValidationError) -> dict[str, Any]:
    """The tree without the keys that the error names; a missing data.train gets a placeholder."""
    bad = {tuple(str(part) for part in detail["loc"][:2]) for detail in error.errors()}
    kept = {
        section: {key: value for key, value in body.items() if (section, str(key)) not in bad}
        for section, body in tree.items()
        if isinstance(body, dict) and section in Recipe.model_fields
    }
    return {**kept, "data": {"train": "-", **kept.get("data", {})}}


def one_line(detail: Any, schema: type[Section] = Recipe) -> str:
    """A pydantic error as `section.key: what is wrong, with the remedy`."""
    loc = [str(part) for part in detail["loc"]]
    key, kind = ".".join(loc), detail["type"]
    if kind == "extra_forbidden":
        siblings = schema.model_fields
        for name in loc[:-1]:
            siblings = siblings[name].annotation.model_fields
        return f"{key}: unknown key{_did_you_mean(loc[-1], siblings, prefix='.'.join([*loc[:-1], '']))}"
    if kind == "missing":
        return f"{key}: missing; it is required"
    if kind in ("model_type", "model_attributes_type"):
        return f"{key}: must be a mapping of keys, not {detail['input']!r}"
    if kind == "tuple_type":
        return f"{key}: must be a list such as [a, b], not {detail['input']!r}"
    return f"{key}: {detail['input']!r} is not valid ({detail['msg'][0].lower()}{detail['msg'][1:]})"


def _did_you_mean(word: str, known: Any, prefix: str = "") -> str:
    if near := difflib.get_close_matches(word, list(known), n=1, cutoff=0.5):
        return f"; did you mean {prefix}{near[0]}?"
    # The other common mistake is a key in the wrong section.
    homes = [section for section, field in Recipe.model_fields.items() if word in field.annotation.model_fields]
    return f"; did you mean {homes[0]}.{word}?" if homes else f"; valid here: {', '.join(known)}"
