"""How well are pictures of Stable Diffusion and SDXL inverted? Tiny random networks.

    python tests/proofs/text_inversion.py

Encodes two sets of latents with `invert`, decodes them with the same pipeline and prints the mean
squared error of the latents, the largest residual and how many of the two converged, for several
numbers of steps and of refinements, guidance scales, Anderson's method, spacings and dtypes. The
error of the VAE, which no inversion changes, is printed beside it.
"""

import logging
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.filterwarnings("ignore")

import test_swap_pipelines as tiny  # noqa: E402

from ddim_schedulers.pipelines import invert  # noqa: E402

ROWS = [
    # steps, guidance, refinements, mixing, settings of the scheduler
    (50, 1.0, 0, 0, {}),
    (50, 1.0, 10, 0, {}),
    (20, 1.0, 10, 0, {}),
    (20, 1.0, 40, 0, {}),
    (10, 1.0, 10, 0, {}),
    (10, 1.0, 40, 0, {}),
    (10, 1.0, 20, 4, {}),
    (20, 1.0, 40, 0, {"timestep_spacing": "trailing"}),
    (20, 1.0, 20, 4, {"timestep_spacing": "trailing"}),
    (50, 7.5, 10, 0, {}),
    (50, 7.5, 20, 4, {}),
    (20, 7.5, 40, 0, {}),
    (20, 7.5, 40, 4, {}),
    (10, 7.5, 40, 0, {}),
    (10, 7.5, 40, 4, {}),
]
KINDS = {"Stable Diffusion": tiny.with_eta, "SDXL": tiny.sdxl}


def measure(case, dtype, steps, scale, refinements, mixing, settings):
    """Returns the cells of a row: error, largest residual, pictures that converged."""
    pipe, call = tiny.build(case, dtype)
    tiny.swap(pipe, **settings)
    guided = scale > 1
    call = {k: v for k, v in call.items() if k.endswith("embeds")}
    call = {k: v.repeat_interleave(2, dim=0) for k, v in call.items() if guided or "neg" not in k}
    noise = torch.Generator().manual_seed(5)
    x_0 = torch.randn(2, 4, tiny.SIZE, tiny.SIZE, generator=noise)
    found = invert(
        pipe,
        latents=x_0,
        num_inference_steps=steps,
        guidance_scale=scale,
        refinements=refinements,
        mixing=mixing,
        **call,
    )
    again = pipe(
        **call,
        latents=found.latents,
        num_inference_steps=steps,
        guidance_scale=scale,
        output_type="latent",
    ).images
    error = float((again.float() - found.start.float()).square().mean())
    if found.residual is None:
        return f"{error:.1e}", "", ""
    worst, converged = float(found.residual.max()), int(found.converged.sum())
    return f"{error:.1e}", f"{worst:.1e}", f"{converged} of 2"


def main():
    """Prints the tables."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    heads = ("network", "dtype", "S", "guidance", "refinements", "mixing", "spacing")
    heads += ("error", "residual", "converged")
    print("|", " | ".join(heads), "|\n|" + "---|" * len(heads))
    for kind, case in KINDS.items():
        rows = [(torch.float32, *row) for row in ROWS]
        rows += [(dtype, *ROWS[i]) for dtype in (torch.float16, torch.bfloat16) for i in (1, 4)]
        for dtype, steps, scale, refinements, mixing, settings in rows:
            spacing = settings.get("timestep_spacing", "leading")
            cells = measure(case, dtype, steps, scale, refinements, mixing, settings)
            name = str(dtype).removeprefix("torch.")
            told = (kind, name, steps, scale, refinements, mixing, spacing, *cells)
            print("|", " | ".join(map(str, told)), "|", flush=True)
    for kind, case in KINDS.items():
        vae = tiny.build(case)[0].vae
        x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(6)) * 2 - 1
        with torch.no_grad():
            error = (vae.decode(vae.encode(x).latent_dist.mode()).sample - x).square().mean()
        print(f"VAE of {kind}, random weights and pictures: {float(error):.2f}")


if __name__ == "__main__":
    main()
