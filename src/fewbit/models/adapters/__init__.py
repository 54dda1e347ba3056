"""LoRA adapters: attach them to a packed model, train them."""
