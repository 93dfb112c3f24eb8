"""`kvfabric demo lending`: a sequence outgrows its home node many times over."""
