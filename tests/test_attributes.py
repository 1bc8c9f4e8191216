"""Attributes and settings that public code assigns to a scheduler: honoured, or refused."""

import copy
import pickle

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler

from ddim_schedulers import (
    GeneralizedDDIMInverseScheduler,
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
)
from ddim_schedulers.betas import rescale_zero_terminal_snr

CLASSES = (GeneralizedDDIMScheduler, MarkovianDDPMScheduler, GeneralizedDDIMInverseScheduler)
STOCK = dict(zip(CLASSES, (DDIMScheduler, DDPMScheduler, DDIMInverseScheduler), strict=True))
each_class = pytest.mark.parametrize("cls", CLASSES)
END = dict(zip(CLASSES, ("final_alpha_cumprod", "one", "initial_alpha_cumprod"), strict=True))
X, M = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def _step(scheduler, t, x=X, m=M):
    torch.manual_seed(0)
    return scheduler.step(m, t, x).prev_sample


def _made(cls, n=10, **settings):
    scheduler = cls(**{"clip_sample": False, "prediction_type": "v_prediction", **settings})
    scheduler.set_timesteps(n)
    return scheduler


def _zero_snr():
    return rescale_zero_terminal_snr(torch.linspace(1e-4, 0.04, 1000, dtype=torch.float64))


def _assign_process(scheduler, betas, names):
    """In the order of kohya's sd-scripts."""
    values = {"betas": betas, "alphas": 1 - betas, "alphas_cumprod": torch.cumprod(1 - betas, 0)}
    for name in names:
        setattr(scheduler, name, values[name])


ALL_THREE = ("betas", "alphas", "alphas_cumprod")


@each_class
@pytest.mark.parametrize("names", [ALL_THREE, ALL_THREE[::-1], *[(name,) for name in ALL_THREE]])
def test_an_assigned_process_counts(cls, names):
    dtype = (torch.float32, torch.float64)[(CLASSES.index(cls) + len(names[0])) % 2]
    betas = _zero_snr().to(dtype)
    scheduler, fresh = _made(cls), _made(cls, rescale_betas_zero_snr=True, beta_end=0.04)
    stock = STOCK[cls](clip_sample=False, prediction_type="v_prediction")
    stock.set_timesteps(10)
    stock.alphas_cumprod = torch.cumprod(1 - betas, 0)
    for each in (scheduler, stock):
        _step(each, 500)  # tables of the old process exist
    scheduler.add_noise(X, M, torch.tensor([5, 7]))
    _assign_process(scheduler, betas, names)
    scale = 1e-4 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(scheduler.alpha_bar, fresh.alpha_bar, rtol=scale, atol=scale / 10)
    for name in ALL_THREE:
        torch.testing.assert_close(
            getattr(scheduler, name).double(), getattr(fresh, name).double(), rtol=1e-3, atol=2e-7
        )
    for t in (500, 0):
        torch.testing.assert_close(_step(scheduler, t), _step(stock, t).to(X), rtol=0, atol=1e-4)
        assert (_step(scheduler, t) - _step(_made(cls), t)).abs().max() > (1e-3 if t else -1)
    t = torch.tensor([999, 400])
    for method in ("add_noise", "get_velocity") if hasattr(stock, "add_noise") else ():
        ours, theirs = (getattr(s, method)(X, M, t) for s in (scheduler, stock))
        torch.testing.assert_close(ours, theirs.to(X), rtol=0, atol=1e-5)


@each_class
@pytest.mark.parametrize("as_type", [list, np.asarray, lambda v: torch.tensor(v)])
def test_an_assigned_process_may_be_any_list_of_numbers(cls, as_type):
    scheduler = _made(cls)
    scheduler.alphas_cumprod = as_type(torch.cumprod(1 - _zero_snr(), 0).tolist())
    fresh = _made(cls, rescale_betas_zero_snr=True, beta_end=0.04)
    torch.testing.assert_close(_step(scheduler, 900), _step(fresh, 900), rtol=0, atol=1e-6)


