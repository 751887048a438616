"""Every study as a user types it, one after the other on one store."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.assets import home
from tune.points import SEARCH

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[1]
STUDIES = {
    "steps": [],  # first, so that its last rung goes on from the one before, and the others use it
    "recovery": [],
    "cost": ["--rates", "3e-3"],
    "ratio": ["evaluate.answers=4", "--ratios", "0.5"],
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The home in which every study ran, one after the other."""
    root = tmp_path_factory.mktemp("study")
    (root / "assets").symlink_to(home() / "assets")
    for name, rest in STUDIES.items():
        done = subprocess.run(
            [sys.executable, ROOT / "tune" / "study.py", name, "test", "nf4=false", *rest]
            + ["--methods", "stru"],
            env=os.environ | {"LORAM_HOME": str(root)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
    return root


def result(root: Path, name: str) -> tuple[dict, Path]:
    (path,) = (root / "store" / "reports").glob(f"study-{name}-*/study.json")
    return json.loads(path.read_text()), path.parent


def test_every_study_leaves_its_numbers_its_picture_and_its_page(ran):
    for name in STUDIES:
        found, out = result(ran, name)
        assert all(math.isfinite(point["loss"]) for point in found["points"])
        assert (out / f"{name}.png").read_bytes()[1:4] == b"PNG"
        assert "sft.lr" in (out / "report.html").read_text()
        (base,) = [point for point in found["points"] if point["model"] == "base"]
        assert ("score" in base and base["score"] is not None) == (name == "ratio")


def test_studies_share_one_store(ran):
    """The large model at the shared rate is the same adapter in each, and was made once."""
    losses = set()
    for name in STUDIES:
        for p in result(ran, name)[0]["points"]:
            at = p["model"], p["inference"], p["rate"], p["ratio"], p["aligned"], p["step"]
            if at == ("LoRAM-Stru", "large", "shared", 0.5, True, 4):
                losses.add(p["loss"])
    assert len(losses) == 1
    kinds = Counter(path.parent.name.rpartition("-")[0] for path in
                    (ran / "store").glob("*/record.json"))  # fmt: skip
    assert kinds["score"] == kinds["prune"] == kinds["align"] == kinds["corpus"] == 1
    # Two rungs, and another rate; the small model without alignment at the shared one.
    assert kinds["sft_lora"] == 2 + 1 and kinds["sft"] == 2 + 1 + 1


def test_the_numbers_say_what_each_study_asks(ran):
    recovery, _ = result(ran, "recovery")
    points = [(p["model"], p["inference"], p["aligned"]) for p in recovery["points"]]
    assert len(points) == len(set(points)) == 1 + 1 + 4  # base, full LoRA, the corners
    steps, _ = result(ran, "steps")
    at = [p["step"] for p in steps["points"] if p["inference"] == "large"]
    assert at == [2, 4] and not steps["best_rates"]
    ratio, _ = result(ran, "ratio")
    assert {p["ratio"] for p in ratio["points"] if p["inference"] == "untrained"} == {0.5}
    cost, _ = result(ran, "cost")
    assert set(cost["best_rates"].values()) <= {1e-3, 3e-3}
    spent = {(c["arm"], c["stage"]): c for c in cost["costs"]}
    assert spent["LoRA", "SFT"]["tokens"] == spent["LoRAM-Stru", "SFT"]["tokens"] > 0
    assert spent["LoRAM-Stru", SEARCH]["tokens"] == spent["LoRAM-Stru", "SFT"]["tokens"]
    assert all(c["seconds"] > 0 and c["peak_memory_bytes"] > 1e8 for c in cost["costs"])


def test_mlflow_has_one_run_a_study_and_the_steps_that_ran_below_it(ran):
    client = MlflowClient(f"sqlite:///{ran}/mlflow/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "loram"]
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert {run.info.status for run in runs} == {"FINISHED"}
    above = {run.data.tags["study"]: run for run in runs if run.data.tags["stage"] == "study"}
    assert above.keys() == STUDIES.keys()
    for name, run in above.items():
        assert {a.path for a in client.list_artifacts(run.info.run_id, "report")} >= {
            f"report/{file}" for file in ("report.html", "study.json", f"{name}.svg")
        }
        assert "base/full/loss" in run.data.metrics
    below = [
        run
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == above["cost"].info.run_id
        and run.data.tags["stage"] in ("sft", "sft_lora")
    ]
    assert {run.data.tags["variant"] for run in below} == {"stru", "lora"}
    assert {float(run.data.params["sft.lr"]) for run in below} == {3e-3}
    (instruct,) = [run for run in runs if run.data.tags["stage"] == "instruct"]
    assert instruct.data.tags["variant"] == "shared" and instruct.data.tags["key"]
