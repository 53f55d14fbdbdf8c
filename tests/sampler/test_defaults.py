"""Which public checkpoint the name of a file or folder tells, and what settings and schedule follow."""

from pathlib import Path

import pytest

import weights
from mmdit import PRESETS
from repulsion import Repulsion
from sampler.defaults import find_schedule, find_settings
from weights import PUBLIC, Checkpoint
from weights.checkpoints import told_by_name

CALLED = {  # as the public folders, files and caches are
    "flux1-dev": ["FLUX.1-dev", "flux1-dev.safetensors", "models--black-forest-labs--FLUX.1-dev/snapshots/0a1b"],
    "flux1-kontext-dev": ["FLUX.1-Kontext-dev", "flux1-kontext-dev.safetensors", "flux1-dev-kontext_fp8.safetensors",
                          "models--black-forest-labs--FLUX.1-Kontext-dev/snapshots/0a1b",
                          "models--black-forest-labs--FLUX.1-Kontext-dev/snapshots/0a1b/transformer/model.safetensors"],
    "flux1-dev-de-distill": ["flux-dev-de-distill", "flux1-dev-dedistilled-fp8.safetensors",
                             "models--nyanko7--flux-dev-de-distill/snapshots/0a1b/consolidated_s6700.safetensors"],
    "flux1-schnell": ["FLUX.1-schnell", "flux1-schnell-fp8.safetensors"],
    "flux2-dev": ["FLUX.2-dev", "flux2_dev_fp8mixed.safetensors", "models--black-forest-labs--FLUX.2-dev/snapshots/0a"],
    "flux2-klein-9b": ["FLUX.2-klein-9B", "flux-2-klein-9b-fp8.safetensors", "FLUX.2-klein-9B/transformer"],
    "flux2-klein-9b-kv": ["FLUX.2-klein-9b-kv", "FLUX.2-klein-9B-KV/transformer", "flux-2-klein-9b-kv-fp8.safetensors"],
    "flux2-klein-base-9b": ["FLUX.2-klein-base-9B", "flux-2-klein-base-9b-fp8.safetensors",
                            "models--black-forest-labs--FLUX.2-klein-base-9B/snapshots/0a1b/transformer"],
    "flux2-klein-4b": ["FLUX.2-klein-4B", "flux-2-klein-4b.safetensors", "base/flux-2-klein-4b.safetensors"],
    "flux2-klein-base-4b": ["FLUX.2-klein-base-4B", "flux-2-klein-base-4b.safetensors",
                            "flux2_klein_4b_base.safetensors"],
    "sd3-medium": ["stable-diffusion-3-medium-diffusers", "sd3_medium_incl_clips_t5xxlfp8.safetensors"],
    "sd3.5-medium": ["stable-diffusion-3.5-medium", "sd3.5_medium.safetensors"],
    "sd3.5-large": ["stable-diffusion-3.5-large", "sd3.5_large.safetensors", "turbo/stable-diffusion-3.5-large"],
    "sd3.5-large-turbo": ["stable-diffusion-3.5-large-turbo", "sd3.5_large_turbo.safetensors",
                          "models--stabilityai--stable-diffusion-3.5-large-turbo/snapshots/0a1b"],
}  # fmt: skip


def alike(name):
    """The public checkpoints with a transformer of these sizes."""
    return [other for other, row in PUBLIC.items() if row.config == PRESETS[name]]


@pytest.mark.parametrize("name", PRESETS)
def test_public_checkpoints_are_known_by_name_among_those_of_their_sizes(name):
    assert PUBLIC.keys() == PRESETS.keys() == CALLED.keys()
    for path in [*CALLED[name], PUBLIC[name].file, PUBLIC[name].hub]:
        known = told_by_name(alike(name), Path("/models") / path)
        assert known == name or (known is None and "consolidated" in path), path
    assert told_by_name(alike(name), Path("/models/anything.safetensors")) is None


def test_the_nearest_name_counts_and_a_link_counts_as_what_it_leads_to(tmp_path):
    large = alike("sd3.5-large")
    (tmp_path / "sd3.5-large-turbo").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "sd3.5-large-turbo")
    assert told_by_name(large, tmp_path / "model") == "sd3.5-large-turbo"
    assert told_by_name(large, tmp_path / "sd3.5-large-turbo" / "sd3.5_large.safetensors") == "sd3.5-large"
    assert told_by_name(large, tmp_path / "sd3.5-large-turbo" / "transformer" / "x.safetensors") == "sd3.5-large-turbo"
    assert told_by_name(large, tmp_path / "sd3.5-large-turbo" / "a" / "b" / "c.safetensors") is None


def checkpoint(path, variant="sd3.5-large", family="sd3", scheduler=None):
    return Checkpoint(path, family, variant, "", {}, {}, scheduler, {}, {})


