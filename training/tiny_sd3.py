"""Train the checkpoint `tiny-sd3` from scratch: `python -m training.tiny_sd3 --help`.

A small version of every part of Stable Diffusion 3.5, trained one after the other on the procedural world of
`tiny/world.py`: tokenizers on its captions, an autoencoder on its pictures, two CLIP text encoders contrastively with
gray pictures, and last the T5 encoder jointly with the MMDiT, by flow matching. A run that was stopped continues when
it is started again.
"""

import argparse
import math
import random
import shutil
from pathlib import Path

import torch
from einops import reduce
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit import (
    Autoencoder,
    AutoencoderConfig,
    ClipConfig,
    ClipTextEncoder,
    ClipTokenizer,
    MMDiT,
    MMDiTConfig,
    T5Config,
    T5Encoder,
    T5Tokenizer,
)
from sampler.parts import compile_blocks
from tiny.world import SIDE
from weights import load_autoencoder, load_text_encoder, load_transformer

from .data import LENGTH, SHIFT, Data, encode, noised
from .export import export_sd3
from .loop import batches, options, train
from .teacher import TOKENIZERS, sd3_condition, trusting
from .tokenizers import train_clip_tokenizer, train_t5_tokenizer

AUTOENCODER = AutoencoderConfig(channels=(16, 32, 64, 64), blocks_per_level=1, norm_groups=8)
TRANSFORMER = MMDiTConfig(hidden_size=128, num_heads=4, num_dual_blocks=8, context_dim=128, pooled_dim=32,
                          position="table", position_table_size=16)
SAMPLING = {"steps": 20, "guidance": 6.0, "height": SIDE, "width": SIDE, "world": "tiny",
            "repulsion": {"strength": 0.5, "steps": 4}}


def train_tokenizers(data: Data, folder: Path) -> tuple[ClipTokenizer, ClipTokenizer, T5Tokenizer]:
    """The three vocabularies of SD3: CLIP-L pads with its end token, CLIP-G with id 0."""
    names = TOKENIZERS
    if not (folder / names[2] / "spiece.model").exists():
        captions = [c for c in data.captions(torch.arange(min(20_000, len(data.scenes))), -1) if c]
        train_clip_tokenizer(captions, folder / names[0], vocab_size=668, length=LENGTH)
        train_clip_tokenizer(captions, folder / names[1], vocab_size=668, length=LENGTH, pad_token="!")
        train_t5_tokenizer(captions, folder / names[2], vocab_size=80, length=LENGTH)
    return ClipTokenizer(folder / names[0]), ClipTokenizer(folder / names[1]), T5Tokenizer(folder / names[2])


def new_autoencoder() -> Autoencoder:
    """The untrained autoencoder; the log-variance starts so that latents have little noise."""
    model = Autoencoder(AUTOENCODER)
    nn.init.constant_(model.encoder.conv_out.bias[AUTOENCODER.latent_channels :], -4)
    return model


def train_autoencoder(model: Autoencoder, data: Data, folder: Path, steps: int, batch: int, device: str) -> None:
    """Train for reconstruction, with a small Kullback–Leibler term that keeps the latents smooth (latent diffusion)."""
    model.to(device).requires_grad_(True)
    pick = batches(len(data.scenes), batch, data.seed)

    def batch_at(step: int) -> list[Tensor]:
        return [data.pictures(pick(step), step)]

    def loss_of(picture: Tensor) -> Tensor:
        mean, logvar = model.posterior(picture)
        mean, logvar = mean.float(), logvar.float()
        z = mean + torch.randn_like(mean) * (logvar / 2).exp()
        restored = model.decoder(z).float()
        kl = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        return F.l1_loss(restored, picture) + 5 * F.mse_loss(restored, picture) + 1e-3 * kl

    train("autoencoder", {"autoencoder": model}, batch_at, loss_of, steps, folder, lr=3e-3, muon_lr=0.021, ema=0.99,
          device=device)
    model.requires_grad_(False).eval()


