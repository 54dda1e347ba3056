"""Generate text token by token. On a GPU, a decoding step is recorded once as a CUDA graph."""
