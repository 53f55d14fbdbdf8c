"""Contextual repulsion (arXiv:2603.28762) as tensor maths: kernel, entropy, gradient, solvers, settings."""

from .config import Repulsion
from .kernel import cosine_kernel, vendi_score, von_neumann_entropy
from .repel import repel

__all__ = ["Repulsion", "cosine_kernel", "repel", "vendi_score", "von_neumann_entropy"]
