"""Scores of shared weights against stand-alone networks, and what they may depend on."""

import dataclasses

import numpy as np
import pytest
import torch

from hwnas.costs.samplers import UniformSampler
from hwnas.data import Images, Splits, as_input
from hwnas.spaces.base import Architecture, SearchSpace
from hwnas.spaces.mobile import Stage, mobile
from hwnas.supernet.evaluator import Evaluation, Evaluator
from hwnas.supernet.network import Supernet

SPACE = mobile(
    "small",
    (Stage(1, 1, (6, 8)), Stage(1, 2, (8, 12))),
    classes=3,
    size=8,
    image_channels=1,
    stem_channels=8,
    stem_stride=1,
    head_channels=16,
    kernels=(3, 5),
    expansions=(2,),
)


def noise(count: int, seed: int) -> Images:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    return Images(x, rng.integers(0, 3, count))


class Sealed(Images):
    """Images that cannot be looked at."""

    def __getattribute__(self, name: str) -> object:
        raise AssertionError(f"TEST was read: {name}")


def splits(train: Images | None = None, search_val: Images | None = None) -> Splits:
    return Splits(
        "noise",
        train or noise(64, 0),
        search_val or noise(50, 1),
        Sealed(*(np.zeros(0),) * 2),
    )


def supernet(seed: int = 0, space: SearchSpace = SPACE) -> Supernet:
    torch.manual_seed(seed)
    made = Supernet(space)
    made.initialise_ranges(torch.from_numpy(as_input(noise(16, 5).x)))
    return made


def evaluator(data: Splits, shared: Supernet | None = None, batch: int = 16) -> Evaluator:
    return Evaluator(
        shared or supernet(), data, recalibration_images=32, validation_images=40, batch=batch
    )


def some(count: int) -> list[Architecture]:
    sampler, rng = UniformSampler(SPACE), np.random.default_rng(0)
    found: dict[Architecture, None] = {}
    while len(found) < count:
        found[sampler.sample(rng)] = None
    return list(found)


def test_a_score_is_that_of_the_extracted_network_on_the_first_images_of_search_val() -> None:
    """Another implementation: the stand-alone network, a softmax and a mean in NumPy."""
    data = splits()
    score = evaluator(data)
    images = torch.from_numpy(as_input(data.search_val.x[:40]))
    classes = data.search_val.y[:40]
    for architecture in some(6):
        network = score.supernet.extract(architecture, score.statistics(architecture))
        with torch.no_grad():
            logits = network(images).double().numpy()
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        loss = -np.log(shares[np.arange(40), classes]).mean()
        found = score(architecture)
        assert found.accuracy == (logits.argmax(1) == classes).mean()
        assert found.loss == pytest.approx(loss, rel=1e-5)
        assert found.score == (found.accuracy, -found.loss)


def test_statistics_are_those_of_the_first_images_of_train_in_order() -> None:
    data = splits()
    score = evaluator(data)
    batches = [torch.from_numpy(as_input(data.train.x[start : start + 16])) for start in (0, 16)]
    for architecture in some(3):
        expected = score.supernet.recalibrate(architecture, batches)
        found = score.statistics(architecture)
        assert found.keys() == expected.keys()
        for key in found:
            assert torch.equal(found[key][0], expected[key][0])
            assert torch.equal(found[key][1], expected[key][1])


def test_scores_do_not_depend_on_the_order_of_evaluation() -> None:
    architectures = some(6)
    data, shared = splits(), supernet()
    forward, backward = evaluator(data, shared), evaluator(data, shared)
    one_way = {a: forward(a) for a in architectures}
    other_way = {a: backward(a) for a in reversed(architectures)}
    assert one_way == other_way
    alone = {a: evaluator(data, shared)(a) for a in architectures}
    assert one_way == alone
    assert len({e.loss for e in one_way.values()}) == len(architectures)


def test_each_architecture_is_evaluated_once() -> None:
    data, shared = splits(), supernet()
    score = evaluator(data, shared)
    architecture, other = some(2)
    first = score(architecture)
    with torch.no_grad():
        for parameter in shared.parameters():
            parameter.mul_(1.7)
    assert score(Architecture(tuple(architecture.genes))) is first
    assert evaluator(data, shared)(architecture) != first
    assert score(other) == evaluator(data, shared)(other)


def test_evaluating_changes_nothing_in_the_supernet() -> None:
    shared = supernet()
    before = {name: value.clone() for name, value in shared.state_dict().items()}
    score = evaluator(splits(), shared)
    for architecture in some(3):
        score(architecture)
    after = shared.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in shared.parameters())


def test_recalibration_reads_images_of_train_alone_and_no_classes() -> None:
    base = splits()
    architecture = some(1)[0]

    def statistics(data: Splits) -> torch.Tensor:
        return torch.cat([mean for mean, _ in evaluator(data).statistics(architecture).values()])

    expected = statistics(base)
    train = base.train
    beyond = np.concatenate([train.x[:32], 255 - train.x[32:]])
    for same in (
        splits(Images(train.x, (train.y + 1) % 3)),
        splits(Images(beyond, train.y)),
        splits(search_val=noise(50, 8)),
    ):
        assert torch.equal(statistics(same), expected)
    assert not torch.equal(statistics(splits(Images(255 - train.x, train.y))), expected)


def test_scores_read_search_val_and_not_the_classes_of_train() -> None:
    """TEST cannot be read at all here: its images raise when they are touched."""
    base = splits()
    architecture = some(1)[0]
    expected = evaluator(base)(architecture)
    val = base.search_val
    beyond = Images(np.concatenate([val.x[:40], 255 - val.x[40:]]), val.y)
    relabelled = splits(Images(base.train.x, (base.train.y + 1) % 3))
    assert evaluator(relabelled)(architecture) == expected
    assert evaluator(splits(search_val=beyond))(architecture) == expected
    wrong = splits(search_val=Images(val.x, (val.y + 1) % 3))
    assert evaluator(wrong)(architecture) != expected
    with pytest.raises(RuntimeError, match="sealed"):
        _ = base.test


def test_validation_batches_only_group_the_images() -> None:
    data, shared = splits(), supernet()
    architecture = some(1)[0]
    one = Evaluator(shared, data, recalibration_images=32, validation_images=40, batch=32)
    other = Evaluator(shared, data, recalibration_images=32, validation_images=40, batch=64)
    assert one(architecture).accuracy == other(architecture).accuracy
    assert one(architecture).loss == pytest.approx(other(architecture).loss, rel=1e-5)


def test_asking_for_more_images_than_there_are_takes_all() -> None:
    data, shared = splits(), supernet()
    more = Evaluator(shared, data, recalibration_images=999, validation_images=999, batch=64)
    all_of_them = Evaluator(shared, data, recalibration_images=64, validation_images=50, batch=64)
    for architecture in some(2):
        assert more(architecture) == all_of_them(architecture)


def test_accuracy_comes_first_and_the_smaller_loss_breaks_ties() -> None:
    best, tied, worst = Evaluation(0.9, 2.0), Evaluation(0.5, 0.1), Evaluation(0.5, 0.2)
    ranked = sorted((worst, best, tied), key=lambda e: e.score, reverse=True)
    assert ranked == [best, tied, worst]
    assert dataclasses.astuple(best) == (0.9, 2.0)
