"""Shards copied between nodes: which pulls run, where they land, and the sessions they run over."""
