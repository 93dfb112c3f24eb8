"""Attention where the KV lies: spans of contexts, requests stacked into kernel calls, kernels."""
