"""Further normalization methods from their papers' definitions, in NumPy float64.

The tests measure the package against this file. It shares no code with the package.

Every method is called as `name(x, params, stats, *, mask=None, ...)` and returns its
output and the new statistics. Examples are the first axis, features the last one, and
"space" is all between them. Where `mask` is False an element counts in no statistic,
its value (NaN even) is never used, and its output is 0. A function whose gradient is
not the derivative of its output has a companion, `name_backward`.
"""

import math

import numpy as np


def batch_renorm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    momentum=0.99,
    epsilon=1e-5,
    unbiased=False,
    rmax=3.0,
    dmax=5.0,
    correction=None,
):
    """Batch norm corrected towards the running statistics (Ioffe 2017, 1702.03275).

    The corrections r and d are constants to the gradient: a difference quotient has to
    hold them fixed by giving as `correction` what `batch_renorm_correction` returns.
    """
    x, valid = _select(x, mask)
    if use_running_average:
        return _with_running(x, valid, params, stats, epsilon)
    if correction is None:
        correction = batch_renorm_correction(
            x, stats, mask=valid, epsilon=epsilon, rmax=rmax, dmax=dmax
        )
    r, d = correction
    mean, var, size = _moments(x, valid, _batch(x))
    z = (x - mean) / np.sqrt(var + epsilon) * r + d
    new = _running(stats, mean, var, size, momentum, unbiased)
    return _finish(_affine(z, params), valid), new


def batch_renorm_correction(x, stats, *, mask=None, epsilon=1e-5, rmax=3.0, dmax=5.0):
    """Batch renormalization's r and d for this batch (Ioffe 2017, 1702.03275)."""
    x, valid = _select(x, mask)
    mean, var, _ = _moments(x, valid, _batch(x))
    running_dev = np.sqrt(_exact(stats["var"]) + epsilon)
    r = np.clip(np.sqrt(var + epsilon) / running_dev, 1 / rmax, rmax)
    d = np.clip((mean - _exact(stats["mean"])) / running_dev, -dmax, dmax)
    return r, d


def ghost_batch_norm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    momentum=0.99,
    epsilon=1e-5,
    unbiased=False,
    size,
):
    """Batch norm in runs of `size` examples (Hoffer et al. 2017, 1705.08741).

    The examples left over join the last full run.
    """
    x, valid = _select(x, mask)
    if use_running_average:
        return _with_running(x, valid, params, stats, epsilon)
    ghosts = max(len(x) // size, 1)
    z = np.zeros(x.shape)
    for ghost in range(ghosts):
        last = ghost == ghosts - 1
        run = slice(ghost * size, len(x) if last else (ghost + 1) * size)
        mean, var, _ = _moments(x[run], valid[run], _batch(x))
        z[run] = (x[run] - mean) / np.sqrt(var + epsilon)
    whole = _moments(x, valid, _batch(x))
    new = _running(stats, *whole, momentum, unbiased)
    return _finish(_affine(z, params), valid), new


def recurrent_batch_norm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    momentum=0.99,
    epsilon=1e-5,
    unbiased=False,
    max_steps,
    step,
):
    """Batch norm with statistics of every time step (Cooijmans 2016, 1603.09025)."""
    row = min(int(step), max_steps - 1)
    y, new_row = _batch_norm(
        x,
        params,
        {name: _exact(stats[name])[row] for name in stats},
        mask=mask,
        use_running_average=use_running_average,
        momentum=momentum,
        epsilon=epsilon,
        unbiased=unbiased,
    )
    new = _copy(stats)
    for name in new:
        new[name][row] = new_row[name]
    return y, new


def online_norm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    momentum=0.999,
    control_momentum=0.99,
    layer_scaling=True,
    epsilon=1e-5,
):
    """Normalize each example by those before it (Chiley et al. 2019, 1905.05894)."""
    del control_momentum  # of the backward pass only
    x, valid = _select(x, mask)
    if use_running_average:
        mean, var = _exact(stats["mean"]), _exact(stats["var"])
        y, new = (x - mean) / np.sqrt(var + epsilon), _copy(stats)
    else:
        y, _, new = _online(x, valid, stats, momentum, epsilon)
    z = y / _layer_scale(y, valid, epsilon) if layer_scaling else y
    return _finish(_affine(z, params), valid), new


