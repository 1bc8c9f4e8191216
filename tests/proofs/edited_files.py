"""Edits every kind of file that is used again, and counts what becomes of each edit.

    python tests/proofs/edited_files.py

Every value of every JSON and YAML file is taken out, given other types, made negative, huge and
NaN; every file is emptied, cut short, filled with random bytes and has bits flipped. An edit is

- noticed: the file is refused with one sentence, passed over, or made anew;
- harmless: what is read is what was written;
- plausible: another value that a file may have; of files that carry their check sum there must be
  none, and of settings these are the edits that a user makes.

Anything else, a raw error of the libraries or a wrong number, ends the proof with exit code 1.
"""

import copy
import hashlib
import json
import logging
import math
import random
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.pipelines import GenerationPipeline, sampling_job
from ddim_schedulers.pipelines.sampling_files import SamplingFiles
from ddim_schedulers.pipelines.workdir import flat
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.evaluation.caches import ClassifierFile, FeatureFiles
from ddim_schedulers.training.evaluation.cells import Evaluation
from ddim_schedulers.training.evaluation.config import load_evaluation, parse_evaluation
from ddim_schedulers.training.evaluation.results import run
from ddim_schedulers.training.likelihood import error_sweep
from ddim_schedulers.training.likelihood.calibration import calibrate, save_calibration
from ddim_schedulers.training.likelihood.measured_model import (
    load_measured_model,
    measured_model_of,
)
from ddim_schedulers.training.likelihood.table import LikelihoodSettings, make_chains
from ddim_schedulers.training.networks import checkpoints
from ddim_schedulers.training.parsing import load_config
from ddim_schedulers.training.train import train
from ddim_schedulers.training.trainer import saving
from ddim_schedulers.training.trainer.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import tiny_unet

VALUES = (None, True, "x", [], {}, -1, -5.5, 10**18, 10**400, math.nan, math.inf, -math.inf)
NOTICED, HARMLESS, PLAUSIBLE, RAW, WRONG = "noticed", "harmless", "plausible", "RAW", "WRONG"


def places(value, path=()):
    """Every place in nested lists and objects; of long lists the first two."""
    items = value.items() if isinstance(value, dict) else []
    if isinstance(value, list):
        items = list(enumerate(value))[:2]
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def edited_values(content):
    """(what was done, content) for every edit of every place."""
    for place in list(places(content)):
        for value in ("<deleted>", *VALUES):
            changed = copy.deepcopy(content)
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            if value == "<deleted>":
                del inner[place[-1]]
            elif inner[place[-1]] == value and type(inner[place[-1]]) is type(value):
                continue
            else:
                inner[place[-1]] = value
            yield f"{'.'.join(map(str, place))} = {str(value)[:20]}", changed


def edited_bytes(data, flips=40):
    """(what was done, bytes) for edits of a whole file."""
    source = random.Random(0)
    yield "empty", b""
    for share in (0.01, 0.5, 0.99):
        yield f"the first {share:.0%}", data[: int(share * len(data))]
    yield "without the last byte", data[:-1]
    yield "random", source.randbytes(len(data))
    yield "text of another encoding", b"\xff\xfe" + data
    for text in ("[" * 10**5, "{}", "[]", "null", '{"a": 1, "a": 1}'):
        yield text[:20], text.encode()
    for _ in range(flips):
        place = source.randrange(len(data))
        changed = bytes([data[place] ^ 1 << source.randrange(8)])
        yield f"a bit of byte {place}", data[:place] + changed + data[place + 1 :]


class Count:
    """Edits of one kind of file, by what became of them."""

    def __init__(self):
        self.kinds, self.failed = {}, []

    def try_all(self, kind, path, edits, use, reset=None):
        """`use()` says what became of the file; errors in the words of the package are notices."""
        whole = path.read_bytes()
        found = self.kinds.setdefault(kind, Counter())
        for what, data in edits:
            path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    became = use()
            except (ValueError, checkpoints.CheckpointError) as error:
                one = "\n" not in str(error).strip() and type(error) is not UnicodeDecodeError
                became = NOTICED if one else RAW
                what += f": {type(error).__name__}: {error}" if not one else ""
            except Exception as error:
                became, what = RAW, f"{what}: {type(error).__name__}: {error}"
            found[became] += 1
            if became in (RAW, WRONG):
                self.failed.append(f"{kind}: {what[:300]}")
            path.write_bytes(whole)
            if reset is not None:
                reset()
        print(kind, dict(found), file=sys.stderr, flush=True)

    def report(self):
        names = (NOTICED, HARMLESS, PLAUSIBLE, RAW, WRONG)
        print(f"{'':34}{'edits':>7}" + "".join(f"{n:>11}" for n in names))
        total = Counter()
        for kind, found in self.kinds.items():
            total += found
            print(f"{kind:34}{sum(found.values()):>7}" + "".join(f"{found[n]:>11}" for n in names))
        print(f"{'all':34}{sum(total.values()):>7}" + "".join(f"{total[n]:>11}" for n in names))
        print(*self.failed[:60], sep="\n")
        return 1 if self.failed else 0


