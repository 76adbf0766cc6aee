"Records are written whole or not at all, read only if they are whole, and tables never mix what must not be mixed."
import errno
import json
import math
from pathlib import Path

import pandas as pd
import pytest

from kdnb.core import BadInput
from kdnb.results import (
    COLUMNS,
    KEYS,
    load_record,
    load_records,
    load_rows,
    new_record,
    provenance,
    record_rows,
    save_record,
    score_table,
    write_tables,
)


def record(seed=0, **fields):
    score = lambda method, value: dict(method=method, split="test", level="image", metric="auroc", value=value, n=90)
    asked = dict(mag="40X", fold=0, seed=seed, k=10)
    return new_record("run_toy.ipynb", **dict(
        parameters=asked, resolved=asked, protocol="patients", source="own", data="d", split="s", code="c",
        commit="1" * 40, dirty=False, device="cpu", seconds=1.5, rows=[score("graft", .8), score("hard", .7)]) | fields)


def spoil(tmp_path, **changes):
    "The path of a record of which some keys were changed, or taken out with `...`."
    path = save_record(record(), tmp_path)
    new = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in new.items() if v is not ...}))
    return path


def test_what_is_saved_is_loaded(tmp_path):
    path = save_record(record(), tmp_path)
    assert path == tmp_path/"runs"/f"{record()['run']}.json"
    assert path.read_text() == (tmp_path/"latest.json").read_text()
    assert load_record(path)["rows"] == record()["rows"]
    assert set(KEYS) <= load_record(path).keys()


def test_default_folder_is_the_home(house):
    assert save_record(record()).is_relative_to(house/"results"/"runs")
    assert len(load_rows()) == 2


def test_a_score_that_does_not_exist(tmp_path):
    row = record()["rows"][0]
    path = save_record(record(rows=[row | {"value": float("nan")}]), tmp_path)
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["rows"][0]["value"] is None
    assert math.isnan(record_rows(load_record(path)).value[0])


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_named(tmp_path, key):
    path = spoil(tmp_path, **{key: ...})
    with pytest.raises(BadInput, match="missing.*" + key if key not in ("schema", "run", "rows") else "not a kdnb"):
        load_record(path)


@pytest.mark.parametrize("changes, reason", [
    ({"schema": 0}, "schema 0, but this kdnb reads schema 1"), ({"schema": 2}, "schema 2"), ({"schema": "1"}, "'1'"),
    ({"run": "../x"}, "cannot be the name of a file"), ({"source": "camelyon"}, "accepted are breakhis"),
    ({"synthetic": True}, "contradict"), ({"rows": {}}, "not a list"), ({"rows": [3]}, "row 0 lacks method"),
    ({"rows": [{"method": "graft", "split": "test", "level": "image", "metric": "auroc", "value": 1}]}, "lacks n"),
])
def test_what_is_wrong_is_said(tmp_path, changes, reason):
    path = spoil(tmp_path, **changes)
    with pytest.raises(BadInput, match=reason) as e: load_record(path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"accuracy": 0.97}', "\x00\xff"])
def test_files_that_are_no_records(tmp_path, text):
    path = tmp_path/"runs"/"x.json"
    path.parent.mkdir()
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput, match=r"x\.json"): load_records(tmp_path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(BadInput, match="no.json"): load_record(tmp_path/"no.json")
    with pytest.raises(BadInput, match="holds no records"): load_rows(tmp_path/"nowhere")


def test_a_bad_record_is_not_written(tmp_path):
    with pytest.raises(BadInput, match="lacks split"): save_record(record(rows=[{"method": "x"}]), tmp_path)
    assert not list(tmp_path.rglob("*"))


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    path = save_record(record(), tmp_path)
    before = path.read_bytes()

    def half(self, content):
        with open(self, "wb") as f: f.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left"): save_record(record(device="cuda"), tmp_path)
    assert path.read_bytes() == before
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {path.name, "latest.json"}


def test_two_files_of_one_run(tmp_path):
    path = save_record(record(), tmp_path)
    path.with_name("other.json").write_bytes(path.read_bytes())
    with pytest.raises(BadInput, match="is also in"): load_rows(tmp_path)


def test_the_name_of_a_run_is_its_identity():
    names = {record()["run"], record(1)["run"], record(data="e")["run"], record(split="t")["run"],
             record(code="x")["run"]}
    assert len(names) == 5
    assert record(seconds=9.)["run"] == record(device="cuda")["run"] == record()["run"]


def test_provenance_names_torch_without_importing_it():
    assert {"versions", "platform", "commit", "dirty", "code"} == provenance().keys()
    assert provenance()["versions"]["torch"]


def test_rows_are_filled_in_from_the_record():
    frame = record_rows(record(resolved={"mag": "400X", "preset": {"name": "paper"}}))
    assert list(frame.columns) == COLUMNS
    assert set(frame.mag) == {"400X"} and set(frame.preset) == {"paper"} and set(frame.k) == {10}


def test_a_row_that_says_it_itself_is_believed():
    rows = [r | {"mag": "200X"} for r in record()["rows"]]
    assert set(record_rows(record(rows=rows)).mag) == {"200X"}


@pytest.mark.parametrize("column", ["source", "protocol", "task", "preset", "mag", "k"])
def test_different_questions_are_not_averaged(column):
    a = record_rows(record())
    b = a.assign(run="other", **{column: "another"})
    with pytest.raises(BadInput, match=f"mix {column}="): score_table(pd.concat([a, b]))


def test_seeds_are_averaged_and_counted():
    frames = [record_rows(record(s)).assign(value=v) for s, v in enumerate([.7, .8, .9])]
    table = score_table(pd.concat(frames))
    assert table.loc["graft"].tolist() == ["0.800 ± 0.100", "90", "3"]


def test_the_same_score_twice_is_refused():
    with pytest.raises(BadInput, match="more than once"): score_table(record_rows(record(rows=record()["rows"] * 2)))


def test_one_metric_at_two_levels_stays_two_columns():
    rows = record()["rows"]
    rows = rows + [r | {"level": "patient", "n": 9, "value": .5} for r in rows]
    table = score_table(record_rows(record(rows=rows)))
    assert list(table) == ["image auroc", "patient auroc", "images", "patients", "runs"]


def test_a_missing_score_is_a_dash():
    rows = record()["rows"]
    table = score_table(record_rows(record(rows=[*rows, rows[0] | {"metric": "mcc", "value": .4}])))
    assert table.mcc.tolist() == ["0.400", "–"]


def test_columns_and_sides_that_are_not_there():
    with pytest.raises(BadInput, match="valid.*no rows"): score_table(record_rows(record()), split="valid")
    with pytest.raises(BadInput, match="lack the columns.*metric"): score_table(record_rows(record()).drop(columns="metric"))


def test_tables_keep_sources_apart_and_repeat_byte_for_byte(tmp_path):
    for source in ("own", "synthetic", "glas"): save_record(record(source=source, code=source), tmp_path)
    save_record(record(3, dirty=True, code="changed"), tmp_path)
    first = {p: Path(p).read_bytes() for p in write_tables(tmp_path)}
    assert [p.name for p in first] == [f"{s}-toy-patients.{e}" for s in ("glas", "own", "synthetic") for e in ("csv", "md")]
    assert {p: Path(p).read_bytes() for p in write_tables(tmp_path)} == first
    titled = [t for p, t in first.items() if p.suffix == ".md"]
    assert [b"SYNTHETIC" in t for t in titled] == [False, False, True]


def test_no_records_no_tables(tmp_path, capsys):
    assert write_tables(tmp_path) == []
    assert "0 runs recorded" in capsys.readouterr().out
