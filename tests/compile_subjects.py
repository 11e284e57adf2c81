"""Small models that go through every public module and function, for the tests of compilers, exporters and copies.

A subject takes a batch and a length and draws its inputs; all of them are (batch, length, WIDTH) wherever that makes
sense, so that one list of sizes serves all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from handtuned import nn
from handtuned.nn import functional as H

WIDTH, HEADS, CLASSES = 16, 2, 11
Inputs = Callable[[int, int], tuple[Any, ...]]


def rows(batch: int, length: int) -> tuple[Tensor]:
    return (torch.randn(batch, length, WIDTH),)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Norms(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.rms = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.add_layer, self.add_rms = nn.AddLayerNorm(WIDTH), nn.AddRMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y, residual = self.add_layer(self.layer(x), self.rms(x))
        y, residual = self.add_rms(y, residual)
        return y + residual


class Linears(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.swiglu, self.geglu = nn.Linear(WIDTH, WIDTH), nn.SwiGLU(WIDTH, 24), nn.GEGLU(WIDTH, 24)
        self.int8 = nn.Int8Linear.from_linear(torch.nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = H.linear(self.linear(x), self.linear.weight, self.linear.bias, activation="gelu", residual=x)
        return self.int8(self.swiglu(y) + self.geglu(y))


class Losses(torch.nn.Module):
    """One loss each row, by the function and by the module where torch has it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)
        kind = getattr(nn, "LinearCrossEntropyLoss", None)
        self.loss = None if kind is None else kind(WIDTH, CLASSES, reduction="none")

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        options: dict[str, Any] = dict(linear_bias=self.head.bias, reduction="none")
        loss = H.linear_cross_entropy(x, self.head.weight, target, label_smoothing=0.1, **options)
        return loss if self.loss is None else loss + self.loss(x.flatten(0, 1), target.flatten()).view_as(target)


class Attentions(torch.nn.Module):
    """The functions: masks, lengths, windows and rows without padding, on rotated queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        cos, sin = H.rotary_tables(64, WIDTH // HEADS)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, x: Tensor, lengths: Tensor, mask: Tensor, starts: Tensor) -> Tensor:
        q, k, v = (heads(t) for t in self.qkv(x).chunk(3, -1))
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        q, k = (H.rotary_embedding(t, cos, sin) for t in (q, k))
        y = H.scaled_dot_product_attention(q, k, v, mask, is_causal=True, key_lengths=lengths)
        y = y + H.scaled_dot_product_attention(q, k, v, window=(3, 0))
        flat = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        packed = H.attention_varlen(*flat, starts, starts, is_causal=True)
        return y.transpose(1, 2).flatten(2) + packed.view_as(x)


def attention_inputs(batch: int, length: int) -> tuple[Tensor, ...]:
    lengths = torch.arange(batch) % length + 1
    mask = torch.randn(batch, 1, length, length)
    return (*rows(batch, length), lengths, mask, torch.arange(batch + 1) * length)


class Tools(torch.nn.Module):
    """What is done with the log-sum-exp."""

    def forward(self, x: Tensor) -> Tensor:
        q = heads(x)
        near, far = (H.scaled_dot_product_attention(q, q, q, window=w, return_lse=True) for w in (2, None))
        y, lse = H.merge_attention(*near, *far)
        return y + H.attention_weights(q, q, lse) @ q


class Encoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.SinusoidalPositionalEncoding(WIDTH, dropout=0.0, max_length=64, batch_first=True)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.0, activation="gelu", batch_first=True)
        self.stack = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        y = self.stack(self.positions(x), src_key_padding_mask=padding)
        return y + self.attention(y, y, y, key_padding_mask=padding, need_weights=False)[0]


def encoder_inputs(batch: int, length: int) -> tuple[Tensor, ...]:
    lengths = length - torch.arange(batch) % length
    return (*rows(batch, length), torch.arange(length) >= lengths[:, None])


def whole_transformer() -> torch.nn.Module:
    return nn.Transformer(WIDTH, HEADS, 1, 1, 24, dropout=0.0, norm_first=True, batch_first=True)


class Recurrent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = dict(batch_first=True, bidirectional=True)
        self.lstm, self.gru = nn.LSTM(WIDTH, 8, 2, proj_size=4, **options), nn.GRU(WIDTH, 8, **options)
        self.rnn = nn.RNN(WIDTH, 16, batch_first=True)
        self.variant = nn.LSTM(WIDTH, 16, batch_first=True, peepholes=True, coupled_gates=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y, _ = self.lstm(x, lengths=lengths)
        return torch.cat([y, self.gru(x)[0], self.rnn(x)[0], self.variant(x, lengths=lengths)[0]], -1)


def recurrent_inputs(batch: int, length: int) -> tuple[Tensor, ...]:
    return (*rows(batch, length), torch.arange(batch) % (length + 1))


class Cells(torch.nn.Module):
    """One step of each cell, and of a whole sequence the functions."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(WIDTH, WIDTH), nn.GRUCell(WIDTH, WIDTH)
        self.rnn = nn.RNNCell(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0]
        h = self.rnn(first, self.gru(first, self.lstm(first)[0]))
        weights = {name: [getattr(getattr(self, name), n) for n in PARAMETERS] for name in ("lstm", "gru", "rnn")}
        y, _ = H.lstm(x, (h[None], h[None]), weights["lstm"], batch_first=True)
        y, _ = H.gru(y, h[None], weights["gru"], batch_first=True)
        return H.rnn(y, h[None], weights["rnn"], batch_first=True)[0]


PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

# By family: how it is made, and its inputs of a batch and a length. The first input and all parameters want gradients.
SUBJECTS: dict[str, tuple[Callable[[], torch.nn.Module], Inputs]] = {
    "norms": (Norms, rows),
    "linears": (Linears, rows),
    "losses": (Losses, lambda batch, length: (*rows(batch, length), torch.randint(CLASSES, (batch, length)))),
    "attentions": (Attentions, attention_inputs),
    "tools": (Tools, rows),
    "encoder": (Encoder, encoder_inputs),
    "transformer": (whole_transformer, lambda batch, length: (*rows(batch, length), *rows(batch, length + 1))),
    "recurrent": (Recurrent, recurrent_inputs),
    "cells": (Cells, rows),
}


class Step(torch.nn.Module):
    """A step with a cache: new keys and values are rotated and written, then seen. Inference only."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        cos, sin = H.rotary_tables(64, WIDTH // HEADS)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = (heads(t) for t in self.qkv(x).chunk(3, -1))
        tables = dict(rotary_cos=self.cos, rotary_sin=self.sin)
        output: Any = H.attention_with_kv_cache(q, keys, values, k, v, cache_lengths=lengths, **tables)
        return output


def step_inputs(batch: int, length: int) -> tuple[Tensor, ...]:
    caches = (torch.zeros(batch, HEADS, 64, WIDTH // HEADS) for _ in range(2))
    return (*rows(batch, length), *caches, torch.arange(batch))
