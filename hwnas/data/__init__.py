"""Images and their three splits, and where they come from."""

from hwnas.data.arrays import npz
from hwnas.data.folders import folder
from hwnas.data.names import FORMS, load
from hwnas.data.small import SIZE, digits, fashion_mnist
from hwnas.data.splits import Bytes, Images, Splits, as_input
from hwnas.data.vision import torchvision

__all__ = [
    "FORMS",
    "SIZE",
    "Bytes",
    "Images",
    "Splits",
    "as_input",
    "digits",
    "fashion_mnist",
    "folder",
    "load",
    "npz",
    "torchvision",
]
