"""T5 learns what belongs to what, before it is trained with a transformer.

The large models' T5 has read much text before an image model sees its states. Ours has only the captions of this world,
so it learns to answer what they say: of each thing, in the scene's order, shape, color and size; then arrangement,
ground and texture. A query for each question attends to T5's states, as image tokens do later, and a linear layer
answers.
"""

from copy import deepcopy
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit import T5Encoder
from tiny.captions import parse
from tiny.world import ARRANGEMENTS, COLORS, GROUNDS, SHAPES, SIZES, TEXTURES, Scene

from .data import Data
from .loop import batches, train
from .teacher import trusting

VALUES = {"shape": SHAPES, "color": COLORS, "size": SIZES, "arrangement": sum(ARRANGEMENTS.values(), ()),
          "ground": GROUNDS, "texture": TEXTURES}  # fmt: skip
THINGS, HEADS = 3, 4
QUESTIONS = [*(("shape", "color", "size") * THINGS), "arrangement", "ground", "texture"]
CLOSE = 0.1  # weight of the states' squared distance from those at the start, relative to their squared length


class Reader(nn.Module):
    """Answers QUESTIONS on captions from T5's states (b, n, d): for each question logits (b, values + 1), the last of
    them for "not said"."""

    def __init__(self, width: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(QUESTIONS), width))
        self.kv, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.answers = nn.ModuleDict({name: nn.Linear(width, len(values) + 1) for name, values in VALUES.items()})

    def forward(self, states: Tensor) -> list[Tensor]:
        k, v = rearrange(self.kv(states), "b n (two h k) -> two b h n k", two=2, h=HEADS)
        q = rearrange(self.queries, "q (h k) -> 1 h q k", h=HEADS).expand(len(states), -1, -1, -1)
        found = self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h q k -> b q (h k)"))
        return [self.answers[name](x) for name, x in zip(QUESTIONS, found.unbind(1), strict=True)]


def answers(caption: str) -> list[int]:
    """The index of each of QUESTIONS' answers in VALUES, or one beyond them for what the caption does not say."""
    scene = parse(caption) if caption else Scene()
    said = [getattr(thing, name) for thing in scene.things for name in ("shape", "color", "size")]
    said += [None] * (3 * THINGS - len(said)) + [scene.arrangement, scene.ground, scene.texture]
    return [len(VALUES[name]) if value is None else VALUES[name].index(value)
            for name, value in zip(QUESTIONS, said, strict=True)]


def beginner(teacher: T5Encoder) -> T5Encoder:
    """A T5 that starts with the states which the teacher's has for each token alone, and layers that add nothing yet.

    The teacher's own cannot learn more: it was trained beside two CLIPs, which know the order of words, and became a
    table of words, whose MLPs add vectors a hundred times as long as its attention does.
    """
    ids = torch.arange(teacher.config.vocab_size, device=teacher.token_embedding.weight.device)
    student, states = T5Encoder(teacher.config).to(ids.device), rearrange(teacher(ids[:, None]), "b 1 d -> b d")
    with torch.no_grad():
        student.final_norm.weight.copy_(teacher.final_norm.weight)
        student.token_embedding.weight.copy_(states / teacher.final_norm.weight)  # of norm 1 already
    for layer in student.layers:
        nn.init.zeros_(layer.attention.out.weight)
        nn.init.zeros_(layer.mlp.out.weight)
    return trusting(student)


def learn_to_read(t5: T5Encoder, data: Data, tokenize, folder: Path, steps: int, device: str) -> None:
    """Train T5 until its states answer QUESTIONS, and let them stay close to what they were."""
    before = deepcopy(t5).requires_grad_(False)
    reader, pick = Reader(t5.config.hidden_size).to(device), batches(len(data.scenes), 128, data.seed + 3)

    def batch_at(step: int) -> list[Tensor]:
        captions = data.captions(pick(step), step)
        return [tokenize(captions), torch.tensor([answers(caption) for caption in captions])]

    def loss_of(ids: Tensor, goals: Tensor) -> Tensor:
        states, first = t5(ids), before(ids)
        moved = (states - first).square().sum(-1) / first.square().sum(-1)
        wrong = [F.cross_entropy(logits.float(), goal) for logits, goal in zip(reader(states), goals.T, strict=True)]
        return sum(wrong) / len(wrong) + CLOSE * moved.mean()

    train("t5", {"t5": t5, "reader": reader}, batch_at, loss_of, steps, folder, lr=2e-3, muon_lr=1e-2, ema=0.99,
          device=device)