@each_class
@pytest.mark.parametrize(
    "move",
    [
        lambda v: v.clone(),
        lambda v: v.double(),
        lambda v: v.half(),
        lambda v: v.bfloat16(),
        lambda v: v.half().float(),
        lambda v: torch.nn.Parameter(v),
    ],
)
def test_a_copy_of_the_same_values_keeps_the_exact_tables(cls, move):
    scheduler = _made(cls)
    expected = _step(scheduler, 500)
    tables, exact = dict(scheduler._tables), scheduler.alpha_bar
    for name in (*ALL_THREE, END[cls], "timesteps"):
        shown = getattr(scheduler, name)
        if name == "timesteps":
            value = shown.int()
        elif torch.equal(move(shown).float(), shown) or move(shown).dtype != shown.dtype:
            value = move(shown)
        else:  # rounded on the way: only after the rounded copy itself was assigned
            setattr(scheduler, name, shown.half())
            value = getattr(scheduler, name).float()
        setattr(scheduler, name, value)
        assert torch.equal(getattr(scheduler, name), value)
    assert scheduler.alpha_bar is exact
    assert torch.equal(_step(scheduler, 500), expected)
    assert all(scheduler._tables[key] is tables[key] for key in tables) and tables


@each_class
def test_a_tensor_without_values_is_a_moved_copy(cls):
    scheduler = _made(cls)
    expected = _step(scheduler, 500)
    for name in (*ALL_THREE, END[cls], "timesteps"):
        setattr(scheduler, name, getattr(scheduler, name).to("meta"))
        assert getattr(scheduler, name).device.type == "meta"
    assert torch.equal(_step(scheduler, 500), expected)
    with pytest.raises(ValueError, match=r"`timesteps` has shape \(7,\) and no values"):
        scheduler.timesteps = torch.empty(7, device="meta")


@each_class
@pytest.mark.parametrize("name", ALL_THREE)
def test_a_process_that_is_none_is_refused_and_changes_nothing(cls, name):
    scheduler = _made(cls)
    expected = _step(scheduler, 500)
    good = getattr(scheduler, name)
    for bad in (
        None,
        "abc",
        0.5,
        good[:-1],
        good.long(),
        good.to(torch.complex64),
        torch.full((1000,), torch.nan),
        torch.full((1000,), 2.0),
        torch.full((1000,), -1.0),
        good.reshape(10, 100),
        [None] * 1000,
    ):
        with pytest.raises(ValueError, match=f"`{name}"):
            setattr(scheduler, name, bad)
        assert torch.equal(_step(scheduler, 500), expected)
        assert getattr(scheduler, name) is good


@each_class
def test_an_edit_in_place_counts(cls):
    betas = _zero_snr()
    for name in ("alphas_cumprod", "betas", "alphas", "alpha_bar"):
        scheduler, fresh = _made(cls), _made(cls)
        values = {"betas": betas, "alphas": 1 - betas}.get(name, torch.cumprod(1 - betas, 0))
        _step(scheduler, 500)
        held = getattr(scheduler, name)
        held.copy_(values)
        setattr(fresh, "alphas_cumprod" if name == "alpha_bar" else name, values.to(held.dtype))
        assert torch.equal(_step(scheduler, 500), _step(fresh, 500)), name
        held[-1] = {"betas": 0.99, "alphas": 0.01}.get(name, 1e-20)
        assert scheduler.alpha_bar[-1] > 0, name  # an edit after an edit
    scheduler = _made(cls)
    before = _step(scheduler, 900)
    scheduler.alphas_cumprod *= 0.5
    assert (_step(scheduler, 900) - before).abs().max() > 1e-2
    scheduler.alphas_cumprod[3] = 2.0
    for _ in range(2):  # as long as it stands there
        with pytest.raises(ValueError, match=r"`alphas_cumprod\[3\]` is 2"):
            _step(scheduler, 900)


