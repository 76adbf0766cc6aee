"Parameters are checked whoever runs the notebook, and errors are one message."
import os
import shlex
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from kdnb import card
from kdnb.core import BadInput
from kdnb.run import RunFailed, check_call, check_parameters, code_cells, execute, literal, parameters_of, take_home

CELL = 'mag: str = "400X"  # magnification\nk: int = 10  # shots\ntau: float = 4.  # temperature\nquick: bool = False  # -'
CHECK = "from kdnb.run import check_parameters\np = check_parameters(globals(), k=[5, 10])"
RECORD = """
from kdnb.results import new_record, save_record
rows = [dict(method=m, split="test", level="image", metric="auroc", value=.8, n=40) for m in ("graft", "hard")]
save_record(new_record("run_toy.ipynb", parameters=vars(p), resolved=vars(p), protocol="patients", source="synthetic",
                       data="d", split="s", device="cpu", seconds=1., rows=rows, checkpoint="cache/s.safetensors"))
"""


def namespace(**injected):
    "What the globals of a notebook hold after its parameters cell and papermill's."
    there = {}
    exec(CELL, there)
    return there | injected


def toy(path, *more, tags=("parameters",), check=CHECK):
    first = new_code_cell(CELL, metadata={"tags": list(tags)})
    spec = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(new_notebook(cells=[first, *map(new_code_cell, (check, *more))], metadata=spec), path)
    return path


def command(*args, cwd):
    return subprocess.run(args, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)


# ---- the check in the notebook

@pytest.mark.parametrize("injected, message", [
    ({"magg": "400X"}, "Did you mean 'mag'"), ({"K": 5}, "K=5 is not a parameter"), ({"zz": None}, "zz=None"),
    ({"k": "5"}, "k='5' is of type str; accepted is int"), ({"k": 5.}, "accepted is int"), ({"k": True}, "accepted is int"),
    ({"k": None}, "accepted is int"), ({"k": 7}, "k=7 is not accepted; accepted are 5, 10"),
    ({"mag": "300X"}, "'40X', '100X', '200X', '400X'"), ({"mag": 300}, "'40X', '100X'"), ({"mag": 4.}, "accepted is str"),
    ({"mag": True}, "accepted is str"), ({"tau": "hot"}, "accepted is float"), ({"tau": float("nan")}, "accepted is float"),
    ({"tau": float("inf")}, "accepted is float"), ({"quick": 1}, "accepted is bool"), ({"quick": "yes"}, "accepted is bool"),
    ({"things": [1]}, "things"), ({"table": {}}, "table"),
])
def test_what_is_refused(injected, message):
    with pytest.raises(BadInput, match=message): check_parameters(namespace(**injected), k=[5, 10])


@pytest.mark.parametrize("mag", [400, "400", "400x", "400X", " 400x "])
def test_what_is_normalised(mag):
    assert check_parameters(namespace(mag=mag, tau=2)).__dict__ == dict(mag="400X", k=10, tau=2., quick=False)


def test_everything_wrong_is_said_at_once():
    with pytest.raises(BadInput) as e: check_parameters(namespace(magg=1, taau=2, k="x", quick=0))
    assert all(word in str(e.value) for word in ("'mag'", "'tau'", "k='x'", "quick=0"))


def test_normalisers_may_be_given():
    assert check_parameters(namespace(), k=lambda k: k * 2).k == 20
    assert check_parameters(namespace(mag="any"), mag=["any"]).mag == "any"
    with pytest.raises(KeyError, match="undeclared"): check_parameters(namespace(), kk=[1])


def test_what_is_no_literal_is_no_parameter():
    class Thing: pass
    ours = dict(In=["x"], Out={}, exit=print, get_ipython=print, os=os, Thing=Thing, thing=Thing(), _i="x", __doc__="x")
    assert check_parameters(namespace(**ours)).k == 10


def test_declared_from_the_cells_where_annotations_are_not_kept():
    "From Python 3.14 on IPython keeps the annotations of a cell's last statement only: the cells are read instead."
    there = namespace(In=["", CELL, "# Parameters\nmag = '40X'", "%time x"], mag="40X")
    del there["__annotations__"]
    assert check_parameters(there).mag == "40X"
    with pytest.raises(BadInput, match="no parameters found"): check_parameters({"mag": "40X"})


def test_a_cell_run_again_in_jupyter_is_no_error():
    there = namespace()
    check_parameters(there)
    there["epochs"] = 3  # made by a later cell
    there["k"] = 5
    assert check_parameters(there).k == 5


# ---- the runner

def test_unknown_names_and_types_stop_it_before_it_starts(tmp_path):
    nb = toy(tmp_path/"run_toy.ipynb")
    for wrong in ({"magg": 1}, {"k": "five"}, {"tau": "hot"}, {"quick": 1}):
        with pytest.raises(BadInput, match="run_toy.ipynb"): execute(nb, tmp_path/"out.ipynb", wrong)
    check_call(nb, {"mag": 400, "tau": 3})
    assert not (tmp_path/"out.ipynb").exists()


