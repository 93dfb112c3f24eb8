"""Serving stacks as clients of the fabric: one file for each engine."""
