"Cutting networks of every family into blocks, and aligning two of them."
import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from kdnb import blocks as kb
from kdnb.blocks import Averaged, Blocks, align, cut, listed, nearest, unrolled
from kdnb.core import BadInput
from kdnb.nets import build, timm

FAMILIES = {
    "resnet18": "ResNet", "resnet50": "ResNet", "resnet10t": "ResNet", "resnext50_32x4d": "ResNet",
    "wide_resnet50_2": "ResNet", "seresnet18": "ResNet", "test_resnet": "ResNet", "regnetx_002": "RegNet",
    "regnety_002": "RegNet", "regnetz_005": "RegNet", "densenet121": "DenseNet", "kdnb_densenet_small": "DenseNet",
    "vgg11": "VGG", "vgg16": "VGG", "vgg11_bn": "VGG", "kdnb_mobilenetv1_025": "EfficientNet",
    "kdnb_mobilenetv1_075": "EfficientNet", "mobilenetv1_100h": "EfficientNet", "kdnb_mobilenetv2_035": "EfficientNet",
    "efficientnet_b0": "EfficientNet", "tf_efficientnetv2_b0": "EfficientNet", "mixnet_s": "EfficientNet",
    "mobilenetv3_small_050": "MobileNetV3", "mobilenetv3_large_100": "MobileNetV3", "lcnet_050": "MobileNetV3",
    "mobilenetv4_conv_small": "MobileNetV3", "convnext_atto": "ConvNeXt", "convnextv2_atto": "ConvNeXt",
    "starnet_s050": "StarNet", "starnet_s1": "StarNet", "test_byobnet": "ByobNet", "repvgg_a0": "ByobNet",
    "kdnb_squeezenet1_0": "SqueezeNet", "vit_tiny_patch16_224": "VisionTransformer",
    "deit_tiny_patch16_224": "VisionTransformer", "test_vit": "VisionTransformer", "test_vit3": "VisionTransformer",
}
SMALL = ["test_resnet", "regnetx_002", "kdnb_mobilenetv1_025", "kdnb_mobilenetv2_035", "mobilenetv3_small_050",
         "test_convnext", "starnet_s050", "kdnb_densenet_small", "kdnb_squeezenet1_0"]
STRIDES = {"ConvNeXt": [4, 8, 16, 32], "SqueezeNet": [2, 4, 8, 16], "VisionTransformer": [16] * 4}  # of others 2 to 32
LESS = {"vgg11": {"mlp_ratio": 1 / 64}, "vgg16": {"mlp_ratio": 1 / 64}, "vgg11_bn": {"mlp_ratio": 1 / 64},
        "wide_resnet50_2": {"layers": (1, 1, 1, 2)}, "resnext50_32x4d": {"layers": (1, 2, 1, 2)}}

pytestmark = pytest.mark.usefixtures("one_thread")  # bits are compared


def made(name, classes=3, **kwargs):
    "A net of a family, made small where the family's own nets are too big for a quick test."
    kwargs = LESS.get(name, {}) | kwargs
    return timm.create_model(name, num_classes=classes, **kwargs) if kwargs else build(name, classes, seed=0)


