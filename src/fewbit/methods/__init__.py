"""Methods: how the codes are chosen."""
