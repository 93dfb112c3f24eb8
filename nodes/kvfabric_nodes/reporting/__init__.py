"""What a node tells its gManager."""
