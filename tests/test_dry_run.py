"""What `--dry-run` prints, from the model's config alone, against the paper's tables."""

import pytest

from pipelines.full import main
from tests.test_plan import PAPER


@pytest.fixture
def printed(capsys, monkeypatch, tmp_path):
    """The tables of a recipe's plan by their titles: of each row, the cells after the first."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*words: str) -> dict[str, dict[str, list[str]]]:
        assert main(["--dry-run", *words, f"store={tmp_path / 'store'}"]) == 0
        tables: dict[str, dict[str, list[str]]] = {}
        for line in capsys.readouterr().out.splitlines():
            if line.startswith("│"):
                name, *rest = (cell.strip() for cell in line.strip("│").split("│"))
                list(tables.values())[-1][name] = rest
            elif line[:1] == " ":
                tables[line.strip()] = {}
        return tables

    return run


# One ratio of each model: `test_plan` has the others.
@pytest.mark.parametrize(
    ("shape", "ratio", "original", "pruned", "reduction", "nf4"), [PAPER[0], PAPER[3], PAPER[5]]
)
def test_counts_of_the_paper(shape, ratio, original, pruned, reduction, nf4, printed):
    rows = printed(shape, f"prune.ratio={ratio}")["Sizes"]
    assert rows["full model"] == [f"{original:,}", "1.00x"]
    assert rows["pruned"] == [f"{pruned:,}", f"{reduction:.2f}x"]
    assert rows["pruned, NF4 as the paper counts it (parameters / 4)"] == ["", f"{nf4:.2f}x"]


@pytest.mark.parametrize(("shape", "honest"), [("llama2-70b", "15.04x"), ("llama31-70b", "11.45x")])
def test_bytes_beside_the_papers_counting(shape, honest, printed):
    rows = printed(shape)["Sizes"]
    name = next(name for name in rows if name.startswith("pruned, NF4 in bytes"))
    assert rows[name] == ["", honest]


@pytest.mark.parametrize(("method", "reduction"), [("semi", "1.95x"), ("unst", "2.16x")])
def test_single_weights(method, reduction, printed):
    rows = printed("llama2-13b", f"prune.method={method}", "prune.ratio=null")["Sizes"]
    assert rows["pruned"][1] == reduction


def test_memory_is_that_of_what_is_trained(printed):
    """The small model takes less than the large, and more with stand-ins or offsets."""

    def memory(*changes: str) -> dict[str, float]:
        table = printed("small", *changes)["Estimated peak memory a worker"]
        return {stage: float(cell.removesuffix(" GB")) for stage, (cell,) in table.items()}

    aligned = ["align.steps=20", "offset.every=0"]
    fitted = ["compensate.rank=64", "compensate.gradients=false"]
    some = memory(*fitted, "distil.top=32", *aligned)
    plain = memory("compensate.rank=0", *aligned)
    assert "align" not in some and "distil" not in plain
    assert plain["align"] < some["distil"] and plain["sft"] < some["sft"] < some["sft_lora"]
    assert memory("offset.every=1")["sft"] > some["sft"]
