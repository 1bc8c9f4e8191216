"""Does this working tree behave as an earlier revision of it did?

    python tests/proofs/same_behaviour.py --before REVISION [--keep FOLDER]

Lays both trees out as installed packages and runs the same work through each, in processes of its
own with one thread: the steps of the schedulers (`same_bits.py`), short training runs of every
loss, a resume of a folder that the earlier revision wrote, every verb on the trained pipeline, and
the export forms. It compares hashes of steps, losses and weights, the flags of every verb with
their types and defaults, which files each folder holds, and what stands in the text files among
them. Nothing numeric is stored, because machines differ. Times, versions and folder names are left
out of the comparison.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROOFS = Path(__file__).parent
ROOMS = ("pipelines", "training", "model_cards")

UNET = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
COMMON = {
    "model": "unet.json",
    "max_train_steps": 6,
    "batch_size": 16,
    "checkpoint_every": 3,
    "num_train_timesteps": 20,
    "lr_warmup_steps": 2,
    "log_every": 1,
    "cpu": "true",
    "progress_bar": "false",
}
RUNS = {
    "simple": {"validate_every": 3, "sample_every": 3, "sample_steps": 4, "frechet_images": 32},
    "vlb": {"loss": "vlb", "variance_type": "learned_range", "timestep_sampling": "loss_aware"},
    "gamma": {"loss": "gamma", "gamma": "ddim", "random_flip": "true", "use_ema": "false"},
    "snr": {
        "loss": "min_snr",
        "prediction_type": "v_prediction",
        "timestep_sampling": "stratified",
    },
    "parts": {"gradient_accumulation_steps": 2, "lr_schedule": "cosine", "channels_last": "true"},
}
EVALUATION = """
pipeline: runs/simple/pipeline
output_dir: evaluation
data: {data: digits}
features: [pixels, classifier]
classifier_epochs: 2
batch_size: 32
tables:
  - name: Few
    n: 32
    grid:
      - {steps: [3], members: [0, sigma-hat], spacing: [trailing]}
      - {steps: [3], schedulers: [{name: stock, class: DDIMScheduler}]}
"""
PIPELINE = ["--pipeline", "runs/simple/pipeline"]
# Work on the trained pipeline, in this order: name -> words of the command line.
VERBS = {
    "sample": ["sample", *PIPELINE, "--num_images", "5", "--num_inference_steps", "3",
               "--output", "samples", "--batch_size", "2", "--device", "cpu"],
    "sample npz": ["sample", *PIPELINE, "--num_images", "5", "--num_inference_steps", "3",
                   "--scheduler", "ddim", "--eta", "0.5", "--format", "npz", "--output", "npz",
                   "--device", "cpu"],
    "interpolate": ["interpolate", *PIPELINE, "--seeds", "0", "1", "--num_points", "3",
                    "--scheduler", "ddim", "--num_inference_steps", "3", "--output", "between",
                    "--device", "cpu"],
    "reconstruct": ["reconstruct", *PIPELINE, "--images", "samples/images/000000.png",
                    "--num_inference_steps", "4",
                    "--scheduler", "ddim", "--output", "back", "--device", "cpu"],
    "calibrate": ["calibrate", *PIPELINE, "--data", "digits", "--num_images", "8", "--cpu"],
    "trajectory": ["calibrate", *PIPELINE, "--objective", "trajectory", "--num_images", "4",
                   "--trajectory_steps", "10", "--cpu"],
    "likelihood": ["likelihood", *PIPELINE, "--data", "digits", "--num_images", "4", "--cpu",
                   "--steps", "5", "20", "--output_dir", "bits"],
    "evaluate": ["evaluate", "--config", "evaluation.yaml"],
}  # fmt: skip

# What differs from run to run, or says where a run was: these keys of JSON files and these texts.
PASSING = re.compile(
    r"second|per_s|time|version|commit|when|path|host|pid|folder|throughput|rate|memory"
)
NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][-+]?\d+)?")
# Files of one process's life: logs of it, and what a heartbeat rewrites.
LEFT_OUT = ("events.out", ".lock", "__pycache__", "cache")


def laid_out(tree: Path, folder: Path) -> Path:
    """Copy a checkout's code to `folder` in the shape of the installed package."""
    package = folder / "ddim_schedulers"
    shutil.copytree(tree / "ddim_schedulers", package)
    for room in ROOMS:
        shutil.copytree(tree / room, package / room)
    return folder


