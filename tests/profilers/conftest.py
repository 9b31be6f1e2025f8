"""What several tests of this folder share: networks with the numbers of trained ones."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import nn

from latency_tables.ops import OpSpec
from profilers.modules import Network
from quant.layers import ActivationQuantiser, Fp8Cast
from quant.precision import ONNXRUNTIME, Runtime

Trained = Callable[..., Network]


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """The suite shares its machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trained() -> Trained:
    """Networks whose norms are random (a quarter of the factors negative) and whose quantisers
    cover 98 % of what they see on `images`; `settled` norms have the statistics of `images`."""

    def make(
        ops: Sequence[OpSpec],
        images: np.ndarray,
        seed: int = 0,
        runtime: Runtime = ONNXRUNTIME,
        *,
        settled: bool = False,
    ) -> Network:
        torch.manual_seed(seed)
        network = Network(ops, runtime)
        rng = torch.Generator().manual_seed(seed)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                size = (module.num_features,)
                sign = torch.where(torch.rand(size, generator=rng) < 0.25, -1.0, 1.0)
                with torch.no_grad():
                    module.weight.copy_((torch.rand(size, generator=rng) + 0.5) * sign)
                    module.bias.copy_(torch.randn(size, generator=rng) * 0.3)
                    module.running_mean.copy_(torch.randn(size, generator=rng) * 0.3)
                    module.running_var.copy_(torch.rand(size, generator=rng) + 0.5)
                module.momentum = 1.0
        network.train(settled)

        def cover(quantiser: ActivationQuantiser | Fp8Cast, values: tuple[torch.Tensor]) -> None:
            quantiser.limit = 0.98 * float(values[0].abs().max()) + 1e-6

        hooks = [
            module.register_forward_pre_hook(cover)
            for module in network.modules()
            if isinstance(module, ActivationQuantiser | Fp8Cast)
        ]
        with torch.no_grad():
            network(torch.from_numpy(images))
        for hook in hooks:
            hook.remove()
        return network.eval()

    return make
