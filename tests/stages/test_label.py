"""Labels by people, from comparisons that are there."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from rlaif_jax.config import override
from rlaif_jax.stages import label
from rlaif_jax.stages.run import Run
from tests.helpers import one_device, quickstart_config

COMPARISONS = {"prompt": ["p", "q", "r"], "response_a": ["a"] * 3, "response_b": ["b"] * 3, "prob_a": [1.0, 0.0, 1.0]}


@pytest.mark.parametrize(("asked", "said"), [(2, ""), (4, "label: 3 comparisons that people made, not 4")])
def test_fewer_comparisons_of_people_than_labels_asked_for_are_said(tmp_path, capfd, asked, said):
    (tmp_path / "sft" / "data").mkdir(parents=True)
    pq.write_table(pa.table(COMPARISONS), tmp_path / "sft" / "data" / "comparisons.parquet")
    config = override(quickstart_config(), {"label.source": "human", "label.pairs": asked})
    assert label.run_label(Run(config, epath.Path(tmp_path), one_device()))
    assert pq.read_table(tmp_path / "label" / "preferences.parquet").num_rows == min(asked, 3)
    out = capfd.readouterr().out
    assert said in out and bool(out) == bool(said)
