"""One contract for the three scheduler classes: what diffusers and its users ask of a scheduler."""

import copy
import json
import logging
import math
import pickle
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ddim_schedulers import (
    GeneralizedDDIMInverseScheduler,
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
)

CLASSES = (
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
    GeneralizedDDIMInverseScheduler,
)
FORWARD = CLASSES[:2]
STOCK = {
    GeneralizedDDIMScheduler: diffusers.DDIMScheduler,
    MarkovianDDPMScheduler: diffusers.DDPMScheduler,
    GeneralizedDDIMInverseScheduler: diffusers.DDIMInverseScheduler,
}
SHAPE = (3, 2, 4, 4)
KARRAS = [member.name for member in KarrasDiffusionSchedulers]

each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
each_forward_class = pytest.mark.parametrize("cls", FORWARD, ids=lambda cls: cls.__name__)


def _plain(config):
    return {k: v for k, v in config.items() if not k.startswith("_")}


def _run(scheduler, steps=4, x=None, **arguments):
    """A whole run with a network that is a function of x and t."""
    if steps is not None:
        scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) if x is None else x
    if not isinstance(scheduler, GeneralizedDDIMInverseScheduler):
        arguments.setdefault("generator", torch.Generator().manual_seed(2))
    for t in scheduler.timesteps:
        x = scheduler.step(x * (0.5 + t / 2000), t, x, **arguments).prev_sample
    return x


# -- configs


@each_class
@pytest.mark.parametrize("name", KARRAS)
def test_from_config_of_every_karras_scheduler(cls, name, log):
    """Fresh, as a frozen config, and as it comes back from JSON with every default written out."""
    if name == "EDMEulerScheduler":
        config = diffusers.EDMEulerScheduler().config
        for form in (config, json.loads(diffusers.EDMEulerScheduler().to_json_string())):
            with pytest.raises(ValueError, match=r"has no betas of its own"):
                cls.from_config(form)
        return
    member = getattr(diffusers, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy on tensors, within diffusers
        other = member(beta_schedule="scaled_linear", beta_start=8.5e-4, beta_end=0.012)
        default = member()
    # the process of a scheduler that was given nothing is its own, not that of our defaults
    torch.testing.assert_close(cls.from_config(default.config).betas, default.betas)
    from_json = json.loads(other.to_json_string())
    for config in (other.config, FrozenDict(other.config), from_json):
        ours = cls.from_config(config)
        assert type(ours) is cls and ours.config.beta_schedule == "scaled_linear"
        assert ours.config.beta_end == 0.012 and len(ours) == other.config.num_train_timesteps
        betas = diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=8.5e-4, beta_end=0.012
        ).betas
        torch.testing.assert_close(ours.betas, betas)
        own = set(_plain(cls().config))
        for key in own & set(_plain(other.config)) & set(from_json):
            if from_json[key] is not None and key in other.config:
                if key not in other.config.get("_use_default_values", []):
                    assert ours.config[key] == other.config[key]
        assert bool(torch.isfinite(_run(ours)).all())
    assert not [r for r in log.records if r.levelno >= logging.WARNING]


@each_class
def test_a_flow_is_refused(cls):
    for config in (
        diffusers.FlowMatchEulerDiscreteScheduler().config,
        diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ).config,
    ):
        with pytest.raises(ValueError, match="flow|no betas of its own"):
            cls.from_config(config)
    config = diffusers.DDIMScheduler().config
    with pytest.raises(ValueError, match="flow_prediction"):
        cls.from_config(config, prediction_type="flow_prediction")


@each_class
def test_arguments_override_the_config(cls):
    config = diffusers.DDIMScheduler(beta_end=0.015).config
    ours = cls.from_config(config, timestep_spacing="quadratic", timesteps=[9, 3])
    assert ours.config.timestep_spacing == "quadratic" and ours.config.timesteps == [9, 3]
    assert ours.config.beta_end == 0.015


SETTINGS = {
    GeneralizedDDIMScheduler: {"eta": 1.0, "reverse_variance": "sigma_hat", "thresholding": True},
    MarkovianDDPMScheduler: {"variance_type": "fixed_large", "thresholding": True},
    GeneralizedDDIMInverseScheduler: {"set_alpha_to_one": False},
}


def _unusual(cls):
    return cls(
        num_train_timesteps=500,
        beta_schedule="sigmoid",
        beta_end=0.015,
        timestep_spacing="quadratic",
        quadratic_end=0.9,
        prediction_type="v_prediction",
        clip_sample_range=2.0,
        rescale_betas_zero_snr=True,
        **SETTINGS[cls],
    )


@each_class
def test_save_and_load_keep_every_key(cls, tmp_path, log):
    scheduler = _unusual(cls)
    scheduler.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert _plain(loaded.config) == _plain(scheduler.config)
    assert torch.equal(loaded.alpha_bar, scheduler.alpha_bar)
    assert torch.equal(_run(loaded), _run(scheduler))
    assert not log.records


