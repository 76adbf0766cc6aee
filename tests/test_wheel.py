"What is built from the checkout, and that it works where there is no checkout."
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

LEAVE = shutil.ignore_patterns(".git", ".venv", "cache", "results", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")


def call(*args, **options):
    done = subprocess.run(list(map(str, args)), capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{args}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory, root):
    "sdist from a copy of the tree, wheel from that sdist."
    tmp = tmp_path_factory.mktemp("build")
    shutil.copytree(root, tmp/"tree", ignore=LEAVE)
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp/"dist", tmp/"tree")
    return {p.suffix: p for p in (tmp/"dist").iterdir()}


@pytest.fixture(scope="module")
def away(built, tmp_path_factory):
    "A fresh environment that holds the wheel and sees, but does not own, the packages installed here."
    tmp = tmp_path_factory.mktemp("away")
    call(sys.executable, "-m", "venv", "--without-pip", tmp/"venv")
    call(sys.executable, "-m", "pip", "--python", tmp/"venv"/"bin"/"python", "install", "-q", "--no-deps", "--no-index",
         built[".whl"])
    site = next((tmp/"venv").glob("lib/python*/site-packages"))
    (site/"seen.pth").write_text(sysconfig.get_paths()["purelib"])
    env = {k: v for k, v in os.environ.items() if not k.startswith(("KDNB_", "PYTHON", "XDG_"))} | {"HOME": str(tmp)}
    return lambda *args: call(tmp/"venv"/"bin"/args[0], *args[1:], cwd=tmp, env=env), tmp


def test_what_the_wheel_carries(built, root):
    names = set(zipfile.ZipFile(built[".whl"]).namelist())
    shared = ["data/breakhis_slides.csv", *(p.relative_to(root).as_posix() for pattern in
              ("nbs/run_*.ipynb", "nbs/paper/*.ipynb", "nbs/grids/*.toml") for p in root.glob(pattern))]
    assert {f"kdnb/shared/{name}" for name in shared} <= names
    assert {f"kdnb/{p.name}" for p in (root/"kdnb").glob("*.py")} <= names
    strange = {n for n in names if not n.startswith(("kdnb/", "kdnb-"))}
    assert not strange


def test_what_the_sdist_carries(built):
    with tarfile.open(built[".gz"]) as tar: names = {n.partition("/")[2] for n in tar.getnames()}
    assert {"settings.ini", "setup.py", "pyproject.toml", "LICENSE", "README.md", "CITATION.cff", "constraints.txt",
            "nbs/00_core.ipynb", "tests/conftest.py", "data/breakhis_slides.csv", "Makefile"} <= names


def test_requirements_are_loose(built):
    wheel = zipfile.ZipFile(built[".whl"])
    text = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    plain = [line for line in text.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert len(plain) >= 8 and not [line for line in plain if any(c in line for c in ("<", "==", "~="))], "lower bounds only"
    assert not [line for line in plain if any(tool in line for tool in ("nbdev", "fastcore", "jupyterlab", "pytest"))]


def test_it_works_without_a_checkout(away):
    run, tmp = away
    code = ("import json, kdnb; from kdnb import core; from kdnb.results import provenance\n"
            "print(json.dumps([kdnb.__file__, str(core.home()), str(core.checkout()),"
            " len(core.shared('data/breakhis_slides.csv').read_text().splitlines()), provenance()['commit']]))")
    file, home, checkout, lines, commit = json.loads(run("python", "-c", code))
    assert Path(file).is_relative_to(tmp/"venv") and checkout == "None" and commit is None
    assert Path(home) == tmp/".local"/"share"/"kdnb" and not Path(home).exists()
    assert lines == 83


def test_every_room_imports_from_the_wheel(away):
    run, _ = away
    run("python", "-c", "import importlib, pkgutil, kdnb\n"
        "for m in pkgutil.iter_modules(kdnb.__path__): importlib.import_module(f'kdnb.{m.name}')")


def test_the_commands_are_there(away, root):
    run, tmp = away
    run("kdnb_notebooks", "mine")
    made = {p.relative_to(tmp/"mine").as_posix() for p in (tmp/"mine").rglob("*.*")}
    assert {p.name for p in (root/"nbs").glob("run_*.ipynb")} <= made and "grids/smoke.toml" in made
    assert "--out" in run("kdnb_run", "--help")
