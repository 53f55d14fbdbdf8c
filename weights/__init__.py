"""Checkpoint files <-> modules: the layouts of the original releases and of the hub, read and written."""

from .checkpoints import BUNDLED, PUBLIC, Settings
from .detect import Checkpoint, Part, inspect_checkpoint
from .files import read_json, read_tekken, resolve
from .layouts import CheckpointError
from .load import Stored, load_autoencoder, load_text_encoder, load_transformer, open_part
from .save import save_autoencoder, save_text_encoder, save_transformer

__all__ = [
    "BUNDLED", "PUBLIC", "Checkpoint", "CheckpointError", "Part", "Settings", "Stored", "inspect_checkpoint",
    "load_autoencoder", "load_text_encoder", "load_transformer", "open_part", "read_json", "read_tekken",
    "resolve", "save_autoencoder", "save_text_encoder", "save_transformer",
]
