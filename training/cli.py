"""The `ddim-schedulers` command line: finds the verb, runs it, reports bad input in one line.

This module imports nothing of the package by itself: the console script runs its file alone
(`ddim_schedulers_cli`), so that `--help` needs no torch.

A verb is a module `ddim_schedulers.training.commands.<verb>` (with _ for -), imported only when it
is chosen. It defines

- `HELP`: one sentence, the same as in `VERBS` (so that listing the verbs imports none of them), and
- either `add_arguments(parser)` and `run(args) -> int`,
- or, for a verb in `OWN_PARSER`, `main(argv) -> int`, which is given all that follows the verb.

`RENAMED`, where it defines one, tells how messages call an argument of the library that an option
of another name sets.
"""

import argparse
import difflib
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
import traceback

PROG = "ddim-schedulers"
TRACEBACK_VARIABLE = "DDIM_SCHEDULERS_TRACEBACK"

# In the order of a project: look, train, use, measure, share.
VERBS: dict[str, str] = {
    "demo": "Train a small model on embedded digits and sample it with every member of the family.",
    "train": "Train a UNet2DModel on your images, with or without classes.",
    "train-classifier": "Train a classifier of noisy images, which guides a network that knows no "
    "classes.",
    "sample": "Sample images into a folder; continues where it was stopped, on any number of "
    "processes.",
    "reconstruct": "Encode images to latents with DDIM, decode them again and report the error.",
    "interpolate": "Interpolate between seeds or images: a chain, a four-corner grid, or DDPM's "
    "own way.",
    "restore": "Restore images from what was measured of them: holes, fewer pixels, blur, grey.",
    "app": "Open a playground for a pipeline in the browser, or write it as a Hugging Face Space.",
    "likelihood": "Compute a pipeline's bits per dimension, term by term.",
    "calibrate": "Measure a pipeline for the optimal noise and trajectory, or fit a sampler to it.",
    "evaluate": "Measure samples of any scheduler, eta and number of steps against real images; "
    "resumable.",
    "export": "Make a pipeline's folder of a run, a checkpoint, or a pipeline in another form.",
    "convert": "Turn a PyTorch DDPM checkpoint (pesser/pytorch_diffusion, DDIM) into a pipeline.",
    "push": "Share a saved pipeline, or a Space of the playground, on the Hugging Face Hub.",
}
OWN_PARSER: frozenset[str] = frozenset({"train"})

WITHOUT_ARGUMENTS = {
    "app",
    "demo",
}  # these run; any other verb shows its help where no word follows

# The modules that each extra brings, by the name under which they are imported.
EXTRAS: dict[str, tuple[str, ...]] = {
    "train": (
        "accelerate",
        "datasets",
        "PIL",
        "torchmetrics",
        "tqdm",
        "transformers",
        "yaml",
    ),
    "plots": ("matplotlib",),
    "tensorboard": ("tensorboard",),
    "demo": ("scipy", "sklearn"),
    "app": ("gradio",),
    "inception": ("torch_fidelity",),
}


