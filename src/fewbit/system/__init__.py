"""The machine, the cache, files, locks, processes, and the atomic publishing of outputs."""
