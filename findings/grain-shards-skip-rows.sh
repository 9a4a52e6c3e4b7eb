#!/usr/bin/env bash
# grain's DataLoader skips rows when it shards with drop_remainder=False.
#
# Versions: grain 0.2.18, NumPy 2.4.6.
#
# Expected: ShardOptions documents that drop_remainder=False gives the remainder of N rows to the first N shards, so
#   that in one epoch all shards together read every row once; drop_remainder=True drops the remainder.
# Seen: both drop it. 10 rows over 3 shards are cut into 0-3, 4-6 and 7-9, but each shard stops after three rows, so
#   that row 3 is not read; 11 rows over 4 shards lose three rows. The loader ends every shard after 10 // 3
#   rows, whatever its length is. An evaluation over shards leaves these rows out of its figures without an error. If the
#   options are given to the loader instead of the sampler, the last rows are lost.
#
# Output:
#   10 rows, 3 shards, sampler: [[0, 1, 2], [4, 5, 6], [7, 8, 9]] without [3]
#   10 rows, 3 shards, loader: [[0, 3, 6], [1, 4, 7], [2, 5, 8]] without [9]
#   11 rows, 4 shards, sampler: [[0, 1], [3, 4], [6, 7], [9, 10]] without [2, 5, 8]
#   11 rows, 4 shards, loader: [[0, 4], [1, 5], [2, 6], [3, 7]] without [8, 9, 10]
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'grain==0.2.18' 'numpy==2.4.6'

"$folder/venv/bin/python" -I - <<'PYTHON'
import grain.python as grain


def shard(rows, index, count, options_of):
    options = grain.ShardOptions(shard_index=index, shard_count=count, drop_remainder=False)
    by_sampler = options_of == "sampler"
    sampler = grain.IndexSampler(
        num_records=rows, num_epochs=1, shuffle=False, shard_options=options if by_sampler else grain.NoSharding()
    )
    loader = grain.DataLoader(
        data_source=range(rows), sampler=sampler, worker_count=0, shard_options=None if by_sampler else options
    )
    return [int(row) for row in loader]


lost = {}
for rows, count in ((10, 3), (11, 4)):
    for options_of in ("sampler", "loader"):
        shards = [shard(rows, index, count, options_of) for index in range(count)]
        missing = sorted(set(range(rows)).difference(*shards))
        lost[rows, options_of] = missing
        print(f"{rows} rows, {count} shards, {options_of}: {shards} without {missing}")

expected = {(10, "sampler"): [3], (10, "loader"): [9], (11, "sampler"): [2, 5, 8], (11, "loader"): [8, 9, 10]}
if lost != expected:
    raise SystemExit(f"changed: the rows that no shard reads are now {lost}")
PYTHON
