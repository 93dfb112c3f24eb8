"""Real engine processes that share KV through a fabric: the demo, and what benches need of it."""
