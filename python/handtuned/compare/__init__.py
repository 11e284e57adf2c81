"""handtuned compare: pretrained models on real inputs, with torch's modules and with their twins.

    models.py   what is run; a new model is one function     sentences.py, voice.py   what it is run on
    runner.py   one model's rows                             measure.py    errors, times, kernels
    result.py   what was found; the JSON schema              report.py, page.py   the table, the HTML page
    attention.py   a transformers model's attention, caught call by call
    generation.py  a small GPT-2: tokens per second of a prompt and behind it

Modules need no entry of their own: the rows are whatever handtuned.integrations.transformers.replace() replaced, on the
inputs they had in the model, grouped by name without layer numbers. The rows of the attention and of whole models stand
at several batch sizes, with the padding that real sentences have.
"""

from __future__ import annotations

import os
import platform

import torch

from .. import _C
from .._version import __version__
from ..info import cpu_name
from .generation import Generation
from .models import MODELS, ModelUnavailable
from .result import Comparison, Left, Machine, Row, Settings
from .runner import DTYPES, Progress, Runner, part

__all__ = ["DTYPES", "Comparison", "ModelUnavailable", "NoSuchModule", "Progress", "Settings", "compare"]

LOADING = 0.15  # share of the progress for loading a model
GENERATION = 0.2  # share of the time, where whole models are measured


class NoSuchModule(ValueError):
    """settings.module is part of no replaced module's name."""


def compare(settings: Settings, progress: Progress = lambda stage, done: None) -> Comparison:
    """Runs every model of MODELS with torch's modules and after replace().

    Args:
        settings: see Settings. With settings.module, whole models are not measured.
        progress: called with (what is being done, how much of everything is done: 0..1).

    Raises:
        ModelUnavailable: a model's package is not installed.
        NoSuchModule: settings.module matches nothing.
    """
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    rows: list[Row] = []
    left: list[Left] = []
    titles: list[str] = []
    share = 1.0 if settings.module is not None else 1 - GENERATION  # of the models
    for i, load in enumerate(MODELS):
        here = part(progress, share * i / len(MODELS), share * (i + 1) / len(MODELS))
        here("loading the model", 0.0)
        runner = Runner(load(), settings, settings.seconds * share / len(MODELS), part(here, LOADING, 1.0))
        rows += runner.rows()
        left += runner.left
        titles += runner.titles
    if share < 1:
        here = part(progress, share, 1.0)
        here("loading the model that generates", 0.0)
        rows += Generation(settings, settings.seconds * GENERATION, part(here, LOADING, 1.0)).rows()
    if not rows:
        raise NoSuchModule(f"no replaced module's name contains {settings.module!r}; there are: {', '.join(titles)}")
    threads, torch_version = torch.get_num_threads(), str(torch.__version__)
    cpus = os.cpu_count() or 1
    name = cpu_name()
    machine = Machine(name, _C.isa(), threads, torch_version, __version__, platform.platform(), cpus, load_average)
    return Comparison(machine, settings, rows, left)