def images(n=2, size=64, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def state_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def width(x): return x.shape[-1 if x.ndim == 3 else 1]


# every family

@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_compose_to_the_net_bit_for_bit(name):
    net, x = made(name), images()
    assert type(net).__name__ == FAMILIES[name]
    twin = copy.deepcopy(net)
    blocks, fine = cut(twin), unrolled(twin)[0]
    torch.manual_seed(3)
    z = net(x)
    torch.manual_seed(3)
    assert torch.equal(blocks(x), z) and state_equal(net, twin), "training mode"
    net.eval()
    twin.eval()
    with torch.no_grad():
        z, outputs = net(x), fine.outputs(x.clone())
        assert torch.equal(blocks(x), z) and torch.equal(outputs[-1], z), "evaluation mode"
        assert torch.equal(blocks[2:](blocks[:2](x)), z)
        for i, part in enumerate(fine):  # an in-place layer behind a boundary would change what is kept there
            kept = outputs[i - 1].clone() if i else x.clone()
            part(outputs[i - 1] if i else x)
            assert torch.equal(kept, outputs[i - 1] if i else x)
    for b in (blocks, fine):
        assert {id(p) for p in b.parameters()} == {id(p) for p in twin.parameters()}
        assert b.strides[-1] == 0 and b.strides[:-1] == sorted(b.strides[:-1]) and b.kinds[-1] == "logits"
        assert b.ins == [3, *b.widths[:-1]] and b.widths[-1] == 3 and len(set(b.names)) == len(b)
    assert blocks.strides[:-1] == STRIDES.get(FAMILIES[name], [2, 4, 8, 16, 32])
    assert [width(o) for o in outputs] == fine.widths and sum(blocks.steps) == len(fine)


@pytest.mark.parametrize(("name", "reads"), [
    ("resnet18", "layer2.0.conv1"), ("densenet121", "features.transition2.conv"), ("vgg11_bn", "features.8"),
    ("kdnb_mobilenetv1_025", "blocks.2.1.conv_pw"), ("convnext_atto", "stages.2.downsample.1"),
    ("starnet_s050", "stages.1.0.conv"), ("kdnb_squeezenet1_0", "features.5.squeeze")])
def test_a_cut_falls_right_before_a_convolution(name, reads):
    "Where a family can, what reads the map of a boundary first is a convolution of all its channels."
    net = made(name).eval()
    blocks, layer = cut(net), net.get_submodule(reads)
    at = next(i for i, b in enumerate(blocks) if any(m is layer for m in b.modules()))
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(): outputs = blocks.outputs(images(1))
    hook.remove()
    assert layer.groups == 1 and at and torch.equal(seen[0], outputs[at - 1])


def test_a_dense_block_is_cut_between_its_layers():
    net = build("kdnb_densenet_small", 2, seed=0)
    assert [len(b.strides) - 1 for b in (cut(net), cut(net, 2), cut(net, 99))] == [5, 9, 1 + 3 + 4 + 6 + 4]
    dropping = timm.create_model("densenet121", num_classes=2, block_config=(2, 2, 2, 2), growth_rate=8, drop_rate=.3)
    blocks = cut(dropping, 2)
    torch.manual_seed(0)
    z = dropping(images())
    torch.manual_seed(0)
    assert torch.equal(blocks(images()), z)


# tokens

def test_tokens():
    net = build("vit_tiny_patch16_224", 2, seed=0).eval()
    blocks = cut(net)
    assert blocks.kinds == ["tokens"] * 4 + ["logits"] and blocks.widths == [192] * 4 + [2] and blocks.steps[0] == 3
    assert [len(cut(net, n)) for n in (2, 3, 4, 9)] == [9, 13, 13, 13]
    with torch.no_grad():
        assert [tuple(o.shape) for o in blocks.outputs(images(1, 48))] == [(1, 10, 192)] * 4 + [(1, 2)]
        net.cls_token.fill_(1.)
        assert torch.equal(blocks(images(1, 80)), net(images(1, 80))), "the net's own parameters, at any size"


@pytest.mark.parametrize("kwargs", [
    {"img_size": 32}, {"global_pool": "avg"}, {"global_pool": "map"}, {"class_token": False, "global_pool": "avg"},
    {"reg_tokens": 3, "no_embed_class": True}, {"pre_norm": True, "final_norm": False}, {"drop_rate": .4},
    {"pos_drop_rate": .2, "drop_path_rate": .3}, {"patch_drop_rate": .5}], ids=str)
def test_every_kind_of_plain_vit(kwargs):
    net = made("test_vit", **{"img_size": 64} | kwargs)
    x, blocks = images(2, kwargs.get("img_size", 64)), cut(net)
    for mode in (True, False):
        net.train(mode)
        torch.manual_seed(1)
        z = net(x)
        torch.manual_seed(1)
        assert torch.equal(blocks(x), z)


def test_a_distilled_vit_is_refused():
    net = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=2, depth=4, dynamic_img_size=True)
    with pytest.raises(BadInput, match="Distilled cannot be cut: it embeds or pools its tokens"): cut(net)