def online_norm_backward(
    x,
    params,
    stats,
    dz,
    *,
    mask=None,
    momentum=0.999,
    control_momentum=0.99,
    layer_scaling=True,
    epsilon=1e-5,
):
    """Online norm's gradient by control process (Chiley et al. 2019, 1905.05894)."""
    x, valid = _select(x, mask)
    dz = np.where(valid, _exact(dz), 0.0)
    b = control_momentum
    y, dev, _ = _online(x, valid, stats, momentum, epsilon)
    layer_scale = _layer_scale(y, valid, epsilon) if layer_scaling else 1.0
    z = y / layer_scale

    g = dz * _scale(params, x)
    if layer_scaling:
        of_example = tuple(range(1, x.ndim))
        g = (g - z * _mean(g * z, valid, of_example)) / layer_scale

    product = np.array(_exact(params["control_product"]))
    drift = np.array(_exact(params["control_mean"]))
    dx = np.zeros(x.shape)
    space = tuple(range(x.ndim - 2))
    for t in range(len(x)):
        controlled = g[t] - (1 - b) * product * y[t]
        product = product + _mean(controlled * y[t], valid[t], space, False)
        dx[t] = np.where(valid[t], controlled / dev[t] - (1 - b) * drift, 0.0)
        drift = drift + _mean(dx[t], valid[t], space, False)
    return {
        "x": dx,
        "scale": _parameter_gradient(dz * z, params.get("scale")),
        "bias": _parameter_gradient(dz, params.get("bias")),
        "new_control_product": product,
        "new_control_mean": drift,
    }


def _online(x, valid, stats, a, epsilon):
    """Output, each example's deviation, and the new statistics."""
    mean, var = np.array(_exact(stats["mean"])), np.array(_exact(stats["var"]))
    y, dev = np.zeros(x.shape), np.zeros((len(x), x.shape[-1]))
    space = tuple(range(x.ndim - 2))
    for t in range(len(x)):
        dev[t] = np.sqrt(var + epsilon)
        y[t] = np.where(valid[t], (x[t] - mean) / dev[t], 0.0)
        m, v, size = _moments(x[t], valid[t], space, False)
        next_var = a * var + (1 - a) * v + a * (1 - a) * (m - mean) ** 2
        next_mean = a * mean + (1 - a) * m
        var = np.where(size > 0, next_var, var)
        mean = np.where(size > 0, next_mean, mean)
    return y, dev, {**_copy(stats), "mean": mean, "var": var}


def _layer_scale(y, valid, epsilon):
    """Root mean square of each example."""
    return np.sqrt(_mean(y**2, valid, tuple(range(1, y.ndim))) + epsilon)


def moving_average_batch_norm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    window=16,
    momentum=0.98,
    clip=1.05,
    epsilon=1e-5,
):
    """Divide by the mean square of the last batches (Yan et al. 2020, 2001.06838)."""
    x, valid = _select(x, mask)
    if use_running_average:
        z = x / np.sqrt(_exact(stats["var"]) + epsilon)
        return _finish(_affine(z, params), valid), _copy(stats)
    n = np.asarray(stats["count"])  # of each feature
    r, dev, average, buffer = _moving_average(x, valid, stats, window, clip, epsilon)
    old = _exact(stats["var"])
    var = np.where(n == 0, average, momentum * old + (1 - momentum) * average)
    some = valid.any(_batch(x))
    new = {
        **_copy(stats),
        "var": np.where(some, var, old),
        "buffer": buffer,
        "count": n + some,
    }
    return _finish(_affine(r * x / dev, params), valid), new


def moving_average_batch_norm_backward(
    x,
    params,
    stats,
    dy,
    *,
    mask=None,
    window=16,
    momentum=0.98,
    clip=1.05,
    epsilon=1e-5,
):
    """The gradient, with averaged gradient statistics (Yan et al. 2020, 2001.06838)."""
    del momentum  # of the statistics only
    x, valid = _select(x, mask)
    dy = np.where(valid, _exact(dy), 0.0)
    n = np.asarray(stats["count"])
    r, dev, _, _ = _moving_average(x, valid, stats, window, clip, epsilon)
    z = x / dev
    g = r * dy * _scale(params, x)
    control, average = _into_window(g * z, valid, params["control"], n, window)
    return {
        "x": np.where(valid, (g - z * average) / dev, 0.0),
        "scale": _parameter_gradient(dy * r * z, params.get("scale")),
        "bias": _parameter_gradient(dy, params.get("bias")),
        "new_control": control,
    }


