"""Arguments of attention that are wrong, and what torch's function makes of the same arguments."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import SHORT
from test_ops import error_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import handtuned
from handtuned import ops
from handtuned.nn import functional as H

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.no_triton]
Q, K, V = torch.ones(2, 4, 5, 8), torch.ones(2, 2, 7, 8), torch.ones(2, 2, 7, 6)
PACKED_Q, PACKED_K, PACKED_V = torch.ones(9, 4, 8), torch.ones(11, 2, 8), torch.ones(11, 2, 6)
PAGES_K, PAGES_V = torch.ones(10, 2, 4, 8), torch.ones(10, 2, 4, 6)


def starts(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


FORMS: dict[str, dict[str, Any]] = {
    "dense": {"query": Q, "key": K, "value": V},
    "packed": {"query": PACKED_Q, "key": PACKED_K, "value": PACKED_V}
    | {"query_starts": starts(0, 4, 9), "key_starts": starts(0, 5, 11)},
    "paged": {"query": Q, "key": PAGES_K, "value": PAGES_V}
    | {"block_table": torch.arange(6, dtype=torch.int32).view(2, 3), "key_lengths": starts(12, 3)},
}


def arguments(op: str, form: str, **changes: Any) -> dict[str, Any]:
    """The op's arguments by name, right but for `changes`."""
    rows, heads = (9, 4) if form == "packed" else (5, 4)
    right: dict[str, Any] = {"scale": 1.0, "bottom_right": False, "window_left": -1, "window_right": -1}
    right |= {"softcap": 0.0, "dropout_p": 0.0, **FORMS[form]}
    result = torch.ones(9, 4, 6) if form == "packed" else torch.ones(2, 4, 5, 6)
    right |= {"grad_output": result, "output": result}
    right |= {"lse": torch.ones(heads, rows) if form == "packed" else torch.ones(2, heads, rows)}
    names = [a.name for a in ops.OPS[op]._schema.arguments]
    return {n: (right | changes).get(n, True if n.startswith("need_") else None) for n in names}


