"""What a table predicts for one network: against sums by hand, and for files that are not ours."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hwnas.costs.limits import latency_cost
from hwnas.costs.population import genes_of
from hwnas.costs.samplers import UniformSampler
from hwnas.export.onnx_file import write_onnx
from hwnas.job import Job, Request
from hwnas.predict import (
    calibration_of,
    ops_of_architecture,
    ops_of_onnx,
    predict,
    predict_file,
    run_of,
)
from hwnas.spaces.base import Architecture, SearchSpace
from hwnas.spaces.mobile import Stage, mobile, mobile_tiny
from hwnas.store import RUN_TABLE, open_run
from latency_tables.boundaries import chain_key, probes, with_heads
from latency_tables.model import LatencyModel, Quality
from latency_tables.ops import OpSpec
from latency_tables.table import LatencyTable, Row
from profilers.build import build_rows, missing_chains
from profilers.graphs import OPS_METADATA, emit, random_parameters
from profilers.measure import Protocol
from profilers.modules import Network
from profilers.simulated import CALL_US, SimulatedProfiler, op_us
from quant.errors import InvalidInput, TableError
from quant.precision import TENSORRT

SPACE = str(Path(__file__).parents[2] / "examples" / "own_space.py") + ":space"
MODEL = LatencyModel({"fp32": 0.83, "w8a8": 1.07}, 1.5, 12.7, 1.073, 0.99, Quality(*[0] * 8))


def job_in(folder: Path, **fields: Any) -> Job:
    return Job(
        Request(space=SPACE, device="simulated", recipe="smoke", tables=folder / "tables", **fields)
    )


def row_of(*ops: OpSpec) -> Row:
    """What the device takes for a chain of ops: its call, and each op."""
    us = CALL_US + sum(map(op_us, ops))
    texts = json.dumps([op.to_json() for op in ops])
    return Row(chain_key(ops), texts, ops[-1].precision.name, *[us] * 5, 0.0, 50, True)


def table_of(job: Job, **models: LatencyModel) -> LatencyTable:
    """A table of the job's condition with every row of its space; models by name, ours if none."""
    ops = job.space.lattice.ops
    rows = {op.key: row_of(op) for op in ops}
    chains = {chain_key(chain): row_of(*chain) for chain in with_heads(probes(ops).values())}
    named = dict(models or {job.model_name: MODEL})
    return LatencyTable(job.profiler.host(), job.recipe.protocol.to_dict(), rows, named, chains)


def inside_us(ops: Sequence[OpSpec]) -> list[float]:
    """What ops cost inside a network of this device: the call is the first one's."""
    return [op_us(op) + (0.0 if place else CALL_US) for place, op in enumerate(ops)]


def architectures(job: Job, count: int) -> list[Architecture]:
    sampler, rng = UniformSampler(job.space), np.random.default_rng(0)
    return [sampler.sample(rng) for _ in range(count)]


def model_of(ops: tuple[OpSpec, ...], seed: int = 0) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    return emit(ops, [random_parameters(op, rng) for op in ops])


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """With a table in its folder, so that nothing is measured."""
    made = job_in(tmp_path)
    table_of(made).save(made.table_path)
    return made


@pytest.fixture
def ops(job: Job) -> tuple[OpSpec, ...]:
    (architecture,) = architectures(job, 1)
    return job.space.lower(architecture)


# ---- the numbers


def test_a_prediction_is_the_sum_of_its_ops_by_hand(job: Job) -> None:
    for architecture in architectures(job, 20):
        ops = job.space.lower(architecture)
        found = predict(ops, job.table, job.model_name, "here")
        priced = zip(ops, inside_us(ops), strict=True)
        each = [MODEL.scales[op.precision.name] * us + 1.5 for op, us in priced]
        assert [op.key for op in found.ops] == [op.key for op in ops]
        assert [op.row_us for op in found.ops] == [op_us(op) + CALL_US for op in ops]
        np.testing.assert_allclose([op.cost_us for op in found.ops], each, rtol=1e-12)
        assert found.latency_ms == pytest.approx((12.7 + sum(each)) / 1000, rel=1e-12)
        assert found.upper_latency_ms == pytest.approx(1.073 * found.latency_ms, rel=1e-12)
        assert (found.coverage, found.table) == (0.99, "here")
        assert found.calibration == job.model_name


