"""Completions behind one shared prompt against every completion behind its own: the same log-probs and gradients."""

from itertools import product

import pytest
import torch
from PIL import Image

from apo_lora.policy import scoring
from apo_lora.policy.batches import row_slices
from apo_lora.policy.loading import reference_mode
from apo_lora.policy.scoring import token_logps
from apo_lora.policy.shared_prompt import attention as shared_attention
from apo_lora.policy.shared_prompt.attention import PromptGroup, PromptGroups, attend, obstacle
from apo_lora.policy.shared_prompt.rows import pack
from apo_lora.policy.shared_prompt.vision_features import image_features, tower_is_frozen
from apo_lora.tiny import BASE_DIR

RELATIVE = 1e-5

# Per prompt the sizes of its images: one, several of different sizes, none.
PROMPTS = (((84, 84),), ((112, 56), (56, 140)), ((140, 112),), ())


@pytest.fixture
def load_tiny(load_each):
    return load_each


@pytest.fixture
def make_groups():
    """make_groups(policy, G): ragged random completions, G to each prompt; the batch as the trainer holds it."""

    def make(policy, num_generations, prompts=PROMPTS, longest=11, seed=0):
        generator = torch.Generator().manual_seed(seed)
        texts, images, num_images = [], [], []
        for number, sizes in enumerate(prompts):
            pictures = [
                Image.fromarray(torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8).numpy())
                for w, h in sizes
            ]
            content = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": "How many?" * (number + 1)}]
            text = policy.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            for _ in range(num_generations):
                texts.append(text)
                images.append(pictures)
                num_images.append(len(sizes))
        inputs = policy.processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
        lengths = torch.randint(1, longest + 1, (len(texts), 1), generator=generator)
        lengths[0] = longest
        mask = (torch.arange(longest) < lengths).long()
        return {
            "prompt_ids": inputs["input_ids"],
            "prompt_mask": inputs["attention_mask"],
            "completion_ids": torch.randint(10, 200, mask.shape, generator=generator) * mask,
            "completion_mask": mask,
            "pixel_values": inputs["pixel_values"],
            "image_grid_thw": inputs["image_grid_thw"],
            "mm_token_type_ids": inputs["mm_token_type_ids"],
            "num_images": num_images,
            "group": torch.arange(len(texts)) // num_generations,
        }

    return make


def alone(batch):
    """The same batch, every completion behind a prompt of its own."""
    return {key: value for key, value in batch.items() if key not in ("group", "image_features")}


def scored(model, batch, **options):
    with torch.no_grad():
        return token_logps(model, batch, **options)


