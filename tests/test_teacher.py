"Teachers and their fine-tuning: recipes, processes, kills, cards, and what is refused."
import json
import subprocess
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from kdnb import finetune, train
from kdnb.core import BadInput, resolve_preset
from kdnb.data import ImageStore, random_symmetry
from kdnb.distillers import make_lesson
from kdnb.finetune import Course, Curves, Recipe, depths, fine_tune, head_names, layer_rates, read_recipe
from kdnb.losses import soften
from kdnb.nets import build, normalise, save_net, timm
from kdnb.stain import random_hed
from kdnb.teacher import Images, calibrated_logits, load_teacher, start_of, train_teacher
from kdnb.train import Checkpoint, advance, generator

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = resolve_preset("laptop", teacher_steps=6, batch=8, size=32)


@pytest.fixture(scope="module")
def easy():
    "Stripes against plain noise at 32 pixels."
    x = torch.rand(48, 3, 32, 32, generator=generator(1))*120
    y = torch.arange(48) % 2
    x[y == 1, :, ::4] += 100
    x = x.to(torch.uint8)
    return Course(x[:32], y[:32], x[32:], y[32:].numpy(), 2, SMALL, Recipe(every=3))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    "Twelve patients with two pictures each, on three sides."
    import pandas as pd
    from PIL import Image
    folder, rows = tmp_path_factory.mktemp("images"), []
    for i in range(24):
        shade = np.random.default_rng(i).integers(0, 120, (32, 32, 3))
        shade[::4] += 100*(i % 2)
        Image.fromarray(shade.astype(np.uint8)).save(folder/f"{i}.png")
        rows.append({"path": str(folder/f"{i}.png"), "label": "ab"[i % 2], "patient": f"p{i//4}{i % 2}",
                     "split": ("train", "train", "train", "valid", "valid", "test")[i//4]})
    table = pd.DataFrame(rows)
    return Images(table, ImageStore(table, 32, folder/"store"), ("a", "b"))


def weights(net): return torch.cat([p.detach().flatten() for p in net.parameters()])


# ---- recipes

@pytest.mark.parametrize("text, message", [
    ("hous", "Did you mean 'house'"), ("house,hedd=.1", "Did you mean 'hed'"), ("house,hed=x", "'hed=x' is no float"),
    ("house,hed=1", r"hed=1.0 is not accepted; accepted is a number in \[0,1\)"), ("house,lowest_rate=0", "lowest_rate=0"),
    ("house,balance=often", "balance='often'"), ("house,processes=0", "processes=0"), ("house,symmetries=1", "no bool"),
    ("house,every=1.5", "no int"), ("house,smoothing=nan", "smoothing=nan"), ("house,schedule=step", "schedule='step'")])
def test_recipes_are_refused(text, message):
    with pytest.raises(BadInput, match=message): read_recipe(text)


@pytest.mark.parametrize("name, text", [
    ("test_vit", "transfer,head_share=.5"), ("test_resnet", "house,balance=sampling,hed=.3"),
    ("test_resnet", "house,balance=none,decay=0,schedule=constant,symmetries=False")])
def test_every_recipe_trains_and_repeats(easy, name, text):
    course, ends = replace(easy, recipe=read_recipe(text + ",every=3")), []
    for _ in range(2):
        net = build(name, 2, seed=0)
        history = fine_tune(net, course)
        ends.append(weights(net))
    assert torch.equal(*ends) and history.step.iloc[-1] == 6 and np.isfinite(history.loss).all()
    assert torch.isfinite(ends[0]).all() and not torch.equal(ends[0], weights(build(name, 2, seed=0)))


@pytest.mark.parametrize("name", ["resnet10t", "densenet121", "convnext_atto", "vit_tiny_patch16_224", "regnetx_002",
                                  "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224",
                                  "kdnb_squeezenet1_0", "kdnb_mobilenetv1_025"])
def test_layers_of_any_architecture(name):
    with torch.device("meta"): net = build(name, 3) if name.startswith("kdnb") else timm.create_model(name, num_classes=3)
    rate, names = layer_rates(net, .1), [n for n, _ in net.named_parameters()]
    assert depths(net).keys() >= set(names) and {rate(n) for n in head_names(net)} == {1.}
    assert rate(names[0]) == pytest.approx(.1) and all(.1 <= rate(n) <= 1 for n in names) and 0 < len(head_names(net)) < 5


def test_a_first_phase_of_the_head_alone(easy):
    net = build("test_resnet", 2, seed=0)
    history = fine_tune(net, replace(easy, recipe=Recipe(head_share=.5, every=1)))
    assert history.phase.tolist() == ["head"]*3 + ["all"]*3 and history.step.tolist() == [1, 2, 3, 4, 5, 6]
    assert all(p.requires_grad for p in net.parameters())


def test_a_pretrained_start_learns_slowly_and_its_head_does_not(easy, tmp_path):
    file = save_net(build("test_resnet", 5, seed=3), tmp_path/"test_resnet.safetensors")
    lrs = [fine_tune(build("test_resnet", 2, weights=w, seed=0), replace(easy, recipe=Recipe(head_share=.5, every=1)))
           for w in (None, file)]
    head, rest = (np.array([h.lr[rows].to_numpy() for h in lrs]) for rows in (slice(0, 2), slice(3, 5)))
    assert np.allclose(head[0], head[1]) and np.allclose(rest[1], .05*rest[0]) and lrs[0].lr.iloc[0] > 0


# ---- processes, kills

def test_two_processes_do_what_one_does_with_the_whole_batch(easy):
    "No BatchNorm, so that nothing depends on who sees which image; two phases, weights of classes, smoothing, stain."
    recipe, ends = Recipe(head_share=.5, smoothing=.1, hed=.1, lowest_rate=.2, every=2), {}
    y = easy.y.clone()
    y[:6] = 0  # the classes are not even, and the halves of a batch differ
    course = replace(easy, y=y, preset=replace(SMALL, teacher_steps=4, teacher_lr=1e-3))
    for n in (1, 2):
        net = build("test_convnext", 2, seed=0)
        history = fine_tune(net, replace(course, recipe=replace(recipe, processes=n)))
        ends[n] = weights(net), history.score.to_numpy(), history.step.tolist()
    assert (ends[1][0] - ends[2][0]).abs().max() < 1e-5 and ends[1][2] == ends[2][2] == [2, 4]
    assert (ends[1][0] - weights(build("test_convnext", 2, seed=0))).abs().max() > 1e-3
    np.testing.assert_allclose(ends[1][1], ends[2][1], atol=1e-5)


def test_processes_that_cannot_share_are_refused(easy):
    for recipe, device, said in ((Recipe(processes=3), "cpu", "cannot share a batch of 8"),
                                 (Recipe(processes=8), "cuda", "as many GPUs"), (Recipe(processes=2), "mps", "accepted are")):
        with pytest.raises(BadInput, match=said): replace(easy, recipe=recipe, device=device)


@pytest.mark.parametrize("stop", [2, 4])  # in the first phase, in the second
def test_a_killed_training_goes_on(easy, tmp_path, monkeypatch, stop):
    course = replace(easy, recipe=Recipe(head_share=.5, every=1))
    calm, killed, resumed = (build("test_resnet", 2, seed=0) for _ in range(3))
    history = fine_tune(calm, course)
    steps = []

    def dies(fit):
        if len(steps) == stop:
            fit.keep()
            raise KeyboardInterrupt
        steps.append(1)
        return advance(fit)

    monkeypatch.setattr("kdnb.train.advance", dies)
    with pytest.raises(KeyboardInterrupt): fine_tune(killed, course, Checkpoint(tmp_path/"partial", "x"))
    monkeypatch.undo()
    again = fine_tune(resumed, course, Checkpoint(tmp_path/"partial", "x"))
    assert torch.equal(weights(calm), weights(resumed)) and again.equals(history)


def test_the_channels_last_layout_changes_nothing_that_is_kept(easy, tmp_path, monkeypatch):
    "What a GPU is given, given to the CPU."
    monkeypatch.setattr(finetune, "laid_out", lambda x, device: x.to(memory_format=torch.channels_last))
    net, plain = build("test_resnet", 2, seed=0), build("test_resnet", 2, seed=0)
    fine_tune(net, easy)
    monkeypatch.undo()
    fine_tune(plain, easy)
    assert all(p.is_contiguous() for p in net.parameters())
    assert torch.allclose(weights(net), weights(plain), atol=1e-3)


def test_curves(monkeypatch, tmp_path, easy):
    with pytest.raises(BadInput, match="install it, or pass curves='csv'"):
        monkeypatch.setattr(finetune, "find_spec", lambda name: None)
        Curves(tmp_path)
    told = []
    writer = types.SimpleNamespace(add_scalar=lambda *row: told.append(row), flush=lambda: None)
    board = types.SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setattr(finetune, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    history = fine_tune(build("test_resnet", 2, seed=0), easy, log=Curves(tmp_path))
    assert [(v, s) for n, v, s in told if n == "score"] == list(zip(history.score, history.step, strict=True))


def test_tensorboard_reads_back_what_was_written(tmp_path, easy):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    history = fine_tune(build("test_resnet", 2, seed=0), easy, log=Curves(tmp_path))
    read = EventAccumulator(str(tmp_path)).Reload()
    for name in ("loss", "score"):
        told = read.Scalars(name)
        assert [e.step for e in told] == history.step.tolist()
        np.testing.assert_allclose([e.value for e in told], history[name], rtol=1e-6)


# ---- what a step sees and what it costs

def test_a_step_sees_symmetries_and_stains_at_once(easy, monkeypatch):
    seen, recipe = [], Recipe(hed=.3)
    monkeypatch.setattr(finetune, "view", lambda x, net, device: seen.append(x) or normalise(x, net.card))
    course = replace(easy, recipe=recipe, seed=3)
    finetune.phase_loss(build("test_resnet", 2, seed=0), course, 0)(4)
    plain = course.x[course.rows(4)]
    turned = random_symmetry(plain, generator(3, 4, 1))
    assert torch.equal(seen[0], random_hed(turned, generator(3, 4, 3), .3))
    alone = [finetune.augmented(plain, replace(recipe, **o), 4, 3) for o in (dict(hed=0.), dict(symmetries=False))]
    assert torch.equal(alone[0], turned) and not any(torch.equal(a, b) for a, b in ((turned, plain), *((seen[0], x) for x in alone)))


def test_smoothing_and_class_weights_by_hand():
    "Of the first class says the net .75, of the second .25; ln(4/3) = .287682, ln 4 = 1.386294."
    z, y = torch.tensor([[3., 1.], [3., 1.]]).log(), torch.tensor([0, 1])
    take = lambda *a: finetune.criterion(z, y, *a).item()
    assert take() == pytest.approx((.287682 + 1.386294)/2, abs=1e-6)
    assert take(torch.tensor([1., 3.])) == pytest.approx((.287682 + 3*1.386294)/4, abs=1e-6)
    one = finetune.criterion(z[:1], y[:1], None, .1).item()
    assert one == pytest.approx(.95*.287682 + .05*1.386294, abs=1e-6)  # .1 spread over both classes
    weight = finetune.class_weights(torch.tensor([0, 0, 0, 1]), 2)
    assert (weight[1]/weight[0]).item() == pytest.approx(3)
    course = lambda balance: Course(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 0, 0, 1]),
                                    torch.zeros(2, 3, 32, 32, dtype=torch.uint8), np.array([0, 1]), 2, SMALL, Recipe(balance=balance))
    assert torch.equal(course("weights").weight, weight) and course("none").weight is course("sampling").weight is None


# ---- teachers

def test_a_killed_teacher_is_gone_on_with_and_its_time_is_not_known(images, tmp_path, monkeypatch):
    recipe, real, looks = Recipe(every=2), train.look, []

    def killed(fit, parts):
        looks.append(fit.step)
        if len(looks) == 2: raise KeyboardInterrupt
        return real(fit, parts)

    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    monkeypatch.setattr(train, "look", killed)
    with pytest.raises(KeyboardInterrupt): train_teacher("test_resnet", images, SMALL, home=tmp_path/"a", recipe=recipe)
    monkeypatch.undo()
    gone_on = train_teacher("test_resnet", images, SMALL, home=tmp_path/"a", recipe=recipe)
    whole = train_teacher("test_resnet", images, SMALL, home=tmp_path/"b", recipe=recipe)
    assert gone_on.card["seconds"] is None is not whole.card["seconds"]
    assert gone_on.card["weights"] == whole.card["weights"]


def test_the_card(images, tmp_path):
    recipe = Recipe(every=3, smoothing=.1)
    teacher = train_teacher("test_resnet", images, SMALL, 5, home=tmp_path, recipe=recipe)
    card = json.loads((teacher.folder/"card.json").read_text())
    assert card["recipe"]["smoothing"] == .1 and card["seed"] == 5 and card["start"] == "random"
    assert {"net", "mean", "std", "data", "split", "seconds", "temperature", "best_step"} <= card.keys()
    assert card["valid"].keys() == card["test"].keys() and card["intervals"].keys() == {"valid", "test"}
    low, high = card["intervals"]["test"]["balanced_accuracy"] or (0, 1)
    assert low is None or low <= card["test"]["balanced_accuracy"] <= high
    assert not any(teacher.folder.glob("partial*"))
    p = teacher.probabilities(images.side("test")[0])
    assert np.allclose(p.sum(1), 1) and (p.argmax(1) == teacher.logits(images.side("test")[0]).argmax(1).numpy()).all()
    assert train_teacher("test_resnet", images, SMALL, 5, home=tmp_path, recipe=recipe).card == card
    other = train_teacher("test_resnet", images, SMALL, 5, home=tmp_path, recipe=replace(recipe, smoothing=0.))
    assert other.folder != teacher.folder


CHILD = """
import sys, time
from pathlib import Path
import pandas as pd, torch
from kdnb import teacher
from kdnb.core import resolve_preset
from kdnb.data import ImageStore
torch.set_num_threads(1)
folder, me = Path(sys.argv[1]), sys.argv[2]
table = pd.read_csv(folder/"table.csv", dtype=str)
images, tune = teacher.Images(table, ImageStore(table, 32, folder/"store"), ("a", "b")), teacher.fine_tune
def slowly(*args):
    (folder/f"trained by {me}").touch()
    time.sleep(1)
    return tune(*args)
teacher.fine_tune = slowly
(folder/f"ready {me}").touch()
while len(list(folder.glob("ready *"))) < 2: time.sleep(.01)
small = resolve_preset("laptop", teacher_steps=2, batch=8, size=32)
print(teacher.train_teacher("test_resnet", images, small, home=folder/"teachers").folder)
"""


def test_of_two_processes_one_trains_and_the_other_waits(images, tmp_path):
    images.table.to_csv(tmp_path/"table.csv", index=False)
    both = [subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), me], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True) for me in "ab"]
    said = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert said[0][0] == said[1][0] and len(list(tmp_path.glob("trained by *"))) == 1


