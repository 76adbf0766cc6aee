"Building, cutting, aligning and keeping networks."
import copy
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from kdnb import nets
from kdnb.core import BadInput
from kdnb.nets import Blocks, align, build, card_of, cost, cut, freeze, load_net, normalise, read_card, save_net, timm

FAMILIES = {
    "resnet18": "ResNet", "resnet50": "ResNet", "resnet10t": "ResNet", "resnext50_32x4d": "ResNet",
    "wide_resnet50_2": "ResNet", "seresnet18": "ResNet", "test_resnet": "ResNet", "regnetx_002": "RegNet",
    "regnety_002": "RegNet", "regnetz_005": "RegNet", "densenet121": "DenseNet", "vgg11": "VGG", "vgg11_bn": "VGG",
    "kdnb_mobilenetv1_025": "EfficientNet", "kdnb_mobilenetv1_075": "EfficientNet", "mobilenetv1_100h": "EfficientNet",
    "kdnb_mobilenetv2_035": "EfficientNet", "efficientnet_b0": "EfficientNet", "mobilenetv3_small_050": "MobileNetV3",
    "lcnet_050": "MobileNetV3", "mobilenetv4_conv_small": "MobileNetV3", "convnext_atto": "ConvNeXt",
    "convnextv2_atto": "ConvNeXt", "kdnb_squeezenet1_0": "SqueezeNet",
}
SMALL = ["test_resnet", "regnetx_002", "kdnb_mobilenetv1_025", "kdnb_mobilenetv2_035", "mobilenetv3_small_050",
         "test_convnext", "kdnb_squeezenet1_0"]
WEIGHTS = Path(os.environ.get("KDNB_WEIGHTS", Path(__file__).resolve().parents[2]/"shared"/"data"/"weights"))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    "Bits are compared: the number of threads is fixed."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(name):
    "A net of a family, made small where the family's own nets are too big for a quick test."
    small = {"vgg11": {"mlp_ratio": 1 / 64}, "vgg11_bn": {"mlp_ratio": 1 / 64}, "wide_resnet50_2": {"layers": (1, 1, 1, 2)}}
    return timm.create_model(name, num_classes=3, **small[name]) if name in small else build(name, 3, seed=0)