@pytest.mark.parametrize("name,steps,guidance,shift", [
    ("flux1-dev", 28, 3.5, None), ("flux1-kontext-dev", 28, 2.5, None), ("flux1-dev-de-distill", 28, 3.5, None),
    ("flux1-schnell", 4, None, 1.0), ("sd3-medium", 28, 7.0, 3.0), ("sd3.5-medium", 40, 4.5, 3.0),
    ("sd3.5-large", 28, 4.5, 3.0), ("sd3.5-large-turbo", 4, None, 3.0), ("flux2-dev", 50, 4.0, None),
    ("flux2-klein-9b", 4, None, None), ("flux2-klein-9b-kv", 4, None, None), ("flux2-klein-base-9b", 50, 4.0, None),
    ("flux2-klein-4b", 4, None, None), ("flux2-klein-base-4b", 50, 4.0, None),
])  # fmt: skip
def test_the_usual_settings_of_the_families_table(tmp_path, name, steps, guidance, shift):
    found = find_settings(checkpoint(tmp_path, name))
    assert (found.steps, found.guidance, found.shift, found.height, found.width) == (steps, guidance, shift, 1024, 1024)
    assert found.prompt_tokens == (256 if name == "flux1-schnell" else None)  # None: as many as the family


def test_a_folder_that_brings_its_own_settings_has_the_last_word(tmp_path):
    (tmp_path / "sampling.json").write_text('{"steps": 3, "guidance": 2.0, "repulsion": {"scale": 7.0}}')
    found = find_settings(checkpoint(tmp_path))
    assert (found.steps, found.guidance, found.repulsion.scale, found.world) == (3, 2.0, 7.0, None)
    for text, message in [("{", "is no JSON object"), ('{"guidance": 2.0}', "steps"), ('{"steps": 3, "x": 1}', "'x'"),
                          ('{"steps": 3, "repulsion": [1]}', ": "),
                          ('{"steps": 3, "repulsion": {"diversity": 0.3}}', "'diversity'")]:
        (tmp_path / "sampling.json").write_text(text)
        with pytest.raises(weights.CheckpointError, match=f"sampling.json.*{message}"):
            find_settings(checkpoint(tmp_path))


def test_a_given_shift_goes_before_the_file_s_and_that_before_the_settings(tmp_path):
    file, settings = tmp_path / "scheduler_config.json", PUBLIC["sd3.5-large"].settings
    file.write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}')
    found = checkpoint(tmp_path, scheduler=file)
    assert find_schedule(found, settings, 1.5).shift == 1.5
    assert find_schedule(found, settings).shift == 2.0
    assert find_schedule(checkpoint(tmp_path), settings).shift == 3.0
    file.write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": true, "max_shift": 2}')
    schedule = find_schedule(checkpoint(tmp_path, family="flux", scheduler=file), settings)
    assert (schedule.shift, schedule.max_shift, schedule.spacing) == (None, 2, "flux")


@pytest.mark.parametrize(("text", "error", "message"), [
    (None, FileNotFoundError, "is missing: download it again, or say the shift"),
    ("[]", weights.CheckpointError, "is no JSON object"),
    ('{"_class_name": "DDIMScheduler"}', weights.CheckpointError, ": it describes a DDIMScheduler, .*: say the shift"),
    ('{"use_karras_sigmas": true}', weights.CheckpointError, ": use_karras_sigmas True is not supported: set it to"),
    ('{"shift": null}', weights.CheckpointError, ": shift None .*: download"),
    ('{"shift": -1}', weights.CheckpointError, ": the schedule's shift must be a finite number above 0, got -1"),
    ('{"shift": "3"}', weights.CheckpointError, ": the schedule's shift must be a finite number above 0, got '3'"),
])
def test_a_scheduler_whose_levels_are_others_is_refused(tmp_path, text, error, message):
    file, settings = tmp_path / "scheduler_config.json", PUBLIC["sd3.5-large"].settings
    if text:
        file.write_text(text)
    with pytest.raises(error, match=rf"scheduler_config\.json *{message}"):
        find_schedule(checkpoint(tmp_path, scheduler=file), settings)
    assert find_schedule(checkpoint(tmp_path, scheduler=file), settings, 3.0).shift == 3.0


def test_repulsion_of_the_large_models_is_the_settings_table_of_the_paper():
    table = {  # M, τ, and the range of η
        "flux1-dev": (50, 1, 5e6, 8e9), "flux1-kontext-dev": (50, 1, 5e6, 8e9),
        "sd3.5-large": (100, 4, 5e2, 5e6), "sd3.5-large-turbo": (100, 1, 1e5, 1e7),
    }
    repelling = {name: row.settings.repulsion for name, row in PUBLIC.items() if row.settings.repulsion}
    assert {name for name in repelling if "klein" not in name} == table.keys()
    # FLUX.2 is not in the paper: the distilled ones have a strength, and a noise level instead of steps
    assert {name: found for name, found in repelling.items() if "klein" in name} == dict.fromkeys(
        ("flux2-klein-4b", "flux2-klein-9b", "flux2-klein-9b-kv"), Repulsion(strength=0.5, until=0.95))
    for name, (iterations, steps, low, high) in table.items():
        found = PUBLIC[name].settings.repulsion
        assert (found.iterations, found.steps, found.strength) == (iterations, steps, None)
        assert low <= found.scale <= high
        assert (found.branches, found.single_stream_tokens, found.blocks) == ("all", "all", "all")