def test_a_kept_teacher_is_found_without_building_or_downloading(images, tmp_path, monkeypatch):
    hub = replace(SMALL, pretrained=True)

    def from_hub(name, classes, pretrained=False, weights=None, seed=None):
        net = build(name, classes, seed=seed)
        net.card |= {"start": "hub"}
        return net

    monkeypatch.setattr("kdnb.teacher.build", from_hub)
    teacher = train_teacher("test_resnet", images, hub, home=tmp_path)
    monkeypatch.setattr("kdnb.teacher.build", lambda *a, **k: pytest.fail("built"))
    assert train_teacher("test_resnet", images, hub, home=tmp_path).card == teacher.card
    assert start_of("test_resnet", hub) == "hub" and start_of("test_resnet", SMALL) == "random"
    with pytest.raises(BadInput, match="no file for net='test_resnet'"): start_of("test_resnet", hub, tmp_path/"none")


def test_test_labels_do_not_touch_the_weights(images, tmp_path):
    turned = images.table.copy()
    test = turned.split == "test"
    turned.loc[test, "label"] = turned.label[test].map({"a": "b", "b": "a"})
    a, b = (train_teacher("test_resnet", replace(images, table=t), SMALL, home=tmp_path/k)
            for k, t in (("a", images.table), ("b", turned)))
    assert torch.equal(weights(a.net), weights(b.net)) and a.card["valid"] == b.card["valid"]
    assert a.card["test"]["image_accuracy"] == pytest.approx(1 - b.card["test"]["image_accuracy"])