@pytest.mark.parametrize("edit", [lambda abar: abar.numpy(), lambda abar: abar.data])
def test_edits_that_torch_does_not_count(edit):
    """Stock follows them; ours keeps its tables until the values are assigned."""
    for cls, follows in ((DDIMScheduler, True), (GeneralizedDDIMScheduler, False)):
        edited, kept = _made(cls), _made(cls)
        values = edit(edited.alphas_cumprod)
        values *= 0.9
        assert torch.equal(_step(edited, 500), _step(kept, 500)) is not follows
        edited.alphas_cumprod = edited.alphas_cumprod.clone()  # a new tensor is compared
        assert not torch.equal(_step(edited, 500), _step(kept, 500))


@each_class
def test_where_the_last_step_lands_may_be_assigned(cls):
    for value in (0.99995, torch.tensor(0.99995), np.float64(0.99995)):
        scheduler = _made(cls)
        stock = STOCK[cls](clip_sample=False, prediction_type="v_prediction")
        stock.set_timesteps(10)
        for each in (scheduler, stock):
            _step(each, 0)
            setattr(each, END[cls], torch.as_tensor(value))
        setattr(scheduler, END[cls], value)
        expected = _step(stock, 0)
        if cls is MarkovianDDPMScheduler:  # stock adds no noise at t = 0, wherever it lands
            torch.manual_seed(0)
            variance = stock._get_variance(0)
            expected = expected + variance.sqrt() * torch.randn(X.shape)
        torch.testing.assert_close(_step(scheduler, 0), expected, rtol=0, atol=1e-4)
        assert not torch.equal(_step(scheduler, 0), _step(_made(cls), 0))
    scheduler = _made(cls)
    setattr(scheduler, END[cls], scheduler.alphas_cumprod[0])
    assert scheduler.alpha_bar_end == float(scheduler.alpha_bar[0])  # not its float32 copy
    for bad in (None, 0, -1, 1.5, float("nan"), True, "1", torch.ones(2)):
        with pytest.raises(ValueError, match=f"`{END[cls]}` is .*in \\(0, 1\\]"):
            setattr(scheduler, END[cls], bad)


@each_class
@pytest.mark.parametrize("as_type", [list, tuple, np.asarray, torch.tensor])
def test_assigned_timesteps_are_the_trajectory(cls, as_type):
    plan = [901, 640, 333, 12]
    shown = plan[::-1] if cls is GeneralizedDDIMInverseScheduler else plan
    scheduler, fresh = _made(cls), _made(cls, None, timesteps=plan)
    for before in (_made(cls), cls(clip_sample=False, prediction_type="v_prediction")):
        scheduler = before
        given = as_type(shown)
        scheduler.timesteps = given
        assert scheduler.timesteps is given
        assert scheduler.planned_pairs() == fresh.planned_pairs()
        for t in plan:
            assert torch.equal(_step(scheduler, t), _step(fresh, t))
    given = torch.tensor(shown)
    scheduler.timesteps = given
    given += 5
    assert [t for t, _ in scheduler.planned_pairs()] == [t + 5 for t in fresh_order(fresh)]
    for bad in (None, 3, "abc", [5, 5], [0.5], [1000], [True], [float("nan")], [[3], [2]]):
        with pytest.raises(ValueError, match="`timesteps"):
            scheduler.timesteps = bad


def fresh_order(scheduler):
    return [t for t, _ in scheduler.planned_pairs()]


@each_class
def test_a_part_of_the_plan_keeps_its_neighbours(cls):
    for part in (slice(3, None), slice(2, 7), slice(0, 5)):
        scheduler, stock = _made(cls), STOCK[cls](clip_sample=False, prediction_type="v_prediction")
        stock.set_timesteps(10)
        for each in (scheduler, stock):
            each.timesteps = each.timesteps[part]
        for t in scheduler.timesteps:
            torch.testing.assert_close(_step(scheduler, t), _step(stock, t), rtol=0, atol=1e-4)
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == 10


@pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, GeneralizedDDIMInverseScheduler])
@pytest.mark.parametrize("planned", [None, 10])
def test_an_assigned_number_of_steps_is_a_stride(cls, planned):
    scheduler, stock = (
        c(clip_sample=False, prediction_type="v_prediction") for c in (cls, STOCK[cls])
    )
    for each in (scheduler, stock):
        if planned:
            each.set_timesteps(planned)
            _step(each, 500)
        each.num_inference_steps = 7
        assert each.num_inference_steps == 7
    for t in (999, 426, 141, 5):
        torch.testing.assert_close(_step(scheduler, t), _step(stock, t), rtol=0, atol=1e-4)
    scheduler.num_inference_steps = None
    with pytest.raises(ValueError, match="set_timesteps"):
        _step(scheduler, 5)
    for bad in (0, 1001, 2.5, "3", True):
        with pytest.raises(ValueError, match="`num_inference_steps` is"):
            scheduler.num_inference_steps = bad


@each_class
def test_a_number_that_agrees_changes_nothing(cls):
    scheduler = _made(cls)
    expected = _step(scheduler, 500)
    scheduler.num_inference_steps = 10
    assert torch.equal(_step(scheduler, 500), expected)
    scheduler.timesteps = scheduler.timesteps[-4:]
    scheduler.num_inference_steps = 4
    fresh = _made(cls)
    for t in scheduler.timesteps:
        assert torch.equal(_step(scheduler, t), _step(fresh, t))


def test_ddpm_follows_its_timesteps_as_stock_does():
    ours, stock = MarkovianDDPMScheduler(), DDPMScheduler()
    for each in (ours, stock):
        each.num_inference_steps = 10  # a flag alone: the neighbour is the next of `timesteps`
    assert ours.previous_timestep(500) == int(stock.previous_timestep(torch.tensor(500))) == 499
    for each in (ours, stock):
        each.set_timesteps(10)
        each.num_inference_steps = None
    assert ours.previous_timestep(500) == stock.previous_timestep(500) == 499
    for each in (ours, stock):
        each.custom_timesteps = True
    assert ours.previous_timestep(500) == int(stock.previous_timestep(torch.tensor(500))) == 400
    with pytest.raises(ValueError, match="`custom_timesteps` is 1"):
        ours.custom_timesteps = 1
    with pytest.raises(ValueError, match="`variance_type` is 'other'"):
        ours.variance_type = "other"
    ours.variance_type = "fixed_large"
    assert ours.config.variance_type == "fixed_large"


CHANGES = [
    {"prediction_type": "sample"},
    {"clip_sample": True},
    {"clip_sample_range": 0.5, "clip_sample": True},
    {"timestep_spacing": "trailing"},
    {"steps_offset": 1},
    {"rescale_betas_zero_snr": True},
    {"beta_schedule": "scaled_linear", "beta_end": 0.012},
    {"num_train_timesteps": 500},
]


@each_class
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_an_assigned_setting_counts_after_a_first_step(cls, changes):
    # each class another way, so that every change meets every way
    how = ("attribute", "item", "register")[(CLASSES.index(cls) + CHANGES.index(changes)) % 3]
    scheduler, fresh = _made(cls), _made(cls, **changes)
    _step(scheduler, 400)
    for name, value in changes.items():
        if how == "attribute":
            setattr(scheduler.config, name, value)
        elif how == "item":
            scheduler.config[name] = value
        else:
            scheduler.register_to_config(**{name: value})
    if set(changes) & {"prediction_type", "clip_sample"}:  # others may plan anew
        assert torch.equal(_step(scheduler, 400), _step(fresh, 400))
    scheduler.set_timesteps(10)
    assert torch.equal(scheduler.timesteps, fresh.timesteps)
    for t in scheduler.timesteps:
        assert torch.equal(_step(scheduler, t), _step(fresh, t))
    again = cls.from_config(scheduler.config)
    other = CLASSES[CLASSES.index(cls) - 1].from_config(scheduler.config)
    for name, value in changes.items():
        assert again.config[name] == getattr(again.config, name) == other.config[name] == value


