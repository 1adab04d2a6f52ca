"""Flat yaml files of parameters, read so that each says one thing alone, and refused with the line and the way out."""

import difflib
import os
import re
import reprlib
from pathlib import Path

import yaml


class ParameterError(ValueError):
    """A parameter that is misspelt, missing or out of range; the message names the key, its file and the way out."""


class FlatLoader(yaml.SafeLoader):
    """Of yaml the part that says one thing alone: plain keys, each once, with numbers, words, true, false, null, or
    lists of these.

    What has a tag, such as `!!binary`, papermill writes unquoted into the notebook, where it runs as code. Dates are
    words, as they are to papermill.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith(":timestamp")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent, index):
        event = self.peek_event()
        line, of_a_key = f"line {event.start_mark.line + 1}", isinstance(parent, yaml.MappingNode) and index is not None
        values = (yaml.ScalarEvent, *[yaml.SequenceStartEvent, yaml.AliasEvent] * of_a_key)
        flat = isinstance(event, values if parent else yaml.MappingStartEvent)
        if getattr(event, "tag", None):
            raise ParameterError(f"{line}: the tag {shown(event.tag)} is not read: write the value itself")
        node = super().compose_node(parent, index) if flat else None
        if node is None or parent and isinstance(node, yaml.MappingNode):
            raise ParameterError("must hold flat 'key: value' lines (papermill merges no deeper)")
        if node.tag.endswith((":int", ":float")) and re.search(r"^[-+]?0[0-9_xb]|:|.{40}", node.value):
            raise ParameterError(
                f"{line}: to yaml {shown(node.value)} is octal, hexadecimal, a time or a huge number: write it in "
                "plain digits, or words in quotes"
            )
        return node

    def plain_values(self) -> dict:
        values, lines = {}, {}
        root = self.get_single_node()
        for key, value in root.value if root else ():
            line = key.start_mark.line + 1
            if key.value in values:
                raise ParameterError(
                    f"lines {lines[key.value]} and {line}: the key {shown(key.value)} stands there twice"
                )
            values[key.value], lines[key.value] = self.construct_object(value, deep=True), line
        return values


def load(path: str | Path) -> dict:
    """Read one flat yaml file of parameters, of at most 64 KiB.

    Raises
    ------
    ParameterError
        The file is missing, is not yaml, is not flat, has a key twice, or says more than plain values.
    """
    path = Path(path)
    if os.path.lexists(path) and not path.is_file():
        raise ParameterError(f"{path}: is a folder, a device or a broken link: put a file of parameters there")
    if not path.is_file():
        known = sorted(other.stem for other in path.parent.glob("*.yaml"))
        raise ParameterError(
            f"{path}: no such file{nearest(path.stem, known)} ({path.parent} has {', '.join(known) or 'none'})"
        )
    try:
        with open(path, "rb") as file:
            content = file.read(2**16 + 1)
        if len(content) > 2**16:
            raise ParameterError("is longer than 64 KiB, which no list of parameters is")
        values = FlatLoader(content.decode("utf-8")).plain_values()
    except ParameterError as error:
        raise ParameterError(f"{path}: {error}") from None
    except OSError as error:
        raise ParameterError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ParameterError(f"{path}: byte {error.start} is no UTF-8: save it as text in UTF-8") from None
    except yaml.YAMLError as error:
        fault = " ".join(str(error).replace('"<unicode string>", ', "").split())
        raise ParameterError(f"{path}: not valid yaml: {fault[:300]}") from None
    if not values:
        raise ParameterError(f"{path}: must hold flat 'key: value' lines, and holds none")
    return values


def nearest(key, known) -> str:
    """'; did you mean x?' for the nearest of the `known` names, or nothing."""
    key = key if isinstance(key, str) else shown(key)
    match = difflib.get_close_matches(key, dict.fromkeys(map(str, known)), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: object) -> str:
    """`value` as Python writes it, on one line; the middle of a long one is left out."""
    huge = isinstance(value, int) and abs(value) >= 10**40  # Python refuses to write ints of thousands of digits
    return _SHORT.repr(hex(value) if huge else value)
