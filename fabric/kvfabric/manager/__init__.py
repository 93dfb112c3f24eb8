"""The gManager: what the cluster as a whole knows, and the control plane that tells it."""
