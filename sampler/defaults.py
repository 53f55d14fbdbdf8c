"""What a checkpoint brings with it: its settings, its schedule of noise levels; whether its parts fit."""

from collections.abc import Mapping

from repulsion import Repulsion
from weights import PUBLIC, Checkpoint, CheckpointError, Settings, Stored, read_json

from .schedule import Schedule


def find_settings(found: Checkpoint) -> Settings:
    """Those in a folder's `sampling.json` (bundled checkpoints), else those of the public checkpoint it is taken for.

    Raises CheckpointError, naming the file, where it makes no sense.
    """
    file = found.path / "sampling.json"
    own = read_json(file) if found.path.is_dir() else None
    if own is None:
        return PUBLIC[found.variant].settings
    try:
        own["repulsion"] = Repulsion(**own["repulsion"]) if own.get("repulsion") else None
        return Settings(**own)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def find_schedule(found: Checkpoint, settings: Settings, shift: float | None = None) -> Schedule:
    """The schedule with the `shift` that is given, else that of scheduler_config.json, else that of the settings.

    Raises CheckpointError, naming the file, for a scheduler whose noise levels are others.
    """
    if shift is not None or found.scheduler is None:
        return Schedule(found.family, settings.shift if shift is None else shift)
    config = read_json(found.scheduler)
    if config is None:
        raise FileNotFoundError(f"{found.scheduler} is missing: download it again, or say the shift")
    try:
        return Schedule.from_hub(config, found.family)
    except ValueError as error:
        raise CheckpointError(f"{found.scheduler}: {error}") from error


WIDTHS = {  # by role: what a network makes, how many numbers wide, and the field of MMDiTConfig that says what is read
    "autoencoder": ("latents", lambda config: config.latent_channels * config.patch_size**2, "latent_channels"),
    "t5": ("context", lambda config: config.hidden_size, "context_dim"),
    "text": ("context", lambda config: config.context_dim, "context_dim"),
}


def check_fit(stored: Mapping[str, Stored]) -> None:
    """Raises CheckpointError for an autoencoder or a text encoder, by role, of another model than the transformer's."""
    main = stored["transformer"]
    for role in stored.keys() & WIDTHS.keys():
        what, width_of, field = WIDTHS[role]
        width, wanted = width_of(stored[role].config), getattr(main.config, field)
        if width != wanted:
            raise CheckpointError(f"{stored[role].part.path} makes {what} of width {width}, but the transformer "
                                  f"{main.part.path} reads {wanted}: give the {role} that belongs to it")
    latents = stored["autoencoder"].part
    if latents.family not in (None, main.part.family):  # as wide, other numbers
        raise CheckpointError(f"{latents.path} is an autoencoder of {latents.family}, but the transformer "
                              f"{main.part.path} is of {main.part.family}: give the autoencoder that belongs to it")