def test_a_prediction_is_what_a_search_bounds(job: Job) -> None:
    """The same architectures through the cost that the limits are held against."""
    some = architectures(job, 30)
    sums = job.latency.totals(job.space, genes_of(some))
    for architecture, additive in zip(some, sums.tolist(), strict=True):
        found = predict(job.space.lower(architecture), job.table, job.model_name, "")
        assert found.latency_ms == pytest.approx(job.latency.predict(additive), rel=1e-12)
        assert found.upper_latency_ms == pytest.approx(job.latency.upper(additive), rel=1e-12)
    assert len({round(additive, 6) for additive in sums.tolist()}) > 20


def test_a_file_and_its_architecture_are_predicted_alike(job: Job, tmp_path: Path) -> None:
    for number, architecture in enumerate(architectures(job, 5)):
        ops = job.space.lower(architecture)
        (tmp_path / f"{number}.onnx").write_bytes(model_of(ops).SerializeToString())
        (tmp_path / f"{number}.json").write_text(json.dumps(job.space.describe(architecture)))
        found = [
            predict_file(tmp_path / f"{number}.{kind}", job, None, None)
            for kind in ("onnx", "json")
        ]
        assert found[0] == found[1] == predict(ops, job.table, job.model_name, str(job.table_path))


def test_an_op_without_a_row_is_told_with_the_nearest_ones(
    job: Job, ops: tuple[OpSpec, ...]
) -> None:
    table = table_of(job)
    del table.rows[ops[1].key]
    with pytest.raises(TableError) as caught:
        predict(ops, table, job.model_name, "")
    assert ops[1].key in caught.value.what
    assert any(key in caught.value.accepted for key in table.rows)
    assert "hwnas profile" in caught.value.next_step


def test_a_precision_that_the_model_does_not_know_is_told(job: Job) -> None:
    """Rows of several spaces lie in one table; a latency model is of one space."""
    floats = LatencyModel({"fp32": 1.0}, 0.0, 5.0, 1.1, 0.95, Quality(*[0] * 8))
    table = table_of(job, floats=floats)
    integer = next(
        chain
        for chain in (job.space.lower(a) for a in architectures(job, 50))
        if any(op.precision.name == "w8a8" for op in chain)
    )
    with pytest.raises(TableError) as caught:
        predict(integer, table, "floats", "")
    assert caught.value.what == "The latency model 'floats' knows no w8a8."
    assert caught.value.accepted == "fp32"
    assert "--calibration" in caught.value.next_step


def low_bit_spaces() -> tuple[SearchSpace, SearchSpace]:
    """A space at two precisions, and the same with two more that run as the second."""

    def space(*precisions: str) -> SearchSpace:
        stages = (Stage(1, 1, (8, 16)), Stage(2, 2, (16,), squeeze=4))
        return mobile("bits", stages, classes=4, size=16, kernels=(3,), precisions=precisions)

    return space("fp32", "w8a8"), space("fp32", "w8a8", "w4a8", "w2a8")


def test_more_precisions_that_run_alike_need_no_further_rows(tmp_path: Path) -> None:
    """Exactly the rows and chains of the two that are executed are measured, on any device."""
    two, four = low_bit_spaces()
    assert len(four.lattice.ops) > 1.5 * len(two.lattice.ops)
    nothing = LatencyTable(job_in(tmp_path).profiler.host(), {})
    wanted = missing_chains(nothing, two.lattice.ops)
    assert missing_chains(nothing, four.lattice.ops) == wanted
    profiler, protocol = SimulatedProfiler(), Protocol()
    table = build_rows(profiler, four.lattice.ops, tmp_path / "table.parquet", protocol)
    assert set(table.rows) | set(table.chains) == set(map(chain_key, wanted))
    assert missing_chains(table, two.lattice.ops) == []
    per_op = latency_cost(four, table, MODEL).per_op.tolist()
    costs = dict(zip(four.lattice.ops, per_op, strict=True))
    low = [op for op in costs if op.executed != op]
    assert {op.precision.name for op in low} == {"w4a8", "w2a8"}
    assert all(costs[op] == costs[op.executed] for op in low)


