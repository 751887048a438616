"""The size rule, the choice of groups, and Taylor scores against their definition."""

import gc
import weakref

import pytest
import torch

import loram.taylor
from loram.errors import UserError
from loram.kept import head_dim
from loram.model import save
from loram.prune import PruneConfig, choose, kept_counts, score
from loram.taylor import Scores, random_scores
from tests.conftest import FAMILIES, tiny_model

RULE = [  # heads, KV heads, neurons, ratio, multiple -> KV heads, neurons
    (40, 40, 13_824, 0.65, 1, 14, 4838),
    (40, 40, 13_824, 0.9, 1, 4, 1382),  # int(40 * (1 - 0.9)) in floats would be 3
    (64, 8, 28_672, 0.65, 1, 3, 10_035),
    (64, 8, 28_672, 0.95, 1, 1, 1433),
    (9, 3, 1536, 0.65, 1, 2, 537),
    (9, 3, 1536, 0.65, 64, 2, 512),
    (9, 3, 1536, 0.0, 64, 3, 1536),
]


@pytest.mark.parametrize(("heads", "kv", "size", "ratio", "multiple", "kept_kv", "kept"), RULE)
def test_size_rule(heads, kv, size, ratio, multiple, kept_kv, kept):
    config = tiny_model("llama").config
    config.num_attention_heads, config.num_key_value_heads = heads, kv
    config.intermediate_size = size
    assert kept_counts(config, PruneConfig(ratio=ratio, multiple=multiple)) == (kept_kv, kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 1.0}, r"prune.ratio: found 1.0; accepted: a number in \[0, 1\)"),
        ({"ratio": -0.1}, r"prune.ratio: found -0.1"),
        ({"ratio": float("nan")}, r"prune.ratio: found nan"),
        ({"ratio": 0.995}, r"prune.ratio: found 0.995, which leaves .* 0 neurons"),
        ({"method": "struct"}, "prune.method: found 'struct'; accepted: rand, stru, semi, unst"),
    ],
)
def test_impossible_cuts_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        kept_counts(tiny_model("llama").config, PruneConfig(**change))


@pytest.mark.parametrize("method", ["semi", "unst"])
def test_groups_are_not_chosen_for_single_weights(method, tmp_path):
    config, pruning = tiny_model("llama").config, PruneConfig(method)
    message = f"prune.method: found '{method}'; accepted: rand, stru"
    with pytest.raises(UserError, match=message):
        choose(random_scores(config, 0), config, pruning)
    with pytest.raises(UserError, match=message):
        score(tmp_path, [], pruning)


def test_a_ratio_that_leaves_no_head_is_refused():
    config = tiny_model("llama", num_key_value_heads=8, num_attention_heads=8).config
    with pytest.raises(UserError, match="leaves 0 KV heads"):
        kept_counts(config, PruneConfig(ratio=0.9))


def test_a_model_of_which_every_layer_is_left_whole_is_refused():
    config = tiny_model("llama").config  # four layers, and by default six are kept
    with pytest.raises(UserError, match="keep_first . prune.keep_last: found 4 . 2; accepted: two"):
        choose(random_scores(config, 0), config, PruneConfig())


def test_the_highest_scores_stay_and_end_layers_are_whole():
    config = tiny_model("llama").config
    scores = Scores(
        torch.tensor([3.0, 1.0, 4.0, 2.0]).repeat(4, 1), torch.arange(96.0).flip(0).repeat(4, 1)
    )
    kept = choose(scores, config, PruneConfig(ratio=0.5, keep_first=1, keep_last=1))
    assert [len(x) for x in kept.kv_heads] == [4, 2, 2, 4]
    assert kept.kv_heads[1].tolist() == [0, 2] and kept.neurons[2].tolist() == list(range(48))


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 128, (3, 20), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(20).repeat(3, 1)}


