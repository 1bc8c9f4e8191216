"""`eta_interval`, `eps_scale` and `end_scale`: what they do to a step, to Gaussian data, and where.

The Gaussian data have an exact eps, so that a run is affine: its mean and variance follow from a
recursion of numbers, written here once more.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from ddim_schedulers import (
    GeneralizedDDIMInverseScheduler,
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
    scales,
    to_portable,
)
from ddim_schedulers.betas import betas_from_alpha_bar
from ddim_schedulers.multistep import multistep_weights

SHAPE = (2, 1, 3, 3)
PLAN = [900, 800, 650, 400, 200, 100]
INTERVAL = [0.2, 0.8]
KINDS = ("epsilon", "sample", "v_prediction", "posterior_mean")
CLASSES = [GeneralizedDDIMScheduler, MarkovianDDPMScheduler, GeneralizedDDIMInverseScheduler]
FORWARD = CLASSES[:2]
SOLVERS = [
    {},
    {"solver_order": 2, "solver_corrector": True},
    {"solver_order": 3, "solver_form": "epsilon"},
]


def _planned(cls=GeneralizedDDIMScheduler, plan=PLAN, **settings):
    scheduler = cls(**{"clip_sample": False, **settings})
    scheduler.set_timesteps(timesteps=plan)
    return scheduler


def _run(scheduler, noises, output=lambda x, t: 0.3 * x, start=0):
    """Returns every x_s and x0_hat of a run from `start`, with these noises."""
    x, samples = noises[-1], []
    for i, t in enumerate(PLAN[start:]):
        arguments = {} if type(scheduler) is CLASSES[2] else {"variance_noise": noises[i]}
        step = scheduler.step(output(x, t), t, x, **arguments)
        x = step.prev_sample
        samples += [x, step.pred_original_sample]
    return samples


def _noises(dtype=torch.float64):
    return torch.randn(
        len(PLAN) + 1, *SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(5)
    )


def _same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# -- nothing set


@pytest.mark.parametrize("cls", FORWARD)
def test_neutral_values_change_no_bit(cls):
    neutral = {"eps_scale": [1, 1.0], "end_scale": 1}
    members = [{}]
    if cls is GeneralizedDDIMScheduler:
        neutral["eta_interval"] = [0.0, 1.0]
        members = [{"eta": 0.7, **solver} for solver in SOLVERS]
    for member, kind, clip in itertools.product(members, KINDS, (False, True)):
        settings = {**member, "prediction_type": kind, "clip_sample": clip}
        plain = _run(_planned(cls, **settings), _noises())
        assert _same(plain, _run(_planned(cls, **settings, **neutral), _noises()))


def test_add_noise_and_velocity_are_untouched():
    settings = {"eps_scale": 1.1, "end_scale": 1.2, "eta_interval": INTERVAL, "eta": 1.0}
    x, z = _noises()[:2]
    t = torch.tensor([3, 700])
    plain, scaled = _planned(), _planned(**settings)
    assert torch.equal(plain.add_noise(x, z, t), scaled.add_noise(x, z, t))
    assert torch.equal(plain.get_velocity(x, z, t), scaled.get_velocity(x, z, t))


# -- the interval of eta


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("clip", [False, True])
def test_an_interval_is_the_vector_of_sigma_with_zeros_outside(solver, clip):
    """Both ends included: 800 and 200 of 1000 add noise, 900 and 100 do not."""
    common = {**solver, "clip_sample": clip}
    interval = _planned(eta=0.6, eta_interval=INTERVAL, **common)
    free = _planned(eta=0.6)
    sigma = [
        0.6 * math.sqrt(free._get_variance(t, s).double()) if 200 <= t <= 800 else 0.0
        for t, s in free.planned_pairs()
    ]
    assert [std > 0 for std in sigma] == [False, True, True, True, True, False]
    vector = GeneralizedDDIMScheduler(**{"clip_sample": False, **common})
    vector.set_timesteps(timesteps=PLAN, sigma=sigma)
    noises = _noises()
    for a, b in zip(_run(interval, noises), _run(vector, noises), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # _get_variance is float32
    by_argument = GeneralizedDDIMScheduler(clip_sample=clip, eta_interval=INTERVAL, **solver)
    by_argument.set_timesteps(timesteps=PLAN)
    x = noises[-1]
    for i, t in enumerate(PLAN):
        x = by_argument.step(0.3 * x, t, x, eta=0.6, variance_noise=noises[i]).prev_sample
    assert torch.equal(x, _run(interval, noises)[-2])


def test_the_noise_of_a_seed_does_not_depend_on_the_interval():
    """Steps outside draw, too: the noise of a step is the same for every interval."""

    def drawn(**settings):
        generator = torch.Generator().manual_seed(0)
        scheduler = _planned(eta=1.0, **settings)
        for t in PLAN:
            scheduler.step(torch.zeros(SHAPE), t, torch.zeros(SHAPE), generator=generator)
        return generator.get_state()

    assert torch.equal(drawn(), drawn(eta_interval=INTERVAL))


@pytest.mark.parametrize("solver", SOLVERS[1:])
def test_history_goes_on_across_the_edges(solver):
    """The steps after an edge are those of a full history, and not those of a new start."""
    scheduler = _planned(eta=0.8, eta_interval=INTERVAL, **solver)
    noises = _noises()
    whole = _run(scheduler, noises)
    edges = [PLAN.index(800), PLAN.index(100)]
    a, landed = scheduler._alpha_bar, scheduler._alpha_bar_s
    sigma = scheduler._sigma_of(0.8)
    weights = multistep_weights(
        solver.get("solver_form", "sample"),
        solver["solver_order"],
        a[PLAN],
        landed[PLAN],
        sigma[PLAN],
        solver.get("solver_corrector", False),
    )
    table = scheduler._table_for(0.8, False, torch.device("cpu"), torch.float64)
    assert torch.equal(table.multistep.weights[:, PLAN], weights)
    for i in edges:
        scheduler.set_timesteps(timesteps=PLAN)
        x = whole[2 * (i - 1)]
        alone = scheduler.step(0.3 * x, PLAN[i], x, variance_noise=noises[i]).prev_sample
        assert float((alone - whole[2 * i]).abs().max()) > 1e-3


def _error_of_the_variance(n, restarts):
    """Relative error of the variance of x_0, order 2, eta 1 in the interval alone; even steps."""
    variance, big_t = 0.1, 513
    rho = torch.linspace(math.log(0.05), math.log(200.0), big_t, dtype=torch.float64).exp()
    scheduler = GeneralizedDDIMScheduler(
        big_t,
        trained_betas=betas_from_alpha_bar(1 / (1 + rho**2)).tolist(),
        clip_sample=False,
        set_alpha_to_one=False,
        eta=1.0,
        eta_interval=INTERVAL,
        solver_order=2,
    )
    scheduler.set_timesteps(timesteps=[*range(big_t - 1, 0, -((big_t - 1) // n))])
    a = scheduler.alpha_bar
    x = torch.zeros(n + 1, 1, dtype=torch.float64)  # responses to the start and to every noise
    x[0] = (a[-1] * variance + 1 - a[-1]).sqrt()
    before = False
    for i, (t, _) in enumerate(scheduler.planned_pairs()):
        inside = INTERVAL[0] <= t / big_t <= INTERVAL[1]
        if restarts and inside != before:
            scheduler._past = None
        before = inside
        eps = (1 - a[t]).sqrt() * x / (a[t] * variance + 1 - a[t])
        z = torch.zeros_like(x)
        z[i + 1] = 1
        x = scheduler.step(eps, t, x, variance_noise=z).prev_sample
    return abs(float(x.square().sum() / (a[0] * variance + 1 - a[0])) - 1)


def test_a_history_that_starts_again_at_the_edges_is_worse():
    """Why it goes on: x0_hat belongs to (x_t, t), whether or not noise led there."""
    errors = [_error_of_the_variance(n, False) for n in (32, 64, 128)]
    for n, error in zip((32, 64, 128), errors, strict=True):
        assert error < 0.6 * _error_of_the_variance(n, True)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(2, abs=0.15)


def test_a_learned_variance_is_left_out_where_the_interval_adds_none():
    told = {"variance_type": "learned_range", "clip_sample": False}
    scheduler = GeneralizedDDIMScheduler.from_config(told, eta=1.0, eta_interval=INTERVAL)
    scheduler.set_timesteps(timesteps=PLAN)
    double = torch.zeros(SHAPE[0], 2, *SHAPE[2:])
    for t in (900, 100):
        scheduler.step(double, t, torch.zeros(SHAPE))
    for t in (800, 200):
        with pytest.raises(ValueError, match="reverse_variance"):
            scheduler.step(double, t, torch.zeros(SHAPE))


# -- the amplitudes


def _line(k, t):
    return k if isinstance(k, float) else k[0] + (k[1] - k[0]) * t / 1000


def _as_scaled(scheduler, closed_form, kind, m, x, t, scale):
    """Returns the output whose eps_hat is that of m over the scale."""
    a = scheduler.alpha_bar[t]
    x0, eps = closed_form.predictions(kind, m, x, float(a))
    eps = eps / scale
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    return {"epsilon": eps, "sample": x0, "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * x0}[
        kind
    ]


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("k", [1.07, [0.98, 1.1]])
def test_eps_is_divided_before_x0_and_clipping(closed_form, kind, k):
    """A scheduler with a scale is the plain one, asked with the divided eps."""
    members = [(GeneralizedDDIMScheduler, {"eta": 0.5, **solver}) for solver in SOLVERS]
    for cls, member in [*members, (MarkovianDDPMScheduler, {})]:
        for limit in ({}, {"clip_sample": True}, {"thresholding": True}):
            settings = {"prediction_type": kind, **member, **limit}
            plain, scaled = _planned(cls, **settings), _planned(cls, eps_scale=k, **settings)

            def divided(x, t, plain=plain):
                m = 0.8 * x.roll(1, 0)
                return _as_scaled(plain, closed_form, kind, m, x, t, _line(k, t))

            expected = _run(plain, _noises(), divided)
            got = _run(scaled, _noises(), lambda x, t: 0.8 * x.roll(1, 0))
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
            start = _run(plain, _noises(), lambda x, t: 0.8 * x.roll(1, 0))
            assert not torch.allclose(got[-2], start[-2], rtol=1e-4)


def test_a_multiplied_eps_is_noticed(closed_form, monkeypatch):
    """The mutation: eps times the scale."""
    monkeypatch.setattr(scales, "scaled_eps", lambda eps, k: (eps[0] * k, eps[1] * k))
    with pytest.raises(AssertionError):
        test_eps_is_divided_before_x0_and_clipping(closed_form, "epsilon", 1.07)


@pytest.mark.parametrize("cls", FORWARD)
def test_the_finished_sample_alone_is_multiplied(cls):
    for end in (True, False) if cls is GeneralizedDDIMScheduler else (True,):
        for solver in SOLVERS if cls is GeneralizedDDIMScheduler else ({},):
            settings = {"clip_sample": True, **solver}
            if cls is GeneralizedDDIMScheduler:
                settings |= {"eta": 0.5, "set_alpha_to_one": end}
            plain = _run(_planned(cls, **settings), _noises())
            scaled = _run(_planned(cls, end_scale=1.25, **settings), _noises())
            assert _same(plain[:-2], scaled[:-2]) and torch.equal(plain[-1], scaled[-1])
            torch.testing.assert_close(scaled[-2], 1.25 * plain[-2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("k", [1.0, 1.02, [0.97, 1.06]])
def test_gaussian_data_follow_the_recursion(order, k):
    """Mean and variance of every x_s, float64, from the covariance of (x_t, the x0_hat before)."""
    mean, variance, end_scale, eta = 0.4, 0.3, 1.05, 0.9
    scheduler = _planned(
        eta=eta, eta_interval=INTERVAL, eps_scale=k, end_scale=end_scale, solver_order=order
    )
    n, a = len(PLAN), scheduler.alpha_bar
    x = torch.zeros(n + 2, 1, dtype=torch.float64)  # responses to x_T, to every noise, and to 1
    x[0] = 1.0
    first, second = np.zeros(2), np.diag([1.0, 0.0])  # of (x_t, x0_hat before)
    weights = multistep_weights(
        "sample",
        2,
        a[PLAN],
        torch.cat([a[PLAN[1:]], torch.ones(1, dtype=torch.float64)]),
        scheduler._sigma_of(eta)[PLAN],
    )
    for i, (t, s) in enumerate(scheduler.planned_pairs()):
        a_t, a_s = float(a[t]), float(a[s]) if s >= 0 else 1.0
        root, rest, total = math.sqrt(a_t), math.sqrt(1 - a_t), a_t * variance + 1 - a_t
        eps = rest * x / total
        eps[n + 1] -= rest * root * mean / total
        z = torch.zeros_like(x)
        z[i + 1] = 1
        x = scheduler.step(eps, t, x, variance_noise=z).prev_sample
        # the same by hand: eps_hat = (x_t - root mean) rest / total / k, affine in x_t
        e_x = rest / total / _line(k, t)
        e_1 = -root * mean * e_x
        x0_x, x0_1 = (1 - rest * e_x) / root, -rest * e_1 / root
        sigma = 0.0
        if 200 <= t <= 800:
            sigma = eta * math.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
        along = math.sqrt(max(1 - a_s - sigma**2, 0.0))
        w = float(weights[1, i, 0]) if order == 2 and i > 0 else 0.0
        scale = end_scale if s < 0 else 1.0
        to_x = [scale * ((math.sqrt(a_s) - w) * x0_x + along * e_x), scale * w]
        matrix = np.array([to_x, [x0_x, 0.0]])
        shift = np.array([scale * ((math.sqrt(a_s) - w) * x0_1 + along * e_1), x0_1])
        first = matrix @ first + shift
        second = matrix @ second @ matrix.T
        second[0, 0] += (scale * sigma) ** 2
        assert float(x[n + 1]) == pytest.approx(first[0], rel=1e-10, abs=1e-12)
        assert float(x[: n + 1].square().sum()) == pytest.approx(second[0, 0], rel=1e-10)


# -- the inverse


@pytest.mark.parametrize("end", [True, False])
def test_the_inverse_undoes_the_scales(end):
    settings = {"eps_scale": [0.97, 1.04], "end_scale": 1.08, "set_alpha_to_one": end}
    forward, inverse = _planned(**settings), _planned(CLASSES[2], **settings)
    eps = torch.randn(1000, *SHAPE, dtype=torch.float64)
    x = start = _noises()[0]
    for t, _ in forward.planned_pairs():
        x = forward.step(eps[t], t, x).prev_sample
    for t, _ in inverse.planned_pairs():
        x = inverse.step(eps[t], t, x).prev_sample
    torch.testing.assert_close(x, start, rtol=1e-10, atol=1e-10)
    for key in ("eps_scale", "end_scale"):  # each of them is undone
        wrong = _planned(CLASSES[2], **{**settings, key: 1.0})
        y = _run(forward, _noises(), lambda x, t: eps[t])[-2]
        for t, _ in wrong.planned_pairs():
            y = wrong.step(eps[t], t, y).prev_sample
        assert not torch.allclose(y, start, rtol=1e-3)


def test_v_is_inverted_at_its_level():
    """x_s from (x0_hat', eps_hat'), the eps at the level of x_s, as without a scale."""
    inverse = _planned(CLASSES[2], prediction_type="v_prediction", eps_scale=1.1)
    a = inverse.alpha_bar
    x, m = _noises()[:2]
    for t, s in inverse.planned_pairs():
        a_s = a[s] if s >= 0 else torch.ones((), dtype=torch.float64)
        eps = ((1 - a_s).sqrt() * x + a_s.sqrt() * m) / 1.1
        x0 = (x - (1 - a_s).sqrt() * eps) / a_s.sqrt()
        got = inverse.step(m, t, x).prev_sample
        torch.testing.assert_close(got, a[t].sqrt() * x0 + (1 - a[t]).sqrt() * eps)


# -- where they are said, and what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta_interval": [0.2]}, r"`eta_interval` is \[0.2\]; it must be two numbers"),
        ({"eta_interval": [0.8, 0.2]}, "`eta_interval` is"),
        ({"eta_interval": [0.5, 0.5]}, "`eta_interval` is"),
        ({"eta_interval": [-0.1, 0.5]}, "`eta_interval` is"),
        ({"eta_interval": [0.2, 1.1]}, "`eta_interval` is"),
        ({"eta_interval": [0.2, math.nan]}, "`eta_interval` is"),
        ({"eta_interval": [0, True]}, r"`eta_interval\[1\]` is True"),
        ({"eta_interval": "0.2"}, "`eta_interval` is '0.2'"),
        ({"eta_interval": 0.5}, "`eta_interval` is 0.5"),
        ({"eta_interval": INTERVAL, "sigma": [0.1]}, "`eta_interval` is .* `sigma` is given"),
        ({"eta_interval": INTERVAL, "eta": 1.0, "reverse_variance": "sigma_hat"}, "eta_interval"),
        ({"eta_interval": INTERVAL, "eta": 1.0, "reverse_variance": "learned_range"}, "needs `eta"),
        ({"eps_scale": 0}, "`eps_scale` is 0; it must be"),
        ({"eps_scale": -1.0}, "`eps_scale` is -1.0"),
        ({"eps_scale": math.inf}, "`eps_scale` is inf"),
        ({"eps_scale": True}, "`eps_scale` is True"),
        ({"eps_scale": None}, "`eps_scale` is None"),
        ({"eps_scale": "1"}, "`eps_scale` is '1'"),
        ({"eps_scale": [1.0]}, r"`eps_scale` is \[1.0\]"),
        ({"eps_scale": [1.0, 1.0, 1.0]}, "`eps_scale` is"),
        ({"eps_scale": [1.0, 0.0]}, "`eps_scale` is"),
        ({"eps_scale": [1.0, "a"]}, r"`eps_scale\[1\]` is 'a'"),
        ({"end_scale": 0.0}, "`end_scale` is 0.0; it must be"),
        ({"end_scale": math.nan}, "`end_scale` is nan"),
        ({"end_scale": [1.0, 1.0]}, "`end_scale` is"),
        ({"end_scale": None}, "`end_scale` is None"),
    ],
)
def test_what_is_refused(settings, message):
    for cls in CLASSES:
        if not settings.keys() <= {*cls._get_init_keys(cls)}:
            continue
        with pytest.raises(ValueError, match=message):
            cls(**settings)
        scheduler = cls()
        scheduler.set_timesteps(5)
        for key, value in settings.items():  # assigned later it is refused, too
            setattr(scheduler.config, key, value)
        with pytest.raises(ValueError, match=message):
            scheduler.set_timesteps(5)


def test_a_sigma_of_the_plan_contradicts_an_interval():
    scheduler = GeneralizedDDIMScheduler(eta_interval=INTERVAL)
    with pytest.raises(ValueError, match="`sigma` is given, .*eta_interval"):
        scheduler.set_timesteps(timesteps=PLAN, sigma=[0.0] * len(PLAN))


@pytest.mark.parametrize("cls", CLASSES)
def test_at_alpha_bar_zero_eps_cannot_be_scaled(cls):
    settings = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    scheduler = cls(eps_scale=1.01, timestep_spacing="trailing", **settings)
    with pytest.raises(ValueError, match="`eps_scale` is 1.01 and the trajectory"):
        scheduler.set_timesteps(10)
    scheduler.config.timestep_spacing = "leading"
    scheduler.set_timesteps(10)


def test_a_larger_eta_fits_where_the_interval_leaves_out_what_it_exceeds():
    with pytest.raises(ValueError, match="`eta` is 1.05"):
        _planned(plan=[999, 500], eta=1.05)
    _planned(plan=[999, 500], eta=1.05, eta_interval=[0.1, 0.9])


def test_the_keys_travel_between_the_classes_and_through_stock():
    given = {"eta": 0.6, "eta_interval": INTERVAL, "eps_scale": [1.0, 1.02], "end_scale": 1.03}
    ours = GeneralizedDDIMScheduler(**given)
    chain = ours
    for cls in (*CLASSES[1:], *CLASSES[:1]):
        chain = cls.from_config(chain.config)
    stock, notes = to_portable(ours)
    back = GeneralizedDDIMScheduler.from_config(stock.config)
    numpy = GeneralizedDDIMScheduler.from_config(
        {},
        eta=0.6,
        eta_interval=np.array(INTERVAL),
        eps_scale=np.array([1.0, 1.02]),
        end_scale=1.03,
    )
    for scheduler in (chain, back, numpy):
        assert {key: scheduler.config[key] for key in given} == given
    for key in ("eta_interval", "eps_scale", "end_scale"):
        assert any(f"`{key}`" in note for note in notes)
    assert not [n for n in to_portable(GeneralizedDDIMScheduler())[1] if "scale" in n]


def test_the_optimal_trajectory_of_an_interval_is_that_of_the_markovian_member():
    from ddim_schedulers.planning import bound_member

    for settings in ({"eta": 0.5, "eta_interval": INTERVAL}, {"eta": 0.0}):
        assert bound_member(GeneralizedDDIMScheduler(**settings).config) == ("optimal", 1.0)


def test_inversion_leaves_the_scales_out_both_ways(tiny_ddpm):
    from ddim_schedulers.pipelines import InversionPipeline

    unet = tiny_ddpm(GeneralizedDDIMScheduler()).unet
    plain = InversionPipeline(unet, GeneralizedDDIMScheduler(num_train_timesteps=1000))
    scaled = InversionPipeline(
        unet, GeneralizedDDIMScheduler(eps_scale=1.1, end_scale=1.2, eta_interval=INTERVAL, eta=1.0)
    )
    for pipe in (plain, scaled):
        config = pipe.decoding_scheduler().config
        assert (config.eps_scale, config.end_scale, config.eta_interval) == (1.0, 1.0, None)
        assert pipe.inverse_scheduler().config.eps_scale == 1.0


def test_the_likelihood_says_that_it_leaves_the_scales_out(tiny_ddpm, caplog):
    from ddim_schedulers.training.likelihood.measured_model import measured_model_of

    unet = tiny_ddpm(GeneralizedDDIMScheduler()).unet
    measured = measured_model_of(unet, GeneralizedDDIMScheduler(eps_scale=1.1).config)
    assert "`eps_scale` is 1.1" in caplog.text and measured.config["eps_scale"] == 1.0
    caplog.clear()
    measured_model_of(unet, GeneralizedDDIMScheduler().config)
    assert not caplog.text