def test_a_low_bit_network_is_predicted_as_the_one_that_runs_in_its_place(
    tmp_path: Path,
) -> None:
    _, space = low_bit_spaces()
    ops = space.lower(UniformSampler(space).sample(np.random.default_rng(1)))
    table = build_rows(
        SimulatedProfiler(), space.lattice.ops, tmp_path / "table.parquet", Protocol()
    )
    table.models["one"] = MODEL
    assert any(op.executed != op for op in ops)
    found, wanted = (predict(each, table, "one", "") for each in (ops, [op.executed for op in ops]))
    assert found.latency_ms == wanted.latency_ms
    assert [op.row_us for op in found.ops] == [op.row_us for op in wanted.ops]
    assert [op.key for op in found.ops] == [op.key for op in ops], "told as what they are"


def test_the_ops_of_a_low_bit_file_are_read_from_it(tmp_path: Path) -> None:
    """Packed weights and all; the file of other bits is not taken for it."""
    _, space = low_bit_spaces()
    ops = space.lower(UniformSampler(space).sample(np.random.default_rng(1)))
    path = tmp_path / "model.onnx"
    model = model_of(ops)
    path.write_bytes(model.SerializeToString())
    assert ops_of_onnx(path) == list(ops)
    (packed, *_) = [n for n in model.graph.node if n.op_type == "Gather"]
    model.graph.node.remove(packed)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InvalidInput, match="was changed after its export"):
        ops_of_onnx(path)


# ---- which table, which model


def test_the_latency_model_is_the_one_named_or_the_only_one(job: Job) -> None:
    one, two, none = table_of(job, a=MODEL), table_of(job, a=MODEL, b=MODEL), table_of(job, a=MODEL)
    none.models.clear()
    assert calibration_of(one, None) == "a"
    assert calibration_of(one, "a") == "a"
    assert calibration_of(two, "b") == "b"
    with pytest.raises(TableError) as caught:
        calibration_of(two, None)
    assert caught.value.what == "The table holds 2 latency models."
    assert caught.value.accepted == "a; b"
    assert "--calibration" in caught.value.next_step
    for table, accepted, next_step in (
        (two, "a; b", "name one with --calibration"),
        (none, "none yet", "run hwnas profile"),
    ):
        with pytest.raises(TableError) as caught:
            calibration_of(table, "c")
        assert caught.value.what == "The table has no latency model 'c'."
        assert (caught.value.accepted, caught.value.next_step) == (accepted, next_step)


def slower(factor: float) -> LatencyModel:
    return LatencyModel({"fp32": factor, "w8a8": factor}, 0.0, 1.0, 1.2, 0.95, Quality(*[0] * 8))


def test_a_file_outside_a_run_needs_a_choice_between_two_models(
    job: Job, ops: tuple[OpSpec, ...], tmp_path: Path
) -> None:
    table_of(job, **{job.model_name: MODEL, "other": slower(3)}).save(job.table_path)
    path = tmp_path / "model.onnx"
    path.write_bytes(model_of(ops).SerializeToString())
    with pytest.raises(TableError, match="holds 2 latency models"):
        predict_file(path, job, None, None)
    named = predict_file(path, job, None, "other")
    assert named.calibration == "other"
    assert named.latency_ms == pytest.approx((1 + 3 * sum(inside_us(ops))) / 1000)


def test_a_file_in_a_run_is_predicted_by_the_runs_own_table_and_model(
    job: Job, ops: tuple[OpSpec, ...], tmp_path: Path
) -> None:
    in_run = job_in(tmp_path, run=tmp_path / "run")
    run = open_run(in_run.config(), tmp_path / "run")
    path = run.result("latency_ms=1.0") / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(model_of(ops).SerializeToString())
    table_of(job, **{"other": slower(3), job.model_name: slower(2)}).save(job.table_path)

    def seen(table: Path | None = None) -> tuple[str, float, str]:
        found = predict_file(path, in_run, table, None)
        factor = (1000 * found.latency_ms - 1.0) / sum(inside_us(ops))
        return found.table, round(factor, 6), found.calibration

    # the run has no copy yet: the folder's table, and of its two models that of the run's space
    assert seen() == (str(job.table_path), 2.0, job.model_name)
    table_of(job, **{"other": slower(5), job.model_name: slower(4)}).save(run.path / RUN_TABLE)
    assert seen() == (str(run.path / RUN_TABLE), 4.0, job.model_name)
    # a table that is named wins
    assert seen(job.table_path) == (str(job.table_path), 2.0, job.model_name)
    # and one that knows another model alone is used with that
    table_of(job, other=slower(7)).save(tmp_path / "named.parquet")
    assert seen(tmp_path / "named.parquet") == (str(tmp_path / "named.parquet"), 7.0, "other")


