"""The other places to push give the velocities of the implementation inside the model that they replaced.

tests/data/places.safetensors was written by that implementation (float64, the paper's loop by automatic
differentiation); the hooks gave the same bits when it was deleted.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.paper.places import PLACES, pushing
from mmdit import MMDiT, MMDiTConfig
from repulsion import Repulsion

WANTED = load_file(Path(__file__).parents[1] / "data" / "places.safetensors")
SIZES = {"hidden_size": 32, "num_heads": 2, "num_dual_blocks": 3, "latent_channels": 4, "context_dim": 24,
         "pooled_dim": 20}
CONFIGS = {
    "flux": MMDiTConfig(**SIZES, num_single_blocks=2, rope_axes=(4, 6, 6)),
    "sd3": MMDiTConfig(**SIZES, position="table", position_table_size=8, dual_attention_blocks=(1,)),
}
PUSH = Repulsion(scale=20.0, iterations=3, solver="autograd", branches="conditional", blocks=(0, 2))


def model_and_inputs(family):
    """Both drawn from one generator, as they were when the values were written."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    model = MMDiT(CONFIGS[family]).double().requires_grad_(False)
    for p in model.parameters():
        p.copy_(draw(*p.shape) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
    inputs = {"latent": draw(6, 4, 4, 6), "context": draw(2, 5, 24).repeat_interleave(3, 0),
              "pooled": draw(2, 20).repeat_interleave(3, 0)}
    return model, inputs | {"sigma": torch.full((6,), 0.9, dtype=torch.float64), "groups": 2}


@pytest.mark.parametrize("place", ["none", "attention", *PLACES])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_velocity_is_that_of_the_former_implementation(family, place):
    model, inputs = model_and_inputs(family)
    with pushing(model, place if place in PLACES else None):
        found = model(**inputs, repulsion=None if place == "none" else PUSH)
    wanted = WANTED[f"{family}/{place}"]
    assert (found - wanted).norm() / wanted.norm() < 1e-5  # σ's float32 features: 1e-6 by processor; a push: 2e-3


@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_left_behind(place):
    model, inputs = model_and_inputs("flux")
    before = model(**inputs, repulsion=PUSH)
    with pytest.raises(KeyboardInterrupt), pushing(model, place):
        raise KeyboardInterrupt
    assert torch.equal(model(**inputs, repulsion=PUSH), before)
