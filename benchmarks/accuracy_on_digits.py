"""Test accuracy of the digits example with every norm, three seeds each, as a table.

From the root of the repository, in about half an hour on two CPU cores:

    pip install -e '.[examples]' && python benchmarks/accuracy_on_digits.py

It trains as `examples/01_train_digits.py --norm NAME --seed SEED` does, but compiles
once for all seeds. It writes docs/accuracy.md; norms that --norms leaves out keep the
rows they have there.
"""

import argparse
import importlib.util
import re
import statistics
import sys
from pathlib import Path

import jax
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "accuracy.md"
HEAD = """# Accuracy on handwritten digits

Test accuracy, in percent of 360 images, of the small ResNet of
[examples/01_train_digits.py](../examples/01_train_digits.py) after {epochs} epochs of
batches of 64 on 8 virtual CPU devices, one column per seed. One image is 0.28. Written
by `python benchmarks/accuracy_on_digits.py`. All norms are trained alike, at the
learning rate that suits batch norm: it shows that they train, not which is best. Local
and global response norm, dynamic tanh, divisive norm and ActNorm (whose scale and bias
no batch sets here) do not fix the scale of their output, which this network relies on.

| Norm | {seeds} | Mean |
|---|{rule}---|
"""


def load_example():
    path = ROOT / "examples" / "01_train_digits.py"
    sys.path.insert(0, str(path.parent))  # as where Python runs it
    spec = importlib.util.spec_from_file_location("train_digits", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def accuracies(example, norm, seeds, epochs, batch_size=64) -> list[float]:
    train, test = example.load()
    shape, classes = train.images.shape[1:], int(train.labels.max()) + 1
    optimizer = example.make_optimizer(-(-len(train.labels) // batch_size))
    build = example.resnet.MODELS["linen"]
    job = example.make_job(
        build(norm, shape, classes, 0), optimizer, jax.local_devices()
    )
    place = jax.tree.leaves(job.state)[0].sharding
    found = []
    for seed in seeds:
        params, stats, _ = build(norm, shape, classes, seed)
        state = example.State(params, stats, optimizer.init(params))
        state = jax.device_put(state, place)
        for epoch in range(1, epochs + 1):
            args = job.train_step, state, train, batch_size, seed, epoch
            state, _ = example.train_epoch(*args)
        tested = example.evaluate(job.eval_step, state, test, batch_size)
        found.append(tested["test_accuracy"])
    return found


def rows() -> dict[str, str]:
    """The lines of the table as it is, by norm."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    return {m[1]: line for line in lines if (m := re.match(r"\| `([\w-]+)` \|", line))}


def main() -> None:
    example = load_example()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--norms", nargs="+", choices=example.NORMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    example.split_cpu()
    for name in tqdm(options.norms or list(example.NORMS)):
        found = accuracies(example, example.NORMS[name], options.seeds, options.epochs)
        each = [f"{100 * v:.2f}" for v in (*found, statistics.mean(found))]
        table = rows() | {name: f"| `{name}` | {' | '.join(each)} |"}
        seeds = " | ".join(map(str, options.seeds))
        rule = "---|" * len(options.seeds)
        head = HEAD.format(epochs=options.epochs, seeds=seeds, rule=rule)
        ordered = [table[n] for n in example.NORMS if n in table]
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(head + "\n".join(ordered) + "\n")


if __name__ == "__main__":
    main()