def test_what_is_refused(images, tmp_path):
    teacher = train_teacher("test_resnet", images, SMALL, home=tmp_path)
    swap = {"train": "test", "valid": "valid", "test": "train"}
    other = replace(images, table=images.table.assign(split=images.table.split.map(swap)))
    with pytest.raises(BadInput, match="of this split's test patients"): train_teacher(str(teacher.folder), other, SMALL)
    with pytest.raises(BadInput, match=r"knows the classes \['a', 'b'\]"):
        load_teacher(teacher.folder, replace(images, classes=("b", "a")))
    with pytest.raises(BadInput, match="holds no teacher"): load_teacher(tmp_path/"nowhere")
    lone = images.table[(images.table.split != "train") | (images.table.label == "a")].reset_index(drop=True)
    with pytest.raises(BadInput, match="training images are not of two classes"):
        train_teacher("test_resnet", Images(lone, ImageStore(lone, 32, tmp_path/"s"), ("a", "b")), SMALL, home=tmp_path)
    save_net(build("test_resnet", 2, seed=8), teacher.folder/"weights.safetensors")
    with pytest.raises(BadInput, match="not the file that its card.json was written for"): load_teacher(teacher.folder)
    (teacher.folder/"weights.safetensors").unlink()
    with pytest.raises(BadInput, match="is not there"): load_teacher(teacher.folder)


