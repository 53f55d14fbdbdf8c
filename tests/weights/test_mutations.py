"""Valid files, changed at random: an error of ours or a correct load, never a crash, a hang or a silent wrong load.

The judge is the safetensors library: what it refuses is refused here too, and what loads has the numbers that it
reads. Each change is drawn with a seed of its own, which a failure names.
"""

import json
import random
import signal
import warnings
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load as parse
from safetensors.torch import save
from small_models import randomize

from mmdit import (
    Autoencoder,
    AutoencoderConfig,
    ClipConfig,
    ClipTextEncoder,
    DecoderConfig,
    MMDiT,
    MMDiTConfig,
    T5Config,
    T5Encoder,
    TextDecoder,
)
from mmdit.float8 import Float8Linear
from weights import (
    CheckpointError,
    configs,
    inspect_checkpoint,
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    save_autoencoder,
    save_text_encoder,
    save_transformer,
    tables,
)
from weights.__main__ import describe
from weights.layouts import Layout

ROUNDS = 400  # for each of ten checkpoints
SECONDS = 5  # of processor time for one load, which takes a hundredth of one

TINY = {"latent_channels": 2, "context_dim": 3, "pooled_dim": 3}
FLUX = MMDiTConfig(hidden_size=12, num_heads=2, num_dual_blocks=1, num_single_blocks=1, rope_axes=(2, 2, 2), **TINY)
FLUX2 = MMDiTConfig(hidden_size=16, num_heads=2, num_dual_blocks=1, num_single_blocks=1, latent_channels=2,
                    patch_size=1, context_dim=3, pooled_dim=None, mlp_ratio=3.0, rope_axes=(2, 2, 2, 2),
                    rope_theta=2000, bias=False, gated_mlp=True, shared_modulation=True, reference_step=10)
SD3 = MMDiTConfig(hidden_size=8, num_heads=2, num_dual_blocks=2, position="table", position_table_size=3,
                  dual_attention_blocks=(0,), **TINY)
VAE = AutoencoderConfig(channels=(2, 4), latent_channels=2, blocks_per_level=1, norm_groups=2)
FLUX2_VAE = AutoencoderConfig(channels=(2, 4), latent_channels=2, blocks_per_level=1, norm_groups=2, scaling=1.0,
                              shift=0.0, patch_size=2, decoder_channels=(4, 2))
DECODER = DecoderConfig(vocab_size=7, hidden_size=4, intermediate_size=6, num_heads=2, num_kv_heads=1, head_dim=2)
CLIP = ClipConfig(vocab_size=7, hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2, max_positions=5,
                  end_token=6, projection_dim=4)
T5 = T5Config(vocab_size=5, hidden_size=4, head_dim=3, intermediate_size=6, num_layers=2, num_heads=2)


class Case(NamedTuple):
    """A valid checkpoint, how it is loaded, and the layout of its names."""

    files: dict[str, bytes]
    layout: Layout
    load: Any
    config: Any = None  # what the caller gives
    prefix: str = ""
    inputs: Any = None  # what a module may be called with, whose config.json may change


def weights_of(module, layout, prefix="", dtypes=(torch.float32,)):
    """Random weights under the layout's names, in the given dtypes in turn."""
    generator = torch.Generator().manual_seed(0)
    names = layout.split(module.state_dict(), configs.sizes_of(module.config))
    return {prefix + name: torch.randn(part.shape, generator=generator).to(dtypes[i % len(dtypes)])
            for i, (_, name, part) in enumerate(names)}


def hub_folder(folder, module, save, max_shard_bytes=None):
    save(randomize(module), folder, "hub", max_shard_bytes)
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


