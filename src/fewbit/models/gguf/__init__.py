"""What a GGUF file says of a model: config, tokenizer, names of tensors."""