def _moving_average(x, valid, stats, window, clip, epsilon):
    """Correction, deviation, averaged mean square, and the new buffer."""
    n = np.asarray(stats["count"])
    buffer, average = _into_window(x**2, valid, stats["buffer"], n, window)
    dev = np.sqrt(average + epsilon)
    r = np.clip(dev / np.sqrt(_exact(stats["var"]) + epsilon), 1 / clip, clip)
    return np.where(n < window, 1.0, r), dev, average, buffer


def _into_window(values, valid, buffer, n, window):
    """The buffer with the mean of `values` over the batch in the row of each feature's
    n-th batch, and the mean of the rows that it has filled by now."""
    buffer = np.array(_exact(buffer))
    mean = _mean(values, valid, _batch(values), False)
    some = valid.any(_batch(values))
    average = np.zeros(mean.shape)
    for f in range(len(mean)):
        if some[f]:
            buffer[n[f] % window, f] = mean[f]
        filled = min(n[f] + some[f], window)
        average[f] = buffer[:filled, f].mean() if filled else 0.0
    return buffer, average


def power_norm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    momentum=0.9,
    epsilon=1e-5,
):
    """Divide by the running root mean square (Shen et al. 2020, 2003.07845)."""
    x, valid = _select(x, mask)
    y = _affine(x / np.sqrt(_exact(stats["var"]) + epsilon), params)
    if use_running_average:
        return _finish(y, valid), _copy(stats)
    square, size = _mean(x**2, valid, _batch(x)), valid.sum(_batch(x), keepdims=True)
    return _finish(y, valid), _running(stats, None, square, size, momentum, least=1)


def power_norm_backward(x, params, stats, dy, *, mask=None, momentum=0.9, epsilon=1e-5):
    """The approximate gradient of power norm (Shen et al. 2020, 2003.07845)."""
    x, valid = _select(x, mask)
    dy = np.where(valid, _exact(dy), 0.0)
    dev = np.sqrt(_exact(stats["var"]) + epsilon)
    control = _exact(params["control"])
    z = x / dev
    controlled = dy * _scale(params, x) - control * z
    mean = _mean(controlled * z, valid, _batch(x), False)
    return {
        "x": np.where(valid, controlled / dev, 0.0),
        "scale": _parameter_gradient(dy * z, params.get("scale")),
        "bias": _parameter_gradient(dy, params.get("bias")),
        "new_control": control + (1 - momentum) * mean,
    }


def cross_iteration_batch_norm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    kernel=None,
    layer=None,
    window=4,
    momentum=0.99,
    epsilon=1e-5,
):
    """Batch norm over the last iterations, compensated (Yao et al. 2020, 2002.05712).

    `kernel` enters the past iterations' part and the new statistics only, which are
    constants to the gradient: with it fixed, y depends on x as the gradient has it.
    """
    x, valid = _select(x, mask)
    if use_running_average:
        return _with_running(x, valid, params, stats, epsilon)
    if kernel is None or layer is None:
        raise ValueError("training needs the kernel and the layer")
    kernel = np.array(_exact(kernel))
    mu, square = _mean_and_square(x, valid)

    means, squares = [mu], [square]
    for j in range(min(int(stats["count"]), window - 1)):
        change = kernel - _exact(stats["history_kernel"])[j]
        past = []
        for name in ("mean", "square"):
            slope = _exact(stats[f"history_{name}_slope"])[j]
            moved = np.sum(slope * change, tuple(range(kernel.ndim - 1)))
            past.append(_exact(stats[f"history_{name}"])[j] + moved)
        means.append(past[0])
        squares.append(np.maximum(past[1], past[0] ** 2))
    mean = np.mean(means, 0)
    var = np.mean(squares, 0) - mean**2
    y = _affine((x - mean) / np.sqrt(var + epsilon), params)

    def measure(k):
        return np.stack(_mean_and_square(*_select(layer(k), valid)))

    mean_slope, square_slope = _slopes(measure, kernel)
    new = _running(stats, mean, var, valid.sum(_batch(x)), momentum)
    newest = {
        "history_mean": mu,
        "history_square": square,
        "history_mean_slope": mean_slope,
        "history_square_slope": square_slope,
        "history_kernel": kernel,
    }
    for name, row in newest.items():
        rows = [row, *_exact(stats[name])][: window - 1]
        new[name] = np.array(rows).reshape(np.shape(stats[name]))
    return _finish(y, valid), {**new, "count": int(stats["count"]) + 1}


def _mean_and_square(x, valid):
    mean = _mean(x, valid, _batch(x), False)
    return mean, _mean(x**2, valid, _batch(x), False)


