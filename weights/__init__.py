"""Checkpoint files <-> modules: the layouts of the original releases and of the hub, read and written."""

from .bundled import BUNDLED
from .hub import resolve
from .inspection import Inspection, inspect_checkpoint
from .load import (
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    open_autoencoder,
    open_text_encoder,
    open_transformer,
    save_autoencoder,
    save_text_encoder,
    save_transformer,
)
from .names import CheckpointError
from .stored import Stored, roles

__all__ = [
    "BUNDLED", "CheckpointError", "Inspection", "Stored", "inspect_checkpoint", "load_autoencoder", "load_text_encoder",
    "load_transformer", "open_autoencoder", "open_text_encoder", "open_transformer", "resolve", "roles",
    "save_autoencoder", "save_text_encoder", "save_transformer",
]
