"""Benches: every figure beside its limit, which is measured in the same run."""
