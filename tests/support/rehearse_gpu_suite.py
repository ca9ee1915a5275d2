"""Stands in for benchmarks.gpu.child on a host without a GPU: prepares the process, then runs the suite's own child.

For tests only; it refuses a host with a GPU. What a CPU cannot do stays undone: 8-bit Adam, offloaded checkpointing,
16-bit weights. The suite's checks of those fail in a rehearsal, as they should.
"""

import sys

import torch
from torch import Tensor
from unsloth_on_cpu import start

from benchmarks.gpu.child import parse, run


def main() -> None:
    if torch.cuda.is_available():
        raise RuntimeError("a rehearsal is for hosts without a GPU; on one, run python -m benchmarks.gpu")
    measurement, setting, record = parse(sys.argv[1:])
    if measurement.unsloth:
        start()
    else:
        give_trl_a_head()
    fix_every_4bit_model()
    run(measurement, setting, record)


def fix_every_4bit_model() -> None:
    """compat.fix_4bit_on_cpu, also for models that are loaded by others than our CPU engine."""
    from bitsandbytes.nn import modules

    from apo_lora.machine.compat import dequantize_blocks_across_rows_on_cpu

    modules.has_avx512bf16 = lambda: False  # asked when a Linear4bit is made
    dequantize_blocks_across_rows_on_cpu()


def give_trl_a_head() -> None:
    """TRL's fused lm_head is a Triton kernel; the same function with ordinary tensors."""
    import trl.trainer.utils

    class EagerLogProbs:
        @staticmethod
        def apply(
            hidden_NH: Tensor,
            weight_VH: Tensor,
            bias: None,
            targets_N: Tensor,
            temperature: float,
            chunk_size: int,
            softcap: None,
            scale: float,
            outputs: tuple[str, ...],
        ) -> tuple[Tensor, Tensor, None, None, None]:
            logits_NV = (hidden_NH.float() @ weight_VH.float().T) * scale / temperature
            log_softmax_NV = torch.log_softmax(logits_NV, dim=-1)
            logps_N = log_softmax_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)
            return logps_N, -(log_softmax_NV.exp() * log_softmax_NV).sum(-1), None, None, None

    trl.trainer.utils._ChunkedLogProbFunction = EagerLogProbs


if __name__ == "__main__":
    main()
