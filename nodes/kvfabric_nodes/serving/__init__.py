"""The shells that answer clients: frames, bulk transfers and gRPC, with one handler behind."""
