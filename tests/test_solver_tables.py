"""Stored samplers: what a table adds to the analytic step, and what is refused or said."""

import copy
import json
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler

from ddim_schedulers import (
    CALIBRATED,
    FEW_STEPS,
    GeneralizedDDIMInverseScheduler,
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
    history,
    scheduling_base,
    solver_tables,
    stored_sampler,
    to_portable,
)
from ddim_schedulers.pipelines.guidance import BoundNetwork
from ddim_schedulers.pipelines.sampling import denoise
from ddim_schedulers.solver_rows import analytic_steps, differences_of, full_rows
from ddim_schedulers.solver_tables import DECIMALS, solver_table_of

T = 1000
TAU = [999, 640, 300, 90]
MEAN, VARIANCE = 0.4, 0.25


def _weights(calls=4, size=0.05, seed=0):
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randn(i + 2, generator=draw, dtype=torch.float64) * size for i in range(calls)]
    return [[round(w, DECIMALS) for w in row.tolist()] for row in rows]


def _entry(timesteps=TAU, weights=None, **changed):
    levels = GeneralizedDDIMScheduler().alpha_bar[timesteps]
    return {
        "version": 1,
        "timesteps": timesteps,
        "weights": _weights(len(timesteps)) if weights is None else weights,
        "eta": 0.0,
        "clip": None,
        "alpha_bar": [*levels.tolist(), 1.0],
        **changed,
    }


def _scheduler(entry=None, **settings):
    entry = _entry() if entry is None else entry
    stored = {"solver": {str(len(entry["timesteps"])): entry}}
    settings = {"clip_sample": False, "calibration": stored, **settings}
    return GeneralizedDDIMScheduler(**{**CALIBRATED, **settings})


def _exact(x, a):
    """eps of a perfect network for N(MEAN, VARIANCE) data."""
    x0 = MEAN + VARIANCE * a.sqrt() * (x - a.sqrt() * MEAN) / (a * VARIANCE + 1 - a)
    return (x - a.sqrt() * x0) / (1 - a).sqrt()


def _run(scheduler, x, calls=4, noise=None, **step):
    if calls is not None:
        scheduler.set_timesteps(calls)
    seen = []
    for i, t in enumerate(scheduler.timesteps):
        z = {} if noise is None else {"variance_noise": noise[i]}
        out = scheduler.step(_exact(x, scheduler.alpha_bar[t]), t, x, **z, **step)
        x = out.prev_sample
        seen.append(out.pred_original_sample)
    return x, seen


@pytest.fixture
def words(caplog):
    """The word that each warning of a scheduler gives, in order."""
    mark = "do not fit: "
    return lambda: [
        m.split(mark)[1].split(".")[0].split(" ")[0] for m in caplog.messages if mark in m
    ]


