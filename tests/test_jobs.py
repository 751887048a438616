"""`ray job submit` to a cluster of its own with token authentication, as the README says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipelines.assets import home
from tests.clusters import RAY, head

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def cluster(tmp_path):
    """A head with a home and a token of its own; yields (address, env)."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    more = {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with head(tmp_path, Path("/tmp") / f"lr{os.getpid()}", **more) as (_, address, env):
        yield address, env


def submit(address: str, env: dict[str, str], code: Path, *words: str):
    return subprocess.run(
        [*RAY, "job", "submit", "--address", address, "--working-dir", code]
        + ["--", sys.executable, "pipelines/full.py", *words],
        cwd="/",
        env=env,
        capture_output=True,
        text=True,
    )


def test_submitted_from_elsewhere_and_everything_is_found(cluster, tmp_path):
    address, env = cluster
    code = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "tests", ".*_cache")
    shutil.copytree(ROOT, code, ignore=ignored)

    stranger = {k: v for k, v in env.items() if not k.startswith("RAY_AUTH")} | {"HOME": "/"}
    refused = submit(address, stranger, code, "test")
    assert refused.returncode != 0 and "in the store" not in refused.stdout

    done = submit(address, env, code, "test", "align.steps=0", "compare=[]")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    log = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    shutil.rmtree(code)
    for folder in Path("/tmp", f"lr{os.getpid()}").glob("session_*/runtime_resources/working_dir*"):
        shutil.rmtree(folder)

    adapter = Path(re.search(r"recovered adapter +(\S+)", log).group(1))
    report = Path(re.search(r"report +(\S+)", log).group(1))
    for path in (adapter, report):
        assert path.exists() and path.is_relative_to(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(home() / "assets" / "tiny-llama")
    PeftModel.from_pretrained(base, adapter)
    copies = {path.name for path in (tmp_path / "mlflow" / "artifacts").rglob("*.*")}
    assert {"adapter_model.safetensors", "report.html", "kept.safetensors"} <= copies