def _slopes(measure, kernel, step=2.0**-10):
    """Derivatives of measure's rows, each channel's by its own kernel elements."""
    slopes = np.zeros((2, *kernel.shape))

    def moved(i, by):
        changed = kernel.copy()
        changed[i] += by
        return measure(changed)[:, i[-1]]

    for i in np.ndindex(kernel.shape):
        wide = (moved(i, 2 * step) - moved(i, -2 * step)) / (4 * step)
        narrow = (moved(i, step) - moved(i, -step)) / (2 * step)
        slopes[(slice(None), *i)] = (4 * narrow - wide) / 3
    return slopes


def eval_norm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    momentum=0.99,
    epsilon=1e-5,
    unbiased=False,
    weight=0.1,
):
    """Evaluate with the example's own moments blended in (Singh 2019, 1904.06031)."""
    if not use_running_average:
        return _batch_norm(
            x,
            params,
            stats,
            mask=mask,
            momentum=momentum,
            epsilon=epsilon,
            unbiased=unbiased,
        )
    x, valid = _select(x, mask)
    running_mean, running_var = _exact(stats["mean"]), _exact(stats["var"])
    m, v, size = _moments(x, valid, _space(x))
    m = np.where(size > 0, m, running_mean)
    v = np.where(size > 0, v, running_var)
    # The moments of a mixture of the two.
    mean = (1 - weight) * running_mean + weight * m
    square = (1 - weight) * (running_var + running_mean**2) + weight * (v + m**2)
    var = square - mean**2
    y = _affine((x - mean) / np.sqrt(var + epsilon), params)
    return _finish(y, valid), _copy(stats)


def virtual_batch_norm(
    x, params, stats, *, mask=None, use_running_average=False, size, epsilon=1e-5
):
    """Normalize by a reference batch and oneself (Salimans et al. 2016, 1606.03498)."""
    del use_running_average  # always the same
    x, valid = _select(x, mask)
    z = np.zeros(x.shape)
    for i in range(len(x)):
        basis = list(range(min(size, len(x))))
        if i >= size:
            basis.append(i)
        mean, var, _ = _moments(x[basis], valid[basis], _batch(x), False)
        z[i] = (x[i] - mean) / np.sqrt(var + epsilon)
    return _finish(_affine(z, params), valid), _copy(stats)


def iter_norm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    num_groups=None,
    group_size=None,
    iterations=5,
    momentum=0.9,
    epsilon=1e-5,
):
    """Whiten groups of features by Newton's iteration (Huang 2019, 1904.03441)."""
    if (num_groups is None) == (group_size is None):
        raise ValueError("give exactly one of num_groups and group_size")
    x, valid = _select(x, mask)
    d = group_size or x.shape[-1] // num_groups
    groups = x.shape[-1] // d
    rows = x.reshape(-1, x.shape[-1])
    present = rows[valid.reshape(rows.shape)[:, 0]]  # masks are of whole rows
    new = _copy(stats)
    if use_running_average:
        mean, whitening = _exact(stats["mean"]), _exact(stats["whitening"])
    else:
        mean = present.sum(0) / max(len(present), 1)
        whitening = np.zeros((groups, d, d))
        for k in range(groups):
            group = slice(k * d, (k + 1) * d)
            centred = present[:, group] - mean[group]
            sigma = centred.T @ centred / max(len(present), 1) + epsilon * np.eye(d)
            trace = np.trace(sigma)
            p = np.eye(d)
            for _ in range(iterations):
                p = (3 * p - p @ p @ p @ (sigma / trace)) / 2
            whitening[k] = p / np.sqrt(trace)
        if len(present) >= 2:
            for name, value in (("mean", mean), ("whitening", whitening)):
                new[name] = momentum * new[name] + (1 - momentum) * value
    z = np.zeros(rows.shape)
    for k in range(groups):
        group = slice(k * d, (k + 1) * d)
        z[:, group] = (rows[:, group] - mean[group]) @ whitening[k]
    return _finish(_affine(z.reshape(x.shape), params), valid), new


def l1_batch_norm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    momentum=0.99,
    epsilon=1e-5,
):
    """Batch norm by the mean absolute deviation (Wu et al. 2018, 1802.09769)."""
    x, valid = _select(x, mask)
    if use_running_average:
        return _with_running(x, valid, params, stats, epsilon)
    mean, _, size = _moments(x, valid, _batch(x))
    dev = math.sqrt(math.pi / 2) * _mean(np.abs(x - mean), valid, _batch(x))
    y = _affine((x - mean) / np.sqrt(dev**2 + epsilon), params)
    return _finish(y, valid), _running(stats, mean, dev**2, size, momentum)


