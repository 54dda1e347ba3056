"""The pass over the columns of a weight that several methods share."""
