"""Modes of torch, and threads, leave a scheduler as new; what is no tensor is refused."""

import copy
import threading

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ddim_schedulers import (
    GeneralizedDDIMInverseScheduler,
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
    parameterization,
)

CLASSES = (GeneralizedDDIMScheduler, MarkovianDDPMScheduler, GeneralizedDDIMInverseScheduler)
each_class = pytest.mark.parametrize("cls", CLASSES)
X, M = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
T = torch.tensor([5, 7])


class Step(torch.nn.Module):
    def __init__(self, scheduler):
        super().__init__()
        self.scheduler = scheduler

    def forward(self, m, x):
        noisy = self.scheduler.add_noise(x, m, T)
        return self.scheduler.step(m, 500, noisy, return_dict=False)[0]


def _export(step):
    return torch.export.export(step, (M, X), strict=False)


def _make_fx(step):
    return make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(M, X)


def _fake(step):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return step(mode.from_tensor(M), mode.from_tensor(X))


def _vmap(step):
    x, m = X[None], M[None]
    return torch.func.vmap(step, randomness="different")(m, x)


def _grad(step):
    return torch.func.grad(lambda x: step(M, x).sum())(X)


def _trace(step):
    return torch.jit.trace(step, (M, X), check_trace=False)


MODES = (_export, _make_fx, _fake, _vmap, _grad, _trace)
# Every mode with every class and both orders; what is clipped and the dtype take turns.
CELLS = [
    (cls, settings, mode, (torch.float32, torch.float64)[(i + j) % 2])
    for i, mode in enumerate(MODES)
    for j, (cls, settings) in enumerate(
        (
            (GeneralizedDDIMScheduler, {"clip_sample": i % 2 == 0}),
            (GeneralizedDDIMScheduler, {"clip_sample": i % 2 == 1, "solver_order": 2}),
            (MarkovianDDPMScheduler, {"clip_sample": i % 3 == 0}),
            (GeneralizedDDIMInverseScheduler, {"clip_sample": i % 3 == 1}),
        )
    )
]


@pytest.mark.parametrize(("cls", "settings", "mode", "dtype"), CELLS)
@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning:torch.jit",  # torch 2.14 says of each trace that it will go
    "ignore:There is a performance drop",
)
def test_a_mode_leaves_the_scheduler_as_new(cls, settings, mode, dtype):
    scheduler, fresh = cls(**settings), cls(**settings)
    scheduler.set_timesteps(10)
    fresh.set_timesteps(10)
    mode(Step(scheduler))
    for each in (scheduler, copy.deepcopy(scheduler)):
        outputs = []
        for one in (each, copy.deepcopy(fresh)):
            torch.manual_seed(0)
            noisy = one.add_noise(X.to(dtype), M.to(dtype), T)
            outputs.append(one.step(M.to(dtype), 400, noisy, return_dict=False)[0])
        assert type(outputs[0]) is torch.Tensor
        if "solver_order" not in settings:
            assert torch.equal(*outputs)


def test_a_cold_scheduler_exports_as_a_warm_one():
    counts = []
    for warm in (False, True):
        scheduler = GeneralizedDDIMScheduler()
        scheduler.set_timesteps(10)
        if warm:
            Step(scheduler)(M, X)
        module = Step(scheduler)
        module.forward = lambda m, x, s=scheduler: s.step(m, 500, x, return_dict=False)[0]
        counts.append(len(torch.export.export(module, (M, X), strict=False).graph.nodes))
    assert counts[0] == counts[1] < 31  # stock's program


def _assign(scheduler):
    scheduler.alphas_cumprod = scheduler.alphas_cumprod * 0.9


def _edit(scheduler):
    scheduler.alphas_cumprod.mul_(0.9)


def _set(scheduler):
    scheduler.config.prediction_type = "v_prediction"


