"Adapters: their starts, what reads and writes a value, merging in either direction, and plain students at the end."
import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdnb import adapters as ad
from kdnb.adapters import Tape, adapter, mapped, merge_back, merge_into, plain_boundaries, readers, ridge, ways
from kdnb.blocks import align, cut
from kdnb.core import BadInput
from kdnb.grafting import Graft, merge
from kdnb.nets import build, cost, evaluating, timm
from kdnb.students import Spliced, load_student, save_student

SMALL = {"vgg11_bn": {"mlp_ratio": 1/64},
         "resnext50_32x4d": {"channels": (16, 32, 64, 128)}}
STUDENTS = ["resnet18", "mobilenetv2_035", "vgg11_bn", "densenet121", "convnext_atto"]
FAMILIES = ["test_resnet", "resnext50_32x4d", "regnety_002", "vgg11_bn", "kdnb_densenet_small", "kdnb_mobilenetv1_025",
            "kdnb_mobilenetv2_035", "mobilenetv3_small_050", "mobilenetv4_conv_small_035", "lcnet_050", "convnext_atto",
            "convnextv2_atto", "kdnb_squeezenet1_0", "starnet_s050", "repvgg_a0", "test_vit"]
FINER = ["test_resnet", "kdnb_densenet_small", "kdnb_mobilenetv1_025", "kdnb_mobilenetv2_035", "starnet_s050",
         "test_vit"]


pytestmark = pytest.mark.usefixtures("one_thread")  # bits are compared


def used(net):
    "Statistics, gains and shifts as a trained network has them."
    g = torch.Generator().manual_seed(5)
    for m in net.modules():
        if not isinstance(m, nn.modules.batchnorm._BatchNorm): continue
        m.running_var.uniform_(.5, 2, generator=g)
        for t in (m.running_mean, m.bias.data): t.normal_(0, .1, generator=g)
        m.weight.data.uniform_(.5, 1.5, generator=g)
    return net.eval()


def made(name):
    kwargs = SMALL.get(name)
    if kwargs is None: return used(build(name, 2, seed=0))
    net = timm.create_model(name, num_classes=2, **kwargs)
    net.card = dict(net=name, timm=name, kwargs=kwargs, classes=2, mean=[0.]*3, std=[1.]*3)
    return used(net)


def square(d, seed=0):
    "A well-conditioned map that is neither symmetric nor orthogonal."
    g = torch.Generator().manual_seed(seed)
    q, r = (torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q for _ in range(2))
    return q @ torch.diag(torch.linspace(.5, 2, d, dtype=torch.float64)) @ r


def images(n=2, size=64): return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(3))


def same_state(a, b): return all(torch.equal(v, b[k]) for k, v in a.items())


# starts

@pytest.mark.parametrize("kind", ["map", "tokens"])
@pytest.mark.parametrize("widths", [(7, 3), (3, 7)])
def test_starts(kind, widths):
    x = torch.randn(2, widths[0], 4, 4) if kind == "map" else torch.randn(2, 9, widths[0])
    for start in ad.STARTS:
        layer = adapter(*widths, start, kind)
        assert layer.bias is None and layer(x).shape[1 if kind == "map" else -1] == widths[1]
    y, n = adapter(*widths, "identity", kind)(x), min(widths)
    if kind == "map": x, y = x.movedim(1, -1), y.movedim(1, -1)
    assert torch.equal(y[..., :n], x[..., :n]) and not y[..., n:].any()


def test_unknown_start_and_kind_are_refused():
    with pytest.raises(BadInput, match="orthogonal"): adapter(3, 4, "zero")
    with pytest.raises(BadInput, match="tokens"): adapter(3, 4, kind="token")


@pytest.mark.parametrize("shape", [(9, 6, 5, 5), (9, 7, 6)])
def test_ridge_is_least_squares_without_a_penalty(shape):
    x = torch.randn(shape)
    y = torch.randn(9, 4, 5, 5) if len(shape) == 4 else torch.randn(9, 7, 4)
    rows = lambda t: (t.movedim(1, -1) if t.ndim == 4 else t).flatten(0, -2).double().numpy()
    want = np.linalg.lstsq(rows(x), rows(y), rcond=None)[0].T
    for batch in (2, 64): assert np.allclose(ridge(x, y, 0., batch=batch), want, atol=1e-9)
    c = rows(x).T @ rows(x)
    want = np.linalg.solve(c + .3*np.trace(c)/len(c)*np.eye(len(c)), rows(x).T @ rows(y)).T
    assert np.allclose(ridge(x, y, .3), want, atol=1e-9)


