"""The profile of a model: what is in it, and that its times are those of what it says it timed."""

from __future__ import annotations

# ruff: noqa: E402  (what follows needs onnx)
import re
import time

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")

from onnx import TensorProto, helper
from onnx_models import OUTPUTS, Case, model_of

from bnfast.interop.onnx import profile
from bnfast.interop.onnx_profile import NodeTime, Profile

VECTORS = ("scale", "bias", "mean", "var")


def info(name, kind=TensorProto.FLOAT, shape=None):
    return helper.make_tensor_value_info(name, kind, shape)


@pytest.fixture
def looping():
    """Return a model: a batch norm, a loop of three with another, a function with a third."""
    inside = helper.make_node("BatchNormalization", ["now", *VECTORS], ["then"], name="in loop")
    still = helper.make_node("Identity", ["on"], ["still"])
    body = helper.make_graph(
        [inside, still],
        "body",
        [info("i", TensorProto.INT64, []), info("on", TensorProto.BOOL, []), info("now")],
        [info("still", TensorProto.BOOL, []), info("then")],
    )
    nodes = [
        helper.make_node("BatchNormalization", ["x", *VECTORS], ["first"]),
        helper.make_node("Relu", ["first"], ["r"]),
        helper.make_node("Loop", ["times", "go", "r"], ["looped"], body=body),
        helper.make_node("F", ["looped", *VECTORS], ["z"], domain="local"),
    ]
    function = helper.make_function(
        "local",
        "F",
        ["x", *VECTORS],
        ["y"],
        [helper.make_node("BatchNormalization", ["x", *VECTORS], ["y"], name="in function")],
        [helper.make_opsetid("", 11)],
    )
    inputs = [info(name) for name in ("x", *VECTORS)]
    inputs += [info("times", TensorProto.INT64, []), info("go", TensorProto.BOOL, [])]
    graph = helper.make_graph(nodes, "graph", inputs, [info("z")])
    return model_of(graph, 11, [function])


def arrays_of(rng, shape):
    arrays = {name: rng.uniform(1, 2, shape[1]).astype(np.float32) for name in VECTORS}
    return arrays | {"x": rng.normal(size=shape).astype(np.float32)}


def test_every_batch_norm_has_a_row(rng, looping):
    given = {"times": np.array(3), "go": np.array(True)}
    report = profile(looping, arrays_of(rng, (2, 3, 4, 5)) | given, repeat=2, progress=False)
    found = [(row.name, row.shape, row.dtype, row.calls) for row in report.rows]
    assert found == [
        ("first", (2, 3, 4, 5), "float32", 1),
        ("in loop", (2, 3, 4, 5), "float32", 3),
        ("in function", (2, 3, 4, 5), "float32", 1),
    ]
    assert all(row.stock > 0 and row.bnfast > 0 for row in report.rows)
    assert report.stock == pytest.approx(sum(row.stock for row in report.rows))
    assert report.bnfast == pytest.approx(sum(row.bnfast for row in report.rows))
    assert report.other > 0


def test_the_columns_are_what_they_say(rng, monkeypatch):
    """A stock operator that sleeps for 20 ms takes 20 ms more, and ours does not."""
    case = Case(15, 4, "f32", "f32", "f32", False)
    from onnx.reference.ops.op_batch_normalization import BatchNormalization_14 as Stock

    compute = Stock._run

    def slow(self, *inputs, **attributes):
        time.sleep(0.02)
        return compute(self, *inputs, **attributes)

    monkeypatch.setattr(Stock, "_run", slow)
    report = profile(case.model(), case.arrays(rng), repeat=3, progress=False)
    (row,) = report.rows
    assert row.stock >= 0.02 > row.bnfast
    assert row.speedup == row.stock / row.bnfast
    # The times that it slept are no part of the other nodes, of which there are none.
    assert report.other < 0.02


