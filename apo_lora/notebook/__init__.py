"""What the cells of colab/apo_lora_qwen2_5_vl.ipynb call: verbs with output, curves and samples in the notebook."""
