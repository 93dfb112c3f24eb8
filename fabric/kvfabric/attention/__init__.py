"""Attention over KV that lies in parts, on many nodes: the words and formulas of both sides.

For one query head and part j of its keys: lse_j = log sum exp(scale q.k), and o_j the softmax of
that part applied to its values. Parts merge exactly (see `merge`); scale and soft-cap come before
the maximum; everything but keys, values and queries is float32. An empty part has o = 0 and
lse = -inf.
"""
