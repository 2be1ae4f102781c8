"""One 240 x 240 x 155 volume from file to written maps, part by part, from the shell, and against MONAI and diffusers.

`python -m benchmarks.end_to_end [--sections NAME ...] [--slices Z ...] [--steps N ...] [--rivals WORD ...] [--without WORD ...]
[--rounds R] [--limit SECONDS] [--weights W] [--device D] [--output FOLDER]`.

Everything goes into volume-MACHINE-DATE.json as soon as it is measured. With the same options a run that was stopped,
or that reached its limit, goes on. Networks are made once; first calls, which compile and capture, are kept apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from benchmarks import comparison, network_work, shell
from benchmarks.result_file import ROOT, ResultFile, commit
from benchmarks.rivals import Rivals, chosen_names, compared
from benchmarks.timing import cost, machine
from benchmarks.volume_parts import split_in_parts
from ddmd.inference.detector import Detector, pick_device
from ddmd.inference.session import SamplingConfig
from ddmd.inference.slices import Slices, extract
from ddmd.io.volume import Volume
from ddmd.models import checkpoint
from ddmd.models.autoencoder import AutoencoderConfig
from ddmd.models.denoiser import DenoiserConfig

SHAPE = (240, 240, 155)
RESULTS = Path(__file__).with_name("results")
COMPUTED = ((6, 1), (5, 10), (64, 1))  # (S, N) of a whole volume's computation
# What is affordable on each device
SLOWEST = ("every step", "compiled")  # words in the names of rivals that take, or are made, longest
LEFT_OUT = {"cpu": SLOWEST, "cuda": ()}
DEFAULT_STEPS = {"cpu": (1, 5), "cuda": (1, 5, 10)}
DEFAULT_SLICES = {"cpu": ("32",), "cuda": ("32", "all")}
DEFAULT_ROUNDS = {"cpu": 3, "cuda": 9}


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


def middle(slices: Slices, count: int) -> Slices:
    """The middle `count` slices."""
    first = max(0, (len(slices) - count) // 2)
    part = slice(first, first + count)
    fields = ("image", "brain", "region", "index")
    return dataclasses.replace(slices, **{name: getattr(slices, name)[part] for name in fields})


class Measurement:
    """One run of the benchmark: a detector, a volume, and the file that takes the results.

    Parameters
    ----------
    detector : Detector
    weights : its name
    results : ResultFile
    rounds : of everything that is repeated
    end : time.monotonic() after which nothing more is begun
    """

    def __init__(
        self, detector: Detector, weights: str, results: ResultFile, rounds: int, end: float
    ) -> None:
        self.detector, self.weights, self.results = detector, weights, results
        self.rounds, self.end = rounds, end
        self.device = detector.system.device.type
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        self.path = volume_file(self.folder)
        self.rivals = Rivals(detector.system)
        description = detector.description
        volume = Volume.read(self.path, require=description.sequences)
        self.slices = extract(volume, description.sequences, description.slice_grid)

    @property
    def over(self) -> bool:
        """Whether the time is used up."""
        return time.monotonic() > self.end

    def compare(self, counts: Sequence[str], steps: Sequence[int], names: Sequence[str]) -> None:
        """Ours against the rivals: seconds of every round. The slowest come last, in rounds of their own with ours."""
        default = self.detector.sampling_config()
        slowest = [name for name in names[1:] if any(word in name for word in SLOWEST)]
        groups = {"": [name for name in names if name not in slowest], ", the slowest": [names[0], *slowest]}
        for suffix, group in groups.items():
            for count, n in itertools.product(counts, steps):
                if len(group) < 2 or self.over:
                    continue
                chosen = self.slices if count == "all" else middle(self.slices, int(count))
                key = f"{len(chosen)} slices, N = {n}{suffix}"
                print(f"rivals, {key}", flush=True)
                stored = self.results.get("comparisons", {})

                def keep(result: comparison.Stored, stored: Any = stored, key: str = key) -> None:
                    self.results.put("comparisons", stored | {key: result})

                config = dataclasses.replace(default, steps=n)
                comparison.compare(
                    self.rivals, chosen, config, group, self.rounds, stored.get(key), keep, self.end
                )

    def parts(self) -> None:
        """Wall and CPU seconds of each part of a detection, in the median run; peak memory."""
        if "parts" in self.results:
            return
        print("parts of one volume", flush=True)
        self.detector.detect(self.path)  # compiles, captures, fills the caches
        runs = [split_in_parts(self.detector, self.path, self.folder / "maps") for _ in range(self.rounds)]
        clock = 0 if self.device == "cuda" else 1
        middle_run = sorted(runs, key=lambda run: run["whole, file to files"][clock])[len(runs) // 2]
        self.results.put("parts", {name: wall for name, (wall, _) in middle_run.items()})
        self.results.put("parts_cpu", {name: cpu for name, (_, cpu) in middle_run.items()})
        peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        if self.device == "cuda":
            peak["device"] = torch.cuda.max_memory_allocated(self.detector.system.device) / 2**20
        self.results.put("peak_MiB", peak)

    def shell(self, cohort: int) -> None:
        """`ddmd detect` as processes of their own: one volume, and a folder of `cohort` copies of it."""
        if "shell" in self.results or not cohort or self.weights not in checkpoint.available():
            return
        print(f"from the shell: one volume, a folder of {cohort}", flush=True)
        self.results.put("shell", from_shell(self.weights, self.device, self.path, self.folder, cohort))

    def computation(self) -> None:
        """Seconds of `Session.run` for a whole volume, from slices to maps on the CPU, for some S and N."""
        chosen = self.slices if self.device == "cuda" else middle(self.slices, 32)
        default = self.detector.sampling_config()
        for samples, steps in COMPUTED:
            config = dataclasses.replace(default, samples=samples, steps=steps)
            self._once("computation", f"{len(chosen)} slices, S = {samples}, N = {steps}", config, chosen)

    def scaling(self) -> None:
        """Seconds over S, N, slices and batch, one changed at a time."""
        default = self.detector.sampling_config()
        chosen = middle(self.slices, 32)

        def changed(**options: int) -> SamplingConfig:
            return dataclasses.replace(default, **options)

        name = f"{len(chosen)} slices, S = {default.samples}, N = {default.steps}"
        self._once("scaling", name, default, chosen)
        for samples in (1, 2 * default.samples):
            self._once("scaling", f"S = {samples}", changed(samples=samples), chosen)
        for steps in sorted({1, 5, 10} - {default.steps}):
            self._once("scaling", f"N = {steps}", changed(steps=steps), chosen)
        for count in (len(chosen) // 4, len(chosen) // 2):
            self._once("scaling", f"{count} slices", default, middle(self.slices, count))
        for batch in (1, 4, 16):
            self._once("scaling", f"batch = {batch}", changed(batch=batch), chosen)

    def work(self) -> None:
        """What batching and fusing save, and how near the networks come to the device's own peak."""
        chosen = middle(self.slices, 32)
        steps = compared(self.detector.sampling_config())

        def share_of_peak() -> dict[str, float]:
            _, cpu = cost(lambda: self.detector.session.run(chosen, steps).cpu(), self.device)
            wall, cpu = cost(lambda: self.detector.session.run(chosen, steps).cpu(), self.device)
            seconds = wall if self.device == "cuda" else cpu / torch.get_num_threads()
            flops, peaks = network_work.flops(self.detector, chosen, steps), network_work.peaks(self.device)
            best = max(peaks[f"convolution, {kind}"] for kind in ("float32", "bfloat16"))
            return {
                "flops": flops,
                "seconds": seconds,
                "share_of_convolution_peak": flops / seconds / best,
                **peaks,
            }

        self._kept("work", share_of_peak)
        one_by_one = "auto-encoders, one slice and member at a time"
        ratios: dict[str, Callable[[], float]] = {
            one_by_one: lambda: network_work.autoencoders_one_by_one(self.detector.system, chosen),
            "auto-encoders and condition network, no convolution fused": lambda: network_work.fusion(
                self.detector, chosen
            ),
        }
        for name, measure in ratios.items():
            done = self.results.get("networks", {})
            if name not in done and not self.over:
                print(name, flush=True)
                self.results.put("networks", done | {name: measure()})

    def _kept(self, key: str, measure: Callable[[], Any]) -> None:
        if key not in self.results and not self.over:
            print(key, flush=True)
            self.results.put(key, measure())

    def _once(self, section: str, name: str, config: SamplingConfig, slices: Slices) -> None:
        """Seconds of `Session.run`, the median of the rounds after a warm one: wall, and on a CPU those of its cores."""
        done = self.results.get(section, {})
        if name in done or self.over:
            return

        def run() -> object:
            return self.detector.session.run(slices, config).cpu()

        run()
        costs = [cost(run, self.device) for _ in range(self.rounds)]
        wall, cpu = (float(np.median(values)) for values in zip(*costs, strict=True))
        print(f"{section}, {name}: {wall:.3f} s, {cpu:.3f} CPU s", flush=True)
        self.results.put(section, done | {name: {"wall_s": wall, "cpu_s": cpu}})


