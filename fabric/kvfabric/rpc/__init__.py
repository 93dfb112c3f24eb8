"""Generated from proto/: `make stubs`."""
