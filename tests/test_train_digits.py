"""The training example: bad input, both APIs, and resuming to the very same bits."""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

PATH = Path(__file__).parents[1] / "examples" / "01_train_digits.py"
sys.path.insert(0, str(PATH.parent))  # as where Python runs it


@pytest.fixture(scope="module")
def example():
    """The example with a small network, compiled once for all runs that share it."""
    spec = importlib.util.spec_from_file_location("train_digits", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    jobs, make_job = {}, module.make_job

    def shared_job(model, optimizer, devices):
        key = model[-1], len(devices)
        jobs[key] = jobs.get(key) or make_job(model, optimizer, devices)
        return jobs[key]

    vars(module).update(make_job=shared_job)
    models = module.resnet.MODELS | {
        "linen": functools.cache(module.resnet.linen_model)
    }
    with pytest.MonkeyPatch.context() as patch, jax.default_prng_impl("rbg"):
        for name, value in (("WIDTHS", (8,)), ("STRIDES", (2,)), ("MODELS", models)):
            patch.setattr(module.resnet, name, value)
        yield module  # with random numbers that compile fast


def arrays(image_shape=(6, 6), train=37, test=11):
    rng = np.random.default_rng(0)
    out = {}
    for name, size in (("train", train), ("test", test)):
        y = rng.integers(0, 3, size)
        y[:3] = 0, 1, 2
        x = rng.integers(0, 128, (size, *image_shape))
        x[:, 1] += y.reshape(-1, *[1] * (x.ndim - 2)) * 60
        out |= {f"x_{name}": x.astype(np.uint8), f"y_{name}": y}
    return out


@pytest.fixture
def data(tmp_path):
    np.savez(tmp_path / "data.npz", **arrays())
    return tmp_path / "data.npz"


def arguments(data, out, *more):
    return [f"--data={data}", f"--out={out}", "--batch-size=16", *more]


def refused(example, capsys, argv):
    """The one line on stderr that `argv` gets."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        example.main(argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.startswith("01_train_digits.py: ")
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    assert captured.out == ""
    return captured.err


def checkpoint(out):
    """Every array of the last checkpoint, as bytes, by its place in the tree."""
    with ocp.CheckpointManager(out / "checkpoints") as manager:
        step = manager.latest_step()
        state = ocp.args.Composite(state=ocp.args.StandardRestore())
        tree = manager.restore(step, args=state).state
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    held = {jax.tree_util.keystr(k): np.asarray(v) for k, v in leaves}
    return step, {k: (v.dtype, v.shape, v.tobytes()) for k, v in held.items()}


def metrics(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--norm=none"], "--norm"),
        (["--api=torch"], "--api"),
        (["--nonsense"], "--nonsense"),
        (["--epochs=0"], "--epochs"),
        (["--epochs=many"], "--epochs"),
        (["--seed=-1"], "--seed"),
        (["--devices=0"], "--devices"),
        (["--devices=9999"], "--devices 9999: there are"),
        (["--batch-size=0"], "--batch-size 0"),
        (["--batch-size=1"], "not a multiple of"),
        (["--batch-size=9", "--devices=2"], "not a multiple of 2 devices"),
        (["--norm=virtual", "--devices=8"], "--norm virtual does not fit"),
    ],
)
def test_bad_options_get_one_line(example, capsys, data, tmp_path, argv, words):
    out = tmp_path / "out"
    assert words in refused(example, capsys, arguments(data, out, *argv))
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_test": None}, "lacks x_test"),
        ({"x_train": np.zeros((37, 36), np.uint8)}, "x_train has shape (37, 36)"),
        ({"y_train": np.zeros((37, 1), int)}, "y_train has shape (37, 1)"),
        ({"y_train": np.zeros(36, int)}, "37 images in x_train, but 36 labels"),
        ({"y_test": np.zeros(11)}, "y_test is float64"),
        ({"y_test": np.full(11, -1)}, "y_test has negative labels"),
        ({"y_test": np.full(11, 7)}, "y_test has labels above the largest"),
        ({"y_train": np.full(37, 10**6)}, "y_train has labels above 65535"),
        ({"x_test": np.zeros((11, 6, 7), np.uint8)}, "hold images of"),
        ({"x_test": np.zeros((11, 6, 6), np.int64)}, "x_test is int64"),
        ({"x_test": np.full((11, 6, 6), np.nan)}, "x_test has floating point pixels"),
        ({"x_test": np.full((11, 6, 6), 255.0)}, "x_test has floating point pixels"),
        ({"x_test": np.full((11, 6, 6), None)}, "no readable npz"),
        ({"x_train": np.zeros((0, 6, 6), np.uint8), "y_train": np.zeros(0, int)}, "em"),
        ({"x_test": np.zeros((0, 6, 6), np.uint8), "y_test": np.zeros(0, int)}, "em"),
    ],
)
def test_bad_arrays_get_one_line(example, capsys, tmp_path, change, words):
    held = {k: v for k, v in (arrays() | change).items() if v is not None}
    np.savez(tmp_path / "bad.npz", **held)
    argv = arguments(tmp_path / "bad.npz", tmp_path / "out")
    assert words in refused(example, capsys, argv)
    assert not (tmp_path / "out").exists()


def test_bad_files_get_one_line(example, capsys, data, tmp_path):
    (tmp_path / "text.npz").write_text("two\nlines\n")
    (tmp_path / "cut.npz").write_bytes(data.read_bytes()[:500])
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name in ("absent.npz", "text.npz", "cut.npz", "one.npy", "."):
        argv = arguments(tmp_path / name, tmp_path / "out")
        assert str(tmp_path / name) in refused(example, capsys, argv)
    argv = arguments(data, data / "below-a-file")
    assert "cannot write to" in refused(example, capsys, argv)


def test_bundled_digits(example):
    train, test = example.load()
    assert len(train.images) + len(test.images) == 1797
    assert train.images.shape[1:] == (8, 8, 1) and train.images.max() == 1
    assert np.bincount(test.labels).min() > 20


def test_batches_are_padded_and_masked(example):
    split = example.Digits(np.ones((5, 2, 2, 1), np.float32), np.ones(5, np.int32))
    first, last = example.batches(split, np.arange(5), 4)
    assert first["valid"].all() and last["valid"].tolist() == [True] + [False] * 3
    for key in ("image", "label"):
        assert last[key].shape == first[key].shape
        assert last[key][0].all() and not last[key][1:].any()


def test_images_are_shifted_by_one_pixel_at_most(example):
    images = np.zeros((200, 5, 5, 1), np.float32)
    images[:, 2, 2] = 1
    split = example.Digits(images, np.zeros(200, np.int32))
    moved = example.shifted(split, np.random.default_rng(0)).images
    _, rows, columns, _ = moved.nonzero()
    assert moved.shape == images.shape and len(rows) == 200
    assert set(rows) == set(columns) == {1, 2, 3}


@pytest.mark.parametrize(
    ("api", "norm", "image_shape"),
    [("linen", "batch", (28, 28)), ("nnx", "group", (9, 7, 3))],
)
def test_an_epoch_in_either_api(
    example, monkeypatch, capsys, tmp_path, api, norm, image_shape
):
    np.savez(tmp_path / "data.npz", **arrays(image_shape))
    out, traced = tmp_path / "out", []

    def counted(*args):
        *variables, apply = build(*args)

        def counting(params, batch_stats, images, mask, train):
            traced.append(train)
            return apply(params, batch_stats, images, mask, train)

        return *variables, counting

    build = example.resnet.MODELS[api]
    monkeypatch.setitem(example.resnet.MODELS, api, counted)
    more = (f"--api={api}", f"--norm={norm}", "--epochs=1")
    assert example.main(arguments(tmp_path / "data.npz", out, *more)) == 0
    printed = capsys.readouterr().out
    assert "test accuracy with running statistics: " in printed
    assert "    parameters: " in printed
    # Ragged batches included, each step is traced once; the last one on one device.
    assert traced == [True, False, True]
    (line,) = metrics(out)
    names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    assert tuple(line) == ("epoch", *names) and np.isfinite(list(line.values())).all()
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "config.json").read_text())["norm"] == norm


@pytest.mark.parametrize("part", ["parameters", "batch statistics", "loss", None])
@pytest.mark.parametrize("wrong", [1.001, np.nan])
def test_steps_that_disagree_are_noticed(example, part, wrong):
    def job(parameters=1.0, batch_statistics=1.0, loss=1.0):
        def train_step(state, batch):
            return state, {"loss": np.float32(loss), "count": np.int32(2)}

        params, stats = {"w": np.full(3, parameters)}, {"m": np.array(batch_statistics)}
        return example.Job(example.State(params, stats, ()), train_step, train_step)

    other = job(**({part.replace(" ", "_"): wrong} if part else {}))
    gaps = example.differences(job(), other, {})
    assert list(gaps) == ["parameters", "batch statistics", "loss"]
    assert {k: gap <= example.TOLERANCE for k, gap in gaps.items()} == {
        k: k != part for k in gaps
    }


def test_resumed_runs_end_with_the_same_bits(
    example, monkeypatch, capsys, data, tmp_path
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    example.main(arguments(data, whole, "--epochs=4"))
    example.main(arguments(data, parts, "--epochs=2"))
    assert checkpoint(parts)[0] == 2
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "train_loss": 1.0}\n{"epo')  # as if killed here
    example.main(arguments(data, parts, "--epochs=4", "--resume"))
    assert checkpoint(parts) == checkpoint(whole)
    assert metrics(parts) == metrics(whole)
    assert [line["epoch"] for line in metrics(parts)] == [1, 2, 3, 4]

    # Nothing is left to train, and no two computations are closer than this.
    monkeypatch.setattr(example, "TOLERANCE", -1)
    assert example.main(arguments(data, parts, "--epochs=4", "--resume")) == 1
    assert checkpoint(parts) == checkpoint(whole)
    assert metrics(parts) == metrics(whole)

    before = {p: p.read_bytes() for p in parts.rglob("*") if p.is_file()}
    for more, words in [
        (["--epochs=4"], "holds a run already"),
        (["--resume", "--epochs=3"], "has 4 epochs"),
        (["--resume", "--norm=layer"], "norm was batch, now layer"),
        (["--resume", "--api=nnx"], "api was linen, now nnx"),
        (["--resume", "--seed=1"], "seed was 0, now 1"),
        (["--resume", "--batch-size=32"], "batch_size was 16, now 32"),
        (["--resume", "--devices=2"], "devices was 8, now 2"),
    ]:
        assert words in refused(example, capsys, arguments(data, parts, *more))
    np.savez(data, **arrays(test=12))
    argv = arguments(data, parts, "--resume")
    assert "data was" in refused(example, capsys, argv)
    argv = arguments(data, tmp_path / "empty", "--resume")
    assert "holds no checkpoint" in refused(example, capsys, argv)
    assert not (tmp_path / "empty").exists()
    assert before == {p: p.read_bytes() for p in parts.rglob("*") if p.is_file()}


LAUNCH = """
import pathlib, runpy, sys
sys.path.insert(0, str(pathlib.Path(sys.argv[1]).parent))
import resnet
vars(resnet).update(WIDTHS=(8,), STRIDES=(2,))
runpy.run_path(sys.argv[1])["main"](sys.argv[2:])
"""


@pytest.mark.optimized  # as is the process that is killed
def test_a_killed_run_resumes_to_the_same_bits(example, data, tmp_path):
    example.resnet.MODELS["linen"].cache_clear()  # initialized with few optimizations
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    argv = arguments(data, killed, "--epochs=1000")
    flags = "--xla_force_host_platform_device_count=8"
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["JAX_DEFAULT_PRNG_IMPL"] = "rbg"
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(PATH), *argv],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
    )
    lines, deadline = killed / "metrics.jsonl", time.monotonic() + 300
    # At the third line, the first checkpoint is whole and the second under way.
    while not (lines.exists() and lines.read_text().count("\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = importlib.import_module("train_files").epochs_done(killed)
    epochs = f"--epochs={done + 2}"
    example.main(arguments(data, killed, epochs, "--resume"))
    example.main(arguments(data, whole, epochs))
    assert checkpoint(killed) == checkpoint(whole)
    assert metrics(killed) == metrics(whole)
