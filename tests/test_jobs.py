"""`ray job submit` to a cluster of its own with token authentication, as the README says."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipelines.assets import home

ROOT = Path(__file__).parents[1]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


@pytest.fixture
def cluster(tmp_path):
    """A head started apart, with a home, a token and ports of its own; yields (address, env)."""
    short = Path("/tmp") / f"lr{os.getpid()}"  # Ray's socket paths must be short
    (tmp_path / "assets").symlink_to(home() / "assets")
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "HOME": str(tmp_path),
        "LORAM_HOME": str(tmp_path),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    port, dashboard, client, agent = free_ports(4)
    log = (tmp_path / "head.log").open("w")
    head = subprocess.Popen(
        [*RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}"]
        + [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
        + ["--num-cpus=2", f"--temp-dir={short}", "--dashboard-host=127.0.0.1"]
        + ["--disable-usage-stats", "--node-ip-address=127.0.0.1"],
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while socket.socket().connect_ex(("127.0.0.1", dashboard)):
            assert head.poll() is None, (tmp_path / "head.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield f"http://127.0.0.1:{dashboard}", env
    finally:
        os.killpg(head.pid, 15)
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, 9)
        shutil.rmtree(short, ignore_errors=True)


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
