"""Parameter counts against the paper's tables, from configs alone."""

import pytest

from loram.adapter import AdapterConfig
from loram.model import load, save
from loram.plan import lora_parameters, pruned_size, size
from loram.prune import PruneConfig
from pipelines.shapes import SHAPES
from tests.conftest import FAMILIES, tiny_model

PAPER = [  # original, pruned, reduction, reduction with NF4 as the paper counts it
    ("llama2-13b", 0.65, 13_015_864_320, 6_005_662_720, 2.17, 8.67),
    ("llama2-70b", 0.65, 68_976_648_192, 28_099_436_544, 2.45, 9.82),
    ("llama2-70b", 0.75, 68_976_648_192, 21_488_738_304, 3.21, 12.84),
    ("llama2-70b", 0.85, 68_976_648_192, 16_272_924_672, 4.24, 16.95),
    ("llama2-70b", 0.95, 68_976_648_192, 9_662_226_432, 7.14, 28.56),
    ("llama31-70b", 0.85, 70_553_706_496, 17_849_982_976, 3.95, 15.81),
]


@pytest.mark.parametrize(("shape", "ratio", "original", "pruned", "reduction", "nf4"), PAPER)
def test_counts_of_the_paper(shape, ratio, original, pruned, reduction, nf4):
    full = size(SHAPES[shape])
    small = pruned_size(SHAPES[shape], PruneConfig(ratio=ratio))
    assert (full.total, small.total) == (original, pruned)
    assert round(full.total / small.total, 2) == reduction
    assert round(full.total / small.paper_nf4_parameters, 2) == nf4


@pytest.mark.parametrize(
    ("shape", "reduction", "gigabytes"), [("llama31-70b", 11.45, 12.3), ("llama2-70b", 15.04, 9.2)]
)
def test_bytes_as_bitsandbytes_keeps_them(shape, reduction, gigabytes):
    full, small = size(SHAPES[shape]), pruned_size(SHAPES[shape], PruneConfig(ratio=0.85))
    assert round(full.bf16_bytes / small.nf4_bytes, 2) == reduction
    assert round(small.nf4_bytes / 1e9, 1) == gigabytes


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_a_model_that_is_there(family, tmp_path):
    """The estimate against the tensors of a loaded NF4 model, wide enough for whole blocks."""
    model = tiny_model(family, hidden_size=256, intermediate_size=512, vocab_size=512)
    save(model, tmp_path)
    opened = load(tmp_path, nf4=True)
    held = 0
    for module in opened.modules():
        for parameter in module.parameters(recurse=False):
            held += parameter.numel() * parameter.element_size()
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                held += state.absmax.numel() + 4 * state.state2.absmax.numel()
    assert held == pytest.approx(size(model.config).nf4_bytes, rel=0.005)


def test_lora_parameters_of_llama2_13b():
    """r (in + out) of the seven linears of 40 layers of hidden 5,120 and 13,824 neurons."""
    layer = 4 * (5120 + 5120) + 3 * (5120 + 13_824)
    assert lora_parameters(SHAPES["llama2-13b"], AdapterConfig()) == 8 * layer * 40
