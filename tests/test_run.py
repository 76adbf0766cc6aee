"Parameters are checked whoever runs the notebook, grids go on past a failure, and errors are one message."
import os
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from kdnb.core import BadInput
from kdnb.run import check_call, check_parameters, execute, literal, load_grid, main, parameters_of, run_grid, take_home

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


def toy(path, *more, tags=("parameters",)):
    first = new_code_cell(CELL, metadata={"tags": list(tags)})
    spec = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(new_notebook(cells=[first, *map(new_code_cell, (CHECK, *more))], metadata=spec), path)
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
    (tmp_path/"b.ipynb").write_text("{")
    with pytest.raises(BadInput, match="not a notebook"): parameters_of(tmp_path/"b.ipynb")
    with pytest.raises(BadInput, match="does not exist"): execute(tmp_path/"c.ipynb", tmp_path/"o.ipynb")
    nb = toy(tmp_path/"run_toy.ipynb")
    with pytest.raises(BadInput, match="itself"): execute(nb, nb)
    with pytest.raises(BadInput, match="not the name of a notebook"): execute(nb, tmp_path/"out.txt")


def test_kdnb_run_says_where_everything_is(tmp_path, house):
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


@pytest.mark.parametrize("runner", ["kdnb_run", "papermill"])
def test_a_refused_value_is_a_non_zero_exit(tmp_path, runner):
    toy(tmp_path/"run_toy.ipynb", "raise SystemError('never reached')")
    done = command(runner, "run_toy.ipynb", "out.ipynb", "-p", "k", "7", cwd=tmp_path)
    assert done.returncode != 0 and "k=7 is not accepted; accepted are 5, 10" in done.stderr
    if runner == "kdnb_run": assert "Traceback" not in done.stderr


def test_papermill_itself_does_not_pass_a_misspelt_name(tmp_path):
    toy(tmp_path/"run_toy.ipynb")
    done = command(sys.executable, "-m", "papermill", "run_toy.ipynb", "out.ipynb", "-p", "magg", "40X", cwd=tmp_path)
    assert done.returncode != 0 and "Did you mean 'mag'?" in done.stderr


def test_a_lost_tag_is_noticed(tmp_path):
    "Without its tag papermill's values would be overwritten by the defaults, with exit code 0."
    toy(tmp_path/"run_toy.ipynb", tags=())
    done = command("papermill", "run_toy.ipynb", "out.ipynb", "-p", "k", "5", cwd=tmp_path)
    assert done.returncode != 0 and "lost its tag" in done.stderr


def test_a_fault_of_ours_points_to_its_traceback(tmp_path):
    toy(tmp_path/"run_toy.ipynb", "1 / 0")
    done = command("kdnb_run", "run_toy.ipynb", cwd=tmp_path)
    assert done.returncode == 1 and "ZeroDivisionError: division by zero" in done.stderr
    assert f"The traceback is in {tmp_path/'out.ipynb'}" in done.stderr and "Traceback" not in done.stderr


def test_a_kernel_that_dies_is_told(tmp_path):
    toy(tmp_path/"run_toy.ipynb", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    done = command("kdnb_run", "run_toy.ipynb", cwd=tmp_path)
    assert done.returncode == 1 and "the kernel died" in done.stderr and "Traceback" not in done.stderr


def test_values_are_read_as_papermill_reads_them():
    from papermill.cli import _resolve_type
    for text in ("400X", "400", "-3", "4e-3", "1.", "True", "False", "None", "true", "none", "", "a,b", "nan", "1_000"):
        assert repr(literal(text)) == repr(_resolve_type(text))


# ---- grids

def grid(tmp_path, text):
    toy(tmp_path/"run_toy.ipynb", RECORD)
    (tmp_path/"grid.toml").write_text(text)
    return tmp_path/"grid.toml"


@pytest.mark.parametrize("text, message", [
    ("notebook = ", "cannot be read as TOML"), ("[axes]\nk = [5]", "`notebook` is missing"),
    ('notebook = "run_toi.ipynb"', "does not exist"), ('notebook = "run_toy.ipynb"\nfix = 3', "Did you mean"),
    ('notebook = "run_toy.ipynb"\n[axes]\nk = 5', "axis k must be a list"),
    ('notebook = "run_toy.ipynb"\n[axes]\nk = []', "axis k must be a list"),
    ('notebook = "run_toy.ipynb"\n[axes]\nk = [5]\n[fixed]\nk = 5', "both fixed and an axis"),
    ('notebook = "run_toy.ipynb"\n[axes]\nk = [5]\n[fixed]\nmagg = "40X"', "Did you mean 'mag'"),
    ('notebook = "run_toy.ipynb"\n[axes]\nk = [5, "ten"]', "accepted is int"),
    ('notebook = "run_toy.ipynb"\n[[grid]]\nnotebook = "run_toy.ipynb"', "only be `home`"),
])
def test_a_wrong_grid_starts_nothing(tmp_path, house, text, message):
    with pytest.raises(BadInput, match=message): run_grid(grid(tmp_path, text))
    assert not house.exists()


def test_points_are_the_product_of_the_axes(tmp_path):
    text = 'notebook = "run_toy.ipynb"\n[axes]\nk = [5, 10]\nmag = ["40X", "100X", "400X"]\n[fixed]\ntau = 2.0'
    points, home = load_grid(grid(tmp_path, text))
    assert len(points) == 6 and home is None
    assert points[0][1] == dict(tau=2., k=5, mag="40X")
    twice = "".join(f'[[grid]]\nnotebook = "run_toy.ipynb"\n[grid.axes]\nk = [{k}]\n' for k in (5, 10))
    assert len(load_grid(grid(tmp_path, twice))[0]) == 2


def test_a_grid_goes_on_past_a_failure(tmp_path, house):
    text = 'notebook = "run_toy.ipynb"\nhome = "trial"\n[axes]\nk = [7, 5]'
    done = command("kdnb_run", grid(tmp_path, text), "--out", "executed", cwd=tmp_path)
    assert done.returncode == 1 and "1 points failed" in done.stderr and "k=7 is not accepted" in done.stderr
    assert len(list((tmp_path/"executed").glob("*.ipynb"))) == 2
    assert len(list((house/"trial"/"results"/"runs").glob("*.json"))) == 1 and not (house/"results").exists()


@pytest.mark.parametrize("argv, message", [
    (["x.ipynb", "--out", "d"], "--out is for grids"), (["g.toml", "o.ipynb"], "it takes --out"),
    (["g.toml", "-p", "k", "5"], "it takes --out"), (["g.toml"], "cannot be read"), (["no.ipynb"], "does not exist"),
])
def test_commands_that_make_no_sense(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: main(argv)
    assert str(e.value.code).startswith("kdnb_run: ") and message in e.value.code


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
