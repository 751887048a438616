"""A disk that fills up half-way in a pruning step: a small tmpfs in a namespace of its own."""

import json
import subprocess
import sys

import pytest
from rows import packed_rows

from loram.model import save
from tests.conftest import tiny_model

pytestmark = pytest.mark.slow

# Prints what became of the step. The store is on the small disk, the rest is not.
DRIVER = """
import json, shutil, sys
from concurrent.futures import Future
from pathlib import Path
from loram.errors import UserError
from loram.prune import PruneConfig
from pipelines import steps
from pipelines.execute import execute, run
from pipelines.place import Place
from pipelines.step import Source, Step
from pipelines.store import Store

root, disk = Path(sys.argv[1]), Path(sys.argv[2])

def launch(step, inputs, out, work, place):
    done = Future()
    try:
        done.set_result(run(step, inputs, out, work, place))
    except Exception as error:
        done.set_exception(error)
    return done

def copy(config, *, rows, out, work, place):
    shutil.copytree(rows, out / "train")
    return {}

source = Source("model", str(root / "model"), "model")
rows = Step("corpus", copy, steps.Empty(), {"rows": Source("rows", str(root / "rows"), "rows")})
config = steps.SparsifyConfig(PruneConfig("semi"), rows=4)
step = Step("prune", steps.sparsify, config, {"model": source, "corpus": rows})
store = Store(disk)
try:
    execute([step], store, launch, Place(), lambda event: None)
    said = "made"
except UserError as error:
    said = str(error)
layers = Place().spool(store.work(step.slug)) / "done"
done = sorted(file.name for file in layers.glob("model-layers-*s"))
print(json.dumps([said, done, store.flaw(step.slug, step.key)]))
"""


def test_a_full_disk_half_way_in_pruning(tmp_path):
    """Said in one line, nothing half made is in the store; with room, it goes on at the layer."""
    save(tiny_model("llama", hidden_size=256, intermediate_size=512), tmp_path / "model")
    packed_rows(tmp_path / "rows", documents=15)
    layer = (tmp_path / "model" / "model.safetensors").stat().st_size // 4
    (tmp_path / "disk").mkdir()
    (tmp_path / "driver.py").write_text(DRIVER)
    drive = f"{sys.executable} {tmp_path}/driver.py {tmp_path} {tmp_path}/disk"
    script = (
        f"mount -t tmpfs -o size={3 * layer} none {tmp_path}/disk && {drive} && "
        f"mount -o remount,size={20 * layer} {tmp_path}/disk && {drive}"
    )
    ran = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    (said, done, flaw), (then, _, whole) = map(json.loads, ran.stdout.splitlines())
    assert said.startswith(f"store: found no space left at {tmp_path}/disk in step prune")
    assert 0 < len(done) < 4 and flaw == "missing"
    assert then == "made" and not whole
