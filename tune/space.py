"""What a sweep varies: fields of a recipe, each over a range or a list, and the trials of it."""

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass

from loram.errors import refuse
from pipelines.recipe import Recipe, changed, parsed
from pipelines.recipes import read, settled

# What may differ between trials that are compared while they run; all else makes another model.
WITHIN = ("sft.", "adapter.")
BATCH = "sft.global_batch"
DATA = "sft.seq_len"  # other rows, on which no loss compares with theirs
DEFAULT = ("sft.lr=1e-5..1e-3", "prune.ratio=0.65,0.75,0.85,0.95")

Value = float | int | str | bool


@dataclass(frozen=True)
class Range:
    """Drawn log-uniformly from [low, high]; whole numbers if both ends are."""

    low: float
    high: float

    def at(self, share: float) -> float:
        """The value at a share in [0, 1] of the way from low to high, in the logarithm."""
        value = self.low * (self.high / self.low) ** share
        return round(value) if isinstance(self.low, int) and isinstance(self.high, int) else value


@dataclass(frozen=True)
class Space:
    """A sweep: `recipe` with the fields of `groups` and `searched` replaced.

    Attributes:
        groups: for each field that makes another small model, its values; every combination is a
            group with a search of its own.
        searched: for each field of training, its range or list.
    """

    recipe: Recipe
    groups: dict[str, list[Value]]
    searched: dict[str, Range | list[Value]]

    def combinations(self) -> list[dict[str, Value]]:
        """The values of the grouping fields, a dict a group."""
        return [
            dict(zip(self.groups, values, strict=True))
            for values in itertools.product(*self.groups.values())
        ]

    def recipes(self) -> list[Recipe]:
        """One recipe a group, with the first value of what is searched."""
        return [replaced(self.recipe, group | self.example()) for group in self.combinations()]

    def recipes_within(self) -> list[Recipe]:
        """Every group's recipe with the ends of each range and the values of each list."""
        ends = [x if isinstance(x, list) else [x.low, x.high] for x in self.searched.values()]
        return [
            replaced(self.recipe, group | dict(zip(self.searched, values, strict=True)))
            for group in self.combinations()
            for values in itertools.product(*ends)
        ]

    def example(self) -> dict[str, Value]:
        """A value for each searched field."""
        return {
            key: found.low if isinstance(found, Range) else found[0]
            for key, found in self.searched.items()
        }


def space(recipe: str, changes: list[str]) -> tuple[Space, list[str]]:
    """What varies by a recipe's name and `key=value` changes; and those changes that vary nothing.

    A value `1e-5..1e-3` is a range, `0.65,0.75` a list, anything else a plain change. Without a
    range or a list: `sft.lr=1e-5..1e-3` and `prune.ratio=0.65,0.75,0.85,0.95`, but for what the
    plain changes decide.

    Raises:
        UserError: an unknown field, an empty or reversed range, a range where a list is needed,
            several models, or nothing that varies.
    """
    swept = [change for change in changes if isinstance(_several(change), list | Range)]
    plain = [change for change in changes if change not in swept]
    groups: dict[str, list[Value]] = {}
    searched: dict[str, Range | list[Value]] = {}
    decided = {change.partition("=")[0] for change in plain}
    if {"prune.method", "prune.pattern"} & decided:
        decided.add("prune.ratio")
    for change in swept or [each for each in DEFAULT if each.partition("=")[0] not in decided]:
        key, found = change.partition("=")[0], _several(change)
        assert found is not None
        if key.startswith(("place.", "store", "tracking", "name", "experiment")):
            refuse(key, "several values", "one value: it changes no result")
        if key == "model":
            refuse(key, "several values", "one model a sweep")
        if key.startswith(WITHIN) and key != DATA:
            searched[key] = found
        elif isinstance(found, Range):
            refuse(key, change.partition("=")[2], "a list such as 0.65,0.75: each is a new model")
        else:
            groups[key] = found
    if not groups and not searched:
        refuse("changes", "nothing that varies", "a range or a list, such as sft.lr=1e-5..1e-3")
    # Full LoRA is trained once, by itself, not with each trial.
    base = read(recipe, ["compare=[]", *plain])
    if not {"prune.method", "prune.pattern"} & groups.keys():  # these decide a ratio not typed
        base = settled(base)
    if isinstance(searched.get(BATCH), Range) and base.place.workers * base.place.micro_batch > 1:
        refuse(BATCH, "a range", "a list such as 8,16, of multiples of workers x micro_batch")
    made = Space(base, groups, searched)
    for each in made.recipes_within():
        if each.sft.stop is not None:
            refuse("sft.stop", each.sft.stop, "null: the search stops a trial")
    return made, plain


def replaced(recipe: Recipe, values: dict[str, Value]) -> Recipe:
    """The recipe with fields replaced, by their dotted names."""
    words = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return settled(parsed(changed(dataclasses.asdict(recipe), words)))


def _several(change: str) -> Range | list[Value] | None:
    """The range or the list that a change holds; None if it is a plain one."""
    key, _, text = change.partition("=")
    if text[:1] in tuple("[{\"'"):
        return None
    if ".." in text and "/" not in text:
        low, high = (_value(part) for part in text.split("..", 1))
        numbers = [x for x in (low, high) if isinstance(x, int | float) and math.isfinite(x)]
        if len(numbers) < 2 or not 0 < numbers[0] < numbers[1]:
            refuse(key, text, "a range LOW..HIGH with 0 < LOW < HIGH")
        return Range(numbers[0], numbers[1])
    if "," in text:
        parts = text.split(",")
        if not all(parts) or len(set(parts)) < len(parts):
            refuse(key, text, "different values, separated by commas")
        return [_value(part) for part in parts]
    return None


def _value(text: str) -> Value:
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, int | float | str | bool) else text
