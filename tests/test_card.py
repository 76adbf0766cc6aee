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


def test_other_kinds_of_runs(tmp_path):
    three = Story(load_record(made(tmp_path, classes=("a", "b", "c"))), tmp_path)
    assert page(three).count("<img") == 3
    drawn = Story(load_record(made(tmp_path, source="synthetic")), tmp_path)
    assert "role=\"alert\">The images are SYNTHETIC" in page(drawn) and "**The images are SYNTHETIC" in model_card(drawn)
    rows = [dict(method="student s", split="cost", level="network", metric="params", value=9, n=1)]
    bare = dict(resolved={"preset": "laptop"}, rows=rows, keep=False, families=None, shares=None, teachers=None, life=None,
                sizes=None, shots=None, leakage=None, notebook="run_cost.ipynb")
    cost = Story(load_record(made(tmp_path, **bare)), tmp_path)
    assert cost.student == "student s" and not Reader(page(cost)).open and "not known to a run" in model_card(cost)


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