def test_a_table_that_is_not_there_is_told(
    job: Job, ops: tuple[OpSpec, ...], tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model_of(ops).SerializeToString())
    with pytest.raises(TableError, match=r"There is no table .*absent\.parquet"):
        predict_file(path, job, tmp_path / "absent.parquet", None)


def test_the_run_of_a_file_is_the_folder_that_holds_it(job: Job, tmp_path: Path) -> None:
    run = open_run(job.config(), tmp_path / "run")
    inside = run.result("params=5") / "model.onnx"
    inside.parent.mkdir(parents=True)
    assert run_of(inside) == run.path
    assert run_of(run.path / RUN_TABLE) == run.path
    assert run_of(tmp_path / "model.onnx") is None
    (tmp_path / "config.yaml").write_text("space: mobile")  # a file of flags makes no run
    assert run_of(tmp_path / "model.onnx") is None


# ---- reading files of ours


def test_the_ops_of_an_exported_network_are_read_back(job: Job, tmp_path: Path) -> None:
    """As it is shipped: weights of a PyTorch network, not those of a profiled graph."""
    for number, architecture in enumerate(architectures(job, 6)):
        network = Network(job.space.lower(architecture), job.profiler.runtime).eval()
        path = tmp_path / f"{number}.onnx"
        write_onnx(network, job.profiler, path)
        assert ops_of_onnx(path) == list(network.ops)


def test_the_ops_of_the_preset_are_read_back_whatever_the_weights_are(tmp_path: Path) -> None:
    space = mobile_tiny(classes=10)
    sampler, rng = UniformSampler(space), np.random.default_rng(1)
    for number in range(3):
        ops = space.lower(sampler.sample(rng))
        path = tmp_path / "model.onnx"
        path.write_bytes(model_of(ops, seed=number).SerializeToString())
        assert ops_of_onnx(path) == list(ops)


def test_the_ops_of_a_graph_for_tensorrt_are_read_back_and_a_change_is_found(
    tmp_path: Path,
) -> None:
    space, path = mobile_tiny(classes=10), tmp_path / "model.onnx"
    rng = np.random.default_rng(2)
    ops = space.lower(UniformSampler(space).sample(rng))
    model = emit(ops, [random_parameters(op, rng) for op in ops], TENSORRT)
    onnx.save(model, path)
    assert ops_of_onnx(path) == list(ops)
    del model.graph.node[3]
    onnx.save(model, path)
    with pytest.raises(InvalidInput, match="was changed after its export"):
        ops_of_onnx(path)


# ---- files that are not ours


def foreign() -> onnx.ModelProto:
    """Two layers by hand."""
    weight = numpy_helper.from_array(np.ones((4, 1, 3, 3), np.float32), "w")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], "first_conv", kernel_shape=[3, 3]),
        helper.make_node("Relu", ["y"], ["z"], "then_relu"),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", channels, 8, 8])
        for name, channels in (("x", 1), ("z", 4))
    ]
    graph = helper.make_graph(nodes, "foreign", ends[:1], ends[1:], [weight])
    return helper.make_model(graph)


def refused(model: onnx.ModelProto, path: Path) -> str:
    """What is told of a model; the file and the sentence are whole."""
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InvalidInput) as caught:
        ops_of_onnx(path)
    assert caught.value.what.startswith(f"{path} was ")
    assert caught.value.what.endswith(".")
    assert "hwnas" in caught.value.accepted
    return caught.value.what