@each_class
def test_explicit_settings_survive_saving(cls, tmp_path):
    betas = np.linspace(1e-3, 0.2, 10)
    for trained in (betas.tolist(), betas, torch.tensor(betas)):
        settings = {"num_train_timesteps": 10, "trained_betas": trained, "timesteps": [9, 4, 1]}
        if cls is GeneralizedDDIMScheduler:
            settings["sigma"] = [0.01, 0.01, 0.0]
        scheduler = cls(**settings)
        scheduler.save_pretrained(tmp_path)
        loaded = cls.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded.betas.double(), torch.tensor(betas), rtol=1e-6, atol=0)
        for each in (scheduler, loaded):
            each.set_timesteps()
        assert torch.equal(
            _run(loaded, None, x=torch.ones(SHAPE)), _run(scheduler, None, x=torch.ones(SHAPE))
        )
        assert sorted(loaded.timesteps.tolist()) == [1, 4, 9]
        assert copy.deepcopy(loaded).config.timesteps == [9, 4, 1]


@each_class
def test_pickles_and_copies(cls):
    scheduler = _unusual(cls)
    expected = _run(scheduler)
    for same in (pickle.loads(pickle.dumps(scheduler)), copy.deepcopy(scheduler)):
        assert _plain(same.config) == _plain(scheduler.config)
        assert same.planned_pairs() == scheduler.planned_pairs()
        assert torch.equal(_run(same, None), expected)
        same.set_timesteps(2)  # independent of the original
        assert len(scheduler.timesteps) == 4


@each_class
def test_a_pickle_does_not_grow_with_use(cls):
    scheduler, x = cls(), torch.zeros(1, 1, 1, 1)
    scheduler.set_timesteps(50)
    unused = len(pickle.dumps(scheduler))
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
        scheduler.add_noise(x, x, t)
    assert len(pickle.dumps(scheduler)) == unused


@each_class
def test_a_trip_through_the_other_classes_loses_nothing(cls, log):
    scheduler = _unusual(cls)
    config = scheduler.config
    for other in (*CLASSES, cls):
        config = other.from_config(config).config
    assert {k: config[k] for k in _plain(scheduler.config)} == _plain(scheduler.config)
    assert not log.records


@each_class
def test_compatibles(cls):
    names = {other.__name__ for other in cls().compatibles}
    assert {"DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"} <= names
    # and back: stock takes our config
    stock = STOCK[cls].from_config(cls(beta_end=0.015).config)
    assert stock.config.beta_end == 0.015


@each_class
def test_a_config_that_a_pipeline_rewrites_counts(cls):
    """`StableDiffusionPipeline.__init__` replaces `_internal_dict` of the finished scheduler."""
    scheduler = cls(clip_sample=True, steps_offset=0)
    _run(scheduler)  # tables of the old config exist
    config = dict(scheduler.config)
    config.update(clip_sample=False, steps_offset=1)
    scheduler._internal_dict = FrozenDict(config)
    expected = _run(cls(clip_sample=False, steps_offset=1))
    assert torch.equal(_run(scheduler), expected)
    # without a new plan too: only what the plan is made of waits for `set_timesteps`
    scheduler, fresh = cls(clip_sample=True), cls(clip_sample=False)
    for each in (scheduler, fresh):
        each.set_timesteps(4)
    x = 3 * torch.ones(SHAPE)
    zero = {} if cls is GeneralizedDDIMInverseScheduler else {"variance_noise": x}
    scheduler.step(x, 500, x, **zero)
    scheduler.register_to_config(clip_sample=False)
    assert torch.equal(
        scheduler.step(x, 500, x, **zero).prev_sample, fresh.step(x, 500, x, **zero).prev_sample
    )


# -- step: types, shapes, noise


@each_class
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_floating_dtype(cls, dtype):
    scheduler = cls(clip_sample=False)
    scheduler.set_timesteps(10)
    x, m, z = torch.randn(3, *SHAPE, dtype=torch.float64).to(dtype)
    noise = {} if cls is GeneralizedDDIMInverseScheduler else {"variance_noise": z}
    step = scheduler.step(m, 500, x, **noise)
    assert step.prev_sample.dtype == step.pred_original_sample.dtype == dtype
    noise = {k: v.double() for k, v in noise.items()}
    exact = scheduler.step(m.double(), 500, x.double(), **noise).prev_sample
    rounding = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12
    assert float((step.prev_sample.double() - exact).abs().max()) <= 8 * rounding
    # the sample decides, whatever the network ran in
    assert scheduler.step(m.float(), 500, x).prev_sample.dtype == dtype


@each_class
def test_timesteps_as_int_tensor_and_batch(cls):
    scheduler = cls()
    scheduler.set_timesteps(10)
    x, m, z = torch.randn(3, *SHAPE)
    noise = {} if cls is GeneralizedDDIMInverseScheduler else {"variance_noise": z}
    if cls is GeneralizedDDIMScheduler:
        noise["eta"] = 0.7
    ints = (900, 500, 0)
    singles = []
    for t in ints:
        expected = scheduler.step(m, t, x, **noise)
        for same in (torch.tensor(t), torch.tensor([t]), np.int64(t), torch.tensor(t).int()):
            got = scheduler.step(m, same, x, **noise)
            assert torch.equal(got.prev_sample, expected.prev_sample)
            assert torch.equal(got.pred_original_sample, expected.pred_original_sample)
        singles.append(expected.prev_sample)
    got = scheduler.step(m, torch.tensor(ints), x, **noise).prev_sample
    for i in range(3):
        assert torch.equal(got[i], singles[i][i])
    for limit in ({"thresholding": True}, {"clip_sample": False}):
        if cls is not GeneralizedDDIMInverseScheduler or "thresholding" not in limit:
            other = cls(**limit)
            other.set_timesteps(10)
            got = other.step(m, torch.tensor(ints), x, **noise).prev_sample
            expected = other.step(m, 500, x, **noise).prev_sample[1]
            torch.testing.assert_close(got[1], expected, rtol=0, atol=1e-6)


