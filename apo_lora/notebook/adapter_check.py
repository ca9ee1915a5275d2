"""Whether a LoRA adapter has been trained: its B matrices start at zero, and only training changes them."""

import sys
from pathlib import Path


def trained_matrices(weights: Path) -> tuple[int, int]:
    """(B matrices that are finite and not zero, all B matrices) of an adapter_model.safetensors."""
    import torch
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as file:
        matrices = [file.get_tensor(name) for name in file.keys() if ".lora_B." in name]  # noqa: SIM118 # no mapping
    moved = [matrix for matrix in matrices if matrix.any() and torch.isfinite(matrix).all()]
    return len(moved), len(matrices)


def main(weights: str) -> int:
    """`python -m apo_lora.notebook.adapter_check FILE`: a separate process, so that the notebook needs no torch."""
    moved, matrices = trained_matrices(Path(weights))
    if not matrices or moved < matrices:
        print(
            f"The LoRA has not trained: {matrices - moved} of {matrices} B matrices are 0 or not finite; train again."
        )
        return 1
    print(f"The LoRA has trained: all {matrices} B matrices have changed from zero.")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
