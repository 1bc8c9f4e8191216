"""Guidance against closed forms: a mixture of Gaussians, whose eps is known for every class."""

import copy
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from tiny_models import tiny_unet

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler
from ddim_schedulers.class_labels import note_class_labels
from ddim_schedulers.pipelines import (
    AnnealedLangevinPipeline,
    ClassMixture,
    Conditions,
    GenerationPipeline,
    InterpolationPipeline,
    InversionPipeline,
)
from ddim_schedulers.pipelines.conditions import BoundConditions
from ddim_schedulers.pipelines.guidance import (
    AutoGuidedNetwork,
    ClassifierFreeNetwork,
    ClassifierGuidedNetwork,
    LabelledNetwork,
    guided,
)
from ddim_schedulers.pipelines.sampling import Levels, predict

# diffusers' multistep schedulers convert a tensor in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

SIZE = 3
CLASSES = 3
NULL = 3
# of the members, with the noise that follows x_T
MEMBERS = {
    "eta 0": lambda: GeneralizedDDIMScheduler(clip_sample=False, eta=0.0),
    "eta 0.5": lambda: GeneralizedDDIMScheduler(clip_sample=False, eta=0.5),
    "eta 1": lambda: GeneralizedDDIMScheduler(clip_sample=False, eta=1.0),
    "sigma-hat": lambda: GeneralizedDDIMScheduler(
        clip_sample=False, eta=1.0, reverse_variance="sigma_hat"
    ),
    "ddpm": lambda: MarkovianDDPMScheduler(clip_sample=False),
    "order 2": lambda: GeneralizedDDIMScheduler(clip_sample=False, solver_order=2),
    "order 3": lambda: GeneralizedDDIMScheduler(clip_sample=False, solver_order=3),
    "order 3, corrector": lambda: GeneralizedDDIMScheduler(
        clip_sample=False, solver_order=3, solver_corrector=True
    ),
    "order 2, eta 1": lambda: GeneralizedDDIMScheduler(clip_sample=False, solver_order=2, eta=1.0),
    "stock ddim": lambda: DDIMScheduler(clip_sample=False),
    "stock ddpm": lambda: DDPMScheduler(clip_sample=False),
    "stock dpm-solver": lambda: DPMSolverMultistepScheduler(),
    "stock deis": lambda: DEISMultistepScheduler(),
    "stock unipc": lambda: UniPCMultistepScheduler(),
}


class Mixture:
    """p(x_0) = sum_c pi_c N(mu_c, s_c^2 I), pixels of SIZE x SIZE; everything in float64."""

    def __init__(self, alpha_bar):
        generator = torch.Generator().manual_seed(7)
        self.mu = torch.randn(CLASSES, 1, SIZE, SIZE, generator=generator, dtype=torch.float64)
        self.s = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)
        self.pi = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
        self.alpha_bar = alpha_bar

    def parts(self, x, t):
        """Returns log pi_c N(x_t; c), (B, K), and eps of every class, (B, K, C, H, W)."""
        a = float(self.alpha_bar[t])
        variance = a * self.s**2 + 1 - a
        apart = x[:, None] - math.sqrt(a) * self.mu
        square = apart.square().flatten(2).sum(2)
        log_p = self.pi.log() - square / (2 * variance) - SIZE**2 / 2 * variance.log()
        return log_p, math.sqrt(1 - a) * apart / variance.view(-1, 1, 1, 1)

    def eps(self, x, t, labels):
        """Returns eps of each image's class; the null class is the whole mixture."""
        log_p, eps = self.parts(x, t)
        whole = (log_p.softmax(1).view(*log_p.shape, 1, 1, 1) * eps).sum(1)
        each = torch.cat([eps, whole[:, None]], dim=1)
        return each[torch.arange(len(x)), labels]


class Exact(ModelMixin, ConfigMixin):
    """The exact network of the mixture; `field` in the place of labels makes it unconditional."""

    @register_to_config
    def __init__(
        self,
        num_class_embeds=CLASSES + 1,
        prediction_type="epsilon",
        learns_range=False,
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
    ):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1).double(), requires_grad=False)
        self.mixture = Mixture(GeneralizedDDIMScheduler().alpha_bar)
        self.field, self.batches = None, []

    def forward(self, sample, timestep, class_labels=None):
        t = int(timestep)
        self.batches.append(len(sample))
        eps = self.mixture.eps if self.field is None else self.field
        eps = eps(sample, t, class_labels)
        a = float(self.mixture.alpha_bar[t])
        if self.config.prediction_type == "v_prediction":
            eps = (eps - math.sqrt(1 - a) * sample) / math.sqrt(a)
        if self.config.prediction_type == "sample":
            eps = (sample - math.sqrt(1 - a) * eps) / math.sqrt(a)
        if self.config.learns_range:  # which says the class
            rest = torch.zeros_like(eps) + class_labels.view(-1, 1, 1, 1) / 8
            eps = torch.cat([eps, rest], dim=1)
        return UNet2DOutput(sample=eps)


