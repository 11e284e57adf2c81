"""Loads the compiled extension, once, and says in one line what to do when it cannot be used."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ._version import __version__

OP_NAMESPACE = "handtuned"
TORCH_MINIMUM = (2, 10)


def check_torch(version: str) -> None:
    """Raises ImportError if this torch is older than the stable ABI the extension was built on."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or tuple(int(part) for part in match.groups()) < TORCH_MINIMUM:
        raise ImportError(
            f"handtuned {__version__} needs torch >= {TORCH_MINIMUM[0]}.{TORCH_MINIMUM[1]}, found {version}: "
            "run `pip install 'torch>=2.10'`"
        )


def check_stamp(built: str) -> None:
    """Raises ImportError if the extension beside this package was built from another release of it."""
    if built != __version__:
        raise ImportError(
            f"handtuned {__version__} found an extension built for {built}: "
            "run `pip install --force-reinstall --no-deps .` (or `make build`) again"
        )


check_torch(torch.__version__)
try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"handtuned's extension could not be loaded under torch {torch.__version__} ({error}): "
        "run `pip install --no-build-isolation .` in a checkout to build it"
    ) from error

build_facts: dict[str, str] = _C.build_facts()
check_stamp(build_facts["version"])
cuda_library = Path(__file__).parent / "libhandtuned_cuda.so"  # there if it was built; opening it touches no device
if cuda_library.exists():
    _C.load_cuda(str(cuda_library))
_C.isa()  # a HANDTUNED_ISA that is not usable here is an error now, not at the first call
