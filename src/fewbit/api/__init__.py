"""The verbs, one file for each file of the command line."""
