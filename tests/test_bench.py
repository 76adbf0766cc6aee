"The benchmark of grafting runs on a tiny pair, and its plain loop computes what the engine computes."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(steps=2, sample=1, repeats=1, shots=2, size=32, batch=4, teachers="resnet10t,test_resnet",
            student="test_resnet", threads=1)


def test_grafting_bench_runs_small(tmp_path):
    notebook = shutil.copy(ROOT/"nbs"/"bench"/"grafting.ipynb", tmp_path)
    parameters = [part for k, v in TINY.items() for part in ("-p", k, str(v))]
    env = {**os.environ, "KDNB_HOME": str(tmp_path/"home"), "TQDM_DISABLE": "1"}
    run = [Path(sys.executable).parent/"papermill", "--cwd", ROOT/"nbs"/"bench", notebook, tmp_path/"out.ipynb"]
    done = subprocess.run([*run, *parameters], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path/"home"/"results"/"bench"/"grafting.json").read_text())
    assert found["max_abs_diff"] < 1e-6 and found["teachers"] == TINY["teachers"]
    asked = {"stage1_ratio", "total_ratio", "head_first_ratio", "over_limit", "cache_seconds", "peak_mb", "code", "torch"}
    assert asked <= found.keys() and all(found[k] > 0 for k in asked - {"code", "torch"})
    assert len(found["seconds"]) == 12 and all(row["ours"] > 0 for row in found["seconds"].values())