NAMES = ["flux", "flux, scaled float8", "flux2, hub", "sd3, hub", "autoencoder, hub", "autoencoder", "clip, hub", "t5",
         "flux2's autoencoder, hub", "text decoder, hub"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder, f8 = tmp_path_factory.mktemp("valid"), (torch.float8_e4m3fn, torch.float8_e5m2)
    flux = weights_of(MMDiT(FLUX), tables.FLUX_ORIGINAL, dtypes=(torch.bfloat16, torch.float32, torch.float16))
    root = "model.diffusion_model."
    slim = weights_of(MMDiT(FLUX), tables.FLUX_ORIGINAL, root, f8[:1])
    slim |= {name.replace(".weight", ".scale_weight"): torch.rand(len(tensor) if len(name) % 2 else ())
             for name, tensor in slim.items() if tensor.ndim == 2}
    slim[root + "scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    ae = weights_of(Autoencoder(VAE), tables.AUTOENCODER_ORIGINAL, dtypes=(torch.float8_e5m2, torch.bfloat16))
    t5 = weights_of(T5Encoder(T5), tables.T5, dtypes=(torch.float16, *f8))
    t5["encoder.embed_tokens.weight"] = t5["shared.weight"].clone()
    sd3_inputs = {"latent": torch.ones(1, 2, 2, 4), "sigma": torch.ones(1), "context": torch.ones(1, 2, 3),
                  "pooled": torch.ones(1, 3)}
    return {
        "flux": Case({"flux.safetensors": save(flux)}, tables.FLUX_ORIGINAL, load_transformer, FLUX),
        "flux, scaled float8": Case({"fp8.safetensors": save(slim)}, tables.FLUX_ORIGINAL, load_transformer, FLUX,
                                    root),
        "flux2, hub": Case(hub_folder(folder / "flux2", MMDiT(FLUX2), save_transformer, 9000), tables.FLUX2_HUB,
                           load_transformer, inputs={key: x for key, x in sd3_inputs.items() if key != "pooled"}),
        "sd3, hub": Case(hub_folder(folder / "sd3", MMDiT(SD3), save_transformer, 9000), tables.SD3_HUB,
                         load_transformer, inputs=sd3_inputs),
        "autoencoder, hub": Case(hub_folder(folder / "vae", Autoencoder(VAE), save_autoencoder),
                                 tables.AUTOENCODER_HUB, load_autoencoder, inputs={"image": torch.ones(1, 3, 4, 4)}),
        "autoencoder": Case({"ae.safetensors": save(ae)}, tables.AUTOENCODER_ORIGINAL, load_autoencoder, VAE),
        "clip, hub": Case(hub_folder(folder / "clip", ClipTextEncoder(CLIP), save_text_encoder, 500), tables.CLIP,
                          load_text_encoder),
        "t5": Case({"t5.safetensors": save(t5)}, tables.T5, load_text_encoder),
        "flux2's autoencoder, hub": Case(
            hub_folder(folder / "flux2", Autoencoder(FLUX2_VAE), save_autoencoder), tables.AUTOENCODER_HUB,
            load_autoencoder, inputs={"image": torch.ones(1, 3, 8, 8)}),
        "text decoder, hub": Case(hub_folder(folder / "text", TextDecoder(DECODER), save_text_encoder, 9000),
                                  tables.DECODER, load_text_encoder, None, "model.", {"ids": torch.ones(1, 3).long()}),
    }


# ---- mutations: each changes `files` and says what it did

NONSENSE = [None, True, False, 0, -1, 1, 2, 3, 8, 64, 10**6, 10**9, 2**31, 2**63, 2**64, 10**30, 0.0, 1.5, -0.0, 1e308,
            float("nan"), float("inf"), "", "0", "64", "F32", "\ud800", "x" * 300, [], [1], [[[]]], {}, {"a": None}]
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I64", "I8", "U8", "BOOL", "C64", "F4", "f32"]


def change_bytes(files, rng):
    name = rng.choice(sorted(files))
    content = bytearray(files[name])
    end = len(content)
    if rng.random() < 0.5:  # the header, or the beginning of it
        end = min(end, rng.choice([9, 100, 8 + int.from_bytes(content[:8], "little")]))
    at = rng.randrange(end)
    span = rng.choice([1, 1, 2, 8, 100])
    kind = rng.choice(["flip", "set", "insert", "delete", "truncate", "zero", "repeat", "digit"])
    piece = content[at : at + span]
    if kind == "digit":  # a number in the header or in the JSON becomes another
        digits = [i for i, byte in enumerate(content[:end]) if chr(byte).isdigit() and i >= 8] or [at]
        content[rng.choice(digits)] = ord(rng.choice("0123456789-e."))
    else:
        content[at : len(content) if kind == "truncate" else at + len(piece)] = {
            "flip": bytes([piece[0] ^ 1 << rng.randrange(8)]) + piece[1:], "set": rng.randbytes(len(piece)),
            "insert": rng.randbytes(span) + piece, "delete": b"", "truncate": b"", "zero": bytes(len(piece)),
            "repeat": piece + piece,
        }[kind]
    files[name] = bytes(content)
    return f"{kind} {span} at byte {at} of {name}"


def places(value, path=()):
    """The paths of everything inside a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def change_json(value, rng):
    """One value, anywhere, becomes another, goes, or is swapped with one beside it."""
    path = rng.choice(list(places(value)) or [()])
    if not path:
        return rng.choice(NONSENSE), "the whole of it"
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key, old = path[-1], parent[path[-1]]
    kind = rng.choice(["replace", "replace", "number", "drop", "swap", "copy"])
    if kind == "number" and type(old) is int:
        parent[key] = rng.choice([old + 1, old - 1, 2 * old, -old, old // 2, old + 0.0, str(old), [old]])
    elif kind == "drop":
        del parent[key]
    elif kind in ("swap", "copy"):
        other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        if kind == "swap":
            parent[key], parent[other] = parent[other], parent[key]
        else:
            parent[key] = parent[other]
    else:
        parent[key] = rng.choice(NONSENSE)
    return value, f"{kind} {'.'.join(map(str, path))}, which was {old!r:.60}"


def change_document(files, rng):
    """config.json or the index."""
    name = rng.choice([name for name in sorted(files) if name.endswith(".json")] or [""])
    if not name:
        return change_header(files, rng)
    value = json.loads(files[name])
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    if "weight_map" in value and rng.random() < 0.3:
        key = rng.choice(sorted(value["weight_map"]))
        value["weight_map"][key] = rng.choice([*shards, "../" + shards[0], "/etc/passwd", "config.json", ".", "a\0b"])
        what = f"{key} in {value['weight_map'][key]!r}"
    else:
        value, what = change_json(value, rng)
    files[name] = json.dumps(value).encode()
    return f"{name}: {what}"


def change_header(files, rng):
    name = rng.choice([name for name in sorted(files) if name.endswith(".safetensors")])
    length = int.from_bytes(files[name][:8], "little")
    header, data = json.loads(files[name][8 : 8 + length]), files[name][8 + length :]
    tensors = [key for key in header if key != "__metadata__"]
    a, b = rng.choice(tensors), rng.choice(tensors)
    kind = rng.choice(["dtype", "shape", "rename", "drop", "duplicate", "swap", "reorder", "twin", "valid", "json"])
    if kind == "dtype":
        header[a]["dtype"] = rng.choice(DTYPES)
    elif kind == "shape":
        change = rng.choice([list.reverse, rng.shuffle, list.clear, lambda s: s.append(1), lambda s: s.insert(0, 1)])
        change(header[a]["shape"])
    elif kind == "rename":
        header[rng.choice([a + "x", a[1:], a.replace("0", "1"), "lora_" + a, a + "/../x"])] = header.pop(a)
    elif kind == "drop":
        del header[a]
    elif kind == "duplicate":
        header[a + rng.choice(["x", ".2"])] = header[a]
    elif kind == "swap":
        key = rng.choice(["data_offsets", "dtype", "shape"])
        header[a][key], header[b][key] = header[b][key], header[a][key]
    elif kind == "reorder":
        header = dict(rng.sample(sorted(header.items()), len(header)))
    elif kind == "valid":  # a valid file of other tensors: one less, one more, or one of another shape
        tensors = parse(files[name])
        other = torch.ones(rng.choice([(), (1,), (3, 2), tuple(tensors[b].shape)]))
        files[name] = save({key: tensor for key, tensor in tensors.items() if key != a}
                           | rng.choice([{}, {a: other}, {a: tensors[a], a + "x": other}]))
        return f"{name}: without {a}, or with another"
    elif kind == "json":
        header, what = change_json(header, rng)
        kind += " " + what
    head = json.dumps(header)
    if kind == "twin":
        head = f'{head[:-1]}, {json.dumps(a)}: {json.dumps(header[b])}}}'
    head = head.encode() + b" " * rng.randrange(3)
    files[name] = len(head).to_bytes(8, "little") + head + data
    return f"{name}: {kind} {a} {b}"


# ---- the judge


def library(folder, case):
    """What safetensors reads from the files in use: a function of the name, in float32 at least, scales multiplied in.

    Raises SafetensorError where the library refuses a file.
    """
    index = next(folder.glob("*.index.json"), None)
    used = json.loads(index.read_bytes())["weight_map"].values() if index else case.files
    opened = [safe_open(folder / name, "pt") for name in sorted(set(used)) if name.endswith(".safetensors")]
    found = {name: file for file in opened for name in file.keys()}  # noqa: SIM118

    def read(name):
        name = case.prefix + (name if case.prefix + name in found else name.replace("shared", "encoder.embed_tokens"))
        tensor, scale = found[name].get_tensor(name), name.removesuffix(".weight") + ".scale_weight"
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        if scale in found:
            factor = found[scale].get_tensor(scale).float()
            tensor = tensor * (factor.reshape(-1, 1) if factor.numel() > 1 else factor.reshape(()))
        return tensor

    return read


def assert_as_the_library_reads(model, case, dtype, folder):
    read, state = library(folder, case), model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, Float8Linear):
            state[f"{name}.weight"] = module.widened(torch.float32)
            state.pop(f"{name}.scale", None)
    sizes = configs.sizes_of(model.config)
    for name, ours in state.items():
        stored_as, transform = case.layout.find(name, sizes)
        wanted = transform.read(torch.cat([read(part) for part in stored_as]), sizes.patch)
        assert dtype in (None, ours.dtype), name
        assert torch.equal(ours.nan_to_num(), wanted.to(ours.dtype).nan_to_num()), name


def judge(case, folder, dtype):
    """Whether it was loaded; AssertionError, SafetensorError or anything else for what must not happen."""
    target = folder if len(case.files) > 1 else folder / next(iter(case.files))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # stray tensors
            model = case.load(target, case.config, dtype=dtype)
    except (CheckpointError, FileNotFoundError) as error:
        assert str(folder) in str(error) and ": " in str(error), f"where, and what to do? {error}"
        assert case.config or not the_program_approves(target), f"python -m weights approves: {error}"
        return False
    assert case.config or the_program_approves(target), "python -m weights refuses what loads"
    assert_as_the_library_reads(model, case, dtype, folder)
    model.float()  # what a config.json says can be computed
    if isinstance(model, ClipTextEncoder):
        model(torch.tensor([[1, model.config.end_token]]))
    elif case.inputs:
        model.posterior(**case.inputs) if isinstance(model, Autoencoder) else model(**case.inputs)
    return True


def the_program_approves(target):
    """Whether `python -m weights` has no complaint. It is asked where no config is given that only the loader gets."""
    try:
        found = inspect_checkpoint(target)
    except (CheckpointError, FileNotFoundError):
        return False
    return not any(describe(part, found.family, False)["problem"] for part in found.parts.values())


@contextmanager
def time_limit():
    """Of processor time, so that a busy machine does not matter."""
    def stop(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer here to stop a hang with")
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_changed_files_are_refused_or_loaded_right(cases, tmp_path, name):
    case, loaded = cases[name], 0
    with time_limit():
        assert judge(case, write(case.files, tmp_path / "valid"), None)
    for seed in range(ROUNDS):
        rng, files = random.Random(f"{name} {seed}"), dict(case.files)
        changes = [rng.choice([change_bytes, change_header, change_header, change_document])(files, rng)]
        if rng.random() < 0.02 and len(files) > 1:
            gone = rng.choice(sorted(files))
            del files[gone]
            changes.append(f"{gone} is gone")
        folder = write(files, tmp_path / str(seed))
        dtype = rng.choice([None, torch.float32, torch.bfloat16])
        try:
            with time_limit():
                loaded += judge(case, folder, dtype)
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}, dtype {dtype}: {'; '.join(changes)}: {error!r}") from error
    assert ROUNDS / 20 < loaded < ROUNDS / 2  # neither every change too small nor every one too large


def write(files, folder):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