def _x(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- what is computed


@pytest.mark.parametrize("clip", [None, 0.7])
def test_a_step_is_the_row_of_the_table(clip):
    """x_{i+1} = c_i . [x_T, x0_0 .. x0_i], from the formula at the top of `solver_tables`."""
    scheduler = _scheduler(_entry(clip=clip, clips=None))
    x = x_T = _x(3, 2, 4, 4)
    rows = full_rows(_weights(), *analytic_steps(TAU, scheduler.alpha_bar, 1.0)[:2])
    end, seen = _run(scheduler, x_T)
    assert scheduler.timesteps.tolist() == TAU
    basis = [x_T]
    for t, row, told in zip(TAU, rows, seen, strict=True):
        a = scheduler.alpha_bar[t]
        x0 = (x - (1 - a).sqrt() * _exact(x, a)) / a.sqrt()
        basis.append(x0 if clip is None else x0.clamp(-clip, clip))
        assert torch.allclose(told, basis[-1], rtol=0, atol=1e-9)
        x = sum(w * b for w, b in zip(row, basis, strict=True))
    assert torch.allclose(end, x, rtol=0, atol=1e-9)


def test_without_differences_it_is_the_analytic_sampler():
    x = _x(2, 1, 4, 4, dtype=torch.float32)
    few = GeneralizedDDIMScheduler(**FEW_STEPS, clip_sample=False)
    few.set_timesteps(timesteps=TAU)
    expected, _ = _run(few, x, None)
    none = [[0.0] * (i + 2) for i in range(len(TAU))]
    assert torch.equal(_run(_scheduler(_entry(weights=none)), x)[0], expected)
    assert not torch.equal(_run(_scheduler(), x)[0], expected)


@pytest.mark.parametrize("calls", [5, 10])
def test_without_a_table_the_preset_is_few_steps(calls, words):
    x = _x(2, 1, 4, 4, dtype=torch.float32)
    expected, _ = _run(GeneralizedDDIMScheduler(**FEW_STEPS), x, calls)
    for stored in (None, {"solver": {}}, {"solver": {"4": _entry()}}):
        scheduler = GeneralizedDDIMScheduler(**CALIBRATED, calibration=stored)
        assert torch.equal(_run(scheduler, x, calls)[0], expected)
        _run(scheduler, x, calls)
    assert words() == ["calls"] * 3  # each scheduler says it once


def test_differences_and_rows_are_each_other_undone():
    steps = analytic_steps(TAU, GeneralizedDDIMScheduler().alpha_bar, 1.0)[:2]
    again = differences_of(full_rows(_weights(), *steps), *steps)
    for row, other in zip(_weights(), again, strict=True):
        assert row == pytest.approx(other.tolist(), abs=1e-12)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_mean_and_variance_with_noise_are_those_of_the_affine_recursion(eta):
    """For Gaussian data x_S is affine in x_T and the z; unit vectors give its coefficients."""
    weights = _weights()

    def of_the_scheduler(entry):
        count = len(TAU) + 1  # x_T, the z, and nothing for the constant
        unit = torch.eye(count, count + 1, dtype=torch.float64)
        noise = unit[1:].unsqueeze(2)
        x_T = unit[0].unsqueeze(1)
        end = _run(_scheduler(entry), x_T, noise=noise)[0].flatten()
        return float(end[-1]), float((end[:-1] - end[-1]).square().sum())

    alpha_bar = GeneralizedDDIMScheduler().alpha_bar
    carry, own, std = (values.tolist() for values in analytic_steps(TAU, alpha_bar, 1.0, eta))
    # each quantity as (coefficients of x_T, z_0 .. z_3, constant)
    x = x_T = torch.eye(6, dtype=torch.float64)[0]
    past = []
    for i, t in enumerate(TAU):
        a = float(alpha_bar[t])
        gain = VARIANCE * math.sqrt(a) / (a * VARIANCE + 1 - a)
        x0 = gain * x
        x0[-1] += MEAN - gain * math.sqrt(a) * MEAN
        past.append(x0)
        x = carry[i] * x + sum(b * p for b, p in zip(own[i], past, strict=False))
        x = x + sum(w * p for w, p in zip(weights[i], [x_T, *past], strict=True))
        x[1 + i] += std[i]
    assert std[-1] == 0 < std[0]
    expected = float(x[-1]), float(x[:-1].square().sum())
    found = of_the_scheduler(_entry(eta=eta))
    assert found == pytest.approx(expected, abs=1e-10)
    # the mutation: the weight of x_T put on the newest prediction
    wrong = [[0.0, *row[1:-1], row[-1] + row[0]] for row in weights]
    assert found != pytest.approx(of_the_scheduler(_entry(eta=eta, weights=wrong)), abs=1e-3)


def test_the_eta_of_the_table_acts_and_another_is_refused(words):
    x, noise = _x(2, 1, 2, 2), _x(4, 2, 1, 2, 2, seed=2)
    entry = _entry(eta=0.6)
    stored, _ = _run(_scheduler(entry), x, noise=noise)
    for same in (_run(_scheduler(entry, eta=0.6), x, noise=noise),):
        assert torch.equal(same[0], stored)
    assert torch.equal(_run(_scheduler(entry), x, noise=noise, eta=0.6)[0], stored)
    assert words() == []
    few = GeneralizedDDIMScheduler(**FEW_STEPS, clip_sample=False)
    few.set_timesteps(timesteps=TAU)
    expected, _ = _run(few, x, None, noise=noise, eta=0.3)
    assert torch.equal(_run(_scheduler(entry), x, noise=noise, eta=0.3)[0], expected)
    assert words() == ["eta"]


SCALES = {"eta": 0.7, "eta_interval": [0.2, 0.8], "eps_scale": [1.01, 1.02], "end_scale": 1.1}


@pytest.mark.parametrize("clip", [None, 1.0])
def test_scales_and_the_interval_of_the_table_act(clip, words):
    x, noise = _x(2, 1, 2, 2), _x(4, 2, 1, 2, 2, seed=2)
    settings = {**FEW_STEPS, "clip_sample": clip is not None}
    few = GeneralizedDDIMScheduler(**settings, **SCALES)
    few.set_timesteps(timesteps=TAU)
    expected, _ = _run(few, x, None, noise=noise)
    none = [[0.0] * (i + 2) for i in range(4)]
    entry = _entry(weights=none, clip=clip, **SCALES)
    for own in ({}, SCALES, {"eps_scale": (1.01, 1.02)}):  # the config leaves it open, or agrees
        found = _run(_scheduler(entry, clip_sample=clip is not None, **own), x, noise=noise)[0]
        assert torch.equal(found, expected)
    assert words() == []
    plain = _run(_scheduler(_entry(clip=clip, clips=None)), x)[0]
    scaled = _run(_scheduler(_entry(clip=clip, clips=None, end_scale=1.1)), x)[0]
    assert torch.allclose(scaled, 1.1 * plain, rtol=1e-12)


@pytest.mark.parametrize("form", ["int", "tensor", "one", "unread"])
def test_every_form_of_a_timestep_takes_the_row(form, monkeypatch):
    x = _x(2, 1, 2, 2)
    expected, _ = _run(_scheduler(), x)
    scheduler = _scheduler()
    scheduler.set_timesteps(4)
    if form == "unread":  # as on an accelerator
        for module in (history, scheduling_base):
            monkeypatch.setattr(module, "read_if_free", lambda t: None)
    for _ in range(2):  # the second run starts anew without a plan
        end = x
        for t in TAU:
            given = {"int": t, "one": torch.tensor([t])}.get(form, torch.tensor(t))
            end = scheduler.step(_exact(end, scheduler.alpha_bar[t]), given, end).prev_sample
        assert torch.equal(end, expected)


def test_a_run_that_starts_in_the_middle_goes_without(words, monkeypatch):
    def after_the_first(scheduler, x):
        for t in TAU[1:]:
            eps = _exact(x, scheduler.alpha_bar[t])
            x = scheduler.step(eps, torch.tensor(t), x).prev_sample
        return x

    few = GeneralizedDDIMScheduler(**FEW_STEPS, clip_sample=False)
    few.set_timesteps(timesteps=TAU)
    x = _x(2, 1, 2, 2)
    expected = after_the_first(few, x)
    scheduler = _scheduler()
    scheduler.set_timesteps(4)
    assert torch.equal(after_the_first(scheduler, x), expected)
    assert words() == ["start"]
    scheduler = _scheduler()
    _run(scheduler, x)
    for module in (history, scheduling_base):
        monkeypatch.setattr(module, "read_if_free", lambda t: None)
    assert torch.equal(after_the_first(scheduler, x), expected)


@pytest.mark.parametrize("steps", [(999, 300), (999, 640, 500), (999, 640, 640)], ids=str)
@pytest.mark.parametrize("as_given", [int, torch.tensor, lambda t: torch.tensor([t])])
def test_a_run_that_leaves_the_plan_goes_without_and_says_so(steps, as_given, words):
    clips = {"clip_sample": True}
    scheduler = _scheduler(_entry(clips=1.0), **clips)
    scheduler.set_timesteps(4)
    x = _x(2, 1, 2, 2)
    for t in steps[:-1]:
        x = scheduler.step(_exact(x, scheduler.alpha_bar[t]), as_given(t), x).prev_sample
    assert words() == []
    few = GeneralizedDDIMScheduler(**FEW_STEPS, **clips)
    few.set_timesteps(timesteps=TAU)
    eps, last = 3 * x, steps[-1]  # x0_hat is clipped by the config, which the table does not do
    expected = few.step(eps, last, x).prev_sample
    assert torch.equal(scheduler.step(eps, as_given(last), x).prev_sample, expected)
    assert words() == ["start"]


@pytest.mark.parametrize(
    "change", [lambda x: x[:1], lambda x: torch.cat([x, x]), torch.Tensor.float]
)
def test_a_batch_that_changes_within_a_run_goes_without_and_says_so(change, words, monkeypatch):
    clips = {"clip_sample": True}
    scheduler, few = _scheduler(_entry(clips=1.0), **clips), GeneralizedDDIMScheduler(**FEW_STEPS)
    few.set_timesteps(timesteps=TAU)
    scheduler.set_timesteps(4)
    x = _x(2, 1, 2, 2)
    for t in TAU[:2]:
        x = scheduler.step(_exact(x, scheduler.alpha_bar[t]), t, x).prev_sample
    assert words() == []
    x = change(x)
    expected = few.step(3 * x, TAU[2], x).prev_sample
    assert torch.equal(scheduler.step(3 * x, TAU[2], x).prev_sample, expected)
    assert words() == ["batch"] and not scheduler.follows_table
    # a new run of another batch is one, whether or not its timesteps can be read for free
    again = _scheduler()
    _run(again, _x(2, 1, 2, 2))
    for module in (history, scheduling_base, stored_sampler):
        monkeypatch.setattr(module, "read_if_free", lambda t: None)
    _run(again, change(_x(2, 1, 2, 2)), None)
    assert again.follows_table and words() == ["batch"]


def test_a_loop_that_asks_for_more_than_it_steps_with_is_guided(words):
    x = _x(2, 1, 2, 2)
    expected, _ = _run(_scheduler(), x)
    for times, said in ((1, []), (2, ["guidance"])):
        scheduler, end = _scheduler(), x
        for _ in range(2):  # the second run has to find out again
            scheduler.set_timesteps(4)
            end = x
            for t in TAU:
                asked = torch.cat([end] * times)
                assert torch.equal(scheduler.scale_model_input(asked, t), asked)
                end = scheduler.step(_exact(end, scheduler.alpha_bar[t]), t, end).prev_sample
            assert torch.equal(end, expected) == scheduler.follows_table == (times == 1)
        assert words() == said
    guided = _scheduler(_entry(guidance_scale=2.0))
    guided.set_timesteps(4)
    guided.note_guidance(2.0)  # what is noted counts, however the loop asks
    guided.scale_model_input(torch.cat([x, x]))
    guided.step(x, TAU[0], x)
    assert guided.follows_table and words() == ["guidance"]


def test_steps_of_a_long_table_compile_a_few_times_only():
    torch._dynamo.reset()
    tau = list(range(999, 0, -83))
    scheduler = _scheduler(_entry(tau, shape=[1, 2, 2]))
    x = _x(2, 1, 2, 2, dtype=torch.float32)
    expected, _ = _run(scheduler, x, len(tau))
    scheduler.set_timesteps(len(tau))
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    step = torch.compile(
        lambda m, t, x: scheduler.step(m, t, x, return_dict=False)[0],
        fullgraph=True,
        backend=backend,
    )
    levels = scheduler.alpha_bar.float()
    for t in scheduler.timesteps:
        x = step(_exact(x, levels[t]), t, x)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) <= 3 < len(tau)


