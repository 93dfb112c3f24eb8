"""The rManager: one per memory node. It owns the node's arenas and decides about them."""
