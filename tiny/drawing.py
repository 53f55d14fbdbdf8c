"""How well a picture of the tiny world is drawn: against the closest picture that the world's renderer can draw."""

import torch
from torch import Tensor

from .reader import find_ground, find_things, resized
from .world import COLOR_RGB, SHAPES, SIDE, coverage, pixel_grid, signed_distance

CLEARLY = 0.25  # a pixel is wrong where a channel is off by more than this share of its range
WELL = 50  # of 10,000 pixels; a picture with no more wrong ones is well drawn


def wrong_pixels(pixels: Tensor) -> list[float]:
    """Of 10,000 pixels, those that are clearly not what the renderer would draw there: (b, 3, h, w) in [-1, 1] → b
    numbers. Pictures are compared at SIDE × SIDE pixels."""
    pixels = resized(pixels)
    off = (pixels - closest_render(pixels)).abs().amax(dim=1) / 2
    return (1e4 * (off > CLEARLY).double().mean(dim=(1, 2))).tolist()


def closest_render(images: Tensor) -> Tensor:
    """Each picture drawn anew as the renderer would draw what is read in it: (b, 3, SIDE, SIDE) in [-1, 1] → the same.

    Ground and texture, and of each thing color, shape, place and size, are those that fit best, however badly.
    """
    images, (x, y) = images / 2 + 0.5, pixel_grid(SIDE)
    redrawn = find_ground(images)[0].clone()
    for row, color, _, shape, _, (left, top, radius) in zip(*find_things(images, redrawn.clone()), strict=True):
        alpha = coverage(signed_distance(SHAPES[shape], (x - left) / radius, (y - top) / radius) * radius)
        redrawn[row] = torch.lerp(redrawn[row], COLOR_RGB[color][:, None, None], alpha)
    return redrawn * 2 - 1
