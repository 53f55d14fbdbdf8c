"""Train the checkpoint `tiny-flux`, a small FLUX.1-dev: `python -m training.tiny_flux --help`.

Dual- and single-stream blocks, rotary positions, CLIP's pooled vector and T5's context; autoencoder, tokenizers and
CLIP are those of `tiny-sd3`. T5 is its own, since it alone says here what belongs to what (`reading.py`), and is
trained with the transformer. Like FLUX.1-dev it is guidance-distilled: in one pass, conditioned on the guidance scale,
it reproduces what classifier-free guidance computes from two passes of a teacher. The teacher is `tiny-sd3`, whose
velocities, unlike those of training examples, are free of noise.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mmdit import MMDiT, MMDiTConfig
from sampler.parts import compile_blocks
from tiny.world import SIDE
from weights import BUNDLED, load_text_encoder, load_transformer

from .data import LENGTH, SHIFT, Data, encode, noised
from .export import export_flux
from .loop import batches, options, train
from .reading import beginner, learn_to_read
from .teacher import FluxTextEncoders, Teacher, trusting
from .tiny_sd3 import start_at_zero

TRANSFORMER = MMDiTConfig(hidden_size=128, num_heads=4, num_dual_blocks=8, num_single_blocks=4, latent_channels=6,
                          context_dim=128, pooled_dim=48, rope_axes=(8, 12, 12), guidance_embedding=True)
GUIDANCE = (1.0, 7.0)  # range of the guidance scale in training
SAMPLING = {"steps": 20, "guidance": 4.0, "height": SIDE, "width": SIDE, "prompt_tokens": LENGTH, "world": "tiny",
            "repulsion": {"strength": 0.5, "steps": 4}}


def student_of(teacher: MMDiT) -> MMDiT:
    """A transformer of TRANSFORMER's sizes, initialized from the teacher where both have the parameter.

    It has to learn rotary positions in place of the teacher's table, and a context of T5's states alone. The layers
    that the teacher lacks are initialized to have no effect: single-stream blocks, the context's output of the
    teacher's last block, the guidance.
    """
    student = start_at_zero(MMDiT(replace(TRANSFORMER, latent_channels=teacher.config.latent_channels)))
    # The pooled vector is new too: unlike the teacher's, it is CLIP-L's before the projection.
    for new in (*student.guidance_in.out_layer.parameters(), student.pooled_in.in_layer.weight):
        nn.init.zeros_(new)
    ours, theirs = student.state_dict(), teacher.state_dict()
    for name in ours.keys() & theirs.keys():
        if ours[name].shape[1:] == theirs[name].shape[1:]:
            # The context modulation of the teacher's last block is shorter: shift and scale alone.
            ours[name][: len(theirs[name])] = theirs[name]
    return student


def distill(teacher: Teacher, encoders: FluxTextEncoders, student: MMDiT, data: Data, latents: Tensor, folder: Path,
            steps: int, batch: int, lr: float, minutes: float, shift: float) -> None:
    """Train student and T5 to predict the teacher's guided velocity from their conditioning and the guidance scale.

    In half of the examples the student's pooled vector is the empty caption's, so that it does not need CLIP. Where
    things are is decided at high noise: a student that has the places still to learn takes a larger `shift`.
    """
    device = teacher.device
    pick, latents = batches(len(data.scenes), batch, data.seed + 2), latents.to(device)
    with torch.no_grad():  # else T5's gradients would belong to another stream than a recorded step's
        context, empty = encoders(*[ids.to(device) for ids in teacher.tokenize([""])[::2]])
    rope = student.rope(context.shape[1], [latents[:1]], context.dtype)
    student.rope = lambda *_: rope  # all examples have the same positions

    def batch_at(step: int) -> list[Tensor]:
        rows = pick(step)
        return [rows, *teacher.tokenize(data.captions(rows, step))]

    def loss_of(rows: Tensor, *ids: Tensor) -> Tensor:
        noisy, sigma, _ = noised(latents[rows].float(), shift)
        low, high = GUIDANCE
        guidance = low + (high - low) * torch.rand(len(rows), device=device)
        goal = teacher.velocity(noisy, sigma, teacher.condition(*ids), guidance)
        context, pooled = encoders(ids[0], ids[2])
        pooled = torch.where(torch.rand(len(rows), 1, device=device) < 0.5, empty, pooled)
        found = student(noisy, sigma, context, pooled, guidance)
        error = (found.float() - goal).square().mean((1, 2, 3))
        return (error / guidance).mean()  # the target grows with the guidance scale

    parts = {"t5": encoders.t5, "transformer": student}
    train("student", parts, batch_at, loss_of, steps, folder, lr=lr, muon_lr=10 * lr, ema=0.998, device=device,
          minutes=minutes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-flux"), help="work folder; runs can resume")
    parser.add_argument("--teacher", type=Path, default=BUNDLED["tiny-sd3"])
    parser.add_argument("--start", type=Path, help="continue from this tiny-flux (default: the teacher's blocks)")
    parser.add_argument("--reading-steps", type=int, default=500, help="of T5 alone, anew (default: %(default)s); 0: "
                        "--start's T5 is kept")
    parser.add_argument("--steps", type=int, default=1660)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end after this time")
    parser.add_argument("--batch", type=int, default=32, help="examples a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-4, help="highest learning rate (AdamW; of Muon ten times); with "
                        "1e-3 T5 forgot the order of words (default: %(default)s)")
    parser.add_argument("--shift", type=float, default=SHIFT, help="of the noise in training (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=60_000, help="size of the training set")
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="compile the blocks of student and teacher")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = options(parser)

    torch.manual_seed(args.seed)
    teacher = Teacher(args.teacher, args.device)
    # Any captions do in distillation: more than in the world speak of several things.
    data = Data.sample(args.scenes, args.seed, counts=(0.3, 0.4, 0.3))
    where = {"dtype": torch.float32, "device": args.device}
    student = load_transformer(args.start, **where) if args.start else student_of(teacher.transformer).to(args.device)
    if args.start and not args.reading_steps:
        t5 = trusting(load_text_encoder(args.start / "text_encoder_2", **where))
    else:
        t5 = beginner(teacher.t5)
        learn_to_read(t5, data, teacher.tokenizers[2], args.out, args.reading_steps, args.device)
    encoders = FluxTextEncoders(teacher, t5)
    if args.compile:
        for model in (student, teacher.transformer):
            compile_blocks(model, dynamic=False)
    latents = encode(teacher.autoencoder, data, args.out, args.device)
    distill(teacher, encoders, student, data, latents, args.out, args.steps, args.batch, args.lr, args.minutes,
            args.shift)
    tokenizers = [args.teacher / name for name in ("tokenizer", "tokenizer_3")]
    export_flux(args.out / "checkpoint", tokenizers, encoders.clip, encoders.t5, student, teacher.autoencoder,
                SAMPLING)
    print(f"written to {args.out / 'checkpoint'}")


if __name__ == "__main__":
    main()
