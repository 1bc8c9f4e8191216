"""Runs that read their images as a stream: exact resume, bad rows, reports."""

import io
import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from tiny_runs import UNET, quick_config, same_files

from ddim_schedulers.pipelines.image_files import BadImageError
from ddim_schedulers.training import train
from ddim_schedulers.training.trainer.result import NonFiniteError
from ddim_schedulers.training.trainer.trainer import Trainer

BROKEN = {"bytes": b"nothing", "path": "broken.png"}


def picture(number, dtype=np.uint8):
    high = np.iinfo(dtype).max
    buffer = io.BytesIO()
    random = np.random.default_rng(number)
    Image.fromarray(random.integers(0, high, (8, 8), dtype=dtype)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{number}.png"}


@pytest.fixture
def settings(tmp_path):
    """Settings of a quick run over a stream of `rows`, as a function of what differs."""
    (tmp_path / "unet.json").write_text(json.dumps(UNET))

    def make(name, rows=None, **changes):
        path = tmp_path / "images.parquet"
        if rows is not None or not path.exists():
            rows = [picture(n) for n in range(30)] if rows is None else rows
            features = Features({"image": ImageFeature()})
            Dataset.from_dict({"image": rows}, features=features).to_parquet(str(path))
        values = {
            "data": str(path),
            "streaming": True,
            "shuffle_buffer": 7,
            "max_train_steps": 7,
        }
        return quick_config(tmp_path, name, **values | changes)

    return make


def test_resume_is_exact_in_the_middle_of_an_epoch(settings):
    options = {
        "gradient_accumulation_steps": 2,
        "random_flip": True,
        "validate_every": 7,
        "validation_images": 4,  # 26 images are left: an epoch is three and a quarter steps
    }
    whole = train.train(settings("whole", **options))
    parts = [train.train(settings("parts", **options, stop_after=2, num_workers=1))]
    parts += [train.train(settings("parts", **options, resume="latest", stop_after=3))]
    parts += [train.train(settings("parts", **options, resume="latest"))]
    assert sum((part.losses for part in parts), []) == whole.losses
    assert len(whole.losses) == 7
    assert same_files(settings("whole"), settings("parts"), 7)


def test_what_is_trained_on_must_be_the_same_after_a_resume(settings):
    held_out = {"validate_every": 2, "validation_images": 4}
    train.train(settings("a", **held_out, max_train_steps=2))
    for changes in ({"validate_every": 0}, {"validation_images": 5}):
        with pytest.raises(ValueError, match="validate_every was 2 .*validation_images was 4"):
            Trainer(settings("a", **held_out | changes, resume="latest"))
    assert Trainer(settings("a", **held_out | {"validate_every": 3}, resume="latest")).step == 2


def test_what_is_looked_at_may_change_and_the_images_may_not(settings):
    rows = [picture(n) for n in range(90)]
    train.train(settings("a", rows, max_train_steps=2))
    looks = {"sample_every": 2, "sample_images": 2, "sample_steps": 1, "frechet_images": 4}
    assert Trainer(settings("a", **looks, validation_images=80, resume="latest")).step == 2
    with pytest.raises(ValueError, match="the images, their bytes or their names are not those"):
        Trainer(settings("a", rows[1:], resume="latest"))


def test_bad_rows_stop_the_run_or_are_counted(settings):
    rows = [BROKEN, None] + [picture(n) for n in range(28)]
    with pytest.raises(BadImageError, match=r"images.parquet\[0\] \(broken.png\)"):
        train.train(settings("stop", rows))
    result = train.train(settings("skip", on_bad_image="skip"))
    # 56 images are one epoch and 26 of the next, so the bad ones come up two to four times.
    assert 2 <= result.replaced_images <= 4
    assert f"{result.replaced_images} broken images were replaced" in result.summary()
    assert "images that cannot be read and are left out: 2 (" in result.summary()
    last = (result.output_dir / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["replaced_images"] == result.replaced_images


def test_another_bit_depth_further_on_is_refused(settings):
    rows = [picture(n) for n in range(70)] + [picture(n, np.uint16) for n in range(30)]
    with pytest.raises(ValueError, match="is uint16, the first image is uint8; convert"):
        train.train(settings("a", rows, max_train_steps=20))
    with pytest.raises(ValueError, match="images of different dtype"):
        Trainer(settings("b", rows[60:]))


def test_the_held_out_images_leave_some_to_train_on(settings):
    with pytest.raises(ValueError, match="`validation_images` is 30, but the stream .* only 30"):
        Trainer(settings("a", validate_every=1, validation_images=30))


def test_distances_need_no_held_out_images(settings):
    looks = {"sample_every": 7, "sample_images": 2, "sample_steps": 1, "frechet_images": 4}
    report = train.train(settings("a", **looks)).evaluations[-1]
    assert (report["frechet_n"], report["frechet_reference_n"]) == (4, 30)
    assert np.isfinite(report["frechet"])


def test_a_step_that_is_not_finite_names_places_in_the_stream(settings, monkeypatch):
    real = Trainer._loss

    def bad(self, batch, window):
        factor = torch.nan if self.step == 1 else 1.0
        return real(self, batch | {"images": batch["images"] * factor}, window)

    monkeypatch.setattr(Trainer, "_loss", bad)
    with pytest.raises(NonFiniteError, match="step 1 was not finite .*image 8 of the shuffled str"):
        train.train(settings("a"))