@each_class
def test_any_number_of_dimensions(cls):
    scheduler = cls()
    scheduler.set_timesteps(10)
    for shape in ((2, 3), (2, 3, 5), (2, 3, 4, 4, 4)):
        x = torch.randn(shape)
        assert scheduler.step(x, torch.tensor([900, 500]), x).prev_sample.shape == shape


@each_class
def test_return_dict_both_ways(cls):
    scheduler = cls()
    scheduler.set_timesteps(10)
    x, m, z = torch.randn(3, *SHAPE)
    noise = {} if cls is GeneralizedDDIMInverseScheduler else {"variance_noise": z}
    named = scheduler.step(m, 500, x, **noise)
    plain = scheduler.step(m, 500, x, return_dict=False, **noise)
    assert type(plain) is tuple and len(plain) == 2
    assert torch.equal(plain[0], named.prev_sample)
    assert torch.equal(plain[1], named.pred_original_sample)
    assert named[0] is named.prev_sample and named["prev_sample"] is named.prev_sample


@each_class
def test_a_step_leaves_its_arguments_alone_and_passes_gradients(cls):
    for clip in (False, True):
        scheduler = cls(clip_sample=clip, clip_sample_range=100.0)
        scheduler.set_timesteps(10)
        x, m = torch.randn(2, *SHAPE, dtype=torch.float64)
        before = x.clone(), m.clone()
        scheduler.step(m, 500, x)
        assert torch.equal(x, before[0]) and torch.equal(m, before[1])
        x.requires_grad_()
        noise = {} if cls is GeneralizedDDIMInverseScheduler else {"variance_noise": m}
        assert torch.autograd.gradcheck(
            lambda x, s=scheduler, m=m, k=noise: s.step(m, 500, x, **k).prev_sample, (x,)
        )


@each_forward_class
def test_generators(cls):
    scheduler = cls(**({"eta": 1.0} if cls is GeneralizedDDIMScheduler else {}))
    scheduler.set_timesteps(10)
    x, m = torch.randn(2, *SHAPE)
    seeds = [torch.Generator().manual_seed(i) for i in range(3)]
    together = scheduler.step(m, 500, x, generator=seeds).prev_sample
    for i in range(3):  # a generator for each image: the batch does not matter
        one = torch.Generator().manual_seed(i)
        alone = scheduler.step(m[i : i + 1], 500, x[i : i + 1], generator=one).prev_sample
        torch.testing.assert_close(together[i : i + 1], alone)
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    given = scheduler.step(m, 500, x, variance_noise=z).prev_sample
    drawn = scheduler.step(m, 500, x, generator=torch.Generator().manual_seed(9)).prev_sample
    assert torch.equal(given, drawn)
    with pytest.raises(ValueError, match="`generator` and `variance_noise` are both given"):
        scheduler.step(m, 500, x, generator=torch.Generator(), variance_noise=z)
    with pytest.raises(ValueError, match=r"`variance_noise` has shape \(3, 2, 4\)"):
        scheduler.step(m, 500, x, variance_noise=z[..., 0])


# -- step reads nothing back and compiles


def _variants(cls):
    if cls is GeneralizedDDIMScheduler:
        yield {"eta": 1.0, "reverse_variance": "sigma_hat"}, 1
        yield {"eta": 1.0, "reverse_variance": "learned_range"}, 2
        yield {"thresholding": True}, 1
    if cls is MarkovianDDPMScheduler:
        yield {"variance_type": "fixed_large", "thresholding": True}, 1
        yield {"variance_type": "learned_range"}, 2
        yield {"variance_type": "learned", "clip_sample": False}, 2
    for clip in (False, True):
        for kind in ("epsilon", "v_prediction", "posterior_mean"):
            yield {"clip_sample": clip, "prediction_type": kind}, 1


@each_class
def test_a_step_reads_nothing_back(cls, monkeypatch):
    """The device `meta` stands in for an accelerator: its tensors have no value to be read."""
    monkeypatch.setattr(torch.Tensor, "__int__", lambda t: pytest.fail("a step reads its timestep"))
    for settings, factor in _variants(cls):
        scheduler = cls(**settings)
        x, z = torch.empty(2, *SHAPE, device="meta")
        m = torch.empty(SHAPE[0], factor * SHAPE[1], *SHAPE[2:], device="meta")
        scheduler.set_timesteps(10, device="meta")
        for t in (scheduler.timesteps[3], torch.empty(3, dtype=torch.int64, device="meta")):
            scheduler.step(m, t, x)
            if cls is not GeneralizedDDIMInverseScheduler:
                scheduler.step(m, t, x, variance_noise=z)
            if cls is GeneralizedDDIMScheduler and "eta" not in settings:
                scheduler.step(m, t, x, eta=0.5, use_clipped_model_output=True)
            scheduler.add_noise(x, z, torch.empty(3, dtype=torch.int64, device="meta"))
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta tensors"):
        diffusers.DDPMScheduler().step(x, t[0], x)


