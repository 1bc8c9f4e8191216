"""`ddim-schedulers push`: share a saved pipeline or a Space on the Hub."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ddim_schedulers.forms import FORMS

HELP = "Share a saved pipeline, or a Space of the playground, on the Hugging Face Hub."
RENAMED = {"form": "--form", "pipeline_dir": "--pipeline"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; none takes the token, because the shell's history would keep it."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pipeline", help="folder of the saved pipeline")
    what.add_argument("--space", help="folder that `app --export_space` wrote")
    parser.add_argument("--repo_id", required=True, help="USER/NAME, created where missing")
    parser.add_argument(
        "--form",
        choices=FORMS,
        help="who can load it: anyone (portable), who has this package (plug-in), or anyone who "
        "trusts the code in the repository (self-contained); portable if not given",
    )
    parser.add_argument("--private", action="store_true", help="create it as private")
    parser.add_argument("--revision", help="branch, created where missing; main if not given")
    parser.add_argument("--message", help="first line of the commit (Upload pipeline, or Space)")
    parser.add_argument(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="print the files and the card that would be pushed; nothing is sent",
    )


def run(args: argparse.Namespace) -> int:
    """Push; 0 when it is done, 1 when the Hub refuses or cannot be reached."""
    from ddim_schedulers.training.networks.places import pipeline_folder
    from ddim_schedulers.training.sharing import hub, spaces

    options = {"private": args.private, "revision": args.revision}
    named = {} if args.message is None else {"message": args.message}
    push: Callable[..., str]
    kept: dict[str, Any]
    if args.space is None:
        folder = pipeline_folder(args.pipeline, "--pipeline", on_hub=False)
        form = "portable" if args.form is None else args.form
        push, kept = partial(hub.push_pipeline, form=form), {"form": form}
    elif args.form is None:
        folder, push = args.space, spaces.push_space
        kept = {"option": "--space", "form": None}
    else:
        raise ValueError(f"`--form` is {args.form!r}; it must be left out with --space.")
    if args.dry_run:
        if args.space is None:
            _show(hub.contents_of_push(folder, args.repo_id, form))
        else:
            _show(hub.contents(spaces.space_files(folder), hub.SPACE, args.repo_id))
        return 0
    try:
        url = push(folder, args.repo_id, **options, **named)
    except hub.PushError as error:
        print(f"ddim-schedulers push: {error}", file=sys.stderr)
        print("To push it again:", file=sys.stderr)
        print(f"  {hub.repeat_command(folder, args.repo_id, **options, **kept)}", file=sys.stderr)
        return 1
    print(url)
    return 0


def _show(files: dict[str, Path | bytes]) -> None:
    """Print names and sizes, and the card."""
    for path, content in sorted(files.items()):
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        print(f"{size:>12,} bytes  {path}")
    card = files["README.md"]
    text = card if isinstance(card, bytes) else card.read_bytes()
    print(f"\n{text.decode()}\nNothing was sent.")
