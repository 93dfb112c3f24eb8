"""Attention over the KV of sequences and banks, computed by the nodes where it lies.

Queries go out to every node that has some of the tokens, small partial results come back, and
are merged here. `attend` has the calls; `route` decides who is asked for what, `following` what
to do about tokens that were not where they were thought to be.
"""