@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_scores(family, tmp_path):
    """Against the definition, weight by weight of every group, through HF's own loss.

    With KV heads that are told apart by groups: folded groups give other numbers.
    """
    model = tiny_model(family)
    save(model, tmp_path)
    got = score(tmp_path, [batch()], PruneConfig(method="stru"))
    config = model.config
    dim, group = head_dim(config), config.num_attention_heads // config.num_key_value_heads
    model.requires_grad_(True)
    data = batch()
    logits = model(input_ids=data["input_ids"], position_ids=data["position_ids"]).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), data["labels"][:, 1:].flatten()
    )
    loss.backward()
    for i, layer in enumerate(model.model.layers):
        attn, mlp = layer.self_attn, layer.mlp

        def saliency(linear) -> torch.Tensor:
            return (linear.weight * linear.weight.grad).detach().abs()

        for kv in range(config.num_key_value_heads):
            expected = sum(
                saliency(x)[kv * dim : kv * dim + dim].sum() for x in (attn.k_proj, attn.v_proj)
            )
            for q in range(kv * group, kv * group + group):
                rows = slice(q * dim, q * dim + dim)
                expected += saliency(attn.q_proj)[rows].sum() + saliency(attn.o_proj)[:, rows].sum()
            assert got.kv_heads[i, kv] == pytest.approx(float(expected), rel=1e-5)
        expected = saliency(mlp.gate_proj).sum(1) + saliency(mlp.up_proj).sum(1)
        assert torch.allclose(got.neurons[i], expected + saliency(mlp.down_proj).sum(0), rtol=1e-5)


def test_scores_of_many_batches_are_those_of_one(tmp_path):
    """In any division; the mean is over tokens."""
    save(tiny_model("llama"), tmp_path)
    whole = batch()
    parts = [{k: v[:1] for k, v in whole.items()}, {k: v[1:] for k, v in whole.items()}]
    one, two = (score(tmp_path, given, PruneConfig("stru")) for given in ([whole], parts))
    assert torch.allclose(one.kv_heads, two.kv_heads, rtol=1e-4)
    assert torch.allclose(one.neurons, two.neurons, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_was_scored_is_gone(dtype, tmp_path, monkeypatch):
    """In the precision of the pipeline too, where autocast would remember what it has cast."""
    save(tiny_model("llama"), tmp_path)
    made, original = [], loram.taylor.Layers.layer

    def layer(self, i):
        gc.collect()
        assert not any(weight() is not None for weight in made)
        found = original(self, i)
        made.extend(weakref.ref(weight) for weight in found.parameters())
        return found

    monkeypatch.setattr(loram.taylor.Layers, "layer", layer)
    score(tmp_path, [batch(), batch()], PruneConfig("stru"), dtype=dtype)
    assert len(made) > 8


def test_scores_survive_files(tmp_path):
    save(tiny_model("qwen2"), tmp_path)
    scores = score(tmp_path, [], PruneConfig(method="rand", seed=4))
    scores.save(tmp_path)
    again = Scores.load(tmp_path)
    assert torch.equal(scores.kv_heads, again.kv_heads)
    assert torch.equal(scores.neurons, again.neurons)
    other = score(tmp_path, [], PruneConfig(method="rand", seed=5))
    assert not torch.equal(scores.neurons, other.neurons)


def test_bad_calibration_is_refused(tmp_path):
    model = tiny_model("llama")
    save(model, tmp_path)
    silent = batch() | {"labels": torch.full((3, 20), -100)}
    with pytest.raises(ValueError, match="no token to predict"):
        score(tmp_path, [silent], PruneConfig())
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 3] = float("nan")
    save(model, tmp_path)
    with pytest.raises(ValueError, match="NaN or Inf in model.layers.2.mlp.up_proj.weight"):
        score(tmp_path, [batch()], PruneConfig(method="stru"))


def test_a_crash_half_way_backward_goes_on_at_the_layer(tmp_path, monkeypatch):
    save(tiny_model("llama"), tmp_path)
    expected = score(tmp_path, [batch(), batch()], PruneConfig("stru"))
    seen, original = [], loram.taylor.Layers.layer

    def layer(self, i):
        seen.append(i)
        if len(seen) == 7:  # four layers forward, two of four backward
            raise MemoryError
        return original(self, i)

    monkeypatch.setattr(loram.taylor.Layers, "layer", layer)
    again = {"work": tmp_path / "work"}
    with pytest.raises(MemoryError):
        score(tmp_path, [batch(), batch()], PruneConfig("stru"), **again)
    found = score(tmp_path, [batch(), batch()], PruneConfig("stru"), **again)
    assert seen == [0, 1, 2, 3, 3, 2, 1] + [1, 0]
    assert torch.equal(found.kv_heads, expected.kv_heads)
    assert torch.equal(found.neurons, expected.neurons)
    assert not (tmp_path / "work" / "activations").exists()
