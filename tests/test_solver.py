"""Multistep members: their order on Gaussian data, with its exact solution, and the history."""

import copy
import math
import pickle

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from ddim_schedulers import (
    FEW_STEPS,
    GeneralizedDDIMInverseScheduler,
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
    multistep,
    to_portable,
)
from ddim_schedulers.betas import betas_from_alpha_bar
from ddim_schedulers.multistep import gauss_legendre, multistep_weights

MEAN, VARIANCE = 0.4, 0.25
GRID = 2049


@pytest.fixture(scope="module")
def fine_betas():
    """A chain whose log rho is evenly spaced, so that any step size is a choice of timesteps."""
    rho = torch.linspace(math.log(0.05), math.log(200.0), GRID, dtype=torch.float64).exp()
    return betas_from_alpha_bar(1 / (1 + rho**2)).tolist()


def _plan(n, uneven):
    stride = (GRID - 1) // n
    plan = list(range(GRID - 1, 0, -stride))
    return [t - (stride // 4 if uneven and i % 2 else 0) for i, t in enumerate(plan)]


def _exact(kind, x, a):
    """What a perfect network says of N(MEAN, VARIANCE) data."""
    x0 = MEAN + VARIANCE * a.sqrt() * (x - a.sqrt() * MEAN) / (a * VARIANCE + 1 - a)
    eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
    v = a.sqrt() * eps - (1 - a).sqrt() * x0
    return {"epsilon": eps, "sample": x0, "v_prediction": v}[kind]


def _spread(a):
    return (a * VARIANCE + 1 - a).sqrt()


def _error(betas, plan, kind="epsilon", **settings):
    """Global error of one path of the ODE, whose standardised value is constant."""
    scheduler = GeneralizedDDIMScheduler(
        len(betas),
        trained_betas=betas,
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=kind,
        **settings,
    )
    scheduler.set_timesteps(timesteps=plan)
    a = scheduler.alpha_bar
    x = (a[-1].sqrt() * MEAN + 1.3 * _spread(a[-1])).reshape(1, 1)
    for t in plan:
        x = scheduler.step(_exact(kind, x, a[t]), t, x).prev_sample
    return abs(float(x - a[0].sqrt() * MEAN - 1.3 * _spread(a[0])))


def _slope(betas, uneven, **settings):
    """Of the error between steps of 8 and of 4 grid points, which a quarter divides."""
    errors = [_error(betas, _plan(n, uneven), **settings) for n in (256, 512)]
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("form", ["sample", "epsilon"])
def test_measured_order_of_convergence(fine_betas, form, uneven):
    for order in (1, 2, 3):
        slope = _slope(fine_betas, uneven, solver_order=order, solver_form=form)
        assert abs(slope - order) < 0.1, (form, order, slope)


def _least_order(betas, **settings):
    """Return the mean slope from steps of 64 to steps of 4 grid points.

    The constant of the error passes through 0 in some settings, so that one slope says little.
    """
    errors = [_error(betas, _plan(n, False), **settings) for n in (32, 512)]
    return math.log2(errors[0] / errors[1]) / 4


@pytest.mark.parametrize("variable", ["asinh", "log_rho", "rho"])
@pytest.mark.parametrize("form", ["sample", "epsilon"])
def test_every_variable_has_every_order(fine_betas, form, variable):
    settings = {"solver_form": form, "solver_variable": variable}
    for order in (2, 3, 4):
        slope = _least_order(fine_betas, solver_order=order, **settings)
        assert slope > order - 0.3, (form, variable, order, slope)


@pytest.mark.parametrize("form", ["sample", "epsilon"])
def test_the_corrector_adds_an_order(fine_betas, form):
    settings = {"solver_form": form, "solver_corrector": True}
    for order in (2, 3):
        slope = _slope(fine_betas, False, solver_order=order, **settings)
        assert abs(slope - order - 1) < 0.15, (form, order, slope)


@pytest.mark.parametrize("form", ["sample", "epsilon"])
def test_a_corrector_of_any_order_has_that_order(fine_betas, form):
    settings = {"solver_order": 3, "solver_form": form, "solver_corrector": True}
    for order in (2, 3, 4):
        slope = _least_order(fine_betas, solver_corrector_order=order, **settings)
        assert order - 0.3 < slope < order + 0.5, (form, order, slope)


@pytest.mark.parametrize("form", ["sample", "epsilon"])
def test_the_number_of_the_step_has_order_2(fine_betas, form):
    settings = {"solver_form": form, "solver_variable": "step"}
    for order in (2, 3):
        slope = _least_order(fine_betas, solver_order=order, **settings)
        assert abs(slope - 2) < 0.3, (form, order, slope)


@pytest.mark.parametrize("weights", ["bh1", "bh2"])
def test_fixed_weights_keep_the_order(fine_betas, weights):
    settings = {"solver_variable": "log_rho", "solver_weights": weights}
    for form in ("sample", "epsilon"):
        for order in (2, 3):
            slope = _least_order(fine_betas, solver_order=order, solver_form=form, **settings)
            assert slope > order - 0.2, (form, order, slope)


def test_a_wrong_node_costs_the_order(fine_betas, monkeypatch):
    """The mutation: nodes shifted by one grid step leave order 1, and the check notices."""
    true = multistep._earlier
    monkeypatch.setattr(multistep, "_earlier", lambda v, j: true(v, j) * (1 + 0.2 * (j > 0)))
    assert abs(_slope(fine_betas, False, solver_order=2) - 2) > 0.3


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_every_prediction_gives_the_same_path(fine_betas, kind):
    plan = _plan(32, False)
    for form in ("sample", "epsilon"):
        settings = {"solver_order": 3, "solver_form": form, "solver_corrector": True}
        reference = _error(fine_betas, plan, **settings)
        assert _error(fine_betas, plan, kind, **settings) == pytest.approx(reference, rel=1e-6)


@pytest.mark.parametrize("variable", [None, "log_rho"])
def test_a_noisy_member_keeps_the_marginals(fine_betas, variable):
    """Variance of every x_s against a v + 1 - a: order 2 for x0, where Euler's has order 1."""

    def worst(n, eta, order):
        scheduler = GeneralizedDDIMScheduler(
            GRID,
            trained_betas=fine_betas,
            clip_sample=False,
            set_alpha_to_one=False,
            eta=eta,
            solver_order=order,
            solver_variable=variable,
        )
        plan = _plan(n, False)
        scheduler.set_timesteps(timesteps=plan)
        a = scheduler.alpha_bar
        # the run is linear in (start, noises) and in 1, which carries the mean: each row of x is
        # the response to one of them, so that the moments are exact
        x = torch.zeros(n + 2, 1, dtype=torch.float64)
        x[0], x[n + 1] = _spread(a[-1]), a[-1].sqrt() * MEAN
        errors = []
        for i, t in enumerate(plan):
            x0 = VARIANCE * a[t].sqrt() * x / (a[t] * VARIANCE + 1 - a[t])
            x0[n + 1] += MEAN * (1 - VARIANCE * a[t] / (a[t] * VARIANCE + 1 - a[t]))
            eps = (x - a[t].sqrt() * x0) / (1 - a[t]).sqrt()
            z = torch.zeros_like(x)
            z[i + 1] = 1
            x = scheduler.step(eps, t, x, variance_noise=z).prev_sample
            s = plan[i + 1] if i + 1 < n else 0
            errors.append(abs(float(x[: n + 1].square().sum() / _spread(a[s]) ** 2) - 1))
            assert float(x[n + 1]) == pytest.approx(float(a[s].sqrt()) * MEAN, rel=1e-9)
        return max(errors)

    for eta in (0.3, 0.6, 1.0):
        for order, expected in ((1, 1), (2, 2)):
            errors = [worst(n, eta, order) for n in (128, 256)]
            assert abs(math.log2(errors[0] / errors[1]) - expected) < 0.1, (eta, order, errors)


# -- the weights


def test_the_quadrature_is_exact():
    points, weights = gauss_legendre(5)
    for power in range(10):
        assert float((weights * points**power).sum()) == pytest.approx(1 / (power + 1), rel=1e-13)


def test_weights_are_the_integrals_of_the_lagrange_polynomials():
    """Evenly spaced in rho, order 3 is the Adams-Bashforth formula (23, -16, 5) / 12."""
    rho = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    a = 1 / (1 + rho**2)
    weights = multistep_weights("epsilon", 3, a[:4], a[1:], torch.zeros(4, dtype=torch.float64))
    got = weights[2, 2:] / a[3:].sqrt()[:, None]
    expected = -torch.tensor([-16 / 12, 5 / 12], dtype=torch.float64).expand(2, 2)
    torch.testing.assert_close(got, expected)
    assert float(weights[2, 1, 0] / a[2].sqrt()) == pytest.approx(0.5)
    assert torch.equal(weights[:, 0], torch.zeros(3, 2, dtype=torch.float64))
    assert torch.equal(weights[0], torch.zeros(4, 2, dtype=torch.float64))


def test_the_last_step_lands_on_the_extrapolated_x0():
    """At alpha_bar = 1 the variable is rho = 0: x0 is linear in asinh(rho / SCALE) there."""
    a = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    end = torch.tensor([0.5, 0.9, 1.0], dtype=torch.float64)
    node = multistep.variable("sample", a)
    weights = multistep_weights("sample", 2, a, end, torch.zeros(3, dtype=torch.float64))
    assert float(weights[1, 2, 0]) == pytest.approx(float(-node[2] / (node[1] - node[2])))
    lower = multistep_weights(
        "sample", 2, a, end, torch.zeros(3, dtype=torch.float64), lower_order_final=True
    )
    assert float(lower[1, 2, 0]) == 0 and torch.equal(lower[:, :2], weights[:, :2])


SOLVER_IN_LOG_RHO = (("sample", "log_rho"), ("epsilon", "log_rho"))


EVERY_SOLVER = [
    {"solver_form": form, "solver_variable": variable, "solver_weights": weights}
    for form in ("sample", "epsilon")
    for variable, weights in (
        *((name, "exact") for name in multistep.SOLVER_VARIABLES),
        ("log_rho", "bh1"),
        ("log_rho", "bh2"),
    )
]


@pytest.mark.parametrize("settings", EVERY_SOLVER, ids=str)
def test_weights_are_finite_for_every_number_of_steps_and_every_sigma(settings):
    """Up to sigma^2 = 1 - alpha_bar_s, where all of x_s is new and rho_end is 0."""
    scheduler = GeneralizedDDIMScheduler(
        solver_order=4, solver_corrector=True, clip_sample=False, **settings
    )
    for count in (1, 2, 3, 4, 9):
        scheduler.set_timesteps(count)
        pairs = scheduler.planned_pairs()
        for share in (0.0, 0.5, 1.0):
            a_s = [float(scheduler.alpha_bar[s]) if s >= 0 else 1.0 for _, s in pairs]
            sigma = [share * math.sqrt(1 - a) for a in a_s]
            plan = [t for t, _ in pairs]
            scheduler.set_timesteps(timesteps=plan, sigma=sigma)
            x = X.double()
            for t in plan:
                x = scheduler.step(torch.tanh(x), t, x, variance_noise=X).prev_sample
            assert bool(torch.isfinite(x).all()), (count, share)


def test_zero_terminal_snr_is_no_node():
    for form, variable in (("sample", None), ("epsilon", None), *SOLVER_IN_LOG_RHO):
        scheduler = GeneralizedDDIMScheduler(
            rescale_betas_zero_snr=True,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            solver_order=3,
            solver_form=form,
            solver_variable=variable,
            solver_corrector=True,
            eta=0.5,
        )
        scheduler.set_timesteps(6)
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        first_order = GeneralizedDDIMScheduler.from_config(
            scheduler.config, solver_order=1, solver_corrector=False
        )
        first_order.set_timesteps(6)
        for i, t in enumerate(scheduler.timesteps):
            m = torch.tanh(x)
            arguments = {"use_clipped_model_output": True, "variance_noise": torch.ones_like(x)}
            euler = first_order.step(m, t, x, **arguments).prev_sample
            x = scheduler.step(m, t, x, **arguments).prev_sample
            assert bool(torch.isfinite(x).all())
            last = variable == "log_rho" and i == 5  # lands on rho = 0
            assert torch.equal(x, euler) == (i < 2 or (last and form == "sample")), (form, i)


# -- the history


def _sampler(**settings):
    scheduler = GeneralizedDDIMScheduler(timestep_spacing="trailing", **settings)
    scheduler.set_timesteps(6)
    return scheduler


def _loop(scheduler, x, timesteps=None):
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x = scheduler.step(torch.tanh(x) + 0.001 * float(t) * x.sin(), t, x).prev_sample
    return x


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
SOLVERS = [
    {"solver_order": order, "solver_form": form, "solver_corrector": corrector}
    for order in (2, 3, 4)
    for form in ("sample", "epsilon")
    for corrector in (False, True)
]


@pytest.mark.parametrize("settings", SOLVERS, ids=str)
def test_a_loop_run_twice_or_broken_off_starts_anew(settings):
    scheduler = _sampler(**settings)
    once = _loop(scheduler, X)
    assert not torch.equal(once, _loop(_sampler(), X))
    assert torch.equal(_loop(scheduler, X), once)  # without `set_timesteps` between
    _loop(scheduler, torch.full_like(X, torch.nan), scheduler.timesteps[:3])
    assert torch.equal(_loop(scheduler, X), once)
    _loop(scheduler, X[:1], scheduler.timesteps[:3])  # a smaller batch
    assert torch.equal(_loop(scheduler, X), once)
    scheduler.set_timesteps(6)
    assert torch.equal(_loop(scheduler, X, scheduler.timesteps.tolist()), once)  # numbers


def test_a_loop_may_start_anywhere_on_the_plan():
    """img2img: the first step there is of order 1, the next ones use what is known."""
    settings = {"solver_order": 3, "clip_sample": False}
    scheduler, euler = _sampler(**settings), _sampler(clip_sample=False)
    t = scheduler.timesteps[2]
    first = scheduler.step(torch.tanh(X), t, X).prev_sample
    assert torch.equal(first, euler.step(torch.tanh(X), t, X).prev_sample)
    second = scheduler.step(torch.tanh(first), scheduler.timesteps[3], first).prev_sample
    order_two = _sampler(**{**settings, "solver_order": 2})
    first = order_two.step(torch.tanh(X), t, X).prev_sample
    expected = order_two.step(torch.tanh(first), order_two.timesteps[3], first).prev_sample
    torch.testing.assert_close(second, expected)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "quadratic"])
