"""The names of the forms in which a pipeline is shared, see `export`; the command line lists them.

This module needs no torch, so that `--help` is quick.
"""

FORMS = ("portable", "plug-in", "self-contained")


def check_form(form: str) -> str:
    """Return `form` if it is one of `FORMS`.

    Raises:
        ValueError: otherwise.
    """
    if form not in FORMS:
        raise ValueError(f"`form` is {form!r}; it must be one of {FORMS}.")
    return form
