"""quantize(): which linear layers of a model get int8 weights, what the report says, what stays fused."""

from __future__ import annotations

import pytest
import torch

import handtuned
from handtuned import nn

pytestmark = pytest.mark.no_triton


class Tied(torch.nn.Linear):
    """A subclass, which may compute something else."""


def test_quantize_reports_what_it_did() -> None:
    shared = torch.nn.Linear(64, 64)
    model = torch.nn.ModuleDict(
        {
            "a": torch.nn.Sequential(shared, torch.nn.GELU(), shared),
            "head": torch.nn.Linear(64, 10),
            "sub": Tied(4, 4),
            "wide": torch.nn.Linear(4, 4, dtype=torch.float64),
            "attention": torch.nn.MultiheadAttention(8, 2),
            "torchs": torch.nn.TransformerEncoderLayer(8, 2, 16),
            "hooked": torch.nn.Linear(4, 4),
            "twin": nn.Linear(64, 64),
        }
    )
    model["hooked"].register_forward_hook(lambda *_: None)
    report = handtuned.quantize(model, skip=("head",))
    assert [row.name for row in report.quantized] == ["a.0", "twin"]
    assert model["a"][0] is model["a"][2]
    assert type(model["twin"]) is nn.Int8Linear
    why = {left.name: left.why for left in report.left}
    assert why.keys() == {
        *("head", "sub", "wide", "hooked", "attention.out_proj"),
        *(f"torchs.{name}" for name in ("self_attn.out_proj", "linear1", "linear2")),
    }
    assert why["head"] == "skipped"
    assert "subclass" in why["sub"]
    assert "float64" in why["wide"]
    assert "hooks" in why["hooked"]
    assert why["torchs.linear1"] == "TransformerEncoderLayer reads its weight itself"
    assert report.bytes_after < 0.6 * report.bytes_before
    assert all(0.001 < row.error < 0.02 for row in report.quantized)
    assert "2 quantized" in str(report)
    assert "64 × 64" in str(report)


def test_quantize_wants_a_model_around_the_layer() -> None:
    with pytest.raises(ValueError, match=r"Int8Linear\.from_linear"):
        handtuned.quantize(torch.nn.Linear(3, 3))


@pytest.mark.parametrize("quantize_input", [False, True])
def test_a_quantized_transformer_layer_stays_fused(quantize_input: bool) -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = layer(x)
        handtuned.replace(layer)
        report = handtuned.quantize(layer, quantize_input=quantize_input)
        assert [row.name for row in report.quantized] == ["linear1", "linear2"]
        calls = [call.op for call in handtuned.explain(layer, x).calls]
        assert calls.count("linear_int8") == 2
        assert (layer(x) - expected).norm() < 0.02 * expected.norm()