def test_the_history_goes_on_however_many_calls_there_are(spacing):
    for calls in (31, 32, 50, 100):
        scheduler = GeneralizedDDIMScheduler(**{**FEW_STEPS, "timestep_spacing": spacing})
        scheduler.set_timesteps(calls)
        known, x = [], X[:1, :1]
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x), t, x).prev_sample
            known.append(int(scheduler._past.known))
        assert known == [0, 1, *[2] * (calls - 2)]


@pytest.mark.parametrize("t", [998, 500, 0])
def test_an_unplanned_timestep_has_order_one(t):
    scheduler = _sampler(solver_order=3, solver_corrector=True, clip_sample=False)
    _loop(scheduler, X, scheduler.timesteps[:3])
    euler = _sampler(clip_sample=False)
    got = scheduler.step(torch.tanh(X), t, X).prev_sample
    assert torch.equal(got, euler.step(torch.tanh(X), t, X).prev_sample)


def test_the_history_survives_copies_and_what_the_caller_writes():
    scheduler = _sampler(solver_order=3, solver_corrector=True)
    once = _loop(scheduler, X)
    x = _loop(scheduler, X, scheduler.timesteps[:3])
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert torch.equal(_loop(other, x, other.timesteps[3:]), once)
    x = X
    for t in scheduler.timesteps:
        m = torch.tanh(x) + 0.001 * float(t) * x.sin()
        x, x0 = scheduler.step(m, t, x, return_dict=False)
        m.fill_(7.0)  # as a captured graph's next run does
        x0.fill_(7.0)
    assert torch.equal(x, once)


