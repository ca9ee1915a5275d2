"""scoring.token_logps against the model's own full logits, and its memory."""

import pytest
import torch

from apo_lora.policy.loading import reference_mode
from apo_lora.policy.scoring import token_logps


def naive_logps(model, batch, temperature=1.0):
    """Log-probs and entropies from the full [B, L, V] logits in float64."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    width = batch["completion_ids"].shape[1]
    logits = model(
        input_ids=ids,
        attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        mm_token_type_ids=torch.nn.functional.pad(batch["mm_token_type_ids"], (0, width)),
        pixel_values=batch["pixel_values"],
        image_grid_thw=batch["image_grid_thw"],
    ).logits[:, -width - 1 : -1]
    log_softmax = torch.log_softmax(logits.double() / temperature, dim=-1)
    logps = log_softmax.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    entropies = -(log_softmax.exp() * log_softmax).sum(-1)
    mask = batch["completion_mask"].bool()
    return torch.where(mask, logps, 0.0), torch.where(mask, entropies, 0.0)


def lora_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows_per_pass", [None, 1, 3])
@pytest.mark.parametrize("logits_bytes", [2**28, 4 * 448 * 5])
def test_equals_the_full_logits(tiny_policy, make_batch, stir_adapter, temperature, rows_per_pass, logits_bytes):
    stir_adapter(tiny_policy.model)
    batch = make_batch(tiny_policy)
    expected_logps, expected_entropies = naive_logps(tiny_policy.model, batch, temperature)
    logps, entropies = token_logps(
        tiny_policy.model, batch, temperature=temperature, rows_per_pass=rows_per_pass, logits_bytes=logits_bytes
    )
    torch.testing.assert_close(logps.double(), expected_logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies.double(), expected_entropies, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_equal_those_of_the_full_logits(tiny_policy, make_batch, stir_adapter, temperature):
    model = tiny_policy.model
    stir_adapter(model)
    batch = make_batch(tiny_policy)
    weights = torch.randn(batch["completion_ids"].shape, generator=torch.Generator().manual_seed(3))
    naive, naive_entropies = naive_logps(model, batch, temperature)
    expected = lora_gradients(model, (naive * weights).sum() + 0.1 * naive_entropies.sum())
    logps, entropies = token_logps(
        model, batch, temperature=temperature, logits_bytes=4 * 448 * 4, entropy_gradient=True
    )
    gradients = lora_gradients(model, (logps * weights).sum() + 0.1 * entropies.sum())
    assert gradients.keys() == expected.keys() and all("lora_" in name for name in gradients)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-7, name


def test_the_image_counts(tiny_policy, make_batch):
    """A scoring pass that lost the image would go unnoticed: log-probs look just as plausible."""
    batch = make_batch(tiny_policy)
    blank = {**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}
    with torch.no_grad():
        difference = token_logps(tiny_policy.model, batch)[0] - token_logps(tiny_policy.model, blank)[0]
    assert difference.abs().max() > 1e-3


def test_each_row_gets_its_own_image(tiny_policy, make_batch):
    batch = make_batch(tiny_policy, sizes=((84, 84), (84, 84)), lengths=(5, 5))
    swapped = {**batch, "pixel_values": batch["pixel_values"].view(2, 36, -1).flip(0).flatten(0, 1)}
    with torch.no_grad():
        straight = token_logps(tiny_policy.model, batch, rows_per_pass=1)[0]
        crossed = token_logps(tiny_policy.model, swapped, rows_per_pass=1)[0]
        torch.testing.assert_close(straight, token_logps(tiny_policy.model, batch)[0], rtol=1e-5, atol=1e-5)
    assert (straight - crossed).abs().max() > 1e-3


def test_a_pass_without_any_token_computes_nothing(tiny_policy, make_batch):
    batch = make_batch(tiny_policy)
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    logps, entropies = token_logps(tiny_policy.model, batch)
    assert torch.equal(logps, torch.zeros_like(logps)) and torch.equal(entropies, torch.zeros_like(entropies))
    assert not logps.requires_grad and not entropies.requires_grad


def test_reference_is_the_base_even_after_training(tiny_policy, make_batch, stir_adapter):
    model, batch = tiny_policy.model, make_batch(tiny_policy)
    fresh, _ = token_logps(model, batch)
    with reference_mode(model):
        base, _ = token_logps(model, batch)
    assert torch.equal(base, fresh.detach())  # the KL of a fresh adapter is exactly 0

    stir_adapter(model)
    with reference_mode(model):
        reference, _ = token_logps(model, batch)
    trained, _ = token_logps(model, batch)
    assert (trained - base).abs().max() > 1e-2
    assert torch.equal(reference, base)
    assert not reference.requires_grad and trained.requires_grad


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements that any operation returned, forward and backward."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_full_logits_are_ever_held():
    """Peak of one tensor, at a vocabulary where the full logits would dwarf everything else."""
    from apo_lora.policy.scoring import head_logps

    tokens, hidden, vocabulary, chunk = 512, 16, 20_000, 32
    states = torch.randn(tokens, hidden, requires_grad=True)
    head = torch.nn.Linear(hidden, vocabulary, bias=False).requires_grad_(False)
    targets = torch.randint(vocabulary, (tokens,))

    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))

    def largest(logits_bytes):
        with _LargestTensor() as seen:
            logps, entropies = head_logps(states, head, targets, 1.0, logits_bytes)
            logps.sum().backward()
        return seen.numel

    assert largest(4 * vocabulary * tokens) == tokens * vocabulary  # in one chunk they are there
    assert largest(4 * vocabulary * chunk) == vocabulary * chunk
    assert head.weight.grad is None  # a frozen head gets no gradient buffer
    assert len(calls) == 1 + tokens // chunk  # and is not applied again in backward


def test_entropy_and_its_gradient_are_there_only_where_they_are_asked_for(tiny_policy, make_batch):
    batch = make_batch(tiny_policy)
    (logps,) = token_logps(tiny_policy.model, batch, entropies=False)
    assert logps.requires_grad and torch.equal(logps, token_logps(tiny_policy.model, batch)[0])
    assert not token_logps(tiny_policy.model, batch)[1].requires_grad
    assert token_logps(tiny_policy.model, batch, entropy_gradient=True)[1].requires_grad
