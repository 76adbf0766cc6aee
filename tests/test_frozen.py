"Kept outputs are the plain ones wherever they lie, swift copies compute the same, operations are counted rightly."
import copy
import gc
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdnb import frozen
from kdnb.blocks import cut
from kdnb.core import BadInput
from kdnb.frozen import (
    Budget,
    Kept,
    faster_layout,
    flops,
    fold_all,
    free_memory,
    keep,
    keep_all,
    rate,
    swift,
    swift_blocks,
)
from kdnb.nets import build, cost, evaluating, freeze, probe

N = 10
PLENTY = 10**8


pytestmark = pytest.mark.usefixtures("one_thread")


def layer(c, d): return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(c, d, 3, 2, 1), nn.BatchNorm2d(d))


def spread(net):
    "Give BatchNorm statistics that a fold cannot overlook."
    g = torch.Generator().manual_seed(1)
    for m in net.modules():
        if not isinstance(m, nn.modules.batchnorm._BatchNorm): continue
        for t, low, high in ((m.running_mean, -.5, .5), (m.running_var, .5, 2), (m.weight, .5, 1.5), (m.bias, -.5, .5)):
            with torch.no_grad(): t.copy_(low + (high - low)*torch.rand(t.shape, generator=g))
    return net


@pytest.fixture
def host():
    "Four blocks whose first layer works in place; a head at the end."
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    return spread(nn.Sequential(layer(3, 4), layer(4, 6), layer(6, 8), head)).train()


def images(n=N, size=16, dtype=torch.float32):
    return torch.randn(n, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(2))


def taking(x): return lambda rows: x[rows].clone()


def plain(host, x, batch):
    "Outputs of every block in the same batches, without any of the room's code."
    host, found = copy.deepcopy(host).eval(), [[] for _ in host]
    with torch.no_grad():
        for i in range(0, len(x), batch):
            y = x[i:i + batch].clone()
            for j, block in enumerate(host): found[j].append((y := block(y)).clone())
    return [torch.cat(f) for f in found]


# ---- kept outputs

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("purses, where", [((PLENTY, 0), "memory"), ((0, PLENTY), "file"), ((0, 0), "recomputed")])
def test_kept_is_the_plain_pass_bit_for_bit(host, purses, where, dtype):
    host, x = host.to(dtype), images(dtype=dtype)
    kept, wanted = keep_all(host, taking(x), N, Budget(*purses), batch=4), plain(host, x, 4)
    assert [k.where for k in kept] == [where]*4 and kept[0].shape == (4, 8, 8) and kept[3].shape == (2,)
    for k, w in zip(kept, wanted, strict=True):
        for i in range(0, N, 4): assert torch.equal(k[i:i + 4], w[i:i + 4])
        assert k[0:2].dtype == dtype and not k[0:2].requires_grad
        if where != "recomputed": assert torch.equal(k[torch.tensor([7, 1, 7])], w[[7, 1, 7]])
        else: assert torch.allclose(k[torch.tensor([7, 1, 7])], w[[7, 1, 7]], rtol=1e-5, atol=1e-6)


def test_layout_is_kept(host):
    host = host.to(memory_format=torch.channels_last)
    k = keep(host[0], taking(images()), N, Budget(PLENTY))
    assert k.last and torch.equal(k[0:N], plain(host, images(), 64)[0])
    for rows in (slice(0, 4), torch.tensor([3, 1])): assert k[rows].is_contiguous(memory_format=torch.channels_last)


def test_tokens_and_bfloat16_are_kept(tmp_path):
    tokens = torch.randn(N, 5, 8).bfloat16()
    for budget in (Budget(PLENTY), Budget(0, PLENTY)):
        k = keep(nn.Identity(), taking(tokens), N, budget, folder=tmp_path, batch=3)
        assert torch.equal(k[torch.tensor([9, 0])], tokens[[9, 0]]) and k.bytes == N*5*8*2


def test_what_is_read_is_a_copy(host):
    for budget in (Budget(PLENTY), Budget(0, PLENTY)):
        k = keep(host[0], taking(images()), N, budget)
        before = k[0:N]
        k[0:4].zero_(), k[torch.tensor([5])].zero_(), host[1](k[2:8])
        assert torch.equal(k[0:N], before) and before.min() < 0


