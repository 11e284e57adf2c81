"""Hugging Face transformers' models served by handtuned: all of one, or its attention alone.

    from handtuned.integrations.transformers import register, replace

    report = replace(model)                 # attention, linears, norms, feed-forwards; report.undo() takes it back

    model = AutoModel.from_pretrained(folder, attn_implementation=register())
    model.set_attn_implementation("sdpa")   # and back, at any time

The attention serves every model that takes it from transformers' attention interface: with padding, causal, sliding
window or custom masks, grouped heads, a key-value cache, soft-capped scores, sinks, position biases and dropout,
forward and backward. Masks are those of the "sdpa" implementation, except that the padding of a bidirectional model
keeps one row instead of a row for each query. A query that may attend to no key gives 0, where "eager" averages over
all of them; transformers has such queries only at the places of the padding itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..nn.functional import attention_varlen, attention_weights, scaled_dot_product_attention
from ..replace import Left, Report, find_twin, replace_by
from .transformers_blocks import find_block

NAME = "handtuned"
OLDEST = "4.53"  # the first version with an interface for masks


def register(name: str = NAME) -> str:
    """Makes attn_implementation=`name` known to transformers; calling it again changes nothing.

    Returns:
        name, so that it can stand where a model wants its attn_implementation.

    Raises:
        RuntimeError: transformers is not installed, or older than 4.53.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise RuntimeError(
            f"handtuned.integrations.transformers: transformers >= {OLDEST} is needed: {error}; "
            f"run `pip install 'transformers>={OLDEST}'`"
        ) from error
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    return name


class ModelReport(Report):
    """What replace() did to a model of transformers; undo() and redo() switch its attention too."""

    attention_before: str | None = None

    def undo(self) -> None:
        super().undo()
        if self.attention_before is not None:
            self.model.set_attn_implementation(self.attention_before)  # type: ignore[operator]

    def redo(self) -> None:
        super().redo()
        if self.attention_before is not None:
            self.model.set_attn_implementation(NAME)  # type: ignore[operator]


def replace(model: torch.nn.Module, *, check: Any = None, strict: bool = False) -> ModelReport:
    """handtuned.replace() for a model of transformers: its attention and the modules of its own too, in place.

    Besides what has a twin in handtuned.nn, these become twins, whatever model they belong to: RMSNorms (also Gemma's,
    which keep the weight less 1), Conv1D, feed-forwards with relu, gelu or silu (the activation moves into the
    product), and the linear, dropout, add and LayerNorm at the end of BERT's blocks. See transformers_blocks. A model
    with such twins is saved with save_pretrained or by its state_dict; to be pickled, it has to be undone first.

    Args:
        model: a PreTrainedModel.
        check, strict: as in handtuned.replace; check is usually a dict, what a tokenizer returned.

    Returns:
        The report, with .undo(). An attention that stays is among .left.
    """
    register()
    report = ModelReport(model)
    report.attention_before = _attention_taken_from_interface(model)
    if report.attention_before is None:
        why = "its attention is not taken from transformers' attention interface"
        report.left.append(Left("(attention)", type(model).__name__, why))
    return replace_by(lambda module: find_block(module) or find_twin(module), report, check, strict)


def _attention_taken_from_interface(model: Any) -> str | None:
    """The implementation that a model has, if it can have another; found by trying."""
    if not hasattr(model, "set_attn_implementation"):
        return None
    before: str | None = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    taken: bool = model.config._attn_implementation == NAME
    model.set_attn_implementation(before)
    return before if taken else None


