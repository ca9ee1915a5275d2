"""A prompt read once for its completions: the same samples, a part of the work, and nothing left behind."""

import pytest
import torch

from apo_lora.policy.batches import row_slices
from apo_lora.policy.shared_prompt.prefill import prompts_read_once
from apo_lora.policy.shared_prompt.vision_features import image_features
from apo_lora.rollout.sampling import generating, generation_fault, watched_forwards

G = 3
SIZES = ((84, 84), (112, 56), (56, 140))
INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")


@pytest.fixture
def load_tiny(load_each):
    return load_each


@pytest.fixture
def prompts(tiny_policy, make_batch, stir_adapter):
    """Three prompts of different lengths and pictures, G times each: what TRL gives to generate()."""
    stir_adapter(tiny_policy.model, scale=0.05)
    batch = make_batch(tiny_policy, SIZES, lengths=(1, 1, 1))
    rows = [row for row in row_slices(batch, 1) for _ in range(G)]
    names = dict(zip(INPUTS, ("prompt_ids", "prompt_mask", *INPUTS[2:]), strict=True))
    return {name: torch.cat([row[key] for row in rows]) for name, key in names.items()}


def inner_model_of(policy):
    return policy.model.get_base_model().model


def generate(policy, inputs, groups=None, **options):
    """(completions, rows of every pass of the language model, patches that went through the tower)."""
    inner, rows, patches = inner_model_of(policy), [], []
    hooks = [
        inner.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
        ),
        inner.visual.register_forward_pre_hook(lambda module, args: patches.append(len(args[0]))),
    ]
    torch.manual_seed(5)
    options = {"do_sample": True, "max_new_tokens": 12, "min_new_tokens": 12, "suppress_tokens": [0], **options}
    with torch.no_grad(), generating(policy.model), watched_forwards(policy.model) as forwards:
        if groups is None:
            output = policy.model.generate(**inputs, **options)
        else:
            with prompts_read_once(inner, groups, [1] * len(groups)) as features:
                output = policy.model.generate(**inputs, **options)
            assert len(features) == len(groups)
    for hook in hooks:
        hook.remove()
    assert generation_fault(forwards) is None
    return output[:, inputs["input_ids"].shape[1] :], rows, patches


GROUPS = [0] * G + [1] * G + [2] * G


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_what_is_sampled_is_the_same(tiny_policy, prompts, cache):
    alone, rows, patches = generate(tiny_policy, prompts, cache_implementation=cache)
    assert len({tuple(completion) for completion in alone.tolist()}) > 3  # of one prompt, several
    together, fewer_rows, fewer_patches = generate(tiny_policy, prompts, GROUPS, cache_implementation=cache)
    assert torch.equal(together, alone)
    assert rows[0] == 3 * G and fewer_rows[0] == 3 and rows[1:] == fewer_rows[1:] == [3 * G] * 11
    assert sum(patches) == G * sum(fewer_patches) > 0


def test_the_comparison_sees_a_wrong_prompt(tiny_policy, prompts):
    alone, *_ = generate(tiny_policy, prompts)
    wrong, *_ = generate(tiny_policy, prompts, [0] * 3 * G)
    assert torch.equal(wrong[:G], alone[:G]) and not torch.equal(wrong[G:], alone[G:])


def test_groups_of_any_size_in_any_order(tiny_policy, prompts):
    """Where a group lies on two processes, each of them has a part of it."""
    groups = [0, 0, 7, 1, 1, 1, 2, 2, 2]
    alone, *_ = generate(tiny_policy, prompts)
    together, rows, _ = generate(tiny_policy, prompts, groups)
    assert torch.equal(together, alone) and rows[0] == 4


def test_the_features_are_those_of_the_images(tiny_policy, prompts):
    inner = inner_model_of(tiny_policy)
    with prompts_read_once(inner, GROUPS, [1] * 3 * G) as features, torch.inference_mode():
        tiny_policy.model.generate(**prompts, max_new_tokens=2)
    batch = {
        "prompt_ids": prompts["input_ids"], "group": torch.tensor(GROUPS), "num_images": [1] * 3 * G,
        "pixel_values": prompts["pixel_values"], "image_grid_thw": prompts["image_grid_thw"],
    }  # fmt: skip
    expected = image_features(inner, batch)
    for found, own in zip(features, expected, strict=True):
        torch.testing.assert_close(found, own.detach(), rtol=1e-4, atol=1e-5)
        assert not found.is_inference()  # autograd would refuse it
    assert features[0] is features[1] and features[0] is not features[G]


def test_prompts_without_images(tiny_policy, prompts):
    text = {name: prompts[name] for name in ("input_ids", "attention_mask")}
    text["input_ids"] = text["input_ids"].clamp(max=200)  # no image tokens
    alone = generate(tiny_policy, text)[0]
    inner = inner_model_of(tiny_policy)
    torch.manual_seed(5)
    options = {"do_sample": True, "max_new_tokens": 12, "min_new_tokens": 12, "suppress_tokens": [0]}
    with torch.no_grad(), generating(tiny_policy.model), prompts_read_once(inner, GROUPS, [0] * 3 * G) as features:
        together = tiny_policy.model.generate(**text, **options)[:, text["input_ids"].shape[1] :]
    assert torch.equal(together, alone) and features == [None] * 3 * G


def test_several_images_per_prompt_and_none():
    """The pixels of the rows that are left out go with them."""
    from apo_lora.policy.shared_prompt.prefill import _of_rows

    grid = torch.tensor([[1, 2, 2], [1, 2, 4], [1, 4, 4], [1, 2, 2], [1, 2, 4], [1, 4, 4]])
    pixels = torch.arange(int(grid.prod(dim=-1).sum())).float().unsqueeze(1)
    inputs = {"input_ids": torch.arange(5).unsqueeze(1), "pixel_values": pixels, "image_grid_thw": grid}
    chosen = _of_rows(inputs, rows=[0, 2, 4], images_per_row=[2, 2, 0, 1, 1])
    assert chosen["input_ids"].flatten().tolist() == [0, 2, 4]
    assert chosen["image_grid_thw"].tolist() == grid[[0, 1, 5]].tolist()
    assert chosen["pixel_values"].flatten().tolist() == [*range(0, 12), *range(40, 56)]


def test_nothing_is_left_behind(tiny_policy, prompts):
    inner = inner_model_of(tiny_policy)
    before = dict(inner.__dict__)
    generate(tiny_policy, prompts, GROUPS)
    assert inner.__dict__.keys() == before.keys()
    with pytest.raises(RuntimeError, match="enough"), prompts_read_once(inner, GROUPS, [1] * 3 * G):
        raise RuntimeError("enough")
    assert inner.__dict__.keys() == before.keys()