# looking only

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


@pytest.mark.parametrize("name", ["kdnb_squeezenet1_0", "kdnb_densenet_small", "test_vit"])
def test_modes_follow_the_net(name):
    net = build(name, 2)
    modes = lambda b: {m.training for m in b.modules()}
    assert modes(cut(net)) == {True} and modes(cut(net.eval())) == {False} and not cut(net)[:2].training
    cut(net).train()
    assert all(m.training for m in net.modules() if not list(m.children()))


@pytest.mark.parametrize("name", ["test_resnet", "starnet_s050"])
def test_dropout_called_as_a_function(name):
    dropping = timm.create_model(name, num_classes=2, drop_rate=0.5)
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
    class Louder(kb.ResNet):
        def forward(self, x): return 2 * super().forward(x)

    with pytest.raises(BadInput, match="its family's steps do not tell"):
        cut(Louder(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=2))
    with pytest.raises(BadInput, match="Linear cannot be cut.*ResNet, RegNet, DenseNet, VGG"):
        cut(nn.Linear(3, 2))


def test_blocks_are_a_module():
    blocks = cut(build("test_resnet", 2, seed=0).eval())
    assert isinstance(blocks[1:3], Blocks) and len(blocks[:0]) == 0 and torch.equal(blocks[:0](images()), images())
    assert blocks[1:3].steps == blocks.steps[1:3] and blocks[-1:].kinds == ["logits"]
    assert [b is c for b, c in zip(blocks, blocks[:], strict=True)] == [True] * len(blocks)
    twin = copy.deepcopy(blocks)
    assert torch.equal(twin(images()), blocks(images())) and twin[0] is not blocks[0]
    assert listed(blocks).params.sum() == sum(p.numel() for p in blocks.parameters())
    tokens = cut(build("test_vit", 2, seed=0).eval())
    assert torch.equal(copy.deepcopy(tokens)(images()), tokens(images()))
    assert torch.equal(Averaged()(blocks[:-1](images())), nn.AdaptiveAvgPool2d(1)(blocks[:-1](images())).flatten(1))


# finer cuts

@pytest.mark.parametrize("name", ["resnet18", "kdnb_densenet_small", "vgg11_bn", "kdnb_mobilenetv1_025", "convnext_atto",
                                  "kdnb_squeezenet1_0", "starnet_s050", "test_vit"])
def test_finer_cuts(name):
    net, x = made(name).eval(), images(1)
    with torch.no_grad():
        z, coarse = net(x), cut(net)
        for n in (2, 3, 50):
            fine = cut(net, per_stage=n)
            assert torch.equal(fine(x), z) and set(fine.strides) == set(coarse.strides)
            assert len(coarse) < len(fine) <= n * (len(coarse) - 1) + 1
            again = cut(net, steps=fine.steps)
            assert again.names == fine.names and again.strides == fine.strides and again.steps == fine.steps
            ends = lambda b: {n.split("..")[-1] for n in b.names}
            assert ends(coarse) <= ends(fine), "finer, not other"
    assert len(fine) == len(unrolled(net)[0])


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, None, "2"])
def test_bad_fineness(bad):
    with pytest.raises(BadInput, match="per_stage="): cut(build("test_resnet", 2), per_stage=bad)


@pytest.mark.parametrize("steps", [[], [1, 1], [6, 0], [3, 4]])
def test_steps_of_another_net(steps):
    with pytest.raises(BadInput, match="test_resnet|ResNet has 6, its head included"):
        cut(build("test_resnet", 2), steps=steps)


# aligning

@pytest.fixture(scope="module")
def small():
    "Nets and their blocks, two a stage."
    nets = {name: build(name, 2, seed=0).eval() for name in SMALL}
    return {name: (net, cut(net, 2)) for name, net in nets.items()}


