"""The short examples: what they say they show, in small."""

import importlib.util
import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxnorm

FOLDER = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(FOLDER))  # as where Python runs one of them


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def fast_keys():
    with jax.default_prng_impl("rbg"):  # compiles fast
        yield


@pytest.fixture(scope="module")
def recurrent():
    module = load("02_recurrent_batch_norm")
    vars(module).update(HIDDEN=16)
    return module


@pytest.fixture(scope="module")
def conditional():
    return load("03_conditional_norms")


@pytest.mark.parametrize(
    ("name", "argv", "words"),
    [
        ("02_recurrent_batch_norm", ["--norm=batch"], "--norm"),
        ("02_recurrent_batch_norm", ["--steps=0"], "--steps must be at least 1"),
        ("02_recurrent_batch_norm", ["--seed=-1"], "--seed must be from 0"),
        ("03_conditional_norms", ["--steps=0"], "--steps must be at least 1"),
        ("03_conditional_norms", ["--steps=some"], "--steps"),
        ("05_freeze_for_finetuning", ["--steps=0"], "--steps must be at least 1"),
        ("08_from_pytorch", ["--checkpoint=no.file"], "no.file is not a file"),
        ("08_from_pytorch", ["--steps=1"], "--steps"),
        ("10_cross_q", ["--steps=0"], "--steps must be at least 1"),
        ("04_fold_for_inference", ["--steps=0"], "--steps must be at least 1"),
    ],
)
def test_bad_options_get_one_line(capsys, name, argv, words):
    with pytest.raises(SystemExit) as stop:
        load(name).main(argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    assert captured.err.startswith(f"{name}.py: ") and words in captured.err
    assert captured.err.count("\n") == 1


# ---- Recurrent batch norm ---------------------------------------------------------


@pytest.mark.parametrize(("norm", "least"), [("recurrent", 0.5), ("none", 0.3)])
def test_the_lstm_learns(recurrent, capsys, norm, least):
    assert recurrent.main([f"--norm={norm}", "--steps=60"]) == 0
    *deviations, accuracy = capsys.readouterr().out.splitlines()
    words, value = accuracy.split(": ")
    assert words == "test accuracy with running statistics" and float(value) > least
    # The cell fills up with time, so that the steps differ.
    for line in deviations:
        values = [float(v) for v in line.split(": ")[1].split()]
        assert len(values) == recurrent.STEPS and values[-1] > 1.2 * values[0]
    assert len(deviations) == (norm == "recurrent")


def test_sequences_end_with_their_ink(recurrent):
    for data in map(recurrent.sequences, load("digits").load()):
        after = np.arange(recurrent.STEPS) >= data["length"][:, None]
        ink = data["pixels"].any(axis=2)
        assert 0 < after.sum() and not ink[after].any()
        assert ink[np.arange(len(ink)), data["length"] - 1].all()


@pytest.mark.parametrize("name", ["recurrent", "none"])
def test_what_follows_the_end_counts_for_nothing(recurrent, name):
    norm, rng = recurrent.NORMS[name], np.random.default_rng(0)
    pixels = rng.uniform(size=(6, recurrent.STEPS, recurrent.PIXELS))
    batch = {
        "pixels": pixels.astype(np.float32),
        "length": np.array([9, 3, 9, 1, 9, 3]),
    }
    going_on = np.arange(recurrent.STEPS) < batch["length"][:, None]
    other = batch | {"pixels": np.where(going_on[..., None], batch["pixels"], 7)}
    params, stats = recurrent.initialize(norm, 0)
    lstm = jax.jit(partial(recurrent.lstm, norm, train=True))
    state, new = lstm(params, stats, batch)
    jax.tree.map(
        np.testing.assert_array_equal, lstm(params, stats, other), (state, new)
    )
    if norm is None:
        return
    # Each step has statistics of its own, of those that go on.
    for step, rows in enumerate(going_on.T):
        x = np.asarray(batch["pixels"][rows, step] @ params["input_weight"])
        expected = 0.9 + 0.1 * x.var(axis=0) if len(x) > 1 else np.ones(x.shape[1])
        got = new["input"]["var"][step]
        np.testing.assert_allclose(got, expected, rtol=1e-5)


# ---- Scale and bias per example ---------------------------------------------------


def test_conditional_norms_do_what_they_print(conditional, capsys):
    assert conditional.main(["--steps=40"]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = (line.split(": ") for line in lines if line.startswith("    "))
    values = {name.strip(): float(value) for name, value in figures}
    assert values["after"] < 1e-4 < 1 < values["before"]
    # For each image and question there is a yes and a no.
    assert values["the same norm for all"] == 0.5
    assert values["a norm for each"] > 0.6
    assert values["told the level"] < 0.9 * values["told the levels of others"]
    assert values["at best"] < values["told the level"] < values["before training"]


def test_adaptive_instance_norm_is_the_papers(conditional):
    content, style = conditional.two_images(np.random.default_rng(1))
    x, s = np.asarray(content, np.float64), np.asarray(style, np.float64)
    x = (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)
    expected = x * s.std((1, 2), keepdims=True) + s.mean((1, 2), keepdims=True)
    got = conditional.adaptive_instance_norm(content, style)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_modulation_is_per_example(conditional):
    rng = np.random.default_rng(0)
    x, scale, shift = (
        rng.standard_normal(n).astype(np.float32) for n in ((3, 4, 8), (3, 8), (3, 8))
    )
    got = conditional.modulated_rms_norm(x, scale, jnp.asarray(shift))
    normalized = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
    expected = normalized * (1 + scale[:, None]) + shift[:, None]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_the_denoiser_starts_as_the_identity(conditional):
    model = conditional.Denoiser(16, rngs=nnx.Rngs(0))
    _, noisy, level = conditional.noisy_tokens(np.random.default_rng(0))
    np.testing.assert_array_equal(model(noisy, jnp.asarray(level)), noisy)


# ---- Trained models ---------------------------------------------------------------


def figures(name, steps, capsys):
    """What an example prints, as numbers by their names."""
    assert load(name).main([f"--steps={steps}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = (re.fullmatch(r" *(.+): ([\d.e+-]+)(, [\d.]+)?( off)?", v) for v in lines)
    return lines, {m[1]: float(m[2]) for m in found if m}


def test_frozen_norms_take_one_image_at_a_time(capsys):
    lines, found = figures("05_freeze_for_finetuning", 60, capsys)
    assert "    (their norms are bit for bit as before: True)" in lines
    assert found["accuracy on digits"] > 0.8
    for name in ("frozen statistics", "running statistics, which move"):
        assert found[name] > found["statistics of each image"]


def test_averaged_weights_get_their_statistics(capsys):
    _, found = figures("06_recalibrate_averaged_weights", 30, capsys)
    assert found["recalibrated ones"] > found["those of the last step"]
    assert found["recalibrated ones"] > 0.9


def test_statistics_move_when_they_should(capsys):
    _, found = figures("07_when_statistics_move", 30, capsys)
    assert found["one update"] < 1e-5 < 1e-2 < found["one each"]
    assert found["of real images"] > 0.7


def test_held_statistics_are_those_of_real_images():
    example, digits = load("07_when_statistics_move"), load("digits")
    variables, sgd = digits.init(), optax.sgd(0.1)
    batch = next(digits.load()[0].batches(16))
    real = jax.jit(digits.forward)(variables, batch)[1]
    state = sgd.init(variables["params"])
    for hold in (True, False):
        new, _ = example.robust_step(sgd, hold, variables, state, batch)
        stats = jaxnorm.models.unfreeze(new["batch_stats"])
        gaps = jax.tree.map(lambda a, b: abs(a - b).max(), stats, real)
        assert (max(jax.tree.leaves(gaps)) < 1e-6) == hold


def test_statistics_alone_adapt_a_network(capsys):
    _, found = figures("09_adapt_to_a_new_domain", 60, capsys)
    assert found["1.0"] > 0.8 > 0.4 > found["0.0"]
    assert found["64"] > found["4"]
    assert found["digits"] > 0.8 and found["faded"] > 0.8


# ---- A checkpoint of torch --------------------------------------------------------


def test_what_torch_trained_goes_on_training(capsys):
    assert load("08_from_pytorch").main([]) == 0
    *report, difference, accuracy, losses, back = capsys.readouterr().out.splitlines()
    assert "params/fc/kernel              fc.weight                 OI to IO" in report
    assert float(difference.split(": ")[1]) < 1e-4
    assert accuracy == "test accuracy: 0.981"
    before, after = (float(v) for v in losses.split(": ")[1].split())
    assert after < before
    assert back == "back in torch: 14 arrays, keys alike: True"


# ---- Reinforcement learning -------------------------------------------------------


@pytest.fixture(scope="module")
def cross_q():
    module = load("10_cross_q")
    vars(module).update(HIDDEN=16, RANDOM_STEPS=20, BATCH_SIZE=16)
    return module


def test_each_critic_trains(cross_q, capsys):
    assert cross_q.main(["--steps=80"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    found = dict(line.strip().split(": ") for line in lines)
    assert list(found) == list(cross_q.CRITICS)
    returns = [[float(v) for v in values.split()] for values in found.values()]
    assert np.isfinite(returns).all() and {len(v) for v in returns} == {4}
    assert len({tuple(v) for v in returns}) > 1


def test_one_pass_has_the_statistics_of_both_batches(cross_q):
    nets = cross_q.networks(jaxnorm.BatchNorm(momentum=0.0), True)
    apart = nets._replace(one_pass=False)
    rng = np.random.default_rng(0)
    batch = {k: rng.normal(size=(16, 2)).astype(np.float32) for k in ("state", "next")}
    batch["action"] = rng.uniform(-1, 1, (16, 1)).astype(np.float32)
    actions = rng.uniform(0, 1, (16, 1)).astype(np.float32)
    critic = nets.init(jax.random.key(0))["critic"]
    first = np.concatenate([cross_q.observed(batch["state"]), batch["action"]], -1)
    second = np.concatenate([cross_q.observed(batch["next"]), actions], -1)
    for which, seen in ((nets, np.concatenate([first, second])), (apart, first)):
        values, after, new = which.both_values(critic, batch, actions)
        assert values.shape == after.shape == (2, 16)
        got = new["batch_stats"]["Norm_0"]["mean"]
        np.testing.assert_allclose(got, [seen.mean(0)] * 2, 1e-4, 1e-6)


def test_the_pendulum_is_that_of_gymnasium(cross_q):
    rng = np.random.default_rng(0)
    for angle, speed, action in rng.uniform([-9, -8, -1], [9, 8, 1], (20, 3)):
        off = np.arctan2(np.sin(angle), np.cos(angle))
        cost = off**2 + 0.1 * speed**2 + 0.001 * (2 * action) ** 2
        pull = 3 * 10 / (2 * 1) * np.sin(angle) + 3 / (1 * 1**2) * 2 * action
        after = np.clip(speed + pull * 0.05, -8, 8)
        state, reward = cross_q.moved(jnp.array([angle, speed]), jnp.array([action]))
        np.testing.assert_allclose(state, [angle + after * 0.05, after], 1e-5, 1e-5)
        np.testing.assert_allclose(reward, -cost, 1e-4, 1e-4)


def test_densities_are_those_of_the_actions(cross_q):
    nets = cross_q.networks(None, False)
    actor = nets.init(jax.random.key(0))["actor"]
    states, key = jnp.zeros((1, 2)), jax.random.key(1)
    actions, density, _ = nets.act(actor, states, key)
    out = nets.actor.apply(actor, cross_q.observed(states), False)
    out = np.asarray(out, np.float64)[0]
    mean, std = out[0], np.exp(np.clip(out[1], -5, 2))
    action = float(actions[0, 0])
    normal = -((np.arctanh(action) - mean) ** 2) / (2 * std**2)
    normal -= np.log(std * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(density[0], normal - np.log(1 - action**2), 1e-3)


# ---- Folding ----------------------------------------------------------------------


def test_folding_changes_no_answer(capsys):
    example = load("04_fold_for_inference")
    vars(example).update(RUNS=3)
    assert example.main(["--steps=8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [f"BatchNorm_{i} goes into Conv_{i}" for i in range(4)]
    with_norms, folded = (line.split(": ")[1].split(", ")[0] for line in lines[4:6])
    assert with_norms == folded and with_norms.startswith("test accuracy 0.")
    name, difference = lines[6].split(": ")
    assert name.startswith("largest difference") and float(difference) < 1e-5
    assert lines[7].startswith("time folded / with norms: ")
