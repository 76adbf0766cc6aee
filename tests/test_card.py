"A student's report stands alone, asks nothing of anybody, and shows what a record says as text and nothing else."
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from kdnb import card, results
from kdnb.card import FORMS, ITEMS, SECTIONS, Story, checklist, main, model_card, page, score_lines, write_report
from kdnb.metrics import interval, score_rows
from kdnb.results import load_record, new_record, prediction_table, save_record

EVIL = '"><script>alert(1)</script><img src=//x.example/y onerror=z>&|`*[a](javascript:b)$x_1$'
VOID = {"meta", "img", "br", "link", "input"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    known = dict(versions={"kdnb": "0"}, platform="p", processor="c", commit="1" * 40, dirty=False, modified=[], code="c")
    monkeypatch.setattr(results, "provenance", lambda notebook=None: known)


def made(folder, student="graft", keep=True, classes=("benign", "malignant"), notebook="run_distill.ipynb", **fields):
    "A record with predictions of two methods."
    rng, y = np.random.default_rng(0), np.arange(40) % len(classes)
    who, names = [f"p{i//8}{y[i]}" for i in range(40)], [f"{i}.png" for i in range(40)]
    says = {m: rng.dirichlet(np.ones(len(classes)), 40)*.75 + np.eye(len(classes))[y]*.25 for m in ("ensemble", student)}
    rows = [r for m, p in says.items() for r in score_rows(y, p, who, classes, method=m, split="test")]
    asked = dict(mag="400X", fold=0, seed=0, k=10, preset="laptop", task="binary", student="toy", start="random", method=student)
    known = dict(parameters=asked, resolved=asked, source="own", protocol="accession-cv", data="d", split="s", device="cpu",
                 seconds=2., rows=rows, families={student: "own weights"}, shares=[1.], teachers=[{"net": "a"}], host="a",
                 sizes={"student": 5}, shots={"how": "random", "images": 20, "patients": 9}, leakage={"patient": 0.},
                 life=[{"graft": "stage 1 block 1", "divergence": .2, "agreement": .8}])
    frames = [prediction_table(y, p, who, names, classes, m) for m, p in says.items()]
    return save_record(new_record(notebook, **known | fields), folder, pd.concat(frames) if keep else None)


class Reader(HTMLParser):
    "What a browser would see: tags, links, and whether every tag is closed."
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open, self.on = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [(tag, v) for k, v in attrs if k in ("src", "href", "action", "srcset", "data")]
        self.on += [k for k, _ in attrs if k.startswith("on")]
        if tag not in VOID: self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag


def test_the_page_needs_nothing_else(tmp_path):
    text = page(Story(load_record(made(tmp_path)), tmp_path))
    seen = Reader(text)
    assert not seen.open and not {"script", "link", "iframe", "form", "object"} & set(seen.tags) and not seen.on
    assert {v for tag, v in seen.links if tag == "a"} == set(FORMS.values())
    pictures = [v for tag, v in seen.links if tag == "img"]
    assert len(pictures) == 3 and all(v.startswith("data:image/svg+xml;base64,") for v in pictures)
    assert len(seen.links) == 6 and "@import" not in text and "url(" not in text and "default-src 'none'" in text
    for title, _ in SECTIONS.values(): assert f"<h2>{title}</h2>" in text
    assert "SYNTHETIC" not in text


def test_nothing_in_a_record_becomes_markup(tmp_path):
    evil = dict(student=EVIL, protocol=EVIL, versions={EVIL: EVIL}, teachers=[{"net": EVIL}], host=EVIL, selection=EVIL,
                classes=("a", "$x_1$<b>"), life=[{"graft": EVIL, "divergence": 1., "agreement": 1.}])
    story = Story(load_record(made(tmp_path, **evil)), tmp_path)
    seen = Reader(page(story))
    assert not seen.open and "script" not in seen.tags and not seen.on and seen.tags.count("img") == 3
    text = model_card(story)
    assert "<script" not in text and "](javascript" not in text.replace("\\]", "") and "<img" not in text
    for line in re.findall(r"^\|.*$", text, re.M): assert line.rstrip().endswith("|")
    tables = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("| ")]
    assert set(tables) == {5, 6}  # a bar in a name breaks no column


def test_intervals_are_those_of_the_predictions(tmp_path):
    story = Story(load_record(made(tmp_path)), tmp_path)
    y, p, who, _ = story.of("graft")
    line = score_lines(story, "graft").set_index("metric").loc["auroc"]
    assert (line.low, line.high) == interval("auroc", y, p, who, card.DRAWS) and line.low < line.value
    text = model_card(story)
    assert f"| {line.value:.3f} [{line.low:.3f}, {line.high:.3f}] |".replace("[", "\\[").replace("]", "\\]") in text


