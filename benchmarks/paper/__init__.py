"""The paper in miniature: every method, every strength, three checkpoints, and what comes of it in numbers."""