# form, argument, its wrong value, what the message must say
WRONG: list[tuple[str, str, Any, str]] = [
    ("dense", "query", Q.long(), r"query is int64.*float32, float64, bfloat16 and float16"),
    ("dense", "query", Q[0], r"query has shape \[4, 5, 8\]"),
    ("dense", "query", Q[..., :7], r"key has width 8, query has (width )?7"),
    ("dense", "query", Q.double(), r"key is float32, query is float64"),
    ("dense", "query", Q[:, :3], r"query has 3 heads.*2.*multiple"),
    ("dense", "query", torch.ones(2, 4, 5, 0), r"query has width 0, the limits are 1 and 512"),
    ("dense", "query", torch.ones(2, 4, 5, 513), r"query has width 513, the limits are 1 and 512"),
    ("dense", "query", Q[:1], r"key has batch (size )?2, query has (batch )?1"),
    ("dense", "key", K[0], r"key has shape \[2, 7, 8\]"),
    ("dense", "key", K.half(), r"key is float16, query is float32"),
    ("dense", "key", K.to("meta"), r"key is .*(meta|not on the CPU).*move it with \.to\("),
    ("dense", "key", K[:, :, :6], r"value has shape \[2, 2, 7, 6\].*\[2, 2, 6, 8\]"),
    ("dense", "value", V[:, :1], r"value has shape \[2, 1, 7, 6\].*\[2, 2, 7, 8\]"),
    ("dense", "value", V.bfloat16(), r"value is bfloat16, query is float32"),
    ("dense", "value", torch.ones(2, 2, 7, 513), r"value has width 513, the limits are 1 and 512"),
    ("dense", "mask", torch.ones(6, 7), r"mask has shape \[6, 7\].*broadcasts to \[2, 4, 5, 7\]"),
    ("dense", "mask", torch.ones(3, 4, 5, 7), r"mask has shape \[3, 4, 5, 7\].*broadcasts"),
    ("dense", "mask", torch.ones(2, 2, 5, 7), r"mask has shape \[2, 2, 5, 7\].*broadcasts"),
    ("dense", "mask", torch.ones(1, 2, 4, 5, 7), r"mask has (5 dims|shape \[1, 2, 4, 5, 7\])"),
    ("dense", "mask", torch.ones(5, 7).double(), r"mask is float64"),
    ("dense", "mask", torch.ones(5, 7).int(), r"mask is int32.*bool"),
    ("dense", "key_lengths", starts(1, 2, 3), r"key_lengths.*\[3\]"),
    ("dense", "key_lengths", starts(1, 2)[:, None], r"key_lengths.*\[2, 1\]"),
    ("dense", "key_lengths", torch.ones(2), r"key_lengths is float32.*int32 or int64"),
    ("dense", "alibi_slopes", torch.ones(3), r"alibi_slopes.*\[3\].*\[4\].*\[2, 4\]"),
    ("dense", "alibi_slopes", torch.ones(4, 2), r"alibi_slopes.*\[4, 2\].*\[4\].*\[2, 4\]"),
    ("dense", "alibi_slopes", torch.ones(4).int(), r"alibi_slopes is int32"),
    ("dense", "sinks", torch.ones(2), r"sinks.*\[2\].*\[4\]"),
    ("dense", "sinks", torch.ones(4, 1), r"sinks.*\[4, 1\].*\[4\]"),
    ("dense", "sinks", torch.ones(4).double(), r"sinks is float64"),
    ("dense", "softcap", -1.0, r"softcap is -1(\.0)?, the limit is softcap >= 0"),
    ("dense", "softcap", float("nan"), r"softcap is -?nan, the limit is softcap >= 0"),
    ("dense", "dropout_p", 1.5, r"dropout_p is 1\.5, the limits are 0 and 1"),
    ("dense", "dropout_p", 0.5, r"dropout_p is 0\.5 but seed is (None|not)"),
    ("dense", "key_starts", starts(0, 3, 7), r"key_starts"),
    ("packed", "key_starts", None, r"key_starts|key has shape \[11, 2, 8\]"),
    ("packed", "query_starts", None, r"query_starts|query has shape \[9, 4, 8\]"),
    ("packed", "query_starts", starts(), r"query_starts"),
    ("packed", "query_starts", torch.ones(3), r"query_starts is float32.*int32 or int64"),
    ("packed", "key_starts", starts(0, 11), r"key_starts.*\[2\]"),
    ("packed", "query", Q, r"query has shape \[2, 4, 5, 8\]"),
    ("packed", "key", K, r"key has shape \[2, 2, 7, 8\]"),
    ("paged", "key_lengths", None, r"block_table is given but key_lengths is None"),
    ("paged", "block_table", torch.zeros(3, 3).int(), r"block_table.*\[3, 3\]"),
    ("paged", "block_table", torch.zeros(6).int(), r"block_table.*\[6\]"),
    ("paged", "block_table", torch.zeros(2, 3), r"block_table is float32"),
]
BACKWARD: list[tuple[str, str, Any, str]] = [
    ("dense", "grad_output", torch.ones(2, 4, 5, 8), r"grad_output.*\[2, 4, 5, 8\].*\[2, 4, 5, 6\]"),
    ("dense", "output", torch.ones(2, 4, 5, 6).double(), r"output is float64.*float32"),
    ("dense", "lse", torch.ones(2, 4, 6), r"lse.*\[2, 4, 6\].*\[2, 4, 5\]"),
    ("dense", "grad_lse", torch.ones(2, 4, 5).half(), r"grad_lse is float16.*float32"),
    ("packed", "lse", torch.ones(9, 4), r"lse.*\[9, 4\].*\[4, 9\]"),
]
# What only the numbers inside show; fakes have none.
VALUES: list[tuple[str, str, Any, str]] = [
    ("dense", "key_lengths", starts(3, 8), r"key_lengths\[1\] is 8, the limits are 0 and 7"),
    ("dense", "key_lengths", starts(-1, 2), r"key_lengths\[0\] is -1, the limits are 0 and 7"),
    ("packed", "query_starts", starts(1, 4, 9), r"query_starts\[0\] is 1, expected 0"),
    ("packed", "query_starts", starts(0, 6, 4), r"query_starts\[2\] is 4, the limits are 6"),
    ("packed", "query_starts", starts(0, 4, 10), r"query_starts\[2\] is 10, the limits are 4.*9"),
    ("packed", "key_starts", starts(0, 12, 12), r"key_starts\[1\] is 12, the limits are 0.*11"),
    ("packed", "key_lengths", starts(5, 7), r"key_lengths\[1\] is 7, the limits are 0 and 6"),
    ("packed", "mask", torch.ones(4, 6), r"mask has shape \[4, 6\].*broadcasts to \[2, 4, 5, 6\]"),
    ("paged", "key_lengths", starts(13, 3), r"key_lengths\[0\] is 13, the limits are 0 and 12"),
    (
        "paged",
        "block_table",
        starts(0, 1, 2, 10, 4, 5).view(2, 3),
        r"block_table\[1\]\[0\] is 10, the limits are 0 and 9",
    ),
    (
        "paged",
        "block_table",
        starts(0, -1, 2, 3, 4, 5).view(2, 3),
        r"block_table\[0\]\[1\] is -1, the limits are 0 and 9",
    ),
]


