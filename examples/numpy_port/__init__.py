"""A finished port in numpy: Stable Diffusion 3 with contextual repulsion, token ids → pictures. See README.md.
pip install numpy"""