class ImageTower(nn.Module):
    """CLIP's image encoder, for training only: gray picture (b, 1, 32, 32) → one vector per text encoder."""

    def __init__(self, widths: list[int]):
        super().__init__()
        layers, channels = [], 1
        for width in (32, 64, 96):
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            channels = width
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * channels, 128), nn.SiLU())
        self.heads = nn.ModuleList(nn.Linear(128, width) for width in widths)
        self.temperature = nn.Parameter(torch.tensor(2.3))

    def forward(self, picture: Tensor) -> list[Tensor]:
        features = self.body(picture)
        return [head(features) for head in self.heads]


def train_clips(data: Data, tokenizers, folder: Path, steps: int, device: str) -> list[ClipTextEncoder]:
    """Train two text encoders to match captions and pictures (CLIP's contrastive loss).

    The pictures are gray, and shifted, mirrored and changed in brightness at random, so that the pooled vectors encode
    coarsely what is shown and not its color or position: these reach the MMDiT through tokens alone, as in the large
    models.
    """
    end = tokenizers[0].end_token
    shared = {"vocab_size": end + 1, "num_heads": 4, "projection_dim": 16, "max_positions": LENGTH, "end_token": end}
    clips = [
        ClipTextEncoder(ClipConfig(hidden_size=48, intermediate_size=192, num_layers=2, **shared)),
        ClipTextEncoder(ClipConfig(hidden_size=64, intermediate_size=256, num_layers=3, activation="gelu", **shared)),
    ]
    clips = [trusting(clip.to(device)) for clip in clips]
    tower = ImageTower([16, 16]).to(device)
    pick = batches(len(data.scenes), 128, data.seed + 1)

    def batch_at(step: int) -> list[Tensor]:
        rows, rng = pick(step), random.Random(f"{data.seed} clip {step}")
        picture = reduce(data.pictures(rows, step), "b c (y p) (x q) -> b 1 y x", "mean", p=4, q=4)
        picture = picture.roll((rng.randint(-3, 3), rng.randint(-3, 3)), (2, 3)) * rng.uniform(0.6, 1.6)
        captions = data.captions(rows, step)
        return [picture.flip(3) if rng.random() < 0.5 else picture, *(t(captions) for t in tokenizers[:2])]

    def loss_of(picture: Tensor, *ids: Tensor) -> Tensor:
        match, loss = torch.arange(len(picture), device=device), 0.0
        for clip, tokens, image in zip(clips, ids, tower(picture), strict=True):
            text = clip(tokens).pooled
            scores = tower.temperature.exp() * F.normalize(text.float(), dim=-1) @ F.normalize(image.float(), dim=-1).T
            loss = loss + (F.cross_entropy(scores, match) + F.cross_entropy(scores.T, match)) / 4
        return loss

    parts = {"clip_l": clips[0], "clip_g": clips[1], "tower": tower}
    train("clips", parts, batch_at, loss_of, steps, folder, lr=2e-3, ema=0.98, device=device)
    return [clip.requires_grad_(False).eval() for clip in clips]


def new_transformer(t5_vocabulary: int) -> tuple[T5Encoder, MMDiT]:
    """The untrained T5 encoder and MMDiT."""
    t5 = T5Encoder(T5Config(vocab_size=t5_vocabulary, hidden_size=TRANSFORMER.context_dim, head_dim=32,
                            intermediate_size=256, num_layers=2, num_heads=4))
    nn.init.normal_(t5.token_embedding.weight)
    return trusting(t5), start_at_zero(MMDiT(TRANSFORMER))


