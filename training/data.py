"""Training data of the bundled checkpoints: scenes of the tiny world, their captions, and their pictures as latents."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from mmdit import Autoencoder
from sampler.schedule import shifted
from tiny.captions import describe, reword
from tiny.world import P_COUNT, Scene, forget, misstate, render, sample_scene

from .loop import autocast, loaded, save_atomically

EVEN = 0.3  # share of the scenes in which nothing is typical
LENGTH = 24  # tokens of the longest caption, in each of the two vocabularies
SHIFT = 3.0  # of the noise schedule in training, as SD3's and SD3.5-Large-Turbo's


@dataclass
class Data:
    """The training set: complete scenes, the seed of their captions, the share of wrong values in these, and how many
    scenes, the first, have captions that say everything."""

    scenes: list[Scene]
    seed: int
    wrong: float = 0.0
    whole: int = 0

    @classmethod
    def sample(cls, count: int, seed: int, wrong: float = 0.0, counts: Sequence[float] = P_COUNT) -> "Data":
        """Scenes of the biased world, but for a share EVEN in which every value is as frequent as any other, and whose
        captions say everything.

        Where a share of what captions say is wrong, those that name several rare values would otherwise be wrong more
        often than right: frequent scenes that are described wrongly outnumber the rare ones.
        """
        rng, whole = random.Random(seed), round(EVEN * count)
        return cls([sample_scene(rng, counts, even=i < whole) for i in range(count)], seed, wrong, whole)

    def captions(self, rows: Tensor, step: int) -> list[str]:
        """Captions of these scenes at a step: of those that need not say everything, attributes are dropped at random,
        and 15 % are empty.

        Of the attributes that are said, a share of `wrong` is wrong.
        """
        rng = random.Random(f"{self.seed} captions {step}")

        def caption(row: int) -> str:
            scene = self.scenes[row]
            if row >= self.whole:
                if rng.random() < 0.15:
                    return ""
                scene = forget(scene, rng)
            return reword(describe(misstate(scene, self.wrong, rng), rng), rng)

        return [caption(row) for row in rows.tolist()]

    def pictures(self, rows: Tensor, seed: int) -> Tensor:
        return render([self.scenes[row] for row in rows.tolist()], seed)


@torch.no_grad()
def encode(model: Autoencoder, data: Data, folder: Path, device: str, measure: bool = False) -> Tensor:
    """All pictures as latents, the posterior means, normalized by `model`: (count, c, h, w) float16.

    Cached in a file. `measure`: set shift and scaling in `model.config` so that the latents have mean 0, deviation 1.
    """
    file = folder / "latents.pt"
    if not file.exists():
        means, parts = [], torch.arange(len(data.scenes)).split(64)

        def batch_at(index: int) -> Tensor:
            return data.pictures(parts[index], 10**6 + 64 * index)

        for picture in loaded(batch_at, 0, len(parts), device):
            with autocast(device):
                means.append(model.posterior(picture.to(device))[0].float().cpu())
        latents, shift, scaling = torch.cat(means), model.config.shift, model.config.scaling
        if measure:
            shift, scaling = round(latents.mean().item(), 4), round(1 / latents.std().item(), 4)
        save_atomically({"latents": ((latents - shift) * scaling).half(), "shift": shift, "scaling": scaling}, file)
    saved = torch.load(file, weights_only=True)
    model.config = replace(model.config, shift=saved["shift"], scaling=saved["scaling"])
    return saved["latents"]


def noised(image: Tensor, shift: float = SHIFT) -> tuple[Tensor, Tensor, Tensor]:
    """A training example of flow matching: x = (1 − σ) x₀ + σ ε, its σ (b,), and the target velocity ε − x₀.

    image x₀ (b, c, H, W). σ is logit-normal (SD3 section 3.1), then shifted.
    """
    noise = torch.randn_like(image)
    sigma = shifted(torch.randn(len(image), device=image.device).sigmoid(), shift).to(image)
    level = rearrange(sigma, "b -> b 1 1 1")
    return (1 - level) * image + level * noise, sigma, noise - image
