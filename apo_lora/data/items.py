"""Examples as the items that TRL's GRPOTrainer reads, made when they are asked for."""

import random
import uuid
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from apo_lora.data.examples import Example
from apo_lora.data.text import row_numbers
from apo_lora.errors import DataError
from apo_lora.recipe.schema import DataSection

if TYPE_CHECKING:
    import datasets


def training_order(num_examples: int, num_prompts: int, seed: int) -> list[int]:
    """Which example each of a run's prompts is: one seeded permutation after another, as many as it takes.

    A longer run begins with the order of a shorter one, so that a resumed run continues exactly where it was; TRL's own
    sampler starts over with the first epoch's order.
    """
    rng, order = random.Random(seed), []
    while len(order) < num_prompts:
        epoch = list(range(num_examples))
        rng.shuffle(epoch)
        order += epoch
    return order[:num_prompts]


def prompt_dataset(
    examples: Sequence[Example], data: DataSection, order: Sequence[int] | None = None
) -> "datasets.Dataset":
    """What TRL's GRPOTrainer reads: items `prompt`, `images`, `answer`, `choices`, `index`, `category`, and the row's
    other columns, None where a row lacks one.

    `order` says which example each item is (none: all, as they come).
    `index` is the position in `examples`, and all that is stored; the rest is made on access. A data set without any
    image has no `images` key.
    """
    import datasets

    refuse_mixture(examples)
    rows = datasets.Dataset.from_dict({"index": list(range(len(examples)) if order is None else order)})
    return rows.with_transform(_ItemsOnAccess(examples, data))


def refuse_mixture(examples: Sequence[Example]) -> None:
    """Raises DataError: TRL 1.15 hands its processor a None for an item without images, which it refuses."""
    bare = [example.row for example in examples if not example.images]
    if bare and len(bare) < len(examples):
        raise DataError(
            f"{len(bare)} of {len(examples)} examples have no image ({row_numbers(bare)}); "
            "train on examples with images and on examples without in separate runs"
        )


_NOT_COLUMNS = {
    "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric",
    "environment", "environments", "image", "images",
}  # fmt: skip
"""Names that mean something else to TRL."""

_LIVE_ITEMS: weakref.WeakValueDictionary[str, "_ItemsOnAccess"] = weakref.WeakValueDictionary()


def _live_items(key: str) -> "_ItemsOnAccess":
    return _LIVE_ITEMS[key]


class _ItemsOnAccess:
    """Index batch -> items. The G copies of a prompt in a batch share their decoded images, as do equal batches in a
    row: TRL asks for the same batch at every step that reuses a rollout."""

    def __init__(self, examples: Sequence[Example], data: DataSection):
        self._examples, self._data = list(examples), data
        names = {name for example in examples for name in example.columns}
        self._columns = sorted(name for name in names - _NOT_COLUMNS if isinstance(name, str))
        self._decoded: dict[int, list[Image.Image]] = {}
        self._key = uuid.uuid4().hex
        _LIVE_ITEMS[self._key] = self

    def __reduce__(self) -> tuple[Callable[[str], "_ItemsOnAccess"], tuple[str]]:
        # `datasets` pickles a transform at every select and shuffle, only to hash it: seconds for 20,000 examples, and
        # all their images for boards. A key will do, in this process and in those forked from it.
        return _live_items, (self._key,)

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        indices = batch["index"]
        examples = [self._examples[index] for index in indices]
        items = {name: [example.columns.get(name) for example in examples] for name in self._columns} | {
            "prompt": [example.messages(self._data) for example in examples],
            "answer": [e.answer if isinstance(e.answer, str) else list(e.answer) for e in examples],
            "choices": [list(example.choices) if example.choices else None for example in examples],
            "index": list(indices),
            "category": [example.category for example in examples],
        }
        if any(example.images for example in examples):
            self._decoded = {index: self._images(index) for index in dict.fromkeys(indices)}
            items["images"] = [list(self._decoded[index]) for index in indices]
        return items

    def _images(self, index: int) -> list[Image.Image]:
        known = self._decoded.get(index)
        return known if known is not None else [image.open() for image in self._examples[index].images]
