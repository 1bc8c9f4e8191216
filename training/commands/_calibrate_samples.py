"""`ddim-schedulers calibrate --objective samples`: which settings make pictures most like data."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `--help` needs neither torch nor diffusers
    from ddim_schedulers.pipelines.ownership import Owner
    from ddim_schedulers.training.calibration.predictor import Guiding
    from ddim_schedulers.training.common.processes import AccelerateTeam
    from ddim_schedulers.training.data.images import ImageData
    from ddim_schedulers.training.likelihood.measured_model import MeasuredModel

CALLS = (5, 10, 20)
NUM_IMAGES = 2000
CLASSIFIER = "classifier"
# Which spaces are used where none are named: with classes and without.
WITH_CLASSES, WITHOUT_CLASSES = (CLASSIFIER, "pixels"), ("pixels", "details")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that no other objective has."""
    parser.add_argument(
        "--features",
        nargs="+",
        metavar="SPACE",
        help="samples: feature spaces; the distance in the first one decides, the others guard: "
        "pixels, details, inception, dinov2, a classifier's .safetensors file, module:Name, or "
        "'classifier', which is trained on the labelled data (classifier and pixels where the data "
        "have classes: digits, --label_column or --class_names; pixels and details otherwise)",
    )


def guiding_of(args: argparse.Namespace) -> Guiding:
    """Return the guidance that the options ask for."""
    from ddim_schedulers.training.calibration.predictor import Guiding

    interval = args.guidance_interval
    return Guiding(args.guidance_scale, None if interval is None else tuple(interval))


def run(
    args: argparse.Namespace,
    model: MeasuredModel,
    target: Path,
    team: AccelerateTeam,
    work_dir: Path,
    owner: Owner,
) -> int:
    """Choose settings for each number of calls, and write those that are better."""
    from ddim_schedulers.training.calibration import samples_job, samples_run, solver_job
    from ddim_schedulers.training.likelihood import calibration
    from ddim_schedulers.training.likelihood.measured_data import (
        labels_in_turn,
        load_measured_data,
    )

    has_classes = bool(args.label_column or args.class_names or args.data == "digits")
    if model.codec is not None:
        raise ValueError(
            f"`--pipeline` is {args.pipeline!r}, whose network makes latents; it must make pixels "
            "for --objective samples"
        )
    names = args.features or [*(WITH_CLASSES if has_classes else WITHOUT_CLASSES)]
    job = samples_job.SamplesJob(
        calls=tuple(args.calls or CALLS),
        num_images=NUM_IMAGES if args.num_images is None else args.num_images,
        seed=args.seed,
        batch_size=args.batch_size,
        guiding=guiding_of(args),
    )
    job.check(len(model.alpha_bar))
    model = model.labelled(labels_in_turn(args.labels, model, job.held_out))
    samples_run.check(model, job, names)
    data = load_measured_data(args, model, class_conditional=CLASSIFIER in names)

    def progress(line: str) -> None:
        print(f"process {team.index}: {line}", file=sys.stderr, flush=True)

    spaces = _spaces(names, data, team, work_dir, args.seed, progress)
    outcomes, cost = samples_run.calibrate_samples(
        model, data, spaces, job, work_dir=work_dir, team=team, progress=progress
    )
    if team.index == 0:
        owner.check()
        better = {
            str(each.calls): each.entry(model.config, names, job)
            for each in outcomes
            if each.chosen is not None
        }
        before = {}
        if better:
            before = calibration.add_to_calibration({"solver": better}, target, model.saved)
        samples_run.discard(work_dir)
        for each in outcomes:
            print(*each.lines(names), sep="\n")
        for line in solver_job.remarks(before, better, model.saved):
            print(line)
        print(
            f"{cost['evaluations']} network evaluations, {cost['seconds']:.1f} s, "
            f"{cost['processes']} processes; "
            + (f"written to {target}" if better else "nothing is written")
        )
    team.wait()
    return 0


def _spaces(
    names: list[str],
    data: ImageData,
    team: AccelerateTeam,
    work_dir: Path,
    seed: int,
    progress: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """Return the feature spaces by name, on the device of the processes."""
    from ddim_schedulers.training.metrics import features

    if len(set(names)) != len(names):
        raise ValueError(f"`--features` is {names}; each must be named once")
    found = {}
    for name in names:
        source = name
        if name == CLASSIFIER:
            source = str(_classifier(data, team, work_dir, seed, progress))
        found[name] = features.make_feature_space(source, data.shape).to(team.state.device)
    return found


def _classifier(
    data: ImageData,
    team: AccelerateTeam,
    work_dir: Path,
    seed: int,
    progress: Any,  # noqa: ANN401
) -> Path:
    """Return the file of a classifier of the data; the first process trains it where missing.

    Its name tells the seed and the data, of which an earlier run may have used others.
    """
    from ddim_schedulers.training.evaluation.references import as_uint8_sees
    from ddim_schedulers.training.metrics import features

    labels = data.labels(range(len(data)))
    assert labels is not None
    digest = hashlib.sha256(repr((seed, data.shape, labels.tolist())).encode())
    digest.update(data.batch(range(min(len(data), 100)))[0].numpy().tobytes())
    path = work_dir / f"classifier-{digest.hexdigest()[:16]}.safetensors"
    if team.index == 0 and not path.exists():
        network, facts = features.train_classifier(
            lambda rows: as_uint8_sees(data.batch(rows)[0]),
            features.class_names(labels.tolist())[1],
            data.shape,
            seed=seed,
            progress=progress,
        )
        progress(f"classifier: {facts['accuracy']:.1%} right of {facts['held_out_n']}")
        features.save_classifier(network, facts, path)
    team.wait()
    return path
