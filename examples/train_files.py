"""The files of a run of example 01: settings, metrics, curves and checkpoints."""

import json
import os
from pathlib import Path

import orbax.checkpoint as ocp
from matplotlib.figure import Figure
from train_data import BadInput, require


def open_checkpoints(out: Path) -> ocp.CheckpointManager:
    """Orbax makes checkpoints appear whole or not at all, even if it is killed."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    return ocp.CheckpointManager(out / "checkpoints", options=options)


def epochs_done(out: Path) -> int:
    if not (out / "checkpoints").is_dir():
        return 0
    with open_checkpoints(out) as checkpoints:
        return checkpoints.latest_step() or 0


def past_epochs(options, config: dict) -> list[dict]:
    """The metrics up to the checkpoint of a run that can be resumed; else none."""
    out, done = options.out, epochs_done(options.out)
    if not options.resume:
        require(done == 0, f"{out} holds a run already: give --resume or another --out")
        return []
    require(done > 0, f"nothing to resume: {out} holds no checkpoint")
    enough = done <= options.epochs
    require(enough, f"{out} has {done} epochs, more than --epochs {options.epochs}")
    try:
        before = json.loads((out / "config.json").read_text())
        changed = [
            f"{key} was {before[key]}, now {config[key]}"
            for key in config
            if before[key] != config[key]
        ]
        # Later lines, the last of them perhaps cut short, have no checkpoint.
        lines = (out / "metrics.jsonl").read_text().splitlines()[:done]
        history = [json.loads(line) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"cannot read the files of {out}: {error!r}") from None
    require(not changed, f"cannot resume {out}: {'; '.join(changed)}")
    require(len(history) == done, f"{out}/metrics.jsonl lacks checkpointed epochs")
    return history


def write_files(out: Path, config: dict, history: list[dict]) -> None:
    """Replaces each file as a whole, so that none is ever found half-written."""
    lines = "".join(json.dumps(line) + "\n" for line in history)
    texts = {"config.json": json.dumps(config, indent=2) + "\n", "metrics.jsonl": lines}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (out / "new").write_text(text)
            os.replace(out / "new", out / name)
    except OSError as error:
        raise BadInput(f"cannot write to {out}: {error.strerror}") from None


def draw_curves(history: list[dict], path: Path) -> None:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for name in ("train", "test"):
            values = [line[f"{name}_{quantity}"] for line in history]
            axes.plot(range(1, len(values) + 1), values, marker=".", label=name)
        axes.set(xlabel="epoch", ylabel=quantity)
        axes.legend()
    figure.savefig(path, dpi=120)
