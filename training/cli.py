"""The `ddim-schedulers` command line."""


def main(argv: list[str] | None = None) -> int:
    """Run the verb that `argv` names."""
    raise SystemExit("not there yet")
