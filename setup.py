"Builds `kdnb` from `settings.ini`; the wheel also carries the slide table and the experiment and report notebooks."
import configparser
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
ini = configparser.ConfigParser(delimiters=["="])
ini.read(ROOT / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

SHARED = ["data/*.csv", "data/README.md", "nbs/run_*.ipynb", "nbs/paper/*.ipynb", "nbs/grids/*.toml"]


class BuildWithShared(build_py):
    "Copies what users need beside the code into `kdnb/shared` of the build, never into the checkout."

    def run(self):
        super().run()
        if self.editable_mode: return  # a checkout is read in place
        for pattern in SHARED:
            for src in sorted(ROOT.glob(pattern)):
                dst = Path(self.build_lib) / "kdnb" / "shared" / src.relative_to(ROOT)
                dst.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(src, dst)


def words(key): return re.findall(r"\S+", cfg.get(key, ""))


setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], license="Apache-2.0", url=cfg["git_url"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    packages=find_packages(include=["kdnb", "kdnb.*"]), include_package_data=False,
    python_requires=">=" + cfg["min_python"], install_requires=words("requirements"),
    extras_require={extra: words(f"{extra}_requirements") for extra in ("lab", "grid", "dev")},
    entry_points={"console_scripts": words("console_scripts"), "nbdev": ["kdnb=kdnb._modidx:d"]},
    classifiers=["Development Status :: 4 - Beta", "Intended Audience :: Science/Research",
                 "Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Image Recognition"],
    zip_safe=False, cmdclass={"build_py": BuildWithShared},
)
