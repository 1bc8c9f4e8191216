"""Time of one scheduler step, ours against stock diffusers in the same run.

python tests/benchmarks/bench_step.py --json step.json
"""

import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
)
from pairing import clock_of, paired, parser, report

from ddim_schedulers import (
    GeneralizedDDIMInverseScheduler,
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
)

SHAPES = {(1, 4, 64, 64): 300, (4, 3, 32, 32): 300, (16, 3, 256, 256): 4}


def cases(shape, dtype):
    """Yields (label, a step of ours, a step of stock), both walking through plans of 50."""
    x, m, noise = (torch.randn(shape).to(dtype) for _ in range(3))
    for eta in (0.0, 1.0):
        ours, stock = GeneralizedDDIMScheduler(), DDIMScheduler()
        yield f"DDIM eta {eta:g}", walk(ours, m, x, eta=eta), walk(stock, m, x, eta=eta)
    # the noise given: what is left is the step itself, without drawing a Gaussian of its size
    given = {"eta": 1.0, "variance_noise": noise}
    ours, stock = GeneralizedDDIMScheduler(), DDIMScheduler()
    yield "DDIM eta 1, noise given", walk(ours, m, x, **given), walk(stock, m, x, **given)
    ours, stock = MarkovianDDPMScheduler(), DDPMScheduler()
    yield "DDPM", walk(ours, m, x), walk(stock, m, x)
    ours, stock = GeneralizedDDIMInverseScheduler(), DDIMInverseScheduler()
    yield "DDIM inverse", walk(ours, m, x), walk(stock, m, x)
    # orders above 1 against the multistep solver that people use
    for order in (2, 3):
        ours = GeneralizedDDIMScheduler(solver_order=order, clip_sample=False)
        stock = DPMSolverMultistepScheduler(solver_order=order)
        yield f"order {order} against DPM-Solver++", walk(ours, m, x), walk(stock, m, x)


def walk(scheduler, model_output, sample, **arguments):
    """Returns a call that takes the next step of a plan of 50, and plans anew at its end."""
    left = []

    def call():
        if not left:
            scheduler.set_timesteps(50)
            left.extend(scheduler.timesteps.flip(0))
        scheduler.step(model_output, left.pop(), sample, **arguments)

    return call


def main():
    """Runs every case."""
    args = parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape, inner in SHAPES.items():
            for label, ours, theirs in cases(shape, dtype):
                figures = paired(ours, theirs, args.repeats, inner, clock_of(args))
                name = str(dtype).removeprefix("torch.")
                rows.append({"step": label, "shape": list(shape), "dtype": name, **figures})
                rows[-1]["labels"] = ["step", "shape", "dtype"]
                report(rows[-1:], None)
    if args.json:
        report(rows, args.json)


if __name__ == "__main__":
    main()
