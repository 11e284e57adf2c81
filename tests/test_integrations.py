"""transformers with its attention served by handtuned: the same logits, tokens, gradients of every architecture."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers_models import ARCHITECTURES, BATCH, TOKENS, Architecture, assert_same, sentences, served_by_a_kernel

import handtuned
from handtuned.integrations.transformers import attention, mask, register

__all__ = ["served_by_a_kernel"]  # a fixture of every test
each = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=list(ARCHITECTURES))
GENERATORS = {name: found for name, found in ARCHITECTURES.items() if found.generates}


def logits(model: Any, implementation: str, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    model.set_attn_implementation(implementation)
    if model.config.is_encoder_decoder:
        options["decoder_input_ids"] = inputs["input_ids"][:, :7]
    found: Tensor = model(**inputs, **options).logits
    return found


# ---- the same numbers ------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_logits(architecture: Architecture, side: str) -> None:
    model = architecture.build()
    inputs = sentences((0, 0, 0)) if side == "none" else sentences(left=side == "left")
    with torch.no_grad():
        ours = logits(model, "handtuned", inputs)
        explanation = handtuned.explain(lambda: logits(model, "handtuned", inputs))
        theirs = logits(model, architecture.peer, inputs)
    where = None if model.config.is_encoder_decoder else inputs["attention_mask"]
    assert_same(ours, theirs, architecture.tolerance, where)
    assert {(call.op, call.served_by.backend) for call in explanation.calls} == {("attention", "cpu")}


@pytest.mark.parametrize("name", [name for name, found in ARCHITECTURES.items() if found.window])
def test_the_window_is_felt(name: str) -> None:
    inputs = sentences((0, 0, 0))
    wide, narrow = (ARCHITECTURES[name].build(sliding_window=size) for size in (64, 6))
    with torch.no_grad():
        difference = logits(wide, "handtuned", inputs) - logits(narrow, "handtuned", inputs)
    assert difference[:, :5].abs().max() < 1e-4
    assert difference[:, 10:].abs().max() > 1e-3


def generate(model: Any, implementation: str, **options: Any) -> Tensor:
    """The logits of twelve greedy tokens behind sentences padded on the left."""
    model.set_attn_implementation(implementation)
    options |= dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    found = model.generate(**sentences(left=True), output_logits=True, return_dict_in_generate=True, **options)
    return torch.stack(found.logits)


@pytest.mark.parametrize("architecture", GENERATORS.values(), ids=list(GENERATORS))
def test_generation_with_a_cache(architecture: Architecture) -> None:
    model = architecture.build()
    theirs, ours = (generate(model, name) for name in (architecture.peer, "handtuned"))
    assert_same(ours, theirs, architecture.tolerance)


def test_generation_with_a_static_cache() -> None:
    model, options = ARCHITECTURES["llama, grouped heads"].build(), dict(cache_implementation="static")
    theirs, ours = (generate(model, name, disable_compile=True, **options) for name in ("sdpa", "handtuned"))
    assert_same(ours, theirs, 1e-9)


def test_several_tokens_behind_a_cache() -> None:
    model, inputs = ARCHITECTURES["llama, grouped heads"].build(), sentences((0, 0, 0))
    model.set_attn_implementation("handtuned")
    with torch.no_grad():
        whole = model(**inputs).logits
        first = model(input_ids=inputs["input_ids"][:, :12], use_cache=True)
        rest = model(input_ids=inputs["input_ids"][:, 12:], past_key_values=first.past_key_values).logits
    assert_same(torch.cat([first.logits, rest], 1), whole, 1e-9)


@each
def test_gradients(architecture: Architecture) -> None:
    model, inputs, found = architecture.build(), sentences(), []
    for implementation in (architecture.peer, "handtuned"):
        kept = logits(model, implementation, inputs)
        kept = kept if model.config.is_encoder_decoder else kept[inputs["attention_mask"].bool()]
        parameters = [p for p in model.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(kept.square().mean(), parameters, allow_unused=True))
    for theirs, ours in zip(*found, strict=True):
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            assert (ours - theirs).abs().max() <= architecture.tolerance * max(1.0, theirs.abs().max().item())


def test_dropout_is_applied_in_training_only() -> None:
    model, inputs = ARCHITECTURES["bert"].build(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5), sentences()
    with torch.no_grad():
        quiet = logits(model, "handtuned", inputs)
        assert torch.equal(logits(model.train(), "handtuned", inputs), quiet) is False
        assert torch.equal(logits(model.eval(), "handtuned", inputs), quiet)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_sdpa(dtype: torch.dtype) -> None:
    model, inputs = ARCHITECTURES["llama, grouped heads"].build(), sentences()
    with torch.no_grad():
        exact = logits(model.to(dtype).double(), "sdpa", inputs)
        model = model.to(dtype)
        ours, theirs = ((logits(model, name, inputs).double() - exact) for name in ("handtuned", "sdpa"))
    kept = inputs["attention_mask"].bool()
    assert 0 < ours[kept].square().mean().sqrt() < 1.5 * theirs[kept].square().mean().sqrt()


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["bert", "llama, grouped heads", "gemma2, window and softcap", "gpt-oss, window and sinks"]
)
def test_attention_weights_of_the_fused_forward(name: str) -> None:
    model, inputs, found = ARCHITECTURES[name].build(), sentences(), []
    for implementation in ("eager", "handtuned"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            found.append(model(**inputs, output_attentions=True).attentions)
    kept = inputs["attention_mask"].bool()[:, None, :, None]
    assert len(found[1]) == 3
    for theirs, ours in zip(*found, strict=True):
        assert ((ours - theirs).abs() * kept).max() < 1e-4  # eager takes the softmax in float32


# ---- masks and registration ------------------------------------------------------------------------------------------


def test_bidirectional_padding_is_one_row() -> None:
    from transformers import masking_utils

    kept = sentences()["attention_mask"].bool()
    sizes: dict[str, Any] = dict(batch_size=BATCH, q_length=TOKENS, kv_length=TOKENS, allow_is_causal_skip=False)
    sizes |= dict(mask_function=masking_utils.bidirectional_mask_function, allow_is_bidirectional_skip=True)
    ours = mask(**sizes, attention_mask=kept)
    assert ours is not None
    assert torch.equal(ours, masking_utils.sdpa_mask(**sizes, attention_mask=kept))
    assert ours.stride(2) == 0
    assert mask(**sizes, attention_mask=torch.ones_like(kept)) is None


def test_a_query_without_keys_gives_zero() -> None:
    query, key, value = (torch.randn(1, 2, 3, 4) for _ in range(3))
    seen = torch.tensor([[True, True, True], [False, False, False], [True, False, True]])[None, None]
    output, weights = attention(torch.nn.Module(), query, key, value, seen)
    assert output.shape == (1, 3, 2, 4)
    assert output.is_contiguous()
    assert weights is None
    assert output[0, 1].abs().max() == 0
    assert output[0, 0].abs().max() > 0


def test_heads_inside_rows_are_not_copied() -> None:
    query, key, value = (torch.randn(2, 5, 3, 8).transpose(1, 2) for _ in range(3))
    with torch.no_grad(), torch.profiler.profile() as profile:
        attention(torch.nn.Module(), query, key, value, None)
    assert not {"aten::copy_", "aten::clone"} & {event.key for event in profile.key_averages()}


def test_register_under_another_name() -> None:
    model, inputs = ARCHITECTURES["bert"].build(), sentences()
    with torch.no_grad():
        assert torch.equal(logits(model, register("mine"), inputs), logits(model, register(), inputs))


def test_without_transformers_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeError, match=r"pip install 'transformers>=4\.53'"):
        register()