def test_notebooks_that_cannot_be_run(tmp_path, root):
    with pytest.raises(BadInput, match="0 cells are tagged"): execute(toy(tmp_path/"a.ipynb", tags=()), tmp_path/"o.ipynb")
    assert code_cells(toy(tmp_path/"a.ipynb")) == [CELL, CHECK]
    (tmp_path/"b.ipynb").write_text("{")
    with pytest.raises(BadInput, match="not a notebook"): parameters_of(tmp_path/"b.ipynb")
    with pytest.raises(BadInput, match="does not exist"): execute(tmp_path/"c.ipynb", tmp_path/"o.ipynb")
    nb = toy(tmp_path/"run_toy.ipynb")
    with pytest.raises(BadInput, match="itself"): execute(nb, nb)
    with pytest.raises(BadInput, match="not the name of a notebook"): execute(nb, tmp_path/"out.txt")


def test_kdnb_run_says_where_everything_is(tmp_path, house, capsys):
    toy(tmp_path/"run_toy.ipynb", "import os\nprint('standing in', os.getcwd())", RECORD)
    (tmp_path/"elsewhere").mkdir()
    done = command("kdnb_run", "../run_toy.ipynb", "new/out.ipynb", "-p", "mag", "40", "-p", "tau", "2",
                   cwd=tmp_path/"elsewhere")
    assert done.returncode == 0, done.stderr
    assert f"standing in {tmp_path/'elsewhere'}" in done.stdout, "the kernel runs where the user stands"
    for said in ("auroc", "graft", "SYNTHETIC", tmp_path/"elsewhere"/"new"/"out.ipynb", house/"results"/"latest.json",
                 house/"cache"/"s.safetensors"):
        assert str(said) in done.stdout
    assert "cell/s" in done.stderr and "TCP" not in done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("page, model card   kdnb_report "), "and how to make a page of it"
    card.main(shlex.split(last)[4:])
    assert {Path(p).suffix for p in capsys.readouterr().out.split()} == {".html", ".md"}


def test_a_refused_value_is_a_non_zero_exit(tmp_path):
    toy(tmp_path/"run_toy.ipynb", "raise SystemError('never reached')")
    done = command("kdnb_run", "run_toy.ipynb", "out.ipynb", "-p", "k", "7", cwd=tmp_path)
    assert done.returncode == 1 and "k=7 is not accepted; accepted are 5, 10" in done.stderr
    assert "Traceback" not in done.stderr


def test_papermill_itself_does_not_pass_a_misspelt_name(tmp_path):
    toy(tmp_path/"run_toy.ipynb", "raise SystemError('never reached')")
    done = command("papermill", "run_toy.ipynb", "out.ipynb", "-p", "magg", "40X", "-p", "k", "7", cwd=tmp_path)
    assert done.returncode != 0 and "Did you mean 'mag'?" in done.stderr and "accepted are 5, 10" in done.stderr


def test_a_lost_tag_is_noticed(tmp_path):
    "Without its tag papermill's values would be overwritten by the defaults, with exit code 0."
    toy(tmp_path/"run_toy.ipynb", tags=())
    done = command("papermill", "run_toy.ipynb", "out.ipynb", "-p", "k", "5", cwd=tmp_path)
    assert done.returncode != 0 and "lost its tag" in done.stderr


def test_a_fault_of_ours_points_to_its_traceback(tmp_path):
    toy(tmp_path/"run_toy.ipynb", "1 / 0", check="")
    with pytest.raises(RunFailed) as e: execute(tmp_path/"run_toy.ipynb", tmp_path/"out.ipynb", show=False)
    assert "ZeroDivisionError: division by zero" in str(e.value) and "Traceback" not in str(e.value)
    assert f"The traceback is in {tmp_path/'out.ipynb'}" in str(e.value)


def test_a_kernel_that_dies_is_told(tmp_path):
    toy(tmp_path/"run_toy.ipynb", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", check="")
    with pytest.raises(RunFailed, match="the kernel died"):
        execute(tmp_path/"run_toy.ipynb", tmp_path/"out.ipynb", show=False)


def test_values_are_read_as_papermill_reads_them():
    from papermill.cli import _resolve_type
    for text in ("400X", "400", "-3", "4e-3", "1.", "True", "False", "None", "true", "none", "", "a,b", "nan", "1_000"):
        assert repr(literal(text)) == repr(_resolve_type(text))


# ---- notebooks to take home

def test_take_home_never_overwrites_what_was_changed(tmp_path):
    files = take_home(tmp_path/"mine")
    assert files == take_home(tmp_path/"mine"), "a second time changes nothing"
    assert len(files) >= 3
    files[0].write_text("mine")
    files[-1].unlink()
    with pytest.raises(BadInput, match="not overwritten"): take_home(tmp_path/"mine")
    assert files[0].read_text() == "mine" and not files[-1].exists()


def test_kdnb_notebooks_into_a_file(tmp_path):
    (tmp_path/"file").write_text("")
    done = command("kdnb_notebooks", "file", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("kdnb_notebooks: ") and "Traceback" not in done.stderr
