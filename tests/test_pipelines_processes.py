"""Two real processes make the images that one makes, for every member of the family."""

from pathlib import Path

import torch

# Run by each process; prints nothing, saves its share.
SCRIPT = """
import os, sys, torch
torch.set_num_threads(1)
from diffusers import UNet2DModel
from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler
from ddim_schedulers.pipelines import GenerationPipeline
from ddim_schedulers.pipelines.base import chunks
from ddim_schedulers.pipelines.sampling_job import process_of

MEMBERS = {
    "eta 0": GeneralizedDDIMScheduler(eta=0.0),
    "eta 1": GeneralizedDDIMScheduler(eta=1.0),
    "sigma-hat": GeneralizedDDIMScheduler(eta=1.0, reverse_variance="sigma_hat"),
    "ddpm": MarkovianDDPMScheduler(),
}

def network(dtype):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1,
    ).to(dtype)

def share(rank, size, batch_size):
    found = {}
    for dtype in (torch.float32, torch.float64):
        for name, scheduler in MEMBERS.items():
            for scale in (0.0, 1.0):
                unet = network(dtype)
                if scale == 0.0:
                    # a last layer of zeros: eps = 0, and what is left of a sample is its noise
                    torch.nn.init.zeros_(unet.conv_out.weight)
                    torch.nn.init.zeros_(unet.conv_out.bias)
                pipe = GenerationPipeline(unet=unet, scheduler=type(scheduler).from_config(
                    scheduler.config, clip_sample=scale != 0.0))
                pipe.set_progress_bar_config(disable=True)
                for start, stop in chunks(16, batch_size)[rank::size]:
                    found[name, str(dtype), scale, start, stop] = pipe(
                        seeds=range(start, stop), num_inference_steps=4, output_type="latent"
                    ).images
    return found

if __name__ == "__main__":
    rank, size = process_of()
    torch.save({"size": size, "pid": os.getpid(), "images": share(rank, size, 3)},
               f"{sys.argv[1]}/{rank}.pt")
"""


def whole(found):
    """{(member, dtype, scale): images 0 .. 15}."""
    kinds = dict.fromkeys(key[:3] for key in found)
    return {
        kind: torch.cat([found[k] for k in sorted(found, key=lambda k: k[3]) if k[:3] == kind])
        for kind in kinds
    }


def test_two_processes_make_the_images_of_one(tmp_path, processes):
    script = tmp_path / "share.py"
    script.write_text(SCRIPT)
    processes([script, tmp_path], 2, tmp_path)
    saved = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1)]
    assert [s["size"] for s in saved] == [2, 2] and saved[0]["pid"] != saved[1]["pid"]
    assert all(s["images"] for s in saved)
    two = whole({**saved[0]["images"], **saved[1]["images"]})

    namespace = {"__name__": "share"}
    exec(compile(Path(script).read_text(), str(script), "exec"), namespace)
    one = whole(namespace["share"](0, 1, 16))
    assert two.keys() == one.keys() and len(one) == 16
    for kind, images in one.items():
        assert len(images) == len(two[kind]) == 16
        difference = float((images - two[kind]).abs().max())
        bound = 0.0 if kind[2] == 0.0 else {"torch.float32": 1e-4, "torch.float64": 1e-10}[kind[1]]
        assert difference <= bound, (kind, difference)


def test_other_seeds_are_caught_by_the_same_comparison():
    wrong = SCRIPT.replace("range(start, stop)", "range(stop - start)")
    namespace = {"__name__": "share"}
    exec(compile(wrong, "share", "exec"), namespace)
    namespace["MEMBERS"] = {"ddpm": namespace["MEMBERS"]["ddpm"]}
    found = [whole(namespace["share"](0, 1, b))["ddpm", "torch.float32", 0.0] for b in (3, 16)]
    assert not torch.equal(*found)
