"""Query heads that share key heads: sampling gives what transformers' own attention gives, and copies no cache."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from key_copies import HEADS, KEY_HEADS, NEW, KeyCopies, make_grouped_tiny, sampled
from transformers import AutoModelForImageTextToText
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from unsloth_on_cpu import run_script

from apo_lora.policy.shared_prompt.attention import PromptGroup, PromptGroups, accept_prompt_groups, attend

ROWS, CACHE, WIDTH = 3, 11, 16
LAYER = SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS, is_causal=True)
SUPPORT = Path(__file__).parents[1] / "support"


def model_with(attention):
    config = SimpleNamespace(_attn_implementation=attention)
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))


@pytest.fixture
def ours(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", sdpa_attention_forward)
    accept_prompt_groups(model_with("sdpa"))
    return ALL_ATTENTION_FUNCTIONS["sdpa"]


def tensors(length, cache=CACHE, key_heads=KEY_HEADS):
    generator = torch.Generator().manual_seed(0)
    # As layers have them: the heads of a token lie side by side.
    query = torch.randn(ROWS, length, HEADS, WIDTH, generator=generator).transpose(1, 2)
    return query, *(torch.randn(ROWS, key_heads, cache, WIDTH, generator=generator) for _ in range(2))


def masked(length, kind):
    """The second row is padded by two tokens; a static cache is longer than what it holds."""
    visible = torch.ones(length, CACHE, dtype=torch.bool).tril(CACHE - length - 1).repeat(ROWS, 1, 1, 1)
    visible[1, :, :, :2] = length == 1
    visible[1, :, :, 2] = True
    if kind == "additive":
        return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    return visible[:1] if kind == "one for all rows" else visible


# --- the same result -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["boolean", "additive", "one for all rows", "none"])
@pytest.mark.parametrize("length", [1, 5])
@torch.no_grad()
def test_equals_the_expanded_attention(ours, length, kind):
    query, key, value = tensors(length)
    mask = None if kind == "none" else masked(length, kind)
    expected, _ = sdpa_attention_forward(LAYER, query, key, value, mask, scaling=0.3)
    found, weights = ours(LAYER, query, key, value, mask, scaling=0.3, sliding_window=None, dropout=0.0)
    assert weights is None and found.shape == expected.shape and found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for wrong in (key.flip(1), value.flip(1)):  # another key head for these query heads
        other = (wrong, value) if wrong.equal(key.flip(1)) else (key, wrong)
        assert (ours(LAYER, query, *other, mask, scaling=0.3)[0] - expected).abs().max() > 0.1
    interleaved = query.unflatten(1, (-1, KEY_HEADS)).transpose(1, 2).flatten(1, 2)  # grouped the wrong way round
    assert (ours(LAYER, interleaved, key, value, mask, scaling=0.3)[0] - expected).abs().max() > 0.1


def test_gradients_behind_a_shared_prompt_equal_those_of_expanded_heads():
    groups, length = PromptGroups(PromptGroup(4, (3, 2)), PromptGroup(2, (5,))), 16
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, n, length, WIDTH, generator=generator) for n in (HEADS, KEY_HEADS, KEY_HEADS))
    upstream = torch.randn(1, length, HEADS, WIDTH, generator=generator)

    def gradients(prepare):
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        attend(leaves[0], *(prepare(tensor) for tensor in leaves[1:]), groups, 0.3).backward(upstream)
        return [leaf.grad for leaf in leaves]

    found, expected = gradients(lambda tensor: tensor), gradients(lambda tensor: repeat_kv(tensor, HEADS // KEY_HEADS))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    swapped = gradients(lambda tensor: repeat_kv(tensor.flip(1), HEADS // KEY_HEADS))
    assert (swapped[0] - expected[0]).abs().max() > 0.1


# --- what goes to the original ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "key_heads", "with_gradient"),
    [
        ({"output_attentions": True}, KEY_HEADS, False),
        ({"sliding_window": 4}, KEY_HEADS, False),
        ({"dropout": 0.1}, KEY_HEADS, False),
        ({"is_causal": False}, KEY_HEADS, False),
        ({"position_bias": torch.zeros(1)}, KEY_HEADS, False),
        ({}, HEADS, False),
        ({}, KEY_HEADS, True),
    ],
)
def test_what_is_not_plain_sampling_goes_to_the_original(monkeypatch, options, key_heads, with_gradient):
    calls = recorded(monkeypatch, module="transformers.integrations.sdpa_attention")
    query, key, value = tensors(1, key_heads=key_heads)
    mask = masked(1, "boolean")
    with torch.set_grad_enabled(with_gradient):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"](LAYER, query, key, value, mask, scaling=0.3, **options) == "original"
    assert calls == [((LAYER, query, key, value, mask), {"scaling": 0.3, **options})]


@torch.no_grad()
def test_masks_of_other_shapes_go_to_the_original(monkeypatch):
    calls = recorded(monkeypatch, module="transformers.integrations.sdpa_attention")
    query, key, value = tensors(1)
    ALL_ATTENTION_FUNCTIONS["sdpa"](LAYER, query, key, value, masked(1, "boolean"))
    assert not calls
    for mask in (torch.ones(ROWS, HEADS, 1, CACHE), torch.ones(ROWS, 1, 1, CACHE + 1), torch.ones(1, CACHE)):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"](LAYER, query, key, value, mask) == "original"


@torch.no_grad()
def test_a_function_that_is_not_upstreams_keeps_its_calls(monkeypatch):
    calls = recorded(monkeypatch, module="somebodys.attention")
    query, key, value = tensors(1)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"](LAYER, query, key, value, masked(1, "boolean")) == "original"
    assert len(calls) == 1
    before = dict(ALL_ATTENTION_FUNCTIONS)
    accept_prompt_groups(model_with("eager"))  # in no registry: transformers calls it directly
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


def recorded(monkeypatch, module):
    """Calls of a stand-in for the "sdpa" function that comes from this module."""
    calls = []

    def stand_in(*arguments, **options):
        calls.append((arguments, options))
        return "original"

    stand_in.__module__ = module
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", stand_in)
    accept_prompt_groups(model_with("sdpa"))
    return calls


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory, small_qwen3_vl):
    """Of each family a small model whose query heads share key heads."""
    grouped = make_grouped_tiny(tmp_path_factory.mktemp("qwen2_5_vl") / "grouped")
    return {"qwen2_5_vl": str(grouped), "qwen3_vl": small_qwen3_vl}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_sampling_copies_no_cache_and_gives_the_same_tokens(bases, family, monkeypatch, ours, padded, cache):
    model = AutoModelForImageTextToText.from_pretrained(bases[family]).eval()
    our_copies, stock_copies = KeyCopies(model), KeyCopies(model)
    found = sampled(model, our_copies, padded=padded, cache=cache)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", sdpa_attention_forward)
    expected = sampled(model, stock_copies, padded=padded, cache=cache)
    assert len({tuple(row) for row in expected.tolist()}) == len(expected) and torch.equal(found, expected)
    assert not our_copies.found
    if padded or cache == "static":  # there is a mask; keys and values, per layer and pass
        assert len(stock_copies.found) >= 2 * our_copies.layers * NEW


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Unsloth on a CPU is for hosts without a GPU")
def test_unsloth_samples_so(bases, tmp_path):
    run = run_script(SUPPORT / "unsloth_sampling.py", "facts.json", *bases.values(), folder=tmp_path)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    found = json.loads((tmp_path / "facts.json").read_text())
    assert len(found) == 2 * len(bases)  # each with a static and a growing cache
    for facts in found.values():
        tokens = facts["tokens"]
        assert tokens["ours"] == tokens["stock"] and len(set(map(tuple, tokens["ours"]))) > 1
        assert facts["copies"]["ours"] == 0 and facts["copies"]["stock"] >= 2 * facts["layers"] * NEW


def test_a_loaded_policy_samples_so_before_anything_was_scored(load_tiny, monkeypatch):
    """In training, preflight, evaluation and chat, which all load it in one place."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", sdpa_attention_forward)
    load_tiny()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__wrapped__ is sdpa_attention_forward