@each_class
def test_a_step_traces_as_one_graph(cls):
    """`fullgraph=True` with a tensor timestep, drawn and given noise; the result is eager's."""
    for settings in ({}, {"clip_sample": False, "timestep_spacing": "trailing"}):
        scheduler = cls(**settings)
        scheduler.set_timesteps(10)
        x, m, z = torch.randn(3, *SHAPE)
        calls = [{}]
        if cls is MarkovianDDPMScheduler:
            calls += [{"variance_noise": z}]
        if cls is GeneralizedDDIMScheduler:
            calls += [{"eta": 0.5}, {"eta": 0.5, "variance_noise": z}]
        for arguments in calls:
            torch._dynamo.reset()

            def step(m, t, x, k=arguments, s=scheduler):
                return s.step(m, t, x, return_dict=False, **k)

            compiled = torch.compile(step, fullgraph=True, backend="eager")
            for t in (scheduler.timesteps[2], scheduler.timesteps[3], torch.tensor([9, 500, 900])):
                torch.manual_seed(0)
                expected = step(m, t, x)
                torch.manual_seed(0)
                torch.testing.assert_close(compiled(m, t, x), expected)


@each_class
def test_the_first_traced_step_needs_no_eager_one(cls):
    torch._dynamo.reset()
    scheduler = cls()
    scheduler.set_timesteps(10)
    x = torch.randn(SHAPE)
    compiled = torch.compile(
        lambda m, t, x: scheduler.step(m, t, x, return_dict=False), fullgraph=True, backend="eager"
    )
    torch.manual_seed(0)
    got = compiled(x, scheduler.timesteps[0], x)
    torch.manual_seed(0)
    torch.testing.assert_close(got, cls_step(cls, x))


def cls_step(cls, x):
    scheduler = cls()
    scheduler.set_timesteps(10)
    return scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)


# -- errors: the argument, its value, what is allowed


BAD_SETTINGS = [
    ({"num_train_timesteps": 0}, r"`num_train_timesteps` is 0; .*1 to 100000"),
    ({"num_train_timesteps": 100_001}, r"`num_train_timesteps` is 100001; .*100000"),
    ({"trained_betas": [math.nan] * 1000}, r"`trained_betas\[0\]` is nan"),
    ({"trained_betas": [0.1]}, r"`trained_betas` has shape \(1,\).*1000"),
    ({"beta_start": math.nan}, r"`beta_start` is nan; .*between 0 and 1"),
    ({"beta_end": 1.5}, r"`beta_end` is 1.5"),
    ({"beta_schedule": "cosine"}, r"`beta_schedule` is 'cosine'; .*'linear'"),
    ({"prediction_type": "noise"}, r"`prediction_type` is 'noise'; .*'epsilon'"),
    ({"timestep_spacing": "karras"}, r"`timestep_spacing` is 'karras'; .*'leading'"),
    ({"clip_sample_range": 0.0}, r"`clip_sample_range` is 0.0; .*> 0"),
    ({"clip_sample_range": math.nan}, r"`clip_sample_range` is nan"),
    ({"beta_schedule": None}, r"`beta_schedule` is None; .*'linear'"),
    ({"prediction_type": None}, r"`prediction_type` is None; .*'epsilon'"),
    ({"timestep_spacing": None}, r"`timestep_spacing` is None; .*'leading'"),
    ({"timesteps": [1, 5]}, r"`timesteps\[1\]` is 5 after 1"),
    ({"timesteps": [1000]}, r"`timesteps\[0\]` is 1000; .*0 \.\. 999"),
    ({"quadratic_end": 0.0}, r"`quadratic_end` is 0.0; .*\(0, 1\]"),
    ({"quadratic_end": 1.5}, r"`quadratic_end` is 1.5"),
]
BAD_FORWARD = [
    ({"thresholding": True, "dynamic_thresholding_ratio": 1.5}, r"`dynamic_thresholding_ratio` is"),
    ({"thresholding": True, "dynamic_thresholding_ratio": 0.0}, r"`dynamic_thresholding_ratio` is"),
    ({"thresholding": True, "sample_max_value": -1.0}, r"`sample_max_value` is -1.0"),
    ({"sample_max_value": 0.5}, r"`sample_max_value` is 0.5; .*>= 1"),
]
BAD_DDIM = [
    ({"eta": -0.1}, r"`eta` is -0.1; .*>= 0"),
    ({"eta": math.nan}, r"`eta` is nan"),
    ({"eta": 0.5, "sigma": [0.0]}, r"`eta` is 0.5 and `sigma` is given"),
    ({"reverse_variance": "fixed_large"}, r"`reverse_variance` is 'fixed_large'; .*'sigma_hat'"),
    ({"reverse_variance": None}, r"`reverse_variance` is None; .*'sigma_hat'"),
    ({"sigma": [0.1, -0.1]}, r"`sigma` is -0.1 in step 1 .*between 0 and"),
    ({"sigma": [1.5]}, r"`sigma` is 1.5 in step 0 .*= 1 there"),
    ({"sigma": [0.1], "timesteps": [5, 3]}, "`sigma` has 1 values, but `timesteps` has 2"),
]


@each_class
def test_bad_settings(cls):
    bad = list(BAD_SETTINGS)
    if cls is not GeneralizedDDIMInverseScheduler:
        bad += BAD_FORWARD
    if cls is GeneralizedDDIMScheduler:
        bad += BAD_DDIM
    if cls is MarkovianDDPMScheduler:
        bad += [({"variance_type": None}, r"`variance_type` is None; .*'fixed_small'")]
    for settings, message in bad:
        with pytest.raises(ValueError, match=message):
            cls(**settings)


