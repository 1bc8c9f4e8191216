"""Ours against stock diffusers on x_t drawn from q, and both against the float64 closed form.

The grid: beta schedules x predictions x {clip, threshold, neither} x `use_clipped_model_output` x
the spacings and n where stock steps to the right neighbour x eta, and all variances of DDPM. In
each cell prev_sample agrees within 5e-5 and, over the cell, our largest error against the closed
form is not above stock's. The documented deviations are listed in docs/deviations.md.
"""

import math

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    UniPCMultistepScheduler,
)

from ddim_schedulers import (
    GeneralizedDDIMInverseScheduler,
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
)
from ddim_schedulers.reverse_noise import VARIANCE_TYPES

SHAPE = (4, 3, 8, 8)
TOLERANCE = 5e-5
PREDICTIONS = ("epsilon", "sample", "v_prediction")
LIMITS = (
    {"clip_sample": True},
    {"clip_sample": False},
    {"clip_sample": False, "thresholding": True, "sample_max_value": 1.5},
)
# where stock's t - T // n is the planned neighbour: `leading` always, the others at n = T
DDIM_GRID = (("leading", 10), ("leading", 30), ("trailing", 1000), ("linspace", 1000))
# One unit in the last place of float32, relative. The result itself is rounded by half of it, by
# ours as by stock: where stock's error is no more than that, which of the two is smaller is the
# machine's order of sums. Where these tests were written no cell needed the allowance.
UNIT = 2.0**-23


