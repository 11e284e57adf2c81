"""handtuned: hand-tuned attention, recurrent layers and norms for PyTorch, by changing an import.

    import handtuned
    report = handtuned.replace(model)          # every module that has a twin becomes it, in place

    from handtuned import nn                    # or write nn.LayerNorm, nn.RMSNorm yourself
    from handtuned.nn import functional as F

Ask it which kernel runs and why: ``handtuned.explain(module, x)``; what is built: ``handtuned.info()``.
"""

from ._binary import OP_NAMESPACE
from ._version import __version__
from .backends import FallbackError, FallbackWarning, backend, strict
from .explain import Explanation, explain
from .info import Info, info
from .quantize import QuantizeReport, quantize
from .replace import Report, replace

from . import flash_attn, nn, ops, reference, testing  # isort: skip  (ops registers the fake kernels)

__all__ = [
    "OP_NAMESPACE",
    "Explanation",
    "FallbackError",
    "FallbackWarning",
    "Info",
    "QuantizeReport",
    "Report",
    "__version__",
    "backend",
    "explain",
    "flash_attn",
    "info",
    "nn",
    "ops",
    "quantize",
    "reference",
    "replace",
    "strict",
    "testing",
]
