"""`ddim-schedulers restore`: images from what was measured of them, with a model as it is."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddim_schedulers.training.commands import _loading, _model_options

if TYPE_CHECKING:
    import torch

    from ddim_schedulers.pipelines.restoration.job import RestorationJob
    from ddim_schedulers.pipelines.restoration.methods import Method
    from ddim_schedulers.pipelines.restoration.pipeline import RestorationPipeline
    from ddim_schedulers.pipelines.restoration.tasks import Task

HELP = "Restore images from what was measured of them: holes, fewer pixels, blur, grey."
RENAMED = {**_model_options.RENAMED, "std": "--blur_std"}

METHODS = ("ddnm", "ddrm", "repaint", "dps", "pigdm", "mmps")
# Options of a task and of a method; a default is that of the class.
TASK_OPTIONS = ("mask", "kernel", "blur_std", "truncation", "ratio", "operator_seed")
METHOD_OPTIONS = {
    "eta_b": "ddrm",
    "zeta": "dps",
    "max_iterations": "mmps",
    "tolerance": "mmps",
    "resamplings": "repaint",
    "jump_length": "repaint",
}
SHEET_IMAGES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    _model_options.add_model_arguments(parser)
    _model_options.add_condition_arguments(
        parser, "classes, names or numbers: image i has class i modulo their number"
    )
    parser.add_argument(
        "--images", nargs="+", required=True, help="image files, or folders of them"
    )
    parser.add_argument("--output", required=True, help="folder for images/, results and sheet.png")
    parser.add_argument(
        "--task",
        required=True,
        help="inpaint, superresN (superres4: 4 x as many pixels in both directions), colorize, "
        "deblur, or sense (compressed sensing)",
    )
    parser.add_argument("--method", choices=METHODS, default="ddnm", help="how (ddnm)")
    parser.add_argument(
        "--measured",
        action="store_true",
        help="--images are what was measured; else they are the truth, of which it is made",
    )
    parser.add_argument("--num_images", type=int, help="take the first ones only (all)")
    parser.add_argument("--num_samples", type=int, default=1, help="samples of each image (1)")
    parser.add_argument(
        "--noise_std",
        type=float,
        default=0.0,
        help="noise of the measurement, for pixels in -1 .. 1: a level of 256 is 2 / 255 (0)",
    )
    parser.add_argument(
        "--eta_rule",
        choices=("family", "paper"),
        default="family",
        help="what --eta means: DDIM's eta, or the share of the noise, as DDRM "
        "and DDNM have it (family)",
    )
    parser.add_argument("--seed", type=int, default=0, help="image i has the seed SEED + i (0)")
    parser.add_argument(
        "--measurement_seed", type=int, default=0, help="of the noise that --noise_std adds (0)"
    )
    tasks = parser.add_argument_group("of a task")
    tasks.add_argument(
        "--mask",
        help="inpaint: half, centre, random, or an image whose white pixels are known (half)",
    )
    tasks.add_argument("--kernel", help="superresN: box or bicubic (box)")
    tasks.add_argument("--blur_std", type=float, help="deblur: of the Gaussian, in pixels (1.5)")
    tasks.add_argument(
        "--truncation", type=float, help="deblur: share of a frequency that is not inverted (0.03)"
    )
    tasks.add_argument("--ratio", type=float, help="sense: share of numbers (0.25)")
    tasks.add_argument(
        "--operator_seed", type=int, help="inpaint with mask random, sense: of what is seen (0)"
    )
    methods = parser.add_argument_group("of a method")
    methods.add_argument("--eta_b", type=float, help="ddrm: share of the measurement (1)")
    methods.add_argument("--zeta", type=float, help="dps: length of its steps (1)")
    methods.add_argument(
        "--max_iterations", type=int, help="mmps: backward passes of a step at most (50)"
    )
    methods.add_argument("--tolerance", type=float, help="mmps: of its linear systems (0.001)")
    methods.add_argument("--resamplings", type=int, help="repaint: how often each stretch (5)")
    methods.add_argument("--jump_length", type=int, help="repaint: steps of a return (1)")


def run(args: argparse.Namespace) -> int:
    """Restore this process's share; 0 when it is done."""
    from ddim_schedulers.pipelines import RestorationPipeline
    from ddim_schedulers.pipelines.files import check_folders
    from ddim_schedulers.pipelines.ownership import own
    from ddim_schedulers.pipelines.restoration.checks import check_noise_std
    from ddim_schedulers.pipelines.restoration.job import RestorationJob, restore_to_directory
    from ddim_schedulers.pipelines.sampling_job import Guides, process_of
    from ddim_schedulers.training.commands import _picture_files

    _model_options.apply_preset(args)
    method = _method(args)
    check_noise_std(args.noise_std)
    if args.num_samples < 1:
        raise ValueError(f"`--num_samples` is {args.num_samples}; it must be an integer >= 1.")
    paths = _picture_files.find(args.images, args.num_images)
    rank, world_size = process_of()
    job = RestorationJob(
        num_images=len(paths) * args.num_samples,
        batch_size=args.batch_size,
        seed=args.seed,
        num_inference_steps=args.num_inference_steps,
        timesteps=None if args.timesteps is None else tuple(args.timesteps),
        eta=_model_options.eta_of_call(args),
        class_labels=None if args.labels is None else tuple(args.labels),
        **_model_options.conditions_of(args),
        num_samples=args.num_samples,
        noise_std=args.noise_std,
        method=method,
        eta_rule=args.eta_rule,
    )
    check_folders(Path(args.output), "images", "--output")
    with own(args.output, "restore", rank=rank, world_size=world_size):
        pipe = _loading.load(RestorationPipeline, args)
        _loading.check_own_scheduler(pipe.scheduler, args)
        guides = Guides(**_loading.load_guides(pipe, args))
        task = _task(args, pipe)
        truth, measurement = _measurement(args, task, pipe, paths)
        report = restore_to_directory(
            pipe,
            args.output,
            job,
            task,
            measurement,
            rank=rank,
            world_size=world_size,
            guides=guides,
        )
        if report.complete:
            _report(args, job, task, pipe, paths, truth, measurement, rank)
    state = "complete" if report.complete else "other processes are still at work"
    # one write for the whole line: processes share the terminal
    print(
        f"process {rank + 1} of {world_size}: {report.written} files written, "
        f"{report.present} found; {args.output}: {state}\n",
        end="",
        flush=True,
    )
    return 0