def main(argv: list[str] | None = None) -> int:
    """Run the verb that `argv` names.

    Args:
        argv: the arguments without the program's name; None takes them from `sys.argv`.

    Returns:
        The exit code: 0 done, 1 refused by the operating system, 2 bad input or a missing extra,
        130 interrupted, or the verb's own.

    Raises:
        SystemExit: as in argparse: 0 from `--help` and `--version`, 2 from wrong arguments.
        Exception: what the verb raised, unless it is bad input (`ValueError`), a missing extra or
            an error of the operating system.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        _parser().print_help()
        return 0
    # No option before the verb takes a value, so the verb is the first word without a dash.
    end = next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv)) + 1
    parser = _parser()
    _check_flags(parser, argv[:end])
    args = parser.parse_args(argv[:end])
    show_traceback = args.traceback or os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0")
    bare = not argv[end:] and args.verb not in WITHOUT_ARGUMENTS
    asks = bare or not {"-h", "--help"}.isdisjoint(argv[end:])
    helps = asks and _without_package()
    try:
        return _run(args.verb, argv[end:])
    except KeyboardInterrupt:
        print(f"{PROG} {args.verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        message = _message(args.verb, error)
        if message is None:
            raise
        if show_traceback:
            traceback.print_exc()
        print(message, file=sys.stderr)
        return 2 if isinstance(error, ModuleNotFoundError | ValueError) else 1
    finally:
        if "torch.distributed" in sys.modules and not helps:
            from ddim_schedulers.training.common.processes import leave_group

            leave_group()


def _parser() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {verb:<16} {text}" for verb, text in VERBS.items())
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage=f"{PROG} [--version] [--traceback] VERB ...",
        description="Train, sample and evaluate DDPM and DDIM models.",
        epilog=f"verbs (`{PROG} VERB --help` says more):\n{verbs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {_version()}")
    parser.add_argument(
        "--traceback",
        action="store_true",
        help=f"show where bad input was found; also {TRACEBACK_VARIABLE}=1",
    )
    parser.add_argument("verb", metavar="VERB", choices=tuple(VERBS), help="what to do, see below")
    return parser


def _check_flags(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Name the nearest flag where there is none; `flags.spelled` would import torch."""
    known = parser._option_string_actions
    for word in words:
        if word.startswith("--") and word not in known:
            near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
            end = f"did you mean {near[0]}?" if near else "see --help for all"
            parser.error(f"unknown flag {word}; {end}")


def _version() -> str:
    try:
        return importlib.metadata.version(PROG)
    except importlib.metadata.PackageNotFoundError:  # a clone that nobody installed
        from ddim_schedulers import __version__

        return __version__


def module_of(verb: str) -> str:
    """Return the full name of the module of a verb."""
    return f"ddim_schedulers.training.commands.{verb.replace('-', '_')}"


def _run(verb: str, argv: list[str]) -> int:
    from ddim_schedulers.training.common.flags import spelled

    module = importlib.import_module(module_of(verb))
    if verb in OWN_PARSER:
        return int(module.main(argv or ["--help"]))
    parser = argparse.ArgumentParser(
        prog=f"{PROG} {verb}", description=module.HELP, allow_abbrev=False
    )
    module.add_arguments(parser)
    if not argv and any(action.required for action in parser._actions):
        parser.print_help()
        return 2
    return int(module.run(parser.parse_args(spelled(parser, argv))))


def _without_package() -> bool:
    """Let a parser be imported whose package is not: for help, where nothing is run.

    Importing `ddim_schedulers` imports torch and diffusers, which takes seconds.

    Returns:
        Whether the package is left out; not where it was imported before.
    """
    if (imported := sys.modules.get("ddim_schedulers")) is not None:
        return not hasattr(imported, "__version__")
    spec = importlib.util.find_spec("ddim_schedulers")  # finds the package, does not import it
    assert spec is not None and spec.submodule_search_locations is not None
    package = importlib.util.module_from_spec(spec)
    root = pathlib.Path(spec.submodule_search_locations[0]).parent
    if (root / "pyproject.toml").exists():  # a clone, see `ddim_schedulers/__init__.py`
        package.__path__.append(str(root))
    sys.modules["ddim_schedulers"] = package
    return True


def _message(verb: str, error: Exception) -> str | None:
    """Return what to tell the user; None for an error that is not theirs to mend."""
    from ddim_schedulers.training.common.failures import sentence
    from ddim_schedulers.training.common.flags import renamed

    if isinstance(error, ValueError):
        names = getattr(sys.modules.get(module_of(verb)), "RENAMED", {})
        return f"{PROG} {verb}: error: {renamed(str(error), names)}"
    if (said := sentence(error)) is not None:
        return f"{PROG} {verb}: error: {said}"
    if not isinstance(error, ModuleNotFoundError):
        return None
    root = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if root in modules:
            extra = "demo" if verb == "demo" else extra  # it brings the others
            return f"`{PROG} {verb}` needs the extra '{extra}': pip install \"{PROG}[{extra}]\""
    return None


if __name__ == "__main__":
    sys.exit(main())
