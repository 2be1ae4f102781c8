"""Write the tables of docs/benchmarks.md from the newest results, the GPU's beside the CPU's: `python -m benchmarks.speed_tables`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import figures, goals, shell, training
from benchmarks.cards import filled
from benchmarks.figures import PREALLOCATED, Result, described
from benchmarks.result_file import ROOT
from benchmarks.table import RESULTS, markdown, times
from ddmd.io.atomic import write_text

PAGE = ROOT / "docs" / "benchmarks.md"
DEVICES = ("cuda", "cpu")
NONE = ""


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
    rows: dict[str, dict[str, str]] = {}
    head = [NONE]

    def put(row: str, device: str, cell: str) -> None:
        rows.setdefault(row, {})[device] = cell

    for device in DEVICES:
        newest = figures.newest(folder, "volume", device)
        whole = figures.newest(folder, "volume", device, having="parts")
        observed = figures.newest(folder, "observed", device)
        for name, cell in _part_cells(whole, device):
            put(name, device, cell)
        for source in (observed, newest):  # what the benchmark measures replaces what was observed before
            for name, seconds in {} if source is None else source.values.get("computation", {}).items():
                clock, unit = ("wall_s", "ms") if device == "cuda" else ("cpu_s", "CPU ms")
                put(f"computation, {name}", device, f"{1000 * seconds[clock]:.0f} {unit}")
        for name, ratio in _all_rivals(newest):
            put(name, device, times(ratio, 2))
        measured = dict.fromkeys(figures.described(one) for one in (newest, whole))
        of_device = (
            f"GPU: {next(iter(measured))}" if device == "cuda" else f"CPU: {'; parts: '.join(measured)}"
        )
        head.append(of_device)
    ordered = sorted(rows, key=_group)
    return markdown(head, [[name, *(rows[name].get(d, NONE) for d in DEVICES)] for name in ordered])


def _part_cells(result: Result | None, device: str) -> Iterator[tuple[str, str]]:
    """Parts and peak memory: their names, and their figures as text."""
    values: Mapping[str, Any] = {} if result is None else result.values
    clock, unit = ("parts_cpu", "CPU s") if device == "cpu" and "parts_cpu" in values else ("parts", "s")
    for name, seconds in values.get(clock, {}).items():
        yield name, f"{seconds:.3f} {unit}"
    for where, mib in values.get("peak_MiB", {}).items():
        yield f"peak memory, {where}", f"{mib:.0f} MiB"


def _all_rivals(result: Result | None) -> Iterator[tuple[str, float]]:
    """What each rival's row is called, and its time over ours."""
    for steps in (1, 5, 10):
        for whole in (False, True):
            for rival, ratio in figures.rival_ratios(result, steps, whole).items():
                # the reference backend of older files replayed a graph that held our kernels
                if result is not None and ("comparisons" in result.values or "reference" not in rival):
                    name = rival.replace("folded", "fused")
                    yield f"{'all' if whole else '32'} slices, N = {steps}: {name}", ratio


def _group(row: str) -> tuple[int, str]:
    """Parts first, then the whole, memory, computation and rivals, those with the same N together."""
    for number, words in enumerate(("whole", "peak memory", "computation", "slices, N")):
        if words in row:
            return number + 1, row.partition(":")[0] if number == 3 else NONE
    return 0, NONE


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
                f"{described(result)}, rounds: {f['rounds']}",
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
            rows.append(
                (
                    f"{'GPU' if device == 'cuda' else 'CPU'}: {stage}",
                    *cells,
                    f"{described(result)}, rounds: {len(rounds)}",
                )
            )
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
    of_volumes: Mapping[str, Any] = values.get("masks", {})
    counts: Mapping[str, Any] = values.get("counts", {})
    rows = []
    for window in dict.fromkeys([*counts, *(name for one in of_volumes.values() for name in one)]):
        slower = [one[window]["cpu_s"] / one["multiples of 16"]["cpu_s"] for one in of_volumes.values()]
        cells = ("not counted", "not counted")
        if window in counts:
            cells = str(counts[window]["shapes"]), times(counts[window]["area"], 2)
        dices = ", ".join(f"{one[window]['dice']:.3f}" for one in of_volumes.values())
        rows.append((window, *cells, times(sum(slower) / len(slower), 2) if slower else NONE, dices))
    names = ", ".join(values.get("masks", {}))
    head = ("windows", "shapes", "pixels", "CPU seconds", f"Dice with the masks of that commit: {names}")
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