def test_a_copy_goes_on_in_the_middle_of_a_run():
    x = _x(2, 1, 2, 2)
    expected, _ = _run(_scheduler(), x)
    for of in (copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))):
        scheduler, end = _scheduler(), x
        scheduler.set_timesteps(4)
        for t in TAU:
            end = scheduler.step(_exact(end, scheduler.alpha_bar[t]), t, end).prev_sample
            scheduler = of(scheduler)
        assert torch.equal(end, expected)


# -- what it was not made for


OTHERS = {
    "clipping": [{"clip_sample": True}, {"thresholding": True}],
    "eta": [{"eta": 0.5}, {"eta": 1.0}, {"eta_interval": [0.1, 0.9]}],
    "solver": [
        {"solver_order": 3},
        {"solver_form": "epsilon"},
        {"lower_order_final": True},
        {"solver_variable": "log_rho"},
        {"solver_corrector": False},
        {"solver_corrector_order": 2},
    ],
    "process": [{"beta_end": 0.021}, {"set_alpha_to_one": False}, {"beta_schedule": "sigmoid"}],
    "scale": [{"eps_scale": 1.02}, {"eps_scale": [1.0, 1.1]}, {"end_scale": 1.1}],
    "timesteps": [{"original_inference_steps": 50}],
}


