"""Train the checkpoint `tiny-turbo`, a small SD3.5-Large-Turbo: `python -m training.tiny_turbo --help`.

Four steps without guidance. The teacher, `tiny-sd3`, samples trajectories in many steps with classifier-free guidance;
the student starts as the teacher and learns the mean velocity between the noise levels of its own four steps
(progressive distillation, Salimans and Ho, arXiv:2202.00512, in a single round). The large model was distilled
adversarially. Here noise and caption determine the trajectory, so the targets are free of noise and regression
suffices, without a discriminator. Reflow would need the same trajectories and use only their ends.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange

from mmdit import MMDiT
from sampler import denoise, sigmas
from sampler.parts import compile_blocks
from tiny.world import SIDE
from weights import BUNDLED, load_transformer

from .data import SHIFT, Data
from .export import export_sd3
from .loop import autocast, batches, options, save_atomically, train
from .teacher import Teacher

STEPS = 4
FINE = 5  # the teacher's steps in each of the student's, except the last
GUIDANCE = 5.0
CHUNK = 512  # trajectories sampled at once
SAMPLING = {"steps": STEPS, "guidance": 1.0, "height": SIDE, "width": SIDE, "world": "tiny",
            "repulsion": {"strength": 0.5, "steps": 1}}


def noise_levels(steps: int) -> Tensor:
    """σ of SD3's schedule at SHIFT: (steps + 1,). The last step but one ends at the least of 1000 levels, not at 0."""
    return sigmas(steps, shift=SHIFT, spacing="sd3")


def captions_of(data: Data, chunk: int) -> list[str]:
    """The captions of a chunk of trajectories."""
    return data.captions(torch.arange(CHUNK) + CHUNK * chunk, chunk)


@torch.no_grad()
def paint(teacher: Teacher, captions: list[str], seed: int) -> Tensor:
    """The teacher's trajectories from noise to picture, at the student's levels: (b, STEPS + 1, c, H, W) float16."""
    levels = noise_levels((STEPS - 1) * FINE + 1)
    channels, side = teacher.transformer.config.latent_channels, SIDE // teacher.autoencoder.config.downscale
    condition = teacher.condition(*[ids.to(teacher.device) for ids in teacher.tokenize(captions)])
    shape = (len(captions), channels, side, side)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(teacher.device)
    guidance, way = x.new_full((len(x),), GUIDANCE), [x]

    def velocity(x: Tensor, sigma: float, step: int) -> Tensor:
        return teacher.velocity(x, x.new_full((len(x),), sigma), condition, guidance)

    for start in range(0, len(levels) - 1, FINE):  # the last of the student's steps is one of the teacher's
        way.append(denoise(velocity, way[-1], levels[start : start + FINE + 1]))
    return torch.stack(way, dim=1).half().cpu()


def trajectories(teacher: Teacher, data: Data, folder: Path, chunks: int) -> Tensor:
    """`paint` for several chunks: (CHUNK · chunks, STEPS + 1, c, H, W). Cached in files, so that a run can resume."""
    for chunk in trange(chunks, desc="trajectories", mininterval=5):
        file = folder / f"trajectories-{chunk:04d}.pt"
        if not file.exists():
            with autocast(teacher.device):
                ways = paint(teacher, captions_of(data, chunk), 1_000_003 * data.seed + chunk)
            save_atomically({"ways": ways}, file)
    files = [folder / f"trajectories-{chunk:04d}.pt" for chunk in range(chunks)]
    return torch.cat([torch.load(file, weights_only=True)["ways"] for file in files])


def distill(teacher: Teacher, student: MMDiT, data: Data, ways: Tensor, folder: Path, steps: int, batch: int,
            lr: float, minutes: float) -> None:
    """Train the student to predict (x_{k+1} − x_k) / (σ_{k+1} − σ_k) at x_k, for a random step k."""
    device = teacher.device
    levels, pick = noise_levels(STEPS).to(device), batches(len(ways), batch, data.seed + 4)
    captions = [caption for chunk in range(len(ways) // CHUNK) for caption in captions_of(data, chunk)]
    ids, ways = [tokens.to(device) for tokens in teacher.tokenize(captions)], ways.to(device)
    share = torch.tensor([1.0] * (STEPS - 1) + [0.25], device=device).cumsum(0)  # the last step is a very short one

    def batch_at(step: int) -> list[Tensor]:
        return [pick(step)]

    def loss_of(rows: Tensor) -> Tensor:
        k = torch.bucketize(torch.rand(len(rows), device=device) * share[-1], share).clamp(max=STEPS - 1)
        here, after = (ways[rows, i].float() for i in (k, k + 1))
        length = (levels[k + 1] - levels[k])[:, None, None, None]
        found = student(here, levels[k], *teacher.condition(*[tokens[rows] for tokens in ids]))
        return F.mse_loss(found.float(), (after - here) / length)

    train("turbo", {"transformer": student}, batch_at, loss_of, steps, folder, lr=lr, muon_lr=10 * lr, ema=0.998,
          device=device, minutes=minutes)


def whole_chunks(text: str) -> int:
    """A number of trajectories."""
    if int(text) < CHUNK or int(text) % CHUNK:
        raise argparse.ArgumentTypeError(f"must be a multiple of {CHUNK}, got {text}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-turbo"), help="work folder; runs can resume")
    parser.add_argument("--teacher", type=Path, default=BUNDLED["tiny-sd3"])
    parser.add_argument("--start", type=Path, help="continue from this tiny-turbo (default: the teacher)")
    parser.add_argument("--trajectories", type=whole_chunks, default=6144, help=f"a multiple of {CHUNK}")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end the training after this time")
    parser.add_argument("--batch", type=int, default=64, help="examples a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=5e-4, help="highest learning rate (AdamW; of Muon ten times)")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="compile the student's blocks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = options(parser)

    data = Data.sample(args.trajectories, args.seed)
    teacher = Teacher(args.teacher, args.device)
    ways = trajectories(teacher, data, args.out, args.trajectories // CHUNK)
    student = load_transformer(args.start or args.teacher, dtype=torch.float32, device=args.device)
    if args.compile:
        compile_blocks(student, dynamic=False)
    distill(teacher, student, data, ways, args.out, args.steps, args.batch, args.lr, args.minutes)
    export_sd3(args.out / "checkpoint", args.teacher, list(teacher.clips), teacher.t5, student, teacher.autoencoder,
               SHIFT, SAMPLING)
    print(f"written to {args.out / 'checkpoint'}")


if __name__ == "__main__":
    main()