@pytest.mark.parametrize("host", SMALL)
def test_every_pair_aligns(host, small):
    x, (net, one) = images(1), small[host]
    with torch.no_grad():
        logits = net(x)
        for student in SMALL:
            a, b = align(one, small[student][1])
            assert len(a) == len(b) >= 4 and a.strides == b.strides and a.ins[0] == b.ins[0] == 3
            assert torch.equal(a(x), logits) and sum(b.steps) == sum(small[student][1].steps)


@pytest.mark.parametrize(("host", "student", "strides"), [
    ("resnet34", "resnet18", [2, 4, 8, 16, 32]), ("resnet50", "kdnb_mobilenetv2_035", [2, 4, 8, 16, 32]),
    ("densenet121", "resnet18", [2, 4, 8, 16, 32]), ("vgg11_bn", "vgg11", [2, 4, 8, 16, 32]),
    ("vgg16", "starnet_s050", [2, 4, 8, 16, 32]), ("convnext_atto", "regnety_002", [4, 8, 16, 32]),
    ("kdnb_mobilenetv1_075", "kdnb_mobilenetv1_025", [2, 4, 8, 16, 32]), ("resnet18", "efficientnet_b0", [2, 4, 8, 16, 32]),
    ("mobilenetv4_conv_small", "convnext_atto", [4, 8, 16, 32]), ("resnet34", "kdnb_squeezenet1_0", [2, 4, 8, 16]),
    ("vit_small_patch16_224", "vit_tiny_patch16_224", [16] * 4), ("deit_tiny_patch16_224", "test_vit", [16] * 4)])
def test_pairs(host, student, strides):
    "Students of other depth, of other width, of another family; their blocks can change places if the widths agree."
    both = [made(n, 2, **({"depth": 6, "dynamic_img_size": True} if "vit_small" in n else {})).eval() for n in (host, student)]
    a, b = align(*both)
    assert a.strides == b.strides == [*strides, 0] and a.kinds == b.kinds
    with torch.no_grad():
        x = images(1)
        for i, (s, t) in enumerate(zip(a.outputs(x), b.outputs(x), strict=True)):
            assert s.ndim == t.ndim and (s.ndim == 4 or s.shape[:-1] == t.shape[:-1])
            assert s.ndim != 4 or s.shape[2:] == t.shape[2:] or "squeezenet" in student, "SqueezeNet does not pad"
            assert (width(s), width(t)) == (a.widths[i], b.widths[i])
        assert torch.equal(a(x), both[0](x)) and torch.equal(b(x), both[1](x))


def test_finer_where_both_can():
    a, b = align(build("resnet34", 2), build("resnet18", 2), per_stage=3)
    assert a.strides == b.strides == [2, 4, 4, 8, 8, 16, 16, 32, 32, 0]
    assert a.steps == [1, 1, 2, 2, 2, 2, 4, 1, 2, 1] and b.steps == [1] * 10
    a, b = align(build("resnet18", 2), build("test_resnet", 2), per_stage=2)
    assert a.steps == [1, 2, 2, 2, 2, 1] and b.steps == [1] * 6, "one where the student has one"


def test_nearest():
    assert nearest([.25, .5, .75, 1.], [.5, 1.]) == [1, 3] and nearest([.1, .2, 1.], [.9, .95, 1.]) == [0, 1, 2]
    assert nearest([.5, 1.], [1.]) == [1] and nearest([.1, .2, .3, 1.], [.05, .06, 1.]) == [0, 1, 3]


def test_align_takes_blocks_and_refuses():
    net = build("test_resnet", 2)
    a, b = align(cut(net), net)
    assert a.names == b.names and a[0][0] is net.conv1
    odd = timm.create_model("test_convnext", patch_size=7, num_classes=2)
    with pytest.raises(BadInput, match=r"\[7, 14, 28, 56\] and \[2, 4, 8, 16, 32\]"): align(odd, net)
    with pytest.raises(BadInput, match="host has 5 classes, the student 2"): align(build("test_resnet", 5), net)


