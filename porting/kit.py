"""`write` and `Kit`: the folder that a port is compared with."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdit import MMDiT
from sampler import Pipeline
from sampler.output import refuse_existing, whole_folder

from . import files
from .mistakes import features
from .page import page
from .recording import record
from .run import Run
from .stages import entries

MARGIN = 10  # how much further from the kit than our own float32 run another one may be
ROUNDING = 2.0**-23  # of float32; what rounds to the kit's very numbers in our run may not in another


@dataclass(frozen=True)
class Kit:
    """A kit as it was read: the run, a dict for each tensor (see `write`), and the tensors."""

    run: Run
    rows: list[dict[str, Any]]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> "Kit":
        """Raises FileNotFoundError or ValueError where `folder` holds no whole kit."""
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            run, rows = Run.from_json(manifest["run"]), manifest["tensors"]
            tensors = files.read(folder / "kit.safetensors")
            names = [row["name"] for row in rows]
            if names != [entry.name for entry in entries(run)] or {*names} != {*tensors}:
                raise ValueError("manifest.json, kit.safetensors and this program do not list the same tensors")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder} is no kit, {Path(error.filename or 'kit.safetensors').name} is missing: "
                                    "write one with python -m porting write") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder} is no kit that can be read ({error}): write it again") from error
        return cls(run, rows, tensors)


def write(folder: Path, model: str = "tiny-sd3", prompt: str = "a circle", images: int = 2, steps: int | None = None,
          overwrite: bool = False) -> list[dict[str, Any]]:
    """Write a kit: kit.safetensors, manifest.json and PORTING.md, all of them or none; returns the manifest's rows.

    The numbers are those of a run in float64, rounded to float32 once (what the program itself computes in float64,
    such as the kernel, stays so). `measured` is how far this program's own run in float32 is from them, and the
    `tolerance` MARGIN times that, and MARGIN roundings at least. On tiny-sd3 other orders of the same sums (one term
    after the other, the textbook's attention, two threads) gave at most 2 times what is measured, a port to numpy 4.
    Raises FileExistsError where the folder exists, ValueError for a run that cannot be made.
    """
    refuse_existing(folder, overwrite)  # before anything is computed
    exact, run = run_in(torch.float64, model, prompt, images, steps)
    ours, _ = run_in(torch.float32, model, prompt, images, steps)
    rows = []
    for entry in entries(run):
        tensor, measured = ours[entry.name], deviation(ours[entry.name], exact[entry.name])
        whole = 0.1 if entry.name == "pixels" else 0.0  # one in a hundred may round to the other side
        rows.append({
            "name": entry.name, "stage": entry.stage, "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."), "formula": entry.formula, "inputs": list(entry.inputs),
            "measured": measured, "causes": [cause.words for cause in entry.causes],
            "tolerance": MARGIN * max(measured, ROUNDING) if tensor.is_floating_point() else whole,
        })
    manifest = json.dumps({"run": asdict(run), "tensors": rows}, indent=1, ensure_ascii=False)
    with whole_folder(folder, overwrite) as work:
        files.write(work / "kit.safetensors", {name: tensor.to(ours[name].dtype) for name, tensor in exact.items()})
        (work / "manifest.json").write_text(manifest + "\n", encoding="utf-8")
        (work / "PORTING.md").write_text(page(run, rows, folder.name, MARGIN), encoding="utf-8")
    return rows


def run_in(dtype: torch.dtype, model: str, prompt: str, images: int,
           steps: int | None) -> tuple[dict[str, Tensor], Run]:
    """The tensors of a run whose networks compute in `dtype`, and whose blocks stay in memory as they are stored."""
    pipeline = Pipeline.load(model, dtype=dtype, device="cpu", offload="blocks")
    run = Run.of(pipeline, model, prompt, images, steps)
    with exact_features(pipeline.transformer, dtype == torch.float64):
        return record(pipeline, run), run


@contextmanager
def exact_features(model: MMDiT, on: bool) -> Iterator[None]:
    """Timestep features in float64, which the model computes in float32 whatever its dtype: of angles up to 1000 the
    cosines are off by 3e-5, the largest rounding of all."""
    levels: dict[str, Tensor] = {}
    layers = {name: layer for name in ("time_in", "guidance_in") if on and (layer := getattr(model, name)) is not None}
    hooks = [model.register_forward_pre_hook(lambda _, args: levels.update(time_in=args[1], guidance_in=args[4]))]
    hooks += [layer.register_forward_pre_hook(lambda _, args, name=name: features(levels[name]))
              for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def deviation(found: Tensor, wanted: Tensor) -> float:
    """How far apart two tensors of one shape are: the norm of their difference relative to that of the second; for
    whole numbers its root mean square."""
    scale = wanted.double().norm() if wanted.is_floating_point() else wanted.numel() ** 0.5
    return ((found.double() - wanted.double()).norm() / max(scale, 1e-300)).item()
