"""The classes of a conditional `UNet2DModel`: their numbers, their names, and the null class.

A class is a row of the network's embedding. The config of diffusers tells how many rows there are,
`num_class_embeds`, and not which of them is the null class: the label of classifier-free guidance
(arXiv:2207.12598) that means "no class", and in whose place the network learns the unconditional
prediction. That and the names are kept in the network's config under the same private key as a
scheduler's settings, which diffusers keeps in silence:

    "num_class_embeds": 3,
    "_ddim_schedulers": {"null_class": 2, "id2label": {"0": "cat", "1": "dog"}}
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .settings import SETTINGS_KEY

# Far above every published network; the bound of `num_class_embeds`, too.
MOST_CLASSES = 10**6
NAME_LENGTH = 200


@dataclass(frozen=True)
class ClassLabels:
    """What a conditional network can be asked for.

    Attributes:
        count: rows of the embedding, `num_class_embeds`.
        null_class: the row that means "no class"; None if there is none.
        names: of the classes that have one, by number.
    """

    count: int
    null_class: int | None = None
    names: Mapping[int, str] = field(default_factory=dict)

    @property
    def ids(self) -> tuple[int, ...]:
        """Return the numbers of the classes: all rows but the null class."""
        return tuple(i for i in range(self.count) if i != self.null_class)

    def name(self, number: int) -> str:
        """Return what to call a class: its name, or its number as text."""
        return "no class" if number == self.null_class else self.names.get(number, str(number))

    def number(self, label: int | str, argument: str = "class_labels") -> int:
        """Return the number of a class that is given by its name or its number.

        A text is a name first, and a number where no class has that name.

        Args:
            label: name or number.
            argument: what gave it, for the message.

        Raises:
            ValueError: no class has this name or number.
        """
        known = {name: number for number, name in self.names.items()}
        found: Any = label
        if isinstance(label, str):
            plain = label.isascii() and label.isdecimal() and len(label) <= len(str(MOST_CLASSES))
            found = known.get(label, int(label) if plain else None)
        whole = isinstance(found, int) and not isinstance(found, bool)
        if whole and 0 <= found < self.count and found != self.null_class:
            return found
        raise ValueError(f"`{argument}` is {label!r}; it must be {self.allowed()}")

    def allowed(self) -> str:
        """Return a phrase that says which labels there are."""
        ids = self.ids
        numbers = f"{ids[0]} to {ids[-1]}" if len(ids) > 1 else str(ids[0])
        if self.null_class is not None and ids[0] < self.null_class < ids[-1]:
            numbers += f" without {self.null_class}"
        if not self.names:
            return f"the number of a class, {numbers}"
        named = [repr(name) for _, name in sorted(self.names.items())]
        shown = ", ".join(named[:12]) + (f" and {len(named) - 12} more" if len(named) > 12 else "")
        return f"the number of a class, {numbers}, or its name: {shown}"

    def balanced(self, count: int) -> list[int]:
        """Return classes for `count` images in turn: image i has the class i modulo K."""
        ids = self.ids
        return [ids[i % len(ids)] for i in range(count)]


def class_labels_of(model: Any) -> ClassLabels | None:
    """Return the classes of a network, or of a pipeline's `unet`; None for an unconditional one.

    Args:
        model: a network with a `config`, or a pipeline.

    Raises:
        ValueError: the network takes conditions that are no class numbers, or its config
            contradicts itself.
    """
    return labels_in(getattr(model, "unet", model).config)


def labels_in(config: Mapping[str, Any]) -> ClassLabels | None:
    """Return the classes that the config of a network tells; None for an unconditional one.

    Raises:
        ValueError: as `class_labels_of`.
    """
    if config.get("class_embed_type") is not None:
        raise ValueError(
            f"`class_embed_type` is {str(config['class_embed_type'])[:80]!r}; it must be null: "
            "classes are rows of an embedding"
        )
    count, private = config.get("num_class_embeds"), config.get(SETTINGS_KEY)
    if count is None:
        if private is not None:
            raise ValueError(
                f"`{SETTINGS_KEY}` is {str(private)[:80]!r}; it must be absent where "
                "`num_class_embeds` is null"
            )
        return None
    if type(count) is not int or not 1 <= count <= MOST_CLASSES:
        raise ValueError(
            f"`num_class_embeds` is {str(count)[:80]!r}; it must be null or an integer, 1 to "
            f"{MOST_CLASSES}"
        )
    private = {} if private is None else private
    if not isinstance(private, Mapping):
        raise ValueError(f"`{SETTINGS_KEY}` is {str(private)[:80]!r}; it must be an object")
    null = private.get("null_class")
    if null is not None and (type(null) is not int or not 0 <= null < count or count == 1):
        raise ValueError(
            f"`null_class` is {str(null)[:80]!r}; it must be null or one of several classes, "
            f"0 to {count - 1}"
        )
    return ClassLabels(count, null, _names(private.get("id2label"), count, null))


def _names(table: Any, count: int, null: int | None) -> dict[int, str]:
    allowed = f"an object of different names by class, 0 to {count - 1} without the null class"
    if table is None:
        return {}
    known = {str(number): number for number in range(count) if number != null}
    fits = isinstance(table, Mapping) and all(str(key) in known for key in table)
    if not fits or not all(is_name(name) for name in table.values()):
        raise ValueError(f"`id2label` is {str(table)[:80]!r}; it must be {allowed}")
    if len(set(table.values())) != len(table):
        raise ValueError(f"`id2label` is {str(table)[:80]!r}; it must be {allowed}")
    return {number: table[key] for key, number in known.items() if key in table}


def is_name(value: object) -> bool:
    """Return whether a value can be the name of a class: text of 1 to 200 printable characters."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= NAME_LENGTH
        and value.isprintable()
        and value == value.strip()
    )


def note_class_labels(unet: Any, null_class: int | None, names: Sequence[str] = ()) -> None:
    """Write into a network's config which class means none, and what the others are called.

    Args:
        unet: a conditional `UNet2DModel`.
        null_class: a row of its embedding, or None.
        names: of all classes, in the order of their numbers; empty if they have none.

    Raises:
        ValueError: a null class or names that do not fit the network.
    """
    rows = (i for i in range(unet.config["num_class_embeds"]) if i != null_class)
    note: dict[str, Any] = {}
    if null_class is not None:
        note["null_class"] = null_class
    if names:
        note["id2label"] = {str(row): name for row, name in zip(rows, names, strict=True)}
    labels_in({**unet.config, SETTINGS_KEY: note})
    unet.register_to_config(**{SETTINGS_KEY: note})