def test_tokens_are_no_maps():
    vit, net = build("test_vit", 2), build("test_resnet", 2)
    four, five = r"\[16, 16, 16, 16\]", r"\[2, 4, 8, 16, 32\]"
    with pytest.raises(BadInput, match=f"{four} and {five} .host: tokens, 1 no patches, student: map"): align(vit, net)
    with pytest.raises(BadInput, match=f"{five} and {four} "): align(net, vit)
    coarser = made("test_vit", 2, patch_size=32, img_size=64)
    with pytest.raises(BadInput, match=four + r" and \[32, 32, 32, 32\]"): align(vit, coarser)
    with pytest.raises(BadInput, match=f"{four} and {four} .*1 no patches.*4 no patches"):
        align(vit, made("test_vit", 2, reg_tokens=3, dynamic_img_size=True))


# maps of equal strides and other sides

def sides(blocks, size):
    with torch.no_grad(): return [o.shape[-1] if o.ndim == 4 else o.shape[1] for o in blocks.outputs(images(1, size))[:-1]]


@pytest.mark.parametrize(("host", "student"), [("resnet10t", "kdnb_squeezenet1_0"), ("kdnb_squeezenet1_0", "kdnb_mobilenetv1_025")])
def test_a_pair_whose_maps_never_agree_is_refused_with_strides_and_sides(host, student):
    both = [made(n, 2) for n in (host, student)]
    measured = {"kdnb_squeezenet1_0": ([2, 4, 8, 16], [29, 14, 7, 3])}
    said = [measured.get(n, ([2, 4, 8, 16, 32], [32, 16, 8, 4, 2])) for n in (host, student)]
    with pytest.raises(BadInput) as e: align(*both, size=64)
    (one, here), (two, there) = said
    assert f"strides are {one} and {two} " in str(e.value) and f"at 64 px sides have {here} and {there} places" in str(e.value)
    assert align(*both)[0].strides == [2, 4, 8, 16, 0], "by stride alone they have all boundaries in common"
    assert [len(align(b, b, size=64)[0]) for b in both] == [len(s) + 1 for s, _ in said]


@pytest.mark.parametrize("host", [n for n in SMALL if "squeezenet" not in n])
@pytest.mark.parametrize("size", [48, 64])
def test_aligned_at_a_size_all_maps_agree(small, host, size):
    for student in SMALL:
        if "squeezenet" in student: continue
        a, b = align(small[host][1], small[student][1], size=size)
        assert sides(a, size) == sides(b, size) and a.strides == b.strides and len(a) >= 4
        free = align(small[host][1], small[student][1])
        assert size == 48 or (a.names, b.names) == (free[0].names, free[1].names), "at 64 px nothing is lost"


@pytest.mark.parametrize(("size", "last"), [(64, 32), (112, 16), (224, 32), (48, 16)])
def test_a_boundary_that_does_not_fit_is_given_up(small, size, last):
    "Where 7 places become 3 in one network and 4 in the other."
    (net, host), student = small["kdnb_densenet_small"], small["test_resnet"][1]
    a, b = align(host, student, size=size)
    assert a.strides[-2] == b.strides[-2] == last and sides(a, size) == sides(b, size)
    with torch.no_grad(): assert torch.equal(a(images(1, size)), net(images(1, size)))


def test_measuring_leaves_no_trace():
    net = build("test_resnet", 2, seed=0)
    net.layer1.eval()
    before, modes, state = copy.deepcopy(net), [m.training for m in net.modules()], torch.get_rng_state()
    align(net, net, size=48)
    assert state_equal(net, before) and modes == [m.training for m in net.modules()]
    assert torch.equal(state, torch.get_rng_state())


def test_a_vit_is_measured_at_the_size_it_insists_on():
    vit = lambda n: timm.create_model("vit_tiny_patch16_224", num_classes=2, depth=4, img_size=n)
    assert len(align(vit(32), build("test_vit", 2), size=64)[0]) == 5
    with pytest.raises(BadInput, match="32 px only, the other 48 px"): align(vit(32), vit(48), size=64)
