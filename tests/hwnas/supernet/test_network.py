"""The supernet against stand-alone networks, hand-written convolutions and torch's batch norm."""

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hwnas.costs.samplers import UniformSampler
from hwnas.spaces.base import Architecture, Choice, Position, SearchSpace, State
from hwnas.spaces.blocks import classifier, conv_norm_activation
from hwnas.spaces.mobile import Stage, mobile
from hwnas.spaces.registry import load_space
from hwnas.spaces.resnet import Stage as ResnetStage
from hwnas.spaces.resnet import resnet
from hwnas.spaces.shufflenet import Stage as ShuffleStage
from hwnas.spaces.shufflenet import shufflenet
from hwnas.supernet.network import Supernet
from latency_tables.ops import Tensor as SpecTensor
from profilers.graphs import emit
from profilers.ort import OrtProfiler
from quant import ranges
from quant.fakequant import round_weight
from quant.precision import ONNXRUNTIME, TENSORRT, Precision, Runtime


def rich_space(precisions: tuple[str, ...] = ("fp32", "w8a8", "w4a4")) -> SearchSpace:
    """Squeeze-excite, residuals, skips, a float island, strides, widths, three precisions."""
    return mobile(
        "rich",
        (Stage(1, 1, (6, 8), squeeze=4), Stage(2, 2, (8, 12), activation="hard_swish")),
        classes=3,
        size=8,
        image_channels=1,
        stem_channels=8,
        stem_stride=1,
        head_channels=16,
        kernels=(3, 5),
        expansions=(1, 2),
        precisions=precisions,
        stem_precisions=precisions,
    )


def plain_space(precisions: tuple[str, ...] = ("fp32", "w8a8")) -> SearchSpace:
    """Two blocks without skips: small enough to enumerate and to write out by hand."""
    return mobile(
        "plain",
        (Stage(1, 1, (4, 6)), Stage(1, 2, (8,))),
        classes=3,
        size=8,
        image_channels=1,
        stem_channels=6,
        stem_stride=1,
        head_channels=8,
        kernels=(3, 5),
        expansions=(2,),
        precisions=precisions,
        head_precisions=("fp32",),
        skip=False,
    )


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def supernet_of(space: SearchSpace, *, seed: int = 0, runtime: Runtime = ONNXRUNTIME) -> Supernet:
    torch.manual_seed(seed)
    supernet = Supernet(space, runtime)
    supernet.initialise_ranges(images(16))
    return supernet


