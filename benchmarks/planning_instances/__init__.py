"""What the benchmark of planning solves: made-up networks and real ones."""