class Bayes(torch.nn.Module):
    """The exact classifier: log p(c | x_t) up to a constant."""

    def __init__(self, mixture):
        super().__init__()
        self.mixture, self.batches = mixture, []

    def forward(self, x, t):
        self.batches.append(len(x))
        (step,) = set(t.tolist())
        return self.mixture.parts(x, step)[0] + 3.0


def conditional(null=NULL, **settings):
    network = Exact(**settings).eval()
    note_class_labels(network, null, ["cat", "dog", "emu"])
    return network


def unconditional(field, **settings):
    network = Exact(num_class_embeds=None, **settings).eval()
    network.field = field
    return network


def whole(network):
    """Returns eps of the whole mixture as a field."""
    return lambda x, t, _: network.mixture.eps(x, t, torch.full((len(x),), NULL))


def guided_field(network, labels, w, low=0.0, high=1.0):
    """Returns the guided eps, written out again."""

    def field(x, t, _):
        cond = network.mixture.eps(x, t, labels)
        if not low <= t / 1000 <= high:
            return cond
        null = network.mixture.eps(x, t, torch.full((len(x),), NULL))
        return (1 - w) * null + w * cond

    return field


def pipeline(network, scheduler=None, cls=GenerationPipeline):
    pipe = cls(
        unet=network, scheduler=scheduler or GeneralizedDDIMScheduler(clip_sample=False, eta=0.5)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, seeds=range(6), steps=10, **settings):
    settings.setdefault("num_inference_steps", steps)
    return pipe(seeds=seeds, output_type="latent", **settings).images


LABELS = [0, 1, 2, 2, 1, 0]


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("w", [0.5, 3.0, -1.0])
def test_guided_samples_follow_the_guided_field(member, w):
    network = conditional()
    got = sample(pipeline(network, MEMBERS[member]()), class_labels=LABELS, guidance_scale=w)
    field = guided_field(network, torch.tensor(LABELS), w)
    expected = sample(pipeline(unconditional(field), MEMBERS[member]()))
    assert (got - expected).abs().max() < 1e-9
    assert set(network.batches) == {12} and len(network.batches) == 10
    # the mutation: a scale that is off by a hundredth is seen
    other = sample(
        pipeline(network, MEMBERS[member]()), class_labels=LABELS, guidance_scale=w + 0.01
    )
    assert (other - expected).abs().max() > 1e-5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_guided_run_is_the_recursion_of_ddim(closed_form, prediction_type):
    w, steps = 2.5, [900, 600, 300, 50]
    network = conditional(prediction_type=prediction_type)
    scheduler = GeneralizedDDIMScheduler(clip_sample=False, prediction_type=prediction_type)
    x = torch.randn(3, 1, SIZE, SIZE, dtype=torch.float64)
    labels = [2, 0, 1]
    got = pipeline(network, scheduler)(
        latents=x,
        timesteps=steps,
        class_labels=labels,
        guidance_scale=w,
        output_type="latent",
    ).images
    field, table = guided_field(network, torch.tensor(labels), w), closed_form.alpha_bar()
    for t, s in zip(steps, [*steps[1:], None], strict=True):
        a_t, a_s = table[t], 1.0 if s is None else table[s]
        eps = field(x, t, None)
        x0 = (x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
        x = math.sqrt(a_s) * x0 + math.sqrt(1 - a_s) * eps
    assert (got - x).abs().max() < 1e-9


@pytest.mark.parametrize("member", MEMBERS)
def test_scales_1_and_0_are_the_plain_samplers_to_the_bit(member):
    network = conditional()
    pipe = pipeline(network, MEMBERS[member]())
    fixed = unconditional(lambda x, t, _: network.mixture.eps(x, t, torch.tensor(LABELS)))
    expected = sample(pipeline(fixed, MEMBERS[member]()))
    assert torch.equal(sample(pipe, class_labels=LABELS), expected)
    assert torch.equal(sample(pipe, class_labels=LABELS, guidance_scale=1), expected)
    plain = sample(pipeline(unconditional(whole(network)), MEMBERS[member]()))
    assert torch.equal(sample(pipe, class_labels=LABELS, guidance_scale=0), plain)
    assert torch.equal(sample(pipe, guidance_scale=0), plain)
    # single calls, each of a batch that is not doubled
    assert set(network.batches) == {6} and len(network.batches) == 40
    assert (plain - expected).abs().max() > 1e-2


def test_a_negative_label_stands_in_the_place_of_the_null_class():
    network = conditional()
    pipe = pipeline(network)
    got = sample(pipe, class_labels="cat", guidance_scale=2.0, negative_label="dog")
    cat, dog = torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64)
    eps = network.mixture.eps
    field = unconditional(lambda x, t, _: 2 * eps(x, t, cat) - eps(x, t, dog))
    assert (got - sample(pipeline(field))).abs().max() < 1e-9
    led = sample(pipe, class_labels="cat", guidance_scale=0, negative_label=1)
    assert torch.equal(led, sample(pipe, class_labels="dog"))


