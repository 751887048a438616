"""Every module can be imported first, alone, and importing does nothing but that."""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Imports the named modules one by one, each in a fork of a process that holds only the libraries (a
# fresh process each would spend seconds on torch), and prints what went wrong.
CHILD = """
import importlib, os, sys, threading
libraries, modules, banned = (part.split(",") for part in sys.argv[1:4])
for library in filter(None, libraries):
    importlib.import_module(library)
for module in modules:
    if os.fork() == 0:
        before = dict(os.environ), threading.active_count(), sorted(os.listdir("."))
        try:
            importlib.import_module(module)
            after = dict(os.environ), threading.active_count(), sorted(os.listdir("."))
            if before != after:
                print(module, "changed the environment, a file or started a thread", before, after)
            found = [name for name in filter(None, banned) if name in sys.modules]
            if found:
                print(module, "imported", *found)
            if "ray" in sys.modules and sys.modules["ray"].is_initialized():
                print(module, "started Ray")
        except BaseException as error:
            print(module, "raised", repr(error))
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


def modules(package: str) -> list[str]:
    found = pkgutil.iter_modules([str(ROOT / package)])
    return [package, *(f"{package}.{module.name}" for module in found)]


def complaints(tmp_path, libraries: str, names: list[str], banned: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, libraries, ",".join(names), banned],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_method_imports_without_ray_or_mlflow(tmp_path):
    assert len(modules("loram")) > 5
    libraries = "torch,transformers,peft,bitsandbytes,pyarrow.parquet"
    assert complaints(tmp_path, libraries, modules("loram"), banned="ray,mlflow") == ""


def test_pipelines_and_tune_import_without_starting_anything(tmp_path):
    libraries = "torch,transformers,peft,bitsandbytes,ray.data,ray.train,mlflow,matplotlib.figure"
    assert complaints(tmp_path, libraries, modules("pipelines") + modules("tune")) == ""


@pytest.mark.parametrize("fault", ["import mlflow", "open('x', 'w')", "1 / 0"])
def test_such_faults_would_be_found(tmp_path, fault):
    (tmp_path / "faulty.py").write_text(fault)
    assert "faulty" in complaints(tmp_path, "", ["faulty"], banned="mlflow")
