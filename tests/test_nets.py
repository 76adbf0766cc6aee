"Building, starting, counting and keeping networks."
import copy
import json
import os
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from kdnb import nets
from kdnb.blocks import cut
from kdnb.core import BadInput
from kdnb.nets import build, card_of, cost, freeze, load_net, normalise, read_card, save_net, timm

SMALL = ["test_resnet", "regnetx_002", "kdnb_mobilenetv1_025", "kdnb_mobilenetv2_035", "mobilenetv3_small_050",
         "test_convnext", "kdnb_squeezenet1_0"]
WEIGHTS = Path(os.environ.get("KDNB_WEIGHTS", Path(__file__).resolve().parents[2]/"shared"/"data"/"weights"))

pytestmark = pytest.mark.usefixtures("one_thread")  # bits are compared


def images(n=2, size=64, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def state_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_squeezenet_does_not_clip_its_logits():
    net = build("kdnb_squeezenet1_0", 2, seed=0).eval()
    with torch.no_grad(): net.classifier[1].bias.fill_(-1e3)
    assert (net(images()) < 0).all()
    assert net.state_dict().keys() == nets.SqueezeNet("1_0", 2).state_dict().keys()


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


def test_a_plain_vit_takes_any_size_that_its_patches_divide(tmp_path):
    net = build("vit_tiny_patch16_224", 2, seed=0).eval()
    assert net.card["kwargs"] == {"dynamic_img_size": True} and build("test_resnet", 2).card["kwargs"] == {}
    native = timm.create_model("vit_tiny_patch16_224", num_classes=2).eval()
    native.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert net(images(1, 48)).shape == net(images(1, 64)).shape == (1, 2)
        assert torch.equal(native(images(1, 224)), net(images(1, 224)))
    again = load_net(save_net(net, tmp_path/"vit.safetensors"))
    assert again.card == net.card and torch.equal(again(images()), net(images()))
    assert cost(net, 64)["macs"] > 16 * net.blocks[0].mlp.fc1.weight.numel() * 24


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
