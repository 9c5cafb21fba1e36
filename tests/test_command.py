"""`python -m jaxnorm health FILE`: the same table for the files of every framework."""

import json
import subprocess
import sys
from pathlib import Path

import flax.serialization
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.flax import save_file

import jaxnorm
from jaxnorm.__main__ import main

TORCH = Path(__file__).parents[1] / "examples" / "08_from_pytorch.safetensors"
MEAN, VAR, SCALE = (np.array(v, np.float32) for v in ([3, 4], [0.5, 1e-7], [1, 2]))
FLAX = {
    "params": {"stem": {"bn": {"scale": SCALE, "bias": MEAN}}, "fc": {"kernel": VAR}},
    "batch_stats": {"stem": {"bn": {"mean": MEAN, "var": VAR}}},
}
ORBAX_STATE = {**FLAX, "opt_state": {"mu": FLAX["params"], "step": np.int32(1)}}


def haiku():
    params = {"stem/~/bn": {"scale": SCALE[None, None], "offset": MEAN[None, None]}}
    state = {
        f"stem/~/bn/~/{name}_ema": {
            "average": value[None, None],
            "hidden": value[None, None],
            "counter": np.int32(9),
        }
        for name, value in (("mean", MEAN), ("var", VAR))
    }
    return {"params": params, "state": state}


def flat(tree, separator="/", start=""):
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= flat(value, separator, f"{start}{key}{separator}")
        else:
            out[f"{start}{key}"] = value
    return out


TORCH_DICT = {
    "stem.bn.weight": SCALE,
    "stem.bn.bias": MEAN,
    "stem.bn.running_mean": MEAN,
    "stem.bn.running_var": VAR,
    "stem.bn.num_batches_tracked": np.int64(3),
    "fc.weight": VAR,
}
KERAS_DICT = {
    "stem/bn/gamma": SCALE,
    "stem/bn/beta": MEAN,
    "stem/bn/moving_mean": MEAN,
    "stem/bn/moving_variance": VAR,
}


def write_npz(path, tree):
    np.savez(path, **flat(tree))


def write_msgpack(path, tree):
    path.write_bytes(flax.serialization.msgpack_serialize(tree))


def write_safetensors(path, tree):
    save_file({k: jnp.asarray(v) for k, v in flat(tree).items()}, path)


