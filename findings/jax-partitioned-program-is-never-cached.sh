#!/usr/bin/env bash
# A program with custom_partitioning is compiled again by every process, although the compilation cache holds it.
#
# Versions: jax 0.10.2, jaxlib 0.10.2.
#
# Expected: with a persistent compilation cache, a second process reads the program that the first one has compiled.
# Seen: the compiler's input names the partitioning function by its address in memory, which is part of the cache's key.
#   Each process adds an entry, and none is ever read. The same function in jax.shard_map is read from the cache.
#   jax's own cuDNN attention is partitioned in this way.
#
# Output:
#   shard_map: entries after each of three processes: 1 1 1
#   custom_partitioning: entries after each of three processes: 1 2 3
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.1'

cat > "$folder/program.py" <<'PYTHON'
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

way, folder = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
x = jax.device_put(np.arange(8.0, dtype=np.float32), NamedSharding(mesh, P("rows")))
jax.config.update("jax_compilation_cache_dir", folder)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def doubled(x):
    return 2 * x


@custom_partitioning
def partitioned(x):
    return doubled(x)


def partition(mesh, arguments, result):
    return mesh, doubled, result.sharding, tuple(argument.sharding for argument in arguments)


partitioned.def_partition(partition, sharding_rule="i -> i")
run = {
    "custom_partitioning": partitioned,
    "shard_map": jax.shard_map(doubled, mesh=mesh, in_specs=P("rows"), out_specs=P("rows")),
}[way]
compiled = jax.jit(lambda x: run(x)).lower(x).compile()
assert (np.asarray(compiled(x)) == 2 * np.arange(8)).all()
PYTHON

"$folder/venv/bin/python" -I - "$folder" <<'PYTHON'
import subprocess
import sys
from pathlib import Path

folder = Path(sys.argv[1])
EXPECTED = {"shard_map": [1, 1, 1], "custom_partitioning": [1, 2, 3]}

for way, expected in EXPECTED.items():
    entries = []
    for _ in range(3):
        subprocess.run([sys.executable, "-I", folder / "program.py", way, folder / way], check=True)
        entries.append(len(list((folder / way).glob("*-cache"))))
    print(f"{way}: entries after each of three processes:", *entries)
    if entries != expected:
        raise SystemExit(f"changed: the cache now holds {entries} programs of {way}")
PYTHON
