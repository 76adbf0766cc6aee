"Notebooks are clean, their export is fresh, and nothing in them is longer than the house's ceilings."
import ast
import difflib
import json
import re
import shutil
import subprocess
import sys
import tokenize
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"
MODULES = sorted(NBS.glob("[0-9][0-9]_*.ipynb"))
EXPERIMENTS = sorted(NBS.glob("run_*.ipynb"))
REPORTS = sorted((NBS/"paper").glob("*.ipynb"))
ALL = sorted(p for p in NBS.rglob("*.ipynb") if p.name[0] not in "_." and ".ipynb_checkpoints" not in p.parts
             and not re.match(r"out(_.*)?\.ipynb", p.name))

BODY, EXPORTED, NETWORK, LESSON, PROSE, LINE = 25, 30, 45, 10, 120, 120
CELLS = {"module": 80, "experiment": 20, "report": 12}
KB = 300
name = lambda p: p.relative_to(NBS).as_posix()
each = lambda paths: pytest.mark.parametrize("path", paths, ids=name)


def cells(path, kind="code"):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c | {"text": "".join(c["source"])} for c in found if kind in (c["cell_type"], "all")]


def directives(text): return [line[2:].split()[0] for line in text.splitlines() if line.startswith("#|")]


def tree(text):
    "Parsed code of a cell, without its magics."
    return ast.parse("\n".join("" if line.startswith(("%", "!")) else line for line in text.splitlines()))


def exported(path): return [c["text"] for c in cells(path) if "export" in directives(c["text"])]


def length(text): return sum(bool(s.strip()) and not s.startswith("#|") for s in text.splitlines())


