"""Compile every kernel ahead of time for GPUs that are not here, and read the machine code.

`python -m tests.sass --write` renews sass_baseline.json after a change that is meant to cost
instructions. Runs without TRITON_INTERPRET; the test starts it as a process of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BASELINE = Path(__file__).with_name("sass_baseline.json")
CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHITECTURES = (80, 90, 100)
GROWTH = 1.10  # a kernel may take this many times its baseline's instructions

F, H, I64, I = "*fp32", "*bf16", "*i64", "i32"


def triton_kernels(architecture: int = 90) -> dict[str, tuple[Any, dict[str, str], dict[str, Any], bool]]:
    """name -> kernel, signature, constants, whether 128-bit loads are promised."""
    from ddmd.kernels import (
        denoise,
        discrepancy,
        group_norm,
        group_norm_backward,
        kl_divergence,
        pairwise_distance,
        partial_sums,
        tiles,
    )

    rows = {
        "table_ptr": F,
        "step_ptr": I64,
        "seed_ptr": I64,
        "sample_ptr": I64,
        "slice_ptr": I64,
        "row_size": I,
        "table_rows": I,
    }
    tile = {"pixels": I, "channels": I, "chunks": I}
    table: dict[str, tuple[Any, dict[str, str], dict[str, Any], bool]] = {}
    for kind, t in (("f32", F), ("bf16", H)):
        step = {"x_ptr": t, "output_ptr": t, "x0_ptr": t, **rows}
        for previous in (False, True):
            table[f"denoise_step_{kind}{'_2m' if previous else ''}"] = (
                denoise.denoise_step_fwd_kernel, step,
                {"HAS_PREVIOUS_X0": previous, "BP": denoise.POSITIONS, "FAST": True}, True,
            )  # fmt: skip
        table[f"noise_{kind}"] = (
            denoise.noise_fwd_kernel, {"x0_ptr": t, "x_ptr": t, "t_ptr": I64, **rows},
            {"BP": denoise.POSITIONS, "FAST": True}, True,
        )  # fmt: skip
        coordinates = {
            name: rows[name] for name in ("step_ptr", "seed_ptr", "sample_ptr", "slice_ptr", "row_size")
        }
        table[f"pure_noise_{kind}"] = (
            denoise.pure_noise_fwd_kernel, {"x_ptr": t, **coordinates},
            {"BP": denoise.POSITIONS, "FAST": True}, False,
        )  # fmt: skip
        table[f"discrepancy_maps_{kind}"] = (
            discrepancy.discrepancy_maps_fwd_kernel,
            {"a_ptr": t, "b_ptr": t, "inter_ptr": F, "intra_ptr": F, "slices": I, "channels": I, "pixels": I},
            {"KA": 3, "KB": 3, "BLOCK": discrepancy.PIXELS}, True,
        )  # fmt: skip
        four = {"mu_q_ptr": t, "logvar_q_ptr": t, "mu_p_ptr": t, "logvar_p_ptr": t}
        for reduced in (False, True):
            table[f"gaussian_kl_{kind}{'_sum' if reduced else '_map'}"] = (
                kl_divergence.gaussian_kl_fwd_kernel, {**four, "out_ptr": F, "n": I},
                {"ELEMENTWISE": not reduced, "BLOCK": kl_divergence.BLOCK}, True,
            )  # fmt: skip
        table[f"gaussian_kl_backward_{kind}"] = (
            kl_divergence.gaussian_kl_bwd_kernel,
            {"grad_ptr": F, **four, **{f"d_{k}": v for k, v in four.items()}, "scale": "fp32", "n": I},
            {"ELEMENTWISE": True, "BLOCK": kl_divergence.BLOCK}, True,
        )  # fmt: skip
        of = {"centroid_ptr": F, "count_ptr": F}
        shape, block = {"n": I, "d": I}, {"BN": 32, "BD": 128}
        table[f"centroid_{kind}"] = (
            pairwise_distance.centroid_fwd_kernel, {"z_ptr": t, "group_ptr": I64, **of, **shape}, block, True
        )  # fmt: skip
        size = 4 if t == F else 2
        sums, resident, whole = (
            tiles.table((architecture // 10, architecture % 10))[kind_of, size]
            for kind_of in ("sums", "resident", "elementwise")
        )
        columns = 512 // size
        for split in (False, True):
            table[f"pairwise_sqdist{'_split' if split else ''}_{kind}"] = (
                pairwise_distance.pairwise_sqdist_fwd_kernel,
                {"z_ptr": t, "group_ptr": I64, "partial_ptr": F, "mean_ptr": F, "m2_ptr": F, "count_ptr": F, **shape,
                 "groups": I, "chunks": I, "chunk_rows": I},
                {"SPLIT": split, "BN": sums.elements // columns, "BD": columns, "U": sums.unroll, "IDS": 512,
                 "num_warps": sums.warps}, True,
            )  # fmt: skip
        table[f"pairwise_sqdist_backward_{kind}"] = (
            pairwise_distance.pairwise_sqdist_bwd_kernel,
            {"grad_ptr": F, "z_ptr": t, "group_ptr": I64, **of, "d_z_ptr": t, **shape, "groups": I}, block, True,
        )  # fmt: skip
        affine = {"weight_ptr": F, "bias_ptr": F, "scale_ptr": F, "shift_ptr": F}
        slab = 32 // size
        full = 1 << (resident.elements // slab).bit_length() - 1
        rest = 256 if full + 256 <= resident.elements // slab else 0
        for residual in (False, True):
            table[f"group_norm_resident_{kind}{'_residual' if residual else ''}"] = (
                group_norm.group_norm_resident_fwd_kernel,
                {"x_ptr": t, **affine, "residual_ptr": t, "y_ptr": t, "mean_ptr": F, "rstd_ptr": F, "pixels": I,
                 "channels": I, "eps": "fp32"},
                {"HAS_SCALE": residual, "HAS_SHIFT": residual, "HAS_RESIDUAL": residual, "PER_GROUP": 8, "SLAB": slab,
                 "BP": full, "BR": rest, "BC": slab, "FAST": True, "num_warps": resident.warps}, True,
            )  # fmt: skip
        both = tiles.table((architecture // 10, architecture % 10))["resident_backward", size]
        full = 1 << (both.elements // slab).bit_length() - 1
        rest = 256 if full + 256 <= both.elements // slab else 0
        inputs = {"grad_ptr": t, "x_ptr": t, **affine, "mean_ptr": F, "rstd_ptr": F}
        for modulated in (False, True):
            table[f"group_norm_resident_backward_{kind}{'_modulated' if modulated else ''}"] = (
                group_norm_backward.group_norm_resident_bwd_kernel,
                {**inputs, "sum_ptr": F, "sum_h_ptr": F, "d_x_ptr": t, "pixels": I, "channels": I},
                {"HAS_SCALE": modulated, "HAS_SHIFT": modulated, "PER_GROUP": 8, "SLAB": slab, "BP": full, "BR": rest,
                 "BC": slab, "FAST": True, "num_warps": both.warps}, True,
            )  # fmt: skip
        extents = {
            "BP": group_norm_backward.TILE // 64,
            "BC": 64,
            "HAS_SCALE": True,
            "HAS_SHIFT": True,
            "PER_GROUP": 8,
        }
        table[f"group_norm_moments_{kind}"] = (
            group_norm.group_norm_moments_fwd_kernel,
            {"x_ptr": t, "mean_ptr": F, "m2_ptr": F, **tile, "chunk_pixels": I},
            {"BP": sums.elements // 64, "BC": 64, "U": sums.unroll, "num_warps": sums.warps}, True,
        )  # fmt: skip
        for residual in (False, True):
            table[f"group_norm_silu_{kind}{'_residual' if residual else ''}"] = (
                group_norm.group_norm_silu_fwd_kernel,
                {"x_ptr": t, "gain_ptr": F, "offset_ptr": F, "residual_ptr": t, "y_ptr": t, **tile},
                {"HAS_RESIDUAL": residual, "BP": whole.elements // 64, "BC": 64, "FAST": True,
                 "num_warps": whole.warps}, True,
            )  # fmt: skip
        table[f"group_norm_sums_backward_{kind}"] = (
            group_norm_backward.group_norm_sums_bwd_kernel,
            {**inputs, "part_ptr": F, "part_x_ptr": F, **tile, "chunk_pixels": I}, {**extents, "FAST": True}, True,
        )  # fmt: skip
        table[f"group_norm_silu_backward_{kind}"] = (
            group_norm_backward.group_norm_silu_bwd_kernel,
            {**inputs, "base_ptr": F, "tilt_ptr": F, "d_x_ptr": t, **tile}, {**extents, "FAST": True}, True,
        )  # fmt: skip
    table["group_norm_merge_backward"] = (
        group_norm_backward.group_norm_merge_bwd_kernel,
        {"part_ptr": F, "part_x_ptr": F, "weight_ptr": F, "scale_ptr": F, "rstd_ptr": F, "sum_ptr": F, "sum_h_ptr": F,
         "base_ptr": F, "tilt_ptr": F, **tile, "groups": I},
        {"HAS_SCALE": True, "BK": 8, "BG": 8}, False,
    )  # fmt: skip
    table["group_norm_affine_backward"] = (
        group_norm_backward.group_norm_affine_bwd_kernel,
        {"sum_ptr": F, "sum_h_ptr": F, "weight_ptr": F, "bias_ptr": F, "scale_ptr": F, "d_weight_ptr": F,
         "d_bias_ptr": F, "d_scale_ptr": F, "images": I, "channels": I},
        {"HAS_SCALE": True, "BN": group_norm_backward.AFFINE_IMAGES, "BC": group_norm_backward.AFFINE_CHANNELS}, False,
    )  # fmt: skip
    table["group_norm_merge"] = (
        group_norm.group_norm_merge_fwd_kernel,
        {"part_mean_ptr": F, "part_m2_ptr": F, "weight_ptr": F, "bias_ptr": F, "scale_ptr": F, "shift_ptr": F,
         "mean_ptr": F, "rstd_ptr": F, "gain_ptr": F, "offset_ptr": F, **tile, "chunk_pixels": I, "groups": I,
         "eps": "fp32"},
        {"HAS_SCALE": True, "HAS_SHIFT": True, "BK": 8, "BG": 8}, False,
    )  # fmt: skip
    table["pairwise_sqdist_merge"] = (
        pairwise_distance.pairwise_sqdist_merge_fwd_kernel,
        {"mean_ptr": F, "m2_ptr": F, "count_ptr": F, "partial_ptr": F, "d": I, "groups": I, "chunks": I},
        {"BD": 128}, False,
    )  # fmt: skip
    table["sum"] = (
        partial_sums.sum_fwd_kernel,
        {"partial_ptr": F, "out_ptr": F, "n": I, "scale": "fp32"},
        {"BLOCK": 2048},
        False,
    )
    return table


def _disassemble(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-sass", file.name], check=True, capture_output=True, text=True).stdout


def _facts(sass: str) -> dict[str, int]:
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", sass)
    opcodes = [o for o in opcodes if not o.startswith("NOP")]
    return {
        "instructions": len(opcodes),
        "loads_128": sum(o.startswith("LDG") and ".128" in o for o in opcodes),
        "loads": sum(o.startswith("LDG") for o in opcodes),
        "local": sum(o.startswith(("LDL", "STL")) for o in opcodes),
    }


def compile_triton(name: str, architecture: int, ones: bool = False) -> dict[str, int]:
    """Facts about one Triton kernel's machine code, its pointers and sizes divisible by 16.

    ones makes every size 1, which Triton turns into a constant: what is called on a size need not work on
    one.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constants, _ = triton_kernels(architecture)[name]
    if ones:
        constants = constants | {p: 1 for p, kind in signature.items() if kind == I}
        signature = {p: kind for p, kind in signature.items() if kind != I}
    constants = dict(constants)
    options = {"num_warps": constants.pop("num_warps", 4)}
    names = list(kernel.arg_names)
    full = {p: signature.get(p, "constexpr") for p in names}
    unscaled = ("fp32",)
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, p in enumerate(names)
        if p in signature and signature[p] not in unscaled
    }
    source = ASTSource(kernel, full, {(names.index(k),): v for k, v in constants.items()}, divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    facts = _facts(_disassemble(compiled.asm["cubin"]))
    if "BR" in constants:  # elements of x that a thread keeps
        facts["kept"] = (constants["BP"] + constants["BR"]) * constants["BC"] // (32 * options["num_warps"])
    return facts


def compile_cuda(source: Path, architecture: int) -> dict[str, dict[str, int]]:
    """Facts about each kernel of one .cu file."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        command = ["nvcc", "-cubin", "-O3", "-std=c++17", f"-arch=sm_{architecture}", "-o", cubin, source]
        subprocess.run(command, check=True, capture_output=True, text=True)
        sass = _disassemble(cubin.read_bytes())
    found = {}
    for part in re.split(r"\n\s*Function : ", sass)[1:]:
        mangled, body = part.split("\n", 1)
        kernel = re.search(r"\d+((?:ensemble_(?:vector|strided)|merge)_kernel)(I\w+?E)?", mangled)
        assert kernel, mangled
        kind = {"If": "_f32", "I13": "_bf16", "I6_": "_f16"}.get((kernel[2] or "")[:3].rstrip("E"), "")
        if not kind and kernel[2]:
            kind = "_f32" if kernel[2].startswith("If") else ("_bf16" if "bfloat" in kernel[2] else "_f16")
        found[f"{kernel[1].removesuffix('_kernel')}{kind}"] = _facts(body)
    return found


def compiler() -> str:
    """Triton's version without its last number: instruction counts are comparable within one."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def collect(only: int | None = None) -> dict[str, dict[str, int]]:
    """Every kernel's facts for every architecture, or for one."""
    facts = {}
    for architecture in [only] if only else ARCHITECTURES:
        for name, (_, _, _, vector) in triton_kernels(architecture).items():
            facts[f"{name} sm_{architecture}"] = {**compile_triton(name, architecture), "vector": int(vector)}
            compile_triton(name, architecture, ones=True)
        if shutil.which("nvcc"):
            for source in sorted(CSRC.glob("*.cu")):
                for name, found in compile_cuda(source, architecture).items():
                    facts[f"{name} sm_{architecture}"] = {**found, "vector": int("vector" in name)}
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="make what is found the new baseline")
    if parser.parse_args().write:
        counts = {name: f["instructions"] for name, f in collect().items()}
        baseline = {"triton": compiler(), "instructions": counts}
        BASELINE.write_text(json.dumps(baseline, indent=1, sort_keys=True) + "\n")
    else:
        json.dump(collect(), sys.stdout)


if __name__ == "__main__":
    main()
