"""Is an unconditional model from before there were classes the same today, to the bit?

    python tests/proofs/old_runs.py --before 1514bdf

Takes a revision out of git into a folder of its own (1514bdf is the last one without classes) and
starts it in a process of its own. There a run on the digits is stopped half way; then both
revisions go on from a copy of the same checkpoint, each in a new process, and both sample the
pipeline that the earlier one saved. Weights, average, moments and images must be equal.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS, HALF = 12, 6
UNET = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "dropout": 0.1,
}


def train(folder: str, session: str) -> dict:
    """Trains to the end, or for a session of so many steps; finds nothing."""
    from ddim_schedulers.training import train as training

    flags = {
        "output_dir": folder,
        "model": Path(folder).parent / "unet.json",
        "max_train_steps": STEPS,
        "batch_size": 16,
        "checkpoint_every": HALF,
        "log_every": 1,
        "lr_schedule": "cosine",
        "random_flip": "true",
        "cpu": "true",
        "progress_bar": "false",
        "resume": "latest",
    }
    if session != "all":
        flags["stop_after"] = session
    words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    assert training.main(words) == 0
    return {}


def sample(folder: str) -> dict:
    """Returns a hash of the images of each sampler."""
    from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler
    from ddim_schedulers.pipelines import GenerationPipeline

    pipe = GenerationPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    config, found = pipe.scheduler.config, {}
    for name, scheduler in {
        "saved": pipe.scheduler,
        "eta 0.5": GeneralizedDDIMScheduler.from_config(config, eta=0.5),
        "order 2": GeneralizedDDIMScheduler.from_config(config, solver_order=2),
        "DDPM": MarkovianDDPMScheduler.from_config(config),
    }.items():
        pipe.scheduler = scheduler
        images = pipe(seeds=range(4), num_inference_steps=5, output_type="latent").images
        found[name] = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    return found


def tensors(folder: Path) -> dict[str, str]:
    """Returns a hash of every tensor in the last checkpoint and the pipeline of a run."""
    from safetensors.numpy import load_file

    places = [folder / "checkpoints" / f"step-{STEPS:08d}", folder / "pipeline"]
    places = [place for place in places if place.is_dir()]
    files = [path for place in places for path in sorted(place.rglob("*.safetensors"))]
    return {
        f"{path.relative_to(folder)}: {name}": hashlib.sha256(value.tobytes()).hexdigest()
        for path in files
        for name, value in load_file(path).items()
    }


def child(root: Path, *words: str) -> dict:
    """Runs a task of this file on the package of a folder; returns what it found."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    said = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--task", *words],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    found = json.loads(said.splitlines()[-1])
    assert Path(found.pop("package")).is_relative_to(root), found
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", default="1514bdf", help="revision of the run")
    parser.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        import ddim_schedulers

        task, *words = args.task
        found = {"train": train, "sample": sample}[task](*words)
        print(json.dumps({"package": ddim_schedulers.__file__, **found}))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve()
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", home / "before", args.before], check=True)
        try:
            return compare(home, {"before": home / "before", "now": ROOT.resolve()})
        finally:
            subprocess.run([*git, "remove", "--force", home / "before"], check=True)


def compare(home: Path, roots: dict[str, Path]) -> int:
    """Prints what is equal; 0 when all is."""
    (home / "unet.json").write_text(json.dumps(UNET))
    child(roots["before"], "train", str(home / "half"), str(HALF))
    for name, root in roots.items():
        shutil.copytree(home / "half", home / f"run {name}")
        child(root, "train", str(home / f"run {name}"), "all")
    weights = [tensors(home / f"run {name}") for name in roots]
    pipeline = str(home / "run before" / "pipeline")
    images = [child(root, "sample", pipeline) for root in roots.values()]
    worst = 0
    for what, (before, now) in {"tensors of a resumed run": weights, "samplers": images}.items():
        apart = [key for key in before if before[key] != now.get(key)]
        print(f"{what}: {len(before)} compared, {len(apart)} differ {apart[:5]}")
        worst = max(worst, len(apart), not before)
    return int(worst > 0)


if __name__ == "__main__":
    sys.exit(main())
