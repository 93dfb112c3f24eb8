"""Memory lent and borrowed: one pure core with an outbox, and the calls that carry it out."""
