"""bnfast: fast and accurate batch normalisation for NumPy arrays.

The public names. Importing this package imports NumPy and nothing heavier; a backend is imported
when it is first used.
"""

from bnfast import functional
from bnfast.config import show_config
from bnfast.errors import BackendUnavailableError, UnknownBackendError
from bnfast.frozen import FrozenBatchNorm
from bnfast.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from bnfast.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from bnfast.memory import empty_cache
from bnfast.moments import Moments
from bnfast.recalibration import recalibrate
from bnfast.registry import (
    Backend,
    get_backend,
    list_backends,
    register_backend,
    set_backend,
    use_backend,
)
from bnfast.threads import get_num_threads, set_num_threads, use_num_threads

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "FrozenBatchNorm",
    "Moments",
    "UnknownBackendError",
    "empty_cache",
    "functional",
    "fuse_conv_bn_weights",
    "fuse_linear_bn_weights",
    "get_backend",
    "get_num_threads",
    "list_backends",
    "recalibrate",
    "register_backend",
    "set_backend",
    "set_num_threads",
    "show_config",
    "use_backend",
    "use_num_threads",
]

__version__ = "0.1.0"
