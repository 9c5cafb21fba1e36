"""Are the running statistics in a checkpoint fit to evaluate with?

    python -m jaxnorm health FILE

FILE is a .safetensors, .npz or .msgpack file, or a directory of Orbax's (its last
step), with the arrays of a model of PyTorch, Flax, Keras or Haiku. The exit status is 1
where something severe is found, and 2 for what is no such file.
"""

import argparse
import json
import sys
from pathlib import Path

import rich

from jaxnorm.models import health
from jaxnorm.models._checkpoints.files import read
from jaxnorm.models._checkpoints.norms import running_norms


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m jaxnorm", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    command = parser.add_subparsers(required=True).add_parser("health")
    command.add_argument("file", type=Path)
    command.add_argument("--epsilon", type=float, help="default: the framework's own")
    command.add_argument("--json", action="store_true", help="rows instead of a table")
    options = parser.parse_args(argv)
    try:
        table, stats, scales = running_norms(read(options.file))
        default = table.epsilon["BatchNorm"]
        epsilon = default if options.epsilon is None else options.epsilon
        report = health(stats, scales or None, epsilon=epsilon)
    except Exception as error:  # a damaged file can raise almost anything
        command.error(f"{options.file}: {error}")
    if options.json:
        print(json.dumps(report.as_dicts(), indent=2))
    else:
        rich.print(report)
    return int(any(f.severe for row in report.rows for f in row.findings))


if __name__ == "__main__":
    sys.exit(main())
