"""How the bundled checkpoints were trained: one script per checkpoint, and the code that the scripts share."""
