"""What a graph is made of: steps and sources, named by their content."""

import functools
import hashlib
import inspect
import json
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

Metrics = dict[str, float | int | str]


@dataclass(frozen=True)
class Source:
    """A leaf: where something is, and the digest of its content, which alone makes its key."""

    name: str
    uri: str
    digest: str

    @functools.cached_property
    def key(self) -> str:
        """Hex SHA-256."""
        return _sha256({"source": self.digest})


@dataclass(frozen=True)
class Step:
    """A node: `fn(config, **inputs, out=, work=, place=)` writes `out` and returns flat metrics.

    Each input is given as the finished step's directory (Path) or the source's URI (str). `out` is
    empty and becomes the store entry; `work` survives a crash; `place` says how to run, not what.
    Curves go to work/metrics.jsonl, an object a line: "step", numbers, and "time" (Unix seconds).

    Raises:
        TypeError: `fn` does not accept this config and these inputs, or the config holds a value
            without one JSON form (a path, a set, a NaN, ...). Raised when the graph is built.
    """

    name: str
    fn: Callable[..., Metrics]
    config: Any
    inputs: Mapping[str, "Step | Source"] = field(default_factory=dict)
    version: int = 1
    cpus: float = 1
    gpus: float = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9_-]+", self.name):
            raise TypeError(f"step {self.name!r}: a name is made of a-z, 0-9, _ and -")
        given = {"out": None, "work": None, "place": None} | dict(self.inputs)
        try:
            inspect.signature(self.fn).bind(self.config, **given)
        except TypeError as error:
            raise TypeError(f"step {self.name!r}: {self.fn.__name__}: {error}") from None
        if len(given) < 3 + len(self.inputs):
            raise TypeError(f"step {self.name!r}: out, work and place are no names of inputs")
        wanted = typing.get_type_hints(self.fn).get("config")
        if isinstance(wanted, type) and not isinstance(self.config, wanted):
            raise TypeError(f"step {self.name!r}: config is no {wanted.__name__}: {self.config!r}")
        self.key  # noqa: B018  computed now, so that a value without a JSON form is found now

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """All that the key is made of, as plain JSON values."""
        return {
            "name": self.name,
            "version": self.version,
            "config": _plain(self.config, f"step {self.name!r}: config"),
            "inputs": {name: node.key for name, node in self.inputs.items()},
        }

    @functools.cached_property
    def key(self) -> str:
        """Hex SHA-256 of the identity's canonical JSON."""
        return _sha256(self.identity)

    @property
    def slug(self) -> str:
        """The name of the step's entry in the store."""
        return f"{self.name}-{self.key[:12]}"


def topological_order(targets: Iterable[Step]) -> list[Step]:
    """The targets and all steps that they need, inputs first, each key once."""
    found: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if step.key not in found:
            for node in step.inputs.values():
                if isinstance(node, Step):
                    visit(node)
            found[step.key] = step

    for target in targets:
        visit(target)
    return list(found.values())


def _sha256(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any, where: str) -> Any:
    """The value in JSON's own types; a tuple becomes a list, a dataclass a dict."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name), f"{where}.{f.name}") for f in fields(value)}
    if isinstance(value, dict) and all(type(name) is str for name in value):
        return {name: _plain(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float and math.isfinite(value):
        return value
    raise TypeError(f"{where}: {value!r} has no one JSON form")