def test_ridge_bears_dead_channels_and_finds_what_is_there():
    x = torch.randn(16, 6, 4, 4)
    x[:, 2:4] = 0
    w = torch.randn(5, 6)
    w[:, 2:4] = 0
    y = torch.einsum("oc,bchw->bohw", w, x)
    assert torch.allclose(ridge(x, y, 0.).float(), w, atol=1e-4) and ridge(x, y)[:, 2:4].abs().max() < 1e-12
    layer = ad.ridge_start(adapter(6, 5), x, y, 0.)
    assert torch.allclose(layer(x), y, atol=1e-4)
    tokens = ad.ridge_start(adapter(6, 5, kind="tokens"), x.flatten(2).mT, y.flatten(2).mT, 0.)
    assert torch.allclose(tokens.weight, layer.weight.flatten(1), atol=1e-5)
    assert isinstance(ad.ridge_start(adapter(6, 6), x, y), nn.Identity)


def test_ridge_refuses_what_does_not_belong_together():
    with pytest.raises(BadInput, match="8 activations"): ridge(torch.randn(8, 3, 4, 4), torch.randn(7, 3, 4, 4))
    with pytest.raises(BadInput, match="resolution"): ridge(torch.randn(8, 3, 4, 4), torch.randn(8, 3, 2, 2))


# readers and writers

class Does(nn.Module):
    "Modules and a forward pass of one's own."
    def __init__(self, forward, **modules):
        super().__init__()
        for k, m in modules.items(): setattr(self, k, m)
        self.does = forward

    def forward(self, x): return self.does(self, x)


conv = lambda *a, **k: nn.Conv2d(*a, **k)
FORWARDS = {
    "padding with zeros": (Does(lambda s, x: s.a(F.pad(x, (1, 1, 1, 1))), a=conv(4, 4, 3)), True),
    "padding with ones": (Does(lambda s, x: s.a(F.pad(x, (1, 1, 1, 1), value=1.)), a=conv(4, 4, 3)), False),
    "padding by reflection": (Does(lambda s, x: s.a(F.pad(x, (1, 1, 1, 1), mode="reflect")), a=conv(4, 4, 3)), True),
    "mean over places": (Does(lambda s, x: s.a(x.mean((2, 3))), a=nn.Linear(4, 2)), True),
    "mean over channels": (Does(lambda s, x: s.a(x.mean(1)), a=nn.Linear(9, 2)), False),
    "flattened": (Does(lambda s, x: s.a(x.flatten(1)), a=nn.Linear(4*81, 2)), True),
    "two branches": (Does(lambda s, x: F.relu(s.a(x)) * s.b(x), a=conv(4, 4, 1), b=conv(4, 4, 1)), True),
    "a layer twice": (Does(lambda s, x: F.relu(s.a(x)) + s.a(x), a=conv(4, 4, 1)), True),
    "a skip": (Does(lambda s, x: s.a(x) + x, a=conv(4, 4, 1)), False),
    "a gate": (Does(lambda s, x: s.a(x * x.mean((2, 3), keepdim=True)), a=conv(4, 4, 1)), False),
    "max-pooling": (Does(lambda s, x: s.a(F.max_pool2d(x, 2)), a=conv(4, 4, 1)), False),
    "depthwise": (Does(lambda s, x: s.a(x), a=conv(4, 4, 3, groups=4)), False),
    "BatchNorm": (Does(lambda s, x: s.a(s.n(x)), a=conv(4, 4, 1), n=nn.BatchNorm2d(4)), False),
    "weights made on the way": (Does(lambda s, x: F.conv2d(x, F.normalize(s.a.weight)), a=conv(4, 4, 1)), False),
    "flattened places": (Does(lambda s, x: s.a(x.flatten(2)), a=nn.Linear(81, 3)), False),
    "mean over rows": (Does(lambda s, x: s.a(x.mean(2)), a=nn.Linear(9, 3)), False),
    "nothing but pooling": (Does(lambda s, x: F.avg_pool2d(x, 2)), False),
    "a linear layer along the rows": (Does(lambda s, x: s.a(x), a=nn.Linear(9, 9)), False),
}