def _method(args: argparse.Namespace) -> "Method":
    from ddim_schedulers.pipelines.restoration import methods

    given = {key: v for key in METHOD_OPTIONS if (v := getattr(args, key)) is not None}
    for key in given:
        if METHOD_OPTIONS[key] != args.method:
            raise ValueError(
                f"`--{key}` is {given[key]!r}; it must be left out with --method {args.method}, "
                f"for it belongs to {METHOD_OPTIONS[key]}."
            )
    return methods.METHODS[args.method](**given)


def _task(args: argparse.Namespace, pipe: "RestorationPipeline") -> "Task":
    import torch

    from ddim_schedulers.pipelines.images import read_image
    from ddim_schedulers.pipelines.restoration.tasks import MASKS, task_named

    given: dict[str, Any] = {
        key: v for key in TASK_OPTIONS if (v := getattr(args, key)) is not None
    }
    if args.mask is not None and args.mask not in MASKS and args.task == "inpaint":
        image = read_image(args.mask, "--mask")
        if image.mode not in ("1", "L"):
            raise ValueError(
                f"`--mask` is {args.mask!r}, of mode {image.mode}; it must be a grey image of "
                "black and white."
            )
        pixels = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8)
        if not bool(((pixels == 0) | (pixels == 255)).all()):
            raise ValueError(
                f"`--mask` is {args.mask!r}, which has grey pixels; each must be black or white."
            )
        given["mask"] = pixels.view(image.height, image.width) == 255
    return task_named(args.task, pipe.image_shape, **given)


def _measurement(
    args: argparse.Namespace, task: "Task", pipe: "RestorationPipeline", paths: list[Path]
) -> "tuple[torch.Tensor | None, torch.Tensor]":
    """Return the true images in [-1, 1], None where they are not known, and the measurement."""
    import torch

    from ddim_schedulers.pipelines.images import to_model_space
    from ddim_schedulers.training.commands import _picture_files
    from ddim_schedulers.training.common import seeds

    images = _picture_files.read(paths)
    if args.measured:
        shape = task.operator.measured_shape
        if len(shape) != 3:
            raise ValueError(
                f"`--task` is {args.task!r}, which measures no image; it must be another one with "
                "--measured."
            )
        for i, image in enumerate(images):
            if image.size != (shape[2], shape[1]):
                raise ValueError(
                    f"`images[{i}]` is {image.width}x{image.height} (width x height); with "
                    f"--measured it must be {shape[2]}x{shape[1]}, as {args.task} measures."
                )
        pictures = to_model_space(images, shape, pipe.state_dtype)
        # of images in [0, 1]: y becomes 2 y - A(1)
        ones = task.operator.A(torch.ones(1, *pipe.image_shape, dtype=pipe.state_dtype))
        return None, task.operator.seen((pictures + 1) - ones)
    truth = to_model_space(images, pipe.image_shape, pipe.state_dtype)
    y = task.operator.A(truth)
    if not args.noise_std:
        return truth, y
    noise = [
        torch.randn(
            y.shape[1:],
            generator=seeds.generator(args.measurement_seed, "measurement", i),
            dtype=y.dtype,
        )
        for i in range(len(y))
    ]
    return truth, task.operator.seen(y + args.noise_std * torch.stack(noise))


