"""Which public checkpoint a transformer is taken for, by its sizes and by what its file or folder is called."""

from pathlib import Path

import pytest

from mmdit import PRESETS
from sampler.defaults import PUBLIC, find_defaults, public_name

CALLED = {  # as the public folders, files and caches are
    "flux1-dev": ["FLUX.1-dev", "flux1-dev.safetensors", "models--black-forest-labs--FLUX.1-dev/snapshots/0a1b"],
    "flux1-kontext-dev": ["FLUX.1-Kontext-dev", "flux1-kontext-dev.safetensors", "flux1-dev-kontext_fp8.safetensors",
                          "models--black-forest-labs--FLUX.1-Kontext-dev/snapshots/0a1b",
                          "models--black-forest-labs--FLUX.1-Kontext-dev/snapshots/0a1b/transformer/model.safetensors"],
    "flux1-schnell": ["FLUX.1-schnell", "anything"],
    "sd3-medium": ["stable-diffusion-3-medium-diffusers", "sd3_medium_incl_clips_t5xxlfp8.safetensors"],
    "sd3.5-medium": ["stable-diffusion-3.5-medium", "sd3.5_medium.safetensors"],
    "sd3.5-large": ["stable-diffusion-3.5-large", "sd3.5_large.safetensors", "turbo/stable-diffusion-3.5-large"],
    "sd3.5-large-turbo": ["stable-diffusion-3.5-large-turbo", "sd3.5_large_turbo.safetensors",
                          "models--stabilityai--stable-diffusion-3.5-large-turbo/snapshots/0a1b"],
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_public_checkpoints_are_known_by_sizes_and_name(name):
    assert PUBLIC.keys() == PRESETS.keys() == CALLED.keys()
    for path in CALLED[name]:
        assert public_name(Path(path), PRESETS[name]) == name, path


def test_a_link_counts_as_what_it_leads_to(tmp_path):
    (tmp_path / "sd3.5-large-turbo").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "sd3.5-large-turbo")
    assert public_name(tmp_path / "model", PRESETS["sd3.5-large"]) == "sd3.5-large-turbo"


@pytest.mark.parametrize("name,steps,guidance,shift", [
    ("flux1-dev", 28, 3.5, None), ("flux1-kontext-dev", 28, 2.5, None), ("flux1-schnell", 4, None, 1.0),
    ("sd3-medium", 28, 7.0, 3.0), ("sd3.5-medium", 40, 4.5, 3.0), ("sd3.5-large", 28, 4.5, 3.0),
    ("sd3.5-large-turbo", 4, None, 3.0),
])  # fmt: skip
def test_the_usual_settings_of_the_families_table(name, steps, guidance, shift):
    found = find_defaults(Path(name), PRESETS[name])
    assert (found.steps, found.guidance, found.shift, found.height, found.width) == (steps, guidance, shift, 1024, 1024)


def test_a_folder_that_brings_its_own_settings_has_the_last_word(tmp_path):
    (tmp_path / "sampling.json").write_text('{"steps": 3, "guidance": 2.0, "repulsion": {"scale": 7.0}}')
    found = find_defaults(tmp_path, PRESETS["sd3.5-large"])
    assert (found.steps, found.guidance, found.repulsion.scale, found.world) == (3, 2.0, 7.0, None)
    (tmp_path / "sampling.json").write_text('{"steps": 3, "repulsion": {"diversity": 0.3}}')
    with pytest.raises(ValueError, match="sampling.json.*'diversity'.*strength took the place of diversity"):
        find_defaults(tmp_path, PRESETS["sd3.5-large"])
    (tmp_path / "sampling.json").write_text("{")
    with pytest.raises(ValueError, match="sampling.json is no valid JSON"):
        find_defaults(tmp_path, PRESETS["sd3.5-large"])


def test_repulsion_of_the_large_models_is_the_settings_table_of_the_paper():
    table = {  # M, τ, and the range of η
        "flux1-dev": (50, 1, 5e6, 8e9), "flux1-kontext-dev": (50, 1, 5e6, 8e9),
        "sd3.5-large": (100, 4, 5e2, 5e6), "sd3.5-large-turbo": (100, 1, 1e5, 1e7),
    }
    assert {name for name, defaults in PUBLIC.items() if defaults.repulsion} == table.keys()
    for name, (iterations, steps, low, high) in table.items():
        found = PUBLIC[name].repulsion
        assert (found.iterations, found.steps, found.strength) == (iterations, steps, None)
        assert low <= found.scale <= high
        assert (found.branches, found.single_stream_tokens, found.blocks) == ("all", "all", "all")