def range_batch_norm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    momentum=0.99,
    epsilon=1e-5,
):
    """Batch norm by the range of the values (Banner et al. 2018, 1805.11046)."""
    x, valid = _select(x, mask)
    if use_running_average:
        return _with_running(x, valid, params, stats, epsilon)
    mean, _, size = _moments(x, valid, _batch(x))
    over = {"axis": _batch(x), "keepdims": True, "where": valid}
    high = np.max(x - mean, initial=-np.inf, **over)
    low = np.min(x - mean, initial=np.inf, **over)
    # One value alone has no range, and log(1) is 0.
    spread = np.where(size > 1, high - low, 0.0)
    dev = spread / np.sqrt(2 * np.log(np.maximum(size, 2)))
    y = _affine((x - mean) / np.sqrt(dev**2 + epsilon), params)
    return _finish(y, valid), _running(stats, mean, dev**2, size, momentum)


def domain_batch_norm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    momentum=0.99,
    epsilon=1e-5,
    unbiased=False,
    num_domains,
    share_affine=True,
    domain,
):
    """Batch norm with statistics of each domain (Chang et al. 2019, 1906.03950)."""
    x, valid = _select(x, mask)
    domain = np.asarray(domain)
    z, new = np.zeros(x.shape), _copy(stats)
    for k in range(num_domains):
        members = domain == k
        own = {name: _exact(stats[name])[k] for name in ("mean", "var")}
        if use_running_average:
            mean, var = own["mean"], own["var"]
        else:
            mean, var, size = _moments(x[members], valid[members], _batch(x))
            row = _running(own, mean, var, size, momentum, unbiased)
            new["mean"][k], new["var"][k] = row["mean"], row["var"]
        z[members] = (x[members] - mean) / np.sqrt(var + epsilon)
    if not share_affine:
        params = {name: _exact(value)[domain] for name, value in params.items()}
    return _finish(_affine(z, params), valid), new


def running_instance_norm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    momentum=0.99,
    epsilon=1e-5,
    unbiased=False,
):
    """Instance norm with running statistics (Ulyanov et al. 2016, 1607.08022).

    The statistics follow the instances' averages, as those of torch's InstanceNorm do.
    """
    x, valid = _select(x, mask)
    if use_running_average:
        return _with_running(x, valid, params, stats, epsilon)
    m, v, size = _moments(x, valid, _space(x))
    y = _affine((x - m) / np.sqrt(v + epsilon), params)
    total = size.sum(0)
    mean = (size * m).sum(0) / np.maximum(total, 1)
    var = (size * v).sum(0) / np.maximum(total, 1)
    if unbiased:
        each = total / np.maximum((size > 0).sum(0), 1)
        # With one element in each instance every variance is 0 anyway.
        var = var * np.where(each > 1, each / np.where(each > 1, each - 1, 1.0), 1.0)
    return _finish(y, valid), _running(stats, mean, var, total, momentum)


def switchable_norm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    momentum=0.99,
    epsilon=1e-5,
    unbiased=False,
):
    """Blend instance, layer and batch statistics (Luo et al. 2018, 1806.10779)."""
    x, valid = _select(x, mask)
    in_mean, in_var, _ = _moments(x, valid, _space(x))
    ln_mean, ln_var, _ = _moments(x, valid, tuple(range(1, x.ndim)))
    if use_running_average:
        bn_mean, bn_var = _exact(stats["mean"]), _exact(stats["var"])
        new = _copy(stats)
    else:
        bn_mean, bn_var, size = _moments(x, valid, _batch(x))
        new = _running(stats, bn_mean, bn_var, size, momentum, unbiased)
    w = _softmax(params["mean_weight"])
    mean = w[0] * in_mean + w[1] * ln_mean + w[2] * bn_mean
    w = _softmax(params["var_weight"])
    var = w[0] * in_var + w[1] * ln_var + w[2] * bn_var
    y = _affine((x - mean) / np.sqrt(var + epsilon), params)
    return _finish(y, valid), new


