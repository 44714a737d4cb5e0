"""fastrnn: torch.nn's recurrent layers on fused kernels. Swap the module, keep everything else."""

from importlib.metadata import version

from . import functional
from ._backend import get_backend, set_backend, use_backend
from .cells import GRUCell, LSTMCell, RNNCell
from .modules import GRU, LSTM, RNN
from .quantize import dequantize, quantize
from .sequences import States
from .streaming import Stream
from .swap import SwapReport, replace, restore

__version__ = version("fastrnn")

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "States",
    "Stream",
    "SwapReport",
    "__version__",
    "dequantize",
    "functional",
    "get_backend",
    "quantize",
    "replace",
    "restore",
    "set_backend",
    "use_backend",
]