BAD_PLANS = [
    ({"steps_offset": 1}, {"num_inference_steps": 1000}, r"`steps_offset` is 1; .*at most 0"),
    ({"steps_offset": -1}, {"num_inference_steps": 10}, r"`steps_offset` is -1"),
    ({"steps_offset": 0.5}, {"num_inference_steps": 10}, r"`steps_offset` is 0.5"),
    ({}, {"num_inference_steps": 0}, r"`num_inference_steps` is 0; .*1 to .*1000"),
    ({}, {"num_inference_steps": -3}, r"`num_inference_steps` is -3"),
    ({}, {"num_inference_steps": 1001}, r"`num_inference_steps` is 1001"),
    ({}, {"num_inference_steps": 10.0}, r"`num_inference_steps` is 10.0"),
    ({}, {}, r"`num_inference_steps` is None"),
    ({}, {"timesteps": []}, "`timesteps` is empty"),
    ({}, {"timesteps": [5, 5]}, r"`timesteps\[1\]` is 5 after 5; .*decrease"),
    ({}, {"timesteps": [5, 9]}, r"`timesteps\[1\]` is 9 after 5"),
    ({}, {"timesteps": [1000, 1]}, r"`timesteps\[0\]` is 1000; .*0 \.\. 999"),
    ({}, {"timesteps": [5, -1]}, r"`timesteps\[1\]` is -1"),
    ({}, {"timesteps": [5.5, 1]}, r"`timesteps\[0\]` is 5.5"),
    ({}, {"timesteps": [5, 1], "num_inference_steps": 2}, "pass one of them"),
    ({"timesteps": [5, 1]}, {"num_inference_steps": 3}, "`num_inference_steps` is 3.*2 values"),
]
BAD_DDIM_PLANS = [
    ({}, {"timesteps": [9, 5], "sigma": [0.0]}, "`sigma` has 1 values.*2 steps"),
    ({}, {"timesteps": [9, 5], "sigma": [-0.1, 0.0]}, r"`sigma` is -0.1 in step 0"),
    ({}, {"timesteps": [9, 5], "sigma": [0.9, 0.0]}, r"`sigma` is 0.9 in step 0 .*between"),
    ({}, {"timesteps": [9, 5], "sigma": [0.0, 0.1]}, r"`sigma` is 0.1 in step 1"),
    ({}, {"timesteps": [9, 5], "sigma": [math.nan, 0.0]}, "`sigma` must be .*finite"),
    ({"eta": 0.5}, {"timesteps": [9], "sigma": [0.0]}, r"`sigma` is given, .*eta=0.5"),
    ({"sigma": [0.0, 0.0]}, {"num_inference_steps": 3}, "`sigma` has 2 values.*3"),
]


@each_class
def test_bad_plans_are_refused_and_leave_the_former_one(cls):
    bad = list(BAD_PLANS)
    if cls is GeneralizedDDIMScheduler:
        bad += BAD_DDIM_PLANS
    for settings, arguments, message in bad:
        scheduler = cls(**settings)
        before = scheduler.planned_pairs(), scheduler.timesteps
        with pytest.raises(ValueError, match=message):
            scheduler.set_timesteps(**arguments)
        assert scheduler.planned_pairs() == before[0] and scheduler.timesteps is before[1]