@each_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("change", [None, _assign, _edit, _set])
def test_what_has_changed_since_the_plan_is_exported(cls, dtype, change):
    """As the next step computes it, and with no table made in the program."""
    warm, cold = cls(), cls()
    arguments = [{}]
    if cls is GeneralizedDDIMScheduler:
        noise = torch.zeros_like(X)
        arguments += [{"eta": 0.5, "variance_noise": noise}, {"use_clipped_model_output": True}]
    if cls is MarkovianDDPMScheduler:
        arguments = [{"variance_noise": torch.zeros_like(X)}]
    m, x = M.to(dtype), X.to(dtype)
    for given in arguments:
        programs = []
        for scheduler in (warm, cold):
            scheduler.set_timesteps(10)
            if change is not None:
                change(scheduler)
            if scheduler is warm:
                expected = scheduler.step(m, 500, x, **given).prev_sample
            module = Step(scheduler)
            module.forward = lambda m, x, s=scheduler, g=given: s.step(m, 500, x, **g).prev_sample
            programs.append(torch.export.export(module, (m, x), strict=False))
        assert len(programs[0].graph.nodes) == len(programs[1].graph.nodes)
        for program, scheduler in zip(programs, (warm, cold), strict=True):
            assert torch.equal(program.module()(m, x), expected)
            assert torch.equal(scheduler.step(m, 500, x, **given).prev_sample, expected)


@each_class
@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("export", [False, True])
def test_a_plan_that_is_made_in_a_mode_outlives_it(cls, made_inside, export):
    """So do the scheduler itself, and what was assigned or first read there."""
    held = [] if made_inside else [cls()]

    def work(m, x):
        if made_inside:
            held[:] = [cls()]
        scheduler = held[0]
        scheduler.set_timesteps(7)
        scheduler.config.prediction_type = "v_prediction"
        scheduler.set_timesteps(10)
        scheduler.num_inference_steps = 20
        scheduler.set_timesteps(10)
        end = "one" if cls is MarkovianDDPMScheduler else scheduler._end_name
        assert type(getattr(scheduler, end)) is torch.Tensor
        assert type(scheduler.betas) is type(scheduler.timesteps) is torch.Tensor
        return scheduler.step(m, 500, scheduler.add_noise(x, m, T)).prev_sample

    if export:
        module = torch.nn.Module()
        module.forward = work
        torch.export.export(module, (M, X), strict=False)
    else:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            work(mode.from_tensor(M), mode.from_tensor(X))
    fresh = cls(prediction_type="v_prediction")
    fresh.set_timesteps(10)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    outputs = []
    for scheduler, generator in zip((held[0], fresh), generators, strict=True):
        noise = {}
        if cls is MarkovianDDPMScheduler:
            noise = {"generator": generator}
        outputs.append(scheduler.step(M, 500, X, **noise).prev_sample)
        outputs.append(scheduler.add_noise(X, M, T))
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    assert torch.equal(held[0].timesteps, fresh.timesteps)
    assert held[0].planned_pairs() == fresh.planned_pairs()


@pytest.mark.parametrize("plans_itself", [False, True])
def test_two_threads_on_one_scheduler_of_order_2_are_told(plans_itself):
    scheduler = GeneralizedDDIMScheduler(solver_order=2, clip_sample=False)
    scheduler.set_timesteps(10)
    ts = scheduler.timesteps
    scheduler.step(M, ts[0], X)

    def other():
        if plans_itself:
            scheduler.set_timesteps(10)
        scheduler.step(M, ts[0], X)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    with pytest.raises(RuntimeError, match="Two threads share a scheduler of `solver_order`=2"):
        scheduler.step(M, ts[1], X)
    scheduler.set_timesteps(10)  # a new run
    for t in ts:
        scheduler.step(M, t, X)


BAD = (None, "x", [1.0], np.zeros((2, 3, 4, 4)))


