"""Checkpoint files <-> modules: the layouts of the original releases and of the hub, read and written."""

from .embedded import EMBEDDED
from .load import (
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    save_autoencoder,
    save_text_encoder,
    save_transformer,
)
from .names import CheckpointError

__all__ = [
    "EMBEDDED", "CheckpointError", "load_autoencoder", "load_text_encoder", "load_transformer", "save_autoencoder",
    "save_text_encoder", "save_transformer",
]
