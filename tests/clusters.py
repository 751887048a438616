"""Clusters of Ray for tests: a head started apart, with ports of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.assets import home

RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def until(true: Callable[[], Any], limit_s: float = 500) -> Any:
    end = time.monotonic() + limit_s
    while not (value := true()):
        assert time.monotonic() < end, "never came true"
        time.sleep(0.2)
    return value


@contextmanager
def head(root: Path, short: Path, **variables: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    """A head with two CPUs; the addresses of itself and of its dashboard, and its environment, in
    which LORAM_HOME is `root`, with the assets.

    Args:
        short: of Ray's files, whose socket paths must be short.
    """
    (root / "assets").symlink_to(home() / "assets")
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"LORAM_HOME": str(root), "RAY_USAGE_STATS_ENABLED": "0", **variables}
    port, dashboard, client, agent = free_ports(4)
    process = subprocess.Popen(
        [*RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}"]
        + [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
        + ["--num-cpus=2", f"--temp-dir={short}", "--dashboard-host=127.0.0.1"]
        + ["--disable-usage-stats", "--node-ip-address=127.0.0.1"],
        env=env,
        stdout=(root / "head.log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )

    def up() -> bool:
        assert process.poll() is None, (root / "head.log").read_text()
        return not any(socket.socket().connect_ex(("127.0.0.1", p)) for p in (port, dashboard))

    try:
        until(up, 120)
        yield f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", env
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(short, ignore_errors=True)
