"""Each shim of compat.py: is it still needed, and does it work?"""

import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forks import two_processes

from apo_lora.machine.compat import (
    dequantize_blocks_across_rows_on_cpu,
    keep_4bit_layout_on_cpu,
    kept_checkpointing,
    kept_compiler_stance,
    kept_static_cache,
    load_onto_numbered_cpus,
)


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


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="bitsandbytes takes the faulty kernel only with AVX512"
)
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


def test_the_compiler_compiles_as_before():
    """That Unsloth's generate() still needs this is shown in test_emulated_gpu.py."""
    compiled = []

    @torch.compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    def double(x):
        return 2 * x

    def compiles(dtype):
        """A dtype that `double` has not seen is compiled for."""
        compiled.clear()
        double(torch.ones(2, dtype=dtype))
        return bool(compiled)

    try:
        assert compiles(torch.float32)
        torch.compiler.set_stance("eager_on_recompile")
        assert not compiles(torch.float64)
        torch.compiler.set_stance("default")
        with pytest.raises(RuntimeError), kept_compiler_stance():
            torch.compiler.set_stance("eager_on_recompile")
            raise RuntimeError
        assert compiles(torch.float64)
    finally:
        torch.compiler.set_stance("default")


def test_torch_knows_no_numbered_cpu(tmp_path, monkeypatch):
    torch.save(torch.ones(2), tmp_path / "ones.pt")

    def load():
        return torch.load(tmp_path / "ones.pt", map_location=torch.device("cpu", 0), weights_only=True)

    monkeypatch.setattr(torch.serialization, "_package_registry", list(torch.serialization._package_registry))
    with pytest.raises(RuntimeError, match="tagged with cpu:0"):
        load()  # when this stops raising, load_onto_numbered_cpus can go
    load_onto_numbered_cpus()
    assert load().tolist() == [1, 1]


GLOO = """
import sys, torch
from torch.distributed import all_reduce, destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel
from apo_lora.machine.compat import let_gloo_finish

init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(2, 2))  # holds the group, as a trainer's model does
sys.setswitchinterval(1000)  # whoever has Python's lock keeps it: the race is lost nearly always
for work in [all_reduce(torch.ones(3), async_op=True) for _ in range(300)]:
    work.wait()
del work
if sys.argv[1] == "finish":
    let_gloo_finish()
destroy_process_group()
del model
"""


def ends_well(script, how, seconds):
    processes, deadline = two_processes([script, how]), time.monotonic() + seconds
    while (codes := [process.poll() for process in processes]) != [0, 0]:
        if any(codes) or time.monotonic() > deadline:
            for process, code in zip(processes, codes, strict=True):
                if code is None:
                    process.send_signal(signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True


@pytest.mark.slow
def test_gloo_still_hangs_at_its_end(tmp_path):
    (tmp_path / "end.py").write_text(GLOO)
    # It hangs or aborts nearly always (a good end takes a second). When it never does, let_gloo_finish can go.
    assert not all(ends_well(tmp_path / "end.py", "at once", seconds=10) for _ in range(8))


@pytest.mark.slow
def test_gloo_ends_after_a_pause(tmp_path):
    (tmp_path / "end.py").write_text(GLOO)
    assert all(ends_well(tmp_path / "end.py", "finish", seconds=40) for _ in range(3))


def test_unsloth_still_takes_a_growing_cache_above_half_of_the_free_memory():
    source = Path(find_spec("unsloth").submodule_search_locations[0], "models", "vision.py").read_text()
    body = source.partition("def _static_cache_does_not_fit(model, input_ids, kwargs):")[2].partition("\ndef ")[0]
    assert "need <= free // 2" in body  # when this is gone, kept_static_cache can go
    assert "need = _static_cache_bytes(model, input_ids, kwargs)" in body


def test_a_static_cache_is_taken_where_it_fits(monkeypatch):
    vision = SimpleNamespace(_static_cache_does_not_fit=lambda *arguments: True, _static_cache_bytes=lambda *_: need)
    monkeypatch.setitem(sys.modules, "unsloth.models.vision", vision)
    memory = {"mem_get_info": (8, 24), "memory_reserved": 5, "memory_allocated": 3}  # 10 are free for it
    for name, found in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    need, on_card = 8, SimpleNamespace(device=torch.device("cuda"))
    assert vision._static_cache_does_not_fit(on_card, None, {})
    with kept_static_cache():
        assert not vision._static_cache_does_not_fit(on_card, None, {})
        need = 10
        assert vision._static_cache_does_not_fit(on_card, None, {})
        need = None  # Unsloth does not know
        assert not vision._static_cache_does_not_fit(on_card, None, {})
        elsewhere = SimpleNamespace(device=torch.device("cpu"))
        assert vision._static_cache_does_not_fit(elsewhere, None, {})  # as Unsloth says
    need = 8
    assert vision._static_cache_does_not_fit(on_card, None, {})