def write_orbax(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def write_steps(path, tree):
    with ocp.CheckpointManager(path) as manager:
        for step, factor in ((2, 0), (10, 1)):
            scaled = jnp.asarray(VAR) * factor
            bn = {"bn": {"mean": jnp.asarray(MEAN), "var": scaled}}
            state = {**tree, "batch_stats": {"stem": bn}}
            args = {
                "state": ocp.args.StandardSave(state),
                "history": ocp.args.JsonSave({"step": step}),
            }
            manager.save(step, args=ocp.args.Composite(**args))


FILES = {
    "torch.safetensors": (write_safetensors, TORCH_DICT),
    "torch.npz": (write_npz, TORCH_DICT),
    "keras.npz": (write_npz, KERAS_DICT),
    "haiku.npz": (write_npz, haiku()),
    "haiku.msgpack": (write_msgpack, haiku()),
    "flax.npz": (write_npz, FLAX),
    "flax.msgpack": (write_msgpack, FLAX),
    "flax.safetensors": (write_safetensors, FLAX),
    "orbax": (write_orbax, ORBAX_STATE),
    "steps": (write_steps, ORBAX_STATE),
}


@pytest.mark.parametrize("name", FILES)
def test_each_kind_of_file_and_framework(name, tmp_path, capsys):
    write, tree = FILES[name]
    write(tmp_path / name, tree)
    assert main(["health", str(tmp_path / name), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    paths = {"torch": "stem.bn", "haiku": "stem/~/bn"}
    assert row["path"] == paths.get(name.split(".")[0], "stem/bn")
    assert row["features"] == 2 and row["never_updated"] == 0 and row["small"] == 1
    assert (row["mean_min"], row["mean_max"]) == (3, 4)
    np.testing.assert_allclose([row["var_min"], row["var_max"]], [1e-7, 0.5], rtol=1e-6)


def test_the_scale_is_that_of_the_same_layer(tmp_path, capsys):
    """A scale of 0 makes the feature dead, wherever the framework keeps it."""
    for name, scale in (
        ("torch.npz", "stem.bn.weight"),
        ("keras.npz", "stem/bn/gamma"),
    ):
        write, tree = FILES[name]
        write(tmp_path / name, tree | {scale: np.zeros(2, np.float32)})
        main(["health", str(tmp_path / name), "--json"])
        (row,) = json.loads(capsys.readouterr().out)
        assert row["dead"] == 2


def test_an_nnx_model(tmp_path, capsys):
    norm = jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    norm(np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32))
    state = {"stem": nnx.to_pure_dict(nnx.state(norm))}
    write_orbax(tmp_path / "pure", state)
    write_orbax(tmp_path / "boxed", nnx.state({"stem": norm}))
    for name in ("pure", "boxed"):
        assert main(["health", str(tmp_path / name), "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert row["path"] == "stem" and row["never_updated"] == 0


def test_several_trees_of_a_step_have_their_names(tmp_path, capsys):
    items = {name: ocp.args.StandardSave(FLAX) for name in ("model", "ema")}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.Composite(**items))
    assert main(["health", str(tmp_path), "--json"]) == 0
    paths = [row["path"] for row in json.loads(capsys.readouterr().out)]
    assert paths == ["ema/stem/bn", "model/stem/bn"]


def test_the_epsilon_is_the_framework_s(tmp_path, capsys):
    var = np.full(2, 5e-4, np.float32)
    small = {}
    for name, key in (
        ("torch.npz", "stem.bn.running_var"),
        ("keras.npz", "stem/bn/moving_variance"),
    ):
        write, tree = FILES[name]
        write(tmp_path / name, tree | {key: var})
        for more in ([], ["--epsilon=1e-3"]):
            main(["health", str(tmp_path / name), "--json", *more])
            (row,) = json.loads(capsys.readouterr().out)
            small[name, *more] = row["small"]
    assert list(small.values()) == [0, 2, 2, 2]


def test_a_network_of_torch_as_a_command():
    command = [sys.executable, "-m", "jaxnorm", "health", str(TORCH)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "blocks.0.bn" in done.stdout and "least" in done.stdout


def test_severe_findings_are_an_exit_status(tmp_path, capsys):
    write, tree = FILES["torch.npz"]
    fresh = {
        "stem.bn.running_mean": np.zeros(2, np.float32),
        "stem.bn.running_var": np.ones(2, np.float32),
        "stem.bn.num_batches_tracked": np.int64(0),
    }
    for name, change in (
        ("new.npz", fresh),
        ("nan.npz", {"stem.bn.running_var": VAR * np.nan}),
    ):
        write(tmp_path / name, tree | change)
        assert main(["health", str(tmp_path / name)]) == 1
    out = capsys.readouterr().out
    assert "never updated: all 2" in out and "not finite" in out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent.npz", "No such file"),
        ("text.txt", "is no .safetensors, .npz or .msgpack file"),
        ("empty", "holds no checkpoint of Orbax"),
        ("weights.npz", "there are no running statistics of any framework, but fc"),
        ("broken.npz", ""),
        ("broken.safetensors", ""),
        ("broken.msgpack", ""),
    ],
)
def test_other_files_get_one_line(name, words, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("text")
    np.savez(tmp_path / "weights.npz", fc=MEAN)
    for suffix in ("npz", "safetensors", "msgpack"):
        (tmp_path / f"broken.{suffix}").write_bytes(b"\x00\x01broken")
    with pytest.raises(SystemExit) as stop:
        main(["health", str(tmp_path / name)])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    last = captured.err.splitlines()[-1]
    assert str(tmp_path / name) in last and words in last
