"""Checkpoints without a training behind them."""

from apo_lora.run.checkpoints import seal_checkpoint


def checkpoint(run, step, sealed=True):
    path = run.checkpoints / f"checkpoint-{step}"
    path.mkdir()
    (path / "adapter_model.safetensors").write_bytes(bytes(range(100)))
    (path / "trainer_state.json").write_text("{}")
    if sealed:
        seal_checkpoint(path)
    return path
