"""kvfabric: the shared words, stores, directory, control plane and transports of the fabric."""

__version__ = "0.1.0"
