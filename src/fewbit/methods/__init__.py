"""Methods: how the codes of a weight are chosen."""