@pytest.mark.parametrize(
    ("word", "settings"), [(word, s) for word, each in OTHERS.items() for s in each], ids=str
)
def test_other_settings_go_without_and_say_why(word, settings, words):
    x = _x(2, 1, 2, 2, dtype=torch.float32)
    noise = _x(4, 2, 1, 2, 2, dtype=torch.float32)
    given = {**FEW_STEPS, "clip_sample": False, **settings}
    expected, _ = _run(GeneralizedDDIMScheduler(**given), x, noise=noise)
    scheduler = _scheduler(**settings)
    assert torch.equal(_run(scheduler, x, noise=noise)[0], expected)
    assert words() == [word]


def test_other_plans_go_without_and_say_why(words):
    scheduler = _scheduler()
    scheduler.set_timesteps(timesteps=TAU)
    scheduler.set_timesteps(4, sigma=[0.1, 0.1, 0.1, 0.0])
    scheduler.set_timesteps(3)
    _scheduler(timesteps=TAU).set_timesteps()
    assert words() == ["timesteps", "sigma", "calls", "timesteps"]
    assert scheduler.timesteps.tolist() == [999, 666, 332]


@pytest.mark.parametrize(
    ("name", "value", "follows"),
    [
        ("timesteps", torch.tensor([900, 400, 30]), False),
        ("num_inference_steps", 7, False),
        ("timesteps", torch.tensor(TAU[1:]), True),  # a part: the first step of a run will tell
        ("num_inference_steps", 4, True),
    ],
    ids=str,
)
def test_plans_that_are_assigned_go_without_and_say_why(name, value, follows, words):
    scheduler = _scheduler()
    scheduler.set_timesteps(4)
    setattr(scheduler, name, value)
    _ = scheduler.timesteps
    assert scheduler.follows_table is follows
    assert words() == ([] if follows else ["timesteps"])


