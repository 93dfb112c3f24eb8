"""What keeps a node's memory over its rManager's death.

`process` is the small process that holds the segments and a table of records; it knows
nothing of either. `client` talks to it, `records` says what the records mean, `adoption`
rebuilds a core from them, `restoring` does so at a node's start, and `keeping` tells the
keeper what changes while the node runs.
"""
