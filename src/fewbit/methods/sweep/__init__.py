"""The sweep: one pass over the columns of a weight, in which each column is rounded after those before it."""