def test_a_run_in_inference_mode_does_not_stop_a_later_gradient():
    scheduler = _sampler(solver_order=3, solver_corrector=True, clip_sample=False)
    with torch.inference_mode():
        _loop(scheduler, X, scheduler.timesteps[:2])
    x = X.clone().requires_grad_()
    _loop(scheduler, x).sum().backward()
    assert bool(torch.isfinite(x.grad).all()) and bool((x.grad != 0).any())


def test_a_batch_of_timesteps_is_refused():
    scheduler = _sampler(solver_order=2)
    with pytest.raises(ValueError, match=r"`timestep` has shape \(2,\); with `solver_order`=2"):
        scheduler.step(X, torch.tensor([999, 832]), X)
    one = scheduler.step(X, torch.tensor([999]), X).prev_sample
    assert torch.equal(one, scheduler.step(X, 999, X).prev_sample)


def test_steps_compile_once_for_the_plan():
    torch._dynamo.reset()
    scheduler = _sampler(solver_order=3, solver_corrector=True, clip_sample=False)
    expected = _loop(scheduler, X)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    step = torch.compile(
        lambda m, t, x: scheduler.step(m, t, x, return_dict=False), fullgraph=True, backend=backend
    )
    x = X
    for t in scheduler.timesteps:
        x = step(torch.tanh(x) + 0.001 * float(t) * x.sin(), t, x)[0]
    torch.testing.assert_close(x, expected)
    assert len(graphs) <= 2  # before and after there is a history