def test_a_record_without_predictions_still_has_a_report(tmp_path):
    story = Story(load_record(made(tmp_path, keep=False)), tmp_path)
    text = page(story)
    assert "kept no predictions" in text and text.count("<img") == 2 and score_lines(story, "graft").low.isna().all()
    assert "kept no predictions" in model_card(story)


def test_synthetic_runs_say_so(tmp_path):
    drawn = Story(load_record(made(tmp_path, source="synthetic")), tmp_path)
    assert "role=\"alert\">The images are SYNTHETIC" in page(drawn) and "**The images are SYNTHETIC" in model_card(drawn)


def test_forms_are_answered_or_left_to_people(tmp_path):
    table = checklist(Story(load_record(made(tmp_path)), tmp_path))
    assert len(table) == len(ITEMS) and set(table.form) == FORMS.keys() and (table.answer.str.len() > 0).all()
    assert (table.answer == "left to the authors").sum() == sum(i[3] is None for i in ITEMS) == 4


def test_the_command(tmp_path, capsys):
    path = made(tmp_path)
    main([str(path), "--out", str(tmp_path/"out")])
    html, md = sorted((tmp_path/"out").iterdir())
    assert capsys.readouterr().out.split() == [str(html), str(md)] and html.suffix == ".html"
    first = [html.read_bytes(), md.read_bytes()]
    again = write_report(tmp_path/"latest.json")
    assert [p.read_bytes() for p in again] == first and {p.parent for p in again} == {tmp_path/"reports"}
    for text, why in (("{", "broken JSON"), ("{}", "not a kdnb run record"), (None, "cannot be read")):
        bad = tmp_path/"bad.json"
        bad.unlink(missing_ok=True)
        if text: bad.write_text(text)
        with pytest.raises(SystemExit, match=why): main([str(bad)])
    edited = tmp_path/"edited.json"
    edited.write_text(json.dumps(json.loads(path.read_text()) | {"data": "other"}))
    with pytest.raises(SystemExit, match="it was edited"): main([str(edited)])


def test_it_needs_no_torch(tmp_path):
    code = f"import sys, kdnb.card as c; c.main([{str(made(tmp_path, keep=False))!r}]); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


# What every experiment writes: the keys that run_*.ipynb put into their records, with small values
GRAFT = ("stage 1 block 1", "stage 1 block 2", "stage 2 blocks 1-2")
LAPTOP = {"name": "laptop", "size": 48}


def life(*divergence): return [dict(graft=g, divergence=d, agreement=.9) for g, d in zip(GRAFT, divergence, strict=True)]


def wrote(folder, experiment, methods, resolved, keep=True, sides=("test",), classes=("benign", "malignant"), rows=None,
          **fields):
    "A record of one experiment, with scores and predictions of these methods."
    scores, frames = [], []
    for k, side in enumerate(sides):
        y = np.arange(40 - 8*k) % len(classes)  # sides of different sizes
        who, names = [f"p{i//8}{y[i]}" for i in range(len(y))], [f"{i}.png" for i in range(len(y))]
        for i, m in enumerate(methods):
            p = np.random.default_rng([i, k]).dirichlet(np.ones(len(classes)), len(y))*.75 + np.eye(len(classes))[y]*.25
            scores += score_rows(y, p, who, classes, method=m, split=side)
            frames.append(prediction_table(y, p, who, names, classes, m, side))
    known = dict(parameters=resolved, resolved=resolved | {"preset": LAPTOP, "threads": 1}, source="own", protocol="study",
                 leaks="", data="d", split="s", device="cpu", seconds=2., energy=None,
                 selection="teachers: highest AUROC on validation patients; students: last step",
                 rows=scores if rows is None else rows)
    return save_record(new_record(f"run_{experiment}.ipynb", **known | fields), folder, pd.concat(frames) if keep else None)