@each_class
@pytest.mark.parametrize(
    "changes",
    [{"beta_end": 0.015}, {"beta_schedule": "scaled_linear"}, {"trained_betas": [0.01] * 1000}],
)
def test_other_betas_keep_the_plan(cls, changes):
    """Another number of timesteps does not."""
    scheduler, fresh = _made(cls), _made(cls, **changes)
    _step(scheduler, 500)
    for each in (scheduler, fresh):
        each.set_timesteps(7)
        each.timesteps = each.timesteps[2:]
    for name, value in changes.items():
        setattr(scheduler.config, name, value)
    assert torch.equal(_step(scheduler, 568), _step(fresh, 568))
    assert torch.equal(scheduler.timesteps, fresh.timesteps)
    assert scheduler.planned_pairs() == fresh.planned_pairs()
    scheduler.config.num_train_timesteps, scheduler.config.trained_betas = 500, None
    assert scheduler.planned_pairs()[0] in ((499, 498), (0, -1))


def test_compiled_code_takes_what_was_assigned():
    scheduler, fresh = _made(GeneralizedDDIMScheduler), _made(GeneralizedDDIMScheduler)

    def step(m, x, t):
        return scheduler.step(m, t, x, return_dict=False)[0]

    compiled, t = torch.compile(step, backend="eager"), torch.tensor(500)
    before = compiled(M, X, t)
    assert torch.equal(before, _step(fresh, 500))
    for each in (scheduler, fresh):
        each.alphas_cumprod = each.alphas_cumprod * 0.9
        each.config.clip_sample = False
    before = compiled(M, X, t)
    assert torch.equal(before, _step(fresh, 500))
    for each in (scheduler, fresh):
        each.alphas_cumprod.mul_(0.9)
    assert torch.equal(compiled(M, X, t), before)
    scheduler.set_timesteps(10)
    assert torch.equal(compiled(M, X, t), _step(fresh, 500))


@each_class
def test_a_bad_setting_is_refused_when_it_is_used(cls):
    for name, value in (
        ("prediction_type", "nonsense"),
        ("clip_sample_range", -1.0),
        ("clip_sample", "false"),
        ("timestep_spacing", 3),
        ("beta_schedule", "none such"),
    ):
        scheduler = _made(cls)
        _step(scheduler, 500)
        setattr(scheduler.config, name, value)
        for _ in range(2):
            with pytest.raises(ValueError, match=f"`{name}` is"):
                _step(scheduler, 500)


@each_class
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_a_copy_keeps_what_was_assigned(cls, copied):
    scheduler = _made(cls)
    scheduler.alphas_cumprod = torch.cumprod(1 - _zero_snr(), 0)
    scheduler.timesteps = scheduler.timesteps[2:]
    scheduler.config.clip_sample = True
    setattr(scheduler, END[cls], 0.99995)
    expected = _step(scheduler, 500)
    scheduler.alphas_cumprod[-1] = 1e-20  # not used yet
    again = copied(scheduler)
    assert torch.equal(_step(again, 500), expected)
    assert again.timesteps.tolist() == scheduler.timesteps.tolist()
    assert float(again.alphas_cumprod[-1]) == pytest.approx(1e-20)
    assert again.config.clip_sample and again.alpha_bar_end == 0.99995
    again.alphas_cumprod = torch.cumprod(1 - _zero_snr() / 2, 0)
    assert torch.equal(_step(scheduler, 500), expected)
    # a config says nothing of assigned tensors, as in stock
    assert float(cls.from_config(scheduler.config).alpha_bar[-1]) > 1e-6


@each_class
def test_a_setting_counts_before_an_attribute_that_is_assigned_next(cls):
    order = -1 if cls is GeneralizedDDIMInverseScheduler else 1
    for name, value in ((END[cls], 0.99995), ("timesteps", [5, 0][::order])):
        scheduler, fresh = _made(cls), _made(cls, beta_end=0.04, clip_sample=True)
        _step(scheduler, 400)
        scheduler.config.beta_end, scheduler.config.clip_sample = 0.04, True
        for each in (scheduler, fresh):
            setattr(each, name, value)
            if name != "timesteps":  # other betas have forgotten the plan
                each.set_timesteps(10)
        assert torch.equal(scheduler.alpha_bar, fresh.alpha_bar)
        assert torch.equal(_step(scheduler, 0), _step(fresh, 0))
        scheduler.config.prediction_type = "nonsense"
        with pytest.raises(ValueError, match="`prediction_type` is"):
            setattr(scheduler, name, value)