def filter_response_norm(
    x, params, stats, *, mask=None, use_running_average=False, epsilon=1e-6
):
    """Divide channels by their root mean square (Singh 2020, 1911.09737)."""
    del use_running_average  # always the same
    x, valid = _select(x, mask)
    if "extra_epsilon" in params:
        epsilon = epsilon + np.abs(_exact(params["extra_epsilon"]))
    y = _affine(x / np.sqrt(_mean(x**2, valid, _space(x)) + epsilon), params)
    if "threshold" in params:
        y = np.maximum(y, _exact(params["threshold"]))
    return _finish(y, valid), _copy(stats)


def evo_norm_b0(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    momentum=0.99,
    epsilon=1e-5,
    unbiased=False,
):
    """EvoNorm-B0: normalization and activation in one (Liu et al. 2020, 2004.02967)."""
    x, valid = _select(x, mask)
    if use_running_average:
        var, new = _exact(stats["var"]), _copy(stats)
    else:
        _, var, size = _moments(x, valid, _batch(x))
        new = _running(stats, None, var, size, momentum, unbiased)
    _, instance_var, _ = _moments(x, valid, _space(x))
    other = _exact(params["slope"]) * x + np.sqrt(instance_var + epsilon)
    z = x / np.maximum(np.sqrt(var + epsilon), other)
    return _finish(_affine(z, params), valid), new


def evo_norm_s0(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    num_groups=32,
    epsilon=1e-5,
):
    """EvoNorm-S0: swish over a group's deviation (Liu et al. 2020, 2004.02967)."""
    del use_running_average  # always the same
    x, valid = _select(x, mask)
    by_group = (*x.shape[:-1], num_groups, x.shape[-1] // num_groups)
    axes = (*range(1, x.ndim - 1), x.ndim)
    _, var, _ = _moments(x.reshape(by_group), valid.reshape(by_group), axes)
    var = np.repeat(var[..., 0], by_group[-1], axis=-1)
    # The logistic function, in a form that never overflows.
    gate = (1 + np.tanh(_exact(params["slope"]) * x / 2)) / 2
    y = _affine(x * gate / np.sqrt(var + epsilon), params)
    return _finish(y, valid), _copy(stats)


def positional_norm(
    x, params, stats, *, mask=None, use_running_average=False, epsilon=1e-5
):
    """Normalize over the features at each place (Li et al. 2019, 1907.04312)."""
    del params, use_running_average  # it has none; always the same
    x, valid = _select(x, mask)
    mean, var, _ = _moments(x, valid, -1)
    return _finish((x - mean) / np.sqrt(var + epsilon), valid), _copy(stats)


def scale_norm(x, params, stats, *, mask=None, use_running_average=False, epsilon=1e-6):
    """Vectors of one learned length (Nguyen & Salazar 2019, 1910.05895)."""
    del use_running_average  # always the same
    x, valid = _select(x, mask)
    length = np.sqrt(np.sum(x**2, -1, keepdims=True) + epsilon)
    return _finish(_exact(params.get("scale", 1.0)) * x / length, valid), _copy(stats)


def global_response_norm(
    x, params, stats, *, mask=None, use_running_average=False, epsilon=1e-6
):
    """Channels that compete by their norms (Woo et al. 2023, 2301.00808)."""
    del use_running_average  # always the same
    x, valid = _select(x, mask)
    gx = np.sqrt(np.sum(x**2, _space(x), keepdims=True))
    present = valid.any(_space(x), keepdims=True)
    nx = gx / (_mean(gx, present, -1) + epsilon)
    return _finish(_affine(x * nx, params) + x, valid), _copy(stats)


def local_response_norm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    size=5,
    alpha=1e-4,
    beta=0.75,
    k=1.0,
):
    """Divide by the energy of neighbouring features (Krizhevsky et al. 2012).

    As torch has it: alpha is divided by `size`, also at the ends.
    """
    del params, use_running_average  # it has none; always the same
    x, valid = _select(x, mask)
    energy = _window_sum(x**2, x.ndim - 1, size)
    return _finish(x / (k + alpha / size * energy) ** beta, valid), _copy(stats)


def dynamic_tanh(x, params, stats, *, mask=None, use_running_average=False):
    """No statistics, only a squashing function (Zhu et al. 2025, 2503.10622)."""
    del use_running_average  # always the same
    x, valid = _select(x, mask)
    y = _affine(np.tanh(_exact(params["alpha"]) * x), params)
    return _finish(y, valid), _copy(stats)


def act_norm(x, params, stats, *, mask=None, use_running_average=False):
    """No statistics, only scale and bias (Kingma and Dhariwal 2018, 1807.03039)."""
    del use_running_average  # always the same
    x, valid = _select(x, mask)
    return _finish(_affine(x, params), valid), _copy(stats)