@each_class
@pytest.mark.parametrize("bad", BAD, ids=lambda v: type(v).__name__)
def test_what_is_no_tensor_is_refused(cls, bad):
    scheduler = cls()
    scheduler.set_timesteps(10)
    for call, name in (
        (lambda: scheduler.step(bad, 500, X), "model_output"),
        (lambda: scheduler.step(M, 500, bad), "sample"),
        (lambda: scheduler.step(M, bad, X), "timestep"),
        (lambda: scheduler.scale_model_input(bad, 500), "sample"),
        (lambda: scheduler.add_noise(bad, M, T), "original_samples"),
        (lambda: scheduler.add_noise(X, bad, T), "noise"),
        (lambda: scheduler.add_noise(X, M, bad), "timesteps"),
        (lambda: scheduler.get_velocity(bad, M, T), "sample"),
        (lambda: scheduler.get_velocity(X, bad, T), "noise"),
        (lambda: scheduler.get_velocity(X, M, bad), "timesteps"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` is"):
            call()


@each_class
def test_bools_and_tensors_without_values_are_refused(cls):
    scheduler = cls()
    scheduler.set_timesteps(10)
    meta = X.to("meta")
    for call, name in (
        (lambda: scheduler.step(M, True, X), "timestep"),
        (lambda: scheduler.step(M, T[0].to("meta"), X), "timestep"),
        (lambda: scheduler.step(meta, 500, X), "model_output"),
        (lambda: scheduler.step(M, 500, meta), "model_output"),
        (lambda: scheduler.add_noise(X, M, T.to("meta")), "timesteps"),
        (lambda: scheduler.add_noise(X, meta, T), "noise"),
        (lambda: scheduler.add_noise(meta, M, T), "noise"),
        (lambda: scheduler.get_velocity(meta, M, T), "noise"),
        (lambda: scheduler.set_timesteps(True), "num_inference_steps"),
        (lambda: scheduler.set_timesteps(timesteps=T.to("meta")), "timesteps"),
        (lambda: cls(trained_betas=torch.zeros(1000, device="meta")), "trained_betas"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` is"):
            call()
    # shapes alone may be asked for; the tables stay where they are
    assert scheduler.add_noise(meta, meta, T.to("meta")).is_meta
    assert scheduler.alphas_cumprod.device == X.device
    assert not scheduler.add_noise(X, M, T).is_meta


@each_class
def test_noise_is_a_floating_tensor_beside_the_sample(cls):
    scheduler = cls()
    scheduler.set_timesteps(10)
    calls = [lambda bad: scheduler.add_noise(X, bad, T), lambda bad: scheduler.add_noise(bad, M, T)]
    if cls is not GeneralizedDDIMInverseScheduler:
        eta = {"eta": 1.0} if cls is GeneralizedDDIMScheduler else {}
        calls.append(lambda bad: scheduler.step(M, 500, X, variance_noise=bad, **eta))
    for call in calls:
        for bad in (X.long(), X > 0, X.to(torch.complex64)):
            with pytest.raises(ValueError, match=r"` has dtype torch\."):
                call(bad)
    if len(calls) == 3:
        with pytest.raises(ValueError, match="`variance_noise` is on the device meta"):
            calls[2](X.to("meta"))


def test_a_sigma_without_values_is_refused():
    scheduler = GeneralizedDDIMScheduler()
    with pytest.raises(ValueError, match="`sigma` is on the device 'meta'"):
        scheduler.set_timesteps(2, sigma=torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match="`final_alpha_cumprod` is"):
        scheduler.final_alpha_cumprod = torch.zeros(2, device="meta")


@pytest.mark.parametrize("ratio", [0.001, 0.5, 0.995, 1.0])
def test_long_rows_have_the_quantile_of_short_ones(ratio, monkeypatch):
    x = 3 * X.double()
    expected = parameterization.dynamic_threshold(x, ratio, 5.0)
    monkeypatch.setattr(parameterization, "MAX_QUANTILE", 7)
    torch.testing.assert_close(parameterization.dynamic_threshold(x, ratio, 5.0), expected)


def test_a_row_beyond_torchs_quantile_is_thresholded():
    x = torch.linspace(-2, 2, 2**24 + 2)[None]
    assert parameterization.dynamic_threshold(x, 0.995, 3.0).abs().max() == 1
