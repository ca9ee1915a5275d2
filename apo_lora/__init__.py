"""apo-lora: Asymmetric Policy Optimization (arXiv 2506.21655) with LoRA on one consumer GPU."""

__version__ = "0.1.0"
