"""Exports of an adapter: merged, GGUF, on the Hub."""

TARGETS = {
    "merged": "a model folder for transformers, vLLM and llama.cpp's converter",
    "gguf": "two GGUF files for llama.cpp",
    "ollama": "the GGUF files with a Modelfile",
    "base-gguf": "GGUF files of the base model, for chat --gguf to compare with",
    "hub": "the Hugging Face Hub (see --what)",
}
"""Target of `apo-lora export --to`, and its description in the help."""

QUANTIZATIONS = ("Q8_0", "Q4_K_M", "F16", "F32")
"""Of a GGUF's text model; the first is the default."""

ONTO = {
    "trained": "the weights that were trained on; what was in 4 bits is dequantised",
    "original": "the 16-bit weights, which differ from the trained ones by the 4-bit quantisation error",
}
"""What `apo-lora export --onto` merges into, and its description in the help."""
