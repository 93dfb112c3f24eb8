"""The node's cores under a simulated clock, network and memory."""
