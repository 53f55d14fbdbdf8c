"""Makes the checkpoint `tiny-flux`, FLUX.1-dev in small: `python -m weights.tiny.train_flux --help`.

Dual- and single-stream blocks, rotary positions, CLIP's pooled vector and T5's context. Text encoders, autoencoder and
tokenizers are those of `tiny-sd3`. First a teacher learns by flow matching; then, as FLUX.1-dev once did, a student
learns to give in one pass, at a guidance that it is told, what classifier-free guidance makes of two of the teacher's.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit import ClipTextEncoder, ClipTokenizer, MMDiT, MMDiTConfig, T5Encoder, T5Tokenizer

from ..embedded import EMBEDDED
from ..load import load_autoencoder, load_text_encoder
from .data import LENGTH, Data, encode, noised
from .export import export_flux
from .loop import batches, train
from .train import start_at_zero

TRANSFORMER = MMDiTConfig(hidden_size=128, num_heads=4, num_dual_blocks=4, num_single_blocks=6, latent_channels=6,
                          context_dim=128, pooled_dim=48, rope_axes=(8, 12, 12))
GUIDANCE = (1.0, 7.0)  # what the student is told lies between
SAMPLING = {"steps": 20, "guidance": 4.5, "height": 64, "width": 64, "prompt_tokens": LENGTH, "world": "tiny",
            "repulsion": {"diversity": 0.3, "iterations": 5, "steps": 2}}


class Reader(nn.Module):
    """Captions → context (b, 24, 128) and pooled vector (b, 48), both encoders frozen.

    In half of the captions the pooled vector is the empty caption's: no path may carry the prompt alone.
    """

    def __init__(self, start: Path, device: str):
        super().__init__()
        self.tokenizers = ClipTokenizer(start / "tokenizer"), T5Tokenizer(start / "tokenizer_3")
        clip = load_text_encoder(start / "text_encoder", dtype=torch.float32)
        self.clip = ClipTextEncoder(replace(clip.config, projection_dim=None))  # FLUX.1 does not project
        self.clip.load_state_dict({k: v for k, v in clip.state_dict().items() if not k.startswith("projection")})
        self.t5: T5Encoder = load_text_encoder(start / "text_encoder_3", dtype=torch.float32)
        self.to(device).requires_grad_(False)
        self.empty = self.read([""])

    def read(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        device = next(self.parameters()).device
        ids = [tokenizer(captions).to(device) for tokenizer in self.tokenizers]
        return self.t5(ids[1]), self.clip(ids[0]).unprojected

    @torch.no_grad()
    def forward(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        context, pooled = self.read(captions)
        left_out = torch.rand(len(captions), 1).to(pooled.device) < 0.5
        return context, torch.where(left_out, self.empty[1], pooled)


def train_teacher(data: Data, latents: Tensor, reader: Reader, folder: Path, steps: int, device: str) -> MMDiT:
    """Flow matching; one caption in ten is empty, for guidance."""
    model = start_at_zero(MMDiT(TRANSFORMER)).to(device)
    pick = batches(len(data.scenes), 64, data.seed + 2)

    def loss_at(step: int) -> Tensor:
        rows = pick(step)
        condition = reader(data.captions(rows, step))
        noisy, sigma, velocity = noised(latents[rows].float().to(device))
        return F.mse_loss(model(noisy, sigma, *condition).float(), velocity)

    train("teacher", {"transformer": model}, loss_at, steps, folder, lr=2e-3, muon_lr=0.02, ema=0.998, device=device)
    return model.requires_grad_(False).eval()


def distill_guidance(teacher: MMDiT, data: Data, latents: Tensor, reader: Reader, folder: Path, steps: int,
                     device: str) -> MMDiT:
    """The student starts as the teacher, deaf to guidance, and learns u + w (c − u) from it for every w."""
    student = MMDiT(replace(TRANSFORMER, guidance_embedding=True)).to(device)
    student.load_state_dict(teacher.state_dict(), strict=False)
    nn.init.zeros_(student.guidance_in.out_layer.weight), nn.init.zeros_(student.guidance_in.out_layer.bias)
    pick = batches(len(data.scenes), 64, data.seed + 3)

    def loss_at(step: int) -> Tensor:
        rows = pick(step)
        context, pooled = reader(data.captions(rows, step))
        noisy, sigma, _ = noised(latents[rows].float().to(device))
        low, high = GUIDANCE
        guidance = (low + (high - low) * torch.rand(len(rows))).to(device)
        with torch.no_grad():
            both = [torch.cat([empty.expand_as(told), told])
                    for empty, told in zip(reader.empty, (context, pooled), strict=True)]
            unconditional, conditional = teacher(noisy.repeat(2, 1, 1, 1), sigma.repeat(2), *both).float().chunk(2)
            goal = torch.lerp(unconditional, conditional, rearrange(guidance, "b -> b 1 1 1"))
        return F.mse_loss(student(noisy, sigma, context, pooled, guidance).float(), goal)

    train("student", {"transformer": student}, loss_at, steps, folder, lr=1e-3, muon_lr=0.01, ema=0.998, device=device)
    return student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-flux"), help="work folder; a stopped run goes on")
    parser.add_argument("--start", type=Path, default=EMBEDDED["tiny-sd3"], help="whose encoders and autoencoder")
    parser.add_argument("--steps", type=int, default=6000, help="steps of the teacher")
    parser.add_argument("--distill-steps", type=int, default=1500)
    parser.add_argument("--scenes", type=int, default=60_000, help="size of the training set")
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    data = Data.sample(args.scenes, args.seed)
    reader = Reader(args.start, args.device)
    autoencoder = load_autoencoder(args.start / "vae", dtype=torch.float32, device=args.device).requires_grad_(False)
    latents, shift, scaling = encode(autoencoder, data, args.out, args.device)
    autoencoder.config = replace(autoencoder.config, shift=shift, scaling=scaling)
    rest = latents, reader, args.out
    teacher = train_teacher(data, *rest, args.steps, args.device)
    student = distill_guidance(teacher, data, *rest, args.distill_steps, args.device)
    export_flux(args.out / "checkpoint", [args.start / "tokenizer", args.start / "tokenizer_3"], reader.clip,
                reader.t5, student, autoencoder, SAMPLING)
    print(f"written to {args.out / 'checkpoint'}")


if __name__ == "__main__":
    main()
