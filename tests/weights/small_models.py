"""Small models of every kind, filled with random weights, for the tests of this folder."""

import torch

from mmdit import AutoencoderConfig, ClipConfig, MMDiTConfig, T5Config

# Both sides compute in float32 (unit round-off 6e-8) with sums in other orders; a dozen layers with sums over some
# hundred terms make that 1e-6 to 1e-5. A wrong order of rows or heads is an error of the size of the output.
TOLERANCE = 1e-4

FLUX = MMDiTConfig(hidden_size=64, num_heads=2, num_dual_blocks=2, num_single_blocks=2, latent_channels=4,
                   context_dim=24, pooled_dim=20, rope_axes=(8, 12, 12))
FLUX2 = MMDiTConfig(hidden_size=64, num_heads=2, num_dual_blocks=2, num_single_blocks=2, latent_channels=8,
                    patch_size=1, context_dim=24, pooled_dim=None, mlp_ratio=3.0, rope_axes=(4, 8, 12, 8),
                    rope_theta=2000, bias=False, gated_mlp=True, shared_modulation=True, reference_step=10)
SD3 = MMDiTConfig(hidden_size=128, num_heads=2, num_dual_blocks=3, latent_channels=4, context_dim=24, pooled_dim=20,
                  position="table", position_table_size=12)
VAE = AutoencoderConfig(channels=(8, 16, 24), latent_channels=4, blocks_per_level=2, norm_groups=4)
CLIP = ClipConfig(vocab_size=60, hidden_size=32, intermediate_size=64, num_layers=3, num_heads=4, max_positions=20,
                  end_token=59)
T5 = T5Config(vocab_size=50, hidden_size=24, head_dim=4, intermediate_size=40, num_layers=2, num_heads=3)


def difference(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def randomize(module, seed=0):
    """Small weights, none of them special: no zero bias, no norm of ones."""
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(seed)  # of the initialization too: whatever ran before
        for part in module.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return module.eval()


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