def test_all_boundaries_cost_one_pass(host):
    seen = [0]*4
    for i, block in enumerate(host):
        block.register_forward_hook(lambda m, a, y, i=i: seen.__setitem__(i, seen[i] + len(y)))
    kept = keep_all(host, taking(images()), N, Budget(PLENTY), wanted=[2, 0], batch=4)
    assert seen == [N + 1, N + 1, N + 1, 0]  # one view more, to see the shapes
    assert [k.shape for k in kept] == [(8, 2, 2), (4, 8, 8)] and all(k.seconds > 0 for k in kept)


def test_deep_boundaries_come_first(host):
    sizes = [N*4*s for s in (4*64, 6*16, 8*4, 2)]
    where = lambda *purses: [k.where for k in keep_all(host, taking(images()), N, Budget(*purses))]
    assert where(sizes[3] + sizes[2], sizes[1]) == ["recomputed", "file", "memory", "memory"]
    assert where(sizes[2], sizes[2]) == ["recomputed", "recomputed", "file", "memory"]


def test_chain_skips_what_lies_before_a_kept_boundary():
    "Where the first boundary is the smallest, the second is computed from it."
    ran, blocks = [], nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Upsample(scale_factor=8))
    blocks[0].register_forward_hook(lambda *a: ran.append(1))
    first, second = keep_all(blocks, taking(images()), N, Budget(N*3*4))
    assert (first.where, second.where) == ("memory", "recomputed")
    ran.clear()
    given = second[torch.tensor([4, 2])]
    assert not ran and torch.equal(given, blocks(images())[[4, 2]]) and second.seconds > 0 and second.bytes == 0


def test_modes_and_parameters_stay(host):
    state = copy.deepcopy(host.state_dict())
    kept = keep_all(host, taking(images()), N, Budget(0))
    kept[1][0:2]
    assert all(m.training for m in host.modules())
    assert all(torch.equal(v, state[k]) for k, v in host.state_dict().items())


def test_budget_is_shared_and_paid_back(host):
    budget = Budget(30_000, 40_000)
    first = keep(host[0], taking(images()), N, budget)
    second = keep(host[0], taking(images()), N, budget)
    third = keep(host[0], taking(images()), N, budget)
    fourth = keep(host[0], taking(images()), N, budget)
    assert [k.where for k in (first, second, third, fourth)] == ["memory", "memory", "file", "file"]
    assert budget == Budget(30_000 - 2*10_240, 40_000 - 2*10_240)
    del first, third, fourth
    gc.collect()
    assert budget == Budget(30_000 - 10_240, 40_000)


def test_files_leave_nothing(host, tmp_path):
    folder = tmp_path/"new"/"folder"
    k = keep(host[0], taking(images()), N, Budget(0, PLENTY), folder=folder)
    assert k.where == "file" and folder.is_dir() and list(folder.iterdir()) == [] and k[0:2].abs().sum() > 0


def test_a_full_disk_and_full_memory_are_no_end(host, tmp_path, monkeypatch):
    def full(*a): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    budget = Budget(0, PLENTY)
    k = keep(host[0], taking(images()), N, budget, folder=tmp_path)
    assert k.where == "recomputed" and budget.file == PLENTY and list(tmp_path.iterdir()) == []
    wide = Budget(2**62)  # pays for more than any machine has
    assert frozen.place(torch.empty(1, 8), 2**55, wide, None, "cpu").where == "recomputed" and wide.memory == 2**62


def test_purses_come_from_what_is_free(tmp_path, monkeypatch):
    assert 0 < free_memory() < 2**50
    monkeypatch.setattr(frozen, "group_left", lambda: [10**6, 4000])
    budget = Budget.free(folder=tmp_path/"not"/"there")
    assert budget.memory == 1000 and budget.file > 0 and not (tmp_path/"not").exists()
    monkeypatch.setattr(frozen, "group_left", lambda: [-5])
    assert free_memory() == 0


def test_bad_requests_are_named(host):
    with pytest.raises(BadInput, match="wanted=7"): keep_all(host, taking(images()), N, wanted=[7])
    with pytest.raises(BadInput, match="n=0"): keep(host, taking(images()), 0)
    with pytest.raises(BadInput, match="batch=0"): keep(host, taking(images()), N, batch=0)
    assert keep_all(host, taking(images()), N, wanted=[]) == []


