"""Each op against eager torch, eager torch with its buffers preallocated, and torch.compile.

Run by `make bench` and `make bench-gpu`. The rivals of one op are measured in turn in one run; medians
and bytes go to `extra_info` of pytest-benchmark's JSON, from which `benchmarks.table` makes the table.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn import functional

from benchmarks.timing import Work, agree, alternate, machine
from ddmd import ops
from ddmd.diffusion.schedule import Schedule
from ddmd.ops import native, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEMORY = torch.cuda.get_device_properties(0).total_memory if DEVICE == "cuda" else 0
BIG = (
    32 if MEMORY > 60 * 2**30 else 8 if MEMORY else 1
)  # times as many slices, to be several times a GPU's cache
CALLS = 10 if DEVICE == "cuda" else 1


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def compiled(work, *args) -> Work | None:
    """torch.compile's best of a function, or None (said) where it does not run here."""
    mode = "max-autotune" if DEVICE == "cuda" else "max-autotune-no-cudagraphs"
    try:
        fast = torch.compile(work, dynamic=False, mode=mode)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fast(*args)
    except Exception as error:
        print(f"torch.compile is left out: {type(error).__name__}")
        return None
    return lambda: fast(*args)


def report(benchmark, op: str, shape: str, moved: int, rivals: dict[str, Work | None]) -> None:
    """Measure the rivals and a copy in turn, then let pytest-benchmark time ours."""
    half = max(moved // 2 // 4, 1)
    source, target = randn(half), randn(half)
    running = {name: work for name, work in rivals.items() if work is not None}
    medians = alternate({"copy": lambda: target.copy_(source), **running}, DEVICE, calls=CALLS)
    benchmark.extra_info.update(
        op=op, shape=shape, device=DEVICE, machine=machine(), bytes=moved, medians=medians,
        backend=ops.serving(op, DEVICE)[0], torch=torch.__version__,
        share_of_copy=medians["copy"] / medians["ours"],
    )  # fmt: skip
    benchmark.pedantic(rivals["ours"], rounds=5, warmup_rounds=1)


def test_ensemble_variance(benchmark):
    x = randn(5, 16 * BIG, 1, 256, 256)
    mean, second, scratch = torch.empty_like(x[0]), torch.empty_like(x[0]), torch.empty_like(x)

    def preallocated():  # two passes, nothing allocated
        torch.mean(x, 0, out=mean)
        torch.sub(x, mean, out=scratch)
        scratch.square_()
        torch.sum(scratch, 0, out=second)
        second.div_(len(x) - 1)

    for ours, wanted in zip(ops.ensemble_variance(x), reference.ensemble_variance(x), strict=True):
        agree(ours, wanted, 1e-5)
    ops_mean, ops_variance = torch.empty_like(mean), torch.empty_like(mean)

    def ours():
        if DEVICE == "cpu" and native.why_not() is None:
            native.ensemble_variance(x, out=(ops_mean, ops_variance))
        else:
            ops.ensemble_variance(x)

    report(
        benchmark, "ensemble_variance", f"{tuple(x.shape)} float32", (len(x) + 2) * mean.numel() * 4,
        {"ours": ours, "eager": lambda: torch.var_mean(x, 0), "eager, preallocated": preallocated,
         "compile": compiled(lambda x: torch.var_mean(x, 0), x), "ours, allocating": lambda: ops.ensemble_variance(x)},
    )  # fmt: skip


def test_denoise_step(benchmark):
    x, out = randn(80 * BIG, 1, 256, 256), randn(80 * BIG, 1, 256, 256)
    table = Schedule().sampler(10, "ddpm").to(DEVICE)
    rows = torch.arange(len(x), device=DEVICE)
    at = (torch.tensor(3, device=DEVICE), torch.tensor(7, device=DEVICE), rows, rows)
    c = table[3].tolist()
    state, z, predicted = x.clone(), torch.empty_like(x), torch.empty_like(x)

    def eager(x=state, out=out):  # as diffusers' schedulers write it
        noise = torch.randn(x.shape, device=DEVICE)
        x0 = torch.clamp(c[0] * x + c[1] * out, -1, 1)
        return c[2] * x0 + c[3] * x + c[4] * out + c[6] * noise

    def preallocated():
        torch.randn(z.shape, out=z)
        torch.mul(out, c[1], out=predicted).add_(state, alpha=c[0]).clamp_(-1, 1)
        state.mul_(c[3]).add_(predicted, alpha=c[2]).add_(z, alpha=c[6])

    ours, wanted = x[:8].clone(), x[:8].clone()
    ops.denoise_step(ours, out[:8], table, *at[:2], rows[:8], rows[:8])
    reference.denoise_step(wanted, out[:8], table, *at[:2], rows[:8], rows[:8])
    agree(ours, wanted, 2e-5)
    report(
        benchmark, "denoise_step", f"{tuple(x.shape)} float32, with noise", 3 * x.numel() * 4,
        {"ours": lambda: ops.denoise_step(state, out, table, *at), "eager": eager, "eager, preallocated": preallocated,
         "compile": compiled(eager, state, out)},
    )  # fmt: skip


def test_discrepancy_maps(benchmark):
    shape = (3, 155 * BIG, 1, 128, 128)
    a, b = randn(*shape), randn(*shape)
    mu_a, mu_b, inter, intra, scratch = (torch.empty_like(t) for t in (a[0], a[0], a[0], a[0], a))

    def eager(a=a, b=b):
        mu_a = a.mean(0)
        return (b.mean(0) - mu_a).abs().mean(1), (a - mu_a).square().mean((0, 2)).sqrt()

    def preallocated():
        torch.mean(a, 0, out=mu_a)
        torch.mean(b, 0, out=mu_b)
        torch.sub(mu_b, mu_a, out=inter).abs_()
        torch.sub(a, mu_a, out=scratch).square_()
        torch.mean(scratch, 0, out=intra).sqrt_()

    out = (torch.empty_like(a[0]), torch.empty_like(a[0]))

    def ours():
        if DEVICE == "cpu" and native.why_not() is None:
            native.discrepancy_maps(a, b, out=out)
        else:
            ops.discrepancy_maps(a, b)

    for got, wanted in zip(ops.discrepancy_maps(a, b), reference.discrepancy_maps(a, b), strict=True):
        agree(got, wanted, 1e-5)
    report(
        benchmark, "discrepancy_maps", f"K = 3 + 3, {shape[1]} slices of 128 x 128, float32", (6 + 2) * a[0].numel() * 4,
        {"ours": ours, "eager": eager, "eager, preallocated": preallocated, "compile": compiled(eager, a, b),
         "ours, allocating": lambda: ops.discrepancy_maps(a, b)},
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(64, 64, 48, 48), (32, 32, 96, 96)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_group_norm_silu(benchmark, shape, dtype):
    n, c, h, w = shape
    x = randn(n * BIG, c, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = randn(c), randn(c)
    own_weight, own_bias = weight.to(dtype), bias.to(dtype)

    def eager(x=x):
        return functional.silu(functional.group_norm(x, 8, own_weight, own_bias))

    def preallocated():
        return functional.silu(functional.group_norm(x, 8, own_weight, own_bias), inplace=True)

    with torch.inference_mode():
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
        agree(ops.group_norm_silu(x, 8, weight, bias), reference.group_norm_silu(x, 8, weight, bias, None, None, None, 1e-5)[0], tolerance)  # fmt: skip
        report(
            benchmark, "group_norm_silu", f"{tuple(x.shape)} {str(dtype)[6:]}, channels last",
            3 * x.numel() * x.element_size(),
            {"ours": lambda: ops.group_norm_silu(x, 8, weight, bias), "eager": eager, "eager, preallocated": preallocated,
             "compile": compiled(eager, x)},
        )  # fmt: skip


def test_gaussian_kl(benchmark):
    q = [randn(2**22 * BIG) for _ in range(4)]

    def eager(a, b, c, d):
        return (0.5 * (d - b + torch.exp(b - d) + (a - c).square() * torch.exp(-d) - 1)).sum()

    t, u = (torch.empty_like(q[0]) for _ in range(2))
    total = torch.empty((), dtype=torch.float32, device=DEVICE)

    def preallocated():  # nothing but the sum's own scratch is allocated
        mu_q, logvar_q, mu_p, logvar_p = q
        torch.sub(mu_q, mu_p, out=t).square_()
        t.mul_(torch.neg(logvar_p, out=u).exp_())
        t.sub_(torch.sub(logvar_q, logvar_p, out=u)).add_(u.exp_()).sub_(1).mul_(0.5)
        return torch.sum(t, (0,), out=total)

    exact = reference.gaussian_kl(*(v.double() for v in q))
    for call in (ops.gaussian_kl(*q), preallocated()):
        agree(call / exact, torch.ones_like(exact), 1e-4)
    report(
        benchmark, "gaussian_kl", f"{q[0].numel()} elements float32, sum", 4 * q[0].numel() * 4,
        {"ours": lambda: ops.gaussian_kl(*q), "eager": lambda: eager(*q), "eager, preallocated": preallocated,
         "compile": compiled(eager, *q)},
    )  # fmt: skip


def test_noise(benchmark):
    x0 = randn(80 * BIG, 1, 256, 256)
    table, rows = Schedule().noising_table().to(DEVICE), torch.arange(80 * BIG, device=DEVICE)
    t = rows % 1000
    at = (torch.tensor(3, device=DEVICE), torch.tensor(7, device=DEVICE), rows, rows)
    z, product = torch.empty_like(x0), torch.empty_like(x0)
    a, s = (column[:, None, None, None] for column in table[t].unbind(1))

    def eager(x0=x0, a=a, s=s):  # as diffusers' add_noise writes it
        return a * x0 + s * torch.randn_like(x0)

    def preallocated():
        torch.randn(z.shape, out=z)
        torch.mul(x0, a, out=product).addcmul_(z, s)

    few = tuple(v[:8] if v.ndim else v for v in at)
    agree(ops.noise(x0[:8], t[:8], table, *few), reference.noise(x0[:8], t[:8], table, *few), 2e-5)
    report(
        benchmark, "noise", f"{tuple(x0.shape)} float32", 2 * x0.numel() * 4,
        {"ours": lambda: ops.noise(x0, t, table, *at), "eager": eager, "eager, preallocated": preallocated,
         "compile": compiled(eager, x0, a, s)},
    )  # fmt: skip


def test_ensemble_update(benchmark):
    x = randn(1, 80 * BIG, 1, 256, 256)
    mean, m2 = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    scratch = torch.empty_like(mean)

    def eager(mean=mean, m2=m2, x=x):  # Welford's update, sample number 4
        delta = x[0] - mean
        new = mean + delta / 4
        return new, m2 + delta * (x[0] - new)

    def preallocated():
        torch.sub(x[0], mean, out=scratch)
        mean.add_(scratch, alpha=0.25)
        m2.addcmul_(scratch, scratch, value=0.75)

    states = [(torch.ones_like(mean), torch.ones_like(mean)) for _ in range(2)]
    ops.ensemble_update(*states[0], 3, x)
    reference.ensemble_update(*states[1], 3, x)
    for ours, wanted in zip(*states, strict=True):
        agree(ours, wanted, 1e-5)
    report(
        benchmark, "ensemble_update", f"one sample {tuple(x[0].shape)} float32", 5 * mean.numel() * 4,
        {"ours": lambda: ops.ensemble_update(mean, m2, 3, x), "eager": eager, "eager, preallocated": preallocated,
         "compile": compiled(eager, mean, m2, x)},
    )  # fmt: skip


def test_pairwise_sqdist(benchmark):
    n, d, groups = 512, 4096 * BIG, 2
    z, group = randn(n, d), torch.arange(n, device=DEVICE) % groups

    def eager(z=z, group=group):
        same = group[:, None] == group[None]
        return (torch.cdist(z, z).square() * same).sum() / 2

    def gram(z=z):
        total = z.new_zeros(())
        for g in range(groups):
            own = z[g::groups]
            total += len(own) * own.square().sum() - own.sum(0).square().sum()
        return total

    square, column = torch.empty_like(z), torch.empty_like(z[0])

    def preallocated():
        torch.mul(z, z, out=square)
        total = torch.zeros((), dtype=torch.float32, device=DEVICE)
        for g in range(groups):
            total += len(z[g::groups]) * square[g::groups].sum()
            total -= torch.sum(z[g::groups], 0, out=column).square_().sum()
        return total

    wanted = reference.pairwise_sqdist(z.double(), group, groups)
    agree(ops.pairwise_sqdist(z, group, groups) / wanted, torch.ones_like(wanted), 1e-5)
    agree(preallocated() / wanted, torch.ones_like(wanted), 1e-4)
    report(
        benchmark, "pairwise_sqdist", f"({n}, {d}) float32, {groups} groups", z.numel() * 4,
        {"ours": lambda: ops.pairwise_sqdist(z, group, groups), "eager": eager, "eager, preallocated": preallocated,
         "compile": compiled(gram, z)},
    )  # fmt: skip
