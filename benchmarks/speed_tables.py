"""Write the tables of docs/benchmarks.md from the newest results, the GPU's beside the CPU's: `python -m benchmarks.speed_tables`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import figures, goals, shell, training
from benchmarks.cards import filled
from benchmarks.figures import PREALLOCATED, Result
from benchmarks.result_file import ROOT
from benchmarks.table import RESULTS, markdown, times
from ddmd.io.atomic import write_text

PAGE = ROOT / "docs" / "benchmarks.md"
DEVICES = ("cuda", "cpu")
NONE = ""


def described(result: Result | None) -> str:
    """What a result was measured on, as the head of a column."""
    if result is None:
        return "not measured"
    values = result.values
    commit = (
        values.get("commit")
        or values.get("now_commit")
        or str((values.get("commit_info") or {}).get("id"))[:7]
    )
    # files of before said neither commit nor threads in every case
    of_commit = f", {commit}" if commit != "None" else NONE
    machine = values.get("machine") or result.path.stem[:-11]
    return f"{machine}{of_commit}, {result.date}"


def ops(folder: Path) -> str:
    """Ratios of each op on a GPU and on a CPU."""
    results = {device: figures.newest(folder, "ops", device) for device in DEVICES}
    infos: dict[str, dict[str, Any]] = {}
    for device, result in results.items():
        for bench in [] if result is None else result.values["benchmarks"]:
            infos.setdefault(bench["name"], {})[device] = bench["extra_info"]
    head = ["op"]
    for device in DEVICES:
        name = "GPU" if device == "cuda" else "CPU"
        head += [
            f"{name}: against eager / preallocated / torch.compile",
            f"{name}: share of a copy's bandwidth",
        ]
    rows = []
    for of_device in infos.values():
        info = next(iter(of_device.values()))
        variant = info["shape"].rpartition(") ")[2] if info["op"] == "group_norm_silu" else NONE
        channels = f", {info['shape'].split(', ')[1]} channels" if variant else NONE
        row = [f"`{info['op']}`{channels}{', ' + variant.split(',')[0] if variant else NONE}"]
        for device in DEVICES:
            row += _op_cells(of_device.get(device))
        rows.append(row)
    columns = "; ".join(f"{'GPU' if d == 'cuda' else 'CPU'}: {described(results[d])}" for d in DEVICES)
    return f"{markdown(head, rows)}\n\n{columns}."


def _op_cells(info: Mapping[str, Any] | None) -> list[str]:
    if info is None:
        return ["not measured", NONE]
    ratios = (figures.op_ratio(info, *names) for names in (("eager",), PREALLOCATED, ("compile",)))
    return [" / ".join(map(times, ratios)), f"{100 * info['share_of_copy']:.0f} %"]


def detection(folder: Path) -> str:
    """One volume: its parts, its computation, and the rivals on the same network."""
    results = {device: figures.newest(folder, "volume", device) for device in DEVICES}
    observed = figures.newest(folder, "observed", "cuda")
    rows: dict[str, dict[str, str]] = {}

    def put(row: str, device: str, cell: str) -> None:
        rows.setdefault(row, {})[device] = cell

    for device, result in results.items():
        values: Mapping[str, Any] = {} if result is None else result.values
        clock = "parts_cpu" if device == "cpu" and "parts_cpu" in values else "parts"
        unit = "CPU s" if clock == "parts_cpu" else "s"
        for name, seconds in values.get(clock, {}).items():
            put(name, device, f"{seconds:.3f} {unit}")
        for where, mib in values.get("peak_MiB", {}).items():
            put(f"peak memory, {where}", device, f"{mib:.0f} MiB")
        sources = [values] if device == "cpu" or observed is None else [observed.values, values]
        for source in sources:  # what is measured by the benchmark itself replaces what was observed before
            for name, seconds in source.get("computation", {}).items():
                of_clock = seconds["wall_s"] if device == "cuda" else seconds["cpu_s"]
                put(
                    f"computation, {name}",
                    device,
                    f"{1000 * of_clock:.0f} {'ms' if device == 'cuda' else 'CPU ms'}",
                )
        for steps in (1, 5, 10):
            for whole in (False, True):
                where = f"{'all' if whole else '32'} slices, N = {steps}"
                for rival, ratio in figures.rival_ratios(result, steps, whole).items():
                    # the reference backend of older files replayed a graph that held our kernels
                    if "comparisons" not in values and "reference" in rival:
                        continue
                    put(f"{where}: {rival.replace('folded', 'fused')}", device, times(ratio, 2))
    head = ["", *(f"{'GPU' if d == 'cuda' else 'CPU'}: {described(results[d])}" for d in DEVICES)]
    return markdown(head, [[name, *(cells.get(d, NONE) for d in DEVICES)] for name, cells in rows.items()])


def cohort(folder: Path) -> str:
    """From the shell: one volume and folders."""
    rows = []
    for result in (figures.newest(folder, "observed", "cuda"), figures.newest(folder, "volume", "cuda")):
        for name, of_input in {} if result is None else result.values.get("shell", {}).items():
            if isinstance(of_input, Mapping):
                rows.append(
                    (f"GPU: {name}", f"{of_input['wall_s']:.1f} s", NONE, NONE, NONE, described(result))
                )
    result = figures.newest(folder, "shell", "cpu")
    pairs = [] if result is None else result.values.get("pairs", [])
    for name in dict.fromkeys(pair["input"] for pair in pairs):
        f = shell.medians([pair for pair in pairs if pair["input"] == name])
        rows.append(
            (
                f"CPU: {f['volumes']} volumes, each", f"{f['base_cpu_s']:.1f} / {f['now_cpu_s']:.1f} CPU s",
                times(f["cpu_s_ratio"], 2), f"{f['base_peak_mib']:.0f} / {f['now_peak_mib']:.0f}", f"{f['dice']:.4f}",
                described(result),
            )
        )  # fmt: skip
    head = (
        "from the shell",
        "base / now",
        "ratio",
        "peak memory (MiB)",
        "lowest Dice of the masks",
        "measured on",
    )
    return markdown(head, rows)


def training_steps(folder: Path) -> str:
    """Steps of each stage of training."""
    rows = []
    observed = figures.newest(folder, "observed", "cuda")
    if observed is not None:
        seen = observed.values["training"]
        steps, busy = (
            f"{seen['autoencoder_steps_per_s']:.0f} steps a second",
            f"{100 * seen['gpu_busy']:.0f} %",
        )
        rows.append(("GPU: autoencoders_a", steps, NONE, busy, described(observed)))
    for device in DEVICES:
        result = figures.newest(folder, "training", device)
        rounds = [] if result is None else result.values.get("rounds", [])
        for stage, f in (training.medians(rounds) if rounds else {}).items():
            if device == "cuda":
                busy = f"{100 * f['gpu_busy']:.0f} %" if "gpu_busy" in f else NONE
                cells = (f"{1 / f['now_wall_s']:.1f} steps a second", NONE, busy)
            else:
                base = f"{f['base_cpu_s']:.2f} / " if "base_cpu_s" in f else NONE
                cells = (f"{base}{f['now_cpu_s']:.2f} CPU s a step", times(f.get("cpu_s_ratio"), 2), NONE)
            rows.append((f"{'GPU' if device == 'cuda' else 'CPU'}: {stage}", *cells, described(result)))
    return markdown(("stage", "base / now", "ratio", "GPU busy", "measured on"), rows)


def agreement(folder: Path) -> str:
    """Real volumes on a GPU and on a CPU: seconds, and how far the results are apart."""
    observed = figures.newest(folder, "observed", "cuda")
    volumes: Mapping[str, Any] = {} if observed is None else observed.values["real_volumes"]
    rows = [
        (
            f"{name}, {' x '.join(map(str, one['shape']))}", f"{one['first']:.2f}", f"{one['warm']:.2f}",
            f"{one['cpu16']:.2f}", f"{one['p_max']:.4f}", f"{one['dice_gpu_cpu']:.4f}",
        )
        for name, one in volumes.items()
    ]  # fmt: skip
    head = (
        "volume", "first (s)", "warm (s)", "16 CPU cores (s)", "largest difference in probability",
        "Dice of GPU against CPU mask",
    )  # fmt: skip
    return markdown(head, rows)


def shapes(folder: Path) -> str:
    """How many shapes in plane there are with several windows, and what they do to masks and time."""
    result = figures.newest(folder, "shapes", "cpu")
    values: Mapping[str, Any] = {} if result is None else result.values
    rows = []
    for window, counts in values.get("counts", {}).items():
        of_volumes = {name: one[window] for name, one in values.get("masks", {}).items()}
        today = {name: one["multiples of 16"] for name, one in values.get("masks", {}).items()}
        slower = [of_volumes[name]["cpu_s"] / today[name]["cpu_s"] for name in of_volumes]
        dices = ", ".join(f"{one['dice']:.3f}" for one in of_volumes.values())
        mean = f"{sum(slower) / len(slower):.2f}x" if slower else NONE
        rows.append((window, str(counts["shapes"]), f"{counts['area']:.2f}x", mean, dices))
    names = ", ".join(values.get("masks", {}))
    head = ("windows", "shapes", "pixels", "CPU seconds", f"Dice with today's masks: {names}")
    return markdown(head, rows)


BLOCKS = {
    "goals": goals.table, "ops": ops, "detection": detection, "cohort": cohort, "training": training_steps,
    "agreement": agreement, "shapes": shapes,
}  # fmt: skip


def page(text: str, folder: Path = RESULTS) -> str:
    """The page's text with its tables as the newest results have them."""
    return filled(text, {name: make(folder) for name, make in BLOCKS.items()})


def main() -> None:
    write_text(PAGE, page(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
