"""Tensors that are stored as they are used stay in the mapped file: full-size checkpoints cost no memory to open."""

import json
import os
import re
from math import prod
from pathlib import Path

import pytest
from small_models import FLUX, SD3, randomize, same_tensors
from sparse import shapes_of, sparse_file

from benchmarks.loading import measure_apart
from mmdit import MMDiT
from weights import load_transformer, save_transformer
from weights.files import read_header
from weights.load import read_stored

ROOM = 150e6  # beyond what the imports hold
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")


@linux
@pytest.mark.parametrize(("manifest", "dtype"), [("sai/sd3_medium", "F16"), ("bfl/flux1-dev", "BF16")])
def test_an_original_file_of_full_size_opens_in_no_memory_of_its_own(tmp_path, manifest, dtype):
    file = sparse_file(tmp_path / "x.safetensors", shapes_of(manifest), dtype)
    assert file.stat().st_size > 4e9
    assert measure_apart("ours", str(file))["bytes"] < ROOM


@linux
def test_of_hub_names_only_what_is_fused_is_copied(tmp_path):
    shapes = shapes_of("diffusers/sd3-medium.transformer")
    file = sparse_file(tmp_path / "x" / "diffusion_pytorch_model.safetensors", shapes, "F16")
    fused = 2 * sum(prod(shape) for name, shape in shapes.items()
                    if re.search(r"\.(to|add)_[qkv](_proj)?\.", name))
    found = measure_apart("ours", str(file.parent))["bytes"]
    assert fused < found < fused + ROOM


@linux
def test_a_file_larger_than_the_memory_opens(tmp_path):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shapes = {"shared.weight": (memory // 2048 + 1, 1024)}  # in bfloat16 more than that
    entry = read_header(sparse_file(tmp_path / "x.safetensors", shapes))["shared.weight"]
    assert entry.nbytes > memory
    tensor = read_stored(entry)
    tensor[-1, -1] = 3
    assert tensor[-1, -1] == 3 and tensor[0, 0] == 0 and read_stored(entry)[-1, -1] == 0


def test_a_file_may_be_replaced_by_what_was_loaded_from_it(tmp_path):
    file = tmp_path / "x.safetensors"
    save_transformer(randomize(MMDiT(SD3)), file)
    model = load_transformer(file)
    save_transformer(model, file)
    file.unlink()  # the mapping outlives the name
    save_transformer(model, file)
    same_tensors(load_transformer(file).state_dict(), model.state_dict())


@pytest.mark.parametrize("odd", range(1, 8))
def test_numbers_that_are_not_aligned_are_read_right(tmp_path, odd):
    file, model = tmp_path / "x.safetensors", randomize(MMDiT(FLUX))
    save_transformer(model, file)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    head = json.dumps(json.loads(content[8 : 8 + length])).encode()
    head += b" " * ((odd - len(head)) % 8)
    file.write_bytes(len(head).to_bytes(8, "little") + head + content[8 + length :])
    loaded = load_transformer(file, FLUX)
    assert all(p.data_ptr() % p.element_size() == 0 for p in loaded.parameters())
    same_tensors(loaded.state_dict(), model.state_dict())
