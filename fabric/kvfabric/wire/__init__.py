"""The wire: NodeService's messages as frames over unix and TCP sockets. See proto/README.md."""
