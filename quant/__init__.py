"""What a precision means: names, bits, activation grids, fake quantisation and integer codes."""

from quant.siblings import refuse_strangers

refuse_strangers(__file__)
