"""One 240 x 240 x 155 volume from file to written maps, part by part, from the shell, and against MONAI and diffusers.

`python -m benchmarks.end_to_end [--weights W] [--device D] [--output FOLDER] [--slices Z|all] [--steps N ...]
[--cohort K] [--no-compile]`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rivals import autoencoders_one_by_one, compare, compared
from benchmarks.timing import alternate, machine
from ddmd import ops
from ddmd.inference import detector as detecting
from ddmd.inference import ensemble
from ddmd.inference.detector import Detector, pick_device
from ddmd.inference.session import SamplingConfig, Session, detect_slices
from ddmd.inference.slices import Slices, extract
from ddmd.io.atomic import write_text
from ddmd.io.text import json_text
from ddmd.io.volume import Volume
from ddmd.models import checkpoint
from ddmd.models.autoencoder import AutoencoderConfig
from ddmd.models.denoiser import DenoiserConfig
from ddmd.models.fused_convolution import FusedConv2d

SHAPE = (240, 240, 155)
STEPS = (1, 5, 10)  # N at which rivals are compared
PROFILE_RUNS = 3
RESULTS = Path(__file__).with_name("results")


def volume_file(folder: Path) -> Path:
    """A phantom on the grid of the BraTS volumes; an ellipsoid where nilearn is missing."""
    try:
        from ddmd.data.phantom import phantom

        made = phantom(seed=1, spacing_mm=1.0, sequences=("flair",)).images["flair"]
        data = np.asanyarray(made.dataobj)
    except ImportError:
        grid = np.meshgrid(*[np.linspace(-1, 1, n) for n in (176, 216, 155)], indexing="ij")
        inside = sum(g**2 for g in grid) < 1
        data = (300 + 30 * np.random.default_rng(0).standard_normal(inside.shape)) * inside
    target = np.zeros(SHAPE, np.float32)
    sizes = [min(a, b) for a, b in zip(SHAPE, data.shape, strict=True)]
    source = tuple(slice((n - s) // 2, (n - s) // 2 + s) for n, s in zip(data.shape, sizes, strict=True))
    place = tuple(slice((n - s) // 2, (n - s) // 2 + s) for n, s in zip(SHAPE, sizes, strict=True))
    target[place] = data[source]
    path = folder / "case_flair.nii.gz"
    nib.save(nib.Nifti1Image(target, np.diag([1.0, 1.0, 1.0, 1.0])), path)
    return path


def load(name: str, device: str) -> tuple[Detector, str]:
    """The detector of some weights; of the default sizes and untrained where none are shipped."""
    if name != checkpoint.DEFAULT or name in checkpoint.available():
        return Detector.load(name, device), name
    description = checkpoint.Description(
        name="untrained",
        sequences=("flair",),
        grid={"mm": 1.0, "multiple": 16},
        schedule={"steps": 1000, "kind": "cosine", "prediction": "sample"},
        autoencoder=dataclasses.asdict(AutoencoderConfig()),
        denoiser=dataclasses.asdict(DenoiserConfig()),
        discrepancy_scale=4.0,
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "untrained.safetensors"
        checkpoint.save(checkpoint.build(description), path)
        return Detector.load(path, str(pick_device(device))), "untrained"


class Parts:
    """Seconds spent inside named parts; on a GPU each part ends with a synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.wait()
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.wait()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

    @contextmanager
    def inside(self, owner: Any, attribute: str, name: str) -> Iterator[None]:
        """Every call of owner.attribute is the part `name`."""
        with self._replaced(owner, attribute, lambda plain: self._timed(plain, name)):
            yield

    @contextmanager
    def returned(self, owner: Any, attribute: str, name: str) -> Iterator[None]:
        """Every call of what owner.attribute returns is the part `name`."""

        def wrapped(plain: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._timed(plain(*args, **kwargs), name)

        with self._replaced(owner, attribute, wrapped):
            yield

    def _timed(self, plain: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return plain(*args, **kwargs)

        return timed

    @staticmethod
    @contextmanager
    def _replaced(owner: Any, attribute: str, by: Callable[[Any], Any]) -> Iterator[None]:
        plain = getattr(owner, attribute)
        setattr(owner, attribute, by(plain))
        try:
            yield
        finally:
            setattr(owner, attribute, plain)


def split_in_parts(detector: Detector, path: Path, folder: Path) -> dict[str, float]:
    """Seconds of each part of one detection. On a GPU the sampling loop is one graph, and one part."""
    system = detector.system
    parts = Parts(system.device)
    with ExitStack() as loop, parts.part("whole, file to files"):
        with parts.part("read"):
            volume = Volume.read(path, require=detector.description.sequences)
        if system.device.type == "cuda":
            loop.enter_context(parts.inside(Session, "run", "networks, one graph a batch"))
        else:
            loop.enter_context(parts.inside(system.denoiser, "patches", "denoiser"))
            loop.enter_context(parts.inside(ops, "denoise_step", "update"))
        before = dict(parts.seconds)
        with (
            parts.inside(detecting, "extract", "prepare"),
            parts.inside(ensemble, "discrepancies", "auto-encoders, X and Y"),
            parts.inside(system.condition, "forward", "condition network"),
            parts.inside(ops, "ensemble_update", "statistics"),
            parts.part("detect"),
        ):
            detection = detector.detect(volume)
        named = sum(parts.seconds.values()) - sum(before.values()) - parts.seconds["detect"]
        with parts.part("write"):
            detection.save(folder, overwrite=True)
            detection.overlay(folder / "overlay.png")
    parts.seconds["everything else"] = parts.seconds.pop("detect") - named
    return parts.seconds


def middle(slices: Slices, count: int) -> Slices:
    """The middle `count` slices."""
    first = max(0, (len(slices) - count) // 2)
    part = slice(first, first + count)
    return dataclasses.replace(
        slices, image=slices.image[part], brain=slices.brain[part], index=slices.index[part]
    )


def peaks(device: str) -> dict[str, float]:
    """FLOP/s of a convolution like the network's and of a matrix product, in float32 and bfloat16."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(8, 64, 96, 96, device=device).to(dtype, memory_format=torch.channels_last)
        w = torch.randn(64, 64, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
        m = torch.randn(2048, 2048, device=device).to(dtype)
        with torch.inference_mode():
            seconds = alternate(
                {
                    "convolution": lambda x=x, w=w: functional.conv2d(x, w, padding=1),
                    "matrix product": lambda m=m: m @ m,
                },
                device,
                7,
            )
        work = {"convolution": 2 * x.numel() * 64 * 9, "matrix product": 2 * 2048**3}
        rates |= {f"{name}, {str(dtype)[6:]}": work[name] / seconds[name] for name in work}
    return rates


@contextmanager
def fused_on(*devices: str) -> Iterator[None]:
    """Convolutions are fused on these devices, and on no other."""
    kept, FusedConv2d.fused_on = FusedConv2d.fused_on, devices
    try:
        yield
    finally:
        FusedConv2d.fused_on = kept


def flops(detector: Detector, slices: Slices, config: SamplingConfig) -> int:
    """Multiplications and additions of the networks in one `detect_slices`; counted on the CPU, where no
    replayed graph hides them, with convolutions fused as on the detector's device."""
    system = detector.system
    parts = {name: copy.deepcopy(part).cpu() for name, part in system.parts().items()}
    fused = ("cpu",) if system.device.type in FusedConv2d.fused_on else ()
    with FlopCounterMode(display=False) as counter, fused_on(*fused):
        detect_slices(dataclasses.replace(system, **parts), slices, config)
    return int(counter.get_total_flops())


def fusion(detector: Detector, slices: Slices) -> float:
    """Time of auto-encoders and condition network without fused convolutions, over their time with them."""
    system, condition = detector.system, detector.system.condition.config
    planes = slices.planes(condition.context, condition.mirrored).to(system.device)

    def run(*devices: str) -> None:
        with fused_on(*devices):
            ensemble.condition_on(system, planes)

    kind = system.device.type
    with torch.inference_mode():
        seconds = alternate({"plain": run, "fused": lambda: run(kind)}, kind, 7)
    return seconds["plain"] / seconds["fused"]


def scaling(detector: Detector, slices: Slices) -> dict[str, float]:
    """Seconds of `detect_slices` over S, N, slices, batch and threads, one changed at a time."""
    default = detector.sampling_config()
    results: dict[str, float] = {}

    def measure(name: str, config: SamplingConfig, part: Slices) -> None:
        work = {name: lambda: detector.session.run(part, config).cpu()}
        results[name] = alternate(work, detector.system.device.type, 1, warm=1)[name]

    def changed(**options: int) -> SamplingConfig:
        return dataclasses.replace(default, **options)

    measure(f"{len(slices)} slices, S = {default.samples}, N = {default.steps}", default, slices)
    for samples in (1, 2 * default.samples):
        measure(f"S = {samples}", changed(samples=samples), slices)
    for steps in sorted(set(STEPS) - {default.steps}):
        measure(f"N = {steps}", changed(steps=steps), slices)
    for count in (len(slices) // 4, len(slices) // 2):
        measure(f"{count} slices", default, middle(slices, count))
    for batch in (1, 4, 16):
        measure(f"batch = {batch}", changed(batch=batch), slices)
    threads = torch.get_num_threads()
    if detector.system.device.type == "cpu" and threads > 1:
        torch.set_num_threads(1)
        measure("1 thread", default, slices)
        torch.set_num_threads(threads)
    return results


def from_shell(weights: str, device: str, path: Path, folder: Path, cohort: int) -> dict[str, float]:
    """Wall time of `ddmd detect` as processes of their own: one volume, and a folder of `cohort` copies of it.

    Volumes a minute are those of the folder beyond the first: what the start costs is in neither.
    """
    suffix = "".join(path.suffixes[-2:])
    inputs = folder / "cohort"
    for number in range(cohort):
        (inputs / f"case{number}").mkdir(parents=True)
        shutil.copy(path, inputs / f"case{number}" / f"flair{suffix}")
    seconds = []
    for name, source in (("one", path), ("many", inputs)):
        command = [sys.executable, "-m", "ddmd", "detect", str(source), "-o", str(folder / f"results-{name}"),
                   "--weights", weights, "--device", device]  # fmt: skip
        begun = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - begun)
    one, many = seconds
    results = {"one volume, from the shell (s)": one, f"a cohort of {cohort}, from the shell (s)": many}
    if cohort > 1 and many > one:
        results["volumes a minute, beyond the first"] = 60 * (cohort - 1) / (many - one)
    return results


def measured(
    detector: Detector, name: str, count: int | None, steps: tuple[int, ...], cohort: int, compiling: bool
) -> dict[str, Any]:
    """Everything that goes into the results file.

    Parameters
    ----------
    detector : Detector
    name : of its weights
    count : slices that are compared with the rivals, the middle ones; None for all
    steps : N of the comparisons
    cohort : volumes of the folder that is detected from the shell; 0 leaves the shell out
    compiling : whether torch.compile takes part
    """
    device = detector.system.device.type
    shell: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = volume_file(Path(folder))
        if cohort and name in checkpoint.available():
            shell = from_shell(name, device, path, Path(folder), cohort)
        detector.detect(path)  # compiles, captures, fills the caches
        runs = [split_in_parts(detector, path, Path(folder)) for _ in range(PROFILE_RUNS)]
        volume = Volume.read(path, require=detector.description.sequences)
    parts = sorted(runs, key=lambda run: run["whole, file to files"])[len(runs) // 2]
    peak_memory = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if device == "cuda":
        peak_memory["device"] = torch.cuda.max_memory_allocated(detector.system.device) / 2**20
    slices = extract(volume, detector.description.sequences, detector.description.slice_grid)
    chosen = slices if count is None else middle(slices, count)
    default = detector.sampling_config()
    own_seconds: dict[int, float] = {}
    ratios: dict[str, float] = {}
    missing: dict[str, str] = {}
    for n in sorted({default.steps, *steps}):
        seconds, reasons = compare(detector.system, chosen, dataclasses.replace(default, steps=n), compiling)
        own_seconds[n] = seconds.pop("ours")
        ratios |= {f"{rival}, N = {n}": value / own_seconds[n] for rival, value in seconds.items()}
        missing |= {f"{rival}, N = {n}": reason for rival, reason in reasons.items()}
    ours = own_seconds[default.steps]
    ratios["auto-encoders, one slice and member at a time"] = autoencoders_one_by_one(detector.system, chosen)
    ratios["auto-encoders and condition network, no convolution fused"] = fusion(detector, chosen)
    work, limits = flops(detector, chosen, compared(default)), peaks(device)
    with fused_on():
        plain = flops(detector, chosen, compared(default))
    best = max(limits[f"convolution, {kind}"] for kind in ("float32", "bfloat16"))
    return {
        "machine": machine(), "date": str(datetime.date.today()), "device": device, "shape": SHAPE,
        "torch": torch.__version__, "threads": torch.get_num_threads(), "weights": name,
        "sampling": dataclasses.asdict(default), "parts": parts, "shell": shell, "peak_MiB": peak_memory,
        "slices_compared": len(chosen), "ours_seconds": ours,
        "ours_seconds_by_steps": {str(n): value for n, value in own_seconds.items()}, "rivals": ratios,
        "missing": missing, "flops": work, "flops_per_second": work / ours, "peaks": limits,
        "share_of_convolution_peak": work / ours / best,
        "share_of_convolution_peak, counting what fusing saves": plain / ours / best,
        "scaling": scaling(detector, chosen),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default=checkpoint.DEFAULT)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--slices", default="32", help="slices compared with the rivals, or all")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="N of the comparisons")
    parser.add_argument("--cohort", type=int, default=4, help="volumes of a folder; 0 leaves the shell out")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    detector, name = load(options.weights, options.device)
    count = None if options.slices == "all" else int(options.slices)
    result = measured(detector, name, count, tuple(options.steps), options.cohort, not options.no_compile)
    options.output.mkdir(parents=True, exist_ok=True)
    target = options.output / f"volume-{result['machine']}-{result['date']}.json"
    write_text(target, json_text(result))
    peak = ", ".join(f"{value:.0f} MiB ({where})" for where, value in result["peak_MiB"].items())
    print(f"{result['parts']['whole, file to files']:.1f} s, peak {peak}: {target}")


if __name__ == "__main__":
    main()
