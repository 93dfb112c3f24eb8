"""`kvfabric bench attention`: how fast KV is attended where it lies, beside the limits."""
