"Inheriting: what belongs together, which layers and channels are taken, and that nothing is taken in silence."
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdnb.blocks import align
from kdnb.core import BadInput
from kdnb.inherit import Plan, copied_blocks, inherit, opposite, pairs, scores, wiring
from kdnb.nets import build, timm

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


def made(name, seed=0, **kwargs):
    if not kwargs: return used(build(name, 2, seed=seed))
    torch.manual_seed(seed)
    return used(timm.create_model(name, num_classes=2, **kwargs))


def images(n=2, size=64): return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(3))


def state(net): return copy.deepcopy(net.state_dict())


def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# channels

WIDTHS = {  # host, student: the same layers in other widths
    "mobilenetv1": (("kdnb_mobilenetv1_075", {}), ("kdnb_mobilenetv1_025", {})),
    "mobilenetv2": (("mobilenetv2_050", {}), ("mobilenetv2_035", {})),
    "mobilenetv3": (("lcnet_100", {}), ("lcnet_050", {})),
    "resnet": (("resnet10t", {"channels": (16, 32, 64, 128), "block_args": {}}),
               ("resnet10t", {"channels": (8, 16, 32, 64), "block_args": {}})),
    "bottleneck": (("resnet26", {"channels": (16, 32, 48, 64), "stem_width": 64}),
                   ("resnet26", {"channels": (16, 16, 32, 48), "stem_width": 64})),
    "densenet": (("densenet121", {"growth_rate": 12, "block_config": (3, 4, 6, 4)}),
                 ("densenet121", {"growth_rate": 8, "block_config": (3, 4, 6, 4)})),
}


@pytest.mark.parametrize("pair", WIDTHS)
def test_channels_agree_everywhere(pair):
    "If nobody in the host reads what was not chosen, host and student are one function."
    (h, hk), (s, sk) = WIDTHS[pair]
    host, student = made(h, **hk), made(s, 1, **sk)
    plan = Plan(student, host, [(m, n) for *_, m, n in pairs(student, host)[2] if n is not None], "chosen", None)
    for i in plan.mine.writers & plan.takes.keys():
        t, u = plan.twins[i]
        if 1 not in plan.mine.axes[i]: continue
        unread = [c for c in range(u.shape[1]) if c not in plan.takes[i][1]]
        with torch.no_grad(): u[:, unread] = 0
    report = inherit(student, host)  # channels that nobody reads are not chosen
    assert (report.share == 1).all() and not report.left.any() and report.chosen.any()
    x = images()
    with torch.no_grad(): a, b = host(x), student(x)
    assert (a - b).abs().max() <= 1e-4*a.abs().max()


@pytest.mark.parametrize("name", [
    "test_resnet", "regnety_002", "kdnb_densenet_small", "mobilenetv3_small_050", "convnext_atto", "convnextv2_atto",
    "starnet_s050", "kdnb_squeezenet1_0", "test_vit"])
def test_identity(name):
    host, student = made(name), made(name, 1)
    before, x = state(host), images(1)
    report = inherit(student, host, how="copied" if name == "test_resnet" else "chosen")
    assert torch.equal(student(x), host(x)) and same(state(student), before) and same(state(host), before)
    assert (report.share == 1).all() and not report.chosen.any() and not report.left.any()


def test_heads_are_taken_whole():
    vit = lambda n, seed: made("test_vit", seed, embed_dim=32*n, num_heads=n)
    host, student = vit(4, 0), vit(2, 1)
    assert (inherit(student, host).share == 1).all()
    taken = student.blocks[1].attn.proj.weight
    of, plan = wiring(host), Plan(student, host, [(m, n) for *_, m, n in pairs(student, host)[2]], "first", None)
    qkv = plan.takes[id(student.blocks[1].attn.qkv.weight)][0].tolist()
    assert qkv == [*range(64), *range(128, 192), *range(256, 320)]
    assert taken.shape == (64, 64) and of.units[of.at(host.blocks[1].attn.proj.weight, 1)[0]] == 32
    tokens = of.at(host.cls_token, 2)
    assert tokens == of.at(host.pos_embed, 2) == of.at(host.patch_embed.proj.weight) == of.at(host.norm.weight)


