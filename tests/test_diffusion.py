"""The sampler tables step for step against the schedulers of diffusers."""

import pytest
import torch

from ddmd import ops
from ddmd.diffusion.schedule import Schedule

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

COMMON = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
          "timestep_spacing": "trailing"}  # fmt: skip
AT = (torch.tensor(5), torch.arange(2), torch.arange(2))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
@pytest.mark.parametrize("n", [4, 10, 50])
def test_ddpm_is_the_posterior_of_diffusers(prediction, n, monkeypatch):
    names = {"epsilon": "epsilon", "sample": "sample", "v": "v_prediction"}
    theirs = diffusers.DDPMScheduler(**COMMON, clip_sample=True, prediction_type=names[prediction])
    theirs.set_timesteps(n)
    module = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    monkeypatch.setattr(module, lambda shape, **_: torch.zeros(shape))  # the mean; sigma apart
    schedule = Schedule(kind="linear", prediction=prediction)
    table = schedule.coefficients(n, "ddpm")
    assert torch.equal(theirs.timesteps, schedule.timesteps(n))
    sigma = torch.stack([theirs._get_variance(t) for t in theirs.timesteps]).sqrt()
    assert torch.allclose(table[:-1, 6], sigma[:-1].float(), rtol=1e-3)
    table[:, 6] = 0
    ours = torch.randn(2, 1, 8, 8)
    other = ours.clone()
    for i, t in enumerate(theirs.timesteps):
        output = torch.sin(other * 3 + i)
        other = theirs.step(output, t, other).prev_sample
        ops.denoise_step(ours, output, table, torch.tensor(i), *AT)
        assert (ours - other).abs().max() < 2e-3


@pytest.mark.parametrize("n", [2, 5, 10])
def test_dpm_solver_is_that_of_diffusers(n):
    theirs = diffusers.DPMSolverMultistepScheduler(
        **COMMON, algorithm_type="dpmsolver++", solver_order=2, prediction_type="sample"
    )
    theirs.set_timesteps(n)
    schedule = Schedule(kind="linear", prediction="sample")
    assert torch.equal(theirs.timesteps, schedule.timesteps(n))
    table = schedule.coefficients(n, "dpm++2m")
    ours, memory = torch.randn(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    other = ours.clone()
    for i, t in enumerate(theirs.timesteps):
        output = torch.sin(other * 3 + i) * 0.9
        other = theirs.step(output, t, other).prev_sample
        ops.denoise_step(ours, output, table, torch.tensor(i), *AT, memory)
        assert (ours - other).abs().max() < 2e-3


def test_steps_may_end_early_and_the_last_one_gives_x0():
    schedule = Schedule()
    assert schedule.timesteps(5, 0.9).tolist() == [999, 979, 959, 939, 919]
    assert schedule.timesteps(100, 0.9).tolist() == list(range(999, 899, -1))
    for wrong, message in (
        ((101, 0.9), "steps is 101; allowed are integers from 1 to 100"),
        ((5, 1.0), "stop is 1.0; allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            schedule.timesteps(*wrong)
    x, x0 = torch.randn(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    for sampler in ("ddim", "ddpm", "dpm++2m"):
        table = schedule.coefficients(3, sampler, stop=0.95)
        state, memory = x.clone(), torch.zeros_like(x) if sampler == "dpm++2m" else None
        for i in range(3):
            ops.denoise_step(state, x0, table, torch.tensor(i), *AT, memory)
        assert torch.allclose(state, x0, atol=1e-5), sampler


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_noise_has_the_variance_of_diffusers(eta):
    theirs = diffusers.DDIMScheduler(**COMMON)
    theirs.set_timesteps(20)
    wanted = [theirs._get_variance(int(t), int(t) - 50) for t in theirs.timesteps]
    sigma = Schedule(kind="linear", prediction="epsilon").coefficients(20, eta=eta)[:, 6]
    assert torch.allclose(sigma, eta * torch.stack(wanted).float().sqrt(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_schedule_and_tables(kind):
    schedule = Schedule(kind=kind)
    alpha_bar = schedule.alpha_bar()
    assert bool((alpha_bar[1:] < alpha_bar[:-1]).all())
    for n in (1, 2, 7, 50, 1000):
        times = schedule.timesteps(n)
        assert times[0] == 999
        assert bool((times[1:] < times[:-1]).all())
        for sampler in ("ddim", "ddpm", "dpm++2m"):
            table = schedule.coefficients(n, sampler)
            assert torch.isfinite(table).all()
            assert torch.allclose(table[-1, [2, 3, 5, 6]], torch.tensor([1.0, 0, 0, 0]), atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
def test_all_predictions_denoise_alike(prediction):
    """The true x_0 in any parametrisation brings every sampler to x_0."""
    schedule = Schedule(prediction=prediction)
    x0 = torch.where(torch.rand(2, 1, 8, 8) > 0.5, 1.0, -1.0)
    at = (torch.tensor(5), torch.arange(2), torch.arange(2))
    for sampler in ("ddim", "ddpm", "dpm++2m"):
        table, times = schedule.coefficients(10, sampler), schedule.timesteps(10)
        x = ops.noise(x0, times[:1].repeat(2), schedule.noising_table(), torch.tensor(-1), *at)
        memory = torch.zeros_like(x)
        for i, t in enumerate(times):
            a, s = schedule.alpha_bar()[t].sqrt(), (1 - schedule.alpha_bar()[t]).sqrt()
            epsilon = (x.double() - a * x0) / s
            output = {"epsilon": epsilon, "sample": x0.double(), "v": a * epsilon - s * x0}[prediction]
            ops.denoise_step(x, output.float(), table, torch.tensor(i), *at, memory)
        assert (x - x0).abs().max() < 1e-3


def test_samplers_are_those_of_diffusers():
    n, x = 10, torch.randn(2, 1, 8, 8)
    common = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    schedule = Schedule(kind="linear", prediction="epsilon")
    at = (torch.tensor(5), torch.arange(2), torch.arange(2))
    table = schedule.coefficients(n, "ddim")
    theirs = diffusers.DDIMScheduler(
        **common, clip_sample=True, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    theirs.set_timesteps(n)
    assert torch.equal(theirs.timesteps, schedule.timesteps(n))
    ours, other = x.clone(), x.clone()
    for i, t in enumerate(theirs.timesteps):
        output = torch.sin(other * 3 + i)
        other = theirs.step(output, t, other, eta=0.0, use_clipped_model_output=True).prev_sample
        ops.denoise_step(ours, output, table, torch.tensor(i), *at)
        assert (ours - other).abs().max() < 1e-3