# -- the config

CORRECTED = {"solver_order": 2, "solver_corrector": True}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver_order": 5}, r"`solver_order` is 5; .*\[1, 2, 3, 4\]"),
        ({"solver_order": True}, "`solver_order` is True"),
        ({"solver_order": "2"}, "`solver_order` is '2'"),
        ({"solver_order": 2.0}, r"`solver_order` is 2\.0"),
        ({"solver_form": "v"}, r"`solver_form` is 'v'; .*'epsilon', 'sample'"),
        ({"solver_corrector": True}, "`solver_corrector` is True, but `solver_order` is 1"),
        (
            {"solver_variable": "lambda"},
            "`solver_variable` is 'lambda'; .*None or one of .*'log_rho'",
        ),
        ({"solver_variable": 2}, "`solver_variable` is 2; it must be a name"),
        (
            {"solver_weights": "half", "solver_variable": "log_rho"},
            "`solver_weights` is 'half'; .*bh1",
        ),
        ({"solver_weights": None}, "`solver_weights` is None; .*'exact', 'bh1', 'bh2'"),
        (
            {"solver_weights": "bh1"},
            "`solver_weights` is 'bh1'.*`solver_variable` is None; .*'log_rho'",
        ),
        ({"solver_weights": "bh2", "solver_variable": "rho"}, "`solver_variable` is 'rho'"),
        ({"solver_order": 2, "solver_corrector_order": 2}, "is 2, but `solver_corrector` is False"),
        ({**CORRECTED, "solver_corrector_order": 1}, "is 1; .* from 2 to .* which is 3"),
        ({**CORRECTED, "solver_corrector_order": 4}, "is 4; .* from 2 to .* which is 3"),
        (
            {**CORRECTED, "solver_corrector_order": 2.0},
            r"`solver_corrector_order` is 2\.0; .*integer",
        ),
        ({**CORRECTED, "solver_corrector_order": True}, "`solver_corrector_order` is True"),
        ({"solver_corrector": "yes"}, "`solver_corrector` is 'yes'"),
        (
            {"solver_order": 2, "eta": 1.0, "reverse_variance": "sigma_hat"},
            "`solver_order` is 2, but `reverse_variance` is 'sigma_hat'",
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        GeneralizedDDIMScheduler(**settings)


def test_the_inverse_refuses_a_higher_order():
    config = GeneralizedDDIMScheduler(solver_order=2).config
    with pytest.raises(ValueError, match="`solver_order` is 2 .* only order 1 has an inverse"):
        GeneralizedDDIMInverseScheduler.from_config(config).set_timesteps(4)
    GeneralizedDDIMInverseScheduler.from_config(config, solver_order=1).set_timesteps(4)


@pytest.mark.parametrize("stock", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_the_order_of_another_solver_is_not_taken_over(stock, tmp_path):
    theirs = stock(solver_order=3, lower_order_final=True)
    assert GeneralizedDDIMScheduler.from_config(theirs.config).config.solver_order == 1
    theirs.save_pretrained(tmp_path)
    ours = GeneralizedDDIMScheduler.from_pretrained(tmp_path)
    assert ours.config.solver_order == 1
    ours.save_pretrained(tmp_path)
    ours = GeneralizedDDIMScheduler.from_pretrained(tmp_path)
    assert stock.from_config(ours.config).config.solver_order == stock().config.solver_order
    assert (
        GeneralizedDDIMScheduler.from_config(theirs.config, solver_order=2).config.solver_order == 2
    )


@pytest.mark.parametrize("settings", [{}, {"solver_order": 2}, FEW_STEPS], ids=str)
def test_their_own_defaults_are_kept_by_solvers_that_read_our_file(settings, tmp_path):
    """UniPC at our order is DDIM, and without its `lower_order_final` it ends in NaN."""
    GeneralizedDDIMScheduler(**settings).save_pretrained(tmp_path)
    read = GeneralizedDDIMScheduler.from_pretrained(tmp_path)
    for unipc in (
        UniPCMultistepScheduler.from_pretrained(tmp_path),
        UniPCMultistepScheduler.from_config(read.config),
    ):
        assert (unipc.config.solver_order, unipc.config.lower_order_final) == (2, True)


IN_LOG_RHO = {"solver_order": 3, "solver_variable": "log_rho"}


@pytest.mark.parametrize("idle", [{"solver_variable": "log_rho"}, {"solver_form": "epsilon"}])
def test_a_detour_in_memory_leaves_the_default_order_of_the_other_solver_there(idle):
    ours = GeneralizedDDIMScheduler(**idle)
    back = GeneralizedDDIMScheduler.from_config(
        UniPCMultistepScheduler.from_config(ours.config).config
    )
    assert back.config.solver_order == 1 and idle.items() <= dict(back.config).items()


@pytest.mark.parametrize("saved", [False, True])
def test_a_detour_over_another_solver_and_back(saved, tmp_path):
    """In memory and through a file; what UniPC was built with explicitly stays its own."""
    for settings, order in (({}, 1), (FEW_STEPS, 2), (IN_LOG_RHO, 3)):
        ours = GeneralizedDDIMScheduler(**settings)
        theirs = UniPCMultistepScheduler.from_config(ours.config, solver_type="bh1")
        if saved:
            theirs.save_pretrained(tmp_path)
            theirs = UniPCMultistepScheduler.from_pretrained(tmp_path)
        back = GeneralizedDDIMScheduler.from_config(theirs.config)
        for again in (back, GeneralizedDDIMScheduler.from_config(back.config, eta=0.5)):
            assert again.config.solver_order == order
            assert again.config.solver_corrector == settings.get("solver_corrector", False)
            assert again.config.lower_order_final is False


def test_settings_travel_through_our_classes_and_the_portable_form():
    settings = {"solver_order": 3, "solver_form": "epsilon", "solver_corrector": True}
    settings |= {"solver_corrector_order": 3, "solver_variable": "log_rho", "solver_weights": "bh1"}
    ours = GeneralizedDDIMScheduler(**settings, lower_order_final=True)
    through = GeneralizedDDIMScheduler.from_config(
        MarkovianDDPMScheduler.from_config(ours.config).config
    )
    stock, notes = to_portable(ours)
    for again in (through, GeneralizedDDIMScheduler.from_config(stock.config)):
        assert {name: again.config[name] for name in settings} == settings
        assert again.config.lower_order_final is True
    assert any("solver_order=3 has no effect" in note for note in notes)


def test_the_preset_is_one_line(fine_betas):
    theirs = DPMSolverMultistepScheduler(beta_schedule="scaled_linear")
    ours = GeneralizedDDIMScheduler.from_config(theirs.config, **FEW_STEPS)
    assert {name: ours.config[name] for name in FEW_STEPS} == FEW_STEPS
    assert ours.config.beta_schedule == "scaled_linear"
    settings = {k: v for k, v in FEW_STEPS.items() if k != "timestep_spacing"}
    plan = _plan(16, False)
    assert _error(fine_betas, plan, **settings) < 0.1 * _error(fine_betas, plan)