@pytest.mark.parametrize("w", [1.0, 3.0])
@pytest.mark.parametrize("member", ["eta 0", "eta 1", "order 3", "stock unipc"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_classifier_guidance_with_the_exact_classifier(member, prediction_type, w):
    # Bayes: eps_c = eps - sqrt(1 - abar_t) grad log p(c | x_t), so w = 1 is the class itself
    settings = {"prediction_type": prediction_type}
    network = conditional()
    free = unconditional(whole(network), **settings)
    scheduler = type(MEMBERS[member]()).from_config(MEMBERS[member]().config, **settings)
    classifier = Bayes(network.mixture)
    got = sample(
        pipeline(free, scheduler),
        class_labels=LABELS,
        guidance_scale=w,
        classifier=classifier,
        batch_size=4,
    )
    field = guided_field(network, torch.tensor(LABELS), w)
    expected = sample(pipeline(unconditional(field, **settings), scheduler))
    # the noise levels of stock schedulers are float32
    bound = 1e-6 if member.startswith("stock") else 1e-10
    assert (got - expected).abs().max() < bound * max(1, float(expected.abs().max()))
    assert sorted(classifier.batches) == [2] * 10 + [4] * 10


def test_the_exact_classifier_gives_the_exact_eps():
    network = conditional()
    pipe = pipeline(unconditional(whole(network)))
    asked = Conditions(LABELS, guidance_scale=1.0, classifier=Bayes(network.mixture))
    bound = BoundConditions(asked, pipe.unet, pipe.scheduler, 6, torch.device("cpu"))
    x = torch.randn(6, 1, SIZE, SIZE, dtype=torch.float64)
    for t in (0, 1, 10, 500, 999):
        exact = network.mixture.eps(x, t, torch.tensor(LABELS))
        for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
            with mode():
                got = bound.of(0, 6)(x.clone(), torch.tensor(t)).sample
            assert (got - exact).abs().max() < 1e-10


def test_classifier_guidance_on_top_of_labels():
    network = conditional()
    got = sample(
        pipeline(network), class_labels=LABELS, guidance_scale=2, classifier=Bayes(network.mixture)
    )
    # eps_c - 2 sqrt(1 - abar) grad log p = eps_c + 2 (eps_c - eps)
    field = guided_field(network, torch.tensor(LABELS), 3.0)
    assert (got - sample(pipeline(unconditional(field)))).abs().max() < 1e-9


def test_auto_guidance_with_the_same_network_changes_nothing():
    for network, settings in (
        (conditional(), {"class_labels": LABELS}),
        (unconditional(whole(conditional())), {}),
    ):
        plain = sample(pipeline(network), **settings)
        for w in (0, 1, 2.5, -3.0):
            same = sample(pipeline(network), guide=network, guidance_scale=w, **settings)
            assert torch.equal(same, plain)


@pytest.mark.parametrize("w", [0, 0.5, 1, 3])
def test_auto_guidance_follows_its_field(w):
    # the guide knows the whole mixture alone: classifier-free guidance again
    network = conditional(null=None, num_class_embeds=3)
    guide = unconditional(whole(network))
    got = sample(pipeline(network), class_labels=LABELS, guidance_scale=w, guide=guide)
    field = guided_field(network, torch.tensor(LABELS), w)
    assert (got - sample(pipeline(unconditional(field)))).abs().max() < 1e-9
    calls = {0: (0, 10), 1: (10, 0)}.get(w, (10, 10))
    assert (len(network.batches), len(guide.batches)) == calls
    # a guide with classes gets the labels
    weak = conditional(null=None, num_class_embeds=3)
    weak.mixture.s = weak.mixture.s * 1.5
    eps, labels = (network.mixture.eps, weak.mixture.eps), torch.tensor(LABELS)
    field = unconditional(lambda x, t, _: (1 - w) * eps[1](x, t, labels) + w * eps[0](x, t, labels))
    got = sample(pipeline(network), class_labels=LABELS, guidance_scale=w, guide=weak)
    assert (got - sample(pipeline(field))).abs().max() < 1e-9


@pytest.mark.parametrize("interval", [[0.0, 1.0], [0.2, 0.8], [0.5, 0.9], (0, 0.3), [0.111, 0.222]])
def test_an_interval_is_a_share_of_t_with_its_ends(interval):
    w, network = 4.0, conditional()
    got = sample(
        pipeline(network),
        timesteps=list(range(999, -1, -111)),
        steps=None,
        class_labels=LABELS,
        guidance_scale=w,
        guidance_interval=interval,
    )
    field = guided_field(network, torch.tensor(LABELS), w, *interval)
    expected = sample(
        pipeline(unconditional(field)), timesteps=list(range(999, -1, -111)), steps=None
    )
    assert (got - expected).abs().max() < 1e-9
    inside = [interval[0] <= t / 1000 <= interval[1] for t in range(999, -1, -111)]
    assert network.batches == [12 if each else 6 for each in inside]


def test_a_classifier_and_a_guide_keep_to_the_interval():
    network, interval = conditional(), [0.2, 0.6]
    free, classifier = unconditional(whole(network)), Bayes(network.mixture)
    got = sample(
        pipeline(free),
        class_labels=LABELS,
        guidance_scale=1,
        guidance_interval=interval,
        classifier=classifier,
    )
    labels = torch.tensor(LABELS)

    def field(x, t, _):
        inside = 0.2 <= t / 1000 <= 0.6
        return network.mixture.eps(x, t, labels if inside else torch.full((6,), NULL))

    assert (got - sample(pipeline(unconditional(field)))).abs().max() < 1e-9
    assert 0 < len(classifier.batches) < 10
    guide = unconditional(whole(network))
    got = sample(
        pipeline(network),
        class_labels=LABELS,
        guidance_scale=3,
        guidance_interval=interval,
        guide=guide,
    )
    field = guided_field(network, labels, 3, *interval)
    assert (got - sample(pipeline(unconditional(field)))).abs().max() < 1e-9
    assert 0 < len(guide.batches) < 10


@pytest.mark.parametrize(
    "make",
    [
        lambda: GeneralizedDDIMScheduler(clip_sample=False, solver_order=2),
        lambda: GeneralizedDDIMScheduler(clip_sample=False, solver_order=3),
        lambda: DPMSolverMultistepScheduler(),
        lambda: DEISMultistepScheduler(),
        lambda: UniPCMultistepScheduler(),
    ],
)
def test_a_history_ends_at_the_edge_of_the_interval(make):
    # as if each part were a run of its own: sampling is stopped at the edge and begun again there
    network, w, interval = conditional(), 4.0, [0.3, 0.7]
    labels = torch.tensor(LABELS)
    got = pipeline(network, make())(
        seeds=range(6),
        num_inference_steps=20,
        class_labels=LABELS,
        guidance_scale=w,
        guidance_interval=interval,
        return_path=True,
        output_type="latent",
    )
    steps, x_t = got.path.timesteps, got.path.x_t
    inside = [0.3 <= t / 1000 <= 0.7 for t in steps]
    edges = [0, *[i for i in range(1, 20) if inside[i] != inside[i - 1]], 20]
    assert len(edges) == 4
    field = unconditional(guided_field(network, labels, w, *interval))
    for start, stop in zip(edges, edges[1:], strict=False):
        scheduler = make()
        scheduler.set_timesteps(20)
        x = x_t[start]
        for i in range(start, stop):
            if isinstance(scheduler, GeneralizedDDIMScheduler):
                t = steps[i]
            else:
                t = scheduler.timesteps[i]
            x = scheduler.step(field(x, torch.as_tensor(steps[i])).sample, t, x).prev_sample
        assert (x - x_t[stop]).abs().max() < 1e-9
    # the mutation: a history that goes on across the edge gives other samples
    scheduler = make()
    scheduler.set_timesteps(20)
    x = x_t[0]
    for t in scheduler.timesteps:
        x = scheduler.step(field(x, t).sample, t, x).prev_sample
    assert (x - x_t[20]).abs().max() > 1e-4


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    ("plain", "kind"), [(1, "classifier-free"), (1, "guide"), (0, "classifier")]
)
def test_an_interval_of_no_guidance_is_the_plain_sampler(order, plain, kind):
    # nothing changes at its edges, so that the history of a higher order goes on
    network = conditional()
    kinds = {"guide": unconditional(whole(network)), "classifier": Bayes(network.mixture)}
    settings = {kind: kinds[kind]} if kind in kinds else {}
    settings |= {"class_labels": LABELS, "guidance_interval": [0.2, 0.6]}

    def make():
        return GeneralizedDDIMScheduler(clip_sample=False, solver_order=order)

    got = sample(pipeline(network, make()), guidance_scale=plain, **settings)
    assert torch.equal(got, sample(pipeline(network, make()), class_labels=LABELS))
    guided = sample(pipeline(network, make()), guidance_scale=plain + 1, **settings)
    assert (guided - got).abs().max() > 1e-3


def test_a_table_serves_a_scale_that_does_not_guide():
    network, exact = conditional(), conditional().mixture
    levels = Levels(GeneralizedDDIMScheduler())
    bound = LabelledNetwork(network, torch.tensor(LABELS)[:, None])
    null = torch.full((6,), NULL)
    for same, other in (
        (ClassifierFreeNetwork(bound, null, 1), ClassifierFreeNetwork(bound, null, 0)),
        (AutoGuidedNetwork(bound, bound, 1), AutoGuidedNetwork(bound, bound, 2)),
        (
            ClassifierGuidedNetwork(bound, Bayes(exact), null, 0, levels),
            ClassifierGuidedNetwork(bound, Bayes(exact), null, 1, levels),
        ),
    ):
        assert not same.changes_predictions and other.changes_predictions
    mixed = LabelledNetwork(network, torch.zeros(6, 2, dtype=int), torch.full((6, 2), 0.5))
    for around in (ClassifierFreeNetwork(mixed, null, 1), AutoGuidedNetwork(mixed, bound, 1)):
        assert around.changes_predictions


def test_order_2_stays_order_2_with_an_interval():
    network = conditional()
    x = torch.randn(8, 1, SIZE, SIZE, dtype=torch.float64)

    def sample_at_333(steps, **settings):
        grid = list(range(999, 0, -999 // steps))
        scheduler = GeneralizedDDIMScheduler(clip_sample=False, **settings)
        path = pipeline(network, scheduler)(
            latents=x,
            timesteps=grid,
            class_labels=0,
            guidance_scale=3.0,
            guidance_interval=[0.334, 0.666],  # 666 is on all grids
            return_path=True,
            output_type="latent",
        ).path
        return path.x_t[path.timesteps.index(333)]

    fine = sample_at_333(333, solver_order=3)
    errors = [float((sample_at_333(s, solver_order=2) - fine).norm()) for s in (27, 111)]
    assert math.log(errors[0] / errors[1]) / math.log(111 / 27) > 1.7


@pytest.mark.parametrize("phi", [0.0, 0.3, 1.0])
def test_rescale_gives_the_deviation_back(phi):
    network = conditional()
    asked = Conditions(LABELS, guidance_scale=5.0, guidance_rescale=phi)
    scheduler = GeneralizedDDIMScheduler()
    bound = BoundConditions(asked, network, scheduler, 6, torch.device("cpu"))
    x, labels = torch.randn(6, 1, SIZE, SIZE, dtype=torch.float64), torch.tensor(LABELS)
    got = bound.of(0, 6)(x, 400).sample
    cond = network.mixture.eps(x, 400, labels)
    raw = guided_field(network, labels, 5.0)(x, 400, None)
    for image in range(6):  # each sample on its own, arXiv:2305.08891, Sec. 3.4
        whole = raw[image] * cond[image].std() / raw[image].std()
        assert (got[image] - (phi * whole + (1 - phi) * raw[image])).abs().max() < 1e-12


@pytest.mark.parametrize("phi", [0.0, 0.4])
@pytest.mark.parametrize("w", [-1.0, 0.5, 2.0, 7.5])
def test_the_formula_is_that_of_the_guider_of_diffusers(w, phi):
    # written out, and not called: a guider logs a warning when it is made, counts its own steps for
    # its interval, and is an experimental interface
    stock = ClassifierFreeGuidance(guidance_scale=w, guidance_rescale=phi)
    cond, null = torch.randn(2, 4, 1, SIZE, SIZE, dtype=torch.float64)
    expected = stock.forward(cond, null).pred
    assert (guided(cond, null, w, phi, 1) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("limit", [{"clip_sample": True}, {"thresholding": True}])
def test_what_was_guided_is_clipped_afterwards(closed_form, limit):
    network, w = conditional(), 20.0
    settings = {"clip_sample": False, "clip_sample_range": 1.0, **limit}
    settings |= {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
    scheduler = GeneralizedDDIMScheduler(**settings)
    pipe = pipeline(network, scheduler)
    run = pipe(
        seeds=[1, 2],
        num_inference_steps=5,
        class_labels=[0, 1],
        guidance_scale=w,
        return_path=True,
        output_type="latent",
    )
    field, table = guided_field(network, torch.tensor([0, 1]), w), closed_form.alpha_bar()
    bitten = False
    for i, t in enumerate(run.path.timesteps):
        x, a = run.path.x_t[i], table[t]
        x0 = (x - math.sqrt(1 - a) * field(x, t, None)) / math.sqrt(a)
        limited = closed_form.limited(x0, dict(scheduler.config))
        bitten |= bool((limited != x0).any())
        assert (run.path.x0[i] - limited).abs().max() < 1e-9
    assert bitten


def test_a_learned_variance_is_the_conditional_one():
    settings = {"learns_range": True, "out_channels": 2}
    network = conditional(**settings)
    labels = torch.tensor(LABELS)
    make = {
        "ddpm": lambda: MarkovianDDPMScheduler(clip_sample=False, variance_type="learned_range"),
        "eta 1": lambda: GeneralizedDDIMScheduler(
            clip_sample=False, eta=1.0, reverse_variance="learned_range"
        ),
    }
    field = guided_field(network, labels, 3.0)
    for scheduler in make.values():
        got = sample(pipeline(network, scheduler()), class_labels=LABELS, guidance_scale=3.0)

        def both(x, t, _):
            rest = torch.zeros_like(x) + labels.view(-1, 1, 1, 1) / 8
            return torch.cat([field(x, t, None), rest], dim=1)

        expected = sample(pipeline(unconditional(both, out_channels=2), scheduler()))
        assert (got - expected).abs().max() < 1e-9
        free = sample(pipeline(network, scheduler()), guidance_scale=0)
        cond = sample(pipeline(network, scheduler()), class_labels=LABELS)
        assert free.isfinite().all() and (free - cond).abs().max() > 1e-2


@pytest.mark.parametrize("w", [0, 1, 2])
def test_a_guide_needs_no_variance_and_may_have_one(w):
    both = {"learns_range": True, "out_channels": 2}
    learned = MarkovianDDPMScheduler(clip_sample=False, variance_type="learned_range")
    settings = {"class_labels": LABELS, "guidance_scale": w}
    network = conditional(**both)
    same = sample(pipeline(network, learned), guide=conditional(**both), **settings)
    without = sample(pipeline(network, learned), guide=conditional(), **settings)
    assert (without - same).abs().max() < 1e-12  # the variance is the network's
    fixed = MarkovianDDPMScheduler(clip_sample=False)
    got = sample(pipeline(conditional(), fixed), guide=conditional(**both), **settings)
    assert torch.equal(got, sample(pipeline(conditional(), fixed), guide=conditional(), **settings))


def test_an_image_depends_on_its_seed_and_its_label_alone():
    pipe = pipeline(conditional(), GeneralizedDDIMScheduler(clip_sample=False, eta=1.0))
    settings = {"class_labels": LABELS, "guidance_scale": 2.0, "guidance_interval": [0.1, 0.7]}
    together = sample(pipe, batch_size=6, **settings)
    for batch_size in (1, 4):
        assert (sample(pipe, batch_size=batch_size, **settings) - together).abs().max() < 1e-9
    for i, label in enumerate(LABELS):
        alone = sample(pipe, seeds=[i], **{**settings, "class_labels": label})
        assert (alone[0] - together[i]).abs().max() < 1e-9
    assert pipe(num_inference_steps=2, **settings).class_labels == LABELS
    assert pipe(num_inference_steps=2, class_labels="emu").class_labels == [2]


def test_a_network_may_require_its_labels():
    class Requires(Exact):
        def forward(self, sample, timestep, class_labels):
            return super().forward(sample, timestep, class_labels)

    network = Requires().eval()
    note_class_labels(network, NULL)
    got = sample(pipeline(network), class_labels=LABELS, guidance_scale=2.0)
    same = sample(pipeline(conditional()), class_labels=LABELS, guidance_scale=2.0)
    assert torch.equal(got, same)
    network = Requires(num_class_embeds=None)
    with pytest.raises(ValueError, match=r"forward needs \['class_labels'\]"):
        pipeline(network)


def test_names_numbers_arrays_and_tensors_say_the_same():
    pipe = pipeline(conditional())
    expected = sample(pipe, class_labels=LABELS)
    names = [["cat", "dog", "emu"][i] for i in LABELS]
    for labels in (names, tuple(LABELS), torch.tensor(LABELS), torch.tensor(LABELS).numpy()):
        assert torch.equal(sample(pipe, class_labels=labels), expected)
    one = sample(pipe, class_labels=[1] * 6)
    for label in ("dog", 1, torch.tensor(1), "1"):
        assert torch.equal(sample(pipe, class_labels=label), one)


def test_mixtures_go_over_from_class_to_class():
    network = conditional()
    pipe = pipeline(network)
    weights = [[1.0, 0.0], [0.0, 1.0], [0.25, 0.75]]
    mixture = ClassMixture(["cat", "emu"], weights)
    got = sample(pipe, seeds=range(3), class_labels=mixture)
    assert (got[:1] - sample(pipe, seeds=[0], class_labels=0)).abs().max() < 1e-9
    assert (got[1:2] - sample(pipe, seeds=[1], class_labels=2)).abs().max() < 1e-9
    eps, (cat, emu) = network.mixture.eps, (torch.zeros(1).long(), torch.full((1,), 2))
    field = unconditional(lambda x, t, _: 0.25 * eps(x, t, cat) + 0.75 * eps(x, t, emu))
    assert (got[2:] - sample(pipeline(field), seeds=[2])).abs().max() < 1e-9
    w = 3.0
    null = torch.full((1,), NULL)
    field = unconditional(
        lambda x, t, _: (
            (1 - w) * eps(x, t, null) + w * (0.25 * eps(x, t, cat) + 0.75 * eps(x, t, emu))
        )
    )
    got = sample(pipe, seeds=range(3), class_labels=mixture, guidance_scale=w)
    assert (got[2:] - sample(pipeline(field), seeds=[2])).abs().max() < 1e-9
    assert network.batches[-1] == 9


def test_interpolation_between_two_classes():
    network = conditional()
    pipe = pipeline(network, GeneralizedDDIMScheduler(clip_sample=False), cls=InterpolationPipeline)
    settings = {"num_inference_steps": 8, "output_type": "latent"}
    chain = pipe(
        seeds=[1, 2, 3],
        class_labels=["cat", "emu", "dog"],
        guidance_scale=2.0,
        num_points=4,
        **settings,
    ).images
    plain = pipeline(network, GeneralizedDDIMScheduler(clip_sample=False))
    ends = sample(plain, seeds=[1, 2, 3], steps=8, class_labels=[0, 2, 1], guidance_scale=2.0)
    assert (chain[[0, 3, 6]] - ends).abs().max() < 1e-9
    same = pipe(seeds=[1, 2], class_labels=[1, 1], num_points=3, **settings).images
    one = pipe(seeds=[1, 2], class_labels="dog", num_points=3, **settings).images
    assert (same - one).abs().max() < 1e-9
    corners = [0, 1, 2, 0]
    grid = pipe.grid(seeds=[4, 5, 6, 7], class_labels=corners, rows=2, columns=3, **settings)
    ends = sample(plain, seeds=[4, 5, 6, 7], steps=8, class_labels=corners)
    assert (grid.images[[0, 2, 3, 5]] - ends).abs().max() < 1e-9
    images = ends[:2].clamp(-1, 1) / 2 + 0.5
    mixed = pipe.diffuse(images, 600, class_labels=[0, 1], guidance_scale=2.0, **settings).images
    assert mixed.isfinite().all() and len(mixed) == 8
    encoded = pipe(images=images, class_labels=[0, 1], num_points=3, **settings)
    assert encoded.images.isfinite().all()
    with pytest.raises(ValueError, match="`guidance_scale` is given with `images`"):
        pipe(images=images, class_labels=[0, 1], guidance_scale=2.0, **settings)
    with pytest.raises(ValueError, match="`class_labels` has 3 labels for 2 ends"):
        pipe(seeds=[1, 2], class_labels=[0, 1, 2], **settings)


def test_reconstruction_of_labelled_images():
    network = conditional()
    scheduler = GeneralizedDDIMScheduler(clip_sample=False)
    x0 = sample(pipeline(network, scheduler), seeds=[1, 2, 3], class_labels=[0, 1, 2])
    images = x0.clamp(-1, 1) / 2 + 0.5
    pipe = pipeline(network, scheduler, cls=InversionPipeline)
    settings = {"num_inference_steps": 40, "refinements": 30, "tolerance": 1e-12, "batch_size": 2}
    right = pipe.reconstruct(images, class_labels=["cat", "dog", "emu"], **settings)
    assert right.inversion.converged and float(right.error.max()) < 1e-20
    latents = pipe(images, class_labels=[0, 1, 2], **settings).latents
    wrong = pipe.decode(
        latents, num_inference_steps=40, class_labels=[1, 2, 0], output_type="latent"
    )
    assert (wrong - (images * 2 - 1)).abs().max() > 1e-2


def test_langevin_with_labels_and_guidance():
    network = conditional()
    scheduler = GeneralizedDDIMScheduler(clip_sample=False)
    for settings in ({"predictor": True, "inner_steps": 1}, {"inner_steps": 2}):
        run = {"seeds": range(6), "num_inference_steps": 6, "output_type": "latent", **settings}
        pipe = pipeline(network, scheduler, cls=AnnealedLangevinPipeline)
        got = pipe(class_labels=LABELS, guidance_scale=3.0, batch_size=4, **run).images
        field = unconditional(None)
        labels = torch.tensor(LABELS)
        expected = []
        for rows in (slice(0, 4), slice(4, 6)):
            field.field = guided_field(network, labels[rows], 3.0)
            part = pipeline(field, scheduler, cls=AnnealedLangevinPipeline)
            expected.append(part(**{**run, "seeds": range(6)[rows]}).images)
        assert (got - torch.cat(expected)).abs().max() < 1e-8


def test_variations_keep_their_class():
    network = conditional()
    pipe = pipeline(network, MarkovianDDPMScheduler(clip_sample=False))
    settings = {"num_inference_steps": 10, "output_type": "latent"}
    run = pipe.variations(3, [500], [7, 8], class_labels="dog", guidance_scale=2.0, **settings)
    plain = pipe(seeds=[3], class_labels=1, guidance_scale=2.0, **settings).images
    assert torch.equal(run.original, plain[0]) and len(run.images[0]) == 2
    with pytest.raises(ValueError, match="single class"):
        pipe.variations(3, [500], [7, 8], class_labels=[1, 1], **settings)
    with pytest.raises(TypeError, match="`guidance_scael` is no argument of this pipeline"):
        pipe.variations(3, [500], [7, 8], guidance_scael=2, **settings)


def test_a_real_network_guided_and_in_half_precision():
    network = tiny_unet(seed=1, num_class_embeds=4)
    note_class_labels(network, 3)
    asked = Conditions([0, 1, 2, 0], guidance_scale=4.0)
    x = torch.randn(4, 1, 8, 8)

    def predicted(network, x):
        bound = BoundConditions(asked, network, GeneralizedDDIMScheduler(), 4, x.device)
        return predict(bound.of(0, 4), x, 500)

    full = predicted(network, x)
    cond, null = (
        network(x, 500, class_labels=torch.tensor(labels)).sample
        for labels in ([0, 1, 2, 0], [3] * 4)
    )
    assert full.dtype == torch.float32
    assert (full - (null + 4 * (cond - null))).abs().max() < 1e-5 < (cond - null).abs().max()
    half = copy.deepcopy(network).bfloat16()
    rough = predicted(half, x)
    assert rough.dtype == torch.float32 and 0 < (rough - full).abs().max() < 0.2


def test_a_filled_batch_of_a_compiled_network_gets_its_labels():
    pipe = pipeline(conditional())
    settings = {"class_labels": LABELS[:5], "guidance_scale": 3.0, "seeds": range(5)}
    expected = sample(pipe, batch_size=4, **settings)
    pipe.unet._compiled_call_impl = pipe.unet._call_impl  # the mark, without the compiler
    pipe.unet.batches.clear()
    assert (sample(pipe, batch_size=4, **settings) - expected).abs().max() < 1e-9
    assert set(pipe.unet.batches) == {8}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "`class_labels` is None, but `unet` is class-conditional; it must be"),
        ({"guidance_scale": 2}, "`guidance_scale=0` samples without a class"),
        ({"class_labels": 3}, "`class_labels` is 3; it must be the number of a class, 0 to 2"),
        ({"class_labels": -1}, "`class_labels` is -1"),
        ({"class_labels": True}, "`class_labels` is True"),
        ({"class_labels": 1.0}, "`class_labels` is 1.0"),
        ({"class_labels": "cow"}, "`class_labels` is 'cow'.*'cat', 'dog', 'emu'"),
        ({"class_labels": [0, 7]}, r"`class_labels\[1\]` is 7"),
        ({"class_labels": [0, 1], "num_images": 3}, "contradict each other"),
        ({"class_labels": []}, "num_images"),
        ({"class_labels": {0, 1}}, "`class_labels` is {0, 1}"),
        ({"class_labels": torch.zeros(1, 2).long()}, r"`class_labels` has shape \(1, 2\)"),
        ({"class_labels": 0, "guidance_scale": float("nan")}, "`guidance_scale` is nan"),
        ({"class_labels": 0, "guidance_scale": float("inf")}, "`guidance_scale` is inf"),
        ({"class_labels": 0, "guidance_scale": "2"}, "`guidance_scale` is '2'"),
        ({"class_labels": 0, "guidance_scale": True}, "`guidance_scale` is True"),
        ({"class_labels": 0, "guidance_interval": [0, 0.5]}, "`guidance_scale` is None, and"),
        ({"class_labels": 0, "negative_label": 1}, "`negative_label` would do nothing"),
        ({"class_labels": 0, "guidance_scale": 2, "negative_label": 9}, "`negative_label` is 9"),
        ({"class_labels": 0, "guidance_scale": 2, "guidance_rescale": 1.5}, "in 0 .. 1"),
        ({"class_labels": 0, "guidance_scale": 2, "guide": "x"}, "`guide` is str"),
        ({"class_labels": ClassMixture([0, 1], 3)}, r"`class_labels.weights` has shape \(\)"),
        ({"class_labels": ClassMixture([0, 1], [[1, 0], [1]])}, "`class_labels.weights` is .* row"),
        ({"class_labels": 0, "guidance_scale": 2, "classifier": "x"}, "`classifier` is str"),
    ],
)
def test_bad_conditions_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        pipeline(conditional())(num_inference_steps=2, **settings)


@pytest.mark.parametrize(
    "interval", [0.5, [0.5], [0.8, 0.2], [0.2, 0.2], [-0.1, 0.5], [0.5, 1.1], ["0", 1], "01"]
)
def test_bad_intervals_are_named(interval):
    with pytest.raises(ValueError, match="`guidance_interval` is .* 0 <= low < high <= 1"):
        pipeline(conditional())(
            class_labels=0, guidance_scale=2, guidance_interval=interval, num_inference_steps=2
        )


def test_what_an_unconditional_network_cannot_do_is_named():
    network = unconditional(whole(conditional()))
    pipe = pipeline(network)
    for settings, message in (
        ({"class_labels": 1}, "`class_labels` is given, but `unet` is unconditional"),
        ({"guidance_scale": 2}, "`guidance_scale` is 2, but `unet` is unconditional"),
        (
            {"guidance_scale": 2, "guide": conditional()},
            "`guide` has the classes 0 to 2; it must be uncon",
        ),
        (
            {"guidance_scale": 2, "classifier": Bayes(network.mixture)},
            "`class_labels` is None; with a `classifier`",
        ),
        (
            {"guidance_scale": 2, "class_labels": 3, "classifier": Bayes(network.mixture)},
            r"`classifier` returned \(1, 3\) for 1 images",
        ),
        (
            {"guidance_scale": 2, "class_labels": 0, "classifier": torch.nn.Identity()},
            r"`classifier` is Identity, whose forward does not take \(x_t, t\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(num_inference_steps=2, **settings)


def test_a_network_without_a_null_class_says_so():
    pipe = pipeline(conditional(null=None, num_class_embeds=3))
    for w in (0, 2, 0.5):
        with pytest.raises(ValueError, match="trained without a null class.*negative_label"):
            pipe(num_inference_steps=2, class_labels=0, guidance_scale=w)
    assert sample(pipe, class_labels=0, guidance_scale=1).isfinite().all()
    assert sample(pipe, class_labels=0, guidance_scale=2, negative_label=1).isfinite().all()
    with pytest.raises(ValueError, match="`class_labels` is None"):
        pipe(num_inference_steps=2, guidance_scale=0)
    asked = Conditions(0, guidance_scale=2, negative_label=1)
    bound = BoundConditions(asked, pipe.unet, pipe.scheduler, 1, torch.device("cpu"))
    assert not bound.of(0, 1).is_plain


def test_a_classifier_cannot_guide_where_x_t_says_nothing():
    network = unconditional(whole(conditional()), prediction_type="v_prediction")
    scheduler = GeneralizedDDIMScheduler(
        clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    scheduler_steps = {"timesteps": [999, 500], "class_labels": 0, "guidance_scale": 1}
    classifier = Bayes(network.mixture)
    with pytest.raises(ValueError, match=r"alpha_bar is 0.*`guidance_interval`.*0.999"):
        pipeline(network, scheduler)(classifier=classifier, **scheduler_steps)
    pipeline(network, scheduler)(
        classifier=classifier, guidance_interval=[0, 0.998], **scheduler_steps
    )
