"""Checks of the lab (lab.ipynb), as those of `checks`."""

import torch
from checks import check, close, need
from torch import Tensor

from mmdit.attention import JointAttention
from repulsion import cosine_kernel
from repulsion.objectives import density_matrix
from sampler import denoise


@check
def mix(answer):
    x0, noise, sigma = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.0, 0.25, 1.0])
    x, v = answer(x0, noise, sigma)
    need(x is not None and v is not None, "replace None in both lines")
    need(x.shape == x0.shape, "x has another shape than x0: give σ (b,) the shape (b, 1, 1, 1)")
    need(close(x[0], x0[0]) and close(x[2], noise[2]), "x has to be the picture at σ = 0 and the noise at σ = 1")
    need(close(x[1], 0.75 * x0[1] + 0.25 * noise[1]), "x is not on the straight line between the two")
    need(not close(v, x0 - noise), "the velocity points from the picture to the noise, not back")
    need(close(v, noise - x0), "the velocity is how x changes with σ, the same at every σ")


@check
def guided(answer):
    u, c = torch.randn(2, 3, 4)
    need(close(answer(u, c, 1.0), c) and close(answer(u, c, 0.0), u), "w = 1 has to give c, and w = 0 has to give u")
    need(close(answer(u, c, 3.0), 3 * c - 2 * u), "w > 1 goes on in the same direction, beyond c")


@check
def euler(answer):
    noise, levels = torch.randn(2, 3), torch.tensor([1.0, 0.7, 0.2, 0.0])
    need(close(answer(lambda x, sigma: torch.ones(2, 3), noise, levels), noise - 1),
         "with the velocity 1 the result has to be the noise minus 1: the step is (next level − level) times v")
    wanted = denoise(lambda x, sigma, step: x * sigma, noise, levels)
    need(close(answer(lambda x, sigma: x * sigma, noise, levels), wanted),
         "the velocity is that at the present x and the present level")


@check
def entropy_gradient(answer):
    one, c = torch.ones(1, 5, dtype=torch.float64), torch.randn(4, 20, dtype=torch.float64) + 1
    need(answer(c).shape == c.shape, f"the gradient has the shape of c, {tuple(c.shape)}, not {tuple(answer(c).shape)}")
    need(answer(one).norm() < 1e-9, "the gradient of a group of one must be zero: subtract the part along u, Σ W K u")
    with torch.enable_grad():
        leaf = c.clone().requires_grad_()
        entropy = torch.special.entr(torch.linalg.eigvalsh(density_matrix(cosine_kernel(leaf), torch.eye(4), 1e-4)))
        (wanted,) = torch.autograd.grad(entropy.sum(), leaf)
    found = answer(c)
    need((found * c).sum(dim=1).abs().max() < 1e-9, "a longer vector has the same cosines: the gradient of a sample "
         "must be orthogonal to the sample")
    ratio = (found * wanted).sum() / wanted.square().sum()
    need(ratio > 0, "along your gradient the entropy falls: mind the sign of W")
    need(not close(found, ratio * wanted) or close(ratio, 1.0),
         f"the direction is right and the length {ratio:.3g} times that of automatic differentiation")
    need(close(found, wanted), "it differs from automatic differentiation: W is −U diag(log λ + 1) Uᵀ / (B (1 + ε))")
    need(close(answer(10 * c), wanted / 10), "for samples ten times as long the gradient is a tenth")


@check
def attention(answer):
    module, last = JointAttention(16, 2, True).double(), JointAttention(16, 2, True, context_out=False).double()
    context, image = torch.randn(4, 3, 16, dtype=torch.float64), torch.randn(4, 5, 16, dtype=torch.float64)
    plain, pushed = module(context, image), []

    def push(tokens):
        pushed.append(tokens)
        return tokens + 1

    found = answer(module, context, image, None, None)
    need(isinstance(found, tuple) and len(found) == 2, "return two things: context and image")
    need(found[0] is not None, "the context is None, also where the module has an output projection for it")
    need(all(map(close, found, plain)), "without a push the result has to be that of the module")
    found = answer(module, context, image, None, push)
    need(pushed, "the push is never called")
    need(close(found[1], plain[1]), "the image has to stay as it was: only the context is pushed")
    need(len(pushed) == 1, f"the push is called {len(pushed)} times, not once with all samples")
    need(pushed[0].shape == context.shape, f"the push was given {tuple(pushed[0].shape)}, not the context's tokens")
    need(close(pushed[0], plain[0]), "the push was given other tokens than those that the output projection returns")
    need(close(found[0], plain[0] + 1), "what the push returns has to be what the attention returns")
    found = answer(last, context, image, None, push)
    need(found[0] is None and close(found[1], last(context, image)[1]),
         "the last block of Stable Diffusion 3 has no output projection for the context: return None there")


@check
def choose_strength(answer):
    tables = (
        ({0: (1.5, 1.0), 1: (2.0, 0.98), 2: (2.5, 0.96), 4: (3.0, 0.80)}, 2, "the larger ones lose too much"),
        ({0: (1.5, 0.98), 1: (2.0, 0.94), 2: (2.5, 0.85)}, 1, "95 % of what it is without repulsion, not 95 of 100"),
        ({0: (1.5, 1.0), 1: (2.4, 0.99), 2: (2.2, 0.97)}, 1, "the most varied, which need not be the longest push"),
        ({0: (1.5, 1.0), 1: (2.4, 0.90), 2: (2.6, 0.90)}, 0, "where all lose too much, do not repel"),
    )
    for table, wanted, why in tables:
        found = answer(table)
        need(found == wanted, f"from {table} (strength: Vendi score, adherence) you take {found}, not {wanted}: {why}")


class TwoOutputs(torch.nn.Module):
    """What an attention of diffusers returns: image and context."""

    def forward(self, image: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * image, 3 * context


@check
def repel_in(answer):
    module, image, context = TwoOutputs(), torch.randn(2, 4, 6), torch.randn(2, 3, 6)
    handle = answer(module, lambda tokens: tokens + 1)
    found = module(image, context)
    need(isinstance(found, tuple) and len(found) == 2, "the hook has to return two things: image and context")
    need(not close(found[0], 2 * image + 1), "the image is pushed: diffusers returns it first, the context second")
    need(close(found[0], 2 * image), "the image has to stay as it was")
    need(not close(found[1], 3 * context), "the context is not pushed: replace None in the hook")
    need(close(found[1], 3 * context + 1), "the context has to become what the push returns")
    handle.remove()
    need(close(module(image, context)[1], 3 * context), "after handle.remove() the module has to be as it was")