def calls(*tables: list[tuple[str, str, Any, str]], backward_only: bool = False) -> list[Any]:
    found = []
    for op in ("attention_backward",) if backward_only else ("attention", "attention_backward"):
        for form, argument, value, says in (row for table in tables for row in table):
            if op == "attention_backward" and (form == "paged" or (form, argument) == ("dense", "query")):
                continue  # pages are for inference; another query makes the saved tensors wrong as well
            what = f"{value.dtype}{list(value.shape)}".replace("torch.", "") if isinstance(value, Tensor) else value
            found.append(pytest.param(op, form, {argument: value}, says, id=f"{op}-{form}-{argument}={what}"))
    return found


def plain(message: str) -> str:
    """Without what may differ: torch's prefix of dtypes, and how floats end."""
    return message.replace("torch.", "").replace(".0,", ",")


@pytest.mark.parametrize(("op", "form", "changes", "says"), calls(WRONG) + calls(BACKWARD, backward_only=True))
def test_wrong_arguments(op: str, form: str, changes: dict[str, Any], says: str) -> None:
    """An error naming op, argument, value, limit and remedy: from the kernel, and the same words from its fake."""
    named = arguments(op, form, **changes)
    real = error_of(lambda: ops.OPS[op](**named))
    assert real.startswith(f"handtuned.{op}: ")
    assert re.search(says, plain(real)), real
    assert "; " in real, f"no remedy: {real}"
    with FakeTensorMode() as mode:
        tensors = {n: mode.from_tensor(a) if isinstance(a, Tensor) else a for n, a in named.items()}
        fake = error_of(lambda: ops.OPS[op](**tensors))
    assert re.search(says, plain(fake)), fake
    if "meta" not in fake:  # dispatched to the fake kernel in both
        assert plain(fake) == plain(real)


@pytest.mark.parametrize(("op", "form", "changes", "says"), calls(VALUES))
def test_wrong_numbers(isa: str, op: str, form: str, changes: dict[str, Any], says: str) -> None:
    message = error_of(lambda: ops.OPS[op](**arguments(op, form, **changes)))
    assert message.startswith(f"handtuned.{op}: ")
    assert re.search(says, message), message
    assert "; " in message, f"no remedy: {message}"


@pytest.mark.parametrize("form", FORMS)
def test_right_arguments(isa: str, form: str) -> None:
    """What the wrong ones are made of is right, so that each is wrong for its own reason only."""
    output, lse = ops.attention(**arguments("attention", form))
    assert output.isfinite().all()
    assert lse.isfinite().all()
    if form != "paged":
        assert all(
            g.numel() == 0 or g.isfinite().all()
            for g in ops.attention_backward(**arguments("attention_backward", form))
        )


@pytest.mark.parametrize("window", [(-2, 0), (0, -3), -5], ids=str)
def test_wrong_windows_and_alignments(kernels: str, window: Any) -> None:
    q = torch.ones(1, 1, 3, 4)
    message = error_of(lambda: H.scaled_dot_product_attention(q, q, q, window=window))
    assert f"window is {window}" in message
    message = error_of(lambda: H.scaled_dot_product_attention(q, q, q, is_causal=True, causal_alignment="left"))
    assert "causal_alignment is 'left'" in message
    assert "'bottom_right'" in message


# ---- torch's own function --------------------------------------------------------------------------------------------


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# What torch takes, and must give the same here.
TAKEN: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "two_dims": lambda: ((draw(3, 8), draw(5, 8), draw(5, 6)), {}),
    "three_dims": lambda: ((draw(2, 3, 8), draw(2, 5, 8), draw(2, 5, 6)), {"is_causal": True}),
    "three_dims_mask": lambda: ((draw(2, 3, 8), draw(2, 5, 8), draw(2, 5, 8), draw(2, 3, 5)), {}),
    "five_dims": lambda: ((draw(2, 1, 3, 3, 8), draw(2, 1, 3, 5, 8), draw(2, 1, 3, 5, 8)), {"scale": 0.5}),
    "five_dims_mask": lambda: (
        (draw(2, 2, 3, 3, 8), draw(2, 2, 3, 5, 8), draw(2, 2, 3, 5, 8), draw(2, 1, 1, 1, 5)),
        {},
    ),
    "batch_broadcast": lambda: ((draw(2, 3, 4, 8), draw(1, 3, 5, 8), draw(2, 3, 5, 8)), {}),
    "heads_broadcast": lambda: ((draw(2, 3, 4, 8), draw(2, 1, 5, 8), draw(2, 1, 5, 8)), {}),
    "grouped": lambda: ((draw(2, 6, 4, 8), draw(2, 2, 5, 8), draw(2, 2, 5, 8)), {"enable_gqa": True}),
    "grouped_three_dims": lambda: ((draw(6, 4, 8), draw(2, 5, 8), draw(2, 5, 8)), {"enable_gqa": True}),
    "bool_mask": lambda: ((draw(2, 3, 4, 8), draw(2, 3, 5, 8), draw(2, 3, 5, 8), torch.ones(4, 5).tril(1).bool()), {}),
    "one_mask": lambda: ((draw(2, 3, 4, 8), draw(2, 3, 5, 8), draw(2, 3, 5, 8), draw(1)), {}),
    "no_batch": lambda: ((draw(0, 3, 4, 8), draw(0, 3, 5, 8), draw(0, 3, 5, 8)), {}),
    "no_queries": lambda: ((draw(2, 3, 0, 8), draw(2, 3, 5, 8), draw(2, 3, 5, 8)), {}),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_torch_takes(kernels: str, name: str) -> None:
    positional, named = TAKEN[name]()
    leaves = [t.requires_grad_() for t in positional if t.is_floating_point()]
    ours, torchs = (f(*positional, **named) for f in (H.scaled_dot_product_attention, F.scaled_dot_product_attention))
    torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(o.sin().sum(), leaves) for o in (ours, torchs)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    output, lse = H.scaled_dot_product_attention(*positional, **named, return_lse=True)
    assert lse.shape == output.shape[:-1]


