"""A sweep on real Ray Tune and MLflow: killed, gone on with, and its best trial repeated."""

import json
import re
import shlex
from collections import Counter

import pytest
from mlflow import MlflowClient

from tests.sweeps import records, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_no_finished_step_runs_again_and_what_is_shared_runs_once(swept):
    root, before, _ = swept
    after = records(root)
    assert before.items() <= after.items()
    kinds = Counter(slug.rpartition("-")[0] for slug in after)
    assert kinds["prune"] == 2 and kinds["score"] == kinds["evaluate_base"] == 1
    assert kinds["evaluate_large"] == 4
    inputs = {
        slug: json.loads((root / "store" / slug / "record.json").read_text())["inputs"]
        for slug in after
    }
    # The first half of SFT ends at the rung; only who goes on has the second, with offsets anew.
    second = Counter(slug.rpartition("-")[0] for slug in after if "earlier" in inputs[slug])
    assert 2 <= second["sft"] == second["offsets"] < 4
    assert kinds["sft"] == 4 + second["sft"] and kinds["offsets"] == 2 + second["offsets"]


def test_every_trial_has_its_final_numbers_in_mlflow_under_one_run(swept):
    root, _, _ = swept
    client = MlflowClient(f"sqlite:///{root}/mlflow/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "loram"]
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    (sweep,) = [
        r for r in runs if r.data.tags.get("stage") == "sweep" and r.info.status == "FINISHED"
    ]
    trials = [
        run
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == sweep.info.run_id
        and run.data.tags.get("stage") == "trial"
    ]
    assert len(trials) == 4
    names = {frozenset(run.data.params) for run in trials}
    assert len(names) == 1 and {"sft.lr", "prune.ratio"} <= next(iter(names))
    for run in trials:
        assert {"large_loss", "large_ppl_out", "held_out_loss", "steps_trained"} <= set(
            run.data.metrics
        )
        curve = client.get_metric_history(run.info.run_id, "loss")
        assert [point.step for point in curve] == list(range(1, len(curve) + 1)) and len(curve) > 1
    for stage in ("trial", "prune", "evaluate_large"):
        staged = [run for run in runs if run.data.tags.get("stage") == stage]
        assert {float(run.data.params["prune.ratio"]) for run in staged} == {0.25, 0.5}
    artifacts = {a.path for a in client.list_artifacts(sweep.info.run_id, "report")}
    assert {"report/report.html", "report/curves.png", "report/curves.svg"} <= artifacts


def test_the_printed_line_gives_the_same_scores_in_an_empty_store(swept, tmp_path):
    root, _, text = swept
    line = re.search(r"best +python (pipelines/full.py .*)", text)
    assert line, text
    trials = json.loads(next((root / "store" / "reports").glob("sweep-*/trials.json")).read_text())
    best = min(trials, key=lambda trial: trial["large_loss"])
    with start(shlex.split(line[1]), tmp_path / "home", tmp_path / "log") as done:
        assert done.wait(500) == 0, (tmp_path / "log").read_text()
    (table,) = (tmp_path / "home" / "store" / "reports").glob("test-*/table.json")
    large = json.loads(table.read_text())[-1]
    assert large["label"].endswith("large")
    assert large["loss"] == best["large_loss"]
    assert large["out_of_domain_perplexity"] == best["large_ppl_out"]
