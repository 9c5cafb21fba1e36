"""Times synchronized batch norm on virtual devices, for `against_peers.py`.

It is a process of its own, since JAX takes the number of devices at its start. Takes
the names of libraries and cases as JSON, and prints a JSON array of rows for each case.
"""

import json
import sys

import jax
import measure
import peers
from cases import Case


def main() -> None:
    wanted = json.loads(sys.argv[1])
    chosen = [Case(*case) for case in wanted["cases"]]
    chosen = [case._replace(shape=tuple(case.shape)) for case in chosen]
    jax.config.update("jax_num_cpu_devices", max(case.devices for case in chosen))
    libraries, _ = peers.load(wanted["libraries"])
    for case in chosen:
        print(json.dumps(measure.rows(case, libraries, wanted["rounds"])), flush=True)


if __name__ == "__main__":
    main()
