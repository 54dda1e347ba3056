"""Layouts of quantized weights that fewbit decodes as it reads them, and does not write. Each maker has one file."""