def divisive_norm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    window,
    window_axes,
    epsilon=1e-6,
):
    """Normalize by the neighbourhood of each place (Ren et al. 2016, 1611.04520)."""
    del use_running_average  # always the same
    x, valid = _select(x, mask)
    axes = (window_axes,) if np.ndim(window_axes) == 0 else tuple(window_axes)
    widths = (window,) * len(axes) if np.ndim(window) == 0 else tuple(window)

    def local_mean(values):
        total, size = np.where(valid, values, 0.0), valid.astype(np.float64)
        for axis, width in zip(axes, widths, strict=True):
            total = _window_sum(total, axis, width)
            size = _window_sum(size, axis, width)
        return total / np.maximum(size, 1)

    v = np.where(valid, x - local_mean(x), 0.0)
    energy = local_mean(v**2)
    sigma = _exact(params["sigma"])
    root = np.sqrt(sigma**2 + energy + epsilon)
    return _finish(_affine(v / root, params), valid), _copy(stats)


def segment_norm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    num_segments,
    num_groups=1,
    group_size=None,
    epsilon=1e-5,
    segment_ids,
):
    """Group norm of each segment by itself (Ba et al. 2016, 1607.06450).

    With one group this is the layer norm of graphs, with one feature in each group the
    instance norm of graphs, as Fey and Lenssen (2019, 1903.02428) have them.
    """
    del use_running_average  # always the same
    x, valid = _select(x, mask)
    valid = valid & _column((segment_ids >= 0) & (segment_ids < num_segments), x)
    size = group_size or x.shape[-1] // num_groups
    y = np.zeros(x.shape)
    for s in range(num_segments):
        for first in range(0, x.shape[-1], size):
            place = segment_ids == s, ..., slice(first, first + size)
            mean, var, _ = _moments(x[place], valid[place], None)
            y[place] = (x[place] - mean) / np.sqrt(var + epsilon)
    return _finish(_affine(y, params), valid), _copy(stats)


def graph_norm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    num_segments,
    epsilon=1e-5,
    segment_ids,
):
    """Graphs less a share of their mean, over what is left (Cai 2020, 2009.03294)."""
    del use_running_average  # always the same
    x, valid = _select(x, mask)
    valid = valid & _column((segment_ids >= 0) & (segment_ids < num_segments), x)
    share = _spread(params.get("mean_scale", 1.0), x)
    y = np.zeros(x.shape)
    for s in range(num_segments):
        own = segment_ids == s
        left = x[own] - share * _mean(x[own], valid[own], _batch(x))
        square = _mean(left**2, valid[own], _batch(x))
        y[own] = left / np.sqrt(square + epsilon)
    return _finish(_affine(y, params), valid), _copy(stats)


def pair_norm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    num_segments,
    scale=1.0,
    scale_individually=False,
    epsilon=1e-5,
    segment_ids,
):
    """Graphs of the same distance of their nodes (Zhao & Akoglu 2020, 1909.12223)."""
    del params, use_running_average  # it has none; always the same
    x, valid = _select(x, mask)
    valid = valid & _column((segment_ids >= 0) & (segment_ids < num_segments), x)
    y = np.zeros(x.shape)
    for s in range(num_segments):
        own = segment_ids == s
        left = x[own] - _mean(x[own], valid[own], _batch(x))
        square = np.where(valid[own], left**2, 0.0)
        if not scale_individually:
            square = _mean(square, valid[own], _batch(x))
        y[own] = scale * left / np.sqrt(square.sum(-1, keepdims=True) + epsilon)
    return _finish(y, valid), _copy(stats)


def layer_norm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    epsilon=1e-6,
    zero_centered_scale=False,
):
    """Normalize each row of features (Ba et al. 2016, 1607.06450)."""
    del use_running_average  # always the same
    x, valid = _select(x, mask)
    mean, var, _ = _moments(x, valid, -1)
    z = (x - mean) / np.sqrt(var + epsilon)
    return _finish(_affine(z, params, zero_centered_scale), valid), _copy(stats)


def rms_norm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    epsilon=1e-6,
    zero_centered_scale=False,
    first_features=None,
):
    """Divide each row by its root mean square (Zhang & Sennrich 2019, 1910.07467)."""
    del use_running_average  # always the same
    x, valid = _select(x, mask)
    part = ..., slice(first_features)
    z = x / np.sqrt(_mean(x[part] ** 2, valid[part], -1) + epsilon)
    return _finish(_affine(z, params, zero_centered_scale), valid), _copy(stats)