def images(n=2, size=64, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def state_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# cutting

@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_compose_to_the_net_bit_for_bit(name):
    net, x = made(name), images()
    assert type(net).__name__ == FAMILIES[name]
    twin = copy.deepcopy(net)
    blocks = cut(twin)
    torch.manual_seed(3)
    z = net(x)
    torch.manual_seed(3)
    assert torch.equal(blocks(x), z) and state_equal(net, twin), "training mode"
    net.eval()
    twin.eval()
    with torch.no_grad():
        z, outputs = net(x), blocks.outputs(x.clone())
        assert torch.equal(blocks(x), z) and torch.equal(outputs[-1], z), "evaluation mode"
        assert torch.equal(blocks[2:](blocks[:2](x)), z)
        for i, part in enumerate(blocks):  # an in-place layer behind a boundary would change what is kept there
            kept = outputs[i - 1].clone() if i else x.clone()
            part(outputs[i - 1] if i else x)
            assert torch.equal(kept, outputs[i - 1] if i else x)
    assert {id(p) for p in blocks.parameters()} == {id(p) for p in twin.parameters()}
    assert blocks.strides[-1] == 0 and blocks.strides[:-1] == sorted(set(blocks.strides[:-1]))
    assert blocks.ins == [3, *blocks.widths[:-1]] and blocks.widths[-1] == 3
    assert [o.shape[1] for o in outputs] == blocks.widths and len(set(blocks.names)) == len(blocks)


@pytest.mark.parametrize(("name", "strides"), [("resnet18", [2, 4, 8, 16, 32]), ("densenet121", [2, 4, 8, 16, 32]),
                                               ("vgg11_bn", [2, 4, 8, 16, 32]), ("convnext_atto", [4, 8, 16, 32]),
                                               ("kdnb_squeezenet1_0", [2, 4, 8, 16])])
def test_strides(name, strides):
    assert cut(made(name)).strides[:-1] == strides


def test_cut_leaves_no_trace():
    net = build("test_resnet", 2, seed=0)
    net.layer1.eval()
    before, modes = copy.deepcopy(net), [m.training for m in net.modules()]
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    cut(net)
    assert state_equal(net, before) and modes == [m.training for m in net.modules()]
    assert torch.equal(torch_state, torch.get_rng_state()) and python_state == random.getstate()
    assert (numpy_state == np.random.get_state()[1]).all()
    assert all(p.grad is None for p in net.parameters())


def test_squeezenet_does_not_clip_its_logits():
    net = build("kdnb_squeezenet1_0", 2, seed=0).eval()
    with torch.no_grad(): net.classifier[1].bias.fill_(-1e3)
    assert (net(images()) < 0).all()
    assert net.state_dict().keys() == nets.SqueezeNet("1_0", 2).state_dict().keys()


def test_modes_follow_the_net():
    net = build("kdnb_squeezenet1_0", 2)
    assert cut(net).training and not cut(net.eval()).training and not cut(net)[:2].training
    dropping = timm.create_model("test_resnet", num_classes=2, drop_rate=0.5)
    blocks, x = cut(dropping), images(8)
    dropping.eval()
    assert torch.equal(blocks(x), dropping(x))
    blocks.train()
    assert not torch.equal(blocks[-1](blocks[:-1](x)), blocks[-1](blocks[:-1](x)))


def test_other_types_and_layouts():
    net = build("test_resnet", 2, seed=0).double().to(memory_format=torch.channels_last).eval()
    x = images().double().to(memory_format=torch.channels_last)
    assert torch.equal(cut(net)(x), net(x))


def test_what_a_family_does_not_tell_is_refused():
    class Louder(nets.ResNet):
        def forward(self, x): return 2 * super().forward(x)

    with pytest.raises(BadInput, match="its family's steps do not tell"):
        cut(Louder(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=2))
    with pytest.raises(BadInput, match="Linear cannot be cut.*ResNet, RegNet, DenseNet, VGG"):
        cut(nn.Linear(3, 2))


# aligning

@pytest.mark.parametrize("host", SMALL)
@pytest.mark.parametrize("student", SMALL)
def test_every_pair_aligns(host, student):
    a, b = align(build(host, 2, seed=0).eval(), build(student, 2, seed=1).eval())
    assert len(a) == len(b) >= 4 and a.strides == b.strides and a.ins[0] == b.ins[0] == 3
    x = images(1)
    with torch.no_grad():
        for net, blocks in ((host, a), (student, b)):
            assert torch.equal(blocks(x), build(net, 2, seed=int(blocks is b)).eval()(x))


def test_align_takes_blocks_and_refuses():
    net = build("test_resnet", 2)
    a, b = align(cut(net), net)
    assert a.names == b.names and a[0][0] is net.conv1
    odd = timm.create_model("test_convnext", patch_size=7, num_classes=2)
    with pytest.raises(BadInput, match=r"\[7, 14, 28, 56\] and \[2, 4, 8, 16, 32\]"): align(odd, net)
    with pytest.raises(BadInput, match="host has 5 classes, the student 2"): align(build("test_resnet", 5), net)


def test_freeze():
    net = freeze(build("test_resnet", 2))
    assert not any(m.training for m in net.modules()) and not any(p.requires_grad for p in net.parameters())
    x = images().requires_grad_()
    net(x).sum().backward()
    assert x.grad.abs().sum() > 0


# building

def test_seed_decides_and_disturbs_nothing():
    torch.manual_seed(1)
    a = torch.rand(1)
    torch.manual_seed(1)
    one, twin, other = (build("test_resnet", 2, seed=s) for s in (0, 0, 1))
    assert torch.equal(a, torch.rand(1)) and state_equal(one, twin) and not state_equal(one, other)


@pytest.mark.parametrize("name", ["resnet18.nothing", "RESNET18x", "hf-hub:timm/resnet18", "./resnet18", "", None])
def test_unknown_names(name, monkeypatch):
    monkeypatch.setattr(nets, "hub_options", lambda *_: pytest.fail("the network was asked"))
    start = time.perf_counter()
    with pytest.raises(BadInput, match="is not known"): build(name, 2, pretrained=True)
    assert time.perf_counter() - start < 2


def test_near_names():
    with pytest.raises(BadInput, match="near it are kdnb_mobilenetv1_075"): build("mobilenetv1_075", 2)
    with pytest.raises(BadInput, match="near it are resnet10t"): build("resnet10tt", 2)


@pytest.mark.parametrize("classes", [0, 1, -2, 2.0, "2", None, True])
def test_bad_classes(classes):
    with pytest.raises(BadInput, match="classes="): build("test_resnet", classes)


def test_hub_out_of_reach_is_told_within_seconds(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub

    def unreachable(): raise ConnectionError
    monkeypatch.setattr(huggingface_hub, "get_session", unreachable)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    start = time.perf_counter()
    with pytest.raises(BadInput, match="cannot be reached.*weights=FOLDER"): build("resnet18", 2, pretrained=True)
    for name in ("mobilenetv2_035", "kdnb_mobilenetv1_025"):
        with pytest.raises(BadInput, match="has no weights on the hub"): build(name, 2, pretrained=True)
    assert time.perf_counter() - start < 5


def test_a_fetched_file_is_used_without_the_hub(tmp_path, monkeypatch):
    import huggingface_hub
    kept = build("test_resnet", 1000, seed=3)
    safetensors.torch.save_file(kept.state_dict(), tmp_path/"model.safetensors")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(tmp_path/"model.safetensors"))
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: pytest.fail("the network was asked"))
    net = build("test_resnet", 2, pretrained=True, seed=0)
    assert net.card["start"] == "hub" and torch.equal(net.conv1[0].weight, kept.conv1[0].weight)


