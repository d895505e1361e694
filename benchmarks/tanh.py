"""The tanh network that Tramer and Boneh (2021) train on Fashion-MNIST by DP-SGD: task.model = "benchmarks.tanh:trunk".

meadow run docs/examples/fashion-mnist-private.toml
"""

from collections import OrderedDict

from torch import nn

from meadow.config.schema import Task
from meadow.tasks.data import Inputs


def trunk(task: Task, inputs: Inputs) -> tuple[nn.Module, int]:
    """All but the last layer, which is the head: for 28 x 28 in grey, 26,010 parameters with a head of ten classes.

    Convolution 8 x 8 with 16 filters (stride 2), pooling 2 x 2 (stride 1), convolution 4 x 4 with 32
    (stride 2), pooling again, a layer of 32 units; tanh after each.
    """
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(inputs.shape[0], 16, 8, stride=2, padding=2),
        tanh1=nn.Tanh(),
        pool1=nn.MaxPool2d(2, stride=1),
        conv2=nn.Conv2d(16, 32, 4, stride=2),
        tanh2=nn.Tanh(),
        pool2=nn.MaxPool2d(2, stride=1),
        flatten=nn.Flatten(),
        linear=nn.Linear(512, 32),
        tanh3=nn.Tanh(),
    )
    return nn.Sequential(layers), 32