def _draw(closed_form, kind, a_t, seed):
    """(x_t, model output, noise) in float32: x_t from q, an output that is right up to 10 %."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(SHAPE, generator=generator, dtype=torch.float64) * 2 - 1
    eps, wrong, z = torch.randn((3, *SHAPE), generator=generator, dtype=torch.float64)
    x = math.sqrt(a_t) * x0 + math.sqrt(1 - a_t) * eps
    m = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": math.sqrt(a_t) * eps - math.sqrt(1 - a_t) * x0,
    }[kind]
    return x.float(), (m + 0.1 * wrong).float(), z.float()


class Errors:
    """The largest errors of a cell of the grid."""

    def __init__(self):
        self.difference = self.ours = self.stock = self.size = 0.0

    def add(self, ours, stock, exact):
        self.difference = max(self.difference, float((ours - stock).abs().max()))
        self.ours = max(self.ours, float((ours.double() - exact).abs().max()))
        self.stock = max(self.stock, float((stock.double() - exact).abs().max()))
        self.size = max(self.size, float(exact.abs().max()))

    def assert_parity(self, cell):
        assert self.ours <= max(self.stock, UNIT * self.size), (cell, self.ours, self.stock)
        # A few cells are further apart because stock itself is that far from the closed form: its
        # float32 tables where x_t is multiplied by sqrt(abar_s / abar_t) of 32 to thousands (the
        # cosine schedule from t = T - 1), and its 1 - abar at small t. Ours has only rounding.
        if self.difference > TOLERANCE:
            assert self.stock > 0.9 * self.difference, (cell, self.difference, self.stock)
            assert self.ours <= 10 * UNIT * self.size, (cell, self.ours, self.size)


def _ddim_cell(closed_form, schedule, kind, limit, spacing, n, options, ddim=None):
    settings = {"beta_schedule": schedule, "prediction_type": kind, **limit}
    settings["timestep_spacing"] = spacing
    ours, stock = GeneralizedDDIMScheduler(**settings), DDIMScheduler(**settings)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(n)
    assert torch.equal(ours.timesteps, stock.timesteps)
    alpha_bar = closed_form.alpha_bar(schedule)
    plan = ours.timesteps.tolist()
    errors = {option: Errors() for option in options}
    for i in range(0, len(plan), max(1, len(plan) // 10)):
        t, s = plan[i], plan[i + 1] if i + 1 < len(plan) else -1
        a_t, a_s = alpha_bar[t], alpha_bar[s] if s >= 0 else 1.0
        x, m, z = _draw(closed_form, kind, a_t, t)
        x0, eps = closed_form.predictions(kind, m, x, a_t)
        x0 = closed_form.limited(x0, stock.config)
        for rederive, eta in options:
            arguments = {
                "eta": eta,
                "use_clipped_model_output": rederive,
                "variance_noise": z if eta else None,
            }
            hat = closed_form.rederived(x, x0, a_t) if rederive else eps
            exact = closed_form.ddim(x0, hat, a_s, closed_form.sigma(a_t, a_s, eta), z)
            got = (each.step(m, t, x, **arguments).prev_sample for each in (ours, stock))
            errors[rederive, eta].add(*got, exact)
    return errors


DDIM_OPTIONS = [(rederive, eta) for rederive in (False, True) for eta in (0.0, 0.5, 1.0)]


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_ddim_parity(schedule, kind, closed_form):
    for limit in LIMITS:
        for spacing, n in DDIM_GRID:
            cells = _ddim_cell(closed_form, schedule, kind, limit, spacing, n, DDIM_OPTIONS)
            for option, errors in cells.items():
                errors.assert_parity((schedule, kind, limit, spacing, n, option))


DDPM_GRID = (("leading", 10), ("trailing", 7), ("linspace", 15))
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range")


def _ddpm_std(closed_form, variance, a_t, a_s, raw):
    small, large = max(closed_form.sigma(a_t, a_s), 1e-10), math.sqrt(1 - a_t / a_s)
    if variance == "learned":
        return raw.double().sqrt()
    if variance == "learned_range":
        share = (raw.double() + 1) / 2
        return torch.exp(share * math.log(large) + (1 - share) * math.log(small))
    return small if variance.startswith("fixed_small") else large


def _ddpm_cells(closed_form, schedule, kind, limit, variance):
    settings = {"beta_schedule": schedule, "prediction_type": kind, **limit}
    settings["variance_type"] = variance
    alpha_bar = closed_form.alpha_bar(schedule)
    cells = {}
    for spacing, n in (*DDPM_GRID, (None, None)):
        if spacing:
            settings["timestep_spacing"] = spacing
        ours, stock = MarkovianDDPMScheduler(**settings), DDPMScheduler(**settings)
        if n is not None:
            for scheduler in (ours, stock):
                scheduler.set_timesteps(n)
        assert torch.equal(ours.timesteps, stock.timesteps)
        plan, errors = ours.timesteps.tolist(), Errors()
        for i in range(0, len(plan), max(1, len(plan) // 6)):
            t, s = plan[i], plan[i + 1] if i + 1 < len(plan) else -1
            if s < 0 and t > 0:
                continue  # stock adds noise there: a documented deviation
            a_t, a_s = alpha_bar[t], alpha_bar[s] if s >= 0 else 1.0
            x, m, _ = _draw(closed_form, kind, a_t, t)
            raw = torch.rand(SHAPE, generator=torch.Generator().manual_seed(t))
            output = torch.cat([m, raw], 1) if variance.startswith("learned") else m
            z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
            x0, _ = closed_form.predictions(kind, m, x, a_t)
            x0 = closed_form.limited(x0, stock.config)
            std = _ddpm_std(closed_form, variance, a_t, a_s, raw) if t else 0.0
            exact = closed_form.ddpm(x0, x, a_t, a_s, std, z)
            got = [
                each.step(output, t, x, generator=torch.Generator().manual_seed(7)).prev_sample
                for each in (ours, stock)
            ]
            errors.add(*got, exact)
        cells[spacing, n] = errors
    return cells


@pytest.mark.parametrize("variance", VARIANCES)
def test_ddpm_parity(variance, closed_form):
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"):
        for kind in PREDICTIONS:
            for limit in LIMITS:
                cells = _ddpm_cells(closed_form, schedule, kind, limit, variance)
                for cell, errors in cells.items():
                    errors.assert_parity((schedule, kind, limit, *cell, variance))


# -- beyond the grid: the same seed, the other parts of the interface


def test_the_same_seed_draws_the_same_noise():
    """Along a whole run; generators, lists of them, and the global state."""
    for ours, stock in (
        (GeneralizedDDIMScheduler(), DDIMScheduler()),
        (MarkovianDDPMScheduler(), DDPMScheduler()),
    ):
        for listed in (False, True):
            results = []
            for scheduler in (ours, stock):
                scheduler.set_timesteps(8)
                seeds = [torch.Generator().manual_seed(i) for i in range(SHAPE[0])]
                generator = seeds if listed else torch.Generator().manual_seed(3)
                x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
                for t in scheduler.timesteps:
                    m = x / (1 + t / 1000)
                    eta = {"eta": 1.0} if "DDIM" in type(scheduler).__name__ else {}
                    x = scheduler.step(m, t, x, generator=generator, **eta).prev_sample
                results.append(x)
            torch.testing.assert_close(*results, rtol=0, atol=TOLERANCE)
    results = []
    for scheduler in (ours, stock):
        torch.manual_seed(5)
        results.append(scheduler.step(m, scheduler.timesteps[0], m).prev_sample)
    torch.testing.assert_close(*results, rtol=0, atol=TOLERANCE)


def test_no_noise_is_drawn_at_eta_zero():
    scheduler = GeneralizedDDIMScheduler()
    scheduler.set_timesteps(5)
    before = torch.get_rng_state()
    scheduler.step(torch.zeros(SHAPE), 800, torch.zeros(SHAPE))
    assert torch.equal(before, torch.get_rng_state())


def test_add_noise_and_get_velocity_are_stocks():
    for ours, stock in (
        (GeneralizedDDIMScheduler, DDIMScheduler),
        (MarkovianDDPMScheduler, DDPMScheduler),
    ):
        for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2"):
            one, other = ours(beta_schedule=schedule), stock(beta_schedule=schedule)
            for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
                x0, noise = torch.randn((2, *SHAPE)).to(dtype)
                for timesteps in (
                    torch.tensor([0, 10, 500, 999]),
                    torch.tensor([7]),
                    torch.tensor([1, 2, 3, 4], dtype=torch.int32),
                ):
                    for name in ("add_noise", "get_velocity"):
                        got = getattr(one, name)(x0, noise, timesteps)
                        expected = getattr(other, name)(x0, noise, timesteps)
                        assert got.dtype == expected.dtype == dtype
                        torch.testing.assert_close(
                            got.float(),
                            expected.float(),
                            rtol=0,
                            atol={torch.float16: 5e-2, torch.bfloat16: 0.3}.get(dtype, TOLERANCE),
                        )


def test_the_rest_of_the_interface_is_stocks():
    for ours, stock in (
        (GeneralizedDDIMScheduler, DDIMScheduler),
        (MarkovianDDPMScheduler, DDPMScheduler),
        (GeneralizedDDIMInverseScheduler, DDIMInverseScheduler),
    ):
        one, other = ours(), stock()
        assert len(one) == len(other) == 1000
        assert one.order == other.order == 1
        assert one.init_noise_sigma == other.init_noise_sigma == 1.0
        assert torch.equal(one.timesteps, other.timesteps)
        for name in ("betas", "alphas", "alphas_cumprod"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name))
        x = torch.randn(SHAPE)
        assert one.scale_model_input(x, 5) is x
        stock_keys = {k: v for k, v in other.config.items() if not k.startswith("_")}
        assert {k: one.config[k] for k in stock_keys} == stock_keys  # every argument and default
    ddpm, stock = MarkovianDDPMScheduler(), DDPMScheduler()
    for n in (None, 10):
        if n:
            ddpm.set_timesteps(n)
            stock.set_timesteps(n)
        for t in ddpm.timesteps[::3]:
            assert int(ddpm.previous_timestep(t)) == int(stock.previous_timestep(t))
            assert ddpm.previous_timestep(int(t)) == int(stock.previous_timestep(int(t)))


def test_inverse_parity(closed_form):
    """`leading`, where stock steps to the right neighbour; x_s from q."""
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        alpha_bar = closed_form.alpha_bar(schedule)
        for kind in PREDICTIONS:
            for clip in (False, True):
                for end in (False, True):
                    settings = {
                        "beta_schedule": schedule,
                        "prediction_type": kind,
                        "clip_sample": clip,
                        "set_alpha_to_one": end,
                    }
                    ours = GeneralizedDDIMInverseScheduler(**settings)
                    stock = DDIMInverseScheduler(**settings)
                    for scheduler in (ours, stock):
                        scheduler.set_timesteps(20)
                    assert torch.equal(ours.timesteps, stock.timesteps)
                    errors = Errors()
                    for t, s in ours.planned_pairs()[0 if kind != "sample" else 1 :]:
                        a_s = alpha_bar[s] if s >= 0 else (1.0 if end else alpha_bar[0])
                        x, m, _ = _draw(closed_form, kind, a_s, t)
                        x0, eps = closed_form.predictions(kind, m, x, a_s)
                        x0 = closed_form.limited(x0, stock.config)
                        exact = closed_form.ddim(x0, eps, alpha_bar[t], 0.0, x)
                        got = (each.step(m, t, x).prev_sample for each in (ours, stock))
                        errors.add(*got, exact)
                    errors.assert_parity((schedule, kind, settings))


# -- the deviations: each shows what stock does, and that ours does not (docs/deviations.md)


@pytest.mark.parametrize(("spacing", "n"), [("trailing", 150), ("linspace", 10)])
def test_stock_ddim_steps_to_the_wrong_neighbour(spacing, n, closed_form):
    alpha_bar = closed_form.alpha_bar()
    ours = GeneralizedDDIMScheduler(timestep_spacing=spacing, clip_sample=False)
    stock = DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
    worst = {}
    for scheduler in (ours, stock):
        scheduler.set_timesteps(n)
        worst[scheduler] = 0.0
        for t, s in ours.planned_pairs()[:-1]:
            x, m, _ = _draw(closed_form, "epsilon", alpha_bar[t], t)
            x0, eps = closed_form.predictions("epsilon", m, x, alpha_bar[t])
            exact = closed_form.ddim(x0, eps, alpha_bar[s], 0.0, x)
            error = float((scheduler.step(m, t, x).prev_sample.double() - exact).abs().max())
            worst[scheduler] = max(worst[scheduler], error)
    assert worst[ours] < 2e-5 and worst[stock] > 1e-2


def test_stock_inverse_steps_from_the_wrong_neighbour():
    ours = GeneralizedDDIMInverseScheduler(timestep_spacing="trailing", clip_sample=False)
    stock = DDIMInverseScheduler(timestep_spacing="trailing", clip_sample=False)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(7)
    x, m = torch.randn(2, *SHAPE)
    differences = [
        float((ours.step(m, t, x).prev_sample - stock.step(m, t, x).prev_sample).abs().max())
        for t in ours.timesteps.tolist()
    ]
    assert max(differences) > 1e-4


def test_stock_inverse_divides_by_zero_for_sample():
    x, m = torch.randn(2, *SHAPE)
    ours = GeneralizedDDIMInverseScheduler(prediction_type="sample")
    stock = DDIMInverseScheduler(prediction_type="sample")
    finite = []
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
        finite.append(bool(torch.isfinite(scheduler.step(m, 0, x).prev_sample).all()))
    assert finite == [True, False]


def test_stock_ddpm_adds_noise_on_a_last_step_above_0():
    x, m = torch.randn(2, *SHAPE)
    settings = {"steps_offset": 1, "variance_type": "fixed_large", "clip_sample": False}
    noisy = []
    for scheduler in (MarkovianDDPMScheduler(**settings), DDPMScheduler(**settings)):
        scheduler.set_timesteps(10)
        step = scheduler.step(m, 1, x)
        noisy.append(float((step.prev_sample - step.pred_original_sample).abs().max()) > 1e-3)
    assert noisy == [False, True]


def test_stock_ddpm_draws_no_noise_at_timestep_0():
    """Ours does, and multiplies it by 0: whether t is 0 is not read back from the device."""
    x = torch.zeros(SHAPE)
    moved = []
    for scheduler in (MarkovianDDPMScheduler(), DDPMScheduler()):
        generator = torch.Generator().manual_seed(0)
        before = generator.get_state()
        scheduler.step(x, torch.tensor(0), x, generator=generator)
        moved.append(not torch.equal(before, generator.get_state()))
    assert moved == [True, False]


@pytest.mark.filterwarnings("ignore:invalid value")
def test_stock_ddpm_fixed_large_log_is_nan():
    x, m = torch.randn(2, *SHAPE)
    finite = [
        bool(torch.isfinite(each(variance_type="fixed_large_log").step(m, 500, x)[0]).all())
        for each in (MarkovianDDPMScheduler, DDPMScheduler)
    ]
    assert finite == [True, False]


def test_stock_accepts_unknown_names():
    DDPMScheduler(variance_type="other")
    with pytest.raises(ValueError, match="variance_type"):
        MarkovianDDPMScheduler(variance_type="other")
    for ours, stock in (
        (GeneralizedDDIMScheduler, DDIMScheduler),
        (MarkovianDDPMScheduler, DDPMScheduler),
    ):
        for name in ("timestep_spacing", "prediction_type"):
            stock(**{name: "other"})
            with pytest.raises(ValueError, match=name):
                ours(**{name: "other"})


def test_stock_leading_offset_leaves_the_range():
    stock = DDIMScheduler(steps_offset=1)
    stock.set_timesteps(1000)
    assert int(stock.timesteps[0]) == 1000
    with pytest.raises(ValueError, match="steps_offset"):
        GeneralizedDDIMScheduler(steps_offset=1).set_timesteps(1000)


def test_stock_zero_snr_with_epsilon_is_not_finite():
    x, m = torch.randn(2, *SHAPE)
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    stock = DDIMScheduler(clip_sample=False, **settings)
    stock.set_timesteps(10)
    assert not bool(torch.isfinite(stock.step(m, 999, x).prev_sample).all())
    with pytest.raises(ValueError, match="alpha_bar"):
        GeneralizedDDIMScheduler(**settings).set_timesteps(10)


def test_stock_ddpm_refuses_an_unplanned_timestep():
    x = torch.randn(SHAPE)
    stock, ours = DDPMScheduler(), MarkovianDDPMScheduler()
    for scheduler in (stock, ours):
        scheduler.set_timesteps(10)
    with pytest.raises(IndexError):
        stock.step(x, 555, x)
    assert ours.previous_timestep(555) == 500
    assert torch.isfinite(ours.step(x, 555, x).prev_sample).all()


def test_half_precision_is_computed_in_float32(closed_form):
    """Stock computes in the dtype of the sample; ours rounds once, at the end."""
    a_t, a_s = (closed_form.alpha_bar()[t] for t in (900, 800))
    x, m, _ = (each.to(torch.bfloat16) for each in _draw(closed_form, "epsilon", a_t, 0))
    x0, eps = closed_form.predictions("epsilon", m, x, a_t)
    exact = closed_form.ddim(x0, eps, a_s, 0.0, x)
    errors = []
    for scheduler in (GeneralizedDDIMScheduler, DDIMScheduler):
        scheduler = scheduler(clip_sample=False)
        scheduler.set_timesteps(10)
        got = scheduler.step(m, 900, x).prev_sample
        errors.append(float((got.double() - exact).abs().max()))
    assert errors[0] <= 1.001 * 2**-8 * float(exact.abs().max())
    assert errors[1] > errors[0]


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_ddim_get_variance(set_alpha_to_one, zero_snr):
    settings = {"set_alpha_to_one": set_alpha_to_one, "rescale_betas_zero_snr": zero_snr}
    stock, ours = DDIMScheduler(**settings), GeneralizedDDIMScheduler(**settings)
    pairs = [(0, -1), (1, 0), (420, 400), (980, 960), (487, 486), (999, 998), (999, -1), (7, 7)]
    for t, s in pairs:
        wanted = stock._get_variance(t, s)
        assert ours._get_variance(t, s).dtype == wanted.dtype
        # stock's is a difference of float32 numbers near 1
        torch.testing.assert_close(ours._get_variance(t, s), wanted, rtol=2e-5, atol=2e-4)
        as_tensors = ours._get_variance(torch.tensor(t), torch.tensor(s))
        assert as_tensors == ours._get_variance(t, s)
    batch = ours._get_variance(*torch.tensor(pairs).T)
    assert batch.tolist() == [float(ours._get_variance(t, s)) for t, s in pairs]
    a = ours.alpha_bar
    exact = (1 - a[400]) / (1 - a[420]) * (1 - a[420] / a[400])
    assert float(ours._get_variance(420, 400)) == pytest.approx(float(exact), rel=1e-7)
    for wrong in ((1000, 0), (5, 1000), (-1, 0), (1.5, 0), (torch.tensor([1000]), 3)):
        with pytest.raises(ValueError, match="`timestep` is"):
            ours._get_variance(*wrong)


@pytest.mark.parametrize("steps", [None, 10, 7])
@pytest.mark.parametrize("name", [n for n in VARIANCE_TYPES if n != "optimal"])
def test_ddpm_get_variance(name, steps):
    stock, ours = DDPMScheduler(variance_type=name), MarkovianDDPMScheduler(variance_type=name)
    if steps is not None:
        stock.set_timesteps(steps)
        ours.set_timesteps(steps)
    raw = torch.linspace(-1, 1, 12).reshape(1, 3, 2, 2) if name.startswith("learned") else None
    for t in [*ours.timesteps[::97], ours.timesteps[-1]]:
        wanted = stock._get_variance(t, raw)
        for timestep in (t, int(t)):
            got = ours._get_variance(timestep, raw)
            assert got.shape == wanted.shape and got.dtype == wanted.dtype
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)
        by_argument = MarkovianDDPMScheduler()
        if steps is not None:
            by_argument.set_timesteps(steps)
        assert torch.equal(by_argument._get_variance(int(t), raw, name), got)


def test_ddpm_get_variance_of_the_step():
    """What a step adds is the variance that `_get_variance` returns, on any spacing."""
    ours = MarkovianDDPMScheduler(timestep_spacing="trailing", clip_sample=False)
    ours.set_timesteps(7)
    zero, noise = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    for t in ours.timesteps[:-1]:
        added = ours.step(zero, t, zero, variance_noise=noise).prev_sample
        assert float(added**2) == pytest.approx(float(ours._get_variance(t)), rel=1e-6)
    assert ours.one == 1
    for arguments, match in (
        ((0, None, "other"), "`variance_type` is 'other'"),
        ((0, None, "learned_range"), "`predicted_variance` is None"),
        ((0, None, "learned"), "`predicted_variance` is None"),
        ((1000,), "`timestep` is 1000"),
    ):
        with pytest.raises(ValueError, match=match):
            ours._get_variance(*arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("stock", "ours"),
    [(DDIMScheduler, GeneralizedDDIMScheduler), (DDPMScheduler, MarkovianDDPMScheduler)],
)
def test_threshold_sample(stock, ours, dtype):
    settings = {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0}
    x0 = 3 * torch.randn(3, 2, 4, 4).to(dtype)
    before = x0.clone()
    wanted = stock(**settings)._threshold_sample(x0)
    got = ours(**settings)._threshold_sample(x0)
    assert torch.equal(got, wanted) and got.dtype == dtype and torch.equal(x0, before)


@pytest.mark.parametrize(
    ("stock", "ours"),
    [
        (DDIMScheduler, GeneralizedDDIMScheduler),
        (DDPMScheduler, MarkovianDDPMScheduler),
        (DDIMInverseScheduler, GeneralizedDDIMInverseScheduler),
    ],
)
def test_stock_accepts_a_process_that_is_none(stock, ours):
    """A beta above 1 has no root of 1 - beta; two betas are no process of 1000 timesteps."""
    assert (stock(beta_start=0.1, beta_end=2.0).alphas < 0).any()
    with pytest.raises(ValueError, match="`beta_end` is 2.0"):
        ours(beta_start=0.1, beta_end=2.0)
    assert len(stock(trained_betas=[0.1, 0.3]).alphas_cumprod) == 2
    with pytest.raises(ValueError, match="`trained_betas` has shape"):
        ours(trained_betas=[0.1, 0.3])


@pytest.mark.parametrize(
    ("stock", "ours"),
    [(DDIMScheduler, GeneralizedDDIMScheduler), (DDPMScheduler, MarkovianDDPMScheduler)],
)
def test_stock_accepts_a_threshold_below_1(stock, ours):
    """torch clamps to the upper bound: every sample is divided by 0.5, whatever is in it."""
    settings = {"thresholding": True, "sample_max_value": 0.5}
    x0 = torch.full((1, 1, 2, 2), 0.25)
    assert torch.equal(stock(**settings)._threshold_sample(x0), 2 * x0)
    with pytest.raises(ValueError, match="`sample_max_value` is 0.5"):
        ours(**settings)


def test_stock_ddpm_loses_digits_near_x0():
    """Two steps from t = 1 with a network t / (t + 1) x: stock's own golden sum is 387.9466."""
    n = 4 * 3 * 8 * 8
    x0, eps = (
        (v.reshape(3, 8, 8, 4) / n).permute(3, 0, 1, 2)
        for v in (torch.arange(n), torch.arange(n).flip(0))
    )
    noise = torch.randn(2, *x0.shape, generator=torch.Generator().manual_seed(0))
    sums = []
    for scheduler in (DDPMScheduler(), MarkovianDDPMScheduler()):
        x = scheduler.add_noise(x0, eps, torch.tensor([1]))
        generator = torch.Generator().manual_seed(0)
        for t in (1, 0):
            x = scheduler.step(x * t / (t + 1), t, x, generator=generator).prev_sample
        sums.append(float(x.abs().sum()))
    a = [*torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[:2], 1.0]
    x = a[1] ** 0.5 * x0.double() + (1 - a[1]) ** 0.5 * eps.double()
    for t in (1, 0):
        a_t, a_s = a[t], a[t - 1]  # a[-1] is 1, where the last step lands
        beta = 1 - a_t / a_s
        x0_hat = ((x - (1 - a_t) ** 0.5 * x * t / (t + 1)) / a_t**0.5).clamp(-1, 1)
        mean = a_s**0.5 * beta * x0_hat + (a_t / a_s) ** 0.5 * (1 - a_s) * x
        x = mean / (1 - a_t) + ((1 - a_s) / (1 - a_t) * beta) ** 0.5 * noise[0]
    exact = float(x.abs().sum())
    assert abs(sums[0] - exact) > 0.02
    assert abs(sums[1] - exact) < 2e-4


