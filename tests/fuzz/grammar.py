"""A grammar of calls, most of them wrong: right ones of every op, public function and module, arguments exchanged.

A word of the grammar is a string of bytes; each choice takes the next one, and 0 when there are no more. So whatever
drives the fuzzer, hypothesis or what code was reached, only makes bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import handtuned
from handtuned import flash_attn, nn
from handtuned.nn import functional as H

Args = tuple[Any, ...]
CALL, CHANGES = 2, 3  # bytes that choose the call; the most changes to it


@dataclass
class Right:
    """A call that is right. Torch's own form of it, if there is one: what that raises, ours may raise."""

    name: str
    run: Callable[..., Any]
    args: Args = ()
    options: dict[str, Any] = field(default_factory=dict)
    torchs: Callable[..., Any] | None = None


class Choices:
    def __init__(self, word: bytes) -> None:
        self.word, self.at = word, 0

    def below(self, n: int) -> int:
        self.at += 1
        return self.word[self.at - 1] % n if self.at <= len(self.word) else 0

    def of(self, values: list[Any]) -> Any:
        return values[self.below(len(values))]


# ---- right calls -----------------------------------------------------------------------------------------------------


def ops() -> Iterator[Right]:
    for op, args, kwargs in handtuned.testing.op_samples():
        yield Right(op._schema.name, op, args, kwargs)


def functions() -> Iterator[Right]:
    x, w, b = torch.randn(2, 3, 6), torch.randn(6), torch.randn(6)
    f = torch.nn.functional
    for args in ((x, (6,), w, b, 1e-5), (x.bfloat16(), (3, 6), None, None, 1e-5)):
        yield Right("layer_norm", H.layer_norm, args, torchs=f.layer_norm)
    yield Right("rms_norm", H.rms_norm, (x, (6,), w, 1e-6), torchs=f.rms_norm)
    yield Right("add_layer_norm", H.add_layer_norm, (x, x + 1, (6,), w, b, 1e-5, 0.3, True))
    yield Right("add_rms_norm", H.add_rms_norm, (x, x + 1, (6,), w, 1e-6, 0.3, True))
    yield from attentions()
    yield from linears()
    yield from recurrent()
    q, lse = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3)
    yield Right("merge_attention", H.merge_attention, (q, lse, q + 1, lse))
    options: dict[str, Any] = dict(rows=[0, 2], heads=1, average=True, top_k=2, window=1)
    options["key_lengths"] = torch.tensor([3, 1])
    yield Right("attention_weights", H.attention_weights, (q, q, lse), options)
    cos, sin = H.rotary_tables(5, 4)
    yield Right("rotary_tables", H.rotary_tables, (5, 4, 1e4))
    yield Right("rotary_embedding", H.rotary_embedding, (torch.randn(2, 5, 4), cos, sin), {"interleaved": True})


