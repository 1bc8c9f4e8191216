"""Peak memory of generating 64 and 10,000 images with `batch_size=64`, each in a process of its
own.

    python tests/proofs/memory.py

Prints the peak resident memory beside the size of the output: 32x32 grey float32, or files.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.pipelines import GenerationPipeline
from ddim_schedulers.pipelines.sampling_job import SamplingJob, sample_to_directory

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import tiny_unet


def run(kind: str, num_images: int) -> None:
    """Generate with a tiny network and print the peak memory in MiB."""
    torch.set_num_threads(1)
    pipe = GenerationPipeline(
        unet=tiny_unet(size=32, blocks=(8, 8)), scheduler=GeneralizedDDIMScheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    output_mib = 0.0
    if kind == "memory":
        images = pipe(
            seeds=range(num_images), batch_size=64, num_inference_steps=2, output_type="np"
        ).images
        output_mib = images.nbytes / 2**20
    else:
        with tempfile.TemporaryDirectory() as folder:
            sample_to_directory(pipe, folder, SamplingJob(num_images, 64, num_inference_steps=2))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{kind:7} {num_images:6} images: peak {peak:7.1f} MiB, output {output_mib:5.1f} MiB")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        run(sys.argv[1], int(sys.argv[2]))
    else:
        for kind in ("memory", "folder"):
            for count in (64, 10_000):
                subprocess.run([sys.executable, __file__, kind, str(count)], check=True)
