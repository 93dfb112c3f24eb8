"""What the gManager decides of loans: their states, the ledger, placement and the planner."""
