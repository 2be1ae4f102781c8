"""Sessions: one for each thread, graphs for a few shapes, and nothing of the caller's torch state inside."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from ddmd.diffusion.samplers import SamplingConfig
from ddmd.inference import session as module
from ddmd.inference.detector import Detector
from ddmd.inference.session import MAX_GRAPHS, Session, bucket, callers_state_aside, detect_slices
from ddmd.inference.slices import SliceGrid, extract
from ddmd.io.volume import Volume
from tests.volumes import head, tiny_system

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CONFIG = SamplingConfig(samples=3, steps=2)


def cut(rng, depth=8, shape=(40, 48)):
    values, affine = head(rng, (*shape, depth))
    return extract(Volume.from_array({"flair": values}, affine), ("flair",), SliceGrid(4.0, 16))


def gap(one, other):
    pairs = zip(one.tensors(), other.tensors(), strict=True)
    return max(float((a.cpu() - b.cpu()).abs().max()) for a, b in pairs)


class StandIn:
    """Captures as a CUDA graph does: the work reads and writes the same tensors at every replay, and counts."""

    def __init__(self):
        self.captured, self.replayed = 0, 0

    def __call__(self, work):
        self.captured += 1

        def replay():
            self.replayed += 1
            work()

        return replay


def test_a_captured_batch_computes_what_an_eager_one_does_whatever_the_seed(rng):
    system, stand_in = tiny_system(), StandIn()
    session, slices = Session(system, stand_in), cut(rng)
    for seed in (0, 5, -(2**63), 5):
        config = replace(CONFIG, seed=seed)
        assert gap(session.run(slices, config), detect_slices(system, slices, config)) < 1e-5
    assert (stand_in.captured, stand_in.replayed) == (1, 4)
    zero, five = (session.run(slices, replace(CONFIG, seed=s)).probability for s in (0, 5))
    assert not torch.equal(zero, five)


def test_volumes_of_a_few_depths_share_a_graph(rng):
    system, stand_in = tiny_system(), StandIn()
    session = Session(system, stand_in)
    for depth in (12, 13, 15, 12):
        slices = cut(rng, depth)
        assert 8 < len(slices) <= 16
        config = replace(CONFIG, batch=100)
        assert gap(session.run(slices, config), detect_slices(system, slices, config)) < 1e-5
    assert stand_in.captured == 1
    assert [bucket(n) for n in (1, 3, 8, 9, 16, 17, 131)] == [1, 4, 8, 16, 16, 32, 144]


def test_batches_of_a_volume_are_no_larger_than_asked_for(rng):
    system, stand_in = tiny_system(), StandIn()
    session, slices = Session(system, stand_in), cut(rng, 16)
    config = replace(CONFIG, batch=5)
    assert gap(session.run(slices, config), detect_slices(system, slices, config)) < 1e-5
    sizes = {key[0][0] for key in session._batches}
    assert max(sizes) == 5


def test_another_configuration_or_other_weights_are_another_graph_and_few_are_kept(rng):
    system, stand_in = tiny_system(), StandIn()
    session, slices = Session(system, stand_in), cut(rng)
    for steps in range(1, MAX_GRAPHS + 3):
        session.run(slices, replace(CONFIG, steps=steps, samples=1))
    assert stand_in.captured == MAX_GRAPHS + 2
    assert len(session._batches) == MAX_GRAPHS
    config = replace(CONFIG, steps=1, samples=2)
    before = session.run(slices, config)
    system.denoiser.to_output.weight.data = system.denoiser.to_output.weight.data * 3
    system.condition.to_evidence.bias.data.fill_(1.0)  # in place: the graph reads it
    after = session.run(slices, config)
    assert gap(after, detect_slices(system, slices, config)) < 1e-5
    assert gap(after, before) > 1e-2


def test_a_long_loop_is_not_captured(rng):
    stand_in = StandIn()
    Session(tiny_system(), stand_in).run(cut(rng), SamplingConfig(samples=2, steps=1000))
    assert stand_in.captured == 0


@pytest.mark.parametrize("captured", [False, True])
def test_threads_with_volumes_of_one_shape_get_their_own_results(rng, captured, monkeypatch):
    """One detector, eight threads, volumes that differ, other seeds: what each is alone, to the bit."""
    if captured:
        monkeypatch.setattr("ddmd.inference.detector.Session", lambda system: Session(system, StandIn()))
    detector = Detector(tiny_system())
    base, affine = head(rng, (40, 48, 8))
    work = []
    for i in range(8):
        volume = np.where(base != 0, np.roll(base, i % 3, 0) + 10 * i * (base > 150), 0).astype(np.float32)
        volume = np.where(base != 0, np.where(volume == 0, 1, volume), 0)
        prepared = detector.prepare(Volume.from_array({"flair": volume}, affine))
        work.append((prepared, replace(CONFIG, seed=i % 4, samples=1 + i % 2)))
    alone = [detector.maps(*one) for one in work]
    assert len({one.slices.image.shape for one, _ in work}) == 1
    barrier = threading.Barrier(8)

    def together(i):
        barrier.wait()
        return [detector.maps(*work[(i + k) % 8]) for k in range(8)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(together, range(8)))
    finally:
        sys.setswitchinterval(interval)
    for i, result in enumerate(results):
        for k, maps in enumerate(result):
            assert gap(maps, alone[(i + k) % 8]) == 0


def test_a_thread_keeps_its_session_and_another_has_another():
    detector = Detector(tiny_system())
    mine = detector.session
    assert detector.session is mine
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(getattr, detector, "session").result()
        assert other is not mine
        gone = weakref.ref(other)
        del other
    gc.collect()
    assert gone() is None, "the session of a thread that has ended is kept"
    gone = weakref.ref(mine)
    del mine, detector
    gc.collect()
    assert gone() is None


def test_a_used_detector_is_copied_pickled_and_hashed(rng):
    detector, (values, affine) = Detector(tiny_system()), head(rng)
    wanted = detector.detect(values, affine=affine).probability.get_fdata()
    for other in (copy.deepcopy(detector), copy.copy(detector), pickle.loads(pickle.dumps(detector))):
        assert other.session is not detector.session
        assert np.array_equal(other.detect(values, affine=affine).probability.get_fdata(), wanted)
        assert other != detector
    assert {detector: 1}[detector] == 1
    assert hash(detector.system) != hash(tiny_system())


# ---------------------------------------------------------------- the caller's torch state

STATES = {
    "default float64": "torch.set_default_dtype(torch.float64)",
    "default float16": "torch.set_default_dtype(torch.float16)",
    "default bfloat16": "torch.set_default_dtype(torch.bfloat16)",
    "default device": "torch.set_default_device('meta')",
    "inference mode": "torch.inference_mode().__enter__()",
    "no grad": "torch.set_grad_enabled(False)",
    "autocast": "torch.autocast('cpu', dtype=torch.bfloat16).__enter__()",
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "matmul precision": "torch.set_float32_matmul_precision('medium')",
    "anomaly": "torch.autograd.set_detect_anomaly(True)",
}
CHILD = """
import sys, numpy as np, torch
from ddmd.inference.detector import Detector
from ddmd.data.phantom import phantom
image = {"flair": phantom(seed=3, spacing_mm=8.0).images["flair"]}

