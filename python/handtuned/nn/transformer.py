"""Transformer layers: torch.nn's with another forward; no parameter, buffer or attribute is added.

    norm_first=False                                  norm_first=True
    x = norm1(x + dropout1(attend(x)))                x = x + dropout1(attend(norm1(x)))
    x = norm2(x + dropout2(feed_forward(x)))          x = x + dropout2(feed_forward(norm2(x)))
    feed_forward(x) = linear2(dropout(activation(linear1(x))))

A dropout, the residual add and the norm behind it are one pass (add_layer_norm), whichever way round; activation and
inner dropout are the epilogue of linear1, and the last residual add of norm_first is that of linear2. A child that has
been exchanged, patched or hooked is called as a module instead, so it is always what runs.

torch's inference fast path is not taken, and no nested tensor is made. Padding stays a mask, which the attention reads
as lengths; where torch's TransformerEncoder would leave padding out, this one does too, by packing the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .attention import MultiheadAttention
from .fusing import activated, activation_name, add_norm, add_projected, plain
from .twins import constructor, twin

# ---- what layers and stacks share -----------------------------------------------------------------------------------


def _hidden(layer: Any, x: Tensor) -> Tensor:
    """dropout(activation(linear1(x)))."""
    return activated(x, layer.linear1, layer.activation, layer.dropout, activation_name(layer.activation))


def _causal(mask: Tensor | None, hint: bool | None) -> bool:
    """Whether mask is the causal one: the hint, or found by looking, which needs the numbers and so no tracing."""
    if hint is not None or mask is None or mask.dim() != 2 or torch.compiler.is_compiling():
        return bool(hint)
    hidden = torch.ones(mask.shape, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, hidden)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill(hidden, -math.inf))


def _lengths(padding: Tensor) -> Tensor | None:
    """The (N,) lengths that a mask (N, L) hides the ends behind; None if it says anything else."""
    if padding.dtype != torch.bool:
        return None
    lengths = padding.logical_not().sum(1)
    places = torch.arange(padding.shape[1], device=padding.device)
    return lengths if torch.equal(padding, places >= lengths[:, None]) else None


# ---- layers ---------------------------------------------------------------------------------------------------------


@twin
class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer: same constructor, same initial weights, same state_dict."""

    __init__ = constructor(torch.nn.TransformerEncoderLayer)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """src (N, L, E) with batch_first, else (L, N, E); or (L, E). Masks and result as torch's.

        Args:
            src_mask: (L, L) or (N * nhead, L, L).   src_key_padding_mask: (N, L). Bool (True: hidden) or additive.
            is_causal: the hint that src_mask is causal, which is believed; src_mask then need not be given.

        Without masks src may be nested, as torch's own TransformerEncoder leaves padding out; the result then is too.
        """
        if src.is_nested and src_mask is None and src_key_padding_mask is None and not is_causal:
            return self._nested(src)

        def attend(x: Tensor) -> Tensor:
            masks = dict(attn_mask=src_mask, key_padding_mask=src_key_padding_mask, is_causal=is_causal)
            attended: Tensor = self.self_attn(x, x, x, need_weights=False, **masks)[0]
            return attended

        return self.around(src, attend)

    def _nested(self, src: Tensor) -> Tensor:
        """Sequences without padding: their rows packed one after the other."""
        sequences = src.unbind()
        lengths = [len(rows) for rows in sequences]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        attention: Any = self.self_attn
        rows = self.around(torch.cat(sequences), lambda x: attention.attend_packed(x, starts))
        nested: Tensor = torch.nested.as_nested_tensor(list(rows.split(lengths)), layout=src.layout)
        return nested

    def around(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer around any self-attention of rows (*, E)."""
        if self.norm_first:
            normed, x = add_norm(attend(self.norm1(x)), x, self.dropout1, self.norm2)
            return add_projected(_hidden(self, normed), x, self.linear2, self.dropout2)
        x, _ = add_norm(attend(x), x, self.dropout1, self.norm1)
        x, _ = add_norm(self.linear2(_hidden(self, x)), x, self.dropout2, self.norm2)
        return x


@twin
class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer: same constructor, same initial weights, same state_dict."""

    __init__ = constructor(torch.nn.TransformerDecoderLayer)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """tgt (N, T, E) and memory (N, S, E) with batch_first, else (T, N, E) and (S, N, E); or without N.

        Args:
            tgt_mask, memory_mask: (T, T) and (T, S), or with N * nhead before.
            tgt_key_padding_mask, memory_key_padding_mask: (N, T) and (N, S). Bool (True: hidden) or additive.
            tgt_is_causal, memory_is_causal: the hints that the masks are causal, which are believed.
        """

        def attend(x: Tensor) -> Tensor:
            masks = dict(attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask, is_causal=tgt_is_causal)
            attended: Tensor = self.self_attn(x, x, x, need_weights=False, **masks)[0]
            return attended

        def look(x: Tensor) -> Tensor:
            masks = dict(attn_mask=memory_mask, key_padding_mask=memory_key_padding_mask, is_causal=memory_is_causal)
            attended: Tensor = self.multihead_attn(x, memory, memory, need_weights=False, **masks)[0]
            return attended

        x = tgt
        if self.norm_first:
            normed, x = add_norm(attend(self.norm1(x)), x, self.dropout1, self.norm2)
            normed, x = add_norm(look(normed), x, self.dropout2, self.norm3)
            return add_projected(_hidden(self, normed), x, self.linear2, self.dropout3)
        x, _ = add_norm(attend(x), x, self.dropout1, self.norm1)
        x, _ = add_norm(look(x), x, self.dropout2, self.norm2)
        x, _ = add_norm(self.linear2(_hidden(self, x)), x, self.dropout3, self.norm3)
        return x


# ---- stacks ---------------------------------------------------------------------------------------------------------


@twin
class TransformerEncoder(torch.nn.TransformerEncoder):
    """torch.nn.TransformerEncoder: same constructor, same state_dict. Layers and norm become twins.

    Under torch's conditions for nested tensors (enable_nested_tensor, batch_first, not norm_first, in eval mode,
    without gradients, only src_key_padding_mask given, bool, hiding nothing but ends) rows of padding are left out of
    every layer and are 0 before the last norm, as with torch's. torch.backends.mha.set_fastpath_enabled(False) switches
    that off.
    """

    __init__ = constructor(torch.nn.TransformerEncoder)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As TransformerEncoderLayer, for all layers, and the norm. is_causal None: mask is looked at, once."""
        causal = _causal(mask, is_causal)
        if src_key_padding_mask is not None and mask is None and not causal and self._leaves_out(src):
            lengths = _lengths(src_key_padding_mask)
            if lengths is not None:
                return self._normed(self._packed(src, ~src_key_padding_mask, lengths))
        x = src
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask)
        return self._normed(x)

    def _normed(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm(x)

    def _leaves_out(self, src: Tensor) -> bool:
        """Whether torch's class would leave padding out, and the layers are ones that can."""
        if torch.compiler.is_compiling() or not (self.use_nested_tensor and torch.backends.mha.get_fastpath_enabled()):
            return False
        if src.dim() != 3 or self.layers[0].training or torch.is_autocast_enabled(src.device.type):
            return False
        if torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in self.layers[0].parameters())):
            return False
        return all(
            plain(layer, TransformerEncoderLayer) and plain(layer.self_attn, MultiheadAttention)
            for layer in self.layers
        )

    def _packed(self, src: Tensor, kept: Tensor, lengths: Tensor) -> Tensor:
        """All layers on the rows of src (N, L, E) that are kept (N, L); the others are 0."""
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        rows = src[kept]
        for layer in self.layers:
            rows = layer.around(rows, lambda x, layer=layer: layer.self_attn.attend_packed(x, starts))
        return torch.zeros_like(src).masked_scatter_(kept[..., None], rows)


@twin
class TransformerDecoder(torch.nn.TransformerDecoder):
    """torch.nn.TransformerDecoder: same constructor, same state_dict. Layers and norm become twins."""

    __init__ = constructor(torch.nn.TransformerDecoder)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As TransformerDecoderLayer, for all layers, and the norm. tgt_is_causal None: tgt_mask is looked at, once."""
        masks: dict[str, Any] = dict(
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=_causal(tgt_mask, tgt_is_causal),
            memory_is_causal=memory_is_causal,
        )
        x = tgt
        for layer in self.layers:
            x = layer(x, memory, **masks)
        return x if self.norm is None else self.norm(x)


@twin
class Transformer(torch.nn.Transformer):
    """torch.nn.Transformer: same constructor, same initial weights, same state_dict; all inside becomes twins."""

    __init__ = constructor(torch.nn.Transformer)
