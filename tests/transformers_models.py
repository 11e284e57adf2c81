"""Small transformers models of several architectures, with random weights and where possible in float64, so that a
mask, a scale or an option that got lost shows as a difference of digits and not of rounding."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import handtuned
from handtuned.integrations.transformers import register

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


@pytest.fixture(autouse=True)
def served_by_a_kernel() -> Iterator[None]:
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


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float, where: Tensor | None = None) -> None:
    difference = (ours - theirs).abs()
    if where is not None:  # at padding, eager averages over all keys where handtuned gives 0
        difference = difference[where.bool()]
    assert difference.max() < tolerance
    assert theirs.std() > 1e-2  # else nothing was compared