def choices(space: SearchSpace, count: int, seed: int = 0) -> list[Architecture]:
    sampler, rng = UniformSampler(space), np.random.default_rng(seed)
    found: dict[Architecture, None] = {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        found[sampler.sample(rng)] = None
    return list(found)


def train_a_little(supernet: Supernet, steps: int = 12) -> None:
    optimiser = torch.optim.AdamW(supernet.parameters(), lr=0.02)
    sampler = UniformSampler(supernet.space)
    for step in range(steps):
        optimiser.zero_grad(set_to_none=True)
        logits = supernet(images(8, seed=step), sampler.sample(np.random.default_rng(step)))
        functional.cross_entropy(logits, torch.arange(8) % 3).backward()
        optimiser.step()


def snapshot(supernet: Supernet) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in supernet.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# ---- extraction


@pytest.fixture(scope="module")
def trained() -> Supernet:
    supernet = supernet_of(rich_space())
    train_a_little(supernet)
    return supernet


def test_an_extracted_network_equals_the_supernet_to_the_last_bit(trained: Supernet) -> None:
    space = trained.space
    architectures = choices(space, 30)
    assert len(architectures) == 30
    mixed = squeezed = residual = skipped = 0
    widths = set()
    for number, architecture in enumerate(architectures):
        ops = space.lower(architecture)
        mixed += len({op.precision for op in ops}) > 1
        squeezed += any(layer.kind == "mul" for op in ops for layer in op.layers)
        residual += any(layer.kind == "add" for op in ops for layer in op.layers)
        skipped += len(ops) < len(space.positions)
        widths.update(op.output.channels for op in ops[1:-1])
        statistics = trained.recalibrate(architecture, [images(16, 1), images(16, 2)])
        network = trained.extract(architecture, statistics)
        for batch in (images(16, 100 + number), images(1, 200 + number)):
            with torch.no_grad():
                shared, alone = trained(batch, architecture, statistics), network(batch)
            assert (shared - alone).abs().max().item() == 0.0, space.describe(architecture)
            assert shared.isfinite().all()
    # the sample holds what the claim is about
    assert min(mixed, squeezed, residual, skipped) >= 5
    assert widths == {6, 8, 12}


@pytest.mark.parametrize("runtime", [ONNXRUNTIME.portable, TENSORRT], ids=["portable", "tensorrt"])
def test_an_extracted_network_equals_the_supernet_on_other_grids_too(
    trained: Supernet, runtime: Runtime
) -> None:
    """To the last bit; and it is another network than on the usual grid."""
    supernet = supernet_of(trained.space, runtime=runtime)
    supernet.load_state_dict(trained.state_dict())
    differing = 0
    for number, architecture in enumerate(choices(trained.space, 6, seed=4)):
        statistics = supernet.recalibrate(architecture, [images(16, 1)])
        network = supernet.extract(architecture, statistics)
        batch = images(8, 100 + number)
        with torch.no_grad():
            shared, alone = supernet(batch, architecture, statistics), network(batch)
            usual = trained(batch, architecture, statistics)
        assert torch.equal(shared, alone), trained.space.describe(architecture)
        differing += not torch.equal(shared, usual)
    assert differing >= 3


MIXED = (
    "fp32", "fp16", "bf16", "fp8", "w8a8", "w4a8", "w4a4", "w2a4",
    "pact-w1a2", "pact-w2a2", "pact-w4a4",
)  # fmt: skip
INTEGER = ("fp32", *(name for name in MIXED if Precision(name).is_integer))


@pytest.fixture(scope="module")
def mixed() -> Supernet:
    supernet = supernet_of(rich_space(MIXED))
    train_a_little(supernet, 24)
    return supernet


@pytest.mark.parametrize("trains", [True, False])
def test_a_training_step_rounds_behind_a_norm_together_with_it(
    mixed: Supernet, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each quantiser rounds once, whichever way; both ways are the same network."""
    calls: dict[str, int] = {"normalise_and_quantise": 0, "fake_quantise_activation": 0}

    def counted(name: str) -> Callable[..., Tensor]:
        function = getattr(ranges, name)

        def call(*arguments: object, **options: object) -> Tensor:
            calls[name] += 1
            result: Tensor = function(*arguments, **options)
            return result

        return call

    for name in calls:
        monkeypatch.setattr(ranges, name, counted(name))
    normed = plain = 0
    batch = images(16, 5)
    for architecture in choices(mixed.space, 20):
        ops = mixed.space.lower(architecture)
        normed += sum(len(op.rounded_norms) for op in ops)
        plain += sum(len(op.quantisers) - len(op.rounded_norms) for op in ops)
        with torch.set_grad_enabled(trains):
            logits = mixed(batch, architecture)
        if trains:
            before = dict(calls)
            with torch.no_grad():
                apart = mixed(batch, architecture)
            calls |= before
            away = (logits - apart).abs() / apart.std()
            assert away.median() < 0.02, mixed.space.describe(architecture)
    assert min(normed, plain) > 100
    assert list(calls.values()) == ([normed, plain] if trains else [0, normed + plain])


def test_an_extracted_network_of_many_precisions_is_the_same_to_the_last_bit(
    mixed: Supernet,
) -> None:
    space, seen = mixed.space, set()
    for number, architecture in enumerate(choices(space, 40)):
        names = {op.precision.name for op in space.lower(architecture)}
        seen |= names
        statistics = mixed.recalibrate(architecture, [images(16, 1), images(16, 2)])
        network = mixed.extract(architecture, statistics)
        with torch.no_grad():
            batch = images(8, 100 + number)
            shared, alone = mixed(batch, architecture, statistics), network(batch)
        assert (shared - alone).abs().max().item() == 0.0, space.describe(architecture)
        assert shared.isfinite().all()
    assert seen == set(MIXED)


def test_pacts_ranges_are_apart_from_lsqs_of_the_same_bits(mixed: Supernet) -> None:
    names = [name for name in mixed.ranges if "4 bits" in name]
    pact = {name for name in names if name.endswith(" pact")}
    assert pact
    assert {f"{name} pact" for name in names if name not in pact} == pact
    assert all(mixed.ranges[name].pact == (name in pact) for name in names)


def test_a_folded_network_has_the_codes_of_the_extracted_one(mixed: Supernet) -> None:
    """No weight's code changes but for a sign that the norm flips. Op by op, on equal inputs, what
    an op hands on differs by one step at most, where its value lies on a tie in fp32.
    """
    space = mixed.space
    values = changed = schemes = 0
    for number, architecture in enumerate(choices(space, 110, seed=5)):
        ops = space.lower(architecture)
        if not {op.precision.name for op in ops} <= set(INTEGER):
            continue
        statistics = mixed.recalibrate(architecture, [images(16, 1), images(16, 2)])
        network = mixed.extract(architecture, statistics)
        value = images(32, 300 + number)
        for module, folded in zip(network.op_modules, network.folded(), strict=True):
            op = module.op
            for index, layer in module.weighted_layers.items():
                if not op.precision.is_integer:
                    continue
                held = round_weight(layer.weight.detach(), op.precision)
                weights = folded.parameters_in_graph.weights[index]
                norm = module.norms[str(index)].weight if op.layers[index].norm else None
                sign = 1 if norm is None else norm.detach().sign().view(-1, 1, 1, 1)
                step = held.abs().flatten(1).amax(1).double()
                step /= np.abs(weights.codes).reshape(len(step), -1).max(1)
                codes = held / step.view(-1, *[1] * (held.ndim - 1))
                np.testing.assert_array_equal((codes.round() * sign).numpy(), weights.codes)
                schemes += 1
            with torch.no_grad():
                alone, whole = module(value), folded(value)
            last = len(op.values) - 1
            if quantiser := op.quantisers.get(last):
                grid = ONNXRUNTIME.grid(quantiser.bits, signed=quantiser.signed)
                step = module.activation_quantisers[last].limit / grid.top
                steps = (alone - whole).abs() / step
                assert steps.max() < 1.01
                values += steps.numel()
                changed += int((steps > 0.5).sum())
            else:
                torch.testing.assert_close(alone, whole, rtol=1e-3, atol=1e-3)
            value = alone
    assert schemes > 50
    assert values > 500_000
    assert changed <= 1e-5 * values


BOTH = ("fp32", "w8a8")
SMALL_SPACES = {
    "shuffle": shufflenet(
        "shuffle", (ShuffleStage(2, 16), ShuffleStage(1, 24, 1)), classes=3, size=8,
        image_channels=1, stem_channels=8, stem_stride=1, head_channels=16,
        multipliers=(0.5, 1.0), precisions=BOTH, stem_precisions=BOTH,
    ),
    "resnet": resnet(
        "resnet", (ResnetStage(2, 8, 1), ResnetStage(1, 16)), classes=3, size=8, image_channels=1,
        pooled=False, stem_channels=8, multipliers=(0.5, 1.0), multiple=4, precisions=BOTH,
        head_precisions=BOTH,
    ),
    "pooled resnet": resnet(
        "pooled", (ResnetStage(1, 8, 1), ResnetStage(1, 16)), classes=3, size=8, image_channels=1,
        stem_channels=8, multipliers=(1.0,), multiple=4, precisions=BOTH, stem_precisions=BOTH,
    ),
}  # fmt: skip


@pytest.mark.parametrize("space", SMALL_SPACES.values(), ids=list(SMALL_SPACES))
def test_other_spaces_are_extracted_and_exported_the_same(space: SearchSpace) -> None:
    """The extracted network to the last bit. Its file within 1e-4 where all is float; else nine of
    ten logits within 2 % of their range, since codes that tie may be their neighbours and are
    carried on."""
    supernet = supernet_of(space)
    train_a_little(supernet)
    for number, architecture in enumerate(choices(space, 12)):
        statistics = supernet.recalibrate(architecture, [images(16, 1), images(16, 2)])
        network = supernet.extract(architecture, statistics)
        batch = images(16, 100 + number)
        with torch.no_grad():
            shared, alone = supernet(batch, architecture, statistics), network(batch)
        assert torch.equal(shared, alone), space.describe(architecture)
        model = emit(network.ops, network.parameters_for_graph())
        OrtProfiler().check(model)
        with OrtProfiler().prepare(model) as session:
            away = np.abs(session.run(batch.numpy()) - alone.numpy())
        if any(op.precision.is_integer for op in network.ops):
            assert (away > 0.02 * np.ptp(alone.numpy())).mean() <= 0.1, space.describe(architecture)
        else:
            assert away.max() < 1e-4


def test_every_weight_of_the_other_spaces_is_trained_on_some_path() -> None:
    """A layer without a bias has none in the supernet either."""
    for space in SMALL_SPACES.values():
        supernet = supernet_of(space)
        for architecture in choices(space, 60):
            supernet(images(8), architecture).square().sum().backward()
        assert all(p.grad is not None for p in supernet.parameters())


def test_a_range_learned_below_zero_is_extracted_the_same() -> None:
    """LSQ's gradient can push a limit through zero; both readings use its magnitude."""
    space = plain_space(("w8a8",))
    supernet = supernet_of(space)
    with torch.no_grad():
        for name, limit in supernet.ranges.named_parameters():
            if "unsigned" in name:
                limit.neg_()
    architecture = choices(space, 1)[0]
    statistics = supernet.recalibrate(architecture, [images(16)])
    network = supernet.extract(architecture, statistics)
    with torch.no_grad():
        shared, alone = supernet(images(8), architecture, statistics), network(images(8))
    assert torch.equal(shared, alone)


def test_an_extracted_network_has_weights_of_its_own(trained: Supernet) -> None:
    architecture = choices(trained.space, 1)[0]
    statistics = trained.recalibrate(architecture, [images(16)])
    network = trained.extract(architecture, statistics)
    before = snapshot(trained)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    for norm in network.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.add_(1.0)
    assert same(snapshot(trained), before)
    again = trained.recalibrate(architecture, [images(16)])
    for key, (mean, variance) in statistics.items():
        assert torch.equal(mean, again[key][0])
        assert torch.equal(variance, again[key][1])


def test_an_extracted_network_counts_the_parameters_that_its_ops_state(trained: Supernet) -> None:
    for architecture in choices(trained.space, 5, seed=3):
        statistics = trained.recalibrate(architecture, [images(4)])
        network = trained.extract(architecture, statistics)
        ranges = sum(len(op.quantisers) for op in network.ops)
        stated = sum(op.parameters for op in network.ops)
        assert sum(p.numel() for p in network.parameters()) == stated + ranges


# ---- slicing and sharing


def conv_of(supernet: Supernet, name: str) -> dict[str, Tensor]:
    prefix = f"layers.{name}."
    return {k.removeprefix(prefix): v for k, v in supernet.state_dict().items() if prefix in k}


def norm_by_hand(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    shape = (1, -1, 1, 1)
    return (x - mean) / torch.sqrt(variance + 1e-5) * gamma.reshape(shape) + beta.reshape(shape)


@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("kernel", [3, 5])
def test_the_forward_pass_is_the_hand_written_one_on_the_first_channels(
    width: int, kernel: int
) -> None:
    space = plain_space(("fp32",))
    supernet = supernet_of(space)
    train_a_little(supernet, 4)
    architecture = space.parse(
        {
            "block0.block": f"k{kernel}e2",
            "block0.width": str(width),
            "block1.block": "k3e2",
        }
    )
    x = images(6)

    def step(
        value: Tensor, name: str, out: int, *, kernel: int = 1, stride: int = 1, deep: bool = False
    ) -> Tensor:
        held = conv_of(supernet, name)
        inside = 1 if deep else value.shape[1]
        y = functional.conv2d(
            value,
            held["weight"][:out, :inside],
            stride=stride,
            padding=kernel // 2,
            groups=out if deep else 1,
        )
        return norm_by_hand(y, held["gamma"][:out], held["bias"][:out])

    with torch.no_grad():
        value = step(x, "stem//conv", 6, kernel=3).relu()
        entry = value
        group = f"block0/k{kernel}e2"
        value = step(value, f"{group}/expand", 12).relu()
        value = step(value, f"{group}/depthwise", 12, kernel=kernel, deep=True).relu()
        value = step(value, f"{group}/project", width)
        value = value + entry if width == 6 else value
        hidden = 2 * width
        value = step(value, "block1/k3e2/expand", hidden).relu()
        value = step(value, "block1/k3e2/depthwise", hidden, kernel=3, stride=2, deep=True).relu()
        value = step(value, "block1/k3e2/project", 8)
        value = step(value, "head//conv", 8).relu().mean((2, 3))
        head = conv_of(supernet, "head//linear")
        expected = value @ head["weight"].T + head["bias"]
        found = supernet(x, architecture)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_lies_beyond_the_width_is_never_read() -> None:
    space = plain_space()
    supernet = supernet_of(space)
    narrow = [a for a in space.enumerate() if space.describe(a)["block0.width"] == "4"]
    wide = [a for a in space.enumerate() if space.describe(a)["block0.width"] == "6"]
    x = images(4)
    with torch.no_grad():
        before = [supernet(x, a) for a in narrow]
        for name, value in supernet.named_parameters():
            if "block0" in name and "project" in name:
                value[4:] = torch.nan
            if "block1" in name and "expand" in name:
                value[8:] = torch.nan
                if value.ndim > 1:
                    value[:, 4:] = torch.nan
            if "block1" in name and "depthwise" in name:
                value[8:] = torch.nan
            if "block1" in name and "project.weight" in name:
                value[:, 8:] = torch.nan
        for architecture, expected in zip(narrow, before, strict=True):
            assert torch.equal(supernet(x, architecture), expected)
        assert all(supernet(x, a).isnan().any() for a in wide)


def test_weights_are_shared_by_precisions_and_widths_and_not_by_choices() -> None:
    """Changing one choice's weights changes every network with that choice and no other."""
    space = plain_space()
    architectures = list(space.enumerate())
    assert len(architectures) == space.count == 32
    x = images(4)
    supernet = supernet_of(space)
    with torch.no_grad():
        before = [supernet(x, a) for a in architectures]
        for position, choice in itertools.product(("block0", "block1"), ("k3e2", "k5e2")):
            supernet = supernet_of(space)
            supernet.layers[f"{position}/{choice}/depthwise"].weight.neg_()
            for architecture, old in zip(architectures, before, strict=True):
                uses = space.describe(architecture)[f"{position}.block"] == choice
                assert torch.equal(supernet(x, architecture), old) != uses


def test_there_is_one_weight_for_each_position_choice_and_role_as_large_as_any_use() -> None:
    space = rich_space()
    supernet = supernet_of(space)
    largest: dict[str, tuple[int, ...]] = {}
    for position, level in zip(space.positions, space.lattice.levels, strict=True):
        for step in level.steps:
            for index, layer in enumerate(step.op.layers if step.op else ()):
                if layer.has_weights:
                    source = step.op.layer_inputs(index)[0]
                    width = source.elements if layer.kind == "linear" else source.channels
                    name = f"{position.name}/{step.group}/{layer.role}"
                    shape = layer.weight_shape(width)
                    largest[name] = tuple(map(max, shape, largest.get(name, shape)))
    assert {n: tuple(m.weight.shape) for n, m in supernet.layers.items()} == largest
    assert not list(supernet.buffers())  # statistics belong to architectures, not to the supernet


def test_a_norm_before_a_sum_starts_below_one_and_every_other_at_one() -> None:
    supernet = supernet_of(plain_space())
    starts = {name: m.gamma for name, m in supernet.layers.items() if hasattr(m, "gamma")}
    for name, gamma in starts.items():
        if gamma is not None:
            summed = name.startswith("block0") and name.endswith("project")
            expected = torch.full_like(gamma, 0.3 if summed else 1.0)
            assert torch.equal(gamma.detach(), expected), name


# ---- quantised values


@pytest.mark.parametrize(("runtime", "levels"), [(ONNXRUNTIME, 256), (TENSORRT, 128)])
def test_integer_ops_hand_on_values_of_the_runtimes_grid_only(
    runtime: Runtime, levels: int
) -> None:
    space = rich_space(("w8a8",))
    torch.manual_seed(0)
    supernet = Supernet(space, runtime)
    supernet.initialise_ranges(images(16))
    seen: dict[str, Tensor] = {}
    for name, module in supernet.ranges.items():
        module.register_forward_hook(
            lambda _module, _given, value, name=name: seen.update({name: value.detach()})
        )
    for architecture in choices(space, 6):
        supernet(images(16), architecture)
    assert any("unsigned" in name for name in seen)
    for name, value in seen.items():
        grid = supernet.ranges[name].grid
        codes = value.double() / (float(supernet.ranges[name].limit) / grid.top)
        assert (codes - codes.round()).abs().max() < 1e-4, name
        assert codes.round().min() >= grid.low, name
        assert codes.round().max() <= grid.high, name
        assert 1 < len(value.unique()) <= (levels if "unsigned" in name else 256), name


def test_an_integer_network_differs_from_the_float_one_with_the_same_weights() -> None:
    space = plain_space()
    supernet = supernet_of(space)
    genes = {"block0.block": "k3e2", "block0.width": "6", "block1.block": "k3e2"}
    logits = [
        supernet(
            images(8),
            space.parse({**genes, "block0.precision": kind, "block1.precision": kind}),
        )
        for kind in ("fp32", "w8a8")
    ]
    difference = (logits[0] - logits[1]).abs().max()
    assert 0 < difference < 0.5 * (logits[0].max() - logits[0].min())


def test_initialising_sets_every_range_once_and_the_same_each_time() -> None:
    space = rich_space()
    torch.manual_seed(0)
    untouched = Supernet(space)
    assert all(torch.isnan(p) for p in untouched.ranges.parameters())
    first, second = supernet_of(space), supernet_of(space)
    limits = {name: float(p) for name, p in first.ranges.named_parameters()}
    assert len(limits) > 10
    assert all(np.isfinite(v) and v > 0 for v in limits.values())
    assert limits == {name: float(p) for name, p in second.ranges.named_parameters()}
    second.initialise_ranges(100 * images(16, seed=9))
    assert limits == {name: float(p) for name, p in second.ranges.named_parameters()}


def test_initialising_changes_ranges_only() -> None:
    torch.manual_seed(0)
    supernet = Supernet(rich_space())
    before = snapshot(supernet)
    supernet.initialise_ranges(images(16))
    for name, value in supernet.state_dict().items():
        if not name.startswith("ranges."):
            assert torch.equal(value, before[name]), name


def ranges_of(space: SearchSpace, architecture: Architecture) -> set[str]:
    """The names of the ranges on a path, from its ops alone."""
    return {
        f"{placed.position}/{placed.group}/value{index}/"
        f"{quantiser.bits} bits {'signed' if quantiser.signed else 'unsigned'}"
        for placed in space.walk(architecture)
        for index, quantiser in placed.op.quantisers.items()
    }


@pytest.fixture
def paths_run(monkeypatch: pytest.MonkeyPatch) -> list[Architecture]:
    """The paths that `initialise_ranges` runs, in order; an endless search for them is cut off."""
    paths: list[Architecture] = []
    heaviest = SearchSpace.heaviest

    def spy(space: SearchSpace, weights: list[np.ndarray]) -> Architecture:
        paths.append(heaviest(space, weights))
        if len(paths) > 500:
            raise RecursionError("it runs paths without an end")
        return paths[-1]

    monkeypatch.setattr(SearchSpace, "heaviest", spy)
    return paths


def test_each_path_of_initialising_sees_the_most_ranges_that_none_before_saw(
    paths_run: list[Architecture],
) -> None:
    """Brute force over every architecture, step by step."""
    space = plain_space(("fp32", "w8a8", "w4a4"))
    supernet = supernet_of(space)
    seen: set[str] = set()
    for path in paths_run:
        gains = [len(ranges_of(space, a) - seen) for a in space.enumerate()]
        assert len(ranges_of(space, path) - seen) == max(gains) > 0
        seen |= ranges_of(space, path)
    assert seen == set(supernet.ranges)


def least_paths(space: SearchSpace) -> int:
    """A lower bound: as many paths as one position has ranges of which no two are on one edge."""
    most = 0
    for level in space.lattice.levels:
        edges = [
            {(step.group, i, q.bits, q.signed) for i, q in step.op.quantisers.items()}
            for step in level.steps
            if step.op is not None
        ]
        apart: list[tuple[str, int, int, bool]] = []
        for name in sorted(set().union(*edges)):
            if not any(name in edge and other in edge for edge in edges for other in apart):
                apart.append(name)
        most = max(most, len(apart))
    return most


@pytest.mark.parametrize("name", ["rich", "mobile-tiny", "mobile"])
def test_initialising_leaves_no_range_unset_and_runs_few_paths(
    name: str, paths_run: list[Architecture]
) -> None:
    channels = {"rich": 1, "mobile-tiny": 1, "mobile": 3}[name]
    space = rich_space() if name == "rich" else load_space(
        name, classes=3, image_channels=channels, size=32
    )  # fmt: skip
    supernet = Supernet(space)
    supernet.initialise_ranges(torch.rand(2, channels, 32, 32))
    assert all(elastic.is_set for elastic in supernet.ranges.values())
    assert 1 < least_paths(space) <= len(paths_run) <= 3 * least_paths(space)
    paths_run.clear()
    supernet.initialise_ranges(torch.rand(2, channels, 32, 32))
    assert not paths_run


def test_a_range_that_no_whole_network_uses_is_left_alone(paths_run: list[Architecture]) -> None:
    """The wide convolution leads nowhere: the head takes 8 channels alone."""

    def conv(state: State, values: Mapping[str, int]) -> Choice:
        op = conv_norm_activation(
            state.tensor, values["width"], kernel=1, precision=Precision("w8a8")
        )
        return Choice(op, State(op.output), f"wide {values['width']}")

    def head(state: State, values: Mapping[str, int]) -> Choice | None:
        if state.tensor.channels != 8:
            return None
        op = classifier(state.tensor, 8, 3, precision=Precision("w8a8"))
        return Choice(op, State(op.output))

    positions = (Position("p", {"width": (8, 16)}, conv), Position("head", {"kind": (0,)}, head))
    space = SearchSpace("dead end", SpecTensor(1, 8, 8), positions, 3)
    (architecture,) = space.enumerate()
    supernet = Supernet(space)
    supernet.initialise_ranges(images(4))
    set_ranges = {name for name, elastic in supernet.ranges.items() if elastic.is_set}
    assert set_ranges == ranges_of(space, architecture)
    assert len(paths_run) <= 2


def test_a_first_range_is_lsqs_formula_on_the_value_that_it_rounds() -> None:
    space = plain_space()
    supernet = supernet_of(space)
    stem = conv_of(supernet, "stem//conv")
    y = functional.conv2d(images(16), stem["weight"], padding=1)
    value = norm_by_hand(y, stem["gamma"], stem["bias"]).relu()
    expected = torch.minimum(2 * value.abs().mean() / 255**0.5 * 255, value.amax())
    for choice in ("k3e2", "k5e2"):
        limit = supernet.ranges[f"block0/{choice}/value0/8 bits unsigned"].limit
        torch.testing.assert_close(limit.detach(), expected, rtol=1e-4, atol=0)


# ---- recalibration


def test_recalibrating_is_torchs_batch_norm_with_a_cumulative_mean(trained: Supernet) -> None:
    """momentum=None in torch.nn.BatchNorm2d is the cumulative mean of the batches' statistics."""
    batches = [images(12, seed) for seed in range(5)]
    for architecture in choices(trained.space, 6, seed=1):
        found = trained.recalibrate(architecture, batches)
        network = trained.extract(architecture, found)
        norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        network.train()
        with torch.no_grad():
            for batch in batches:
                network(batch)
        assert len(norms) == len(found)
        for norm, (mean, variance) in zip(norms, found.values(), strict=True):
            torch.testing.assert_close(mean, norm.running_mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(variance, norm.running_var, rtol=1e-4, atol=1e-5)


def test_the_first_norms_mean_over_equal_batches_is_the_mean_over_all_images_at_once() -> None:
    space = plain_space()
    supernet = supernet_of(space)
    batches = [images(10, seed) for seed in range(7)]
    architecture = choices(space, 1)[0]
    mean, variance = supernet.recalibrate(architecture, batches)[0, 0]
    weight = supernet.layers["stem//conv"].weight.detach()
    y = functional.conv2d(torch.cat(batches), weight, padding=1)
    torch.testing.assert_close(mean, y.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    parts = [p.var((0, 2, 3)) for p in y.split(10)]
    torch.testing.assert_close(variance, torch.stack(parts).mean(0), rtol=1e-4, atol=1e-6)
    # an exponential mean of momentum 0.1 would have forgotten the first batches
    faded = torch.zeros_like(mean)
    for part in y.split(10):
        faded += 0.1 * (part.mean((0, 2, 3)) - faded)
    assert (mean - faded).abs().max() > 10 * (mean - y.mean((0, 2, 3))).abs().max()


def test_recalibrating_on_one_batch_gives_the_forward_pass_of_that_batch(
    trained: Supernet,
) -> None:
    """Degenerate case; unbiased against biased variance is the only difference left."""
    x = images(64)
    for architecture in choices(trained.space, 4, seed=2):
        statistics = trained.recalibrate(architecture, [x])
        with torch.no_grad():
            batch, stored = trained(x, architecture), trained(x, architecture, statistics)
        assert (batch - stored).abs().mean() < 0.05 * (batch.max() - batch.min())


def test_recalibration_belongs_to_the_architecture_and_touches_no_parameter() -> None:
    space = plain_space()
    supernet = supernet_of(space)
    base = {"block0.width": "6", "block0.precision": "fp32", "block1.precision": "fp32"}
    left, right = (
        space.parse({**base, "block0.block": kernel, "block1.block": "k3e2"})
        for kernel in ("k3e2", "k5e2")
    )
    before = snapshot(supernet)
    batches = [images(16, seed) for seed in range(3)]
    alone = supernet.recalibrate(left, batches)
    other = supernet.recalibrate(right, batches)
    again = supernet.recalibrate(left, batches)
    assert same(snapshot(supernet), before)
    assert all(p.grad is None for p in supernet.parameters())
    assert alone.keys() == other.keys() == again.keys()
    for key in alone:
        assert torch.equal(alone[key][0], again[key][0])
        assert torch.equal(alone[key][1], again[key][1])
    second_block = [key for key in alone if key[0] == 2]
    assert len(second_block) == 3
    assert all(not torch.equal(alone[key][0], other[key][0]) for key in second_block)
    # the stem is the same network up to there
    assert torch.equal(alone[0, 0][0], other[0, 0][0])


def test_statistics_used_for_a_score_do_not_move() -> None:
    space = plain_space()
    supernet = supernet_of(space)
    architecture = choices(space, 1)[0]
    statistics = supernet.recalibrate(architecture, [images(16)])
    kept = {key: (mean.clone(), var.clone()) for key, (mean, var) in statistics.items()}
    supernet.train()
    supernet(images(8, seed=5), architecture, statistics)
    for key, (mean, variance) in statistics.items():
        assert torch.equal(mean, kept[key][0])
        assert torch.equal(variance, kept[key][1])