# ---- swift copies

def norms(net): return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())


NETS = {"resnet18": 0, "kdnb_mobilenetv1_025": 0, "kdnb_densenet_small": None, "regnety_002": 0, "convnext_atto": 0}


@pytest.mark.parametrize("name", NETS)
def test_families_fold(name):
    net = spread(build(name, 2)).eval()
    x, state, before = torch.randn(2, 3, 32, 32), copy.deepcopy(net.state_dict()), norms(net)
    fast = swift(net, x)
    assert not fast.refused and fast.folded == before - norms(fast) and fast.error < 1e-5
    if NETS[name] is not None: assert norms(fast) == NETS[name]
    else: assert norms(fast) < .6*before  # where BatchNorm comes first, half of it stays
    assert not any(p.requires_grad for p in fast.parameters()) and not any(m.training for m in fast.modules())
    new = torch.randn(3, 3, 32, 32)
    with torch.no_grad(): a, b = fast(new), net(new)
    assert (a - b).abs().max() < 1e-4*b.abs().max()
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and norms(net) == before


def test_double_precision_and_gradients():
    net = spread(build("resnet18", 2)).eval().double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    fast, grads = swift(net, x, "contiguous"), []
    assert fast.folded == 20 and fast.error < 1e-12
    for m in (net, fast):
        given = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(m(given).square().sum(), given)[0])
    assert torch.allclose(*grads, rtol=1e-8, atol=1e-12*grads[0].abs().max().item())


def test_an_activation_inside_a_norm_stays():
    from timm.layers import BatchNormAct2d
    net = spread(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), BatchNormAct2d(4, act_layer=nn.SiLU)))
    x = images()
    fast = swift(net, x)
    with torch.no_grad(): wanted = F.silu(F.batch_norm(net[0](x), net[1].running_mean, net[1].running_var,
                                                       net[1].weight, net[1].bias, eps=net[1].eps))
    assert fast.folded == 1 and torch.allclose(fast(x), wanted, atol=1e-5)


def test_norm_without_weights_and_grouped_layers_fold():
    net = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, padding=1), nn.BatchNorm2d(6, affine=False))
    net[1].running_mean.uniform_(), net[1].running_var.uniform_(.5, 2)
    assert swift(net, images()).folded == 1


class Odd(nn.Module):
    "A convolution and a BatchNorm that must not be folded, for one reason or another."
    def __init__(self, how):
        super().__init__()
        self.how, self.conv, self.norm = how, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=how != "batch")

    def forward(self, x):
        z = self.conv(x)
        if self.how == "changed": F.relu_(z)
        if self.how == "conv twice": z = self.conv(z)
        y = self.norm(z)
        if self.how == "norm twice": y = self.norm(y)
        return y + z if self.how == "branch" else y


@pytest.mark.parametrize("how", ["changed", "conv twice", "norm twice", "batch", "branch"])
def test_what_must_not_be_folded_is_left(how):
    torch.manual_seed(0)
    net = Odd(how)
    if how != "batch": spread(net)
    fast, x = swift(net, images()), images(4)
    assert fast.folded == 0 and bool(fast.refused) == (how == "branch")  # only the proof can see a second reader
    assert torch.allclose(fast(x), net.eval()(x), atol=1e-6)


def test_broken_statistics_are_refused():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    net[1].running_var.fill_(float("nan"))
    fast = swift(net, images())
    assert fast.folded == 0 and "nan" in fast.refused


def test_tied_weights_are_not_folded_twice():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    net[2].weight = net[0].weight
    assert swift(spread(net), images()).folded == 2


def test_blocks_stay_blocks():
    blocks = cut(spread(build("kdnb_mobilenetv1_025", 2)).eval())
    x = torch.randn(2, 3, 32, 32)
    fast = swift_blocks(blocks, x, ["contiguous", *["channels_last"]*(len(blocks) - 1)])
    assert type(fast) is type(blocks) and fast.names == blocks.names and fast.widths == blocks.widths
    assert [p.layout for p in fast][:2] == ["contiguous", "channels_last"] and norms(fast) == 0 < norms(blocks)
    with torch.no_grad():
        for a, b in zip(fast.outputs(x), blocks.outputs(x), strict=True):
            assert (a - b).abs().max() < 1e-4*b.abs().max()
    assert isinstance(swift_blocks(list(blocks), x), list)