def _report(
    args: argparse.Namespace,
    job: "RestorationJob",
    task: "Task",
    pipe: "RestorationPipeline",
    paths: list[Path],
    truth: "torch.Tensor | None",
    measurement: "torch.Tensor",
    rank: int,
) -> None:
    """Write results.json, results.md and sheet.png of the files; every process writes the same."""
    import torch

    from ddim_schedulers.pipelines.files import write_bytes, write_json, write_png
    from ddim_schedulers.pipelines.restoration.job import images_of, records_of
    from ddim_schedulers.reading import DamagedFileError

    folder = Path(args.output)
    try:
        array, records = images_of(folder, job, pipe.image_shape), records_of(folder, job)
    except DamagedFileError:
        return  # another process is about to make it again
    restored = torch.from_numpy(array).movedim(-1, 1).double() / 255
    figures = _figures(job, task, restored, truth, measurement)
    forward, backward = records["network_calls"], records["backward_passes"]
    results = {
        "task": {"name": task.name, **task.settings},
        "method": job.method.settings(),
        "noise_std": job.noise_std,
        "images": [path.name for path in paths],
        "num_samples": job.num_samples,
        "calls": {"forward": forward, "backward": backward, "together": forward + backward},
        "residual": records["residual"],
        "residual_clamped": records["residual_clamped"],
        **figures,
    }
    write_json(folder / "results.json", results, rank)
    text = _table(results)
    write_bytes(folder / "results.md", text.encode(), rank)
    write_png(folder / "sheet.png", _sheet(job, task, restored, truth, measurement), rank)
    if rank == 0:
        print(text)


def _figures(
    job: "RestorationJob",
    task: "Task",
    restored: "torch.Tensor",
    truth: "torch.Tensor | None",
    measurement: "torch.Tensor",
) -> dict[str, Any]:
    """Return PSNR and SSIM of each image, of the means of its samples, and without a model."""
    from ddim_schedulers.pipelines.images import to_unit_range
    from ddim_schedulers.training.metrics.likeness import psnr, ssim

    if truth is None:
        return {}
    true, each = to_unit_range(truth.double()), job.num_samples
    grouped = restored.view(-1, each, *restored.shape[1:])
    compared = {"samples": (restored, true.repeat_interleave(each, dim=0))}
    if each > 1:
        compared["mean of the samples"] = (grouped.mean(dim=1), true)
    compared["no model"] = (to_unit_range(task.plain(measurement).double()), true)
    found: dict[str, Any] = {"psnr": {}, "ssim": {}}
    for name, pair in compared.items():
        found["psnr"][name] = [min(value, 999.0) for value in psnr(*pair).tolist()]
        values = ssim(*pair)
        found["ssim"][name] = None if values is None else values.tolist()
    return found


def _table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    task, method, calls = (dict(results[key]) for key in ("task", "method", "calls"))
    said = [f"{key} {value}" for key, value in task.items() if key != "name"]
    settings = [f"{key} {value}" for key, value in method.items() if key != "name"]
    lines = [
        f"Task {', '.join([task['name'], *said])}; noise {results['noise_std']:g}. "
        f"Method {', '.join([method['name'], *settings])}. {len(results['images'])} images, "
        f"{results['num_samples']} samples each; {calls['together']} calls an image "
        f"({calls['forward']} forward, {calls['backward']} backward).",
        "",
        f"Largest |A x - y|: {max(results['residual']):.3g}; of the image in [-1, 1]: "
        f"{max(results['residual_clamped']):.3g}.",
        "",
    ]
    if "psnr" in results:
        lines += ["| | PSNR (dB) | SSIM |", "|---|---|---|"]
        for name, values in results["psnr"].items():
            similar = results["ssim"][name]
            shown = "" if similar is None else f"{sum(similar) / len(similar):.4f}"
            lines.append(f"| {name} | {sum(values) / len(values):.2f} | {shown} |")
        lines.append("")
    return "\n".join(lines)


def _sheet(
    job: "RestorationJob",
    task: "Task",
    restored: "torch.Tensor",
    truth: "torch.Tensor | None",
    measurement: "torch.Tensor",
) -> Any:  # noqa: ANN401
    """Return the first images, one a row: truth, measurement, samples, their mean and spread."""
    import torch

    from ddim_schedulers.pipelines.pictures import make_grid

    count, each = min(len(measurement), SHEET_IMAGES), job.num_samples
    grouped = restored[: count * each].view(count, each, *restored.shape[1:])
    shown = task.shown(measurement[:count]).double().clamp(-1, 1) / 2 + 0.5
    columns = [] if truth is None else [truth[:count].double().clamp(-1, 1) / 2 + 0.5]
    columns += [shown, *grouped.unbind(1)]
    if each > 1:
        # the largest standard deviation of values in [0, 1] is 0.5
        columns += [grouped.mean(dim=1), 2 * grouped.std(dim=1, correction=0)]
    return make_grid(torch.stack(columns, dim=1).flatten(0, 1), len(columns), scale=None)