def test_the_noise_of_the_config_is_no_table_s(words):
    statistics = {name: [0.5] * T for name in ("gamma", "eps_error", "x0_error")}
    stored = {**statistics, "solver": {"4": _entry()}}
    _scheduler(calibration=stored, reverse_variance="optimal").set_timesteps(4)
    assert words() == ["noise"]


@pytest.mark.parametrize("clip", [None, 1.0])
def test_clipping_of_the_calibrated_config_or_of_the_table(clip, words):
    """The table was made for a config that clips at 1, and itself clips or does not."""
    x = _x(2, 1, 2, 2)
    entry = _entry(clip=clip, clips=1.0)
    end = [_run(_scheduler(entry, clip_sample=True), x)[0]]
    if clip is None:
        end.append(_run(_scheduler(entry, clip_sample=False), x)[0])
    assert all(torch.equal(e, end[0]) for e in end) and words() == []
    _scheduler(entry, clip_sample=True, clip_sample_range=2.0).set_timesteps(4)
    assert words() == ["clipping"]


def test_a_change_after_planning_is_seen(words):
    x = _x(2, 1, 2, 2)
    for change, word in (
        (lambda s: s.register_to_config(eta=0.5), "eta"),
        (lambda s: setattr(s.config, "clip_sample", True), "clipping"),
        (lambda s: setattr(s, "betas", s.betas * 1.05), "process"),
        (lambda s: s.register_to_config(solver_calibrated=False), "solver_calibrated"),
        (lambda s: s.without_table("guidance"), "guidance"),
    ):
        changed, analytic = _scheduler(), _scheduler(solver_calibrated=False)
        changed.set_timesteps(4)
        analytic.set_timesteps(timesteps=TAU)
        for scheduler in (changed, analytic):
            change(scheduler)
        noise = _x(4, 2, 1, 2, 2, seed=5)
        ends = [_run(scheduler, x, None, noise)[0] for scheduler in (changed, analytic)]
        assert torch.equal(*ends)
        assert words()[-1] == word
    kept = _scheduler()
    kept.set_timesteps(4)
    kept.register_to_config(steps_offset=1)
    kept.timesteps = kept.timesteps.clone()
    assert torch.equal(_run(kept, x, None)[0], _run(_scheduler(), x)[0])