# starting from files

def test_weights_of_other_classes_and_without_classifier(tmp_path):
    five = build("test_resnet", 5, seed=9)
    state = {f"module.{k}": v for k, v in five.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path/"test_resnet.pth")
    net = build("test_resnet", 2, weights=tmp_path)
    assert net.card["head"] == "fresh" and len(net.card["start"]) == 16 and torch.equal(net.bn1.bias, five.bn1.bias)
    assert build("test_resnet", 5, weights=tmp_path).card["head"] == "kept"
    body = {k: v for k, v in five.state_dict().items() if not k.startswith("fc.")}
    safetensors.torch.save_file(body, tmp_path/"body.safetensors")
    assert build("test_resnet", 5, weights=tmp_path/"body.safetensors").card["head"] == "fresh"


def test_weights_that_do_not_fit(tmp_path):
    state = build("test_resnet", 2).state_dict()
    cases = {"1 missing .bn1.bias": {k: v for k, v in state.items() if k != "bn1.bias"},
             "1 unexpected .extra": state | {"extra": torch.zeros(1)},
             "1 of another shape .bn1.bias": state | {"bn1.bias": torch.zeros(7)}}
    for i, (reason, case) in enumerate(cases.items()):
        safetensors.torch.save_file(case, tmp_path/f"{i}.safetensors")
        with pytest.raises(BadInput, match=f"{i}.safetensors does not fit net='test_resnet': {reason}"):
            build("test_resnet", 2, weights=tmp_path/f"{i}.safetensors")
    with pytest.raises(BadInput, match="no file for net='resnet18'.*In that folder: 0.safetensors"):
        build("resnet18", 2, weights=tmp_path)
    with pytest.raises(BadInput, match="no file for net='resnet18'"): build("resnet18", 2, weights=tmp_path/"none.pth")
    (tmp_path/"text.pth").write_text("no weights")
    torch.save([1, 2], tmp_path/"list.pth")
    for name in ("text", "list"):
        with pytest.raises(BadInput, match=f"{name}.pth"): build("test_resnet", 2, weights=tmp_path/f"{name}.pth")


@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="no folder of published MobileNet and SqueezeNet weights")
@pytest.mark.parametrize(("name", "head"), [("kdnb_mobilenetv1_025", "kept"), ("kdnb_mobilenetv1_075", "kept"),
                                            ("kdnb_mobilenetv2_035", "fresh"), ("kdnb_squeezenet1_0", "kept")])
def test_published_weights(name, head):
    assert build(name, 1000, weights=WEIGHTS).card["head"] == head
    net = build(name, 2, weights=WEIGHTS).eval()
    assert net.card["head"] == "fresh" and torch.isfinite(net(images())).all()
    with pytest.raises(BadInput, match="does not fit"):
        build("mobilenetv1_100", 2, weights=WEIGHTS/"mobilenetv1_100_notop.safetensors")


# cards and pixels

