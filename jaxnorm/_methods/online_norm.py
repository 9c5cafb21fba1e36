r"""Online normalization (Chiley et al., 2019, https://arxiv.org/abs/1905.05894).

    z_t = \frac{x_t - \hat\mu_t}{\sqrt{\hat\sigma_t^2 + \epsilon}}
    y_t = \frac{z_t}{\sqrt{\mathrm{mean}(z_t^2) + \epsilon}} \gamma + \beta

Statistics over: all examples before, one by one, in the backward pass as well; then the
    example's own elements.
Take it for: examples that come one by one, and batches of any size: the result does not
    depend on how the stream is split.
Not for: forward-mode derivatives, and optimizers that cannot leave the controls to
    plain gradient descent.
"""

from collections.abc import Sequence
from typing import Any, cast

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _devices as devices
from jaxnorm import _running as running
from jaxnorm._arguments import as_share, check_known
from jaxnorm._axes import Axes, Shape
from jaxnorm._base import Params, Stats
from jaxnorm._exact import two_sum
from jaxnorm._methods import _control as control
from jaxnorm._methods._online_rule import Stream, online, scaled
from jaxnorm._moments import Moments
from jaxnorm._reduce import moments
from jaxnorm._sharding import vary_together
from jaxnorm._standardize import standardize
from jaxnorm._stateful import StatefulNorm
from jaxnorm._working import as_mask


class OnlineNorm(StatefulNorm):
    """Normalizes a stream of examples one by one, each by the examples before it, and
    keeps their gradients in check by two running statistics.

    These are the parameters "control_product" and "control_mean", see
    `jaxnorm.models.control_labels`. With `axis_name`, each device reads its share of
    the batch as a stream of its own, and the statistics are averaged after it.

    Attributes:
        epsilon: added to the variance.
        axis_name: mapped axis, or several, to average the statistics over.
        axis_index_groups: groups of indices along `axis_name` to average within.
        momentum: weight of the old statistics, per example.
        control_momentum: weight of the old controls, per example.
        layer_scaling: divide each example by its root mean square.
        axis: the feature axis or axes.
    """

    real_only = True
    param_names = ("scale", "bias", "control_product", "control_mean")
    controls = ("control_product", "control_mean")
    center = False
    epsilon: float = 1e-5
    momentum: float = 0.999
    control_momentum: float = 0.99
    layer_scaling: bool = True
    axis: int | Sequence[int] = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        # Settings of the backward pass, which is a rule of its own.
        check_known("epsilon", self.epsilon)
        check_known("control_momentum", self.control_momentum)
        as_share("control_momentum", self.control_momentum)

    def axes(self, shape: Shape) -> Axes:
        return Axes.per_example(shape, self.axis)

    def init_params(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """Ones for the scale, zeros for the bias and for the controls."""
        names = ("control_product", "control_mean")
        controls = {k: jnp.zeros(feature_shape, jnp.float32) for k in names}
        return super().init_params(feature_shape, dtype) | controls

    def init_stats(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """Mean 0 and variance 1."""
        return running.init_stats(feature_shape, dtype=dtype)

    def train(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> tuple[Array, dict[str, Array]]:
        axes = self.axes(x.shape)
        running.check(stats, axes, ("mean", "var"))
        each = moments(x, axes, mask=mask)
        old, new = self._stream(each, running.read(stats, axes, x.dtype))
        y = self._normalized(x, params, old, mask, dtype)
        peers = self.peers()
        count = devices.group_sum(jnp.ones((), new[0].dtype), peers)
        new = [devices.group_sum(v, peers) / count for v in new]
        new = {"mean": new[0], "var": new[1]}
        return y, running.replaced(stats, new, running.all_finite(*new.values()))

    def evaluate(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> Array:
        axes = self.axes(x.shape)
        kept = running.read(stats, axes, x.dtype)
        mask = as_mask(mask, x.shape)
        rstd = kept.rstd(self.epsilon)
        y = standardize(x, kept.mean, rstd, axes, mask=mask, dtype=rstd.dtype)
        scale, bias = self._affine(params)
        z = scaled(self._plan(x, dtype), mask, y, scale, bias)
        return z.astype(x.dtype if dtype is None else dtype)

    def _stream(
        self, each: Moments, start: Moments
    ) -> tuple[Moments, tuple[Array, Array]]:
        """Statistics before each example, and after the last."""
        each = each.broadcast_to(each.var.shape)

        def step(state: tuple[Array, ...], example: Array) -> tuple[Any, Any]:
            mean, var, residue = state
            m, v, n, r = (e[None] for e in example)
            keep = lax.stop_gradient(jnp.asarray(self.momentum, var.dtype))
            offset = (m - mean) + (r - residue)
            moved, rest = two_sum(mean, residue + (1 - keep) * offset)
            spread = keep * var + (1 - keep) * (v + keep * offset * offset)
            new = moved, spread, rest
            both = zip(new, state, strict=True)
            return tuple(jnp.where(n > 0, *v) for v in both), tuple(v[0] for v in state)

        zero = jnp.zeros_like(start.mean)
        first = tuple(vary_together(each.var, start.mean, start.var, zero))
        last, (mean, var, residue) = lax.scan(
            step, first, cast(Any, lax.stop_gradient(each))
        )
        return Moments(mean, var, 1, residue), last[:2]

    def _normalized(
        self,
        x: Array,
        params: Params,
        m: Moments,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> Array:
        axes, wide = self.axes(x.shape), m.var.dtype
        controls = [
            control.as_control(k, params.get(k), axes, wide)
            for k in self.param_names[2:]
        ]
        plan = self._plan(x, dtype, *controls)
        arrays = (
            m.mean,
            m.rstd(self.epsilon),
            m.residue,
            *self._affine(params),
            *controls,
        )
        arrays = vary_together(x, *arrays)
        return cast(Array, online(plan, x, as_mask(mask, x.shape), *arrays))

    def _affine(self, params: Params) -> list[Array | None]:
        values = (params.get(k) for k in ("scale", "bias"))
        return [None if v is None else jnp.asarray(v) for v in values]

    def _plan(self, x: Array, dtype: DTypeLike | None, *controls: Array) -> "Stream":
        return Stream(
            self.axes(x.shape),
            jnp.dtype(x.dtype if dtype is None else dtype),
            self.epsilon,
            self.control_momentum,
            self.layer_scaling,
            tuple(control.copies(c, x) for c in controls),
        )


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
            offset = own_mean - mean
            mean += (1 - momentum) * offset
            var = momentum * (var + (1 - momentum) * offset**2)
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
    `jaxnorm.models.control_labels`. There is no forward mode.

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
