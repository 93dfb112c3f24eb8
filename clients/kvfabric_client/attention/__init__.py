"""Attention over the KV of sequences and banks, computed by the nodes where it lies.

Queries go out to every node that has some of the tokens, small partial results come back, and
are merged here. `calls` has attending; `route` decides who is asked for what, `gather` asks, and
looks for tokens that were not where they were thought to be; `again` is the short way to nodes
that are asked the same once more.
"""
