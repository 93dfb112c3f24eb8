"""What a node holds. The core decides; the arena and the filling touch bytes."""