def test_a_foreign_file_is_refused_with_its_first_node(tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    assert refused(foreign(), path) == (
        f"{path} was not exported by hwnas: its first node, Conv 'first_conv', matches no op."
    )


def test_a_model_without_a_node_is_refused(tmp_path: Path) -> None:
    model = foreign()
    del model.graph.node[:]
    assert "its first node, none, it is empty, matches" in refused(model, tmp_path / "empty.onnx")
    assert "none, it is empty" in refused(onnx.ModelProto(), tmp_path / "nothing.onnx")


@pytest.mark.parametrize(
    "metadata",
    [
        "", "not JSON", "null", "5", "[]", "{}", '"op"', "[5]", '["op"]', '["{}"]', '["[]"]',
        '["{\\"precision\\": \\"fp32\\"}"]',
        '["{\\"precision\\": \\"fp99\\", \\"inputs\\": [\\"fp32:1x8x8\\"], \\"layers\\": '
        '[{\\"kind\\": \\"conv\\", \\"inputs\\": [0], \\"channels\\": 4}], \\"logits\\": false}"]',
        '["{\\"precision\\": \\"fp32\\", \\"inputs\\": [\\"nonsense\\"], \\"layers\\": '
        '[{\\"kind\\": \\"conv\\", \\"inputs\\": [0], \\"channels\\": 4}], \\"logits\\": false}"]',
        '["{\\"precision\\": \\"fp32\\", \\"inputs\\": [\\"fp32:1x8x8\\"], \\"layers\\": '
        '[{\\"kind\\": \\"magic\\", \\"inputs\\": [0], \\"channels\\": 4}], \\"logits\\": false}"]',
    ],
)  # fmt: skip
def test_metadata_that_names_no_ops_is_refused(metadata: str, tmp_path: Path) -> None:
    model = foreign()
    helper.set_model_props(model, {OPS_METADATA: metadata})
    path = tmp_path / "model.onnx"
    assert "its first node, Conv 'first_conv', matches no op." in refused(model, path)


def test_a_foreign_graph_that_names_ops_of_ours_is_refused(
    ops: tuple[OpSpec, ...], tmp_path: Path
) -> None:
    model = foreign()
    helper.set_model_props(model, {OPS_METADATA: json.dumps([op.to_json() for op in ops])})
    told = refused(model, tmp_path / "model.onnx")
    assert "was changed after its export: its node Conv 'first_conv' matches no op" in told


Change = Callable[[onnx.ModelProto], str]
"""Changes a model; says which node must be told: its operator and its name."""


def told_of(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name!r}"


def renamed(model: onnx.ModelProto) -> str:
    node = model.graph.node[3]
    node.name = "mine"
    return told_of(node)


def of_another_kind(model: onnx.ModelProto) -> str:
    node = next(n for n in model.graph.node if n.op_type == "Relu")
    node.op_type = "Sigmoid"
    return told_of(node)


def removed(place: int) -> Change:
    """What stands there now is told, or what is gone where nothing does."""

    def change(model: onnx.ModelProto) -> str:
        gone = told_of(model.graph.node[place])
        after = list(model.graph.node)[place:][1:2] if place >= 0 else []
        del model.graph.node[place]
        return told_of(after[0]) if after else gone

    change.__name__ = f"removed_{place}"
    return change


def added(place: int) -> Change:
    def change(model: onnx.ModelProto) -> str:
        nodes = list(model.graph.node)
        last = nodes[-1].output[0]
        extra = helper.make_node("Identity", [last], ["extra"], "extra")
        nodes.insert(place if place >= 0 else len(nodes), extra)
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        return told_of(extra)

    change.__name__ = f"added_{place}"
    return change


def swapped(model: onnx.ModelProto) -> str:
    nodes = list(model.graph.node)
    nodes[2], nodes[3] = nodes[3], nodes[2]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return told_of(nodes[2])


def with_another_stride(model: onnx.ModelProto) -> str:
    node = next(n for n in model.graph.node if n.op_type == "Conv")
    (strides,) = [a for a in node.attribute if a.name == "strides"]
    strides.ints[:] = [1, 1]
    return told_of(node)


def rewired(model: onnx.ModelProto) -> str:
    node = model.graph.node[1]
    node.input[0] = model.graph.input[0].name
    return told_of(node)


def with_more_channels(model: onnx.ModelProto) -> str:
    node = next(n for n in model.graph.node if n.op_type == "Conv")
    (weight,) = [c for c in model.graph.initializer if c.name == node.input[1]]
    array = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(np.concatenate([array, array]), weight.name))
    return told_of(node)


def in_another_type(model: onnx.ModelProto) -> str:
    node = next(n for n in model.graph.node if n.op_type == "Conv")
    (weight,) = [c for c in model.graph.initializer if c.name == node.input[1]]
    array = numpy_helper.to_array(weight).astype(np.float16)
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    return told_of(node)