def test_cards():
    for name in SMALL:
        card = card_of(build(name, 2))
        assert json.loads(json.dumps(card)) == card and card["net"] == name and card["classes"] == 2
    made = timm.create_model("test_resnet", num_classes=4)
    assert card_of(made)["classes"] == 4 and card_of(made)["timm"] == "test_resnet"
    assert card_of(cut(build("test_resnet", 2)))["net"] == "test_resnet"
    with pytest.raises(BadInput, match="has no card"): card_of(nn.Linear(2, 2))


def test_normalise():
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    net = build("kdnb_mobilenetv1_025", 2)
    assert torch.allclose(normalise(pixels, net.card), pixels / 127.5 - 1, atol=1e-6)
    assert torch.equal(normalise(pixels, net), normalise(pixels, net.card))
    x = normalise(pixels, build("resnet18", 2).card)
    assert torch.allclose(x[:, 0], (pixels[:, 0] / 255 - 0.485) / 0.229, atol=1e-6)
    for wrong in (pixels.float(), pixels[0], pixels[:, :1]):
        with pytest.raises(BadInput, match="uint8"): normalise(wrong, net.card)


# cost

def test_cost():
    assert cost(build("resnet18", 1000), 224)["macs"] == 1_814_073_344
    net = build("test_resnet", 2).train()
    before = copy.deepcopy(net)
    c = cost(net, 64, batch=2)
    assert c["params"] == sum(p.numel() for p in net.parameters()) and c["latency_ms"] > 0
    assert net.training and state_equal(net, before) and c["macs"] == cost(cut(net), 64)["macs"]


# keeping

@pytest.mark.parametrize("name", SMALL)
def test_save_and_load(name, tmp_path):
    net, x = build(name, 3, seed=0), images(4)
    net(x)  # moves the statistics
    net.eval()
    z = net(x)
    path = save_net(net.to(memory_format=torch.channels_last), tmp_path/"deep"/"net.safetensors")
    again = load_net(path, net=name, classes=3)
    assert again.card == net.card == read_card(path) and torch.equal(again(x), z) and not again.training
    if card := net.card if net.card["timm"] else None:
        plain = timm.create_model(card["timm"], num_classes=3, **card["kwargs"]).eval()
        plain.load_state_dict(safetensors.torch.load_file(path), strict=True)
        assert torch.equal(plain(x), z)
    assert [p.name for p in path.parent.iterdir()] == ["net.safetensors"]


def test_load_refuses(tmp_path):
    path = save_net(build("test_resnet", 2), tmp_path/"a.safetensors")
    with pytest.raises(BadInput, match="a.safetensors holds classes=2; classes=8"): load_net(path, classes=8)
    with pytest.raises(BadInput, match="a.safetensors holds net='test_resnet'"): load_net(path, net="resnet18")
    with pytest.raises(BadInput, match="b.safetensors is not there"): load_net(tmp_path/"b.safetensors")
    whole = path.read_bytes()
    for n in (0, 5, 1000, len(whole) - 7):
        (tmp_path/"cut.safetensors").write_bytes(whole[:n])
        with pytest.raises(BadInput, match="cut.safetensors is damaged"): load_net(tmp_path/"cut.safetensors")
    safetensors.torch.save_file(build("test_resnet", 2).state_dict(), tmp_path/"bare.safetensors")
    with pytest.raises(BadInput, match="bare.safetensors has no card"): load_net(tmp_path/"bare.safetensors")
    card = json.dumps(build("resnet10t", 2).card)
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path/"liar.safetensors", metadata={"kdnb_card": card})
    with pytest.raises(BadInput, match="liar.safetensors: the weights are not those of its card"):
        load_net(tmp_path/"liar.safetensors")


def test_save_refuses_a_card_that_does_not_remake_the_net(tmp_path):
    odd = timm.create_model("test_convnext", patch_size=7, num_classes=2)
    with pytest.raises(BadInput, match="not those of its card"): save_net(odd, tmp_path/"odd.safetensors")
    assert not list(tmp_path.iterdir())


def test_blocks_are_a_module():
    blocks = cut(build("test_resnet", 2, seed=0).eval())
    assert isinstance(blocks[1:3], Blocks) and len(blocks[:0]) == 0 and torch.equal(blocks[:0](images()), images())
    assert [b is c for b, c in zip(blocks, blocks[:], strict=True)] == [True] * len(blocks)
    twin = copy.deepcopy(blocks)
    assert torch.equal(twin(images()), blocks(images())) and twin[0] is not blocks[0]
