"""`RestorationPipeline` on small networks: what holds for each method, and what is refused."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from tiny_models import tiny_unet

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler
from ddim_schedulers.pipelines import GenerationPipeline, RestorationPipeline
from ddim_schedulers.pipelines.restoration import methods
from ddim_schedulers.pipelines.restoration.checks import LARGEST_NOISE
from ddim_schedulers.pipelines.restoration.methods import METHODS, Ddrm, RePaint
from ddim_schedulers.pipelines.restoration.operators import (
    Blur,
    Composition,
    CompressedSensing,
    Inpainting,
    bicubic_superresolution,
    box_superresolution,
    gaussian_kernel,
    grey_from_colour,
)

SHAPE = (3, 8, 8)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return quiet(RestorationPipeline(tiny_unet(3), GeneralizedDDIMScheduler()))


def half():
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    return mask


def images(count=2, shape=SHAPE):
    source = torch.Generator().manual_seed(5)
    return torch.rand(count, *shape, generator=source) * 2 - 1


OPERATORS = {
    "inpainting": lambda: Inpainting(half(), SHAPE),
    "box": lambda: box_superresolution(SHAPE, 4),
    "bicubic": lambda: bicubic_superresolution(SHAPE, 2),
    "grey": lambda: grey_from_colour(SHAPE),
    "blur": lambda: Blur(gaussian_kernel(0.8), SHAPE),
    "sensing": lambda: CompressedSensing(SHAPE, 0.3),
    "composition": lambda: Composition(
        SHAPE, grey_from_colour(SHAPE), box_superresolution((1, 8, 8), 2)
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddnm_agrees_with_the_measurement(name, eta, pipe):
    operator = OPERATORS[name]()
    y = operator.A(images())
    out = pipe(y, operator, num_samples=2, num_inference_steps=4, eta=eta, output_type="latent")
    x, wanted = out.images, operator.A(operator.A_dagger(y))
    repeated = wanted.repeat_interleave(2, dim=0)
    if name == "blur":  # of the frequencies that are kept
        x = operator.A_dagger(operator.A(x))
    limit = 1e-6 * max(1.0, float(x.abs().max()))
    assert float((operator.A(x) - repeated).abs().max()) <= limit
    y = y.repeat_interleave(2, dim=0)
    for found, image in (
        (out.residual, out.images),
        (out.residual_clamped, out.images.clamp(-1, 1)),
    ):
        expected = (operator.A(image) - y).flatten(1).abs().amax(1).double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_call_in_inference_mode_is_the_same(method, pipe):
    settings = {"num_inference_steps": 2, "seeds": [1, 2], "output_type": "latent"}
    wanted = pipe(measurement(), boxes(), method=method, **settings).images
    with torch.inference_mode():
        found = pipe(measurement(), boxes(), method=method, **settings).images
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("eta", [None, 0.0, 0.7])
def test_an_operator_that_measures_nothing_leaves_the_family(method, eta, pipe):
    sampler = quiet(GenerationPipeline.from_pipe(pipe))
    common = {"num_inference_steps": 5, "eta": eta, "seeds": [3, 4], "output_type": "latent"}
    plain = sampler(**common).images
    nothing = Inpainting(torch.zeros(8, 8), SHAPE)
    y = torch.zeros(2, *SHAPE)
    assert torch.equal(pipe(y, nothing, method=method, **common).images, plain)


@pytest.mark.parametrize(
    "make", [DDPMScheduler, MarkovianDDPMScheduler, DDIMScheduler], ids=lambda c: c.__name__
)
def test_so_it_does_with_other_schedulers(make):
    pipe = quiet(RestorationPipeline(tiny_unet(3), make()))
    sampler = quiet(GenerationPipeline.from_pipe(pipe))
    common = {"num_inference_steps": 5, "seeds": [3], "output_type": "latent"}
    nothing = Inpainting(torch.zeros(8, 8), SHAPE)
    y = torch.zeros(1, *SHAPE)
    assert torch.equal(pipe(y, nothing, **common).images, sampler(**common).images)


def test_nothing_measured_by_the_papers_rule_is_an_explicit_sigma(pipe):
    nothing, y = Inpainting(torch.zeros(8, 8), SHAPE), torch.zeros(1, *SHAPE)
    common = {"num_inference_steps": 5, "seeds": [3], "output_type": "latent"}
    found = pipe(y, nothing, eta=0.8, eta_rule="paper", **common).images
    alpha_bar = pipe.scheduler.alpha_bar
    pipe.scheduler.set_timesteps(5)
    landing = [float(alpha_bar[t]) for t in pipe.scheduler.timesteps[1:]] + [1.0]
    sigma = [0.8 * math.sqrt(1 - a) for a in landing]
    explicit = GeneralizedDDIMScheduler.from_config(pipe.scheduler.config, sigma=sigma)
    sampler = quiet(GenerationPipeline.from_pipe(pipe, scheduler=explicit))
    assert torch.equal(found, sampler(**common).images)


@pytest.mark.parametrize("method", ["ddnm", "ddrm", "repaint"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_mask_of_ones_gives_the_image(method, eta, pipe):
    operator, x = Inpainting(torch.ones(8, 8, dtype=torch.bool), SHAPE), images()
    settings = {"num_inference_steps": 4, "eta": eta, "output_type": "latent", "method": method}
    found = pipe(operator.A(x), operator, **settings).images
    torch.testing.assert_close(found, x, rtol=0, atol=1e-6)


def test_every_method_runs_and_the_calls_are_counted(pipe):
    calls = []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    operator = box_superresolution(SHAPE, 2)
    y = operator.A(images(1))
    expected = {"dps": 4, "pigdm": 4, "repaint": 0, "ddnm": 0, "ddrm": 0}
    for method in METHODS:
        calls.clear()
        out = pipe(y, operator, method=method, num_inference_steps=4, eta=0.5, seeds=1)
        assert out.network_calls == len(calls) == (16 if method == "repaint" else 4)
        if method == "mmps":
            assert 4 <= out.backward_passes <= 4 * 50
        else:
            assert out.backward_passes == expected[method]
        assert out.images[0].size == (8, 8) and out.seeds == [1]
    hook.remove()


@pytest.mark.parametrize("method", METHODS)
def test_an_image_depends_on_its_seed_and_measurement_alone(method, pipe, rounding):
    operator, x = box_superresolution(SHAPE, 2), images(3)
    y = operator.A(x)
    settings = {"method": method, "num_inference_steps": 3, "eta": 1.0, "output_type": "pt"}
    whole = pipe(y, operator, seeds=range(6), batch_size=4, **settings).images
    alone = pipe(y[1:2], operator, seeds=[3], **settings).images
    # backward passes of another batch round otherwise; another seed is seen at 1e-1
    torch.testing.assert_close(alone[0], whole[3], rtol=0, atol=100 * rounding)
    others = pipe(y[[2, 1]], operator, seeds=[8, 3], **settings).images
    torch.testing.assert_close(others[1], whole[3], rtol=0, atol=100 * rounding)
    assert (pipe(y[1:2], operator, seeds=[4], **settings).images - alone).abs().max() > 0.01
    assert (pipe(y[:1], operator, seeds=[3], **settings).images - alone).abs().max() > 0.01


def test_mean_and_spread_of_the_samples(pipe):
    operator = Inpainting(half(), SHAPE)
    settings = {"seeds": range(6), "num_inference_steps": 3, "eta": 1.0}
    y = operator.A(images())
    out = pipe(y, operator, output_type="pt", **settings)
    grouped = out.images.view(2, 3, *SHAPE)
    torch.testing.assert_close(out.mean, grouped.mean(1))
    torch.testing.assert_close(out.std, grouped.std(1, correction=0))
    assert float((out.std * half()).abs().max()) < 1e-6 < float(out.std.max()) <= 0.5
    shown = pipe(y, operator, output_type="pil", **settings)
    arrays = pipe(y, operator, output_type="np", **settings)
    for i in range(2):
        for name, scale in (("mean", 255), ("std", 510)):
            picture = torch.frombuffer(
                bytearray(getattr(shown, name)[i].tobytes()), dtype=torch.uint8
            )
            expected = torch.from_numpy(getattr(arrays, name)[i]).flatten() * scale
            assert (picture.double() - expected).abs().max() <= 0.5 + 1e-3
    one = pipe(y, operator, seeds=[1, 2], num_inference_steps=2)
    assert one.mean is None and one.std is None
    assert len(pipe(y, operator, num_inference_steps=2, return_dict=False)[0]) == 2


def test_the_range_of_the_measurement(pipe):
    """A measurement of images in [0, 1] is 2 y - A(1) of those in [-1, 1], with twice the noise."""
    x = images()
    for operator in (Blur(3 * gaussian_kernel(0.5), SHAPE), Inpainting(half(), SHAPE)):
        settings = {
            "method": "ddrm",
            "num_inference_steps": 3,
            "seeds": [1, 2],
            "output_type": "pt",
        }
        in_model = pipe(operator.A(x), operator, 0.2, **settings)
        unit = operator.A((x + 1) / 2)
        in_unit = pipe(unit, operator, 0.1, measurement_range=(0, 1), **settings)
        torch.testing.assert_close(in_unit.images, in_model.images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_papers_formulas(prediction_type, pipe):
    """DDNM (its program) and DDRM, Eq. 7-8 by the singular vectors of boxes, step by step."""
    scheduler = GeneralizedDDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    network = quiet(RestorationPipeline(tiny_unet(3), scheduler))
    operator, eta, noise, steps = box_superresolution(SHAPE, 2), 0.85, 0.3, 4
    y = operator.A(images(1)) + noise * torch.randn(1, 3, 4, 4)
    flat = operator.A(torch.eye(192).view(192, *SHAPE)).flatten(1).T.double()
    U, s, Vt = torch.linalg.svd(flat, full_matrices=True)
    s = torch.cat([s, torch.zeros(144, dtype=torch.float64)])
    scheduler.set_timesteps(steps)
    taus = scheduler.timesteps.tolist()
    alpha_bar = [float(scheduler.alpha_bar[t]) for t in taus] + [1.0]
    for method, std in (("ddnm", 0.0), ("ddnm", noise), ("ddrm", noise)):
        source = torch.Generator().manual_seed(9)

        def draw(source=source):
            return torch.randn(1, *SHAPE, generator=source).double().flatten()

        seen = torch.cat([U.T @ y.double().flatten(), torch.zeros(144, dtype=torch.float64)])
        known = torch.where(s > 1e-6, seen / s.clamp(min=1e-6), 0)
        error = torch.where(s > 1e-6, std / s.clamp(min=1e-6), 0)
        x = draw()
        if method == "ddrm":
            big = ((1 - alpha_bar[0]) / alpha_bar[0]) ** 0.5
            start = torch.where(s > 1e-6, known, 0) + (big**2 - error**2).sqrt() * (Vt @ x)
            x = alpha_bar[0] ** 0.5 * (Vt.T @ start)
        for t, a, b in zip(taus, alpha_bar, alpha_bar[1:], strict=False):
            with torch.no_grad():
                m = network.unet(x.view(1, *SHAPE).float(), t).sample.double().flatten()
            root, rest = a**0.5, (1 - a) ** 0.5
            x0 = {
                "epsilon": (x - rest * m) / root,
                "sample": m,
                "v_prediction": root * x - rest * m,
            }[prediction_type]
            eps = (x - root * x0) / rest
            if method == "ddnm" and not std:
                # x_{0|t} - A^+ (A x_{0|t} - y), then c_1 z + c_2 eps (svd_ddnm.py)
                x0 = x0 - torch.linalg.pinv(flat) @ (flat @ x0 - y.double().flatten())
                c = (1 - b) ** 0.5
                x = b**0.5 * x0 + c * (1 - eta**2) ** 0.5 * eps
                x = x + (c * eta * draw() if b < 1 else 0)
                continue
            level, v0, ve = ((1 - b) / b) ** 0.5, Vt @ x0, Vt @ eps
            z = Vt @ draw() if b < 1 else torch.zeros(192, dtype=torch.float64)
            free = v0 + (1 - eta**2) ** 0.5 * level * ve + eta * level * z
            weak = v0 + (1 - eta**2) ** 0.5 * level * (known - v0) / error.clamp(min=1e-9)
            weak = weak + eta * level * z
            strong = known + (level**2 - error**2).clamp(min=0).sqrt() * z
            new = torch.where(s < 1e-6, free, torch.where(level >= error, strong, weak))
            x = b**0.5 * (Vt.T @ new)
        settings = {"method": method, "eta": eta, "eta_rule": "paper", "output_type": "latent"}
        found = network(y, operator, std, num_inference_steps=steps, seeds=9, **settings).images
        scale = max(1.0, float(x.abs().max()))
        torch.testing.assert_close(found.double().flatten(), x, rtol=0, atol=1e-5 * scale)


def test_the_scheduler_clips_before_the_projection(pipe):
    """x0_hat is clipped first: what is projected may leave the range by the projection alone."""
    operator = box_superresolution(SHAPE, 2)
    y = operator.A(images(1))
    plain = GeneralizedDDIMScheduler(clip_sample=False)
    free = quiet(RestorationPipeline(tiny_unet(3), plain))
    settings = {"num_inference_steps": 3, "seeds": 2, "output_type": "latent"}
    clipped = pipe(y, operator, **settings).images
    assert float((clipped - operator.A_dagger(y)).abs().max()) <= 2 + 1e-5
    assert float(free(y, operator, **settings).images.abs().max()) > 3


def test_half_precision_weights_keep_the_measurement(pipe):
    other = quiet(RestorationPipeline(tiny_unet(3).to(torch.bfloat16), GeneralizedDDIMScheduler()))
    operator = grey_from_colour(SHAPE)
    y = operator.A(images())
    for method in METHODS:
        if method == "mmps":
            continue  # tells that its system is not solved
        out = other(y, operator, method=method, num_inference_steps=3, output_type="latent")
        assert out.images.dtype == torch.float32
        assert method != "ddnm" or float(out.residual.max()) < 1e-5


def test_labels_and_guidance_compose():
    unet = tiny_unet(3, num_class_embeds=4, class_embed_type=None)
    with torch.no_grad():  # a new network gives all its classes nearly the same
        unet.class_embedding.weight.mul_(5)
    pipe = quiet(RestorationPipeline(unet, GeneralizedDDIMScheduler()))
    operator = box_superresolution(SHAPE, 4)
    y = operator.A(images(1))
    settings = {"num_inference_steps": 3, "seeds": 1, "output_type": "pt"}
    for method in METHODS:
        one, other, guided = (
            pipe(y, operator, method=method, class_labels=label, **settings, **more).images
            for label, more in (
                (0, {}),
                (1, {}),
                (0, {"guidance_scale": 3.0, "negative_label": 1}),
            )
        )
        assert (one - other).abs().max() > 1e-3 and (one - guided).abs().max() > 1e-3
    with pytest.raises(ValueError, match="`class_labels` is None"):
        pipe(y, operator, **settings)
    with pytest.raises(ValueError, match="`class_labels` has 2 labels for 1 images"):
        pipe(y, operator, class_labels=[0, 1], **settings)
    with pytest.raises(TypeError, match="`unknown` is no argument of this pipeline"):
        pipe(y, operator, unknown=1, **settings)


def boxes():
    return box_superresolution(SHAPE, 2)


class Broken:
    """An operator with one method replaced."""

    def __init__(self, **methods):
        self.whole = box_superresolution(SHAPE, 2)
        self.methods = methods

    def _run(self, name, given):
        return self.methods.get(name, getattr(self.whole, name))(given)

    def A(self, x):  # noqa: N802
        return self._run("A", x)

    def A_adjoint(self, y):  # noqa: N802
        return self._run("A_adjoint", y)

    def A_dagger(self, y):  # noqa: N802
        return self._run("A_dagger", y)


def measurement():
    return box_superresolution(SHAPE, 2).A(images())


def median(x):
    """A(-2 x) = -2 A(x), and yet not linear."""
    return torch.stack([x, x.roll(1, -1), x.roll(2, -1)]).median(dim=0).values


REFUSED = {
    "a size": (
        {"measurement": lambda: images()},
        "`measurement` has shape (2, 3, 8, 8); `operator` gives (N, 3, 4, 4)",
    ),
    "no batch": ({"measurement": lambda: measurement()[0]}, "`measurement` has shape (3, 4, 4)"),
    "no rows": ({"measurement": lambda: measurement()[:0]}, "`measurement` has shape (0, 3, 4, 4)"),
    "bytes": (
        {"measurement": lambda: (127 * measurement() + 128).to(torch.uint8)},
        "`measurement` is torch.uint8",
    ),
    "sparse": (
        {"measurement": lambda: measurement().to_sparse()},
        "`measurement` is torch.sparse_coo; it must be a dense tensor with values",
    ),
    "meta": ({"measurement": lambda: measurement().to("meta")}, "`measurement` is on the meta dev"),
    "an array": ({"measurement": lambda: measurement().numpy()}, "`measurement` is ndarray"),
    "NaN": (
        {"measurement": lambda: measurement() * torch.nan},
        "`measurement` holds values that are not finite",
    ),
    "infinity": (
        {"measurement": lambda: measurement() / 0},
        "`measurement` holds values that are not finite",
    ),
    "0 to 255": ({"measurement": lambda: 127 * measurement() + 128}, "`measurement` has values in"),
    "unit range": ({"measurement_range": (0, 1)}, "`measurement` has values in"),
    "a range": (
        {"measurement_range": (0, 255)},
        "`measurement_range` is (0, 255); it must be one of",
    ),
    "no pair": ({"measurement_range": 1}, "`measurement_range` is 1; it must be one of"),
    "no range": ({"measurement_range": None}, "`measurement_range` is None; it must be one of"),
    "negative noise": (
        {"noise_std": -0.1},
        "`noise_std` is -0.1; it must be a number in 0 .. 1e+15",
    ),
    "huge noise": ({"noise_std": 1e200, "method": "pigdm"}, "`noise_std` is 1e+200; it must be a"),
    "a callback": ({"callback_on_step_end": 3}, "`callback_on_step_end` is 3; it must be None or"),
    "NaN noise": ({"noise_std": math.nan}, "`noise_std` is nan"),
    "noise True": ({"noise_std": True}, "`noise_std` is True"),
    "a method": ({"method": "magic"}, "`method` is 'magic'; it must be one of ('ddnm', 'ddrm'"),
    "a class": ({"method": Ddrm}, "`method` is <class"),
    "repaint with noise": (
        {"method": "repaint", "noise_std": 0.1},
        "`method` 'repaint' takes the measurement as exact",
    ),
    "repaint too long": (
        {"method": RePaint(2, 9), "num_inference_steps": 5},
        "`jump_length` is 9; it must be below",
    ),
    "ddrm of a composition": (
        {"method": "ddrm", "operator": lambda: Composition(SHAPE, boxes())},
        "`operator` is Composition, whose singular values are not known",
    ),
    "noisy ddnm of a stranger": (
        {"noise_std": 0.1, "operator": Broken},
        "`method` 'ddnm' needs them with `noise_std` 0.1",
    ),
    "eta": ({"eta": -1.0}, "`eta` is -1.0"),
    "eta too large": ({"eta": 9.0}, "`eta` is 9.0"),
    "eta of the papers": ({"eta": 1.1, "eta_rule": "paper"}, "`eta` is 1.1; it must lie in [0, 1]"),
    "a rule": ({"eta_rule": "ours"}, "`eta_rule` is 'ours'; it must be one of ('family', 'paper')"),
    "another image": (
        {"operator": lambda: box_superresolution((1, 8, 8), 2)},
        "`operator` is a Separable for images of (1, 8, 8) (C, H, W)",
    ),
    "no operator": (
        {"operator": lambda: torch.eye(3)},
        "`operator` is Tensor; it must be an object with the methods",
    ),
    "a class of operators": (
        {"operator": lambda: Inpainting},
        "it must be an object with the methods A",
    ),
    "A for other images": (
        {"operator": lambda: Broken(A=lambda x: x @ torch.eye(9))},
        "`operator.A` of Broken fails for (1, 3, 8, 8)",
    ),
    "a square": (
        {"operator": lambda: Broken(A=lambda x: box_superresolution(SHAPE, 2).A(x) ** 2)},
        "`operator.A` of Broken is not linear, or mixes the images of a batch",
    ),
    "a median": (
        {"operator": lambda: Broken(A=lambda x: boxes().A(median(x)))},
        "`operator.A` of Broken is not linear, or mixes the images of a batch",
    ),
    "A of the batch's mean": (
        {"operator": lambda: Broken(A=lambda x: boxes().A(x - x.mean(0) + x[:1] / len(x)))},
        "`operator.A` of Broken is not linear, or mixes the images of a batch",
    ),
    "A of the first image": (
        {"operator": lambda: Broken(A=lambda x: box_superresolution(SHAPE, 2).A(x)[:1])},
        "`operator.A` of Broken gives (1, 3, 4, 4) for (2, 3, 8, 8)",
    ),
    "A that is not linear": (
        {"operator": lambda: Broken(A=lambda x: box_superresolution(SHAPE, 2).A(x) + 1)},
        "`operator.A` of Broken is not linear",
    ),
    "A of no tensor": (
        {"operator": lambda: Broken(A=lambda x: None)},
        "`operator.A` of Broken gives NoneType",
    ),
    "A that mixes the batch": (
        {"operator": lambda: Broken(A=lambda x: x.flatten())},
        "`operator.A` of Broken gives (192,)",
    ),
    "A with NaN": (
        {"operator": lambda: Broken(A=lambda x: x / 0)},
        "`operator.A` of Broken gives values that are not finite",
    ),
    "an adjoint of another shape": (
        {"operator": lambda: Broken(A_adjoint=lambda y: y)},
        "`operator.A_adjoint` of Broken changes the shape: it gives (3, 4, 4)",
    ),
    "an inverse of another shape": (
        {"operator": lambda: Broken(A_dagger=lambda y: y)},
        "`operator.A_dagger` of Broken changes the shape",
    ),
    "another adjoint": (
        {"operator": lambda: Broken(A_adjoint=boxes().A_dagger), "method": "mmps"},
        "`operator.A_adjoint` of Broken is off by 0.59 of its size; it must be the adjoint",
    ),
    "an adjoint of a noisy measurement": (
        {
            "operator": lambda: Broken(A_adjoint=lambda y: boxes().A_adjoint(y).flip(-1)),
            "method": "pigdm",
            "noise_std": 0.1,
        },
        "`operator.A_adjoint` of Broken is off by",
    ),
    "an adjoint that mixes the batch": (
        {
            "operator": lambda: Broken(A_adjoint=lambda y: boxes().A_adjoint(y.flip(0))),
            "method": "dps",
        },
        "`operator.A_adjoint` of Broken is off by",
    ),
    "a part's adjoint": (
        {
            "operator": lambda: Composition(
                SHAPE, Broken(A_adjoint=lambda y: 1.1 * boxes().A_adjoint(y))
            )
        },
        "`operator.A_adjoint` of Composition is off by 0.",
    ),
    "too few seeds": ({"seeds": [1, 2, 3]}, "has 3 for 2 measurements"),
    "other seeds": ({"seeds": [1, 2], "num_samples": 2}, "contradict each other"),
    "samples": ({"num_samples": 0}, "`num_samples` is 0; it must be an integer >= 1"),
    "latents": ({"latents": torch.zeros(2, 3, 4, 4)}, "`latents` has shape"),
    "a type": ({"output_type": "jpg"}, "`output_type` is 'jpg'"),
    "a batch size": ({"batch_size": 0}, "`batch_size` is 0"),
    "steps": ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_the_network_is_called(case, pipe):
    change, message = REFUSED[case]
    made = {
        k: v() if callable(v) and k in ("measurement", "operator") else v for k, v in change.items()
    }
    given = {"measurement": measurement(), "operator": boxes(), "num_inference_steps": 4} | made
    calls = []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ValueError) as caught:
            pipe(given.pop("measurement"), given.pop("operator"), **given)
    finally:
        hook.remove()
    assert message in str(caught.value)
    assert not calls


@pytest.mark.parametrize("name", ["ddnm", "ddrm", "dps", "pigdm", "mmps"])
def test_a_measurement_of_noise_alone_says_nothing(name, pipe):
    settings = {"num_inference_steps": 3, "eta": 0.0, "seeds": [1, 2], "output_type": "latent"}
    found = pipe(measurement(), boxes(), LARGEST_NOISE, name, **settings).images
    assert bool(found.isfinite().all())
    if name in ("pigdm", "mmps"):
        free = GenerationPipeline.from_pipe(pipe)
        free.set_progress_bar_config(disable=True)
        del settings["eta"]
        settings["use_clipped_model_output"] = name == "mmps"  # which re-derives eps
        torch.testing.assert_close(found, free(**settings).images, atol=1e-4, rtol=1e-4)


SCHEDULERS = {
    "solver_order=2": lambda: GeneralizedDDIMScheduler(solver_order=2),
    "reverse_variance='sigma_hat'": lambda: GeneralizedDDIMScheduler(
        eta=1.0, reverse_variance="sigma_hat"
    ),
    "variance_type='fixed_large'": lambda: DDPMScheduler(variance_type="fixed_large"),
    "eps_scale=1.1": lambda: GeneralizedDDIMScheduler(eps_scale=1.1),
    "end_scale=0.9": lambda: GeneralizedDDIMScheduler(end_scale=0.9),
}


@pytest.mark.parametrize("said", SCHEDULERS)
def test_schedulers_that_do_more_than_the_family_are_refused(said):
    pipe = quiet(RestorationPipeline(tiny_unet(3), SCHEDULERS[said]()))
    with pytest.raises(ValueError, match="`scheduler`") as caught:
        pipe(measurement(), boxes(), num_inference_steps=4)
    assert said in str(caught.value)


def test_explicit_sigma_and_its_contradictions():
    config = {"sigma": [0.3, 0.2, 0.0], "timesteps": [900, 500, 100]}
    pipe = quiet(RestorationPipeline(tiny_unet(3), GeneralizedDDIMScheduler(**config)))
    silent = quiet(
        RestorationPipeline(tiny_unet(3), GeneralizedDDIMScheduler(timesteps=config["timesteps"]))
    )
    y, settings = measurement(), {"seeds": [1, 2], "output_type": "pt"}
    noisy = pipe(y, boxes(), **settings)
    assert noisy.network_calls == 3
    assert not torch.allclose(noisy.images, silent(y, boxes(), **settings).images, atol=1e-3)
    for more in ({"eta": 0.5}, {"eta_rule": "paper"}):
        with pytest.raises(ValueError, match="sigma"):
            pipe(y, boxes(), **settings, **more)


def test_levels_without_signal():
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = GeneralizedDDIMScheduler(prediction_type="v_prediction", **config)
    pipe = quiet(RestorationPipeline(tiny_unet(3), scheduler))
    y = measurement()
    for method in ("ddnm", "ddrm", "repaint", "dps", "pigdm"):
        assert len(pipe(y, boxes(), method=method, num_inference_steps=4).images) == 2
    with pytest.raises(ValueError, match=r"t=999 with alpha_bar = 0, by whose root `method`"):
        pipe(y, boxes(), method="mmps", num_inference_steps=4)
    stock = DDIMScheduler(**config)
    other = quiet(RestorationPipeline(tiny_unet(3), stock))
    with pytest.raises(ValueError, match="a network that predicts eps says nothing about x_0"):
        other(y, boxes(), num_inference_steps=4)


SETTINGS = {
    "Ddrm(eta_b=1.5)": "`eta_b` is 1.5; it must lie in [0, 1]",
    "Ddrm(eta_b=True)": "`eta_b` is True",
    "Dps(zeta=0)": "`zeta` is 0; it must be a finite number > 0",
    "Dps(zeta=float('nan'))": "`zeta` is nan",
    "Mmps(tolerance=0.0)": "`tolerance` is 0.0",
    "Mmps(max_iterations=0)": "`max_iterations` is 0; it must be an integer >= 1",
    "RePaint(resamplings=0)": "`resamplings` is 0",
    "RePaint(jump_length=1.5)": "`jump_length` is 1.5",
}


@pytest.mark.parametrize("call", SETTINGS)
def test_settings_of_methods_that_are_refused(call):
    with pytest.raises(ValueError) as caught:
        eval(call, vars(methods))
    assert SETTINGS[call] in str(caught.value)