def distill(folder, **fields):
    asked = dict(task="binary", mag="400X", fold=0, seed=0, k=10, shots="random", method="graft", baselines=["hard", "kd"],
                 student="toy", start="random", teachers=["a-1", "b-2"])
    known = dict(methods=["teacher a", "teacher b", "ensemble", "graft", "hard"], resolved=asked, protocol="accession-cv",
                 shares=[.7, .3], host="a", teachers=[{"net": "a"}, {"net": "b"}], families={"graft": "own weights"},
                 skipped={"kd": "kd was too tired"}, splices=1, splice_cost={"params": 7, "macs": 9},
                 sizes={"host": 9, "student": 5}, leakage={"patient": 0.}, life=life(3., .2, .1), resumed=[],
                 shots={"how": "random", "labels": True, "images": 20, "patients": 9},
                 costs={"a": {"params": 9, "macs": 99, "latency_ms": 1.25}})
    return wrote(folder, "distill", **known | fields)


def teacher(folder, **fields):
    card = {"net": "a", "start": "random", "data": "d", "split": "s", "steps": 20, "batch": 8, "seconds": 28.2,
            "valid": {"auroc": .861}, "intervals": {"test": {"auroc": [.123, .987]}}}
    asked = dict(net="a", task="binary", mag="400X", fold=0, seed=0)
    known = dict(methods=["teacher a"], resolved=asked, protocol="accession-cv", teachers=[card], keep=False,
                 leakage={"patient": 0.}, selection="highest AUROC on validation patients")
    return wrote(folder, "teacher", **known | fields)


def study(folder, **fields):
    asked = dict(split=1, draw=2, k=7, student="toy", start="random", methods="kd; graft; stage1", teachers=["a-1", "b-2"])
    known = dict(methods=["teacher a", "teacher b", "ensemble", "kd", "graft", "stage1"], resolved=asked, host="a",
                 sides=("valid", "test"), teachers=[{"net": "a"}, {"net": "b"}], families={"graft": "own weights"},
                 splices={"kd": 0, "graft": 1, "stage1": 0}, skipped={}, resumed=[],
                 life={"stage1": life(9., 8., 7.)[:2], "graft": life(3., .2, .1)})
    return wrote(folder, "study", **known | fields)


def fusion(folder, **fields):
    asked = dict(split=1, draw=1, k=10, method="graft", taught=["mean", "accuracy"], rules=["mean"], student="toy",
                 start="random", teachers=["a-1", "a-2"])
    panel = ["a", "a, seed 1"]
    known = dict(methods=["teacher a", "teacher a, seed 1", "ensemble: mean", "graft: mean", "graft: accuracy"],
                 resolved=asked, sides=("valid", "test"), host="a", panel=panel, teachers=[{"net": "a"}]*2,
                 shares={"mean": [.5, .5], "accuracy": [.81, .19]}, temperatures=dict.fromkeys(panel, 1.),
                 families={"graft: mean": "own weights"}, splices={"graft: mean": 0, "graft: accuracy": 0}, resumed=[],
                 life={"graft: mean": life(3., .2, .1), "graft: accuracy": life(2., .1, .1)})
    return wrote(folder, "fusion", **known | fields)


def sites(folder, **fields):
    asked = dict(task="binary", mag="400X", fold=0, seed=0, sites=2, shift=.3, poor=2, wrong=.5, k=5, method="graft",
                 net="a", student="toy", start="random", teachers=["a-1", "a-2", "a-3"])
    taught = {"graft: sites by accuracy": [.6, .4], "graft: mean of sites": [.5, .5], "graft: site 1 alone": [1.],
              "graft: all images": [1.]}
    tested = ["teacher site 1", "teacher site 2 (poor)", "teacher all sites", "ensemble of sites", *taught]
    known = dict(methods=tested, resolved=asked, protocol="accession-cv", keep=False, shares=taught, best_site="site 1",
                 sites={0: 10, 1: 12, 2: 1}, teachers=[{"net": "a"}]*3, leakage={"patient": 0.},
                 shots={"images": 10, "patients": 6, "classes": {}})
    return wrote(folder, "sites", **known | fields)


def cost(folder, **fields):
    row = lambda m, **more: dict(method=m, split="cost", level="network", n=1) | more
    rows = [row(m, metric=metric, value=v) for m, v in (("student toy", 1234567), ("teacher a", 7654321))
            for metric in ("params", "macs", "bytes")]
    rows.append(row("student toy", metric="latency_ms", value=1.26, low=1.13, high=5.51, n=9))
    asked = dict(student="toy", teachers=["a"], classes=2, batch=16, rounds=9)
    known = dict(methods=["none"], keep=False, resolved=asked, rows=rows, data="none", split="none", protocol="none",
                 leaks=None, selection=None)
    return wrote(folder, "cost", **known | fields)


