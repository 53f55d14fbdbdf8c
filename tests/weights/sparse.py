"""Files of full size that take no room: a true header before numbers that were never written, so all zeros."""

import json

from benchmarks.loading import MANIFESTS, sparse_file


def shapes_of(manifest, prefix=""):
    """The names, with a prefix before them, and shapes of a public file."""
    return {prefix + name: tuple(shape) for name, shape in MANIFESTS[manifest]["tensors"].items()}


def sparse_hub_folder(path, family, transformer):
    """A pipeline's folder as the hub has it: `family` is "flux" or "sd3", `transformer` names a manifest."""
    sd3 = family == "sd3"
    clip_l, t5 = "text/clip_l.projection" if sd3 else "text/clip_l", "text/t5xxl"
    encoders = [clip_l, "text/clip_g", t5] if sd3 else [clip_l, t5]
    names = ["", "_2", "_3"][: len(encoders)]
    vae = "diffusers/sd3.vae" if sd3 else "diffusers/flux1.vae"
    sharded(path / "transformer", shapes_of(transformer), 3)
    sparse_file(path / "vae" / "diffusion_pytorch_model.safetensors", shapes_of(vae))
    for name, encoder in zip(names, encoders, strict=True):
        sparse_file(path / f"text_encoder{name}" / "model.safetensors", shapes_of(encoder))
        files = ["spiece.model", "tokenizer.json"] if encoder == t5 else ["vocab.json", "merges.txt"]
        for file in files:
            (path / f"tokenizer{name}").mkdir(exist_ok=True)
            (path / f"tokenizer{name}" / file).write_text("{}")
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text("{}")
    index = {"_class_name": "StableDiffusion3Pipeline" if sd3 else "FluxPipeline", "image_encoder": [None, None]}
    index |= {folder.name: ["diffusers", "Class"] for folder in path.iterdir()}
    (path / "model_index.json").write_text(json.dumps(index, indent=2))
    return path


def sharded(folder, tensors, shards):
    """The tensors in several files with an index, as the hub has large networks."""
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        sparse_file(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
