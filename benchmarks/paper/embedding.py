"""The image embedding that pictures are compared in: `python -m benchmarks.paper.embedding` trains it again.

What Inception is to photographs: a small convolutional network that was trained to classify, here the renders of the
tiny world, and whose last layer but one is kept. It learns which ground, texture and arrangement a picture has, and
which shapes, in which color and which size, on renders that are blurred and noised a little, as painted pictures are.
About four minutes on one core.
"""

import random
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tiny.world import ARRANGEMENTS, COLORS, GROUNDS, SHAPES, SIZES, TEXTURES, Scene, render, sample_scene
from training.loop import train

FILE = Path(__file__).parent / "embedding.pt"
WIDTH = 32  # numbers for a picture
SIDE = 64  # pixels that it looks at
PLACES = [name for names in ARRANGEMENTS.values() for name in names]
PAIRS = [(shape, value) for shape in SHAPES for value in (*COLORS, *SIZES)]


class Embedding(nn.Module):
    """Pictures (b, 3, h, h) in [-1, 1], looked at in SIDE × SIDE pixels → (b, WIDTH).

    Over renders of the size it was trained on each number has mean 0 and deviation 1.
    """

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in (24, 48, 64, 96):
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            channels = width
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * channels, WIDTH))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("deviation", torch.ones(WIDTH))

    def forward(self, pictures: Tensor) -> Tensor:
        if pictures.shape[-2:] != (SIDE, SIDE):
            pictures = F.interpolate(pictures, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        return (self.body(pictures) - self.mean) / self.deviation

    @classmethod
    def load(cls) -> "Embedding":
        """The trained one, ready for use."""
        model = cls()
        model.load_state_dict({name: value.float() for name, value in torch.load(FILE, weights_only=True).items()})
        return model.requires_grad_(False).eval()


def answers(scenes: list[Scene]) -> list[Tensor]:
    """What is asked of each picture: ground, texture and arrangement (b,); which of PAIRS occur in it (b, p)."""
    single = [torch.tensor([names.index(getattr(s, field)) for s in scenes]) for field, names in
              (("ground", GROUNDS), ("texture", TEXTURES), ("arrangement", PLACES))]
    shown = [{(t.shape, value) for t in s.things for value in (t.color, t.size)} for s in scenes]
    return [*single, torch.tensor([[pair in pairs for pair in PAIRS] for pairs in shown]).float()]


def spoil(pictures: Tensor) -> Tensor:
    """A little blur, of a strength drawn for each batch, and a little noise."""
    width = torch.rand(()) * 0.9 + 0.1
    kernel = torch.exp(-(torch.arange(-2, 3.0) / width).square() / 2)
    kernel = (torch.outer(kernel, kernel) / kernel.sum() ** 2).expand(3, 1, 5, 5)
    blurred = F.conv2d(F.pad(pictures, (2,) * 4, mode="replicate"), kernel, groups=3)
    return blurred + 0.04 * torch.randn_like(pictures)


def main(steps: int = 2000, file: Path = FILE) -> None:
    torch.manual_seed(0)
    model, head = Embedding(), nn.Linear(WIDTH, len(GROUNDS) + len(TEXTURES) + len(PLACES) + len(PAIRS))

    def batch_at(step: int) -> list[Tensor]:
        rng = random.Random(f"embedding {step}")
        scenes = [sample_scene(rng) for _ in range(64)]
        return [render(scenes, step), *answers(scenes)]

    def loss_of(pictures: Tensor, *answered: Tensor) -> Tensor:
        found = head(F.silu(model(spoil(pictures))))
        *single, pairs = found.split([len(GROUNDS), len(TEXTURES), len(PLACES), len(PAIRS)], dim=1)
        *asked, shown = answered
        loss = sum(F.cross_entropy(a.float(), b) for a, b in zip(single, asked, strict=True))
        return loss + 10 * F.binary_cross_entropy_with_logits(pairs.float(), shown)

    with tempfile.TemporaryDirectory() as folder:
        train("embedding", {"model": model, "head": head}, batch_at, loss_of, steps, Path(folder), lr=2e-3)
    with torch.no_grad():
        rng = random.Random("embedding")
        vectors = model(torch.cat([render([sample_scene(rng) for _ in range(64)], i) for i in range(32)]))
        model.mean, model.deviation = vectors.mean(0), vectors.std(0)
    torch.save({name: value.half() for name, value in model.state_dict().items()}, file)


if __name__ == "__main__":
    main()
