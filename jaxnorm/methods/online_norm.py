"""Online normalization (Chiley et al., 2019, https://arxiv.org/abs/1905.05894)."""

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxnorm import axes, control, devices, running
from jaxnorm.arguments import as_share, check_known
from jaxnorm.axes import Axes
from jaxnorm.base import StatefulNorm, Stats, method
from jaxnorm.devices import vary_together
from jaxnorm.moments import Moments, as_mask, moments
from jaxnorm.normalize import normalize
from jaxnorm.standardize import standardize, unfold


@method
class OnlineNorm(StatefulNorm):
    """Normalizes a stream of examples one by one, each by the examples before it, and
    keeps their gradients in check by two running statistics.

    These are the parameters "control_product" and "control_mean", see
    `jaxnorm.control_labels`. With `axis_name`, each device reads its share of the batch
    as a stream of its own, and the statistics are averaged after it.
    """

    real = True
    params = ("scale", "bias", "control_product", "control_mean")
    center = False
    epsilon: float = 1e-5
    momentum: float = 0.999
    control_momentum: float = 0.99
    layer_scaling: bool = True
    axis: int | Sequence[int] = -1

    def __post_init__(self):
        super().__post_init__()
        # Settings of the backward pass, which is a rule of its own.
        check_known("epsilon", self.epsilon)
        check_known("control_momentum", self.control_momentum)
        as_share("control_momentum", self.control_momentum)

    def axes(self, shape):
        return axes.per_example(shape, self.axis)

    def init_params(self, feature_shape, dtype=jnp.float32):
        """Ones for the scale, zeros for the bias and for the controls."""
        names = ("control_product", "control_mean")
        controls = {k: jnp.zeros(feature_shape, jnp.float32) for k in names}
        return super().init_params(feature_shape, dtype) | controls

    def init_stats(self, feature_shape, dtype=jnp.float32):
        """Mean 0 and variance 1."""
        return running.init_stats(feature_shape, dtype=dtype)

    def train(self, x, params, stats, *, mask, dtype):
        where = self.axes(x.shape)
        running.check(stats, where, ("mean", "var"))
        each = moments(x, where, mask=mask)
        old, new = self._stream(each, running.read(stats, where, x.dtype))
        y = self._normalized(x, params, old, mask, dtype)
        name, groups = self.axis_name, self.axis_index_groups
        count = devices.group_sum(jnp.ones((), new[0].dtype), name, groups)
        new = [devices.group_sum(v, name, groups) / count for v in new]
        new = {"mean": new[0], "var": new[1]}
        return y, running.replaced(stats, new, running.all_finite(*new.values()))

    def evaluate(self, x, params, stats, *, mask, dtype):
        where = self.axes(x.shape)
        kept = running.read(stats, where, x.dtype)
        mask = as_mask(mask, x.shape)
        rstd = kept.rstd(self.epsilon)
        y = standardize(x, kept.mean, rstd, where, mask=mask, dtype=rstd.dtype)
        z = _scaled(
            self._plan(x, dtype), mask, y, params.get("scale"), params.get("bias")
        )
        return z.astype(x.dtype if dtype is None else dtype)

    def _stream(self, each: Moments, start: Moments):
        """Statistics before each example, and after the last."""
        size = jnp.broadcast_to(jnp.asarray(each.size), each.var.shape)

        def step(state, example):
            mean, var = state
            m, v, n = (e[None] for e in example)
            keep = lax.stop_gradient(jnp.asarray(self.momentum, var.dtype))
            apart = m - mean
            moved = mean + (1 - keep) * apart
            spread = keep * var + (1 - keep) * (v + keep * apart * apart)
            state = jnp.where(n > 0, moved, mean), jnp.where(n > 0, spread, var)
            return state, (mean[0], var[0])

        first = tuple(vary_together(each.var, start.mean, start.var))
        examples = lax.stop_gradient((each.mean, each.var, size))
        last, before = lax.scan(step, first, examples)
        return Moments(*before, 1), last

    def _normalized(self, x, params, m, mask, dtype):
        where, wide = self.axes(x.shape), m.var.dtype
        affine = [params.get(k) for k in self.params[:2]]
        affine = [None if v is None else jnp.asarray(v) for v in affine]
        controls = [
            control.as_control(k, params.get(k), where, wide) for k in self.params[2:]
        ]
        plan = self._plan(x, dtype, *controls)
        arrays = vary_together(x, m.mean, m.rstd(self.epsilon), *affine, *controls)
        return cast(Array, _online(plan, x, as_mask(mask, x.shape), *arrays))

    def _plan(self, x, dtype, *controls):
        return Plan(
            self.axes(x.shape),
            jnp.dtype(x.dtype if dtype is None else dtype),
            self.epsilon,
            self.control_momentum,
            self.layer_scaling,
            tuple(control.copies(c, x) for c in controls),
        )


class Plan(NamedTuple):
    """What is known before any array is."""

    axes: Axes
    dtype: jnp.dtype
    epsilon: float
    momentum: float
    layer_scaling: bool
    copies: tuple[int, ...]


