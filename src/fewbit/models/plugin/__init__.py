"""fewbit's quantizer for transformers, and the patches that let transformers find it."""