def attentions() -> Iterator[Right]:
    q, k, v = (torch.randn(2, 2, n, 4) for n in (3, 5, 5))
    mask, lengths, starts = torch.randn(3, 5), torch.tensor([5, 2]), torch.tensor([0, 3, 6], dtype=torch.int32)
    torchs = torch.nn.functional.scaled_dot_product_attention
    yield Right("sdpa", H.scaled_dot_product_attention, (q, k, v, mask, 0.0, False, 0.5, True), torchs=torchs)
    options: dict[str, Any] = dict(is_causal=True, causal_alignment="bottom_right", window=(2, 0), key_lengths=lengths)
    options |= dict(alibi_slopes=torch.rand(2), softcap=2.0, sinks=torch.randn(2), return_lse=True, dropout_p=0.3)
    yield Right("sdpa with options", H.scaled_dot_product_attention, (q, k, v), options)
    rows = torch.randn(6, 2, 4)
    packed: dict[str, Any] = dict(is_causal=True, window=2, max_query_length=3, max_key_length=3, dropout_p=0.2)
    yield Right("varlen", H.attention_varlen, (rows, rows, rows, starts, starts), packed)
    cache, pages, table = torch.randn(2, 2, 9, 4), torch.randn(4, 2, 4, 4), torch.tensor([[0, 1], [3, 2]])
    cos, sin = H.rotary_tables(9, 4)
    turned = dict(cache_lengths=lengths, rotary_cos=cos, rotary_sin=sin, return_lse=True)
    yield Right("cache", H.attention_with_kv_cache, (q, cache, cache + 1, q, q), turned)
    paged = dict(cache_lengths=lengths, block_table=table)
    yield Right("pages", H.attention_with_kv_cache, (q, pages, pages, q, q), paged)
    x, weights = torch.randn(3, 2, 8), [torch.randn(24, 8), torch.randn(24)]
    given = (x, x, x, 8, 2, *weights, None, None, False, 0.0, torch.randn(8, 8), torch.randn(8), True)
    more = dict(key_padding_mask=torch.zeros(2, 3, dtype=torch.bool), attn_mask=torch.zeros(3, 3))
    mha = torch.nn.functional.multi_head_attention_forward
    yield Right("multi_head", H.multi_head_attention_forward, given, more, torchs=mha)
    a, qkv = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 3, 2, 4)
    tail: dict[str, Any] = dict(causal=True, window_size=(2, 0), alibi_slopes=torch.rand(2))
    yield Right("flash", flash_attn.flash_attn_func, (a, a, a), tail)
    yield Right("flash kv", flash_attn.flash_attn_kvpacked_func, (a, qkv[:, :, :2]), tail)
    yield Right("flash qkv", flash_attn.flash_attn_qkvpacked_func, (qkv,), tail)
    yield Right("flash varlen", flash_attn.flash_attn_varlen_func, (rows, rows, rows, starts, starts, 3, 3), tail)
    kv, all_three = torch.randn(6, 2, 2, 4), torch.randn(6, 3, 2, 4)
    yield Right("flash varlen kv", flash_attn.flash_attn_varlen_kvpacked_func, (rows, kv, starts, starts, 3, 3), tail)
    yield Right("flash varlen qkv", flash_attn.flash_attn_varlen_qkvpacked_func, (all_three, starts, 3), tail)
    held = torch.randn(2, 9, 2, 4)
    appended = dict(k=a, v=a, cache_seqlens=lengths.int(), causal=True, return_softmax_lse=True)
    yield Right("flash cache", flash_attn.flash_attn_with_kvcache, (a, held, held + 1), appended)


def linears() -> Iterator[Right]:
    x, w, b = torch.randn(2, 3, 6), torch.randn(7, 6), torch.randn(7)
    f = torch.nn.functional
    yield Right("linear", H.linear, (x, w, b), torchs=f.linear)
    more: dict[str, Any] = dict(activation="gelu", residual=torch.randn(2, 3, 7), dropout_p=0.3)
    yield Right("linear with options", H.linear, (x, w, b), more | {"packed": H.pack_linear_weight(w)})
    yield Right("pack_linear_weight", H.pack_linear_weight, (w,))
    q, scale = H.quantize_linear_weight(w)
    yield Right("quantize_linear_weight", H.quantize_linear_weight, (w,))
    yield Right("pack_int8_weight", H.pack_int8_weight, (q,))
    yield Right("linear_int8", H.linear_int8, (x, H.pack_int8_weight(q), scale, b), more | {"quantize_input": True})
    target, options = torch.tensor([[0, 1, 2], [6, -100, 4]]), dict(linear_bias=b, weight=b.abs(), label_smoothing=0.1)
    yield Right("cross_entropy", H.linear_cross_entropy, (x, w, target), options | {"softcap": 2.0, "z_loss": 0.1})


def recurrent() -> Iterator[Right]:
    x, lengths = torch.randn(4, 2, 3), torch.tensor([4, 2])
    kinds = (("LSTM", H.lstm, H.lstm_cell, 4), ("GRU", H.gru, H.gru_cell, 3), ("RNN_TANH", H.rnn, H.rnn_cell, 1))
    for name, function, cell, gates in kinds:
        w = [torch.randn(gates * 5, n) for n in (3, 5)] + [torch.randn(gates * 5) for _ in range(2)]
        h = torch.randn(1, 2, 5)
        state, one = ((h, h), (h[0], h[0])) if name == "LSTM" else (h, h[0])
        yield Right(name, function, (x, state, w, True, 1, 0.0, False, False, False), {"lengths": lengths})
        yield Right(f"{name} kept", function, (x, None, w), {"packed": H.pack_rnn_weights(name, w)})
        yield Right(f"{name} zoneout", function, (x, None, w), {"training": True, "zoneout": 0.3})
        yield Right(f"{name} cell", cell, (x[0], one, *w))
        yield Right(f"pack {name}", H.pack_rnn_weights, (name, w, True, False))


