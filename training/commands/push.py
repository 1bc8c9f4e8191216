"""`ddim-schedulers push`: share a saved pipeline on the Hub."""

import argparse
import sys

from ddim_schedulers.forms import FORMS

HELP = "Share a saved pipeline on the Hugging Face Hub."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; none takes the token, because the shell's history would keep it."""
    parser.add_argument("--pipeline", required=True, help="folder of the saved pipeline")
    parser.add_argument("--repo_id", required=True, help="USER/NAME, created where missing")
    parser.add_argument(
        "--form",
        choices=FORMS,
        default="portable",
        help="who can load it: anyone (portable), who has this package (plug-in), or anyone who "
        "trusts the code in the repository (self-contained); portable if not given",
    )
    parser.add_argument("--private", action="store_true", help="create it as private")
    parser.add_argument("--revision", help="branch, created where missing; main if not given")
    parser.add_argument(
        "--message", default="Upload pipeline", help="first line of the commit (Upload pipeline)"
    )


def run(args: argparse.Namespace) -> int:
    """Push; 0 when it is done, 1 when the Hub refuses or cannot be reached."""
    from ddim_schedulers.training.networks.places import pipeline_folder
    from ddim_schedulers.training.sharing import hub

    args.pipeline = pipeline_folder(args.pipeline, "--pipeline", on_hub=False)
    options = {"form": args.form, "private": args.private, "revision": args.revision}
    try:
        url = hub.push_pipeline(args.pipeline, args.repo_id, message=args.message, **options)
    except hub.PushError as error:
        print(f"ddim-schedulers push: {error}", file=sys.stderr)
        print("To push it again:", file=sys.stderr)
        print(f"  {hub.repeat_command(args.pipeline, args.repo_id, **options)}", file=sys.stderr)
        return 1
    print(url)
    return 0
