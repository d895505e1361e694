"""A private step of every family of models, whatever of it learns, is the naive loop's over one sample at a time."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.rounding import OPERATIONS, close, in_double, same_function
from helpers.runs import small
from meadow.client.loop.trainable import freeze, mask
from meadow.client.loop.training import Training, train
from meadow.config import schema
from meadow.config.schema import Experiment
from meadow.privacy.dpsgd.mechanism import Mechanism
from meadow.privacy.dpsgd.step import Permit
from meadow.privacy.noise import Stream
from meadow.runtime.seeds import torch_seeded
from meadow.strategies.check import load
from meadow.strategies.trainable import stage, trained
from meadow.tasks.data import Part, Raw
from meadow.tasks.evaluation import load_into
from meadow.tasks.losses import losses
from meadow.tasks.models.vision import torchvision
from meadow.tasks.start import initial_state
from meadow.tasks.task import open_task

ONE_STEP = ("local.momentum=0", "local.lr=1", "local.steps=1", "local.clip_norm=0")


def made(x: Tensor, tokens: int = 0, images: bool = False, each: bool = False) -> Raw:
    """A data set of these samples with labels of three classes; each: one at every token, missing (-1) behind the end."""
    y = (np.arange(len(x)) * 7 % 5 % 3).astype(np.int64)
    if each:
        return Raw(
            "made", Part(x, {"y": np.where(x.numpy() > 0, x.numpy(), -1)}), None, {"y": f"class {tokens}"}, tokens
        )
    return Raw("made", Part(x, {"y": y}), None, {"y": "class 3"}, tokens, images)


def windows(task: schema.Task) -> Raw:
    return made(torch.from_numpy(np.random.default_rng(1).normal(size=(90, 3, 16)).astype(np.float32)))


def images(task: schema.Task) -> Raw:
    return made(
        torch.from_numpy(np.random.default_rng(2).integers(0, 256, (90, 1, 28, 28)).astype(np.uint8)), images=True
    )


def colours(task: schema.Task, side: int = 64) -> Raw:
    draw = np.random.default_rng(4).integers(0, 256, (30, 3, side, side))
    return made(torch.from_numpy(draw.astype(np.uint8)), images=True)


def photographs(task: schema.Task) -> Raw:
    return colours(task, 224)


def table(task: schema.Task) -> Raw:
    """Seven columns and a target of each kind, some of them missing."""
    draw = np.random.default_rng(5)
    missing = draw.random(90) < 0.3
    y: dict[str, Any] = {
        "y": np.where(missing, -1, np.arange(90) % 3).astype(np.int64),
        "many": (draw.random((90, 4)) < 0.5).astype(np.float32),
        "amount": np.where(missing, np.nan, draw.normal(size=90)).astype(np.float32),
        "spread": draw.normal(size=90).astype(np.float32),
    }
    kinds = {"y": "class 3", "many": "labels 4", "amount": "value", "spread": "quantiles 0.1 0.5 0.9"}
    return Raw("made", Part(torch.from_numpy(draw.normal(size=(90, 7)).astype(np.float32)), y), None, kinds)


def texts(task: schema.Task) -> Raw:
    return made(_tokens(), tokens=11)


def characters(task: schema.Task) -> Raw:
    return made(_tokens(), tokens=11, each=True)


def _tokens() -> Tensor:
    draw = np.random.default_rng(3)
    x, length = draw.integers(1, 11, (90, 6)), draw.integers(1, 7, (90, 1))
    return torch.from_numpy(np.where(np.arange(6) < length, x, 0).astype(np.int64))


KINDS: dict[str, tuple[str, ...]] = {
    "all": (),
    "head": (),
    "last:1": (),
    "last:2": (),
    "gradual": ("run.rounds=4",),
    "lora": ("local.lora_rank=2",),
    "lora b": ("local.lora_rank=2", "local.lora_share=b"),
    "adapters": ("local.adapter_size=2",),
    "adapters parallel": ("local.adapter_size=2", "local.adapter_place=parallel"),
}
"""Every trainable but the mask, which needs a source task (below), with what is said beside it."""

OTHERS = {
    "cnn1d": "windows", "lenet": "images", "mcmahan-cnn": "images", "cnn": "images", "bilstm": "texts",
    "charlstm": "characters",
}  # fmt: skip
"""Model -> its data. LeNet's norms and the recurrent layers' replacement are meadow.privacy.dpsgd's own affair."""

TORCHVISION = (
    "squeezenet1_1", "mobilenet_v3_small", "resnet18", "resnet50", "mobilenet_v2", "densenet121", "efficientnet_b0", "vgg11",
    "swin_t", "vit_b_32",
)  # fmt: skip
"""The first two are quick. The last two are vision transformers: torch's own attention, parameters beside their layers."""


def private(kind: str, data: str, model: str, *overrides: str) -> Experiment:
    """An experiment with one private step of a model on the data made here."""
    return load("multitask", [
        f"task.dataset={__name__}:{data}", "task.targets=y", f"task.model={model}", "task.hidden=8",
        "partition.clients=2", "partition.law=iid", f"local.trainable={kind.split()[0]}", *KINDS[kind], *ONE_STEP,
        *overrides,
    ])  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", OTHERS)