def modules() -> Iterator[Right]:
    x, flags = torch.randn(3, 2, 8), torch.zeros(2, 3, dtype=torch.bool)
    layer, other = (8, 2, 12, 0.1), (x, torch.randn(4, 2, 8))
    made: list[tuple[str, Args, Args]] = [
        *(("LayerNorm", (8, 1e-5, True, True), (x,)), ("RMSNorm", (8, 1e-5, True), (x,))),
        *(("AddLayerNorm", (8, 1e-5), (x, x)), ("AddRMSNorm", ((2, 8), 1e-5), (x, x))),
        *(("Linear", (8, 5, True), (x,)), ("Int8Linear", (8, 5, True), (x,))),
        *(("SwiGLU", (8, 12, True, 0.1), (x,)), ("GEGLU", (8, 12, False), (x,))),
        ("MultiheadAttention", (8, 2, 0.1, True, True, False, 8, 8), (x, x, x, flags, True, torch.zeros(3, 3))),
        ("TransformerEncoderLayer", layer, (x, torch.zeros(3, 3), flags)),
        ("TransformerDecoderLayer", layer, (*other, torch.zeros(3, 3), torch.zeros(3, 4), flags)),
        ("Transformer", (8, 2, 1, 1, 12), (*other, torch.zeros(3, 3))),
        ("TransformerEncoder", (nn.TransformerEncoderLayer(8, 2, 12), 1), (x, torch.zeros(3, 3), flags)),
        ("TransformerDecoder", (nn.TransformerDecoderLayer(8, 2, 12), 1), (*other, torch.zeros(3, 3))),
        ("SinusoidalPositionalEncoding", (8, 0.1, 16), (x, 2)),
        *(("LSTM", (8, 5, 2, True, False, 0.1, True), (x,)), ("GRU", (8, 5), (x, torch.randn(1, 2, 5)))),
        *(("RNN", (8, 5), (x, torch.randn(1, 2, 5))), ("LSTMCell", (8, 5), (x[0], (x[0, :, :5], x[0, :, :5])))),
        *(("GRUCell", (8, 5), (x[0], x[0, :, :5])), ("RNNCell", (8, 5), (x[0],))),
        ("LinearCrossEntropyLoss", (8, 9), (x[0], torch.tensor([1, 2]))),
    ]
    for name, args, inputs in made:
        if hasattr(nn, name):
            kind, torchs = getattr(nn, name), getattr(torch.nn, name, None)
            yield Right(f"{name}()", kind, args, torchs=torchs)
            called = torchs(*args) if torchs else None
            yield Right(f"{name}.forward", kind(*args), inputs, torchs=called)


def tools() -> Iterator[Right]:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    x = torch.randn(2, 4)
    yield Right("replace", handtuned.replace, (model,), {"check": x, "strict": True})
    yield Right("quantize", handtuned.quantize, (model,), {"quantize_input": True, "skip": ("0",)})
    yield Right("explain", handtuned.explain, (nn.LayerNorm(4), x))
    yield Right("backend", handtuned.backend, ("reference",))
    yield Right("isa", handtuned.testing.isa, ("generic",))


def right_calls() -> list[Right]:
    torch.manual_seed(0)
    return [*functions(), *modules(), *tools(), *ops()]


# ---- wrong ones ------------------------------------------------------------------------------------------------------

