"""Makes the checkpoint `tiny-flux`, FLUX.1-dev in small: `python -m training.tiny_flux --help`.

Dual- and single-stream blocks, rotary positions, CLIP's pooled vector and T5's context; text encoders, autoencoder and
tokenizers are those of `tiny-sd3`. As FLUX.1-dev once did, it learns to give in one pass, at a guidance that it is
told, what classifier-free guidance makes of two passes of a teacher: here `tiny-sd3`, whose velocities, unlike those
of the data, have no noise in them.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from mmdit import MMDiT, MMDiTConfig
from weights import BUNDLED, load_transformer

from .data import LENGTH, Data, noised
from .export import export_flux
from .loop import batches, train
from .teacher import FluxReader, Teacher
from .tiny_sd3 import start_at_zero

TRANSFORMER = MMDiTConfig(hidden_size=128, num_heads=4, num_dual_blocks=8, num_single_blocks=4, latent_channels=6,
                          context_dim=128, pooled_dim=48, rope_axes=(8, 12, 12), guidance_embedding=True)
GUIDANCE = (1.0, 7.0)  # what the student is told lies between
SAMPLING = {"steps": 20, "guidance": 4.5, "height": 64, "width": 64, "prompt_tokens": LENGTH, "world": "tiny",
            "repulsion": {"diversity": 0.5, "iterations": 1, "steps": 4, "blocks": "first", "site": "block"}}


def student_of(teacher: MMDiT) -> MMDiT:
    """A transformer of TRANSFORMER's sizes that starts with what the teacher has of it, its blocks above all.

    Positions it has to learn anew, since the teacher's table has no place in it, and to read T5 alone. What else is new
    starts by doing nothing: single-stream blocks, the context's way on in the teacher's last block, the guidance.
    """
    student = start_at_zero(MMDiT(TRANSFORMER))
    for new in (*student.guidance_in.out_layer.parameters(), student.pooled_in.in_layer.weight):  # no projected pooled
        nn.init.zeros_(new)
    ours, theirs = student.state_dict(), teacher.state_dict()
    for name in ours.keys() & theirs.keys():
        if ours[name].shape[1:] == theirs[name].shape[1:]:
            ours[name][: len(theirs[name])] = theirs[name]  # of a modulation that ends early: shift and scale
    return student


def distill(teacher: Teacher, reader: FluxReader, student: MMDiT, data: Data, latents: Tensor, folder: Path,
            steps: int, lr: float) -> None:
    """The student learns the teacher's guided velocity from its own conditioning and the guidance.

    Two guidances for each pair of the teacher's passes, which cost more than the student's one. In half of the
    captions the student's pooled vector is the empty caption's: no path may carry the prompt alone.
    """
    device = teacher.device
    pick = batches(len(data.scenes), 32, data.seed + 2)
    empty = reader([""])[1]

    def loss_at(step: int) -> Tensor:
        rows = pick(step)
        captions = data.captions(rows, step)
        noisy, sigma, _ = noised(latents[rows].float().to(device))
        low, high = GUIDANCE
        guidance = (low + (high - low) * torch.rand(2, len(rows))).to(device)
        goal = torch.cat(teacher.velocities(noisy, sigma, teacher.condition(captions), guidance))
        context, pooled = reader(captions)
        pooled = torch.where(torch.rand(2 * len(rows), 1).to(device) < 0.5, empty, pooled.repeat(2, 1))
        found = student(noisy.repeat(2, 1, 1, 1), sigma.repeat(2), context.repeat(2, 1, 1), pooled, guidance.flatten())
        error = (found.float() - goal).square().mean((1, 2, 3))
        return (error / guidance.flatten()).mean()  # what is to be learned grows with guidance

    train("student", {"transformer": student}, loss_at, steps, folder, lr=lr, muon_lr=10 * lr, ema=0.998,
          device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-flux"), help="work folder; a stopped run goes on")
    parser.add_argument("--teacher", type=Path, default=BUNDLED["tiny-sd3"])
    parser.add_argument("--start", type=Path, help="go on from this tiny-flux (default: from the teacher's blocks)")
    parser.add_argument("--steps", type=int, default=1660)
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate (AdamW; of Muon ten times)")
    parser.add_argument("--scenes", type=int, default=60_000, help="size of the training set")
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    data = Data.sample(args.scenes, args.seed)
    teacher = Teacher(args.teacher, args.device)
    reader = FluxReader(teacher)
    start = load_transformer(args.start, dtype=torch.float32) if args.start else student_of(teacher.transformer)
    student = start.to(args.device)
    distill(teacher, reader, student, data, teacher.latents(data, args.out), args.out, args.steps, args.lr)
    tokenizers = [args.teacher / name for name in ("tokenizer", "tokenizer_3")]
    export_flux(args.out / "checkpoint", tokenizers, reader.clip, reader.t5, student, teacher.autoencoder, SAMPLING)
    print(f"written to {args.out / 'checkpoint'}")


if __name__ == "__main__":
    main()
