"""A config of any diffusers class, of any year: the process is kept, or the config is refused."""

import inspect
import json
import warnings

import diffusers
import numpy as np
import pytest
import scheduler_vintages as vintages
import torch

from ddim_schedulers import (
    GeneralizedDDIMInverseScheduler,
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
    betas,
    to_portable,
)

CLASSES = (GeneralizedDDIMScheduler, MarkovianDDPMScheduler, GeneralizedDDIMInverseScheduler)
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)

# stock keeps float32: a cumulative product of 1,000 of them is off by up to 5e-7
CLOSE = {"rtol": 0, "atol": 1e-6}


def _stock_schedulers():
    """Every scheduler of diffusers that can be built from nothing, by whether it has alpha_bar."""
    with_alpha_bar, without = [], []
    for name in sorted(n for n in dir(diffusers) if n.endswith("Scheduler")):
        cls = getattr(diffusers, name)
        required = [
            p
            for p in list(inspect.signature(cls.__init__).parameters.values())[1:]
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        if required or not hasattr(cls, "from_config"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            has = hasattr(cls(), "alphas_cumprod")
        (with_alpha_bar if has else without).append(name)
    return with_alpha_bar, without


DISCRETE, OTHERS = _stock_schedulers()

# what `from_config` must keep, alone and together; a class is given the keys that it has
VARIED = (
    {},
    {"beta_start": 0.0015, "beta_end": 0.0195},
    {"beta_end": 0.012},
    {"beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 0.03},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"num_train_timesteps": 50, "beta_end": 0.3},
    {"trained_betas": np.linspace(1e-3, 0.05, 1000).tolist()},
    {"trained_betas": np.linspace(1e-3, 0.3, 20).tolist(), "num_train_timesteps": 20},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "beta_schedule": "scaled_linear",
        "snr_shift_scale": 1.0,
    },
    {"snr_shift_scale": 4.0},
    {"snr_shift_scale": 0.3, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
    {"prediction_type": "v_prediction"},
)


def _built(name, keys):
    cls = getattr(diffusers, name)
    known = inspect.signature(cls.__init__).parameters
    if name == "RePaintScheduler" and "trained_betas" in keys:
        keys = {**keys, "trained_betas": np.array(keys["trained_betas"])}  # it takes no list
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy on tensors, within diffusers
        try:
            return cls(**{key: value for key, value in keys.items() if key in known})
        except (NotImplementedError, ValueError):
            return None  # a schedule that this class does not know


def _forms(stock):
    """The ways in which a scheduler's config is handed on, the last with its defaults left out."""
    # `to_json_string` writes the name into the config itself
    unnamed = {k: v for k, v in stock.config.items() if k[0] != "_" or k == "_use_default_values"}
    written = json.loads(stock.to_json_string())
    defaults = inspect.signature(type(stock).__init__).parameters
    short = {
        k: v
        for k, v in written.items()
        if k.startswith("_") or k not in defaults or v != defaults[k].default
    }
    return unnamed, written, short


def _check_kept(cls, name, stock, keys):
    if len(stock.alphas_cumprod) <= 50 and name in ("LCMScheduler", "TCDScheduler"):
        # all timesteps, or more: LCM's boundary condition acts at t = 0 (without a name, TCD is it)
        with pytest.raises(ValueError, match="`original_inference_steps` is 50"):
            cls.from_config({**stock.config})
        return
    built = [cls.from_config(form) for form in _forms(stock)]
    for ours in built:
        torch.testing.assert_close(
            ours.alpha_bar, stock.alphas_cumprod.double(), msg=f"{name} {keys}", **CLOSE
        )
        assert ours.config.prediction_type == stock.config.get("prediction_type", "epsilon")
        assert len(ours) == stock.config.num_train_timesteps
        # one scheduler, one answer, whichever way its config came
        for key in ("timestep_spacing", "steps_offset", "clip_sample", "clip_sample_range"):
            assert ours.config[key] == built[0].config[key], (key, keys)


# Two that take 0.1 s to build, and differ in their steps alone: half of the keys each.
SLOW = ("KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler")


@pytest.mark.parametrize("name", DISCRETE)
def test_alpha_bar_of_every_class_with_every_key_varied(name):
    """By our classes in turn, which read a config in one place: each meets each key and name."""
    seen = 0
    for i, keys in enumerate(VARIED):
        if name in SLOW and i % 2 != SLOW.index(name):
            continue
        stock = _built(name, keys)
        if stock is None:
            continue
        _check_kept(CLASSES[(i + DISCRETE.index(name)) % 3], name, stock, keys)
        seen += 1
    assert seen >= 5


@each_class
@pytest.mark.parametrize("name", OTHERS)
def test_another_process_is_refused(cls, name):
    stock = _built(name, {})
    betas_of_another = {"beta_schedule": "linear", "trained_betas": None}
    named = {"_class_name": name}
    for form in (*_forms(stock), named, {**named, **betas_of_another}):
        with pytest.raises(ValueError, match="no betas of its own|predicts a flow"):
            cls.from_config(form)


@pytest.mark.parametrize(
    "name", [name for name in vintages.CONFIGS if name not in vintages.REFUSED]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_configs_of_published_repositories(name):
    stock = vintages.stock_of(name)
    for cls in CLASSES:
        ours = cls.from_config(vintages.config_of(name))
        torch.testing.assert_close(ours.alpha_bar, stock.alphas_cumprod.double(), **CLOSE)
        assert ours.config.prediction_type == stock.config.get("prediction_type", "epsilon")
        if type(stock).__name__ in (*vintages.SOLVERS, "RePaintScheduler"):
            continue  # their own way along the process
        stock.set_timesteps(10)
        ours.set_timesteps(10)
        assert sorted(ours.timesteps.tolist()) == sorted(stock.timesteps.tolist())


@each_class
@pytest.mark.parametrize("name", vintages.REFUSED)
def test_configs_of_another_process(cls, name):
    with pytest.raises(ValueError, match=vintages.REFUSED[name]):
        cls.from_config(vintages.config_of(name))


@each_class
def test_the_order_of_shift_and_rescaling_is_cogvideos(cls):
    keys = {"snr_shift_scale": 3.0, "rescale_betas_zero_snr": True, "prediction_type": "sample"}
    stock = diffusers.CogVideoXDDIMScheduler(**keys)
    ours = cls.from_config(stock.config)
    torch.testing.assert_close(ours.alpha_bar, stock.alphas_cumprod, rtol=1e-12, atol=1e-15)
    assert float(ours.alpha_bar[-1]) == 0 and ours.config.snr_shift_scale == 3.0
    # the mutation: rescaled first, then shifted, which is another process
    plain = betas.make_betas("scaled_linear", 1000, 8.5e-4, 0.012)
    swapped = betas.shift_snr(betas.rescale_zero_terminal_snr(plain), 3.0)
    assert (betas.alpha_bar_from_betas(swapped) - ours.alpha_bar).abs().max() > 5e-3
    for wrong in (0, -1.0, float("nan"), 1e-300, 10**20, None, "3"):
        with pytest.raises(ValueError, match="`snr_shift_scale` is "):
            cls(snr_shift_scale=wrong)


@each_class
def test_a_shifted_process_survives_saving_and_a_portable_export(cls, tmp_path):
    ours = cls.from_config(diffusers.CogVideoXDPMScheduler().config)
    ours.save_pretrained(tmp_path / "own")
    assert torch.equal(cls.from_pretrained(tmp_path / "own").alpha_bar, ours.alpha_bar)
    stock, _ = to_portable(ours)
    torch.testing.assert_close(stock.alphas_cumprod.double(), ours.alpha_bar, **CLOSE)
    stock.save_pretrained(tmp_path / "portable")
    back = cls.from_pretrained(tmp_path / "portable")
    assert torch.equal(back.alpha_bar, ours.alpha_bar) and back.config.snr_shift_scale == 3.0


@each_class
def test_our_own_name_alone_is_our_defaults(cls):
    for named in CLASSES:
        ours = cls.from_config({"_class_name": named.__name__})
        assert torch.equal(ours.alpha_bar, cls().alpha_bar)
        assert ours.config.timestep_spacing == "leading" and ours.config.clip_sample is True


@each_class
def test_a_class_that_nobody_knows_must_say_its_process(cls):
    whole = {
        "_class_name": "HouseScheduler",
        "num_train_timesteps": 100,
        "beta_schedule": "linear",
        "beta_start": 1e-3,
        "beta_end": 0.1,
        "prediction_type": "sample",
    }
    assert len(cls.from_config(whole)) == 100
    for key in ("num_train_timesteps", "beta_start", "beta_end", "prediction_type"):
        with pytest.raises(ValueError, match=f"`_class_name` is 'HouseScheduler'.*`{key}`"):
            cls.from_config({k: v for k, v in whole.items() if k != key})
    with pytest.raises(ValueError, match="HouseScheduler has no betas of its own"):
        cls.from_config({k: v for k, v in whole.items() if k != "beta_schedule"})
    cosine = {k: v for k, v in whole.items() if k not in ("beta_start", "beta_end")}
    cls.from_config({**cosine, "beta_schedule": "squaredcos_cap_v2"})
    # a class of a repository's own code, and a Flax one, whose defaults were the same
    assert len(cls.from_config({**whole, "_class_name": ["module", "HouseScheduler"]})) == 100
    flax = cls.from_config({"_class_name": "FlaxPNDMScheduler"})
    assert flax.config.clip_sample is False and flax.config.timestep_spacing == "leading"


@each_class
def test_old_spellings(cls):
    old = {"_class_name": "DDPMScheduler", "_diffusers_version": "0.0.4", "timesteps": 500}
    ours = cls.from_config({**old, "clip_predicted_image": False, "predict_epsilon": False})
    assert len(ours) == 500 and ours.config.timesteps is None
    assert ours.config.clip_sample is False and ours.config.prediction_type == "sample"
    assert cls.from_config({**old, "predict_epsilon": True}).config.prediction_type == "epsilon"
    assert cls.from_config({**old, "predict_epsilon": None}).config.prediction_type == "epsilon"
    for own in ({"_class_name": cls.__name__}, {}):  # there it is no trajectory
        with pytest.raises(ValueError, match="`timesteps` is 500"):
            cls.from_config({**own, "beta_schedule": "linear", "timesteps": 500})
    for contradiction in (
        {"predict_epsilon": True, "prediction_type": "v_prediction"},
        {"clip_predicted_image": True, "clip_sample": False},
        {"num_train_timesteps": 1000},
        {"set_alpha_to_zero": True, "set_alpha_to_one": False},
    ):
        with pytest.raises(ValueError, match="they must agree"):
            cls.from_config({**old, **contradiction})
    with pytest.raises(ValueError, match="`predict_epsilon` is 'no'"):
        cls.from_config({**old, "predict_epsilon": "no"})
    with pytest.raises(ValueError, match="`timestep_values` is"):
        cls.from_config({**old, "timestep_values": [3, 2, 1]})
    # public code hands it to the inverse scheduler, over a config that has the new key
    config = diffusers.DDIMScheduler(set_alpha_to_one=True).config
    assert cls.from_config(config, set_alpha_to_zero=False).config["set_alpha_to_one"] is False


@each_class
def test_continuous_time_is_refused(cls):
    video = diffusers.EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True
    )
    for form in _forms(video):
        with pytest.raises(ValueError, match="`timestep_type` is 'continuous'"):
            cls.from_config(form)


@each_class
def test_null_is_what_stock_takes_it_for(cls):
    name = {"_class_name": "DDIMScheduler"}
    for key in ("clip_sample", "thresholding", "rescale_betas_zero_snr", "set_alpha_to_one"):
        assert cls.from_config({**name, key: None}).config[key] is False
        assert cls.from_config({"beta_schedule": "linear", key: None}).config[key] is False
    for key, unread in (
        ("beta_start", {"beta_schedule": "squaredcos_cap_v2"}),
        ("beta_end", {"trained_betas": [0.1], "num_train_timesteps": 1}),
        ("beta_schedule", {"trained_betas": [0.1], "num_train_timesteps": 1}),
        ("clip_sample_range", {"clip_sample": False}),
        ("dynamic_thresholding_ratio", {}),
        ("sample_max_value", {}),
        ("steps_offset", {"timestep_spacing": "trailing"}),
        ("variance_type", {}),
        ("trained_betas", {}),
    ):
        ours = cls.from_config({**name, **unread, key: None})
        assert ours.config.get(key, 0) is not None or key == "trained_betas"
    for key in (
        "beta_start",
        "beta_schedule",
        "clip_sample_range",
        "num_train_timesteps",
        "prediction_type",
        "steps_offset",
        "timestep_spacing",
    ):
        with pytest.raises(ValueError, match=f"`{key}` is None"):
            cls.from_config({**name, key: None})


@each_class
def test_null_in_a_config_of_ours_is_refused_by_each_class(cls):
    for named in CLASSES:
        for key in (
            "clip_sample",
            "lower_order_final",
            "quadratic_end",
            "reverse_variance",
            "sample_max_value",
            "set_alpha_to_one",
            "solver_corrector",
            "solver_form",
            "solver_order",
            "solver_weights",
            "thresholding",
            "end_scale",
            "eps_scale",
        ):
            with pytest.raises(ValueError, match=f"`{key}` is None"):
                cls.from_config({"_class_name": named.__name__, key: None})
        optional = ("calibration", "eta", "eta_interval", "late_noise_cap", "sigma", "timesteps")
        for key in (*optional, "variance_type", "solver_corrector_order", "solver_variable"):
            cls.from_config({"_class_name": named.__name__, key: None})
    for wrong in (None, 5, "beta_end"):
        with pytest.raises(ValueError, match="`_use_default_values` is "):
            cls.from_config({"beta_schedule": "linear", "_use_default_values": wrong})


@each_class
@pytest.mark.parametrize(
    "key",
    [
        "beta_start",
        "beta_end",
        "clip_sample_range",
        "dynamic_thresholding_ratio",
        "end_scale",
        "eps_scale",
        "eta",
        "late_noise_cap",
        "original_inference_steps",
        "quadratic_end",
        "sample_max_value",
        "snr_shift_scale",
        "steps_offset",
    ],
)
def test_an_integer_of_more_than_64_bits_is_no_number(cls, key):
    if key in cls._get_init_keys(cls):
        for value in (10**20, -(10**20), 10**400):
            with pytest.raises(ValueError, match=f"`{key}` is "):
                cls.from_config({"beta_schedule": "linear", key: value})
    with pytest.raises(ValueError, match=r"`trained_betas\[0\]` is 1000"):
        cls(trained_betas=[10**20, 0.1], num_train_timesteps=2)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
@pytest.mark.parametrize("steps", [50, 40, 33])
def test_a_distilled_network_is_asked_where_it_was_trained(name, steps):
    stock = getattr(diffusers, name)(original_inference_steps=steps)
    for form in _forms(stock):
        ours = GeneralizedDDIMScheduler.from_config(form)
        for n in (1, 2, 3, 4, 7, 8, 10, 25, 33):
            stock.set_timesteps(n)
            ours.set_timesteps(n)
            assert ours.timesteps.tolist() == stock.timesteps.tolist(), (n, steps)
    with pytest.raises(ValueError, match=f"from 1 to `original_inference_steps`={steps}"):
        ours.set_timesteps(steps + 1)
    with pytest.raises(ValueError, match="it must be 'trailing'"):
        GeneralizedDDIMScheduler.from_config(stock.config, timestep_spacing="leading")
    free = GeneralizedDDIMScheduler.from_config(
        stock.config, timestep_spacing="leading", original_inference_steps=None
    )
    free.set_timesteps(100)
    # of another scheduler it is a key without effect, as there
    stale = {"_class_name": "DDIMScheduler", "original_inference_steps": steps}
    assert GeneralizedDDIMScheduler.from_config(stale).config.original_inference_steps is None


def test_a_boundary_that_acts_is_refused():
    for wrong in (None, "10", 0, -1.0, 10**400, float("nan")):
        named = {"_class_name": "LCMScheduler", "timestep_scaling": wrong}
        with pytest.raises(ValueError, match="`timestep_scaling` is "):
            GeneralizedDDIMScheduler.from_config(named)
        GeneralizedDDIMScheduler.from_config({**named, "_class_name": "TCDScheduler"})  # no use
    for keys in ({"timestep_scaling": 1.0}, {"original_inference_steps": 1000}):
        stock = diffusers.LCMScheduler(**keys)
        for form in _forms(stock):
            with pytest.raises(ValueError, match="`timestep_scaling` is "):
                GeneralizedDDIMScheduler.from_config(form)


@each_class
def test_a_swap_out_of_ours_keeps_the_process(cls):
    """Heun's betas end at 0.012 and it clips nothing, if the config leaves that open."""
    names = [name for name in DISCRETE if name != "UnCLIPScheduler"]
    for name in names[CLASSES.index(cls) :: 3]:  # each pair: the trips of the contract suite
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stock = getattr(diffusers, name).from_config(cls().config)
        if "snr_shift_scale" not in stock.config:
            torch.testing.assert_close(stock.alphas_cumprod.double(), cls().alpha_bar, **CLOSE)
        back = cls.from_config(stock.config)
        if name not in ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "LCMScheduler"):
            if name not in ("TCDScheduler", "DPMSolverSinglestepScheduler"):
                assert {k: back.config[k] for k in cls().config} == dict(cls().config), name


@each_class
def test_classes_that_do_not_clip(cls):
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"):
        for form in _forms(_built(name, {})):
            assert cls.from_config(form).config.clip_sample is False
            assert cls.from_config({**form, "clip_sample": True}).config.clip_sample is True
    for name in ("CogVideoXDDIMScheduler", "LCMScheduler", "HeunDiscreteScheduler"):
        for form in _forms(_built(name, {})):
            assert cls.from_config(form).config.clip_sample is False
    for name in ("DDPMScheduler", "UnCLIPScheduler", "RePaintScheduler"):
        for form in _forms(_built(name, {})):
            assert cls.from_config(form).config.clip_sample is True


# -- a process that does not end in noise


def test_linear_betas_are_known_by_alpha_bar():
    def alpha_bar(*arguments):
        return betas.alpha_bar_from_betas(betas.make_betas(*arguments))

    for big_t in (10, 100, 1000, 4000):
        assert betas.has_linear_betas(alpha_bar("linear", big_t))
        assert betas.has_linear_betas(alpha_bar("linear", big_t).float().double())
        for other in ("scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"):
            assert not betas.has_linear_betas(alpha_bar(other, big_t))


@pytest.mark.parametrize("cls", CLASSES[:2], ids=lambda cls: cls.__name__)
def test_a_terminal_signal_is_spoken_of_once(cls, caplog):
    for quiet in (
        {},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 0.012},
        {"beta_start": 8.5e-4, "beta_end": 0.012},
        {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"},
        {
            "num_train_timesteps": 100,
            "rescale_betas_zero_snr": True,
            "prediction_type": "sample",
        },
    ):
        cls(**quiet).set_timesteps(10)
    assert not caplog.records
    loud = cls(num_train_timesteps=100)
    assert not caplog.records
    for _ in range(2):
        loud.set_timesteps(10)
    (record,) = caplog.records
    assert "alpha_bar at the last of 100 timesteps is 0.364" in record.getMessage()