TENSORS: list[Callable[[Tensor], Any]] = [
    lambda t: t[..., :-1] if t.dim() else t,
    lambda t: t[:0] if t.dim() else t,
    lambda t: t[:1] if t.dim() else t,
    lambda t: t[None],
    lambda t: t.flatten(),
    lambda t: t.mT if t.dim() > 1 else t,
    lambda t: torch.cat([t, t]) if t.dim() else t,
    lambda t: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t,  # the last stride is 2
    lambda t: t[..., :1].expand(t.shape) if t.numel() else t,  # it is 0
    lambda t: t.flip(0) if t.dim() else t,
    lambda t: t.sum(),
    lambda t: t.new_empty(0),
    lambda t: t * math.nan if t.is_floating_point() else t - 2**40 if t.dtype == torch.int64 else t - 9,
    lambda t: t.double() * 1e30 if t.is_floating_point() else t + 7,
    lambda t: t.bfloat16(),
    lambda t: t.half(),
    lambda t: t.double(),
    lambda t: t.long() if t.dtype.is_complex is False else t,
    lambda t: t.to(torch.int8),
    lambda t: t.bool(),
    lambda t: t.to(torch.complex64),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t,
]
BYTES: list[Callable[[Tensor], Any]] = [  # packed weights: what is in them are numbers, never places
    lambda t: t,
    lambda t: t[:0] if t.dim() else t,
    lambda t: t[:-1] if t.dim() else t,
    lambda t: t[None],
    lambda t: t.float(),
    lambda t: t.to("meta"),
    lambda t: t.fill_(127),
    lambda t: t * 37 + 11,
    lambda t: t.bitwise_not_(),
]
INTS = [-1, 0, 1, 2, 7, -(2**63), 2**31, 2**62]
FLOATS = [-1.0, 0.0, 0.5, 1.0, 2.0, math.nan, math.inf, -math.inf, 1e300, 1e-300]
STRANGERS: list[Any] = [None, 3, 0.5, "x", True, [1, 2], (), {}, b"", object()]


def changed(value: Any, choices: Choices, large: bool) -> tuple[Any, bool]:
    """Another value in its place, and whether it is of another kind."""
    if choices.below(8) == 7:
        stranger = choices.of([*STRANGERS, torch.ones(2, 3), torch.tensor([1, 0])])
        return stranger, type(stranger) is not type(value)
    if isinstance(value, Tensor):
        if value.dtype in (torch.uint8, torch.int8):
            return choices.of(BYTES)(value), False
        try:
            return choices.of(TENSORS)(value), False
        except (RuntimeError, IndexError):  # a change that torch does not make of this dtype or layout
            return value, False
    if isinstance(value, bool):
        return not value, False
    if isinstance(value, int):
        return choices.of(INTS if large else INTS[:6]), False
    if isinstance(value, float):
        return choices.of(FLOATS), False
    if isinstance(value, str):
        return choices.of(["", "nonsense", value.upper(), "none", "tanh", "sum", "bottom_right", "LSTM"]), False
    if isinstance(value, (list, tuple)) and value:
        place = choices.below(len(value))
        kind = choices.below(4)
        if kind == 0:
            return value[:place], False
        if kind == 1:
            return (*value, value[place]), False
        found, other = changed(value[place], choices, large)
        return type(value)([*value[:place], found, *value[place + 1 :]]), other
    return choices.of([torch.ones(2, 3), torch.tensor([1, 2]), 1, 0.5]), True


def own(value: Any) -> Any:
    """The same with tensors of its own, which a call may write into."""
    if isinstance(value, Tensor):
        return value.clone()
    return type(value)(own(v) for v in value) if isinstance(value, (list, tuple)) else value


@dataclass
class Call:
    right: Right
    args: list[Any]
    options: dict[str, Any]
    other_kind: bool  # whether some argument is of a kind that does not belong there

    def __str__(self) -> str:
        return f"{self.right.name}{tuple(map(short, self.args))} { ({k: short(v) for k, v in self.options.items()}) }"


def short(value: Any) -> str:
    if isinstance(value, Tensor):
        plain = value.device.type == "cpu" and value.layout == torch.strided
        where = "" if plain else f" {value.device} {value.layout}"
        strides = value.stride() if value.layout == torch.strided else ()
        return f"{str(value.dtype)[6:]}{list(value.shape)} strides {list(strides)}{where}"
    return f"[{', '.join(map(short, value))}]" if isinstance(value, (list, tuple)) else repr(value)[:60]


def call_of(word: bytes, rights: list[Right]) -> Call:
    choices = Choices(word)
    right = rights[(choices.below(256) + 256 * choices.below(256)) % len(rights)]
    args, options, other = own(list(right.args)), {k: own(v) for k, v in right.options.items()}, False
    large = "()" not in right.name  # no constructor of 2^31 layers
    for _ in range(choices.below(CHANGES + 1)):
        places = [*range(len(args)), *options]
        place = choices.below(len(places) + 1)
        if place == len(places):  # one less, or one too many
            if choices.below(2) and args:
                args.pop()
            else:
                options["unknown"] = 1
            other = True
            continue
        where: Any = args if place < len(args) else options
        where[places[place]], kind = changed(where[places[place]], choices, large)
        other = other or kind
    return Call(right, args, options, other)