def test_samples_of_another_shape_go_without(words):
    entry = _entry(shape=[1, 2, 2])
    with_it, _ = _run(_scheduler(entry), _x(2, 1, 2, 2))
    assert torch.equal(with_it, _run(_scheduler(), _x(2, 1, 2, 2))[0]) and words() == []
    _run(_scheduler(entry), _x(2, 1, 4, 4))
    assert words() == ["shape"]


class _Exact:
    """A perfect network as pipelines call it."""

    dtype, config = torch.float64, {}

    def __call__(self, x, t):
        return SimpleNamespace(sample=_exact(x, GeneralizedDDIMScheduler().alpha_bar[t]))


class _Guided(BoundNetwork):
    def predict(self, x, t):
        return self.networks[0](x, t).sample


def test_a_guided_loop_of_ours_goes_without(words):
    x = _x(2, 1, 2, 2)
    for network, settings in (
        (_Exact(), {}),
        (_Guided(_Exact(), guides=True), {"solver_calibrated": False}),
    ):
        scheduler, analytic = _scheduler(), _scheduler(**settings)
        scheduler.set_timesteps(4)
        end = denoise(network, scheduler, x, scheduler.timesteps, {})
        analytic.set_timesteps(**({"timesteps": TAU} if settings else {"num_inference_steps": 4}))
        assert torch.equal(end, _run(analytic, x, None)[0])
    assert words() == ["guidance"]


def test_inversion_goes_without_and_says_so(caplog, words):
    config = _scheduler().config
    inverse = GeneralizedDDIMInverseScheduler.from_config(config, solver_order=1)
    inverse.set_timesteps(4)
    assert sum("inversion" in message for message in caplog.messages) == 1


# -- what is stored


BAD = {
    "a list": ([], "is \\[\\]; it must be a dictionary"),
    "version": ({"version": 2}, r"\['version'\]` is 2; this package reads version 1"),
    "no version": ({"version": None}, r"\['version'\]` is None"),
    "timesteps up": ({"timesteps": [9, 640, 300, 90]}, "must decrease strictly"),
    "timesteps equal": ({"timesteps": [999, 640, 640, 90]}, "must decrease strictly"),
    "timesteps out": ({"timesteps": [1000, 640, 300, 90]}, "0 .. 999"),
    "fewer": ({"timesteps": [999, 640, 300]}, "it must be 4 timesteps"),
    "a row short": ({"weights": _weights()[:3]}, r"\['weights'\]` is .* a list of 4 lists"),
    "a weight short": ({"weights": [[0.1], *_weights()[1:]]}, r"\['weights'\]\[0\]` is \[0.1\]"),
    "NaN": ({"weights": [[math.nan, 0.0], *_weights()[1:]]}, r"2 finite numbers"),
    "infinite": ({"weights": [[math.inf, 0.0], *_weights()[1:]]}, r"2 finite numbers"),
    "huge": ({"weights": [[1e30, 0.0], *_weights()[1:]]}, r"each from -10000 to 10000"),
    "beyond floats": ({"weights": [[10**400, 0.0], *_weights()[1:]]}, r"2 finite numbers"),
    "eta beyond floats": ({"eta": 10**400}, r"\['eta'\]` is 1000"),
    "clip beyond floats": ({"clip": 10**400}, r"\['clip'\]` is 1000"),
    "scale beyond floats": ({"eps_scale": [1.0, 10**400]}, r"\['eps_scale'\]` is \[1.0, 1000"),
    "end_scale line": ({"end_scale": [1.0]}, r"\['end_scale'\]` is \[1.0\]"),
    "text": ({"weights": [["0", 0.0], *_weights()[1:]]}, r"2 finite numbers"),
    "eta": ({"eta": -1.0}, r"\['eta'\]` is -1.0; it must be a finite number >= 0"),
    "no eta": ({"eta": None}, r"\['eta'\]` is None"),
    "clip": ({"clip": 0.0}, r"\['clip'\]` is 0.0; it must be None or a finite number > 0"),
    "clip true": ({"clip": True}, r"\['clip'\]` is True"),
    "clips": ({"clips": -1}, r"\['clips'\]` is -1"),
    "eps_scale": ({"eps_scale": 0.0}, "`eps_scale` is 0.0"),
    "eps_scale text": ({"eps_scale": "1"}, r"\['eps_scale'\]` is '1'"),
    "eps_scale line": ({"eps_scale": [1.0, 1.0, 1.0]}, "`eps_scale` is "),
    "end_scale": ({"end_scale": -1.0}, "`end_scale` is -1.0"),
    "end_scale none": ({"end_scale": None}, r"\['end_scale'\]` is None"),
    "eta_interval": ({"eta_interval": [0.5, 0.2]}, "`eta_interval` is "),
    "eta_interval text": ({"eta_interval": "ab"}, "`eta_interval` is 'ab'"),
    "held_out": ({"held_out": math.nan}, r"\['held_out'\]` is nan"),
    "n": ({"n": 0}, r"\['n'\]` is 0"),
    "alpha_bar": ({"alpha_bar": [0.5] * 4}, r"\['alpha_bar'\]` is .* 5 increasing numbers"),
    "alpha_bar down": ({"alpha_bar": [0.5, 0.4, 0.3, 0.2, 0.1]}, "5 increasing numbers"),
    "alpha_bar out": ({"alpha_bar": [0.1, 0.2, 0.3, 0.4, 1.5]}, "5 increasing numbers"),
    "shape": ({"shape": [0, 2]}, r"\['shape'\]` is \[0, 2\]"),
    "unknown": ({"wieghts": []}, "has the key 'wieghts', which version 1 does not know"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, MarkovianDDPMScheduler])