def mask(**arguments: Any) -> Tensor | None:
    """The mask of one forward: None, or bool (batch, 1, queries, keys), True where a query may attend.

    The arguments are those of transformers.masking_utils.sdpa_mask. In a bidirectional model every query sees the same
    keys, so its mask is one row, expanded without being copied.
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    if arguments.get("mask_function") is not bidirectional_mask_function:
        return _tensor_or_none(sdpa_mask(**arguments))
    row = _tensor_or_none(sdpa_mask(**arguments | {"q_length": 1}))
    return None if row is None else row.expand(-1, -1, arguments["q_length"], -1)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls instead of its own attention functions.

    Args:
        module: the attention module; its is_causal holds where the argument is None (True where it has none).
        query: (B, H, Lq, D).   key, value: (B, Hk, Lk, D), H a multiple of Hk.
        attention_mask: what `mask` returned, or a mask of the model's own. Without one, causal attention is top-left;
            transformers leaves it out only where that is right.
        s_aux: sinks, (H,).   position_bias: added to the scores, broadcastable to (B, H, Lq, Lk).
        cu_seq_lens_q, cu_seq_lens_k: where the sequences of a packed batch begin, as transformers' flash attention has
            them (see `packed`). A mask says the same, so they are read only where there is none.
        others: ignored, but for output_attentions. A sliding window is in the mask already.

    Returns:
        (output (B, Lq, H, D), None or the weights (B, H, Lq, Lk) where output_attentions asks for them).
    """
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None and attention_mask is None and position_bias is None:
        if others.get("output_attentions"):
            raise RuntimeError(
                "handtuned.integrations.transformers: output_attentions is True, but a packed batch has no matrix of "
                "weights; pass the batch with padding"
            )
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        options: dict[str, Any] = dict(scale=scaling, softcap=softcap or 0.0, sinks=s_aux, dropout_p=dropout)
        rows = attention_varlen(q, k, v, cu_seq_lens_q, cu_seq_lens_k, is_causal=is_causal, **options)
        return torch.as_tensor(rows)[None], None
    causal = is_causal and attention_mask is None and query.shape[2] > 1
    both = _added(attention_mask, position_bias)
    scores: dict[str, Any] = dict(attn_mask=both, is_causal=causal, scale=scaling, softcap=softcap or 0.0)
    grouped = query.shape[1] != key.shape[1]
    output, lse = scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, enable_gqa=grouped, sinks=s_aux, return_lse=True, **scores
    )
    weights = None
    if others.get("output_attentions"):
        weights = torch.as_tensor(attention_weights(query, key, lse, **scores)).to(query.dtype)
    return output.transpose(1, 2).contiguous(), weights


def packed(
    input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None, first_position: int = 0
) -> dict[str, Tensor]:
    """What a tokenizer returned, without its padding: all sentences in one row, for models with this attention.

        inputs = tokenizer(sentences, padding=True, return_tensors="pt")
        hidden = model(**packed(**inputs)).last_hidden_state[0]          # (tokens, width)
        by_sentence = hidden.split(inputs["attention_mask"].sum(1).tolist())

    Each sentence attends to itself alone. Encoders gain most: their products and norms then see no padding.

    Args:
        input_ids, attention_mask, token_type_ids: (B, L), padded on whichever side.
        first_position: of each sentence; RoBERTa and its kin count from their padding index + 1.

    Returns:
        Keyword arguments of the model's forward: the tensors as (1, tokens), position_ids, and where sentences begin
        in the names of transformers' own flash attention.
    """
    kept = attention_mask.bool()
    lengths = kept.sum(1)
    positions = (kept.cumsum(1) - 1 + first_position)[kept]
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest: Any = int(lengths.max()) if len(lengths) else 0
    found = {"input_ids": input_ids[kept][None], "position_ids": positions[None]}
    if token_type_ids is not None:
        found["token_type_ids"] = token_type_ids[kept][None]
    return found | {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def _added(attention_mask: Tensor | None, position_bias: Tensor | None) -> Tensor | None:
    """One mask that says both."""
    if position_bias is None or attention_mask is None:
        return attention_mask if position_bias is None else position_bias
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, position_bias, -torch.inf)
    return attention_mask + position_bias


def _tensor_or_none(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) else None
