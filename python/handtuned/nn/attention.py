"""MultiheadAttention: torch.nn's with another forward; no parameter, buffer or attribute is added."""

from __future__ import annotations

import torch
from torch import Tensor

from .functional.attention import attention_varlen
from .functional.linear import linear
from .functional.multi_head_attention import attend_heads, check_inputs, project_packed, project_separately
from .packing import KeepsPacked, packed_weight
from .twins import twin


@twin
class MultiheadAttention(KeepsPacked, torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: same constructor, same initial weights, same state_dict.

    Masks keep torch's meaning (bool: True hides). What differs is listed at functional.multi_head_attention_forward.
    With batch_first=True nothing is copied between the projections; without it the merged heads are, once. Outside
    training the weights are kept packed: see keep_packed and drop_packed().
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(output, None or the weights), as torch's; shapes as in functional.multi_head_attention_forward.

        Args:
            query: (N, L, E) with batch_first, else (L, N, E); or (L, E).   key, value: likewise, S rows.
            key_padding_mask: (N, S).   attn_mask: (L, S) or (N * num_heads, L, S). Bool (True: hidden) or additive.
            need_weights: also return the weights, averaged over the heads with average_attn_weights.
            is_causal: the hint that attn_mask is causal; it then need not be given.
        """
        check_inputs(query, key, value, self.embed_dim, self.num_heads)
        if self._qkv_same_embed_dim:
            q, k, v = project_packed(query, key, value, self.in_proj_weight, self.in_proj_bias, self._project)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            q, k, v = project_separately(query, key, value, weights, self.in_proj_bias, self._project)
        merged, attention = attend_heads(
            *(q, k, v, self.num_heads),
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            bias_k=self.bias_k,
            bias_v=self.bias_v,
            add_zero_attn=self.add_zero_attn,
            dropout_p=self.dropout if self.training else 0.0,
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            batch_first=self.batch_first,
        )
        return self._project_back(merged), attention

    def attend_packed(self, rows: Tensor, starts: Tensor) -> Tensor:
        """Self-attention of sequences packed one after the other, without masks; for the encoder's layers.

        rows: (T, E).   starts: (N + 1,), the first row of each sequence and T.   Returns (T, E).
        """
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1))
            for x in project_packed(rows, rows, rows, self.in_proj_weight, self.in_proj_bias, self._project)
        )
        output: Tensor = attention_varlen(q, k, v, starts, starts, dropout_p=self.dropout if self.training else 0.0)
        return self._project_back(output.flatten(1))

    def _project(self, which: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(input, weight, bias, packed=packed_weight(self, which, weight, input))

    def _project_back(self, merged: Tensor) -> Tensor:
        return self._project("out", merged, self.out_proj.weight, self.out_proj.bias)