@pytest.mark.parametrize("what", FORWARDS)
def test_forwards(what):
    block, can = FORWARDS[what]
    block, c, x = copy.deepcopy(block).eval(), square(4), torch.randn(3, 4, 9, 9)
    before, wanted = copy.deepcopy(block.state_dict()), block(mapped(x, c))
    assert merge_into(block, c, x) == can and bool(readers(Tape([block], x))) == can
    assert torch.allclose(block(x), wanted, atol=1e-4) if can else same_state(block.state_dict(), before)


TOKENS = {
    "class token": (lambda s, x: s.a(x[:, 0]), True),
    "the others averaged": (lambda s, x: s.a(x[:, 1:].mean(dim=1)), True),
    "every token": (lambda s, x: s.a(x), True), "a channel": (lambda s, x: s.b(x[..., 0]), False),
    "tokens in a row": (lambda s, x: s.c(x.flatten(1)), False), "a normalisation": (lambda s, x: s.a(s.n(x)), False),
    "turned": (lambda s, x: s.b(x.mT), False),
}


@pytest.mark.parametrize("what", TOKENS)
def test_forwards_into_what_reads_tokens(what):
    does, can = TOKENS[what]
    block = Does(does, a=nn.Linear(4, 3), b=nn.Linear(6, 3), c=nn.Linear(24, 3), n=nn.LayerNorm(4)).eval()
    c, x = square(4), torch.randn(3, 6, 4)
    wanted = block(mapped(x, c))
    assert merge_into(block, c, x) == can and bool(readers(Tape([block], x))) == can
    assert not can or torch.allclose(block(x), wanted, atol=1e-4)


norm = lambda d: used(nn.BatchNorm2d(d))
BACKWARDS = {
    "convolution": (Does(lambda s, x: s.a(x), a=conv(3, 4, 3)), True),
    "BatchNorm": (Does(lambda s, x: s.n(s.a(x)), a=conv(3, 4, 3, bias=False), n=norm(4)), True),
    "BatchNorm and pooling": (Does(lambda s, x: F.avg_pool2d(s.n(s.a(x)), 2), a=conv(3, 4, 3), n=norm(4)), True),
    "a sum": (Does(lambda s, x: s.n(s.a(x)) + s.b(x), a=conv(3, 4, 1), b=conv(3, 4, 1), n=norm(4)), True),
    "a sum in place": (Does(lambda s, x: s.a(x).add_(s.b(x)), a=conv(3, 4, 1), b=conv(3, 4, 1)), True),
    "a linear layer": (Does(lambda s, x: s.a(x.mean((2, 3))), a=nn.Linear(3, 4)), True),
    "ReLU": (Does(lambda s, x: F.relu(s.a(x)), a=conv(3, 4, 3)), False),
    "ReLU in place": (Does(lambda s, x: F.relu(s.a(x), inplace=True), a=conv(3, 4, 3)), False),
    "a constant added": (Does(lambda s, x: s.a(x) + 1, a=conv(3, 4, 3)), False),
    "a skip": (Does(lambda s, x: s.a(x) + s.b(s.a(x)), a=conv(3, 4, 1), b=conv(4, 4, 1)), False),
    "a term used twice": (Does(lambda s, x: (y := s.a(x)) + s.b(y), a=conv(3, 4, 1), b=conv(4, 4, 1)), False),
    "depthwise": (Does(lambda s, x: s.b(s.a(x)), a=conv(3, 4, 1), b=conv(4, 4, 3, groups=4)), False),
    "two BatchNorms": (Does(lambda s, x: s.m(s.n(s.a(x))), a=conv(3, 4, 3), n=norm(4), m=norm(4)), False),
    "no gain": (Does(lambda s, x: s.n(s.a(x)), a=conv(3, 4, 3), n=nn.BatchNorm2d(4, affine=False)), False),
    "concatenation": (Does(lambda s, x: torch.cat([s.a(x), x], 1), a=conv(3, 1, 1)), False),
}


