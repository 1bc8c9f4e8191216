"""What guidance costs: a guided prediction against one network call with a doubled batch.

python tests/benchmarks/bench_guidance.py --json guidance.json [--device cuda] [--cpu_time]

The network has 1.1 M random parameters and 11 classes, the batch 64 images. The aim is a median
ratio of at most 1.05.
"""

import copy
import time

import torch
from diffusers import UNet2DModel
from pairing import clock_of, paired, parser, report

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.class_labels import note_class_labels
from ddim_schedulers.pipelines import Conditions
from ddim_schedulers.pipelines.conditions import BoundConditions
from ddim_schedulers.pipelines.sampling import predict

BATCH = 64


def network():
    """Returns a UNet of 1.1 M random parameters for 32x32 grey images of ten classes."""
    unet = UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        num_class_embeds=11,
    ).eval()
    note_class_labels(unet, 10)
    return unet


@torch.no_grad()
def main():
    """Runs every case."""
    options = parser(__doc__)
    options.add_argument("--device", default="cpu")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    unet = network().to(device)
    guide, scheduler = copy.deepcopy(unet), GeneralizedDDIMScheduler()
    x, t = torch.randn(BATCH, 1, 32, 32, device=device), torch.tensor(500, device=device)
    labels = [i % 10 for i in range(BATCH)]
    twice = torch.cat([x, x])
    both = torch.tensor([10] * BATCH + labels, device=device)
    one = both[BATCH:]

    def waited(call):
        def run():
            call()
            if device.type != "cpu":
                torch.accelerator.synchronize()

        return run

    def asked(**settings):
        conditions = Conditions(labels, **settings)
        bound = BoundConditions(conditions, unet, scheduler, BATCH, device).of(0, BATCH)
        return lambda: predict(bound, x, t)

    doubled = lambda: unet(twice, t, class_labels=both).sample  # noqa: E731
    single = lambda: unet(x, t, class_labels=one).sample  # noqa: E731
    cases = {
        "classifier-free, against a doubled batch": (asked(guidance_scale=2.0), doubled),
        "with rescale": (asked(guidance_scale=2.0, guidance_rescale=0.7), doubled),
        "with an interval": (asked(guidance_scale=2.0, guidance_interval=[0.2, 0.8]), doubled),
        "auto guidance, against two calls": (
            asked(guidance_scale=2.0, guide=guide),
            lambda: (single(), single()),
        ),
        "w = 1, against one call": (asked(guidance_scale=1.0), single),
    }
    clock = clock_of(args) if device.type == "cpu" else time.perf_counter
    rows = []
    for name, (ours, theirs) in cases.items():
        row = paired(waited(ours), waited(theirs), args.repeats, clock=clock)
        rows.append({"labels": ["case"], "case": name, **row})
    report(rows, args.json)


if __name__ == "__main__":
    main()