def test_layout_can_be_measured_or_is_refused(host):
    x = images()
    assert swift(host[1], torch.randn(2, 4, 8, 8), "faster").layout in ("contiguous", "channels_last")
    state = copy.deepcopy(host.state_dict())
    assert faster_layout(host, x, repeats=1) in ("contiguous", "channels_last")
    assert all(torch.equal(v, state[k]) for k, v in host.state_dict().items())
    assert all(p.grad is None for p in host.parameters())
    with pytest.raises(BadInput, match="channel_last"): swift(host, x, "channel_last")
    with pytest.raises(BadInput, match="dtype"): swift(host, x.half())


def test_fold_all_says_how_many(host):
    assert fold_all(freeze(copy.deepcopy(host)), images()) == 3


# ---- the same training

def taught(host, x, fast):
    "Losses and weights of a student block between frozen ones, trained plainly or with this room's help."
    torch.manual_seed(3)
    student = nn.Conv2d(4, 6, 3, 2, 1).double()
    optimiser, losses = torch.optim.SGD(student.parameters(), .1, momentum=.9), []
    host = freeze(copy.deepcopy(host))
    kept = keep(host[0], taking(x), N, Budget(0, PLENTY)) if fast else None
    with evaluating(host[0]): middle = host[0](x.clone())
    suffix = swift(host[2:], torch.randn(2, 6, 4, 4).double()) if fast else host[2:]
    for i in range(20):
        rows = torch.randperm(N, generator=torch.Generator().manual_seed(i))[:4]
        loss = suffix(student(kept[rows] if fast else middle[rows])).square().mean()
        optimiser.zero_grad(), loss.backward(), optimiser.step()
        losses.append(loss.item())
    return torch.tensor(losses), student.weight.detach()


def test_training_comes_out_the_same(host):
    x = images(dtype=torch.float64)
    (a, u), (b, v) = (taught(host.double(), x, fast) for fast in (False, True))
    assert torch.allclose(a, b, rtol=1e-9) and torch.allclose(u, v, rtol=1e-9) and a[-1] < a[0]


# ---- operations

@pytest.mark.parametrize("groups", [1, 4, 32])
def test_operations_of_a_convolution(groups):
    conv, x = nn.Conv2d(32, 32, 3, padding=1, groups=groups), torch.randn(2, 32, 8, 8)
    once = 2*2*64*32*(32//groups)*9
    assert flops(conv, x, backward=False) == once and flops(conv, x) == 3*once
    assert flops(conv, x, to_input=False) == 2*once and flops(freeze(conv), x) == 2*once
    assert conv.weight.grad is None and x.grad is None


def test_operations_of_a_strided_and_a_transposed_convolution():
    x = torch.randn(2, 4, 8, 8)
    assert flops(nn.Conv2d(4, 6, 3, 2, 1), x) == 3*2*2*16*4*6*9
    assert flops(nn.ConvTranspose2d(4, 6, 2, 2), x) == 3*2*2*64*4*6*4


def test_operations_of_nets_and_the_rate():
    for name in ("resnet18", "kdnb_mobilenetv1_025"):
        net = build(name, 2).eval()
        x = probe(net, 32)
        assert flops(net, x, backward=False) == 2*cost(net, 32)["macs"]
        assert flops(freeze(net), x) == 4*cost(net, 32)["macs"]
    assert rate(net, x, repeats=1) > 1e6
    assert flops(freeze(nn.ReLU(inplace=True)), x) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(host):
    host, x = host.cuda(), images()
    kept = keep_all(host, taking(x), N, device="cuda")
    assert all(isinstance(k, Kept) and k.where == "memory" and k.rows.is_cuda and k[0:2].is_cuda for k in kept)
    k = keep(host[0], taking(x), N, Budget(0, PLENTY), device="cuda")
    assert k.where == "file" and not k.rows.is_cuda and k[torch.arange(2)].is_cuda
    fast = swift_blocks(list(host), x.cuda())
    assert all(p.folded == 1 for p in fast[:3]) and all(q.is_cuda for p in fast for q in p.parameters())
