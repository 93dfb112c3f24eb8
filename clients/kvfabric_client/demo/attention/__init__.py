"""`kvfabric demo attention`: a model decodes while its KV lies on three memory nodes."""
