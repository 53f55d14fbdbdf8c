"""`write` and `Kit`: the folder of reference tensors that a port is compared with."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmdit.model
from sampler import Pipeline
from sampler.folders import whole_folder

from . import files
from .mistakes import features
from .page import page
from .recording import record
from .run import Run
from .stages import entries

MARGIN = 10  # the tolerance, relative to the deviation of our own float32 run
FILES = r"kit\.safetensors|manifest\.json|PORTING\.md"
ROUNDING = 2.0**-23  # of float32; the least deviation assumed: what our run rounds as the kit, another may not


@dataclass(frozen=True)
class Kit:
    """A kit as read from its folder: the run, the manifest's row of each tensor (see `write`), and the tensors."""

    run: Run
    rows: list[dict[str, Any]]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> "Kit":
        """Raises FileNotFoundError or ValueError where `folder` holds no complete kit."""
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

    The tensors are those of a run in float64, rounded to float32 once (what the program itself computes in float64,
    such as the kernel, stays float64). `measured` is the deviation of this program's own run in float32, and the
    `tolerance` is MARGIN times that, and at least MARGIN roundings. On tiny-sd3 other orders of the same sums (one term
    after the other, unfused attention, two threads) gave at most 2 times the measured deviation, a port to numpy 4.
    For latents `measured` is the largest deviation of all steps: in which step and which sample the rounding errors of
    earlier steps are amplified differs between two runs of the same accuracy (16 samples pushed with strength 4: 11
    times at a single step, from one sample).
    Raises FileExistsError where the folder exists, ValueError for a call that the pipeline refuses.
    """
    with whole_folder(folder, overwrite, ours=FILES) as claim:  # before anything is computed
        exact, run = run_in(torch.float64, model, prompt, images, steps)
        ours, _ = run_in(torch.float32, model, prompt, images, steps)
        off, rows = {name: deviation(tensor, exact[name]) for name, tensor in ours.items()}, []
        of_latents = max(off[entry.name] for entry in entries(run) if entry.stage == "steps")
        for entry in entries(run):
            tensor, measured = ours[entry.name], of_latents if entry.stage == "steps" else off[entry.name]
            whole = 0.1 if entry.name == "pixels" else 0.0  # one in a hundred may round to the other side
            rows.append({
                "name": entry.name, "stage": entry.stage, "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."), "formula": entry.formula,
                "inputs": list(entry.inputs),
                "measured": measured, "causes": [cause.words for cause in entry.causes],
                "tolerance": MARGIN * max(measured, ROUNDING) if tensor.is_floating_point() else whole,
            })
        manifest = json.dumps({"run": asdict(run), "tensors": rows}, indent=1, ensure_ascii=False)
        tensors = {name: tensor.to(ours[name].dtype) for name, tensor in exact.items()}
        files.write(claim.work / "kit.safetensors", tensors)
        (claim.work / "manifest.json").write_text(manifest + "\n", encoding="utf-8")
        (claim.work / "PORTING.md").write_text(page(run, rows, folder.name, MARGIN), encoding="utf-8")
    return rows


def run_in(dtype: torch.dtype, model: str, prompt: str, images: int,
           steps: int | None) -> tuple[dict[str, Tensor], Run]:
    """The tensors of a run whose networks compute in `dtype`; blocks are converted one at a time.

    The model computes timestep features in float32 whatever its dtype. Where `dtype` is float64, this would be the
    largest rounding error of all (3e-5 in cosines of angles up to 1000), so they are then computed in float64.
    """
    pipeline = Pipeline.load(model, dtype=dtype, device="cpu", offload="blocks")
    run, own = Run.of(pipeline, model, prompt, images, steps), mmdit.model.timestep_features
    mmdit.model.timestep_features = features if dtype == torch.float64 else own
    try:
        return record(pipeline, run), run
    finally:
        mmdit.model.timestep_features = own


def deviation(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference of two tensors relative to the norm of the second; for whole numbers the root mean
    square of the difference."""
    scale = wanted.double().norm() if wanted.is_floating_point() else wanted.numel() ** 0.5
    return ((found.double() - wanted.double()).norm() / max(scale, 1e-300)).item()