def test_renamed_patients_and_silent_cards_are_refused(images, tmp_path):
    "A test picture is known by its file as well; a card that does not say whom its teacher has seen is believed nothing."
    teacher = train_teacher("test_resnet", images, SMALL, home=tmp_path)
    swap = {"train": "test", "valid": "valid", "test": "train"}
    other = replace(images, table=images.table.assign(split=images.table.split.map(swap), patient=images.table.patient + "x"))
    with pytest.raises(BadInput, match="has seen 12 of this split's test images"): load_teacher(teacher.folder, other)
    both = images.table.assign(split=["train", "test"]*12)  # a leak of the protocol's own, not of this teacher
    twice = types.SimpleNamespace(digests=[images.store.digests[i//2] for i in range(24)])
    load_teacher(teacher.folder, replace(images, store=twice, table=both.assign(patient="new")))
    card = json.loads((teacher.folder/"card.json").read_text())
    (teacher.folder/"card.json").write_text(json.dumps({k: v for k, v in card.items() if k != "seen"}))
    assert load_teacher(teacher.folder).card["net"] == "test_resnet"  # nothing is asked without images
    with pytest.raises(BadInput, match="does not say whom its teacher has seen"): load_teacher(teacher.folder, images)


def test_calibrated_logits(images, tmp_path):
    teacher, x = train_teacher("test_resnet", images, SMALL, home=tmp_path), images.side("test")[0]
    teacher.card["temperature"] = 2.5
    assert torch.equal(calibrated_logits(teacher, x), teacher.logits(x)/2.5)
    assert np.allclose(teacher.probabilities(x), torch.softmax(calibrated_logits(teacher, x).double(), -1))
    make = lambda start: build("test_resnet", 2, seed=1)
    plain, warm = (make_lesson([teacher], x, make, rule="mean", tau=1., steps=1, lr=.1, calibrated=c)[0] for c in (False, True))
    z = teacher.logits(plain.views)
    assert torch.equal(plain.targets, soften(z, 1.)) and torch.equal(warm.targets, soften(z/2.5, 1.))
    del teacher.card["temperature"]
    with pytest.raises(BadInput, match="has no temperature"): calibrated_logits(teacher, x)


def test_a_missing_picture_is_refused_by_its_name(images, tmp_path):
    table = images.table.assign(path=[*images.table.path[:-1], str(tmp_path/"gone.png")])
    with pytest.raises(BadInput, match=r"gone.png: the table names this image, but it cannot be read \(No such file"):
        ImageStore(table, 32, tmp_path)
