"""``bn.insert`` on the network without normalization: its outputs, and its training afterwards."""

import copy
from dataclasses import dataclass

import torch

from batchnorm.demo.data import Images
from batchnorm.demo.networks import Activation, build
from batchnorm.demo.training import Curve, Options, train
from batchnorm.insertion.insert import insert


@dataclass(frozen=True)
class Inserted:
    """The result of ``bn.insert`` for the plain network.

    Attributes:
        activation: The activation of each hidden layer.
        rate: The learning rate of the training.
        layers: Number of inserted normalizations.
        difference: The largest change of an output in `eval()`, relative to the largest output.
        curve: The training afterwards, from the weights of the plain network.
    """

    activation: Activation
    rate: float
    layers: int
    difference: float
    curve: Curve


def insert_and_train(
    images: Images, options: Options, activation: Activation, rate: float, steps: int
) -> Inserted:
    """Insert normalizations into a fresh plain network, and train it."""
    height, width = images.train_images.shape[2:]
    plain = build((height, width), images.classes, activation, options.seed, None).eval()
    network = copy.deepcopy(plain)
    before = len(list(network.modules()))
    insert(network, images.train_images[:256])
    # Each inserted Sequential adds two modules: the layer inside and the normalization.
    layers = (len(list(network.modules())) - before) // 2
    with torch.no_grad():
        expected, got = (model(images.test_images).double() for model in (plain, network))
    difference = float((got - expected).abs().max() / expected.abs().max())
    curve = train(network.train(), images, options, rate, steps)
    return Inserted(activation, rate, layers, difference, curve)
