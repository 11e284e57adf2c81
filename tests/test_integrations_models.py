"""transformers models with everything that has a twin replaced, and batches packed into one row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers_models import (
    ARCHITECTURES,
    BART,
    BATCH,
    PADDING,
    SIZES,
    TOKENS,
    VOCABULARY,
    Architecture,
    assert_same,
    sentences,
    served_by_a_kernel,
    transformers,
)

import handtuned
from handtuned.integrations.transformers import attention, packed, register, replace
from handtuned.integrations.transformers_blocks import find_block

__all__ = ["served_by_a_kernel"]  # a fixture of every test

# ---- whole models ----------------------------------------------------------------------------------------------------

WHISPER = {**BART, "num_mel_bins": 4, "max_source_positions": 10, "max_target_positions": 64, "bos_token_id": 1}
VIT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
)
WHOLE = {
    "bert": ARCHITECTURES["bert"],
    "gpt2": ARCHITECTURES["gpt2"],
    "llama": ARCHITECTURES["llama, grouped heads"],
    "gemma2": ARCHITECTURES["gemma2, window and softcap"],
    "t5": ARCHITECTURES["t5"],
    "whisper": Architecture("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
    "vit": Architecture("ViTForImageClassification", "ViTConfig", VIT, generates=False),
}
# What of transformers' own becomes a twin, beside Linear and LayerNorm.
OWN = {
    "bert": {"BertSelfOutput", "BertIntermediate", "BertOutput"},
    "gpt2": {"Conv1D", "GPT2MLP"},
    "llama": {"LlamaMLP", "LlamaRMSNorm"},
    "gemma2": {"Gemma2MLP", "Gemma2RMSNorm"},
    "t5": {"T5LayerNorm"},
    "whisper": set(),
    "vit": {"ViTMLP"},
}
whole = pytest.mark.parametrize("name", list(WHOLE))


def tolerance_of(name: str) -> float:
    """transformers' RMSNorms compute in float32 in a float64 model too."""
    return 1e-4 if any("Norm" in kind for kind in OWN[name]) else WHOLE[name].tolerance


def inputs_for(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    dtype = WHOLE[name].dtype
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator, dtype=dtype)}
    if name == "whisper":
        return {"input_features": torch.randn(BATCH, 4, 20, generator=generator, dtype=dtype)}
    return sentences(left=WHOLE[name].generates)


def step(name: str, model: Any) -> dict[str, Tensor]:
    """Logits, and the gradients of one training step's loss."""
    inputs = inputs_for(name)
    if name == "vit":
        inputs["labels"] = torch.tensor([0, 1])
    else:
        tokens = sentences()["input_ids"][:, :7] if model.config.is_encoder_decoder else inputs["input_ids"]
        padding = tokens == 0  # and what the last place of padding on the left would have to tell
        inputs["labels"] = tokens.masked_fill(padding | (padding.roll(1, 1) & (padding.cumsum(1) > 0)), -100)
    model.zero_grad()
    found = model(**inputs)
    found.loss.backward()
    kept = inputs.get("attention_mask")
    logits = found.logits if kept is None or model.config.is_encoder_decoder else found.logits[kept.bool()]
    grads = {f"grad of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": found.loss.detach(), "logits": logits.detach(), **grads}


@whole
def test_a_whole_model_trains_the_same(name: str) -> None:
    model = WHOLE[name].build()
    model.set_attn_implementation(WHOLE[name].peer)
    theirs = step(name, model)
    report = replace(model)
    assert not report.left
    explanation = handtuned.explain(lambda: step(name, model))
    ours = explanation.result
    assert {call.op for call in explanation.calls} >= {"attention", "linear"}
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        scale = max(1.0, expected.abs().max().item())
        assert (ours[tensor] - expected).abs().max() <= tolerance_of(name) * scale, tensor
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    assert step(name, model)["loss"] < ours["loss"]


@pytest.mark.parametrize("name", [name for name, found in WHOLE.items() if found.generates])
def test_a_whole_model_generates_the_same(name: str) -> None:
    model = WHOLE[name].build()

    def generated(attention: str) -> Tensor:
        model.set_attn_implementation(attention)
        options: dict[str, Any] = dict(max_new_tokens=9, do_sample=False, pad_token_id=0, output_logits=True)
        found = model.generate(**inputs_for(name), return_dict_in_generate=True, **options)
        return torch.stack(found.logits)

    theirs = generated(WHOLE[name].peer)
    replace(model)
    assert_same(generated("handtuned"), theirs, tolerance_of(name))


