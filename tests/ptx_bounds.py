"""Runs a family's ops on the PTX of each file, in a process with AddressSanitizer's allocator.

    LD_PRELOAD='libasan.so libstdc++.so' python ptx_bounds.py FAMILY FILE...         a family of simt/hunt.py

The simulator asks AddressSanitizer about every byte of global memory that the kernels touch; the first one outside a
tensor is an error, and so is a wrong result. Prints a line of JSON a file: the error, or null.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ptx_tools
import simt_tools
import torch
from simt import hunt


def wrong(family: str, path: str) -> str | None:
    try:
        with ptx_tools.simulated(ptx_tools.Module(Path(path).read_text())):
            for check in hunt.CHECKS[family]:
                check(simt_tools.Emulator(simt_tools.LIBRARY), None)
    except Exception as error:
        return str(error)
    return None


def main() -> None:
    torch.set_num_threads(1)
    for path in sys.argv[2:]:
        print(json.dumps(wrong(sys.argv[1], path)), flush=True)


if __name__ == "__main__":
    main()