@pytest.mark.parametrize("what", BACKWARDS)
def test_backwards(what):
    block, can = BACKWARDS[what]
    block, c, x = copy.deepcopy(block).eval(), square(4), torch.randn(3, 3, 9, 9)
    with evaluating(block): before, wanted = copy.deepcopy(block.state_dict()), mapped(block(x), c)
    assert merge_back(block, c, x) == can
    with torch.no_grad(): y = block(x)
    assert torch.allclose(y, wanted, atol=1e-4) if can else same_state(block.state_dict(), before)


def test_what_cannot_be_proved_is_taken_back():
    "A tape may be deceived; the proof is not."
    block, x = nn.Sequential(conv(4, 4, 1), nn.ReLU()).eval(), torch.randn(2, 4, 5, 5)
    before = copy.deepcopy(block.state_dict())
    assert not merge_into(block, square(4)*float("nan"), x) and same_state(block.state_dict(), before)
    block.a = block[0]  # the same layer reads something else, unseen by whoever asks for the input's readers
    late = Does(lambda s, x: s.a(F.relu(s.a(x))), a=conv(4, 4, 1)).eval()
    assert readers(Tape([late], x)) and not merge_into(late, square(4), x)


def test_fold_back_keeps_the_statistics_true():
    "Behind the fold BatchNorm still knows the mean of what it reads."
    layer, bn, c = conv(3, 4, 1), nn.BatchNorm2d(4, momentum=None), square(4)
    x = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        bn(layer(x))
        ad.fold_back(layer, bn.eval(), c)
        assert torch.allclose(layer(x).mean((0, 2, 3)), bn.running_mean, atol=1e-4)


# families

@pytest.mark.parametrize("name,per_stage", [*((n, 1) for n in FAMILIES), *((n, 3) for n in FINER)])
def test_ways_are_what_merging_finds(name, per_stage):
    blocks, x = cut(made(name), per_stage), images(1)
    said = ways(blocks)
    with torch.no_grad(): signals = [x, *blocks.outputs(x)]
    for i, way in enumerate(said):
        c, state = square(blocks.widths[i]), copy.deepcopy(blocks[i].state_dict())
        back = merge_back(blocks[i], c, signals[i])
        if way == "never": assert not back and same_state(blocks[i].state_dict(), state)
        if way == "backwards": assert back
        blocks[i].load_state_dict(state)
        assert merge_into(blocks[i + 1], c, signals[i + 1]) == (way == "forwards")


def test_the_named_students_can_be_merged():
    want = {"resnet18": [4, 8, 16, 32], "mobilenetv2_035": [2, 4, 8, 16, 32], "vgg11_bn": [2, 4, 8, 16, 32],
            "densenet121": [4, 8, 16, 32], "convnext_atto": [4, 8, 16]}
    for name, strides in want.items():
        blocks = cut(made(name))
        assert [s for s, way in zip(blocks.strides, ways(blocks), strict=False) if way != "never"] == strides, name


