"""Trunks: our own nets, torchvision's models by name, encoders of transformers, and their weights."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus.validators import ModuleValidator
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.refusals import refused
from helpers.rounding import same_function
from meadow.config.schema import Task
from meadow.runtime.errors import UserError
from meadow.runtime.seeds import torch_seeded
from meadow.tasks.data import Inputs, Target
from meadow.tasks.evaluation import load_into
from meadow.tasks.models import backbones, weights
from meadow.tasks.models.backbones import torchvision_trunk
from meadow.tasks.models.multihead import OWN, Multihead, build
from meadow.tasks.models.networks import BiLSTM
from meadow.tasks.models.vision import torchvision

TEN = (Target("label", "class", 10),)
COLOUR = Inputs((3, 64, 64))
FAMILIES = ["resnet18", "resnet50", "densenet121", "efficientnet_b0", "vgg16", "mobilenet_v2", "squeezenet1_1"]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trunk_is_torchvisions_model_without_its_classifier(name: str) -> None:
    task = Task(model=name)
    with torch_seeded(3, "x"):
        trunk, width = torchvision_trunk(task, COLOUR)
    with torch_seeded(3, "x"):
        whole = torchvision().models.get_model(name, weights=None)
    last = "classifier.1." if name.startswith("squeezenet") else [n for n, _ in whole.named_parameters()][-1][:-4]
    own = {n: t for n, t in whole.state_dict().items() if not n.startswith(last) and "num_batches" not in n}
    assert {n: t.shape for n, t in trunk.state_dict().items()} == {n: t.shape for n, t in own.items()}
    load_into(trunk, {n: t.numpy() for n, t in own.items()})
    seen: list[Tensor] = []
    layer = whole.features if name.startswith("squeezenet") else whole.get_submodule(last[:-1])
    if name.startswith("squeezenet"):
        layer.register_forward_hook(lambda _, __, out: seen.append(out.mean((2, 3))))
    else:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole.double().eval()(x.double())
        features = trunk.double().eval()(x.double())
    assert features.shape == (2, width)
    same_function(features, seen[0])


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_building_moves_no_statistic_counts_no_batch_and_is_a_function_of_the_seed(name: str) -> None:
    one, two = (build(Task(model=name), TEN, COLOUR, seed=1).state_dict() for _ in range(2))
    other = build(Task(model=name), TEN, COLOUR, seed=2).state_dict()
    assert all(torch.equal(one[n], two[n]) for n in one) and any(not torch.equal(one[n], other[n]) for n in one)
    assert all(t.dtype == torch.float32 for t in one.values())
    means = [t for n, t in one.items() if n.endswith("running_mean")]
    assert means and all((t == 0).all() for t in means)


def test_batch_normalisation_is_replaced_by_one_setting() -> None:
    model = build(Task(model="resnet18", norm="group"), TEN, COLOUR)
    kinds = [type(m) for m in model.modules()]
    assert nn.BatchNorm2d not in kinds and kinds.count(nn.GroupNorm) == 20
    assert ModuleValidator.is_valid(model) and not ModuleValidator.is_valid(build(Task(model="resnet18"), TEN, COLOUR))


@pytest.mark.parametrize(("inputs", "named"), [(Inputs((1, 64, 64)), "channels"), (Inputs((3, 16, 16)), "image_size")])
def test_images_that_a_model_cannot_take_are_refused_with_a_way_out(inputs: Inputs, named: str) -> None:
    with pytest.raises(UserError, match=named):
        build(Task(model="densenet121"), TEN, inputs)


@pytest.mark.parametrize("model", ["resnet81", "no_such_net"])
def test_an_unknown_model_is_refused(model: str) -> None:
    with pytest.raises(UserError, match="there is no such model" + (".*did you mean" if "resnet" in model else "")):
        build(Task(model=model), TEN, COLOUR)


def test_published_weights_are_read_without_the_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch_seeded(5, "published"):
        published = torchvision().models.mobilenet_v2()
    file = tmp_path / "checkpoints" / "mobilenet_v2-7ebf99e0.pth"
    file.parent.mkdir()
    torch.save(published.state_dict(), file)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    own = torchvision().models.MobileNet_V2_Weights.DEFAULT
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **_: torch.load(file, weights_only=True))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", torch.hub.load_state_dict_from_url)
    task = Task(model="mobilenet_v2", pretrained="DEFAULT")
    trunk = {n: t for n, t in build(task, TEN, COLOUR).state_dict().items() if n.startswith("trunk.")}
    read = weights.pretrained_trunk(task, trunk)
    assert read.keys() == trunk.keys()
    assert torch.equal(read["trunk.features.0.0.weight"], published.state_dict()["features.0.0.weight"])

    def refuse(url: str, **_: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match=re.escape(own.url)):
        weights.pretrained_trunk(task, trunk)
    with refused("task.pretrained"):
        weights.pretrained_trunk(Task(model="cnn", pretrained="DEFAULT"), trunk)


def test_a_file_may_have_the_models_own_names_in_half_precision(tmp_path: Path) -> None:
    whole = torchvision().models.mobilenet_v3_small()
    state = {n: t.half() if t.is_floating_point() else t for n, t in whole.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    task = Task(model="mobilenet_v3_small", pretrained=str(tmp_path / "w.safetensors"))
    trunk = {n: t for n, t in build(task, TEN, COLOUR).state_dict().items() if n.startswith("trunk.")}
    read = weights.pretrained_trunk(task, trunk)
    assert read.keys() == trunk.keys() and "trunk.classifier.3.weight" not in read
    assert torch.equal(read["trunk.classifier.0.weight"], state["classifier.0.weight"].float())
    for change, named in [
        ({"features.0.0.weight": None}, "has no array"),
        ({"features.1.weight": state["features.0.0.weight"].clone()}, "which the trunk does not have"),
        ({"features.0.1.bias": torch.zeros(3).half()}, "has shape"),
        ({"features.0.1.bias": torch.full((16,), torch.nan).half()}, "finite"),
    ]:
        save_file({n: t for n, t in (state | change).items() if t is not None}, tmp_path / "w.safetensors")
        with pytest.raises(UserError, match=named):
            weights.pretrained_trunk(task, trunk)


@pytest.mark.skipif("MEADOW_DATA" not in os.environ, reason="needs MEADOW_DATA")
@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("mobilenet_v2", "mobilenet_v2_imagenet.safetensors"),
        ("squeezenet1_1", "squeezenet1_1_features_imagenet_bgr.safetensors"),
    ],
)
def test_the_weights_at_hand_fit(model: str, file: str) -> None:
    task = Task(model=model, pretrained=f"{os.environ['MEADOW_DATA']}/weights/{file}")
    trunk = {n: t for n, t in build(task, TEN, COLOUR).state_dict().items() if n.startswith("trunk.")}
    assert weights.pretrained_trunk(task, trunk).keys() == trunk.keys()


@pytest.mark.parametrize(("model", "count"), [("mcmahan-cnn", 1_663_370), ("lenet", 61_706)])
def test_parameter_counts_of_the_papers(model: str, count: int) -> None:
    assert parameters(build(Task(model=model), TEN, Inputs((1, 28, 28)))) == count


@pytest.mark.parametrize(
    ("model", "inputs", "output"),
    [
        ("mlp", Inputs((5,)), (3, 10)),
        ("cnn", Inputs((1, 9, 7)), (3, 10)),
        ("lenet", Inputs((3, 32, 32)), (3, 10)),
        ("mcmahan-cnn", Inputs((3, 32, 32)), (3, 10)),
        ("cnn1d", Inputs((9, 128)), (3, 10)),
        ("bilstm", Inputs((12,), tokens=50), (3, 10)),
        ("charlstm", Inputs((12,), tokens=50), (3, 10, 12)),
    ],
)
def test_own_nets_give_logits_of_each_target_and_a_sample_is_alone_in_its_batch(
    model: str, inputs: Inputs, output: tuple[int, ...]
) -> None:
    net = build(Task(model=model, hidden=16), TEN, inputs).eval().double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, *inputs.shape, generator=generator).double()
    if inputs.tokens:
        x = torch.randint(1, inputs.tokens, (3, *inputs.shape), generator=generator)
    assert net(x)["label"].shape == output
    alone = torch.cat([net(x[i : i + 1])["label"] for i in range(3)])
    same_function(net(x)["label"], alone)


@pytest.mark.parametrize("model", sorted(OWN))
def test_own_nets_refuse_what_they_cannot_take(model: str) -> None:
    text = model in ("bilstm", "charlstm")
    with pytest.raises(UserError, match=f'task.model = "{model}"'):
        build(Task(model=model), TEN, Inputs((8,)) if text else Inputs((8,), tokens=9))


def test_padding_changes_nothing_and_the_maximum_is_over_real_tokens() -> None:
    net = BiLSTM(30, 6).double()
    short = torch.tensor([[4, 9, 2], [7, 0, 0], [0, 0, 0]])
    long = torch.cat([short, torch.zeros(3, 5, dtype=torch.int64)], 1)
    assert torch.equal(net(short), net(long))
    for row, tokens in enumerate([[4, 9, 2], [7], [0]]):
        states = net.lstm(net.embedding(torch.tensor([tokens])))[0]
        same_function(net(long)[row], states[0].amax(0))


def test_a_gate_stands_between_the_features_and_each_head() -> None:
    targets = (*TEN, Target("size", "value", 1))
    net = build(Task(model="efficientnet_b0", gated=True), targets, COLOUR).eval().double()
    assert isinstance(net, Multihead)
    h = net.trunk(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double())
    state = net.state_dict()
    gate = torch.sigmoid(h @ state["heads.size.gate.weight"].T + state["heads.size.gate.bias"])
    expected = (h * gate) @ state["heads.size.linear.weight"].T + state["heads.size.linear.bias"]
    same_function(net.on_features(h)["size"], expected[:, 0])
    assert net.on_features(h)["label"].shape == (2, 10)


def test_an_encoder_of_transformers_from_a_local_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torchvision()  # before transformers imports it
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with torch_seeded(1, "bert"):
        source = transformers.BertModel(config, add_pooling_layer=False).eval()
    source.save_pretrained(tmp_path)
    task = Task(model=f"transformers:{tmp_path}", pretrained="DEFAULT")
    net = build(task, TEN, Inputs((6,), tokens=40)).eval()
    trunk = {n: t for n, t in net.state_dict().items() if n.startswith("trunk.")}
    read = weights.pretrained_trunk(task, trunk)
    net.load_state_dict(net.state_dict() | read)
    assert isinstance(net, Multihead)
    x = torch.tensor([[5, 6, 7, 0, 0, 0]])
    with torch.no_grad():
        expected = source.double()(input_ids=x[:, :3]).last_hidden_state[:, 0]
        same_function(net.double().trunk(x), expected)
    with refused("task.model", 40):
        build(task, TEN, Inputs((6,), tokens=41))
    with refused("task.model"):
        build(task, TEN, COLOUR)
    with pytest.raises(UserError, match="transformers:/no/where"):
        build(Task(model="transformers:/no/where"), TEN, Inputs((6,), tokens=40))


def test_the_example_of_a_users_own_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, flags=re.S)[0]
    name = "own_" + hashlib.sha256(code.encode()).hexdigest()[:8]
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    net = build(Task(model=f"{name}:deep_and_narrow", hidden=8), TEN, Inputs((1, 8, 8)))
    assert net(torch.zeros(2, 1, 8, 8))["label"].shape == (2, 10)
    with pytest.raises(UserError, match="no_such"):
        build(Task(model=f"{name}:no_such"), TEN, COLOUR)


def test_the_page_names_every_model_of_ours() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert not [name for name in OWN if f"`{name}`" not in page]
    assert backbones.TRANSFORMERS in page
