"What is committed as a result says what the report beside it says."
import json
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t

ROOT = Path(__file__).resolve().parent.parent


def test_the_leak_is_there_over_ten_seeds():
    rows = pd.read_csv(ROOT/"results/tables/leakage-synthetic.csv")
    gap = rows[rows.metric == "auroc"].set_index("seed").gap
    assert sorted(gap.index) == list(range(10)) and np.allclose(rows["image-random"] - rows["accession-cv"], rows.gap, atol=2e-4)
    low = gap.mean() - t.ppf(.975, 9)*gap.std()/10**.5
    assert low > 0
    cells = json.loads((ROOT/"nbs/paper/leakage.ipynb").read_text(encoding="utf-8"))["cells"]
    said = json.dumps([c.get("outputs") for c in cells])
    assert "20 runs expected, 20 found, 0 missing" in said and f"{low:.3f}" in said and f"{gap.mean():.3f}" in said
