"""Numbers that are worked out for replies, written down as they come, so that a kill loses few of them."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
from etils import epath

from rlaif_jax.files import read_shards, shard_names, write_checked_parquet
from rlaif_jax.parallel import processes
from rlaif_jax.progress import progress


def keep_values(
    compute: Callable[[list[int]], Mapping[str, Sequence[float] | np.ndarray]],
    names: Sequence[str],
    total: int,
    folder: epath.Path,
    commit_every: int,
) -> dict[str, list[float]]:
    """The columns `names` of rows 0 to `total` - 1, `commit_every` rows a shard in `folder`; those there are kept.

    compute: rows -> their values by name, in all processes alike. Raises UserError where a shard is damaged.
    """
    names_there = processes.agree(lambda: shard_names(folder))
    shards = [table for _, table in read_shards(folder, "its replies alone are scored again", names_there)]
    kept = {row["row"]: row for table in shards for row in table.to_pylist()}
    missing = [row for row in range(total) if row not in kept]
    with progress(None, folder.name, total=total, initial=len(kept), unit="reply") as bar:
        for start in range(0, len(missing), commit_every):
            rows = missing[start : start + commit_every]
            values = compute(rows)
            table = pa.table({"row": rows} | {name: values[name] for name in names})
            processes.by_first(lambda: write_checked_parquet(folder, f"{rows[0]:08d}", table))  # noqa: B023  (at once)
            processes.stop_if_asked()
            kept |= {row["row"]: row for row in table.to_pylist()}
            bar.update(len(rows))
    return {name: [kept[row][name] for row in range(total)] for name in names}