def train_transformer(t5: T5Encoder, model: MMDiT, data: Data, latents: Tensor, tokenizers, clips, folder: Path,
                      steps: int, batch: int, lr: float, device: str, minutes: float) -> None:
    """Train the MMDiT, jointly with T5, to predict the velocity of noised latents (flow matching, `noised`).

    One caption in ten is empty, for guidance. In half of the examples the pooled vector is the empty caption's: as SD3
    drops its encoders at random, so that the model does not depend on one of them alone.
    """
    t5, model = t5.to(device), model.to(device)
    pick, latents = batches(len(data.scenes), batch, data.seed + 2), latents.to(device)
    empty = sd3_condition(clips, t5, [tokenize([""]).to(device) for tokenize in tokenizers])[1].detach()

    def batch_at(step: int) -> list[Tensor]:
        rows = pick(step)
        captions = data.captions(rows, step)
        return [rows, *(tokenize(captions) for tokenize in tokenizers)]

    def loss_of(rows: Tensor, *ids: Tensor) -> Tensor:
        noisy, sigma, velocity = noised(latents[rows].float())
        context, pooled = sd3_condition(clips, t5, ids)
        pooled = torch.where(torch.rand(len(rows), 1, device=device) < 0.5, empty, pooled)
        return F.mse_loss(model(noisy, sigma, context, pooled).float(), velocity)

    parts = {"t5": t5, "transformer": model}
    train("transformer", parts, batch_at, loss_of, steps, folder, lr=lr, muon_lr=10 * lr, ema=0.998, device=device,
          minutes=minutes)
    t5.eval(), model.eval()


def start_at_zero(model: MMDiT) -> MMDiT:
    """Set modulations and output layer to zero, so that every block starts as the identity (adaLN-zero, DiT)."""
    for name, parameter in model.named_parameters():
        if "modulation" in name or name.startswith("image_out"):
            nn.init.zeros_(parameter)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-sd3"), help="work folder; runs can resume")
    parser.add_argument("--steps", type=int, default=4200, help="steps of the transformer")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end its training after this time")
    parser.add_argument("--batch", type=int, default=64, help="its examples a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="its highest learning rate (AdamW; of Muon ten times)")
    parser.add_argument("--autoencoder-steps", type=int, default=2400)
    parser.add_argument("--autoencoder-batch", type=int, default=16, help="its pictures a step (default: %(default)s)")
    parser.add_argument("--clip-steps", type=int, default=1200)
    parser.add_argument("--scenes", type=int, default=60_000, help="size of the training set")
    parser.add_argument("--wrong", type=float, default=0.18, help="share of what captions say that is wrong")
    parser.add_argument("--start", type=Path, help="continue from this checkpoint: T5 and the transformer are trained "
                        "further, tokenizers, autoencoder and CLIPs are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks: on a CPU 0.6 of the "
                        "time a step; needs a C++ compiler, and a minute to start")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = options(parser)

    torch.manual_seed(args.seed)
    data = Data.sample(args.scenes, args.seed, args.wrong)
    if args.start:
        for name in TOKENIZERS:
            shutil.copytree(args.start / name, args.out / name, dirs_exist_ok=True)
    tokenizers = train_tokenizers(data, args.out)
    if args.start:
        where = {"dtype": torch.float32, "device": args.device}
        autoencoder = load_autoencoder(args.start / "vae", **where)
        *clips, t5 = (trusting(load_text_encoder(args.start / f"text_encoder{n}", **where)) for n in ("", "_2", "_3"))
        clips = [clip.requires_grad_(False) for clip in clips]
        transformer = load_transformer(args.start, **where)
    else:
        autoencoder = new_autoencoder()
        train_autoencoder(autoencoder, data, args.out, args.autoencoder_steps, args.autoencoder_batch, args.device)
        clips = train_clips(data, tokenizers, args.out, args.clip_steps, args.device)
        t5, transformer = new_transformer(tokenizers[2].vocab_size)
    if args.compile:
        compile_blocks(transformer, dynamic=False)
    latents = encode(autoencoder, data, args.out, args.device, measure=not args.start)
    train_transformer(t5, transformer, data, latents, tokenizers, clips, args.out, args.steps, args.batch,
                      args.lr, args.device, args.minutes)
    export_sd3(args.out / "checkpoint", args.out, clips, t5, transformer, autoencoder, SHIFT, SAMPLING)
    print(f"written to {args.out / 'checkpoint'}")


if __name__ == "__main__":
    main()