def _scaled(plan, mask, y, scale, bias):
    """Each example divided by its root mean square, then scaled and shifted."""
    where = plan.axes
    if not plan.layer_scaling:
        zero, one = jnp.zeros((), y.dtype), jnp.ones((), y.dtype)
        return standardize(y, zero, one, where, scale=scale, bias=bias, mask=mask)
    whole = where._replace(reduce=tuple(range(1, len(where.shape))))
    params = {"scale": scale, "bias": bias}
    return normalize(y, params, whole, epsilon=plan.epsilon, center=False, mask=mask)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _online(plan, x, mask, mean, rstd, scale, bias, product, shift):
    y = standardize(x, mean, rstd, plan.axes, mask=mask, dtype=mean.dtype)
    return _scaled(plan, mask, y, scale, bias).astype(plan.dtype)


def _forward(plan, *args):
    return _online(plan, *args), args


def _backward(plan, args, dz):
    x, mask, mean, rstd, scale, bias, product, shift = args
    where, rate = plan.axes, 1 - plan.momentum
    y = standardize(x, mean, rstd, where, mask=mask, dtype=mean.dtype)
    _, pull = jax.vjp(functools.partial(_scaled, plan, mask), y, scale, bias)
    g, dscale, dbias = pull(dz.astype(y.dtype))
    count = jnp.broadcast_to(True if mask is None else mask, x.shape)
    count = count.sum(where.reduce, keepdims=True).astype(y.dtype)
    means = [
        v.sum(where.reduce, keepdims=True) / jnp.maximum(count, 1)
        for v in (g * y, y * y, g, y)
    ]

    def step(state, example):
        product, shift = state
        gy, yy, g, y, rstd, valid = (e[None] for e in example)
        gone = (g - rate * product * y) * rstd - rate * shift
        after = product + gy - rate * product * yy, shift + valid * gone
        return after, (product[0], shift[0])

    valid = (count > 0).astype(y.dtype)
    rstds = jnp.broadcast_to(rstd, valid.shape)
    new, before = lax.scan(step, (product, shift), (*means, rstds, valid))
    dx = (g - rate * before[0] * y) * rstd - rate * before[1]
    controls = (
        control.renewal(old, v, copies, x)
        for old, v, copies in zip((product, shift), new, plan.copies, strict=True)
    )
    return unfold(dx, mask, where, x.dtype), None, None, None, dscale, dbias, *controls


_online.defvjp(_forward, _backward)


def online_norm(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    control_product: ArrayLike | None = None,
    control_mean: ArrayLike | None = None,
    *,
    use_running_average: bool | ArrayLike,
    axis: int | Sequence[int] = -1,
    momentum: float = 0.999,
    control_momentum: float = 0.99,
    layer_scaling: bool = True,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Normalizes each example by the running statistics of those before it.

        for x[t]:  # with own_mean, own_var: its moments over space
            y[t] = (x[t] - mean) / sqrt(var + epsilon)
            apart = own_mean - mean
            mean += (1 - momentum) * apart
            var = momentum * (var + (1 - momentum) * apart**2)
                  + (1 - momentum) * own_var
        z = y / sqrt((y**2).mean(all_but_batch) + epsilon) * scale + bias

    A batch of n is the same as n batches of one, at the speed of a batch. Gradients of
    `scale` and `bias`, and through the last line, are the derivatives. From the
    gradient g of y, that of x removes what would change the mean and scale of y:

        for g[t]:
            h = g[t] - (1 - control_momentum) * control_product * y[t]
            control_product += (h * y[t]).mean(space)
            dx[t] = h / sqrt(var + epsilon) - (1 - control_momentum) * control_mean
            control_mean += dx[t].mean(space)

    and the old controls less the new ones are their gradients: see
    `jaxnorm.control_labels`. There is no forward mode.

    Args:
        stats: {"mean", "var"}, from `init_stats`; with `use_running_average=True` they
            stay as they are.
        control_product, control_mean: of the shape of the features, zeros at first;
            None is zeros.
        momentum, control_momentum: weights of the old statistics, per example.
        layer_scaling: divide each example by its root mean square.
        axis_name: mapped axis, or several, over whose devices the statistics are
            averaged after the batch.

    All else is as in `jaxnorm.batch_norm`.

    Source: Chiley, Sharapov, Kosson, Koster, Reece, Samaniego de la Fuente, Subbiah and
    James, 2019; here scale and bias come last.

    >>> import jax.numpy as jnp, jaxnorm
    >>> y, stats = jaxnorm.online_norm(
    ...     jnp.array([[1.0], [3.0]]),
    ...     jaxnorm.init_stats(1),
    ...     use_running_average=False,
    ...     momentum=0.5,
    ...     layer_scaling=False,
    ... )
    >>> print(y.round(3).ravel(), stats["mean"])
    [1.    2.887] [1.75]
    """
    norm = OnlineNorm(
        momentum=momentum,
        control_momentum=control_momentum,
        layer_scaling=layer_scaling,
        axis=axis,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    params = {"scale": scale, "bias": bias}
    params |= {"control_product": control_product, "control_mean": control_mean}
    return norm(x, params, stats, use_running_average=use_running_average, mask=mask)