@whole
def test_what_becomes_a_twin_and_back(name: str) -> None:
    model = WHOLE[name].build()
    before, state = {n: type(m) for n, m in model.named_modules()}, model.state_dict()
    attention = model.config._attn_implementation
    report = replace(model)
    kinds = {row.before.__name__ for row in report.replaced}
    assert {kind for kind in kinds if not hasattr(torch.nn, kind)} == OWN[name]
    assert all(isinstance(m, before[n]) for n, m in model.named_modules())
    assert model.state_dict().keys() == state.keys()
    assert model.config._attn_implementation == "handtuned"
    assert not replace(model).replaced
    report.undo()
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert model.config._attn_implementation == attention


def test_replace_checks_and_tells_of_attention_that_stays() -> None:
    model = WHOLE["bert"].build(num_hidden_layers=1).float()
    report = replace(model, check=dict(sentences((0, 0, 0))))
    assert all(difference.ok for difference in report.differences)
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
    report = replace(plain)
    assert [row.before for row in report.replaced] == [torch.nn.Linear]
    assert report.left[0].name == "(attention)"
    with pytest.raises(ValueError, match="attention interface"):
        replace(torch.nn.Sequential(torch.nn.Linear(4, 4)), strict=True)


def planted(kind: Any, change: Any) -> Any:
    """A subclass as another model could have it, whose forward does something more."""
    return type(kind.__name__, (kind,), {"forward": change, "__module__": kind.__module__})


def test_blocks_that_compute_something_else_are_left() -> None:
    """Each with a forward that differs a little from the one its parts suggest."""
    model = WHOLE["bert"].build(num_hidden_layers=1)
    layer = model.bert.encoder.layer[0]
    changes = {
        layer.output: lambda self, x, y: self.LayerNorm(self.dropout(self.dense(x) + y)),
        layer.intermediate: lambda self, x: self.intermediate_act_fn(self.dense(x)) * 1.001,
    }
    for module, change in changes.items():
        assert find_block(module) is not None
        module.__class__ = planted(type(module), change)
        assert find_block(module) is None
    norm = WHOLE["llama"].build().model.norm
    assert find_block(norm) is not None
    for change in (
        lambda self, x: x * (x.square().mean(-1, keepdim=True) + 2 * self.variance_epsilon).rsqrt() * self.weight,
        lambda self, x: x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt(),
        lambda self, x, gate: x * gate,
    ):
        changed = planted(type(norm), change)(32)
        assert find_block(changed) is None


# ---- packed batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["BertModel", "LlamaModel"])
def test_a_packed_batch_computes_the_same(name: str, side: str) -> None:
    """Hidden states and gradients of the tokens that are not padding, as with it."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_attention_heads": 4, "max_position_embeddings": 64}
    config = getattr(transformers, name.replace("Model", "Config"))(**sizes)
    model = getattr(transformers, name)(config).eval().double()
    model.set_attn_implementation(register())
    ids = torch.randint(3, VOCABULARY, (BATCH, TOKENS))
    keep = torch.arange(TOKENS) >= torch.tensor(PADDING)[:, None]
    keep = keep if side == "left" else keep.flip(1)
    positions = (keep.cumsum(1) - 1).clamp(min=0)
    padded = model(input_ids=ids, attention_mask=keep.long(), position_ids=positions).last_hidden_state[keep]
    types = {"token_type_ids": torch.zeros_like(ids)} if name == "BertModel" else {}
    alone = model(**packed(ids, keep.long(), **types)).last_hidden_state
    assert alone.shape == (1, int(keep.sum()), 32)
    torch.testing.assert_close(alone[0], padded, rtol=1e-9, atol=1e-9)
    weights = [p for n, p in model.named_parameters() if "pooler" not in n]
    grads = [torch.autograd.grad(h.square().sum(), weights) for h in (alone, padded)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)


def test_a_packed_batch_has_no_matrix_of_weights() -> None:
    q = torch.randn(1, 2, 5, 4)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="output_attentions is True, but a packed batch"):
        attention(torch.nn.Module(), q, q, q, None, cu_seq_lens_q=starts, cu_seq_lens_k=starts, output_attentions=True)