def test_of_sensors_images_and_texts(kind: str, model: str) -> None:
    if "lstm" in model and kind.split()[0] in ("lora", "adapters"):
        pytest.skip("there is no such part in a recurrent trunk")
    check(private(kind, OTHERS[model], model), "auto")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "heads", [(), ("task.gated=true",), ("task.trunks=cross-stitch",)], ids=["", "gated", "stitch"]
)
def test_of_a_table_with_a_target_of_every_kind(kind: str, heads: tuple[str, ...]) -> None:
    if heads == ("task.trunks=cross-stitch",) and kind not in ("all", "head"):
        pytest.skip("coupled trunks have no one order of layers: refused")
    check(private(kind, "table", "mlp", "task.targets=y,many,amount,spread", *heads), "auto")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "model", [pytest.param(m, marks=[] if m in TORCHVISION[:2] else pytest.mark.slow) for m in TORCHVISION]
)
def test_of_torchvisions_models(kind: str, model: str) -> None:
    """With group normalisations in the place of batch ones, and without dropout, whose draws are for a whole batch. In
    double: of a deep net at random, the loop itself errs by 1e-3 in float32."""
    data = "photographs" if model.startswith("vit") else "colours"
    check(private(kind, data, model, "task.norm=group"), "auto", 4, torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoder", ["Bert", "DistilBert", "ModernBert"])
def test_of_encoders_of_transformers(kind: str, encoder: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torchvision()  # before transformers imports it
    small = {
        "Bert": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16},
        "DistilBert": {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 16},
        "ModernBert": {
            "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
        },
    }[encoder]  # fmt: skip
    with torch_seeded(1, "encoder"):
        config = getattr(transformers, f"{encoder}Config")(vocab_size=11, **small)
        getattr(transformers, f"{encoder}Model")(config).save_pretrained(tmp_path)
    check(private(kind, "texts", f"transformers:{tmp_path}"), "auto")


@pytest.mark.parametrize("trainable", ["all", "head", "last:1", "gradual", "lora", "adapters", "fisher"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("mode", ["book", "hooks", "loop"])
def test_of_two_targets_from_a_source(trainable: str, model: str, mode: Any) -> None:
    check(small("multitask", "task.pretrained=source", f"local.trainable={trainable}", f"task.model={model}", *ONE_STEP),
          mode)  # fmt: skip


def check(experiment: Experiment, mode: Any, samples: int = 12, dtype: torch.dtype = torch.float32) -> None:
    """What learns moves by lr / denominator times the sum of clipped gradients, which autograd alone has for one sample
    after another, in float64; what does not learn keeps its bits.

    In float32 to the roundings of a gradient's terms, which are the outputs' gradients (test_dpsgd.py, `naive`). In float64
    to half of the digits.
    """
    task = open_task(experiment)
    net, data = task.new_model(), task.client(0).train.take(torch.arange(samples))
    load_into(net, initial_state(experiment))
    for module in net.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0  # type: ignore[assignment]
    bare = copy.deepcopy(net).double()
    if dtype == torch.float64:
        net.double().register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    allowed = Permit(Mechanism(1.0, 0.0, 0.5, 3.0, 1), Stream(0), Stream(1), mode)
    round_ = min(3, experiment.run.rounds)
    train(net, Training(data, round_, 0, experiment.local, permit=allowed), task, experiment)
    names = {
        n
        for n in trained(experiment, net.state_dict(), stage(experiment, round_, 0))
        if n in dict(bare.named_parameters())
    }
    kept = mask(bare, experiment, 0)
    learning = freeze(bare, names)
    sums, terms = {name: torch.zeros_like(p) for name, p in learning.items()}, 0.0
    draw = torch.Generator().manual_seed(0)
    for i in range(len(data)):
        one = data.take(torch.tensor([i]))
        x = task.prepare(one.x, training=True)
        outputs = bare(x.double() if x.is_floating_point() else x)
        parts = losses(outputs, in_double(one).y, task.targets)

        def gradient(of: Tensor) -> tuple[tuple[Tensor, ...], float]:
            found = torch.autograd.grad(
                of, list(learning.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            return found, math.sqrt(sum(float(g.square().sum()) for g in found))

        found, norm_ = gradient(sum(parts.values(), torch.zeros(())))
        # With random signs the sum of the outputs has a gradient as long as their Jacobian, on average.
        signed = [out * (2 * torch.randint(2, out.shape, generator=draw) - 1) for out in outputs.values()]
        _, jacobian = gradient(sum((part.sum() for part in signed), torch.zeros(())))
        factor = min(1.0, 0.5 / (norm_ + 1e-6))  # as Opacus clips
        terms += factor * max(norm_, jacobian) / 3
        for name, g in zip(learning, found, strict=True):
            sums[name] += g * factor
    assert names
    for name, parameter in net.named_parameters():
        before = dict(bare.named_parameters())[name].detach()
        move = sums.get(name, torch.zeros_like(before)) / 3
        if kept is not None and name in kept.entries:
            move = torch.where(kept.entries[name], move, 0.0)
        if name not in names:
            assert torch.equal(parameter.double(), before), name
        elif dtype == torch.float64:
            same_function(parameter, before - move, terms)
        else:
            close(parameter, before - move, OPERATIONS, terms + before.abs().numpy(), name=name)
