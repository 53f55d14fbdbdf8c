"""How the bundled checkpoints were trained: a script each, and what the scripts share."""