def checkpoints_of_a_run(count, root):
    settings = {
        "data": "digits",
        "model": "mini",
        "output_dir": str(root),
        "batch_size": 4,
        "max_train_steps": 4,
        "checkpoint_every": 2,
        "keep_last": 5,
        "num_train_timesteps": 20,
        "timestep_sampling": "loss_aware",
        "progress_bar": False,
        "tracker": "none",
    }
    train(TrainingConfig(**settings))
    folder = root / "checkpoints"
    newest, before = checkpoints.listed(folder)[:2]

    def skipped():
        chosen = checkpoints.newest_whole(folder)
        return {before: NOTICED, newest: HARMLESS}[chosen]

    for name in ("manifest.json", "state.json", "optimizer.safetensors", "unet/config.json"):
        count.try_all(
            f"checkpoint: {name}",
            newest / name,
            edited_bytes((newest / name).read_bytes()),
            skipped,
        )
    manifest = newest / "manifest.json"
    listed = json.loads(manifest.read_text())
    count.try_all("checkpoint: manifest.json", manifest, edited_values(listed), skipped)

    # what a forger does: the manifest is made to fit, and what the files say must hold by itself
    trainer = Trainer(TrainingConfig(**settings, resume="latest"))
    state = newest / "state.json"

    def forged():
        data = state.read_bytes()
        entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest.write_text(json.dumps({**listed, "state.json": entry}))
        if checkpoints.newest_whole(folder) != newest:
            return NOTICED
        saving.restore(trainer, newest)
        own = (
            trainer.step,
            trainer.stream_position,
            trainer.best,
            trainer.average.ema.optimization_step,
        )
        return HARMLESS if own == good else PLAUSIBLE

    good = (
        trainer.step,
        trainer.stream_position,
        trainer.best,
        trainer.average.ema.optimization_step,
    )
    manifest_bytes = manifest.read_bytes()
    count.try_all(
        "checkpoint: state, manifest fits",
        state,
        edited_values(json.loads(state.read_text())),
        forged,
        lambda: manifest.write_bytes(manifest_bytes),
    )
    left_out = {name: {k: v for k, v in listed.items() if k != name} for name in listed}
    count.try_all(
        "checkpoint: a file is not listed",
        manifest,
        ((name, changed) for name, changed in left_out.items()),
        skipped,
    )


def parts_of_a_pass(count, root):
    scheduler = DDPMScheduler(num_train_timesteps=60, beta_end=0.3)
    model = measured_model_of(tiny_unet(blocks=(8, 8)), dict(scheduler.config))
    images = torch.rand(4, 1, 8, 8) * 2 - 1

    def go():
        return error_sweep.run_error_sweep(
            model, images, range(60), clip=1.0, seed=0, batch_size=2, work_dir=root
        )

    before = go()
    part = sorted(root.glob("part-*"))[1]
    for path in (part, root / "pass.json"):
        whole = path.read_bytes()

        def use():
            again = go()
            if not torch.equal(again.statistics, before.statistics):
                return WRONG
            same = path.read_bytes() == whole  # noqa: B023
            return NOTICED if again.calls or same else HARMLESS  # noqa: B023

        count.try_all(f"pass: {path.suffix[1:]}", path, edited_bytes(whole), use)
        if path.suffix == ".json":
            count.try_all("pass: json", path, edited_values(json.loads(whole)), use)


def evaluation(count, root, pipeline):
    config = parse_evaluation(
        {
            "pipeline": str(pipeline),
            "output_dir": str(root),
            "data": {"data": "digits"},
            "features": ["classifier"],
            "classifier_epochs": 1,
            "batch_size": 4,
            "tables": [{"name": "T", "n": 8, "grid": [{"steps": [2], "members": [0]}]}],
        }
    )
    made = Evaluation(config)
    run(made)
    (cell,) = config.cells
    path = made.files.path_of(cell)
    kept, preview = made.files.load(cell), made.first_images.read(cell)

    def measured():
        found = made.files.load(cell)
        return HARMLESS if found == kept else WRONG if found else NOTICED

    def pictures():
        missing = made.missing(cell)
        if missing:
            return NOTICED
        return HARMLESS if np.array_equal(made.first_images.read(cell), preview) else WRONG

    content = json.loads(path.read_text())
    count.try_all("evaluation: a cell", path, edited_bytes(path.read_bytes()), measured)
    count.try_all("evaluation: a cell", path, edited_values(content), measured)
    old = {k: v for k, v in content.items() if k not in ("sha256", "preview")}
    path.write_text(json.dumps(old))
    kept_now = made.files.load(cell)

    def old_measured():
        found = made.files.load(cell)
        return HARMLESS if found == kept_now else PLAUSIBLE if found else NOTICED

    count.try_all("evaluation: a cell without seal", path, edited_values(old), old_measured)
    path.write_text(json.dumps(content))
    npz = path.with_suffix(".npz")
    count.try_all("evaluation: first images", npz, edited_bytes(npz.read_bytes()), pictures)
    (reference,) = root.glob("reference-*")
    real = made.real.features["classifier"]
    rows = {"train": len(real.train), "held_out": len(real.held_out)}

    def features():
        found = FeatureFiles(root, rows, lambda line: None).load(real.fingerprint)
        if found is None:
            return NOTICED
        return HARMLESS if torch.equal(found["train"], real.train) else WRONG

    count.try_all("evaluation: features", reference, edited_bytes(reference.read_bytes()), features)
    classifier = root / "classifier.safetensors"
    wanted = {"epochs": 1, "seed": config.seed, "images": len(made.real.train)}

    def usable():
        there = ClassifierFile(root, lambda line: None).is_there("classifier", wanted)
        return HARMLESS if there else NOTICED

    count.try_all(
        "evaluation: classifier", classifier, edited_bytes(classifier.read_bytes()), usable
    )


