"""Each shim of compat.py: is it still needed, and does it work?"""

import pytest
import torch

from apo_lora.compat import dequantize_blocks_across_rows_on_cpu, keep_4bit_layout_on_cpu, kept_checkpointing


def nf4_layer():
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(96, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict({"weight": torch.randn(32, 96, generator=torch.Generator().manual_seed(0))})
    return layer.to("cpu").eval()


def test_bitsandbytes_still_repacks_on_the_cpu():
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16: bitsandbytes does not repack here")
    with torch.no_grad(), pytest.raises(RuntimeError, match="is invalid for input"):
        nf4_layer()(torch.randn(2, 96))  # when this stops raising, keep_4bit_layout_on_cpu can go


def test_4bit_layer_generates_and_trains_on_the_cpu():
    layer = nf4_layer()
    keep_4bit_layout_on_cpu(layer)
    inputs = torch.randn(2, 96)
    with torch.no_grad():
        generated = layer(inputs)
    inputs.requires_grad_()
    trained = layer.train()(inputs)
    trained.sum().backward()
    torch.testing.assert_close(trained.detach(), generated, rtol=1e-5, atol=1e-5)
    assert inputs.grad.abs().sum() > 0


def nf4_error(rows, columns):
    """Relative error of a matrix that went to NF4 and back."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=64)
    return ((dequantize_4bit(packed, state) - weight).norm() / weight.norm()).item()


def test_bitsandbytes_still_misreads_rows_that_are_no_whole_blocks(monkeypatch):
    from bitsandbytes.backends.cpu.ops import lib

    for name in [name for name in vars(lib) if name.startswith("cdequantize")]:
        monkeypatch.delitem(vars(lib), name)
    assert nf4_error(144, 64) < 0.12
    assert nf4_error(96, 96) > 0.2  # when this is as small, dequantize_blocks_across_rows_on_cpu can go


def test_rows_that_are_no_whole_blocks_are_read_rightly():
    dequantize_blocks_across_rows_on_cpu()
    assert nf4_error(96, 96) < 0.12
    assert nf4_error(144, 64) < 0.12


def test_checkpointing_is_as_before_in_every_layer():
    """That Unsloth's generate() still needs this is shown in test_unsloth.py."""
    model = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
    model[0].gradient_checkpointing, model[1].gradient_checkpointing = True, False
    with pytest.raises(RuntimeError), kept_checkpointing(model):
        for layer in model:
            layer.gradient_checkpointing = layer is model[1]
        raise RuntimeError
    assert model[0].gradient_checkpointing is True and model[1].gradient_checkpointing is False
