"""One of two processes that share a mesh: prints what it computed, as JSON.

python tests/two_processes.py COORDINATOR_PORT PROCESS_ID
"""

import json
import sys

import jax

DEVICES_EACH = 2


def main(port: str, process: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES_EACH)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    from synced_step import arrays, step

    mesh = jax.make_mesh(
        (2 * DEVICES_EACH,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    out = step(mesh, *arrays())
    # Each process holds its own rows of what is sharded, and all of the rest.
    local = {
        k: [(s.index[0].start or 0, s.data.tolist()) for s in v.addressable_shards]
        if k in ("y", "dx")
        else v.addressable_data(0).tolist()
        for k, v in out.items()
    }
    print("RESULT " + json.dumps(local), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
