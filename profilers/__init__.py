"""An op made runnable, and timed."""

try:
    from quant.siblings import refuse_strangers
except ModuleNotFoundError as error:
    raise ImportError(
        "hwnas needs its own package 'quant', but another one shadows it "
        f"({error}); install hwnas in a virtual environment of its own."
    ) from error

refuse_strangers(__file__)