def gradients(model, batch, rows_per_pass=None):
    """LoRA gradients of a loss that reads log-probs and entropies, pass by pass, as one vector in float64."""
    weights = torch.randn(batch["completion_mask"].shape, generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    for rows in row_slices({**batch, "weights": weights}, rows_per_pass or len(weights)):
        logps, entropies = token_logps(model, rows, entropy_gradient=True)
        ((logps * rows["weights"]).sum() + 0.1 * entropies.sum()).backward()
    found = [p.grad.double().flatten().clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(found)


def difference(one, other):
    return ((one - other).norm() / other.norm()).item()


# --- the same result -------------------------------------------------------------------------------------------------


def crossed(combinations, tested):
    """Every combination; `make matrix` has those that are not `tested`, whose values these have in other pairs."""
    return [pytest.param(*each, marks=() if each in tested else pytest.mark.matrix) for each in combinations]


@pytest.mark.parametrize(
    ("num_generations", "rows_per_pass"),
    crossed(product((2, 4, 8), (None, 1, 3, 8)), {(2, None), (4, 8), (8, 1), (8, 3)}),
)
def test_scores_equal_those_of_prompts_alone(tiny_policy, make_groups, stir_adapter, num_generations, rows_per_pass):
    stir_adapter(tiny_policy.model)
    batch = make_groups(tiny_policy, num_generations)
    expected = scored(tiny_policy.model, alone(batch), temperature=0.9)
    found = scored(tiny_policy.model, batch, temperature=0.9, rows_per_pass=rows_per_pass)
    for one, other in zip(found, expected, strict=True):
        assert difference(one, other) < RELATIVE
        torch.testing.assert_close(one, other, rtol=RELATIVE, atol=RELATIVE)


@pytest.mark.parametrize(
    ("num_generations", "rows_per_pass", "checkpointing"),
    crossed(
        [(*rows, way) for rows in ((2, None), (4, 4), (8, 3)) for way in (None, "reentrant", "not reentrant")],
        {(2, None, None), (4, 4, None), (8, 3, None), (8, 3, "reentrant"), (8, 3, "not reentrant")},
    ),
)
def test_gradients_equal_those_of_prompts_alone(
    tiny_policy, make_groups, stir_adapter, num_generations, rows_per_pass, checkpointing
):
    model = tiny_policy.model.train()
    stir_adapter(model)
    batch = make_groups(tiny_policy, num_generations)
    expected = gradients(model, alone(batch))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    found = gradients(model, batch, rows_per_pass)
    assert found.numel() == expected.numel() and expected.norm() > 1
    assert difference(found, expected) < RELATIVE


def test_4bit_scores_and_gradients_equal_those_of_prompts_alone(load_tiny, make_groups, stir_adapter):
    policy = load_tiny(load_in_4bit=True)
    stir_adapter(policy.model)
    batch = make_groups(policy, 4)
    assert difference(scored(policy.model, batch)[0], scored(policy.model, alone(batch))[0]) < RELATIVE
    assert difference(gradients(policy.model, batch), gradients(policy.model, alone(batch))) < RELATIVE


@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits_differ_by_rounding_alone(load_tiny, make_groups, autocast):
    policy = load_tiny(dtype="float32" if autocast else "bfloat16")
    batch = make_groups(policy, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        features = image_features(policy.model.get_base_model().model, batch)
        found = scored(policy.model, {**batch, "image_features": features})[0]
        expected = scored(policy.model, alone(batch))[0]
    assert found.dtype == torch.float32 and 0 < difference(found, expected) < 0.02


def test_the_reference_is_scored_the_same(tiny_policy, make_groups, stir_adapter):
    batch = make_groups(tiny_policy, 4)
    base, _ = scored(tiny_policy.model, batch)
    stir_adapter(tiny_policy.model)
    with reference_mode(tiny_policy.model):
        reference, _ = token_logps(tiny_policy.model, batch)
        expected, _ = token_logps(tiny_policy.model, alone(batch))
    assert torch.equal(reference, base)
    assert difference(reference, expected) < RELATIVE
    assert difference(scored(tiny_policy.model, batch)[0], reference) > 1e-2


def test_order_of_the_rows_does_not_matter(tiny_policy, make_groups):
    """Groups whose completions do not lie side by side."""
    batch = make_groups(tiny_policy, 3, prompts=PROMPTS[:1] * 2)
    order = torch.tensor([4, 0, 2, 5, 1, 3])
    pixels = batch["pixel_values"].unflatten(0, (6, -1))[order].flatten(0, 1)
    shuffled = {k: v[order] if torch.is_tensor(v) and len(v) == 6 else v for k, v in batch.items()}
    shuffled["pixel_values"] = pixels
    straight = scored(tiny_policy.model, batch)[0]
    assert difference(straight[order], straight) > 1e-2
    assert difference(scored(tiny_policy.model, shuffled)[0], straight[order]) < RELATIVE


def test_text_alone_is_scored_the_same(tiny_policy, make_groups):
    batch = make_groups(tiny_policy, 2, prompts=((), ((84, 84),), ()))
    for rows in (slice(0, 2), slice(4, 6)):
        text = {k: v[rows] for k, v in batch.items() if k not in ("pixel_values", "image_grid_thw")}
        assert difference(scored(tiny_policy.model, text)[0], scored(tiny_policy.model, alone(text))[0]) < RELATIVE


@pytest.mark.parametrize("empty", ["some", "all"])
def test_completions_that_are_masked_out(tiny_policy, make_groups, empty):
    """mask_truncated_completions leaves whole rows without a token."""
    model, batch = tiny_policy.model, make_groups(tiny_policy, 4)
    batch["completion_mask"][slice(1, 3) if empty == "some" else slice(None)] = 0
    found, expected = (token_logps(model, part)[0] for part in (batch, alone(batch)))
    torch.testing.assert_close(found, expected, rtol=RELATIVE, atol=RELATIVE)
    if empty == "some":
        found.sum().backward()
    else:
        assert not found.any() and not found.requires_grad  # nothing was computed


# --- what would be different -----------------------------------------------------------------------------------------
# Each fault changes the result by far more than the tolerance above.


def fault_completions_see_each_other(monkeypatch):
    monkeypatch.setattr(
        shared_attention, "attend", lambda query, key, value, groups, scaling: causal(query, key, value, scaling)
    )


def causal(query, key, value, scaling):
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2)


def fault_positions_go_on(monkeypatch):
    def straight_on(inner_model, batch):
        row = pack(inner_model, batch)
        row.position_ids_3L.copy_(torch.arange(row.position_ids_3L.shape[1]).expand(3, -1))
        return row

    monkeypatch.setattr(scoring, "pack", straight_on)


def fault_one_token_off(monkeypatch):
    def later(inner_model, batch):
        row = pack(inner_model, batch)
        row.sources_K.add_(1).clamp_(max=len(row.input_ids_L) - 1)
        return row

    monkeypatch.setattr(scoring, "pack", later)


def fault_images_swapped(monkeypatch):
    def swapped(inner_model, batch):
        features = image_features(inner_model, batch)
        return [features[-1], *features[1:-1], features[0]]

    monkeypatch.setattr(scoring, "image_features", swapped)


FAULTS = (fault_completions_see_each_other, fault_positions_go_on, fault_one_token_off, fault_images_swapped)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_show(tiny_policy, make_groups, monkeypatch, fault):
    batch = make_groups(tiny_policy, 4, prompts=PROMPTS[:1] * 2)
    expected = scored(tiny_policy.model, alone(batch))[0]
    assert difference(scored(tiny_policy.model, batch)[0], expected) < RELATIVE
    fault(monkeypatch)
    assert difference(scored(tiny_policy.model, batch)[0], expected) > 1e-3


def test_attention_equals_the_dense_mask():
    groups = PromptGroups(PromptGroup(7, (3, 5, 1)), PromptGroup(4, (6,)), PromptGroup(2, ()))
    lengths = [(f.prompt, *f.completions) for f in groups.members]
    length = sum(map(sum, lengths))
    visible, start = torch.zeros(length, length, dtype=torch.bool), 0
    for prompt, *completions in lengths:
        block, end = slice(start, start + prompt), start + prompt
        visible[block, block] = True
        for own in completions:
            visible[end : end + own, block] = visible[end : end + own, end : end + own] = True
            end += own
        start = end
    visible = visible.tril()
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, length, 16, generator=generator) for heads in (6, 2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    assert difference(causal(query, key, value, 0.3), expected) > 0.1
    assert difference(attend(query, key, value, groups, 0.3), expected) < 1e-6
    masks = groups.masks(value)
    assert masks is groups.masks(value)  # every layer's, and as CUDA's kernels read them
    assert all(mask.stride(0) % 16 == 0 and mask.dtype == value.dtype for mask in masks)


# --- once ------------------------------------------------------------------------------------------------------------


class Passes:
    """What goes through the tower and the language model, in tokens."""

    def __init__(self, model):
        inner = model.get_base_model().model
        self.patches, self.tokens, self.with_gradient = [], [], []
        inner.visual.register_forward_hook(self._tower)
        inner.language_model.register_forward_pre_hook(self._language, with_kwargs=True)

    def _tower(self, module, arguments, output):
        self.patches.append(len(arguments[0]))
        self.with_gradient.append(output.pooler_output.requires_grad)

    def _language(self, module, arguments, options):
        self.tokens.append(options["inputs_embeds"].shape[:2].numel())


def test_prompt_and_image_are_computed_once(tiny_policy, make_groups):
    batch = make_groups(tiny_policy, 8, prompts=PROMPTS[:1])
    prompt, completions = batch["prompt_mask"][0].sum(), batch["completion_mask"].sum()
    passes = Passes(tiny_policy.model)
    token_logps(tiny_policy.model, batch)
    assert passes.patches == [36] and passes.tokens == [prompt + completions]
    token_logps(tiny_policy.model, alone(batch))
    assert passes.patches[1:] == [8 * 36] and passes.tokens[1:] == [8 * (prompt + 11)]


def test_parts_of_a_group_read_the_features_that_are_there(tiny_policy, make_groups):
    model = tiny_policy.model
    batch = make_groups(tiny_policy, 4)
    expected = gradients(model, alone(batch))
    batch["image_features"] = image_features(model.get_base_model().model, batch)
    assert batch["image_features"][0] is batch["image_features"][3] and batch["image_features"][-1] is None
    passes = Passes(model)
    assert difference(gradients(model, batch, rows_per_pass=3), expected) < RELATIVE
    assert passes.patches == []


@pytest.mark.parametrize("vision", [False, True])
def test_the_tower_has_a_gradient_only_where_it_trains(load_tiny, make_groups, vision):
    policy = load_tiny(lora={"vision": vision}, gradient_checkpointing=True)
    policy.model.train().gradient_checkpointing_enable({"use_reentrant": False})
    policy.model.enable_input_require_grads()
    batch = make_groups(policy, 2, prompts=PROMPTS[:1])
    passes = Passes(policy.model)
    token_logps(policy.model, batch)
    assert passes.with_gradient == [vision]
    assert tower_is_frozen(policy.model.get_base_model().model) is not vision
    if not vision and policy.base_name == str(BASE_DIR):  # Qwen2.5-VL's stock way pays for a gradient nobody reads
        token_logps(policy.model, alone(batch))
        assert passes.with_gradient == [False, True]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_tower_that_trains_must_not_be_computed_once(load_tiny, make_groups, stir_adapter, checkpointing):
    """Features kept from before would lose its gradient, and give the reference the policy's eyes."""
    policy = load_tiny(lora={"vision": True})
    model = policy.model.train()
    stir_adapter(model)
    batch = make_groups(policy, 4)
    expected = gradients(model, alone(batch))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    assert difference(gradients(model, batch, rows_per_pass=3), expected) < RELATIVE

    with torch.no_grad():
        kept = {**batch, "image_features": image_features(model.get_base_model().model, batch)}
    assert gradients(model, kept).numel() < expected.numel()
    with reference_mode(model):
        assert difference(token_logps(model, batch)[0], token_logps(model, alone(batch))[0]) < RELATIVE
        assert difference(token_logps(model, kept)[0], token_logps(model, alone(batch))[0]) > 1e-3


def test_image_tokens_and_features_must_go_together(tiny_policy, make_groups):
    batch = make_groups(tiny_policy, 2, prompts=PROMPTS[:1])
    features = image_features(tiny_policy.model.get_base_model().model, batch)
    batch["image_features"] = [part[:-1] for part in features]
    with pytest.raises(ValueError, match="9 image tokens but 8 image features"):
        token_logps(tiny_policy.model, batch)


# --- other models ----------------------------------------------------------------------------------------------------


def test_what_does_not_qualify_is_named(tiny_policy):
    base = tiny_policy.model.get_base_model()
    assert obstacle(tiny_policy.model) is None
    text = base.model.language_model.config
    text._attn_implementation_internal = "eager"
    assert "attention 'eager'" in obstacle(tiny_policy.model)
    text.attention_dropout = 0.1
    assert "attention dropout (0.1)" in obstacle(tiny_policy.model)
    text.layer_types = ["sliding_attention", *["full_attention"] * 3]
    assert "sliding_attention" in obstacle(tiny_policy.model)
    base.config.model_type = "other_vl"
    assert "not implemented for other_vl" in obstacle(tiny_policy.model)


def test_everything_else_keeps_its_attention(tiny_policy, make_batch):
    """The wrapped function gives the very same result for ordinary masks."""
    batch = make_batch(tiny_policy)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    shared_attention.accept_prompt_groups(tiny_policy.model.get_base_model().model.language_model)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__wrapped__ is sdpa_attention_forward
    wrapped = scored(tiny_policy.model, batch)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward
    assert torch.equal(scored(tiny_policy.model, batch)[0], wrapped[0])


def test_a_compiled_layer_is_not_compiled_again_for_other_lengths(tiny_policy):
    """As Unsloth compiles decoder layers on a GPU; here without generating code."""
    from torch._dynamo.testing import CompileCounterWithBackend

    language_model = tiny_policy.model.get_base_model().model.language_model
    shared_attention.accept_prompt_groups(language_model)
    generator, counter = torch.Generator().manual_seed(0), CompileCounterWithBackend("eager")
    layer = language_model.layers[0]
    torch._dynamo.reset()
    compiled = torch.compile(layer.forward, backend=counter, dynamic=True)
    graphs = []
    for lengths in ((7, (3, 5, 1)), (9, (4, 4)), (5, (2, 2, 2, 2)), (11, (6,)), (6, (1, 9))):
        length = lengths[0] + sum(lengths[1])
        hidden = torch.randn(1, length, 96, generator=generator)
        rotation = language_model.rotary_emb(hidden, torch.arange(length).expand(3, 1, -1))
        options = {"position_embeddings": rotation, "prompt_groups": PromptGroups(PromptGroup(*lengths))}
        torch.testing.assert_close(compiled(hidden, **options), layer.forward(hidden, **options))
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and set(graphs) == {graphs[0]}
