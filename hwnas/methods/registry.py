"""The methods that `--method` names."""

from hwnas.methods.base import Method
from hwnas.methods.spos import SPOS
from quant.errors import InvalidInput

METHODS = {method.name: method for method in (SPOS,)}


def method(name: str) -> Method:
    """The method of a name; raises InvalidInput for one that is not there."""
    if name not in METHODS:
        raise InvalidInput(f"--method is {name!r}.", accepted=", ".join(METHODS))
    return METHODS[name]
