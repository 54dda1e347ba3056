"""The files that weights lie in: safetensors, GGUF, PyTorch's pickles, importance matrices."""