def samples(count, root):
    pipe = GenerationPipeline(unet=tiny_unet(blocks=(8, 8)), scheduler=GeneralizedDDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    for file_format, name in (("png", "images/000001.png"), ("npz", "shards/000000-000003.npz")):
        job = sampling_job.SamplingJob(6, 4, file_format=file_format, num_inference_steps=2)
        folder = root / file_format
        sampling_job.sample_to_directory(pipe, folder, job)
        path = folder / name
        files = SamplingFiles(folder, job, 0, pipe.image_shape)

        def images():
            return np.concatenate([files.read(piece) for piece in files.pieces(0, 4)])  # noqa: B023

        before = images()

        def use():
            if files.missing(files.pieces(0, 4)):  # noqa: B023
                return NOTICED
            return HARMLESS if np.array_equal(images(), before) else WRONG  # noqa: B023

        count.try_all(f"samples: {file_format}", path, edited_bytes(path.read_bytes(), 200), use)
    settings = folder / "sample.json"
    now, defaults = sampling_job.settings_of(pipe, job), sampling_job.defaults_of_settings(pipe)

    def compared():
        files.compare(now, defaults)
        # a setting that is missing counts as its default: an earlier version did not know it
        then, own = (
            {**defaults, **flat(json.loads(settings.read_text()))},
            {**defaults, **flat(now)},
        )
        same = all(then.get(key) == own.get(key) for key in then.keys() | own.keys())
        return HARMLESS if same else WRONG

    count.try_all("samples: sample.json", settings, edited_bytes(settings.read_bytes()), compared)
    count.try_all("samples: sample.json", settings, edited_values(now), compared)


def scheduler_config(count, root, pipeline):
    path = pipeline / "scheduler" / "scheduler_config.json"
    model = load_measured_model(pipeline)
    result, _ = calibrate(model, torch.zeros(2, 1, 8, 8), clip=1.0, work_dir=root / "parts")
    save_calibration(result, path)
    settings = LikelihoodSettings(steps=(5,), variances=("fixed_small", "optimal"))

    def use():
        found = load_measured_model(pipeline)
        make_chains(found, settings)
        return PLAUSIBLE

    content = json.loads(path.read_text())
    count.try_all("scheduler: config", path, edited_bytes(path.read_bytes()), use)
    count.try_all("scheduler: config", path, edited_values(content), use)


def settings(count, root):
    configs = Path(__file__).resolve().parents[2] / "training" / "configs"
    for name, load in (("digits-8", load_config), ("digits-8-evaluate", load_evaluation)):
        path = root / f"{name}.yaml"
        path.write_bytes((configs / path.name).read_bytes())

        def use():
            load(path)  # noqa: B023
            return PLAUSIBLE

        count.try_all("settings: YAML", path, edited_bytes(path.read_bytes()), use)
        content = yaml.safe_load(path.read_text())
        edits = ((what, yaml.safe_dump(c).encode()) for what, c in edited_values(content))
        count.try_all("settings: YAML", path, edits, use)


def main():
    logging.disable(logging.WARNING)
    count = Count()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        pipeline = root / "pipeline"
        scheduler = DDPMScheduler(num_train_timesteps=12, beta_end=0.5)
        DDPMPipeline(tiny_unet(blocks=(8, 8)), scheduler).save_pretrained(pipeline)
        for folder in ("pass", "evaluation", "samples", "settings"):
            (root / folder).mkdir()
        settings(count, root / "settings")
        samples(count, root / "samples")
        parts_of_a_pass(count, root / "pass")
        evaluation(count, root / "evaluation", pipeline)
        scheduler_config(count, root, pipeline)
        checkpoints_of_a_run(count, root / "run")
    return count.report()


if __name__ == "__main__":
    sys.exit(main())
