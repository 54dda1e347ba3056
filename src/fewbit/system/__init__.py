"""The machine, the cache, files, processes, and the publishing of an output."""
