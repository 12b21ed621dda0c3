"""bnfast and torch side by side: random layers, each driven through a random sequence of calls.

torch runs in float64, whatever the dtypes of the bnfast layer, on the same numbers. Outputs,
running statistics and gradients are compared within the rounding of bnfast's dtypes: the bounds are
those of `bnfast.spec`, plus what torch's own float64 sums can be off by, plus what the running
statistics have gathered from earlier roundings (`Pair.drift`). A call succeeds in both or fails in
both, but for `DIFFERENCES`, which are by design.
"""

from __future__ import annotations

import numpy as np
import pytest
from backends_here import AVAILABLE, over_backends
from torch_differences import DIFFERENCES, ONES, error_of
from torch_twin import Pair

import bnfast

torch = pytest.importorskip("torch", minversion="2.13")

LAYERS, BATCHES, CALLS = 3_000, 6, 9


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """The arrays are small: a team of threads takes a hundred times as long, on a busy machine."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences_by_design(name):
    difference = DIFFERENCES[name]
    for call, accepts in (
        (difference.on_bnfast, difference.bnfast_accepts),
        (difference.on_torch, difference.torch_accepts),
    ):
        _, error = error_of(call)
        assert (error is None) == accepts, error
    assert difference.bnfast_accepts != difference.torch_accepts


def test_a_refused_call_is_counted_by_torch_alone():
    layer, twin = bnfast.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    one = ONES[:1, :, :1, :1]
    assert isinstance(error_of(lambda: layer(one))[1], ValueError)
    assert isinstance(error_of(lambda: twin(torch.tensor(one)))[1], ValueError)
    assert (layer.num_batches_tracked, int(twin.num_batches_tracked)) == (0, 1)


def test_backward_belongs_to_the_last_training_forward(rng):
    """torch differentiates the output that it is given; a bnfast layer the last one it trained."""
    x, other = rng.normal(size=(2, 4, 3)), rng.normal(size=(4, 3))
    layer, twin = bnfast.BatchNorm1d(3, dtype=np.float64), torch.nn.BatchNorm1d(3).double()
    dy = rng.normal(size=(4, 3))
    wide = torch.tensor(x[1], requires_grad=True)
    for batch in x:
        layer(batch)
    layer.eval()(other)
    for batch in (torch.tensor(x[0]), wide):
        y = twin(batch)
    twin.eval()(torch.tensor(other))
    y.backward(torch.tensor(dy))
    np.testing.assert_allclose(layer.backward(dy), wide.grad.numpy(), rtol=1e-9, atol=1e-12)


@over_backends
@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_layers(rng, batch, backend, record_property):
    layers = -(-LAYERS // (BATCHES * len(AVAILABLE)))
    compared = unbounded = 0
    for number in range(layers):
        pair = Pair(rng, backend)
        try:
            for _ in range(CALLS):
                pair.step()
        except Exception as error:
            error.add_note(f"layer {number}: {pair.layer!r}, after: {'; '.join(pair.steps)}")
            raise
        compared += pair.compared
        unbounded += pair.unbounded
    record_property("layers", layers)
    record_property("values", compared)
    # Next to a running variance of -eps no digit of the result is certain.
    assert unbounded < compared / 500
