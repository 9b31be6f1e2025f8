"""A trained network on another runtime's grid, and what it then scores."""

from dataclasses import dataclass

from hwnas.data import Splits
from hwnas.retrain import accuracy
from profilers.modules import Network
from quant.precision import Runtime


@dataclass(frozen=True)
class Requantised:
    """A network for another runtime; `search_val` is its accuracy on SEARCH-VAL there, and
    `trained_search_val` what it had on the runtime that it was trained for.
    """

    network: Network
    search_val: float
    trained_search_val: float


def requantised(network: Network, runtime: Runtime) -> Network:
    """The network on the grid of `runtime`, in inference mode: weights, norms and the ends of all
    ranges are carried over, the codes between them are the runtime's.

    Raises InvalidInput where the runtime has no kernel for a precision. The same runtime changes
    nothing.
    """
    for op in network.ops:
        runtime.kernel(op.precision)
    other = Network(network.ops, runtime)
    other.load_state_dict(network.state_dict())
    return other.eval()


def rescored(network: Network, runtime: Runtime, splits: Splits) -> Requantised:
    """The network on the grid of `runtime`, scored anew: what a file for another runtime than the
    one searched for is certified with.
    """
    other = requantised(network, runtime)
    return Requantised(other, accuracy(other, splits), accuracy(network, splits))