@pytest.mark.parametrize("opset", [1, 7])  # of 1 there is none
def test_a_stock_operator_that_fails_has_no_time(rng, opset):
    case = Case(opset, 4, "f32", "f32", "f32", False)
    report = profile(case.model(), case.arrays(rng), progress=False)
    (row,) = report.rows
    assert row.stock is None
    assert row.speedup is None
    assert report.stock == 0
    assert re.search(
        r"^bn +2x3x4x5 +float32 +1 +fails +\d+\.\d{3} +\d+\.\d%$", str(report), re.MULTILINE
    )


def test_a_node_in_training_is_profiled(rng):
    case = Case(15, 4, "f32", "f32", "f32", True, OUTPUTS[:3])
    report = profile(case.model(), case.arrays(rng), progress=False)
    assert report.rows[0].stock > 0


def test_the_table():
    rows = (
        NodeTime("bn1", (1, 64, 56, 56), "float32", 1, 3e-3, 1e-3),
        NodeTime("a longer name", (1, 8), "float16", 12, None, 0.5e-3),
    )
    lines = str(Profile(rows, other=7e-3)).splitlines()
    assert lines == [
        "node             shape       dtype    calls  stock  bnfast  faster  share  share now",
        "---------------  ----------  -------  -----  -----  ------  ------  -----  ---------",
        "bn1              1x64x56x56  float32      1  3.000   1.000    3.0x             11.8%",
        "a longer name    1x8         float16     12  fails   0.500                      5.9%",
        "---------------  ----------  -------  -----  -----  ------  ------  -----  ---------",
        "all batch norms                          13  3.000   1.500    3.0x             17.6%",
        "times in ms; the run: fails with the stock operator, 8.5 with bnfast; "
        "faster: of the nodes that the stock operator runs",
    ]
    lines = str(Profile(rows[:1], other=7e-3)).splitlines()
    assert lines[2:] == [
        "bn1              1x64x56x56  float32      1  3.000   1.000    3.0x  30.0%      12.5%",
        "---------------  ----------  -------  -----  -----  ------  ------  -----  ---------",
        "all batch norms                           1  3.000   1.000    3.0x  30.0%      12.5%",
        "times in ms; the run: 10.0 with the stock operator, 8.0 with bnfast",
    ]


def test_a_model_without_batch_norm(rng):
    node = helper.make_node("Relu", ["x"], ["y"])
    graph = helper.make_graph([node], "graph", [info("x")], [info("y")])
    report = profile(model_of(graph, 15), {"x": np.ones(3, np.float32)}, progress=False)
    assert report.rows == ()
    assert "all batch norms" in str(report)


def test_a_run_of_more_than_a_second_shows_its_progress(rng, capsys, monkeypatch):
    pytest.importorskip("tqdm")
    case = Case(15, 4, "f32", "f32", "f32", False)
    model, arrays = case.model(), case.arrays(rng)
    profile(model, arrays)
    assert capsys.readouterr().err == ""
    from onnx.reference.ops.op_relu import Relu

    compute = Relu._run
    monkeypatch.setattr(Relu, "_run", lambda self, x: time.sleep(1.1) or compute(self, x))
    model.graph.node.append(helper.make_node("Relu", ["y"], ["r"]))
    model.graph.node.append(helper.make_node("Neg", ["r"], ["z"]))
    profile(model, arrays)
    assert re.search(r"profile: .*2/3", capsys.readouterr().err)
    profile(model, arrays, progress=False)
    assert capsys.readouterr().err == ""


def test_what_cannot_be_profiled(rng):
    case = Case(15, 4, "f32", "f32", "f32", False)
    with pytest.raises(ValueError, match="repeat should be at least 1, got 0"):
        profile(case.model(), case.arrays(rng), repeat=0)
    with pytest.raises(ValueError, match="expected a model, got a NodeProto"):
        profile(case.model().graph.node[0], case.arrays(rng))