def test_a_bad_table_is_refused_when_it_is_read(name, cls):
    changed, message = BAD[name]
    entry = changed if isinstance(changed, list) else {**_entry(), **changed}
    with pytest.raises(ValueError, match=r"`calibration\['solver'\]\['4'\].*" + message):
        cls(calibration={"solver": {"4": entry}})


@pytest.mark.parametrize("key", ["0", "04", "four", "1001", 4, "-4", "٤"])
def test_a_bad_number_of_calls_is_refused(key):
    with pytest.raises(ValueError, match=r"`calibration\['solver'\]` has the key"):
        GeneralizedDDIMScheduler(calibration={"solver": {key: _entry()}})


@pytest.mark.parametrize("missing", solver_tables.NEEDED)
def test_what_is_missing_is_named(missing):
    entry = {k: v for k, v in _entry().items() if k != missing}
    with pytest.raises(ValueError, match=missing):
        GeneralizedDDIMScheduler(calibration={"solver": {"4": entry}})
    with pytest.raises(ValueError, match=r"`calibration\['solver'\]` is \[1\]"):
        GeneralizedDDIMScheduler(calibration={"solver": [1]})


def test_a_record_is_read_back():
    entry = _entry(shape=[1, 2, 2], clip=1.0)
    table = solver_table_of({"solver": {"4": entry}}, 4, T)
    record = solver_tables.pack_solver_table(table, n=128, held_out=0.1, analytic=0.2)
    again = json.loads(json.dumps(record))
    read = solver_table_of({"solver": {"4": again}}, 4, T)
    assert read._replace(alpha_bar=[]) == table._replace(alpha_bar=[])
    assert read.alpha_bar == pytest.approx(table.alpha_bar, rel=1e-8)
    assert again["n"] == 128 and again["version"] == 1


@pytest.mark.parametrize("stock", [DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler])
def test_tables_travel_through_stock_classes(stock, tmp_path):
    ours = _scheduler()
    x = _x(2, 1, 2, 2)
    expected, _ = _run(ours, x)
    theirs = stock.from_config(ours.config)
    theirs.save_pretrained(tmp_path)
    for config in (theirs.config, stock.load_config(tmp_path)):
        back = GeneralizedDDIMScheduler.from_config(config)
        assert torch.equal(_run(back, x)[0], expected)
    through = MarkovianDDPMScheduler.from_config(ours.config)
    assert torch.equal(_run(GeneralizedDDIMScheduler.from_config(through.config), x)[0], expected)


def test_tables_are_in_the_portable_form():
    x = _x(2, 1, 2, 2)
    stock, notes = to_portable(_scheduler())
    assert torch.equal(
        _run(GeneralizedDDIMScheduler.from_config(stock.config), x)[0], _run(_scheduler(), x)[0]
    )
    assert any("solver_calibrated=True has no effect" in note for note in notes)
