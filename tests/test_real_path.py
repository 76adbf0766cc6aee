"""The real path, walked: a 700x460 tree in the official layout is fetched, listed, checked, and distilled under `paper`."""
import json
import subprocess
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kdnb.nets import timm
from kdnb.phantom import write_phantom
from kdnb.protocols import slide_sides

ROOT = Path(__file__).resolve().parent.parent
QUICK = "paper,batch=2,graft_batch=2,teacher_steps=2,graft_steps=12"  # one step a block in stage 1, two a chain in stage 2


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    "A few slides of every side of both tasks as an archive, served and fetched; one picture each, at full size."
    base = tmp_path_factory.mktemp("walk")
    some = {s for task, n in (("binary", 2), ("subtype", 1))
            for s in slide_sides("accession-cv", task).groupby(["split", "label"]).slide.head(n)}
    drawn = write_phantom(base/"drawn", mags=("400X",), images=1, size=(700, 460), slides=sorted(some), progress=False)
    (base/"served").mkdir()
    with tarfile.open(base/"served"/"BreaKHis_v1.tar.gz", "w:gz", compresslevel=1) as tar:
        tar.add(drawn/"BreaKHis_v1", "BreaKHis_v1")  # its marker goes with it, so nobody takes it for the real one
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *a: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=base/"served"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/BreaKHis_v1.tar.gz"
    said = command("kdnb_data", "fetch", "--to", base/"data", "--url", url)
    server.shutdown()
    assert said.returncode == 0, said.stderr
    return base/"data", len(some)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "Files as a user would have them: named for their networks, with the head of ImageNet."
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for name in ("resnet34", "resnet50", "densenet121", "resnet18"):
        save_file(timm.create_model(name).state_dict(), folder/f"{name}.safetensors")
    return folder


def command(*words, **more): return subprocess.run(list(map(str, words)), capture_output=True, text=True, **more)


def distil(home, data, weights, monkeypatch, **parameters):
    monkeypatch.setenv("KDNB_HOME", str(home))
    words = ["kdnb_run", "run_distill.ipynb", home/"out.ipynb"]
    for k, v in dict(data=data, weights=weights, k=1, device="cpu", baselines="", **parameters).items(): words += ["-p", k, v]
    said = command(*words)
    assert said.returncode == 0, said.stdout[-2000:] + said.stderr[-2000:]
    return json.loads((home/"results"/"latest.json").read_text()), said.stdout


def test_index_and_verify_say_what_is_there(fetched):
    data, n = fetched
    said = command("kdnb_data", "index", data)
    assert said.stdout.splitlines()[-1].startswith(f"{n} images, {n} slides, ") and said.returncode == 0
    said = command("kdnb_data", "verify", data)
    assert said.returncode == 1 and f"{n} files: {7909 - n} findings ({7909 - n} missing)" in said.stdout


@pytest.mark.smoke
def test_paper_preset_from_files_to_a_record_and_a_table(fetched, weights, tmp_path, monkeypatch):
    record, said = distil(tmp_path, fetched[0], weights, monkeypatch, preset=QUICK)
    assert record["resolved"]["preset"]["name"] == "paper" and record["resolved"]["preset"]["size"] == 224
    assert record["source"] == "synthetic" and record["resolved"]["start"] == "pretrained"
    assert {r["method"] for r in record["rows"]} == {"teacher resnet34", "teacher resnet50", "teacher densenet121", "ensemble",
                                                     "graft"}
    assert record["protocol"] == "accession-cv" and record["leakage"] == {"accession": 0, "slide": 0, "patient": 0, "duplicate": 0}
    assert record["shots"] == {"how": "random", "labels": True, "images": 2, "patients": 2,
                               "classes": {c: {"images": 1, "patients": 1} for c in ("benign", "malignant")}}
    assert (tmp_path/record["checkpoint"]["path"]).is_file() and "teacher densenet121" in said and record["splices"] == 0


@pytest.mark.smoke
def test_eight_types_too(fetched, weights, tmp_path, monkeypatch):
    record, said = distil(tmp_path, fetched[0], weights, monkeypatch, preset=QUICK + ",size=96", task="subtype", fusion="mean",
                          teachers="resnet34")
    assert record["resolved"]["task"] == "subtype" and len(record["teachers"][0]["classes"]) == 8
    assert record["protocol_digest"] and "graft" in said and record["shots"]["images"] == 8
