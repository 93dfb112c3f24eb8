"""Sequences, groups and states: what requests keep, and the calls that reach it."""