def test_heads_of_another_size_are_left():
    vit = lambda n, seed: made("test_vit", seed, embed_dim=64, num_heads=n)
    student = vit(4, 1)
    report = inherit(student, vit(2, 0))  # as wide: copied whole
    assert (report.share == 1).all()
    student = made("test_vit", 1, embed_dim=48, num_heads=3)
    report = inherit(student, vit(2, 0))
    assert "attn.qkv" in report.which[0] and "norm1" not in report.which[0]


def test_scores_by_images_and_by_gains():
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1., 0, 0], [-1., 0, 0], [2., 0, 0], [0, 0, 0]])[..., None, None])
        net[2].weight.fill_(1.)
    of, x = wiring(net), torch.ones(2, 3, 64, 64)
    bunch = of.at(net[0].weight)[0]
    assert scores(net, of)[bunch].tolist() == [.25]*4
    assert scores(net, of, x)[bunch].tolist() == [.2, 0, .8, 0]


# layers

def test_opposite():
    for n in range(1, 9):
        for m in range(1, 9):
            found = opposite(n, m)
            there = [j for j in found if j is not None]
            assert len(found) == n and len(there) == min(n, m) and there == sorted(set(there)) and there[-1] < m
            assert found[0] == 0 and (min(n, m) == 1 or found[-1] == m - 1)


def test_opposite_goes_round_what_is_unlike():
    assert opposite(2, 6, {(1, j): 1 for j in (2, 3, 4, 5)}) == [0, 1]
    assert opposite(3, 2, {(0, 0): 1, (1, 0): 0}) == [None, 0, 1]


def test_depth_where_a_layer_widens():
    "MobileNetV1's layers that widen the signal are not its first ones, and find each other."
    from timm.models._efficientnet_builder import decode_arch_def
    net = lambda *layers: used(timm.models.EfficientNet(decode_arch_def([
        [f"dsa_r{n}_k3_s{1 + (i > 0)}_c{8*2**i}"] for i, n in enumerate(layers)]), 2, stem_size=8, num_features=0))
    host, student = net(1, 2, 2, 6, 2), net(1, 2, 2, 2, 2)
    report = inherit(student, host)
    assert (report.share == 1).all() and not report.chosen.any()


def test_depth():
    host, student = (made("resnet18", s, layers=n, channels=(8, 16, 24, 32), stem_width=8)
                     for s, n in enumerate(((3, 4, 6, 3), (2, 2, 2, 1))))
    report = inherit(student, host)
    assert (report.share == 1).all() and not report.chosen.any()
    for ours, theirs in ((student.layer1[1], host.layer1[2]), (student.layer3[1], host.layer3[5]),
                         (student.layer4[0], host.layer4[0])): assert same(state(ours), state(theirs))


def test_deeper_student():
    host, student = (made("resnet18", s, layers=n, channels=(8, 16, 24, 32), stem_width=8)
                     for s, n in enumerate(((1, 1, 2, 1), (1, 1, 3, 1))))
    before = state(student.layer3[1])
    report = inherit(student, host)
    assert report.left.sum() == 4 and report.which[3].startswith("layer3.1:0.conv1")
    assert report.why[3] == "made otherwise" and same(before, state(student.layer3[1]))
    assert same(state(student.layer3[2]), state(host.layer3[1]))


def test_copied_takes_whole_layers_only():
    host = made("resnet10t", 0, block_args={}, channels=(16, 32, 64, 128))
    student = made("resnet10t", 1, block_args={}, channels=(16, 32, 48, 96))
    before = state(student)
    report = inherit(student, host, how="copied")
    assert report.copied.tolist()[:3] == [6, 6, 6] and not report.chosen.any() and report.left[3:].all()
    assert same(state(student.layer2), state(host.layer2)) and "other channels" in set(report.why)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items() if k.startswith(("layer3", "fc")))


