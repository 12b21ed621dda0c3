"""What bnfast accepts and torch does not, or the other way round, by design."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

import bnfast
import bnfast.functional as F

torch = pytest.importorskip("torch", minversion="2.13")


def error_of(call):
    """Return (result, None), or (None, what was raised)."""
    try:
        return call(), None
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        return None, error


class Difference(NamedTuple):
    """A call that one of the two accepts and the other does not, and why that is wanted."""

    reason: str
    bnfast_accepts: bool
    torch_accepts: bool
    on_bnfast: Callable[[], object]
    on_torch: Callable[[], object]


ONES = np.ones((2, 3, 4, 4), np.float32)
BARE = {"affine": False, "track_running_stats": False}


def gradient_of_other_dtype_in_torch():
    y = torch.nn.BatchNorm2d(3)(torch.tensor(ONES))
    y.backward(torch.ones(y.shape, dtype=torch.float64))


def gradient_of_other_dtype_in_bnfast():
    layer = bnfast.BatchNorm2d(3)
    layer.backward(layer(ONES).astype(np.float64))


def broken_state(library):
    """Return the state of a layer that has seen NaN."""
    layer = library.BatchNorm2d(3)
    layer.running_var[1] = np.nan
    return layer.state_dict()


def late_tracking(layer):
    layer.track_running_stats = True
    layer.reset_running_stats()


DIFFERENCES = {
    "dtypes": Difference(
        "any dtype of x goes with any dtype of parameters and running statistics",
        True,
        False,
        lambda: bnfast.BatchNorm2d(3, dtype=np.float32)(ONES.astype(np.float64)),
        lambda: torch.nn.BatchNorm2d(3)(torch.tensor(ONES, dtype=torch.float64)),
    ),
    "channels": Difference(
        "the channels of x are always counted, also where no vector could fail to fit",
        False,
        True,
        lambda: bnfast.BatchNorm2d(4, **BARE)(ONES),
        lambda: torch.nn.BatchNorm2d(4, **BARE)(torch.tensor(ONES)),
    ),
    "channels of an empty batch": Difference(
        "the channels of x are always counted, also where nothing is computed",
        False,
        True,
        lambda: bnfast.BatchNorm2d(4)(ONES[:0]),
        lambda: torch.nn.BatchNorm2d(4)(torch.tensor(ONES[:0])),
    ),
    "no channels": Difference(
        "a layer without channels passes empty arrays, as a batch without samples does",
        True,
        False,
        lambda: bnfast.BatchNorm2d(0)(ONES[:, :0]),
        lambda: torch.nn.BatchNorm2d(0)(torch.tensor(ONES[:, :0])),
    ),
    "reset": Difference(
        "a layer that was told too late to track has no running statistics to reset",
        True,
        False,
        lambda: late_tracking(bnfast.BatchNorm2d(3, **BARE)),
        lambda: late_tracking(torch.nn.BatchNorm2d(3, **BARE)),
    ),
    "dtype of dy": Difference(
        "a gradient of another dtype than x is a slip that would cost a silent copy",
        False,
        True,
        gradient_of_other_dtype_in_bnfast,
        gradient_of_other_dtype_in_torch,
    ),
    "eps at construction": Difference(
        "an eps that no call would accept is refused where it is written",
        False,
        True,
        lambda: bnfast.BatchNorm2d(3, eps=-1.0),
        lambda: torch.nn.BatchNorm2d(3, eps=-1.0),
    ),
    "eps that is not finite": Difference(
        "it makes every output NaN, or equal to the bias",
        False,
        True,
        lambda: F.batch_norm(ONES, None, None, training=True, eps=np.inf),
        lambda: torch.nn.functional.batch_norm(
            torch.tensor(ONES), None, None, training=True, eps=np.inf
        ),
    ),
    "shape of vectors": Difference(
        "vectors have shape (C,), not any shape with C elements",
        False,
        True,
        lambda: F.batch_norm(ONES, np.ones(3), np.ones(3), np.ones((1, 3))),
        lambda: torch.nn.functional.batch_norm(
            torch.tensor(ONES), torch.ones(3), torch.ones(3), torch.ones(1, 3)
        ),
    ),
    "one axis": Difference(
        "an array of one axis has no channels, empty or not",
        False,
        True,
        lambda: F.batch_norm(np.ones(0, np.float32), np.ones(0), np.ones(0)),
        lambda: torch.nn.functional.batch_norm(torch.ones(0), torch.ones(0), torch.ones(0)),
    ),
    "NaN in running_var": Difference(
        "a state that makes a channel NaN for good is refused, not loaded",
        False,
        True,
        lambda: bnfast.BatchNorm2d(3).load_state_dict(broken_state(bnfast)),
        lambda: torch.nn.BatchNorm2d(3).load_state_dict(broken_state(torch.nn)),
    ),
    "mode": Difference(
        "train() takes what counts as true",
        True,
        False,
        lambda: bnfast.BatchNorm2d(3).train(1),
        lambda: torch.nn.BatchNorm2d(3).train(1),
    ),
}
"""Every difference by design in what is accepted; the random sequences meet some of them."""
