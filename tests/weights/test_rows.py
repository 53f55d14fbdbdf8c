"""A rank's rows of a network: put together again they are what one process loads, in every layout and dtype."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import FLUX, FLUX2, SD3, T5, draw, randomize, same_tensors
from torch import nn

from mmdit import MMDiT, T5Encoder
from weights import open_part, save_text_encoder, save_transformer
from weights.detect import find_parts

MODELS = {"flux": FLUX, "flux2": FLUX2, "sd3": replace(SD3, dual_attention_blocks=(0,))}
FILES = [(name, layout) for name in MODELS for layout in ("original", "hub")]


def rows_of(rank, ranks):
    """As FSDP shards: the last ranks may get fewer rows, or none."""

    def own(rows):
        each = -(-rows // ranks)
        return slice(rank * each, (rank + 1) * each)

    return own


def put_together(stored, ranks, *given):
    """The state dict of all ranks' rows; a buffer is whole on each."""
    parts = []
    for rank in range(ranks):
        model, state = stored.read(*given, own=rows_of(rank, ranks))
        parameters = dict(model.named_parameters())
        assert all(len(state[name]) <= -(-len(whole) // ranks) for name, whole in parameters.items())
        parts.append(state)
    return {name: torch.cat([part[name].view(torch.uint8) if first.itemsize == 1 else part[name] for part in parts]
                            ).view(first.dtype) if name in parameters else first
            for name, first in parts[0].items()}


@pytest.mark.parametrize("ranks", [2, 5])
@pytest.mark.parametrize("name,layout", FILES)
def test_all_rows_are_the_whole(name, layout, ranks, tmp_path):
    path = tmp_path / ("folder" if layout == "hub" else "file.safetensors")
    save_transformer(randomize(MMDiT(MODELS[name])), path, layout)
    stored = open_part(find_parts(path, ["transformer"], "transformer")[0], MODELS[name])
    for given in ((None, "cpu"), (torch.bfloat16, "cpu")):
        same_tensors(put_together(stored, ranks, *given), dict(stored.load(*given).state_dict()))


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "widened"])
def test_rows_of_scaled_float8(keep, tmp_path):
    path = tmp_path / "file.safetensors"
    save_transformer(randomize(MMDiT(FLUX)), path, "original")
    tensors = load_file(path)
    for name in [name for name, tensor in tensors.items() if tensor.ndim == 2 and "blocks" in name]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = draw(len(tensors[name]), 1).abs() + 0.1
    save_file(tensors, path)
    stored = open_part(find_parts(path, ["transformer"], "transformer")[0], FLUX)
    given = (torch.float32, "cpu", keep)
    whole, found = dict(stored.load(*given).state_dict()), put_together(stored, 3, *given)
    kept = [name for name, tensor in whole.items() if tensor.dtype == torch.float8_e4m3fn]
    assert bool(kept) == keep
    same_tensors(*({name: x.float() for name, x in state.items()} for state in (found, whole)))


def test_rows_stay_in_the_mapped_file(tmp_path):
    path = tmp_path / "t5.safetensors"
    save_text_encoder(randomize(T5Encoder(T5)), path, "original")
    stored = open_part(find_parts(path, ["t5"])[0], T5)
    model, state = stored.read(own=rows_of(1, 2))
    name = "layers.0.mlp.gate.weight"  # one tensor in the file: what is here is the second half of it, and no copy
    assert isinstance(dict(model.named_parameters())[name], nn.Parameter)
    assert state[name].storage_offset() == state[name].numel() == state[name].untyped_storage().nbytes() // 8
