"""The files of a run of example 01: checkpoints, and what people read beside them."""

import json
from pathlib import Path
from typing import Any

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
    with open_checkpoints(out) as checkpoints:
        run = ocp.args.Composite(run=ocp.args.JsonRestore())
        past = checkpoints.restore(done, args=run).run
    changed = [
        f"{key} was {past['config'][key]}, now {value}"
        for key, value in config.items()
        if past["config"][key] != value
    ]
    require(not changed, f"cannot resume {out}: {'; '.join(changed)}")
    return past["history"]


def checkpoint(state: Any, config: dict, history: list[dict]) -> ocp.args.Composite:
    """What a checkpoint holds: all that a run needs to go on."""
    return ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        run=ocp.args.JsonSave({"config": config, "history": history}),
    )


def write_files(out: Path, config: dict, history: list[dict]) -> None:
    """Settings and metrics, for people; a run is resumed from its checkpoint."""
    lines = "".join(json.dumps(line) + "\n" for line in history)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (out / "metrics.jsonl").write_text(lines)
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