def from_shell(weights: str, device: str, path: Path, folder: Path, cohort: int) -> dict[str, Any]:
    """Cost of `ddmd detect` as processes of their own: one volume, and a folder of `cohort` copies of it.

    Volumes a minute are those of the folder beyond the first: what the start costs is in neither.
    """
    suffix = "".join(path.suffixes[-2:])
    inputs = folder / "cohort"
    for number in range(cohort):
        (inputs / f"case{number}").mkdir(parents=True)
        shutil.copy(path, inputs / f"case{number}" / f"flair{suffix}")
    options = ("--weights", weights, "--device", device)
    one, many = (
        shell.run(ROOT, source, folder / f"results-{name}", torch.get_num_threads(), options=options)
        for name, source in (("one", path), ("many", inputs))
    )
    results: dict[str, Any] = {
        "one volume": dataclasses.asdict(one), f"a folder of {cohort} volumes": dataclasses.asdict(many),
    }  # fmt: skip
    if cohort > 1 and many.wall_s > one.wall_s:
        results["volumes a minute, beyond the first"] = 60 * (cohort - 1) / (many.wall_s - one.wall_s)
    return results


SECTIONS = ("rivals", "computation", "parts", "shell", "work", "scaling")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    add("--slices", nargs="+", help="slices compared with the rivals: numbers, or all")
    add("--steps", type=int, nargs="+", help="N of the comparisons")
    add("--rivals", nargs="+", default=[], metavar="WORD", help="those whose names contain one; default: all")
    add(
        "--without",
        nargs="+",
        metavar="WORD",
        help="rivals that are left out; on a CPU the slowest, by default",
    )
    add("--rounds", type=int, help="of everything that is repeated")
    add("--limit", type=float, default=float("inf"), metavar="SECONDS", help="nothing is begun after them")
    add("--cohort", type=int, default=4, help="volumes of the folder; 0 leaves the shell out")
    add("--weights", default=checkpoint.DEFAULT)
    add("--device", default="auto")
    add("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    end = time.monotonic() + options.limit
    detector, name = load(options.weights, options.device)
    device = detector.system.device.type
    without = (() if options.rivals else LEFT_OUT[device]) if options.without is None else options.without
    names = chosen_names(options.rivals, without)
    rounds = options.rounds or DEFAULT_ROUNDS[device]
    settings = {
        "kind": "volume", "machine": machine(device), "device": device, "torch": torch.__version__,
        "threads": torch.get_num_threads(), "commit": commit(), "weights": name, "shape": SHAPE,
        "sampling": dataclasses.asdict(detector.sampling_config()), "sides": names,
    }  # fmt: skip
    path = options.output / f"volume-{settings['machine']}-{datetime.date.today()}.json"
    measurement = Measurement(detector, name, ResultFile(path, settings), rounds, end)
    run: dict[str, Callable[[], None]] = {
        "rivals": lambda: measurement.compare(
            options.slices or DEFAULT_SLICES[device], options.steps or DEFAULT_STEPS[device], names
        ),
        "computation": measurement.computation, "parts": measurement.parts,
        "shell": lambda: measurement.shell(options.cohort), "work": measurement.work,
        "scaling": measurement.scaling,
    }  # fmt: skip
    for section in options.sections:
        if measurement.over:
            print(f"left out after {options.limit:.0f} s: {section}")
            continue
        run[section]()
    print(path)


if __name__ == "__main__":
    main()
