"Imports go to smaller numbers only, and what is said to be light is light."
import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUMBER = {p.stem[3:]: int(p.stem[:2]) for p in sorted((ROOT/"nbs").glob("[0-9][0-9]_*.ipynb"))}
LIGHT = ["core", "metrics", "evidence", "results", "reported", "reports", "card", "run", "grids"]
ONLY = {"core": set(), "results": {"core"}, "run": {"core", "results"},
        "grids": {"core", "results", "run"}, "reported": {"core", "results"},
        "card": {"core", "metrics", "results", "reports"}}
HEAVY = ("torch", "torchvision", "timm", "papermill", "nbdev", "fastcore", "nbformat")


def imported(module):
    "Every module a room imports, wherever in the file it does so."
    for node in ast.walk(ast.parse((ROOT/"kdnb"/f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom):  # the export writes `from kdnb.x` as `from .x`
            source = ".".join(["kdnb"] * node.level + [node.module] * bool(node.module))
            yield from ([f"kdnb.{a.name}" for a in node.names] if source == "kdnb" else [source])


def rooms(module): return {n.split(".")[1] for n in imported(module) if n.startswith("kdnb.")} - {module}


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_every_room_is_exported():
    exported = {p.stem for p in (ROOT/"kdnb").glob("*.py")} - {"__init__", "_modidx"}
    assert exported == NUMBER.keys()


@pytest.mark.parametrize("module", NUMBER)
def test_imports_go_to_smaller_numbers(module):
    upward = {m for m in rooms(module) if NUMBER.get(m, 100) >= NUMBER[module]}
    assert not upward, f"{module} ({NUMBER[module]}) imports {upward}"
    assert rooms(module) <= ONLY.get(module, NUMBER.keys())


@pytest.mark.parametrize("module", NUMBER)
def test_tools_stay_out(module):
    tools = {"nbdev", "fastcore", "IPython"} | ({"papermill", "nbclient"} if module != "run" else set())
    assert not {n.split(".")[0] for n in imported(module)} & tools


@pytest.mark.parametrize("module", LIGHT)
def test_light_rooms_import_without_torch(module):
    "Not only is torch not needed: it cannot be found."
    python("import sys\n"
           "class Hidden:\n"
           "    def find_spec(self, name, path=None, target=None):\n"
           f"        if name.split('.')[0] in {HEAVY!r}: raise ModuleNotFoundError(name)\n"
           "sys.meta_path.insert(0, Hidden())\n"
           f"import kdnb.{module}")


def test_import_kdnb_imports_nothing_heavy():
    loaded = set(python("import sys, kdnb; print(*sys.modules)"))
    assert not loaded & {*HEAVY, "numpy", "pandas", "matplotlib", "sklearn"}


def test_what_is_imported_is_required():
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT/"settings.ini")
    called = {"sklearn": "scikit-learn", "PIL": "pillow", "huggingface_hub": "huggingface-hub"}
    names = {n.split(".")[0] for module in NUMBER for n in imported(module)} - {"kdnb", *sys.stdlib_module_names}
    assert {called.get(n, n) for n in names} <= set(re.sub("[<>=][^ ]*", "", ini["DEFAULT"]["requirements"]).split())


def test_init_names_the_rooms():
    import kdnb
    assert all(f"kdnb.{room}" in kdnb.__doc__ for room in ("data", "teacher", "fusion", "grafting"))