def maps(precision):
    found = Detector.load(device="cpu", precision=precision).detect(image)
    return [np.asarray(i.dataobj) for i in (found.probability, found.uncertainty, found.inter_discrepancy, found.mask)]

wanted = {p: maps(p) for p in ("float32", "bfloat16")}
exec(sys.argv[1])
for precision, values in wanted.items():
    for a, b in zip(values, maps(precision)):
        assert np.array_equal(a, b), (precision, np.abs(a.astype(float) - b).max())
"""


@pytest.mark.parametrize("state", STATES)
def test_the_callers_torch_state_changes_nothing(state):
    """Loading and detecting with the shipped weights, to the bit."""
    result = subprocess.run([sys.executable, "-c", CHILD, STATES[state]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.fixture
def settings():
    """torch's settings of float32 precision, restored afterwards."""
    settings = module._FULL_PRECISION._settings()
    before = [setting.fp32_precision for setting in settings]
    yield settings
    for setting, value in zip(settings, before, strict=True):
        setting.fp32_precision = value


def test_float32_is_multiplied_in_full_while_a_session_computes(settings):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    before = [setting.fp32_precision for setting in settings]
    assert before[:2] == ["tf32", "tf32"]
    barrier, seen = threading.Barrier(4), []

    def inside(i):
        for k in range(20):
            with callers_state_aside(torch.device("cpu")):
                if k == 0:
                    barrier.wait()
                seen.append([setting.fp32_precision for setting in settings])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(inside, range(4)))
    assert seen == [["ieee"] * 4] * 80
    assert [setting.fp32_precision for setting in settings] == before
    with pytest.raises(KeyError), callers_state_aside(torch.device("cpu")):
        raise KeyError
    assert [setting.fp32_precision for setting in settings] == before


# ---------------------------------------------------------------- on a GPU


def moved(system, device, dtype=torch.float32):
    parts = {name: copy.deepcopy(part).to(device, dtype) for name, part in system.parts().items()}
    return replace(system, **parts)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 0.7), ("ddpm", 0.0), ("dpm++2m", 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_graph_computes_what_the_kernels_one_by_one_do(rng, sampler, eta, dtype, device):
    from ddmd.inference.ensemble import SamplingTable, compute_batch

    system = moved(tiny_system(), device, dtype)
    config = SamplingConfig(samples=5, steps=4, sampler=sampler, eta=eta, mirror=True)
    session = Session(system)
    for depth in (8, 10, 8):
        slices = cut(rng, depth)
        planes = slices.planes(1, mirrored=True).to(device)
        with torch.inference_mode():
            table, seed = SamplingTable.of(system, config), torch.zeros((), dtype=torch.int64, device=device)
            eager = compute_batch(system, config, table, planes, slices.index.to(device), seed, 512)
        assert gap(session.run(slices, config), eager) < (1e-5 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_a_shape_that_comes_back_neither_captures_nor_waits(rng, device):
    session, slices = Session(moved(tiny_system(), device)), cut(rng)
    session.run(slices, CONFIG)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        session.run(slices, replace(CONFIG, seed=3))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(session._batches) == 1


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_threads_on_a_gpu_get_their_own_results(rng, device):
    detector = Detector(moved(tiny_system(), device))
    work = [detector.prepare(Volume.from_array({"flair": v}, a)) for v, a in (head(rng) for _ in range(4))]
    alone = [detector.maps(one, CONFIG).probability.cpu() for one in work]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = pool.map(lambda one: detector.maps(one, CONFIG).probability.cpu(), work)
            for a, b in zip(alone, together, strict=True):
                assert torch.allclose(a, b, atol=1e-6)