@pytest.mark.parametrize(
    "change",
    [
        renamed, of_another_kind, swapped, with_another_stride, rewired, with_more_channels,
        in_another_type, *map(removed, (0, 3, -1)), *map(added, (0, 3, -1)),
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_a_file_that_was_changed_is_refused_with_the_node(
    change: Change, ops: tuple[OpSpec, ...], tmp_path: Path
) -> None:
    model, path = model_of(ops), tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert ops_of_onnx(path) == list(ops)
    node = change(model)
    told = refused(model, path)
    assert told.startswith(f"{path} was changed after its export: its node {node} ")


def test_ops_of_another_network_are_refused(job: Job, tmp_path: Path) -> None:
    """The metadata of a network that has other ops, however alike their nodes are named."""
    chains = [job.space.lower(architecture) for architecture in architectures(job, 12)]
    path, different = tmp_path / "model.onnx", 0
    for one in chains[:4]:
        for other in chains:
            if [op.key for op in one] == [op.key for op in other]:
                continue
            model = model_of(one)
            helper.set_model_props(model, {OPS_METADATA: json.dumps([o.to_json() for o in other])})
            assert "was changed after its export" in refused(model, path)
            different += 1
    assert different > 30


def test_other_weights_are_no_change(ops: tuple[OpSpec, ...], tmp_path: Path) -> None:
    """Values decide nothing about the latency."""
    model, path = model_of(ops), tmp_path / "model.onnx"
    for constant in model.graph.initializer:
        array = numpy_helper.to_array(constant)
        if array.dtype == np.float32 and array.ndim > 1:
            constant.CopyFrom(numpy_helper.from_array(2 * array, constant.name))
    path.write_bytes(model.SerializeToString())
    assert ops_of_onnx(path) == list(ops)


@pytest.mark.parametrize("content", [b"not a model\n" * 20, b"\x00\xff" * 50])
def test_a_file_that_is_no_onnx_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match="is not a readable ONNX file"):
        ops_of_onnx(path)


def test_a_truncated_file_is_refused(ops: tuple[OpSpec, ...], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    content = model_of(ops).SerializeToString()
    for share in (0.1, 0.5, 0.99):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(InvalidInput, match=r"model\.onnx (is not a readable|was )"):
            ops_of_onnx(path)


def test_a_file_that_is_not_there_is_refused(job: Job, tmp_path: Path) -> None:
    for name, words in (
        ("model.onnx", "is not a readable ONNX file"),
        ("architecture.json", "is not an architecture"),
    ):
        with pytest.raises(InvalidInput, match=words):
            predict_file(tmp_path / name, job, None, None)


@pytest.mark.parametrize("name", ["model.pt", "model", "model.onnx.txt", "weights.npz"])
def test_a_file_of_another_kind_is_refused_by_its_name(name: str, job: Job, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        predict_file(tmp_path / name, job, None, None)
    assert caught.value.what == f"{tmp_path / name} is neither an ONNX file nor an architecture."
    assert "model.onnx" in caught.value.accepted


# ---- architectures


def test_an_architecture_is_read_in_the_jobs_space(job: Job, tmp_path: Path) -> None:
    path = tmp_path / "architecture.json"
    for architecture in architectures(job, 5):
        path.write_text(json.dumps(job.space.describe(architecture)))
        assert ops_of_architecture(path, job) == list(job.space.lower(architecture))


def test_an_architecture_of_another_space_is_refused_with_the_gene(
    job: Job, tmp_path: Path
) -> None:
    path = tmp_path / "architecture.json"
    other = mobile_tiny(classes=10)
    path.write_text(json.dumps(other.describe(next(other.enumerate()))))
    with pytest.raises(InvalidInput) as caught:
        ops_of_architecture(path, job)
    assert caught.value.what == f"block0.block is not a gene of {job.space.name}."
    assert "conv0.kernel" in caught.value.accepted


def test_an_architecture_with_a_gene_too_few_or_a_wrong_value_is_refused(
    job: Job, tmp_path: Path
) -> None:
    path = tmp_path / "architecture.json"
    whole = job.space.describe(next(job.space.enumerate()))
    name = next(iter(whole))
    wrong: list[dict[str, Any]] = [{k: v for k, v in whole.items() if k != name}]
    wrong += [{**whole, name: value} for value in ("99", 3, None, [], {})]
    for content in wrong:
        path.write_text(json.dumps(content))
        with pytest.raises(InvalidInput, match=name):
            ops_of_architecture(path, job)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'"text"', b"5", b"\xff\xfe", b"null"])
def test_a_file_that_is_no_architecture_is_refused(
    content: bytes, job: Job, tmp_path: Path
) -> None:
    path = tmp_path / "architecture.json"
    path.write_bytes(content)
    with pytest.raises(InvalidInput) as caught:
        ops_of_architecture(path, job)
    assert caught.value.what.startswith(f"{path} is not an architecture: ")
    assert "architecture.json" in caught.value.accepted
