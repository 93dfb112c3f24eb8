"""The command `kvfabric`: each module is a few commands; they import what they need when run."""
