"""Every registered op: opcheck, gradients, what it refuses and how it says so, and who serves it."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from ddmd import ops
from ddmd.diffusion.schedule import Schedule
from ddmd.ops import reference, registry
from tests.shapes import assert_close, rows


def _arguments(op: str, dtype=torch.float32):
    x = torch.randn(3, 1, 5, 6).to(dtype)
    table = torch.rand(4, 8)
    w, b = torch.randn(8), torch.randn(8)
    image = torch.randn(2, 8, 5, 6).to(dtype).contiguous(memory_format=torch.channels_last)
    return {
        "noise": (x, torch.tensor([0, 1, 3]), torch.rand(4, 2), *rows(3)),
        "pure_noise": ([3, 1, 5, 6], *rows(3), dtype),
        "denoise_step": (x, torch.randn(3, 1, 5, 6), table, *rows(3), torch.randn(3, 1, 5, 6).to(dtype)),
        "discrepancy_maps": (torch.randn(2, 3, 1, 4, 5).to(dtype), torch.randn(3, 3, 1, 4, 5).to(dtype)),
        "gaussian_kl": (*(torch.randn(4, 3).to(dtype) for _ in range(4)), "mean"),
        "pairwise_sqdist": (torch.randn(6, 3).to(dtype), torch.tensor([0, 1, 0, 1, 1, 0]), 2),
        "ensemble_variance": (torch.randn(4, 3, 5).to(dtype),),
        "ensemble_update": (torch.randn(3, 5), torch.rand(3, 5), 2, torch.randn(4, 3, 5).to(dtype)),
        "ensemble_merge": (torch.randn(9), torch.rand(9), 2, torch.randn(9), torch.rand(9), 3),
        "group_norm_silu": (image, 4, w, b, torch.randn(2, 8), torch.randn(2, 8), image.clone(), 1e-5),
    }[op]


@pytest.mark.parametrize("op", ops.OPS)
def test_op_passes_opcheck(op, monkeypatch):
    monkeypatch.undo()  # opcheck compares outputs of functions that may leave padding unwritten
    result = torch.library.opcheck(getattr(torch.ops.ddmd, op).default, _arguments(op))
    assert set(result.values()) == {"SUCCESS"}


def test_gradients_are_those_of_finite_differences():
    def double(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    check = torch.autograd.gradcheck
    for reduction in ("none", "sum", "mean"):
        assert check(lambda *t, r=reduction: ops.gaussian_kl(*t, r), tuple(double(2, 3) for _ in range(4)))
    group = torch.tensor([0, 1, 1, 0, 2])
    assert check(lambda z: ops.pairwise_sqdist(z, group, 3), (double(5, 3),))
    assert check(
        lambda x, w, b, s, h, r: ops.group_norm_silu(x, 2, w, b, scale=s, shift=h, residual=r),
        (double(2, 4, 3, 2), double(4), double(4), double(2, 4), double(2, 4), double(2, 4, 3, 2)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_norm_trains_as_torchs_own_does(dtype, layout):
    x = torch.randn(3, 8, 6, 7).to(dtype).contiguous(memory_format=layout)
    leaves = [
        t.requires_grad_()
        for t in (x.clone(memory_format=torch.preserve_format), torch.randn(8), torch.randn(8))
    ]
    grad = torch.randn_like(x)
    ours = torch.autograd.grad(ops.group_norm_silu(leaves[0], 2, *leaves[1:]), leaves, grad)
    plain = torch.nn.functional.group_norm(leaves[0].double(), 2, *(t.double() for t in leaves[1:]), 1e-5)
    theirs = torch.autograd.grad(torch.nn.functional.silu(plain), leaves, grad.double())
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, dtype)


def test_forcing_the_reference_changes_the_backend_and_not_the_result():
    x = torch.randn(4, 100)
    fast = ops.ensemble_variance(x)
    with ops.backend("reference"):
        assert ops.serving("ensemble_variance", "cpu") == ("reference", "DDMD_BACKEND=reference")
        plain = ops.ensemble_variance(x)
    for a, b in zip(fast, plain, strict=True):
        assert_close(a, b)
    with pytest.raises(ValueError, match="allowed are 'auto' and 'reference'"), ops.backend("fast"):
        pass


def test_rows_cut_into_batches_give_the_same_bits():
    x, out = torch.randn(7, 1, 9, 11), torch.randn(7, 1, 9, 11)
    step, seed, sample, place = rows(7)
    table = Schedule().sampler(4, "ddpm")
    whole = ops.denoise_step(x.clone(), out, table, step, seed, sample, place)
    for cut in (1, 2, 3):
        parts = [
            ops.denoise_step(x[i : i + cut].clone(), out[i : i + cut], table, step, seed, sample[i : i + cut], place[i : i + cut])
            for i in range(0, 7, cut)
        ]  # fmt: skip
        assert torch.equal(whole, torch.cat(parts))


def _zeros(count: int) -> torch.Tensor:
    """bfloat16 zeros of which only what is written to takes memory."""
    return torch.from_numpy(np.zeros(count, np.uint16)).view(torch.bfloat16)


@pytest.mark.parametrize(("shape", "strides"), [((2, 1000), (2**31, 1)), ((3, 2, 50), (1000, 2**31, 3))])
def test_strides_beyond_32_bits(shape, strides):
    samples = _zeros(2**31 + 2**12).as_strided(shape, strides)
    samples.copy_(torch.randn(shape))
    for got, wanted in zip(
        ops.ensemble_variance(samples), reference.ensemble_variance(samples.clone()), strict=True
    ):
        assert_close(got, wanted)


def test_more_than_two_billion_elements():
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 14 * 2**30:
        pytest.skip(f"needs 14 GiB of free memory, of which there are {free / 2**30:.0f}")
    x, out = (_zeros(2**31 + 64).view(1, -1) for _ in range(2))
    tail, tail_out = torch.randn(1, 64).to(x.dtype), torch.randn(1, 64).to(x.dtype)
    x[:, -64:], out[:, -64:] = tail, tail_out
    table, at = Schedule().sampler(4, "ddim"), rows(1)
    ops.denoise_step(x, out, table, *at)
    reference.denoise_step(tail, tail_out, table, *at)
    assert_close(x[:, -64:], tail, torch.bfloat16)
    assert not x[:, :64].any()


WRONG = {
    "wrong dtype": (lambda: ops.ensemble_variance(torch.ones(3, 2, dtype=torch.int64)), TypeError,
                    r"samples has dtype torch.int64; allowed are float32, bfloat16 and float16"),
    "one sample": (lambda: ops.ensemble_variance(torch.ones(1, 2)), ValueError,
                   r"samples has shape \(1, 2\); allowed is \(S, \.\.\.\) with S at least 2 for correction=1"),
    "correction": (lambda: ops.ensemble_variance(torch.ones(3, 2), correction=2), ValueError,
                   "correction is 2; allowed are 0 and 1"),
    "grad": (lambda: ops.ensemble_variance(torch.ones(3, 2, requires_grad=True)), ValueError,
             "samples requires grad, and ensemble_variance has no gradient"),
    "shape": (lambda: ops.discrepancy_maps(torch.ones(2, 3, 1, 4, 4), torch.ones(2, 3, 1, 4, 5)), ValueError,
              r"recon_b has shape \(2, 3, 1, 4, 5\); allowed is \(2, 3, 1, 4, 4\)"),
    "device": (lambda: ops.gaussian_kl(torch.ones(2), torch.ones(2, device="meta"), torch.ones(2), torch.ones(2)),
               ValueError, "logvar_q is on meta; allowed is cpu"),
    "reduction": (lambda: ops.gaussian_kl(*[torch.ones(2)] * 4, "max"), ValueError, "reduction is 'max'"),
    "groups": (lambda: ops.group_norm_silu(torch.ones(1, 6, 2, 2), 4, torch.ones(6), torch.ones(6)), ValueError,
               "num_groups is 4; allowed is a divisor of the 6 channels"),
    "group ids": (lambda: ops.pairwise_sqdist(torch.ones(2, 3), torch.tensor([0, 2]), 2), ValueError,
                  "group holds 2; allowed are 0 to 1"),
    "table": (lambda: ops.denoise_step(torch.ones(2, 3), torch.ones(2, 3), torch.ones(4, 6), *rows(2)), ValueError,
              r"table has shape \(4, 6\); allowed is \(N, 8\)"),
    "step type": (lambda: ops.denoise_step(torch.ones(2, 3), torch.ones(2, 3), torch.ones(4, 8), torch.tensor(1.0),
                  *rows(2)[1:]), ValueError, "step has dtype torch.float32; allowed is int64"),
    "step": (lambda: ops.denoise_step(torch.ones(2, 3), torch.ones(2, 3), torch.ones(4, 8), torch.tensor(4),
             *rows(2)[1:]), IndexError, "step is 4; allowed are 0 to 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_refusal_names_the_argument_its_value_and_what_is_allowed(case):
    call, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("op", sorted(reference.__dict__.keys() & set(ops.SCHEMAS)))
def test_every_op_has_a_schema_of_the_references_arguments(op):
    import inspect

    wanted = list(inspect.signature(getattr(reference, op)).parameters)
    schema = getattr(torch.ops.ddmd, op).default._schema
    assert [a.name for a in schema.arguments] == wanted


@pytest.mark.parametrize(("hip", "capability", "says"), [("6.2", (9, 0), "ROCm"), (None, (7, 0), "sm_70")])
def test_a_gpu_that_cannot_run_the_kernels_is_served_by_plain_torch(monkeypatch, hip, capability, says):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
    registry.unsupported_gpu.cache_clear()
    registry._route.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=says) as caught:
            served = [registry.serving(op, "cuda") for op in registry.OPS]
        assert len(caught) == 1
        assert all(name == "reference" and says in reason for name, reason in served)
    finally:
        monkeypatch.undo()
        registry.unsupported_gpu.cache_clear()
        registry._route.cache_clear()


LIBCUDA = (
    "int cuInit(unsigned flags) { return 0; } int cuDeviceGetCount(int *count) { *count = 1; return 0; }"
)
WITHOUT_COMPILER = """
import sys, torch
torch.cuda.is_available = lambda: True
sys.argv = ["ddmd", "info"]
from ddmd.cli import main
main()
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc makes the driver library of the test")
@pytest.mark.parametrize("compiler", ["none", "named wrongly"])
def test_triton_without_a_compiler_is_found_out_before_the_first_launch(tmp_path, compiler):
    pytest.importorskip("triton", reason="Triton is not installed")
    (tmp_path / "cuda.c").write_text(LIBCUDA)
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", tmp_path / "cuda.c", "-o", library], check=True)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("CC", "TRITON_INTERPRET")
    }
    environment |= {
        "PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }  # fmt: skip
    if compiler == "named wrongly":
        environment["CC"] = str(tmp_path / "gcc")
    command = [sys.executable, "-c", WITHOUT_COMPILER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: Triton")
    assert "install a C compiler" in line
    assert "plain torch serves the ops that have Triton kernels" in line
    (noise,) = [row for row in done.stdout.splitlines() if row.startswith("noise ")]
    assert noise.split()[:3] == ["noise", "C++", "reference"]
    assert "install a C compiler" in noise


def test_an_extension_whose_functions_take_other_arguments_is_not_called(monkeypatch):
    from ddmd.ops import native

    class Other:
        interface = native._INTERFACE - 1

    monkeypatch.setattr(native.importlib, "import_module", lambda name: Other)
    assert native._load() == (None, "the extension ddmd._C is of another version of ddmd; run pip install .")


def test_an_extension_of_an_older_version_serves_what_it_has(monkeypatch):
    from ddmd.ops import native

    if native.why_not() is not None:
        pytest.skip(reason=f"{native.why_not()}")

    class Older:
        noise = native._C.noise

    monkeypatch.setattr(native, "_C", Older)
    registry._route.cache_clear()
    try:
        assert registry.serving("noise", "cpu") == ("C++", None)
        name, reason = registry.serving("gaussian_kl", "cpu")
        assert name == "reference"
        assert "is of an older version, which had no gaussian_kl" in reason
        assert_close(ops.gaussian_kl(*[torch.ones(3)] * 4), torch.zeros(()))
    finally:
        monkeypatch.undo()
        registry._route.cache_clear()