def test_a_saved_config_leaves_two_defaults_to_the_class_that_reads_it(tmp_path):
    """Stock lists none after loading; ours lists the two for which UniPC has another default."""
    stock, ours = tmp_path / "stock", tmp_path / "ours"
    DDIMScheduler().save_pretrained(stock)
    assert "_use_default_values" not in DDIMScheduler.from_pretrained(stock).config
    fresh = GeneralizedDDIMScheduler()
    fresh.save_pretrained(ours)
    loaded = GeneralizedDDIMScheduler.from_pretrained(ours).config
    assert sorted(loaded["_use_default_values"]) == ["lower_order_final", "solver_order"]
    saved = dict(fresh.config)
    del saved["_use_default_values"]  # as a test of diffusers does before it compares
    assert saved == loaded
    assert not saved != loaded
    assert loaded == fresh.config
    assert loaded != {**fresh.config, "eta": 0.5}
    assert {**saved, "clip_sample": False} != loaded
    assert UniPCMultistepScheduler.from_config(loaded).config.solver_order == 2


def test_stock_get_variance_returns_what_it_does_not_have():
    """An unknown name is taken for `fixed_small`, and `learned` without an output is None."""
    stock, ours = DDPMScheduler(), MarkovianDDPMScheduler()
    assert stock._get_variance(5, None, "other") == stock._get_variance(5)
    assert stock._get_variance(5, None, "learned") is None
    for name in ("other", "learned"):
        with pytest.raises(ValueError, match="variance"):
            ours._get_variance(5, None, name)