# refusals and what is left

@pytest.mark.parametrize("host, student, message", [
    ("test_resnet", "convnext_atto", "ResNet and ConvNeXt"), ("test_vit", "test_resnet", "host test_vit"),
    ("convnext_atto", "convnextv2_nano", "no layer in common")])
def test_nothing_to_inherit(host, student, message):
    net = build(student, 2, seed=0)
    before = state(net)
    with pytest.raises(BadInput, match=message): inherit(net, build(host, 2, seed=1), how="copied")
    assert same(before, state(net))


def test_bad_input():
    host, student = build("test_resnet", 2), build("test_resnet", 2)
    with pytest.raises(BadInput, match="how='copy'"): inherit(student, host, how="copy")
    with pytest.raises(BadInput, match="normalised"): inherit(student, host, torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(BadInput, match="classes"): inherit(build("test_resnet", 3), host)


def test_bricks_of_another_kind_are_left():
    host, student = (made(n, s, channels=(16, 32, 64, 128)) for s, n in enumerate(("resnet26", "resnet18")))
    before = state(student)
    report = inherit(student, host)
    assert report.copied.tolist() == [2, 0, 0, 0, 0, 0] and report.left.sum() == len(pairs(student, host)[2]) - 2
    assert report.which.iloc[-1] == "head:1", "128 of 512 channels that nobody inherited mean nothing"
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items() if k[:5] in ("layer", "fc.we", "fc.bi"))


def test_grouped_convolutions_are_taken_whole_or_not():
    host, student = made("regnetx_004", 0), made("regnetx_002", 1)
    report = inherit(student, host)
    assert "s1.b1:0.conv2.conv" in report.which[1] and report.chosen[1] and student(images()).isfinite().all()


def test_skips_of_the_student_only():
    "A sum that the host does not have would need one channel to be two."
    host, student = made("mobilenetv3_small_100"), made("mobilenetv3_small_050", 1)
    report = inherit(student, host)
    assert "blocks.3.0:0.conv_pwl" in ", ".join(report.which) and 0 < report.share.min() < 1


def test_leaves_no_trace_but_weights():
    host, student = made("kdnb_mobilenetv1_025"), build("kdnb_mobilenetv1_025", 2, seed=1)
    student.blocks[1].eval()
    rng, modes = torch.get_rng_state(), [m.training for m in student.modules()]
    grads = [p.requires_grad for p in student.parameters()]
    host.requires_grad_(False)
    inherit(student, host, images(3))
    assert modes == [m.training for m in student.modules()] and torch.equal(rng, torch.get_rng_state())
    assert grads == [p.requires_grad for p in student.parameters()] and not any(p.grad_fn for p in student.parameters())
    F.cross_entropy(student(images()), torch.tensor([0, 1])).backward()


def test_double():
    host, student = (made("test_resnet", s).double() for s in (0, 1))
    inherit(student, host)
    assert torch.equal(student(images().double()), host(images().double()))


# partial grafts

def test_copied_blocks():
    host, student = made("test_resnet"), made("test_resnet", 1)
    both = align(host, student)
    assert copied_blocks(both[1], both[0]) == []
    student.layer2.load_state_dict(host.layer2.state_dict())
    assert copied_blocks(both[1], both[0]) == [both[1].names.index("layer2.0")]
    inherit(student, host)
    assert copied_blocks(both[1], both[0]) == list(range(len(both[0])))
    with torch.no_grad(): student.layer3[0].bn1.running_mean[0] += 1
    assert len(copied_blocks(both[1], both[0])) == len(both[0]) - 1
    with pytest.raises(BadInput, match="blocks"): copied_blocks(both[1][1:], both[0])
