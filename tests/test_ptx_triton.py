"""The sm_80 PTX of the Triton norms, executed: what Triton's interpreter cannot show, because it never sees the PTX.

Every access lies inside a tensor and reads something that was written; values meet the contract against float64.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Any

import cases
import pytest
import torch

if "triton" not in sys.modules and not torch.cuda.is_available():  # as in conftest.py, for this file alone
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is first imported

import numerics
import ptx_tools

import handtuned

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
import ptx_triton

LAYER, RMS, ADD_LAYER, ADD_RMS = cases.FORMS
DROP_LAYER, DROP_RMS = cases.DROPOUTS
BF16, F16, F64 = torch.bfloat16, torch.float16, torch.float64

# Each kernel in each type; rows shorter than a tile, of one tile and of several; aligned and not; every option.
CASES = {
    case.name: case
    for case in (
        LAYER.with_(shape=(9, 100)),
        DROP_LAYER.with_(shape=(5, 1000), dtype=BF16),
        DROP_RMS.with_(shape=(6, 136), dtype=F16, weight_dtype=torch.float32),
        LAYER.with_(shape=(3, 70), dtype=F64),
        RMS.with_(shape=(41, 17), dtype=BF16, layout="sliced"),
        ADD_RMS.with_(shape=(6, 40), affine="none"),
        ADD_LAYER.with_(shape=(3, 9000), dtype=BF16),
        LAYER.with_(shape=(2, 40000), dtype=F16),
        RMS.with_(shape=(2, 20001)),
        LAYER.with_(shape=(6, 7, 33), layout="permuted"),
        LAYER.with_(shape=(600, 24), values="shifted"),
        LAYER.with_(shape=(16, 250), values="huge", dtype=BF16),
    )
}


def check(name: str, launcher: Any) -> None:
    """Called in the other process."""
    with handtuned.backend("triton"), handtuned.strict():
        numerics.check_contract(CASES[name], "triton")
    assert launcher.modules, "no kernel was launched"


@cache
def executed() -> dict[str, dict[str, Any]]:
    ptx_tools.library()
    return ptx_triton.in_a_process("test_ptx_triton:check", list(CASES))


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    assert executed()[name]["wrong"] is None
