"""onehop beside its peers and its limits, measured: ``python -m benchmarks --help``."""
