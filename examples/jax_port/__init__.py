"""FLUX.1 with contextual repulsion in JAX: prompts → pictures, see README.md.
pip install jax safetensors transformers sentencepiece pillow"""

import jax

jax.config.update("jax_enable_x64", True)  # the push is computed in float64
jax.config.update("jax_default_matmul_precision", "highest")  # on a GPU products would otherwise be less than float32
