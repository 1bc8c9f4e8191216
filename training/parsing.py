"""Settings from files and flags: one parser, one set of converters, no abbreviations."""

import argparse
import dataclasses
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ddim_schedulers.plain_files import DamagedFileError, read_json, read_yaml
from ddim_schedulers.training.common.flags import nearest, spelled
from ddim_schedulers.training.config import GROUPS, TrainingConfig, names_code


def load_config(
    path: str | Path | None = None, trust_code: bool = False, **overrides: Any
) -> TrainingConfig:
    """Return the settings of a YAML or JSON file with `overrides` (flat field names) on top.

    Args:
        path: the file.
        trust_code: whether the file may name code to import; a call always may.
        **overrides: values that win over the file's.

    Raises:
        ValueError: an unknown key (the nearest valid one is named), a value of the wrong type, or
            a file that names code to import or a push that the call does not ask for.
    """
    parser = _parser("ddim-schedulers train")
    values = _converted(parser, read_file(Path(path)), str(path)) if path is not None else {}
    given = _converted(parser, overrides, "the call")
    _check_trusted({k: v for k, v in values.items() if k not in given}, str(path), trust_code)
    return TrainingConfig(**{**values, **given})


def parse_args(argv: list[str], prog: str = "ddim-schedulers train") -> tuple[TrainingConfig, bool]:
    """Return the settings of `--config FILE` and the flags, and whether `--dry_run` is set.

    Raises:
        ValueError: an unknown flag or key (the nearest valid one is named), a value of the wrong
            type or out of bounds.
        SystemExit: after `--help`.
    """
    parser = _parser(prog)
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with any of the fields")
    parser.add_argument(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="print the settings, load a batch, do one step, report parameters, memory and time",
    )
    parser.add_argument(
        "--trust_code",
        action="store_true",
        help="let --config name code to import (feature_space module:Name)",
    )
    argv = spelled(parser, argv)
    path = _config_path(argv)
    if path is not None:
        values = _converted(parser, read_file(Path(path)), path)
        given = {word.partition("=")[0].lstrip("-") for word in argv if word.startswith("--")}
        unsaid = {name: value for name, value in values.items() if name not in given}
        _check_trusted(unsaid, path, "trust_code" in given)
        parser.set_defaults(**values)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(f"`{unknown[0]}` is no flag; a flag must come here")
    values = {name: getattr(namespace, name) for name in _names()}
    values = {name: None if value == [None] else value for name, value in values.items()}
    return TrainingConfig(**values), namespace.dry_run


def _check_trusted(values: dict[str, Any], path: str, trust_code: bool) -> None:
    """Refuse what a file of somebody else must not decide: code that runs here, and an upload."""
    if values.get("push_to_hub"):
        raise ValueError(
            f"`push_to_hub` is true in {path}; it must be asked for on the command line: "
            "--push_to_hub"
        )
    if not trust_code:
        check_no_code([str(values.get("feature_space", ""))], path)


def check_no_code(feature_spaces: list[str], path: str) -> None:
    """Refuse feature spaces that are imported by name.

    Raises:
        ValueError: naming the first of them, the file and the flag.
    """
    for name in feature_spaces:
        if names_code(name):
            raise ValueError(
                f"`feature_space` is {name!r} in {path}, which runs code of the module "
                f"{name.partition(':')[0]!r}; it must be allowed on the command line: --trust_code"
            )


def to_yaml(config: TrainingConfig) -> str:
    """Return the resolved settings, group by group, as a file that can be run again."""
    import yaml

    lines = []
    for group in GROUPS:
        lines.append(f"# {group._argument_group_name}")
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(group)}
        lines.append(yaml.safe_dump(values, sort_keys=False))
    return "\n".join(lines)


def _names() -> list[str]:
    return [field.name for field in dataclasses.fields(TrainingConfig)]


def _nullable() -> set[str]:
    hints = typing.get_type_hints(TrainingConfig)
    return {name for name in _names() if type(None) in typing.get_args(hints[name])}


def _or_null(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Convert by `convert`, and null to None: a flag can take back the value of a file."""

    def converted(word: str) -> Any:
        return None if word == "null" else convert(word)

    converted.__name__ = convert.__name__  # argparse shows it: "invalid float value"
    return converted


def _parser(prog: str) -> argparse.ArgumentParser:
    from transformers.hf_argparser import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:  # the caller decides how bad input is shown
            told = re.fullmatch(r"argument (?P<name>--\w+): (?P<why>.*)", message, re.DOTALL)
            raise ValueError(message if told is None else _refusal(told["name"], told["why"]))

    parser = Parser(
        list(GROUPS),
        prog=prog,
        allow_abbrev=False,
        description="Train a UNet2DModel, with or without classes. Fields of --config are named "
        "alike.",
    )
    nullable = _nullable()
    for action in parser._actions:
        if action.dest in nullable and callable(action.type):
            action.type = _or_null(action.type)
    return parser


def _refusal(name: str, why: str) -> str:
    """Return what argparse says of a value, in the words of our other messages."""
    if told := re.fullmatch(r"invalid choice: (.*?) \(choose from (.*)\)", why):
        return f"`{name}` is {told[1]}; it must be one of {told[2]}"
    if told := re.fullmatch(r"invalid (\w+) value: (.*)", why, re.DOTALL):
        return f"`{name}` is {told[2]}; it must be of the type {told[1]}"
    return f"`{name}` must have another value: {why}"


def _config_path(argv: list[str]) -> str | None:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config")
    try:
        return finder.parse_known_args(argv)[0].config
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error


def read_file(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML or JSON file holds.

    Raises:
        ValueError: it cannot be read, is not valid, or holds something else.
    """
    try:
        values = read_json(path, None) if path.suffix == ".json" else read_yaml(path)
    except DamagedFileError as error:
        raise ValueError(
            f"`config` is {str(path)!r}, which cannot be read; its file must be whole: "
            f"{error.reason}"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(
            f"`config` is {str(path)!r}; it must hold a mapping of field names to values"
        )
    return values


def _converted(
    parser: argparse.ArgumentParser, values: dict[str, Any], source: str
) -> dict[str, Any]:
    """Send `values` through the converters of the flags with the same names."""
    actions = {action.dest: action for action in reversed(parser._actions)}
    names, nullable = _names(), _nullable()
    converted: dict[str, Any] = {}
    for key, value in values.items():
        if key not in names:
            raise ValueError(f"{source}: `{key}` is an unknown key{nearest(str(key), names, '')}")
        if value is None:
            if key not in nullable:
                raise ValueError(f"{source}: `{key}` is null; it must have a value")
            converted[key] = None
            continue
        if isinstance(value, bool) and "on" in (actions[key].choices or ()):
            value = "on" if value else "off"  # YAML reads these words as true and false
        words = [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
        if len(words) != 1 and actions[key].nargs != "+":
            raise ValueError(f"{source}: `{key}` is {value!r}; it must be one value")
        try:
            # argparse has no public call for "convert as this flag would"; a plain parse would
            # take a negative number in scientific notation for a flag.
            converted[key] = parser._get_values(actions[key], words)
        except argparse.ArgumentError as error:
            raise ValueError(f"{source}: {_refusal(key, error.message)}") from error
    return converted
