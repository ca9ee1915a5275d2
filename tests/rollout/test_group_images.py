"""Images of a rollout: processed once per prompt, kept once, and the same training as when every row has its own."""

import pytest
import torch
from tiny_trainer import adapter, largest_difference, logged, processed_images, recipe_of

from apo_lora.policy.batches import pixels, row_slices, with_rows_replaced
from apo_lora.rollout.group_images import images_processed_once

WAYS = pytest.mark.parametrize(
    ("grpo", "lora"),
    [({}, {}), ({"shared_prompt": False}, {}), ({}, {"vision": True})],
    ids=["features", "no sharing", "trained tower"],
)


def trained(make_trainer, grpo, lora, steps):
    """(adapter, figures of each step, images processed call by call, last rollout's micro-batches)."""
    recipe = recipe_of(grpo={"completions_per_pass": 2, **grpo}, train={"max_steps": steps})
    trainer = make_trainer(recipe, lora=lora)
    with processed_images(trainer.processing_class) as counts:
        trainer.train()
    return adapter(trainer), logged(trainer), counts, trainer._buffered_inputs


@WAYS
def test_once_per_prompt(make_trainer, grpo, lora):
    """Two rollouts of two prompts with four completions: 8 images in each of two calls, without it."""
    _, _, counts, batches = trained(make_trainer, grpo, lora, steps=2)
    assert counts == [2, 2]
    kept = [part for batch in batches for part in batch["pixel_values"]]
    assert len(kept) == 8 and len({part.data_ptr() for part in kept}) == 2
    assert {part.untyped_storage().nbytes() for part in kept} == {2 * kept[0].nbytes}
    assert kept[0].device.type == "cpu"  # where it was processed: a pass takes to the GPU what it needs


@WAYS
def test_it_changes_nothing(make_trainer, monkeypatch, grpo, lora):
    def train():
        weights, figures, counts, _ = trained(make_trainer, grpo, lora, steps=1)
        measured = ("reward", "length", "loss", "policy_loss", "kl", "grad_norm", "entropy")
        return weights, [[step[name] for name in measured] for step in figures], counts

    weights, figures, _ = train()

    def every_row(processor, groups):
        return images_processed_once(processor, list(range(len(groups))))

    monkeypatch.setattr("apo_lora.trainer.images_processed_once", every_row)
    expected_weights, expected_figures, counts = train()
    assert counts == [8]
    assert largest_difference(weights, expected_weights) == 0 and figures == expected_figures

    def mixed_up(processor, groups):
        """The two prompts get each other's images."""
        preprocess = processor.image_processor.preprocess
        processor.image_processor.preprocess = lambda images, **options: preprocess(images[::-1], **options)
        return images_processed_once(processor, groups)

    monkeypatch.setattr("apo_lora.trainer.images_processed_once", mixed_up)
    assert largest_difference(weights, train()[0]) > 0


def test_what_the_processor_gives(tiny_policy):
    from PIL import Image

    pictures = [
        Image.new("RGB", size, color) for size, color in (((84, 84), "red"), ((112, 56), "blue"), ((28, 28), "green"))
    ]
    images = [[pictures[0], pictures[1]]] * 2 + [[pictures[2]]] * 3
    processor = tiny_policy.processor
    every_row = processor.image_processor(images=images, return_tensors="pt")
    first_rows = processor.image_processor(images=[images[0], images[2]], return_tensors="pt")
    with images_processed_once(processor, [3, 3, 4, 4, 4]) as by_row:
        first = processor.image_processor(images=images)
        second = processor.image_processor(images=images, return_tensors="pt")
    for output in (first, second):
        assert torch.equal(output["image_grid_thw"], every_row["image_grid_thw"])
        assert torch.equal(output["pixel_values"], first_rows["pixel_values"])
    assert torch.equal(torch.cat(by_row), every_row["pixel_values"])
    after = processor.image_processor(images=images, return_tensors="pt")
    assert torch.equal(after["pixel_values"], every_row["pixel_values"])


def test_text_alone_needs_no_image_processor(tiny_policy):
    with images_processed_once(tiny_policy.processor.tokenizer, [0, 0]) as by_row:
        assert tiny_policy.processor.tokenizer("How many?")["input_ids"]
    assert by_row == []


def test_pixels_by_row_are_sliced_and_replaced_like_those_in_one_tensor(tiny_policy, make_batch):
    batch, other = (
        make_batch(tiny_policy),
        make_batch(tiny_policy, sizes=((140, 140), (28, 28)), lengths=(20, 5), seed=1),
    )

    def by_row(batch):
        return batch | {"pixel_values": [row["pixel_values"] for row in row_slices(batch, 1)]}

    for rows in (1, 3, 4):
        for one, flat in zip(row_slices(by_row(batch), rows), row_slices(batch, rows), strict=True):
            assert isinstance(one["pixel_values"], list) and torch.equal(pixels(one), flat["pixel_values"])
            assert torch.equal(one["image_grid_thw"], flat["image_grid_thw"])
    merged, flat = with_rows_replaced(by_row(batch), [0, 2], by_row(other)), with_rows_replaced(batch, [0, 2], other)
    assert torch.equal(pixels(merged), flat["pixel_values"]) and not torch.equal(pixels(merged), batch["pixel_values"])
    assert torch.equal(merged["image_grid_thw"], flat["image_grid_thw"])