def test_stock_ddim_broadcasts_no_variance():
    """Stock DDIM fails on an output of 2 C channels, also where it adds no noise."""
    stock = DDIMScheduler.from_config(DDPMScheduler(variance_type="learned_range").config)
    ours = GeneralizedDDIMScheduler.from_config(stock.config)
    x = torch.zeros(1, 2, 2, 2)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(4)
    with pytest.raises(RuntimeError, match="size"):
        stock.step(torch.zeros(1, 4, 2, 2), 250, x)
    assert ours.step(torch.zeros(1, 4, 2, 2), 250, x).prev_sample.shape == x.shape


@pytest.mark.parametrize(
    ("stock", "ours", "asked"),
    [
        (DDIMScheduler, GeneralizedDDIMScheduler, [(500, 480), (20, -1)]),
        (DDPMScheduler, MarkovianDDPMScheduler, [(500,), (100,)]),
    ],
)
def test_get_variance_follows_what_public_code_assigns(stock, ours, asked):
    betas = torch.linspace(1e-3, 0.03, 1000)
    schedulers = stock(), ours()
    for scheduler in schedulers:
        scheduler.set_timesteps(10)
        scheduler._get_variance(*asked[0])
        scheduler.betas, scheduler.alphas = betas, 1 - betas
        scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
        if stock is DDIMScheduler:
            scheduler.final_alpha_cumprod = torch.tensor(0.9995)
        else:
            scheduler.timesteps = torch.tensor([700, 500, 100, 3])
    for arguments in asked:
        expected, found = (scheduler._get_variance(*arguments) for scheduler in schedulers)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