def functions(node): return [n for n in ast.walk(node) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def comments(text):
    "Lines of a cell that carry a comment."
    return {t.start[0] for t in tokenize.generate_tokens(StringIO(text).readline) if t.type == tokenize.COMMENT}


def tagged(path): return [i for i, c in enumerate(cells(path)) if "parameters" in c["metadata"].get("tags", ())]


# ---- the export and the cleaning

def test_export_is_fresh(tmp_path):
    "Exported into an empty copy, the notebooks give the `kdnb/` that is here; the checkout is not touched."
    shutil.copy(ROOT/"settings.ini", tmp_path)
    shutil.copytree(NBS, tmp_path/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (tmp_path/"kdnb").mkdir()
    shutil.copy(ROOT/"kdnb"/"__init__.py", tmp_path/"kdnb")
    subprocess.run([Path(sys.executable).parent/"nbdev_export"], cwd=tmp_path, check=True, capture_output=True)
    read = lambda folder: {p.name: p.read_text(encoding="utf-8") for p in sorted((folder/"kdnb").glob("*.py"))}
    made, here = read(tmp_path), read(ROOT)
    assert made.keys() == here.keys(), "run nbdev_export"
    for file in made:
        diff = list(difflib.unified_diff(here[file].splitlines(), made[file].splitlines(), f"kdnb/{file}", "notebook"))
        assert not diff, "run nbdev_export:\n" + "\n".join(diff[:20])


@each(ALL)
def test_notebook_is_clean(path):
    from execnb.nbio import loads, nb2str
    from nbdev.clean import clean_nb
    text = path.read_text(encoding="utf-8")
    nb = loads(text)
    clean_nb(nb, allowed_cell_metadata_keys=["tags"])
    diff = list(difflib.unified_diff(text.splitlines(), nb2str(nb).splitlines(), name(path), "clean", n=1))
    assert not diff, "run nbdev_clean:\n" + "\n".join(diff[:20])


def test_settings_keep_the_parameters_tag():
    from nbdev.config import get_config
    assert "tags" in get_config(path=ROOT).get("allowed_cell_metadata_keys").split()


@each(ALL)
def test_only_the_parameters_tag(path):
    tags = [t for c in cells(path, "all") for t in c["metadata"].get("tags", ())]
    assert set(tags) <= {"parameters"} and len(tags) <= 1


@each(ALL)
def test_no_cell_stores_an_error(path):
    errors = [o["ename"] for c in cells(path) for o in c["outputs"] if o["output_type"] == "error"]
    assert not errors


@each(ALL)
def test_no_path_of_the_machine_it_ran_on(path):
    said = [json.dumps(c["outputs"]) + c["text"] for c in cells(path)]
    found = [m[0] for s in said for m in re.finditer(r"""(?<![\w.])/(home|root|tmp|Users|private)/[^\s"']*""", s)]
    assert not found


# ---- sizes

@each(ALL)
def test_notebook_size(path):
    kind = "module" if path in MODULES else "experiment" if path in EXPERIMENTS else "report"
    assert path.stat().st_size <= KB * 1024
    assert len(cells(path, "all")) <= CELLS[kind] or path.name == "index.ipynb"


@each(ALL)
def test_prose_cells(path):
    long = {" ".join(w[:6]): len(w) for c in cells(path, "markdown") if len(w := c["text"].split()) > PROSE}
    assert not long, f"over {PROSE} words"


@each(ALL)
def test_lines(path):
    long = [s for c in cells(path) for s in c["text"].splitlines() if len(s) > LINE]
    assert not long, f"over {LINE} characters"


@each(MODULES)
def test_exported_cells(path):
    ceiling = lambda text: NETWORK if re.search(r"^class \w+\(.*Module\)", text, re.M) else EXPORTED
    long = {t.splitlines()[1]: length(t) for t in exported(path) if length(t) > ceiling(t)}
    assert not long, f"over {EXPORTED} lines"


@each(MODULES)
def test_lesson_cells(path):
    lessons = [c["text"] for c in cells(path) if not {"export", "default_exp"} & set(directives(c["text"]))]
    long = {t.splitlines()[0]: length(t) for t in lessons if length(t) > LESSON}
    assert not long, f"over {LESSON} lines"


@each(MODULES)
def test_function_bodies(path):
    body = lambda f: f.end_lineno - (f.body[1] if ast.get_docstring(f) and f.body[1:] else f.body[0]).lineno + 1
    long = {f.name: body(f) for text in exported(path) for f in functions(tree(text)) if body(f) > BODY}
    assert not long, f"over {BODY} lines"


# ---- what a module notebook says

@each(MODULES)
def test_module_is_called_as_its_notebook(path):
    first = [c["text"] for c in cells(path) if "default_exp" in directives(c["text"])]
    assert first == [f"#| default_exp {path.stem[3:]}"]


@each(MODULES)
def test_opens_with_title_and_purpose(path):
    head = cells(path, "all")[0]
    assert head["cell_type"] == "markdown" and re.match(r"# .+\n\n> \S", head["text"])


@each(MODULES)
def test_docstrings_are_one_line(path):
    kinds = (ast.FunctionDef, ast.ClassDef)
    nodes = [n for text in exported(path) for n in tree(text).body if isinstance(n, kinds)]
    wrong = [n.name for n in nodes if "\n" in (ast.get_docstring(n) or "\n")]
    assert not wrong, "docstring missing or of several lines"


@each(MODULES)
def test_parameters_are_documented(path):
    "One comment for every parameter of a public function, and for every default of a method."
    wrong = []
    for text in exported(path):
        there, public = comments(text), [n for n in tree(text).body if not getattr(n, "name", "_").startswith("_")]
        methods = [m for c in public if isinstance(c, ast.ClassDef) for m in c.body if isinstance(m, ast.FunctionDef)]
        for f in public:
            if isinstance(f, ast.FunctionDef): wrong += silent(f, everything(f), there)
        for f in methods: wrong += silent(f, defaulted(f), there)
    assert not wrong, "no comment says what these are"


def everything(f):
    a = f.args
    return [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]


def defaulted(f):
    a = f.args
    plain = [*a.posonlyargs, *a.args]
    return plain[len(plain) - len(a.defaults):] + [k for k, d in zip(a.kwonlyargs, a.kw_defaults, strict=True) if d]


def silent(f, parameters, there):
    return [f"{f.name}({p.arg})" for p in parameters if not there & {p.lineno - 1, p.end_lineno}]


# ---- experiments

@each(EXPERIMENTS)
def test_experiment_has_no_outputs(path):
    assert not [c["text"] for c in cells(path) if c["outputs"] or c["execution_count"]]


@each(EXPERIMENTS)
def test_parameters_cell(path):
    "Tagged once, the first code cell, literals with a type and a meaning, and papermill reads it the same way."
    from papermill import inspect_notebook

    from kdnb.run import parameters_of
    assert tagged(path) == [0]
    text = cells(path)[0]["text"]
    there, body = comments(text), tree(text).body
    assert 1 <= len(body) <= 20
    for n in body:
        assert isinstance(n, ast.AnnAssign) and n.annotation.id in ("str", "int", "float", "bool"), ast.unparse(n)
        assert type(ast.literal_eval(n.value)).__name__ == n.annotation.id, ast.unparse(n)
        assert n.end_lineno in there, f"{ast.unparse(n)} has no meaning written behind it"
    assert {k: v["inferred_type_name"] for k, v in inspect_notebook(path).items()} == parameters_of(path)


@each(EXPERIMENTS)
def test_parameters_are_checked_at_once(path):
    second = cells(path)[1]["text"]
    assert re.search(r"check_parameters\(\s*globals\(\)", second), "the first cell after the parameters must check them"


@each(EXPERIMENTS)
def test_experiment_defines_no_functions(path):
    kinds = (ast.FunctionDef, ast.ClassDef)
    assert not [n.name for c in cells(path) for n in ast.walk(tree(c["text"])) if isinstance(n, kinds)]


@pytest.mark.parametrize("path", sorted((NBS/"grids").glob("*.toml")), ids=lambda p: p.name)
def test_grids_fit_their_notebooks(path):
    from kdnb.grids import load_grid
    assert load_grid(path).points


def test_the_experiments_are_there():
    assert {"run_distill.ipynb", "run_teacher.ipynb"} <= {p.name for p in EXPERIMENTS}