@each_class
def test_bad_arguments_of_step(cls):
    scheduler = cls()
    x = torch.randn(SHAPE)
    if cls is not MarkovianDDPMScheduler:
        with pytest.raises(ValueError, match="`set_timesteps` has not been called"):
            scheduler.step(x, 5, x)
    scheduler.set_timesteps(10)
    bad = [
        ((x, 1000, x), r"`timestep` is 1000; .*0 \.\. 999"),
        ((x, -1, x), r"`timestep` is -1"),
        ((x, 5.0, x), r"`timestep` is 5.0"),
        ((x, torch.tensor(5.0), x), "`timestep` has dtype torch.float32; .*integer"),
        ((x, torch.tensor([1, 2]), x), r"`timestep` has shape \(2,\); .*3 samples"),
        ((x, torch.zeros(3, 1, dtype=torch.int64), x), r"`timestep` has shape \(3, 1\)"),
        ((x[:2], 5, x), r"`model_output` has shape \(2, 2, 4, 4\).*\(3, 2, 4, 4\)"),
        ((torch.cat([x, x], 1), 5, x), r"`model_output` has shape \(3, 4, 4, 4\)"),
        ((x, 5, x.long()), "`sample` has dtype torch.int64; .*floating"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            scheduler.step(*arguments)
    if cls is GeneralizedDDIMScheduler:
        for eta in (-0.5, math.nan, math.inf):
            with pytest.raises(ValueError, match=r"`eta` is .*>= 0"):
                scheduler.step(x, 5, x, eta=eta)


@each_class
def test_a_plan_may_be_given_as_anything_iterable(cls):
    scheduler = cls()
    for timesteps in ([9, 5, 1], (9, 5, 1), np.array([9, 5, 1]), torch.tensor([9, 5, 1])):
        scheduler.set_timesteps(timesteps=timesteps)
        assert sorted(scheduler.timesteps.tolist()) == [1, 5, 9]
        assert scheduler.timesteps.dtype == torch.int64
    scheduler.set_timesteps(np.int64(4))
    assert len(scheduler.timesteps) == 4
    scheduler.set_timesteps(4, device="cpu")
    scheduler.set_timesteps(4, torch.device("meta"))
    assert scheduler.timesteps.device.type == "meta"


@each_class
def test_pipelines_ask_the_signature_of_set_timesteps(cls):
    """`timesteps` is ours; `sigmas` would be taken for Karras noise levels."""
    import inspect

    names = list(inspect.signature(cls.set_timesteps).parameters)
    assert names[1:4] == ["num_inference_steps", "device", "timesteps"] and "sigmas" not in names
    stock = list(inspect.signature(STOCK[cls].step).parameters)
    assert list(inspect.signature(cls.step).parameters)[: len(stock)] == stock
    stock = list(inspect.signature(STOCK[cls].__init__).parameters)
    assert set(stock) - {"kwargs"} <= set(inspect.signature(cls.__init__).parameters)


@each_class
def test_the_module_names_scheduler_mixin(cls):
    """A saved pipeline is reloaded through that name (design of diffusers' loader)."""
    import sys

    assert hasattr(sys.modules[cls.__module__], "SchedulerMixin")
    assert cls.__module__.split(".")[-2] == "ddim_schedulers"


# -- surroundings that a user brings along


@each_class
def test_settings_of_numpy_are_saved(cls, tmp_path):
    """A setting that is accepted must not fail when the trained pipeline is written."""
    settings = {
        "num_train_timesteps": np.int64(100),
        "beta_start": np.float32(0.25),
        "clip_sample": np.bool_(False),
        "steps_offset": np.int64(1),
        "timesteps": [np.int64(5), np.int64(3)],
    }
    scheduler = cls(**settings)
    scheduler.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path).config
    assert [again[k] for k in settings] == [100, 0.25, False, 1, [5, 3]]
    assert cls(timesteps=range(5, 0, -2)).config.timesteps == [5, 3, 1]


@each_class
def test_a_table_made_in_inference_mode_can_be_differentiated_later(cls):
    scheduler = cls(clip_sample=False)
    x, m = torch.randn(2, *SHAPE)
    with torch.inference_mode():
        scheduler.set_timesteps(10)
        scheduler.step(m, 500, x)
    m.requires_grad_()
    scheduler.step(m, 500, x.requires_grad_()).prev_sample.sum().backward()
    assert bool(x.grad.isfinite().all()) and bool((m.grad != 0).all())


@each_class
def test_a_default_device_is_not_the_tables(cls):
    """They are float64, which some devices lack, and live where each sample is."""
    x = torch.randn(SHAPE)
    before = cls()
    with torch.device("meta"):
        for scheduler in (before, cls(), cls(beta_schedule="squaredcos_cap_v2")):
            scheduler.set_timesteps(10)
            assert scheduler.timesteps.device.type == scheduler.alpha_bar.device.type == "cpu"
            t = scheduler.timesteps[3]
            assert scheduler.step(x, t, x, return_dict=False)[1].isfinite().all()


def test_a_sweep_over_eta_keeps_few_tables():
    scheduler = GeneralizedDDIMScheduler(num_train_timesteps=10)
    scheduler.set_timesteps(5)
    x = torch.randn(SHAPE)
    for i in range(200):
        scheduler.step(x, 4, x, eta=i / 200)
    assert 0 < len(scheduler._tables) < 100


@each_class
def test_bad_tensors_of_timesteps_are_value_errors(cls):
    scheduler = cls()
    scheduler.set_timesteps(10)
    x = torch.randn(SHAPE)
    for t in (torch.tensor(1000), torch.tensor(-1), torch.tensor([5, 1000, 3])):
        with pytest.raises(ValueError, match=r"`timestep` is .*integer in 0 \.\. 999"):
            scheduler.step(x, t, x)
        with pytest.raises(ValueError, match=r"`timesteps` is .*integer in 0 \.\. 999"):
            scheduler.add_noise(x, x, t)
        with pytest.raises(ValueError, match=r"`timestep` is .*integer in 0 \.\. 999"):
            scheduler.previous_timestep(t)
    for t in (torch.tensor(True), torch.tensor([5.0, 5.0, 5.0])):
        with pytest.raises(ValueError, match="`timestep` has dtype"):
            scheduler.step(x, t, x)
        with pytest.raises(ValueError, match="`timesteps` has dtype"):
            scheduler.add_noise(x, x, t)
    torch.manual_seed(0)
    expected = scheduler.step(x, torch.tensor(5), x, return_dict=False)
    torch.manual_seed(0)
    small = torch.tensor(5, dtype=torch.uint8)
    torch.testing.assert_close(scheduler.step(x, small, x, return_dict=False), expected)
    with pytest.raises(ValueError, match="`model_output` has dtype torch.complex64"):
        scheduler.step(x + 0j, 5, x)


def test_bad_types_of_eta_and_sigma_are_value_errors():
    scheduler = GeneralizedDDIMScheduler()
    scheduler.set_timesteps(10)
    x = torch.randn(SHAPE)
    for eta in (None, "1", torch.tensor(0.5), 10**400):
        with pytest.raises(ValueError, match=r"`eta` is .*>= 0"):
            scheduler.step(x, 5, x, eta=eta)
    for sigma in (0.5, "ab", [None, 0.0], [0.1 + 0j, 0.0], [10**400, 0], [[0.1], [0.0]]):
        with pytest.raises(ValueError, match=r"`sigma(\[0\])?` is .*numbers"):
            scheduler.set_timesteps(timesteps=[9, 5], sigma=sigma)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_the_last_step_passes_no_nan_of_an_unused_variance_back(variance):
    scheduler = MarkovianDDPMScheduler(variance_type=variance)
    scheduler.set_timesteps(10)
    x = torch.randn(SHAPE)
    m = torch.cat([x, torch.full_like(x, -1.0)], dim=1).requires_grad_()
    scheduler.step(m, 0, x).prev_sample.sum().backward()
    assert bool(m.grad.isfinite().all())


@each_class
def test_a_step_is_the_same_by_number_and_by_tensor(cls):
    """Planned or not, from the kept columns or from the table, before and after another table."""
    scheduler = cls(clip_sample=False)
    scheduler.set_timesteps(10)
    x, m = torch.randn(2, *SHAPE)

    def step(t):
        return scheduler.step(m, t, x, return_dict=False)[0]

    noise_free = cls is not MarkovianDDPMScheduler
    for t in (scheduler.timesteps[3], torch.tensor(7), scheduler.timesteps[3]):
        results = []
        for form in (int(t), np.int64(t), t, t.int(), t.reshape(1), t.expand(SHAPE[0])):
            torch.manual_seed(0)
            results.append(step(form))
        assert all(torch.equal(result, results[0]) for result in results)
        if cls is GeneralizedDDIMScheduler:
            scheduler.step(m, 7, x, eta=0.5)
    assert noise_free == torch.equal(step(500), step(500))


@each_class
def test_what_is_kept_of_a_plan_is_bounded(cls):
    scheduler, x = cls(num_train_timesteps=3000), torch.zeros(1, 1, 1, 1)
    kept = []
    for n in (10, 1000, 3000, 10):
        scheduler.set_timesteps(n)
        for eta in (0.0, 0.5) if cls is GeneralizedDDIMScheduler else (None,):
            scheduler.step(
                x, int(scheduler.timesteps[0]), x, **({} if eta is None else {"eta": eta})
            )
        kept.append(len(scheduler._newest[1]))
    assert kept == [10, 1000, 0, 10]


@each_class
def test_a_plan_that_is_made_again_keeps_its_tables(cls):
    scheduler, x = cls(), torch.randn(SHAPE)
    scheduler.set_timesteps(10)
    scheduler.step(x, 500, x)
    (table,) = scheduler._tables.values()
    scheduler.set_timesteps(10)
    scheduler.step(x, 500, x)
    assert [*scheduler._tables.values()][0] is table
    scheduler.set_timesteps(20)
    scheduler.step(x, 500, x)
    assert [*scheduler._tables.values()][0] is not table


@each_class
def test_a_setting_changed_after_use_counts(cls):
    """Pipelines and users write into configs by `register_to_config`."""
    x, m = torch.randn(2, *SHAPE)
    for changes in (
        {"clip_sample": False},
        {"clip_sample_range": 0.5},
        {"prediction_type": "v_prediction"},
        *([{"set_alpha_to_one": False}] if cls is GeneralizedDDIMScheduler else []),
    ):
        used, fresh = cls(), cls(**changes)
        outputs = []
        for scheduler in (used, fresh):
            scheduler.set_timesteps(10)
            for t in (int(scheduler.timesteps[0]), int(scheduler.timesteps[-1])):
                scheduler.step(m, t, x)
                if scheduler is used:
                    scheduler.register_to_config(**changes)
                torch.manual_seed(0)
                outputs.append(scheduler.step(m, t, x, return_dict=False)[0])
        assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])


