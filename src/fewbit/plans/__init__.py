"""Which weight gets which scheme and method."""
