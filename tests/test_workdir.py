"""Folders that a later call goes on with: what differs is named, whatever the format."""

import pytest
import torch
from diffusers import DDPMScheduler

from ddim_schedulers.pipelines.sampling_files import SamplingFiles
from ddim_schedulers.pipelines.workdir import Workdir, differences
from ddim_schedulers.training.evaluation.caches import ClassifierFile, FeatureFiles
from ddim_schedulers.training.evaluation.cell_files import CellFiles, FirstImages
from ddim_schedulers.training.likelihood.error_sweep import SweepFiles, run_error_sweep
from ddim_schedulers.training.likelihood.measured_model import measured_model_of


@pytest.mark.parametrize(
    "before, now, found",
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 2, "b": None}, ["a: 1 there, 2 now"]),
        ({"a": 1}, {}, ["a: 1 there, None now"]),
        (
            {"g": {"x": 1, "h": {"y": [2]}}},
            {"g": {"x": 1, "h": {"y": [3]}}},
            ["g.h.y: [2] there, "],
        ),
        ({"g": None}, {"g": {"x": 1}}, ["g.x: None there, 1 now"]),
        ({"g": 5}, {"g": {"x": None}}, ["g: 5 there, None now"]),
        ({"t": [*range(99)]}, {"t": [*range(98), 7]}, ["t[98]: 98 there, 7 now"]),
        ({"t": [*range(99)]}, {"t": [*range(97), 5, 7]}, ["t[97]: 97 there, 5 now and 1 more"]),
        ({"t": [*range(99)]}, {"t": [*range(9)]}, ["t: 99 values, [0, 1, 2"]),
        ({}, {"d": 4}, []),  # its default
        ({"d": 4}, {}, []),
        ({"d": 5}, {"d": 4}, ["d: 5 there, 4 now"]),
        ({}, {"d": 5}, ["d: 4 there, 5 now"]),
    ],
)
def test_each_setting_that_differs_is_named_with_both_values(before, now, found):
    named = differences(before, now, {"d": 4})
    assert len(named) == len(found)
    assert all(
        line.startswith(start) and len(line) < 300 for line, start in zip(named, found, strict=True)
    )


@pytest.mark.parametrize(
    "format_of_files",
    [SamplingFiles, SweepFiles, CellFiles, FirstImages, FeatureFiles, ClassifierFile],
)
def test_every_format_is_one_of_the_same_class(format_of_files):
    """None has a second way to tell what is missing or to compare settings."""
    assert issubclass(format_of_files, Workdir)
    for name in ("load", "missing", "kept_settings", "require_same", "refuse"):
        assert getattr(format_of_files, name) is getattr(Workdir, name)


@pytest.mark.parametrize(
    "change, differs",
    [
        ({"seed": 1}, ["seed: 0 there, 1 now"]),
        ({"clip": None}, ["clip: 1.0 there, None now"]),
        ({"batch_size": 4}, ["batch_size: 2 there, 4 now"]),
        ({"timesteps": range(4)}, ["timesteps: [0, 1, 2, 3, 4] there, [0, 1, 2, 3] now"]),
        ({"images": torch.zeros(3, 1, 8, 8)}, ["images: [4, '"]),
        ({"beta_end": 0.4}, ["alpha_bar: '", "network: '"]),
        ({"prediction_type": "sample"}, ["prediction_type: 'epsilon' there, 'sample' now"]),
        ({"clip_sample": False}, ["scheduler_clip: 1.0 there, None now"]),
        ({"weights": 1}, ["weights: '", "network: '"]),
    ],
)
def test_an_unfinished_pass_of_something_else_is_refused_by_name(
    change, differs, tmp_path, tiny_ddpm
):
    asked = {"clip": 1.0, "seed": 0, "batch_size": 2, "timesteps": range(5)}
    images = torch.ones(4, 1, 8, 8)

    def go(beta_end=0.3, prediction_type="epsilon", clip_sample=True, weights=0, **more):
        scheduler = DDPMScheduler(
            6, beta_end=beta_end, prediction_type=prediction_type, clip_sample=clip_sample
        )
        unet = tiny_ddpm(scheduler).unet
        with torch.no_grad():
            next(unet.parameters()).add_(weights)
        settings = {"images": images, **asked, **more}
        model = measured_model_of(unet, dict(scheduler.config))
        run_error_sweep(model, work_dir=tmp_path, **settings)

    go()
    go()
    with pytest.raises(
        ValueError, match="`work_dir` is .* an unfinished pass made with other"
    ) as e:
        go(**change)
    assert all(f"{d}" in str(e.value) for d in differs), e.value
    other = [n for n in ("seed: ", "images: ", "batch_size: ") if n not in "".join(differs)]
    assert not any(name in str(e.value) for name in other)