# What torch refuses, and must be refused here.
REFUSED: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "one_dim": lambda: ((draw(8), draw(8), draw(8)), {}),
    "widths": lambda: ((draw(2, 3, 4, 8), draw(2, 3, 5, 7), draw(2, 3, 5, 8)), {}),
    "heads_without_gqa": lambda: ((draw(2, 6, 4, 8), draw(2, 2, 5, 8), draw(2, 2, 5, 8)), {}),
    "heads_no_multiple": lambda: ((draw(2, 5, 4, 8), draw(2, 2, 5, 8), draw(2, 2, 5, 8)), {"enable_gqa": True}),
    "dtypes": lambda: ((draw(2, 3, 4, 8), draw(2, 3, 5, 8).float(), draw(2, 3, 5, 8)), {}),
    "mask_dtype": lambda: ((draw(2, 3, 4, 8), draw(2, 3, 5, 8), draw(2, 3, 5, 8), torch.ones(4, 5).int()), {}),
    "mask_shape": lambda: ((draw(2, 3, 4, 8), draw(2, 3, 5, 8), draw(2, 3, 5, 8), draw(5, 4)), {}),
    "batch": lambda: ((draw(2, 3, 4, 8), draw(3, 3, 5, 8), draw(3, 3, 5, 8)), {}),
    "dropout": lambda: ((draw(2, 3, 4, 8), draw(2, 3, 5, 8), draw(2, 3, 5, 8), None, 1.5), {}),
    "integers": lambda: ((torch.ones(2, 3, 8).long(),) * 3, {}),
}


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses(name: str, requires_grad: bool) -> None:
    positional, named = REFUSED[name]()
    if requires_grad and positional[0].is_floating_point():
        positional[0].requires_grad_()
    with pytest.raises((RuntimeError, ValueError)):
        F.scaled_dot_product_attention(*positional, **named)
    for backend in ("auto", "reference"):
        with handtuned.backend(backend):
            message = error_of(lambda: H.scaled_dot_product_attention(*positional, **named))
        assert re.match(r"handtuned\.\w*attention: ", message), message
        assert "; " in message, f"no remedy: {message}"


@pytest.mark.parametrize("dtype", SHORT, ids=SHORT.get)
def test_mask_beside_is_causal_means_both(kernels: str, dtype: torch.dtype) -> None:
    """torch refuses it."""
    q, k, v = (torch.randn(1, 2, 6, 8).to(dtype) for _ in range(3))
    mask = torch.rand(6, 6) < 0.7
    both = H.scaled_dot_product_attention(q, k, v, mask, is_causal=True)
    assert both.equal(H.scaled_dot_product_attention(q, k, v, mask & torch.ones(6, 6).tril().bool()))


def test_a_query_without_dims_is_named() -> None:
    """With the default scale, which depends on its width."""
    scalar, keys, starts = torch.tensor(1.0), torch.randn(2, 2, 9, 4), torch.tensor([0, 3, 6], dtype=torch.int32)
    calls: list[Callable[[], Any]] = [
        lambda: H.scaled_dot_product_attention(scalar, keys, keys),
        lambda: H.attention_varlen(scalar, keys[0], keys[0], starts, starts),
        lambda: H.attention_with_kv_cache(scalar, keys, keys, cache_lengths=starts[1:]),
        lambda: H.attention_weights(scalar, keys, torch.randn(2, 2, 3)),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"query has shape \[\], expected .* dims.*; unsqueeze"):
            call()