def grafted(host, student, steps=1):
    "A graft of which every weight has moved."
    graft, x = Graft(host, student), images(8, 32)
    full = graft.hybrid(0, len(graft) - 1).train()
    for m in full.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.eval()
    optimiser = torch.optim.SGD(full.parameters(), lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(full(x), torch.arange(8) % 2).backward()
        optimiser.step()
    return graft


@pytest.mark.parametrize("name,size", [*zip(STUDENTS, (64, 64, 32, 48, 64), strict=True)])
def test_merged_student_is_the_one_timm_makes(name, size):
    student = made(name)
    graft = grafted(used(build("test_resnet", 2, seed=1)), student)
    x = images(4, size)
    full = copy.deepcopy(graft.eval().hybrid(0, len(graft) - 1)).double()
    with torch.no_grad(): wanted = full(x.double())
    net, splices = merge(graft, student, x)
    plain = timm.create_model(name, num_classes=2, **SMALL.get(name, {})).eval()
    plain.load_state_dict(net.state_dict(), strict=True)
    for probe in (x, images(3, size)*2):
        with torch.no_grad(): assert torch.equal(plain(probe), net(probe))
    with torch.no_grad(): gap = (plain(x) - wanted).abs().max()/wanted.abs().max()
    assert splices == 0 and gap < 1e-5
    assert len(graft) == {"convnext_atto": 4, "resnet18": 5, "densenet121": 5}.get(name, 6)


@pytest.mark.slow
def test_vgg_with_its_own_classifier():
    student = used(build("vgg11_bn", 2, seed=0))
    graft = grafted(used(build("test_resnet", 2, seed=1)), student)
    net, splices = merge(graft, student, images(2, 64))
    timm.create_model("vgg11_bn", num_classes=2).load_state_dict(net.state_dict(), strict=True)
    assert splices == 0


def wide_vit(): return timm.create_model("test_vit", num_classes=2, embed_dim=96, num_heads=2)


@pytest.mark.parametrize("host,student", [("vit_tiny", "test_vit"), ("test_resnet", "mobilenetv4_conv_small")])
def test_what_cannot_be_merged_is_a_counted_splice(host, student, monkeypatch, tmp_path):
    monkeypatch.setattr(plain_boundaries, "__defaults__", (99,))  # no boundary is given up
    net = used(build(student, 2, seed=0))
    teacher = wide_vit() if "vit" in host else build(host, 2, seed=1)
    graft = grafted(used(teacher), net)
    never, x = ways(graft.student).count("never"), images(4)
    assert never == len(graft) - 2 if "vit" in host else never == 2
    with torch.no_grad(): wanted = graft.eval().hybrid(0, len(graft) - 1)(x)
    spliced, n = merge(graft, net, x)
    assert isinstance(spliced, Spliced) and n == never > 0
    with torch.no_grad(): assert (spliced(x) - wanted).abs().max() < 1e-4*wanted.abs().max()
    again = load_student(save_student(spliced, tmp_path/"spliced.safetensors"))
    with torch.no_grad(): assert torch.equal(again(x), spliced(x))


def test_a_plain_student_can_be_asked_for_at_any_price():
    pair = align(wide_vit(), student := build("test_vit", 2, seed=0))
    assert len(plain_boundaries(*pair)[1]) == len(pair[1]) > 1
    host, whole = plain_boundaries(*pair, least=0)
    assert len(host) == len(whole) == 2 and torch.equal(whole.eval()(images()), student.eval()(images()))


def test_equal_widths_keep_their_boundary():
    pair = align(build("resnet34", 2, seed=0), build("resnet18", 2, seed=0), per_stage=2)
    assert plain_boundaries(*pair)[1].names == pair[1].names and ad.channel_map(nn.Identity(), nn.Identity()) is None


def test_a_map_that_merges_backwards_is_not_a_splice():
    blocks = cut(made("mobilenetv2_035"), 3)
    at = ways(blocks).index("backwards")
    x, maps = images(2), {at + 1: square(blocks.widths[at]), 1: square(blocks.widths[0])}
    with torch.no_grad(): wanted = ad.through(blocks, maps, x)
    assert not ad.merge_maps(blocks, maps, x)
    with torch.no_grad(): assert torch.allclose(blocks(x), wanted, atol=1e-4*wanted.abs().max())


def test_splice_cost_is_what_a_convolution_costs():
    counted = cost(one := nn.Sequential(nn.Conv2d(3, 3, 1, bias=False)), 16)
    want = ad.splice_cost(one[0].weight.flatten(1), 16)
    assert want == {"params": counted["params"], "macs": counted["macs"]}
    assert ad.splice_cost(64, (17,)) == {"params": 4096, "macs": 4096*17} and ad.splice_cost(8, (4, 6))["macs"] == 64*24


def test_writers_are_the_two_branches_of_a_sum():
    block = Does(lambda s, x: s.n(s.a(x)) + s.b(x), a=conv(3, 4, 1), b=conv(3, 4, 1), n=norm(4)).eval()
    tape = Tape([block], torch.randn(1, 3, 5, 5))
    assert ad.writers(tape, tape.ends[-1]) == [(block.a, block.n), (block.b, None)]
