"""Models: the only part of fewbit that imports transformers."""
