"""An adapter as what people deploy: merged, GGUF, on the Hub."""

TARGETS = {
    "merged": "a folder that transformers, vLLM and llama.cpp's converter read",
    "gguf": "two files for llama.cpp",
    "ollama": "the same, with a Modelfile",
    "base-gguf": "the base alone, for chat --gguf to show beside",
    "hub": "the Hugging Face Hub (see --what)",
}
"""What the command line can make of an adapter, and how its help says that."""

QUANTIZATIONS = ("Q8_0", "Q4_K_M", "F16", "F32")
"""Of a GGUF's text model; the first is the default."""
