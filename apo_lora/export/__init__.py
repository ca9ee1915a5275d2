"""An adapter as what people deploy: merged, GGUF, on the Hub."""