@each_class
def test_a_step_under_fake_tensors_leaves_no_fake_ones(cls):
    scheduler = cls()
    scheduler.set_timesteps(10)
    x = torch.randn(SHAPE)
    scheduler.step(x, 500, x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        scheduler.step(mode.from_tensor(x), 900, mode.from_tensor(x))
    assert type(scheduler.step(x, 900, x).prev_sample) is torch.Tensor


@each_class
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_timestep_that_has_no_value_is_looked_up_in_the_graph(cls):
    """`torch.func.vmap` passes one timestep for the batch, `make_fx` one for all later calls."""
    scheduler = cls(clip_sample=False)
    scheduler.set_timesteps(10)
    x, m, z = torch.randn(3, 2, 1, *SHAPE[1:])
    times = torch.tensor([900, 300])
    noise = {} if cls is GeneralizedDDIMInverseScheduler else {"variance_noise": z[0]}

    def step(m, t, x):
        return scheduler.step(m, t, x, **noise, return_dict=False)[0]

    expected = torch.stack([step(m[i], times[i], x[i]) for i in range(2)])
    assert torch.equal(torch.func.vmap(step)(m, times, x), expected)
    traced = make_fx(step)(m[0], times[0], x[0])
    assert torch.equal(traced(m[1], times[1], x[1]), expected[1])
    if cls is GeneralizedDDIMScheduler:
        scheduler.set_timesteps(timesteps=[900, 300], sigma=[0.0, 0.0])
        given = torch.stack([step(m[i], times[i], x[i]) for i in range(2)])
        assert torch.equal(torch.func.vmap(step)(m, times, x), given)


# What ours takes from a stock class and its bases without overriding it, and why that is right.
INHERITED = {
    "save_pretrained": "diffusers' own file layout",
    "from_pretrained": "ends in our `from_config`",
    "compatibles": "reads `_compatibles`, which is ours",
    "has_compatibles": "True for every scheduler",
    "_get_compatibles": "reads `_compatibles`, which is ours",
    "_upload_folder": "the Hub's business",
    "push_to_hub": "the Hub's business",
    "_auto_class": "set by `register_for_auto_class`",
    "register_for_auto_class": "remote code in one file, as with any class",
    "ignore_for_config": "no argument of ours stays out of the config",
    "_deprecated_kwargs": "those of the stock class",
    "register_to_config": "makes the config object whose identity `_follow_config` watches",
    "config": "returns that object",
    "__getattr__": "diffusers' warning for a setting that is read as an attribute",
    "save_config": "writes our `to_json_string`",
    "load_config": "reads a file",
    "get_config_dict": "deprecated name of `load_config`",
    "to_json_file": "writes our `to_json_string`",
    "_get_init_keys": "reads our signature",
    "_dict_from_json_file": "reads a file",
    "__repr__": "prints our `to_json_string`",
}
# What diffusers 0.38 has besides.
OLDER = {"_get_config_file_from_dduf": "reads a file"}

PYTHONS = {"__module__", "__doc__", "__dict__", "__weakref__", "__annotations__"}
PYTHONS |= {"__firstlineno__", "__static_attributes__"}  # from Python 3.13 on


@each_class
def test_what_is_inherited_from_stock_is_known_and_does_not_compute(cls):
    """A new method of a stock class would read float32 tables, or what stock's `__init__` makes."""
    bases = [base for base in STOCK[cls].__mro__ if base is not object]
    names = {name for base in bases for name in vars(base)} - PYTHONS
    ours = [base for base in cls.__mro__ if base.__module__.startswith("ddim_schedulers.")]
    inherited = {name for name in names if not any(name in vars(base) for base in ours)}
    assert inherited <= INHERITED.keys() | OLDER.keys()
    computing = {name for name in vars(STOCK[cls]) if callable(getattr(STOCK[cls], name))}
    assert not computing & inherited
    stock = STOCK[cls]()
    assert [name for name in vars(stock) if not hasattr(cls(), name)] == []


@each_class
def test_ours_is_a_stock_scheduler_under_our_own_name(cls, tmp_path):
    scheduler = cls()
    assert isinstance(scheduler, STOCK[cls])
    assert not any(isinstance(scheduler, other) for other in STOCK.values() if other != STOCK[cls])
    assert scheduler.__class__.__module__.startswith("ddim_schedulers.")
    scheduler.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == cls.__name__
    assert set(scheduler.compatibles) == set(STOCK[GeneralizedDDIMScheduler]().compatibles)


def test_each_name_of_inherited_is_inherited_by_some_class():
    assert all(any(hasattr(stock, name) for stock in STOCK.values()) for name in INHERITED)


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # stock solvers, with NumPy 2
@each_class
def test_a_trip_through_any_compatible_class_leaves_the_config_as_it_was(cls):
    """Which keys were given and which are defaults is a part of it, as with stock."""
    # betas that are not given are those of each class: Heun's differ
    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    few, more = (
        cls(num_train_timesteps=1000, **betas, **given)
        for given in ({}, {"clip_sample": False, "prediction_type": "v_prediction"})
    )
    others = sorted(few.compatibles, key=lambda other: other.__name__)
    for i, other in enumerate(others):
        scheduler = (few, more)[(i + list(STOCK).index(cls)) % 2]
        back = cls.from_config(other.from_config(scheduler.config).config).config
        # what stock adds are its own class's keys, which travel hidden
        assert {key: back[key] for key in scheduler.config} == dict(scheduler.config)


def test_the_inverse_keeps_settings_of_the_forward_schedulers_without_using_them(tmp_path):
    unused = {"thresholding": True, "sample_max_value": 0.5, "eta": 1.0, "variance_type": "other"}
    plain, ours = (GeneralizedDDIMInverseScheduler(**settings) for settings in ({}, unused))
    assert torch.equal(_run(plain), _run(ours))
    ours.save_pretrained(tmp_path)
    loaded = GeneralizedDDIMInverseScheduler.from_pretrained(tmp_path)
    for scheduler in (ours, loaded):
        assert {key: scheduler.config[key] for key in unused} == unused
    with pytest.raises(ValueError, match="`sample_max_value` is 0.5"):
        GeneralizedDDIMScheduler.from_config(loaded.config)
    with pytest.raises(TypeError, match="unexpected keyword argument 'thresholdin'"):
        GeneralizedDDIMInverseScheduler(thresholdin=True)


def test_the_inverse_takes_stocks_old_name_of_set_alpha_to_one():
    for value in (False, True):
        with pytest.warns(FutureWarning, match="set_alpha_to_one"):
            ours = GeneralizedDDIMInverseScheduler(set_alpha_to_zero=value)
        assert ours.config.set_alpha_to_one is value
        with pytest.warns(FutureWarning, match="set_alpha_to_one"):
            stock = diffusers.DDIMInverseScheduler(set_alpha_to_zero=value)
        assert torch.equal(ours.initial_alpha_cumprod, stock.initial_alpha_cumprod)
