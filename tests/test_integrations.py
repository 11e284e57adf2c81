"""transformers with its attention served by handtuned: the same logits, tokens, gradients, whatever the architecture.

The models are small, of random weights and where possible in float64, so that a mask, a scale or an option that got
lost shows as a difference of digits and not of rounding.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import handtuned
from handtuned.integrations.transformers import attention, mask, packed, register, replace
from handtuned.integrations.transformers_blocks import find_block

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

BATCH, TOKENS, VOCABULARY = 3, 21, 64
PADDING = (0, 9, 4)  # tokens, of each sentence
SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=None)
DECODER = {**SIZES, **HEADS, **SPECIAL}


@dataclass(frozen=True)
class Architecture:
    """model: a class of transformers with its config's class and arguments. peer: what handtuned is compared with."""

    model: str
    config: str
    arguments: dict[str, Any] = field(default_factory=dict)
    peer: str = "sdpa"
    generates: bool = True
    window: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """eager takes its softmax in float32, where the float64 number that hides a key is an infinity."""
        return torch.float64 if self.peer == "sdpa" else torch.float32

    @property
    def tolerance(self) -> float:
        return 1e-9 if self.peer == "sdpa" else 1e-4

    def build(self, **changes: Any) -> Any:
        for name in (self.model, self.config):
            if not hasattr(transformers, name):
                pytest.skip(f"transformers {transformers.__version__} has no {name}")
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.arguments | changes)
        model = getattr(transformers, self.model)(config).eval().to(self.dtype)
        for parameter in model.parameters():  # larger than the usual start, so that attention is not flat
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        return model


BERT = {**SIZES, "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
ENCODER_DECODER = dict(vocab_size=VOCABULARY, d_model=32, pad_token_id=0, decoder_start_token_id=1, eos_token_id=None)
BART = {**ENCODER_DECODER, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4} | dict(
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, bos_token_id=1
)
T5 = {**ENCODER_DECODER, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
GPT2 = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **SPECIAL)
GPT_OSS = {**DECODER, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 6} | dict(
    experts_implementation="eager"  # the others have no float64
)
ARCHITECTURES = {
    "bert": Architecture("BertForMaskedLM", "BertConfig", BERT, generates=False),
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", GPT2),
    "bart": Architecture("BartForConditionalGeneration", "BartConfig", BART),
    "t5": Architecture("T5ForConditionalGeneration", "T5Config", T5, "eager"),
    "llama, grouped heads": Architecture("LlamaForCausalLM", "LlamaConfig", DECODER),
    "mistral, window": Architecture(
        "MistralForCausalLM", "MistralConfig", {**DECODER, "sliding_window": 6}, window=True
    ),
    "gemma2, window and softcap": Architecture(
        *("Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "sliding_window": 6, "attn_logit_softcapping": 3.0}),
        peer="eager",
        window=True,
    ),
    "gpt-oss, window and sinks": Architecture("GptOssForCausalLM", "GptOssConfig", GPT_OSS, "eager", window=True),
}
each = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=list(ARCHITECTURES))
GENERATORS = {name: found for name, found in ARCHITECTURES.items() if found.generates}


@pytest.fixture(autouse=True)
def _served_by_a_kernel() -> Any:
    register()
    torch.set_num_threads(1)  # the models are small
    with handtuned.strict():
        yield


def sentences(padding: tuple[int, ...] = PADDING, left: bool = False) -> dict[str, Tensor]:
    """Random tokens, padded on one side."""
    tokens = torch.randint(3, VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    place = torch.arange(TOKENS).expand(BATCH, TOKENS)
    place = place.flip(1) if left else place
    kept = place < TOKENS - torch.tensor(padding)[:, None]
    return {"input_ids": tokens * kept, "attention_mask": kept.long()}


def logits(model: Any, implementation: str, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    model.set_attn_implementation(implementation)
    if model.config.is_encoder_decoder:
        options["decoder_input_ids"] = inputs["input_ids"][:, :7]
    found: Tensor = model(**inputs, **options).logits
    return found


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float, where: Tensor | None = None) -> None:
    difference = (ours - theirs).abs()
    if where is not None:  # at padding, eager averages over all keys where handtuned gives 0
        difference = difference[where.bool()]
    assert difference.max() < tolerance
    assert theirs.std() > 1e-2  # else nothing was compared


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
