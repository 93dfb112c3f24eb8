"""How shards move: live migration by observed steps, drains, replicas, pins and policies."""