def _batch_norm(
    x,
    params,
    stats,
    *,
    mask=None,
    use_running_average=False,
    momentum,
    epsilon,
    unbiased,
):
    """Plain batch norm (Ioffe & Szegedy 2015, 1502.03167)."""
    x, valid = _select(x, mask)
    if use_running_average:
        return _with_running(x, valid, params, stats, epsilon)
    mean, var, size = _moments(x, valid, _batch(x))
    y = _affine((x - mean) / np.sqrt(var + epsilon), params)
    new = _running(stats, mean, var, size, momentum, unbiased)
    return _finish(y, valid), new


def _with_running(x, valid, params, stats, epsilon):
    """Batch norm at evaluation."""
    mean, var = _exact(stats["mean"]), _exact(stats["var"])
    y = _affine((x - mean) / np.sqrt(var + epsilon), params)
    return _finish(y, valid), _copy(stats)


def _running(stats, mean, var, size, momentum, unbiased=False, least=2):
    """Statistics after one more batch; features with under 2 elements stay."""
    new = _copy(stats)
    shape = np.shape(stats["var"])
    size = np.reshape(size, shape)
    var = np.reshape(var, shape)
    if unbiased:
        var = var * size / np.maximum(size - 1, 1)
    seen = {"var": var}
    if mean is not None:
        seen["mean"] = np.reshape(mean, shape)
    for name, value in seen.items():
        moved = momentum * new[name] + (1 - momentum) * value
        new[name] = np.where(size >= least, moved, new[name])
    return new


def _copy(stats):
    """The statistics as new arrays; counts stay integers."""
    if not stats:
        return stats
    return {
        name: np.array(value if name == "count" else _exact(value))
        for name, value in stats.items()
    }


def _select(x, mask):
    """x with 0 for what is masked, and where it is valid."""
    x = _exact(x)
    valid = np.broadcast_to(True if mask is None else np.asarray(mask, bool), x.shape)
    return np.where(valid, x, 0.0), valid


def _finish(y, valid):
    return np.where(valid, y, 0.0)


def _mean(values, valid, axes, keepdims=True):
    """Mean over the valid elements; 0 where there are none."""
    valid = np.broadcast_to(valid, values.shape)
    size = np.sum(valid, axis=axes, keepdims=keepdims)
    total = np.sum(values, axis=axes, keepdims=keepdims, where=valid)
    return total / np.maximum(size, 1)


def _moments(x, valid, axes, keepdims=True):
    """Mean, biased variance and number of the valid elements."""
    mean = _mean(x, valid, axes)
    var = _mean((x - mean) ** 2, valid, axes, keepdims)
    size = np.sum(valid, axis=axes, keepdims=keepdims)
    return mean.reshape(var.shape), var, size


def _affine(z, params, zero_centered_scale=False):
    """Scale and bias, of the features or of each example's features."""
    scale = _scale(params, z)
    if zero_centered_scale and "scale" in params:
        scale = 1 + scale
    return z * scale + _spread(params.get("bias", 0.0), z)


def _scale(params, x):
    return _spread(params.get("scale", 1.0), x)


def _spread(parameter, x):
    parameter = _exact(parameter)
    if parameter.ndim == 2:
        middle = (1,) * (x.ndim - 2)
        return parameter.reshape(len(x), *middle, x.shape[-1])
    return parameter


def _parameter_gradient(product, parameter):
    """Sum over what shares an element of the parameter."""
    if parameter is not None and np.ndim(parameter) == 2:
        return product.sum(_space(product))
    return product.sum(_batch(product))


def _window_sum(values, axis, width):
    """Sum over [i - width // 2, i + (width - 1) // 2] along the axis."""
    moved = np.moveaxis(values, axis, 0)
    total = np.zeros(moved.shape)
    for i in range(len(moved)):
        total[i] = moved[max(i - width // 2, 0) : i + (width - 1) // 2 + 1].sum(0)
    return np.moveaxis(total, 0, axis)


def _column(values, x):
    """One of `values` for each example of x."""
    return np.reshape(values, (-1, *[1] * (x.ndim - 1)))


def _softmax(weights):
    raised = np.exp(_exact(weights) - np.max(weights))
    return raised / raised.sum()


def _batch(x):
    return tuple(range(x.ndim - 1))


def _space(x):
    return tuple(range(1, x.ndim - 1))


def _exact(a):
    return np.asarray(a, np.float64)
