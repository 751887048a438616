"""Where a recipe's model and data are, each named by a digest of its content."""

import hashlib
from pathlib import Path

from loram.errors import refuse
from loram.hub import commit, split
from loram.model import INDEX, weight_files
from loram.shards import COMPANIONS
from pipelines.digest import file_digest
from pipelines.recipe import Recipe
from pipelines.sources import SourceSpec, digest
from pipelines.step import Source

MODEL_FILES = ("config.json", INDEX, *COMPANIONS)


def locate(recipe: Recipe, cache: Path) -> tuple[Source, dict[str, Source]]:
    """The model, and each data source by its path.

    Args:
        cache: directory of remembered file digests.

    Raises:
        UserError: something cannot be read.
    """
    specs = {spec.path: spec for spec in all_sources(recipe)}
    return locate_model(recipe.model, cache), {
        path: Source("data", path, digest(spec, cache)) for path, spec in specs.items()
    }


def all_sources(recipe: Recipe) -> tuple[SourceSpec, ...]:
    """Every data source that the recipe names."""
    held_out = recipe.evaluate.in_domain + recipe.evaluate.out_of_domain
    return recipe.corpus.sources + recipe.instruct.sources + held_out


def locate_model(model: str, cache: Path) -> Source:
    """A local directory by its files' digests, a hub id by its commit."""
    directory = Path(model)
    if directory.is_dir():
        files = {file for pattern in MODEL_FILES for file in directory.glob(pattern)}
        files |= set(weight_files(directory))
        try:
            lines = [f"{file.name} {file_digest(file, cache)}" for file in sorted(files)]
        except OSError as error:
            refuse("model", f"{error.filename} ({error.strerror})", "files that can be read")
        return Source(
            "model",
            str(directory.absolute()),
            hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        )
    name, sha = split(model)[0], commit(model)
    return Source("model", f"{name}@{sha}", sha)