def told(path, folder):
    "The story of a record, its page as text, and its card; no section of either is empty."
    with pytest.MonkeyPatch.context() as m:  # a tenth of the draws will do here
        m.setattr(card, "interval", lambda *a: interval(*a[:4], card.DRAWS//10))
        story = Story(load_record(path), folder)
        text, card_of = page(story), model_card(story)
    assert not Reader(text).open and "<tbody></tbody>" not in text and "None" not in text
    for under in re.split(r"<h2>", text)[1:]: assert re.sub(r"^.*</h2>|<[^>]*>|\s", "", under), under
    for under in card_of.split("\n## ")[1:]: assert under.partition("\n")[2].strip(), under
    return story, text, card_of


def answer(text, question): return re.search(rf'<th scope="row">{question}</th><td>(.*?)</td>', text).group(1)


def test_a_run_of_run_distill(tmp_path):
    story, text, _ = told(distill(tmp_path), tmp_path)
    assert (story.kind, story.subject) == ("student", "graft") and text.count("<img") == 3
    assert "Scores of graft, one of 2 students of this run (the method that the run was asked for)" in text
    assert answer(text, "teachers and their share in the soft targets") == "a (70%), b (30%)"
    assert "kd (kd was too tired)" in text and answer(text, "layers not merged") == "1 layer, 7 parameters"
    assert answer(text, "shots") == "20 images of 9 patients, chosen: random" and "training views: graft<" in text
    gone = distill(tmp_path, methods=["teacher a", "teacher b", "ensemble", "hard", "kd"])
    story, text, _ = told(gone, tmp_path)  # the method asked for has no row
    assert story.subject == "hard" and "one of 2 students of this run (the first of the record)" in text
    assert "training views: graft<" in text  # the list is the life of the method that was asked for, and not of `hard`


def test_a_run_of_run_teacher(tmp_path):
    story, text, card_of = told(teacher(tmp_path), tmp_path)
    value = score_lines(story, "teacher a").set_index("metric").value["auroc"]
    assert story.kind == "teacher" and f"{value:.3f} [0.123, 0.987]" in text and "teacher&#x27;s card keeps" in text
    assert answer(text, "shots").startswith("none: a teacher") and answer(text, "training") == "20 steps of 8 images"
    assert "Nothing else was tested in this run." in text and "to teach students" in text and "auroc 0.861" in card_of
    assert text.count("<img") == 1 and "not drawn, because the run kept no predictions of it" in text
    other = teacher(tmp_path, split="another")  # a card of another split says nothing of this one
    assert "0.987" not in told(other, tmp_path)[1]


def test_a_run_of_run_study(tmp_path):
    story, text, _ = told(study(tmp_path), tmp_path)
    assert story.subject == "graft" and "one of 3 students of this run (the paper&#x27;s method)" in text
    assert list(card.lives(story)) == ["graft", "stage1"] and "training views: graft, stage1<" in text
    assert text.count("<img") == 3 and answer(text, "test side") == "32 images, 8 patients"  # and not those of `valid`
    assert answer(text, "protocol") == "study, split 1, draw 2" and answer(text, "K, seed") == "K 7, draw 2"
    assert answer(text, "teachers and their share in the soft targets") == "a, b; shares are not recorded"
    assert answer(text, "shots").startswith("7 of each class")
    assert answer(text, "layers not merged") == "1 layer, parameters: not known to a run"
    many = study(tmp_path, life={f"m{i}": life(3., 2., 1.) for i in range(card.LIVES + 2)} | {"graft": life(1., 1., 1.)})
    assert card.lives_text(Story(load_record(many), tmp_path)) == "graft, m0, m1, m2, m3; 3 more are in the record"
    assert "the record holds none" in told(study(tmp_path, life={"kd": [{"loss": 1.}]}), tmp_path)[1]


def test_a_run_of_run_fusion(tmp_path):
    story, text, card_of = told(fusion(tmp_path), tmp_path)
    assert story.subject == "graft: mean" and "one of 2 students of this run (the first that was taught by graft)" in text
    assert len(score_lines(story, story.subject)) == 13 and text.count("<img") == 3
    assert answer(text, "teachers and their share in the soft targets") == "a (50%), a, seed 1 (50%)"
    assert "| accuracy | a (81%), a, seed 1 (19%) |" in card_of and "<td>a (81%), a, seed 1 (19%)</td>" in text
    assert "training views: graft: mean, graft: accuracy<" in text
    story, text, _ = told(fusion(tmp_path, methods=["teacher a", "ensemble: mean"], life={}), tmp_path)  # taught=""
    assert (story.kind, story.subject) == ("ensemble", "ensemble: mean") and "Scores of ensemble: mean." in text


def test_a_run_of_run_sites(tmp_path):
    story, text, _ = told(sites(tmp_path), tmp_path)
    assert story.subject == "graft: sites by accuracy" and len(score_lines(story, story.subject)) == 13
    assert answer(text, "teachers and their share in the soft targets") == "site 1 (60%), site 2 (poor) (40%)"
    assert dict(card.share_lines(story).to_numpy())["graft: all images"] == "one teacher, alone"
    assert answer(text, "shots") == "10 images of 6 patients, chosen: not known to a run"
    dealt = "centre 10 patients, site 1 12 patients, site 2 1 patient; change of stain 0.3; site 2 is poor"
    assert answer(text, "sites, simulated").startswith(dealt) and answer(text, "intervals").startswith("none: run")
    assert text.count("<img") == 1 and text.count("not drawn, because") == 2


def test_a_run_of_run_cost(tmp_path):
    story, text, card_of = told(cost(tmp_path), tmp_path)
    assert story.kind == "cost" and f"<h1>What 2 networks cost, run {story.record['run']}</h1>" in text
    assert "| student toy | 1,234,567 | 1,234,567 | 1,234,567 | 1.3 \\[1.1, 5.5\\] |" in card_of
    assert "| teacher a | 7,654,321 | 7,654,321 | 7,654,321 | – |" in card_of
    for title in ("Scores on test patients", "Data and protocol", "Figures"): assert title not in text
    assert "this run tested none; the forms are" in text and answer(text, "accuracy") == "not measured here"
    assert "SYNTHETIC runs" in told(cost(tmp_path, source="synthetic"), tmp_path)[1]


def test_three_classes(tmp_path):
    story, text, card_of = told(distill(tmp_path, classes=("a", "b", "c")), tmp_path)
    assert story.counts == {"image": 40, "patient": 15} and text.count("<img") == 3
    assert answer(text, "test side") == "40 images, 15 patients"  # and not those of the last class
    assert answer(text, "patients").startswith("15 test patients")
    assert len(score_lines(story, "graft")) == 13 and "Each class against the rest:" in card_of
    assert re.search(r"^\| c \| 13 \| 0\.\d", card_of, re.M) and "Each class" not in told(distill(tmp_path), tmp_path)[1]


def test_what_a_record_leaves_out_is_said(tmp_path):
    holes = dict(shots={"images": 3}, leakage={"patient": None}, energy={"joules": None}, modified=None, dirty=None,
                 seconds=None, shares=None, teachers=None, host=None, costs={"a": {"params": None}}, life=None,
                 sizes=None, splices=None, families=None, skipped=None, versions=None, selection=None, leaks=None)
    story, text, _ = told(distill(tmp_path, **holes), tmp_path)
    unknown = "not known to a run"
    assert answer(text, "shots") == f"3 images of patients: {unknown}, chosen: {unknown}"
    assert answer(text, "share of test images also on the training side") == f"patient {unknown}"
    assert answer(text, "energy") == "the machine does not tell" and answer(text, "this run").startswith(unknown)
    for question in ("changed code", "versions", "selection", "the protocol leaks"): assert answer(text, question) == unknown
    for rows, why in (([], "the record holds no rows"), ([dict(method="graft", split="valid", level="image", metric="auroc",
                      value=None, n=3)], "its rows are of: valid")):
        alone = tmp_path/str(len(rows))  # else the predictions of the run above would be kept
        text = told(distill(alone, rows=rows, keep=False), alone)[1]
        assert why in text and "Nothing was tested." in text and text.count("<img") == 1


def test_joules_say_what_they_are_of(tmp_path):
    text = told(distill(tmp_path, energy={"joules": 1234.5, "of": ["package-0", "package-1"]}), tmp_path)[1]
    assert answer(text, "energy") == "1,234.5 J (package-0, package-1): processor packages only, not the GPU"
    text = told(cost(tmp_path, energy={"joules": 5}), tmp_path)[1]
    assert answer(text, "energy") == "5 J (parts not named): processor packages only, not the GPU"


def test_which_student_is_told():
    assert card.choose(["kd", "graft"], "kd")[0] == "kd" and card.choose(["kd", "graft"], None)[0] == "graft"
    assert card.choose(["hard", "kd: mean", "graft"], "kd")[0] == "kd: mean" and card.choose(["hard", "kd"], "stage1")[0] == "hard"
    assert card.choose([], "graft")[0] == "nothing"
