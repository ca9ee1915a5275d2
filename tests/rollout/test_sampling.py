"""Sampling with adapters that are converted once."""

from types import SimpleNamespace

import pytest
import torch

from apo_lora.rollout.sampling import converted_adapters

IN_32, IN_BF16, IN_FP16 = (SimpleNamespace(bf16=bf16, fp16=fp16) for bf16, fp16 in ((0, 0), (1, 0), (0, 1)))


@torch.no_grad()
def test_adapters_in_16_bits_give_the_same_logits_under_autocast(tiny_policy, stir_adapter):
    model = tiny_policy.model.eval()
    stir_adapter(model)
    kept = [p for p in model.parameters() if p.requires_grad]

    def logits(args):
        with converted_adapters(model, args):
            return model(torch.arange(10, 30).unsqueeze(0)).logits

    for args, dtype in ((IN_BF16, torch.bfloat16), (IN_FP16, torch.float16)):
        with torch.autocast("cpu", dtype):
            assert torch.equal(logits(args), logits(IN_32))
        assert (logits(args) - logits(IN_32)).abs().max() > 0  # without autocast it matters: they are converted
    assert [id(p) for p in model.parameters() if p.requires_grad] == list(map(id, kept))


def test_adapters_come_back_after_an_error(tiny_policy):
    before = {name: id(p) for name, p in tiny_policy.model.named_parameters()}
    with pytest.raises(KeyboardInterrupt), converted_adapters(tiny_policy.model, IN_BF16):
        assert not any(p.requires_grad for p in tiny_policy.model.parameters())
        raise KeyboardInterrupt
    assert {name: id(p) for name, p in tiny_policy.model.named_parameters()} == before