def checked_out(revision: str, folder: Path) -> Path:
    """Unpack a revision of this repository."""
    command = ["git", "-C", str(ROOT), "archive", revision]
    archive = subprocess.run(command, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def run(package: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in `cwd` with `package` in front of whatever is installed."""
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *words], env=environment, cwd=cwd, capture_output=True, text=True
    )


def flags(verb: str) -> list[list[str]]:
    """Return the options of a verb: names, type, default, choices; runs in the child process."""
    from ddim_schedulers.training import cli

    found: list[list[str]] = []

    def tell(parser: argparse.ArgumentParser, *_: object) -> None:
        if parser.prog != cli.PROG:
            for action in parser._actions:
                kind = getattr(action.type, "__name__", str(action.type))
                told = (action.option_strings, kind, action.default, action.choices, action.nargs)
                found.append([str(part) for part in (*told, action.required)])
            raise SystemExit

    real = argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_known_args = lambda self, *a: tell(self) or real(self, *a)
    try:
        cli.main([verb, "--help"])  # without a word some verbs only show their help
    except SystemExit:
        pass
    return found


def child() -> dict:
    """Return what needs no folder: hashes of steps, and the flags of every verb."""
    sys.path.insert(0, str(PROOFS))
    import same_bits

    from ddim_schedulers.training import cli

    return {"steps": same_bits.digests(), "flags": {verb: flags(verb) for verb in cli.VERBS}}


def settled(value: object, name: str = "") -> object:
    """Return a JSON value without what differs from run to run."""
    if PASSING.search(name):
        return "..."
    if isinstance(value, dict):
        return {k: settled(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [settled(v, name) for v in value]
    return value


def contents(folder: Path) -> dict[str, object]:
    """Return every file below `folder`: JSON and text as they are, other files by their hash."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or any(part in name for part in LEFT_OUT):
            continue
        if path.suffix == ".json":
            found[name] = settled(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            found[name] = [settled(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix in (".yaml", ".md", ".txt"):
            found[name] = [NUMBER.sub("#", line) for line in path.read_text().splitlines()]
        elif path.suffix in (".safetensors", ".npz", ".npy"):
            found[name] = hashed_arrays(path)
        else:  # pictures hold versions of what drew them
            found[name] = path.suffix
    return found


def hashed_arrays(path: Path) -> dict[str, str]:
    """Return a hash of each array in a file; an archive's own bytes hold times."""
    import numpy as np
    from safetensors.numpy import load_file

    arrays = load_file(path) if path.suffix == ".safetensors" else np.load(path)
    arrays = {"": arrays} if isinstance(arrays, np.ndarray) else arrays
    return {
        name: f"{arrays[name].dtype} {arrays[name].shape} "
        + hashlib.sha256(np.ascontiguousarray(arrays[name]).tobytes()).hexdigest()[:12]
        for name in arrays
    }


def behaviour(package: Path, cwd: Path, start: Path | None) -> dict[str, object]:
    """Do all the work with one package; `start` holds runs of the other one to go on from."""
    cwd.mkdir()
    (cwd / "unet.json").write_text(json.dumps(UNET))
    (cwd / "evaluation.yaml").write_text(EVALUATION)
    done = run(package, cwd, str(Path(__file__).resolve()), "--child")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])  # a verb may print its help before
    assert Path(told.pop("from")).is_relative_to(package)
    outcome: dict[str, object] = {**told}

    def verb(name: str, words: list[str]) -> None:
        done = run(package, cwd, "-m", "ddim_schedulers.training.cli", *words)
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        outcome[f"exit of {name}"] = [done.returncode, *errors]

    for name, more in RUNS.items():
        settings = {**COMMON, **more, "output_dir": f"runs/{name}"}
        words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
        verb(f"train {name}", ["train", *words, "--stop_after", "4"])
        verb(f"train {name} on", ["train", *words, "--resume", "latest"])
        if start is not None:  # what the earlier revision began is gone on with, too
            shutil.copytree(start / "runs" / name, cwd / "older" / name)
            for path in (cwd / "older" / name / "checkpoints").glob("*6"):
                shutil.rmtree(path)
            words[-1] = f"older/{name}"
            verb(
                f"train {name} of the earlier revision on", ["train", *words, "--resume", "latest"]
            )
            now, before = (
                contents(cwd / where / name)["pipeline/unet/diffusion_pytorch_model.safetensors"]
                for where in ("runs", "older")
            )
            outcome[f"weights of {name} of the earlier revision"] = [now == before]
            shutil.rmtree(cwd / "older")
    for name, words in VERBS.items():
        verb(name, words)
    outcome["files"] = contents(cwd)
    return outcome


def differences(before: object, now: object, name: str = "") -> list[str]:
    """Name every place where two JSON values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = [f"{name}: only before: {k}" for k in before if k not in now]
        found += [f"{name}: only now: {k}" for k in now if k not in before]
        for key in before:
            if key in now:
                found += differences(before[key], now[key], f"{name}/{key}")
        return found
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [d for i, (b, n) in pairs for d in differences(b, n, f"{name}[{i}]")]
    return [] if before == now else [f"{name}: {str(before)[:200]} -> {str(now)[:200]}"]


def main() -> int:
    """Compare two revisions, or tell of this process's package."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--before", help="a git revision")
    options.add_argument("--keep", type=Path, help="an empty folder for all that is written")
    options.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.child:
        told = child()
        print(json.dumps({"from": sys.modules["ddim_schedulers"].__file__, **told}))
        return 0
    work = Path(args.keep or tempfile.mkdtemp())
    for name in ("tree", "before", "now"):
        (work / name).mkdir(parents=True)
    before = laid_out(checked_out(args.before, work / "tree"), work / "before")
    now = laid_out(ROOT, work / "now")
    outcomes = [behaviour(before, work / "work-before", None)]
    outcomes.append(behaviour(now, work / "work-now", work / "work-before"))
    of_both = [{k: v for k, v in o.items() if "earlier revision" not in k} for o in outcomes]
    found = differences(*of_both)
    resumed = {k: v for k, v in outcomes[1].items() if "earlier revision" in k}
    found += [f"{k}: {v}" for k, v in resumed.items() if v not in ([0], [True])]
    failed = [f"{k}: {v}" for k, v in outcomes[0].items() if k.startswith("exit") and v != [0]]
    cells, verbs = len(outcomes[0]["steps"]), len(outcomes[0]["flags"])
    files = len(outcomes[0]["files"])
    print(
        f"{cells} steps, {verbs} verbs with flags, {files} files, {len(resumed)} resumed: ", end=""
    )
    print(f"{len(found)} differences", *found, sep="\n")
    if failed:
        print("failed in both or before:", *failed, sep="\n")
    if not args.keep:
        shutil.rmtree(work)
    return 1 if found or failed else 0


if __name__ == "__main__":
    sys.exit(main())
