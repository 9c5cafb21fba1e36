r"""Power normalization (Shen et al., 2020, https://arxiv.org/abs/2003.07845).

    y = \frac{x}{\sqrt{\hat\nu + \epsilon}} \gamma + \beta
    \hat\nu \leftarrow m \hat\nu + (1 - m) \frac{1}{n} \sum x^2

Statistics over: all batches before, by a moving average of the mean square; the
    backward pass corrects for it.
Take it for: transformers whose batches differ so much that the statistics of one are
    noise.
Not for: forward-mode derivatives, and optimizers that cannot leave the control to plain
    gradient descent.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _running as running
from jaxnorm._axes import Axes, Shape
from jaxnorm._base import Params, Stats
from jaxnorm._methods._control import as_control, controlled
from jaxnorm._moments import Moments
from jaxnorm._stateful import RunningNorm


class PowerNorm(RunningNorm):
    """Divides by the running root mean square, at training as at evaluation; the
    backward pass is corrected by a running statistic of gradients.

    That statistic is the parameter "control", see `jaxnorm.models.control_labels`.

    Attributes:
        epsilon: added to the mean square.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        momentum: weight of the old statistics.
        unbiased: keep the mean square times n / (n - 1).
        axis: the feature axis or axes.
    """

    real_only = True
    param_names = ("scale", "bias", "control")
    controls = ("control",)
    center = False
    stat_names = ("var",)
    counts_batches = False
    epsilon: float = 1e-5
    momentum: float = 0.9
    axis: int | Sequence[int] = -1

    def axes(self, shape: Shape) -> Axes:
        return Axes.keep(shape, self.axis)

    def init_params(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """Ones for the scale, zeros for the bias and for the control."""
        return super().init_params(feature_shape, dtype) | {
            "control": jnp.zeros(feature_shape, jnp.float32)
        }

    def by_batch(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> tuple[Array, Moments]:
        axes = self.axes(x.shape)
        m = self.batch_moments(x, mask)
        rstd = running.read(stats, axes, x.dtype, stat_names=self.stat_names).rstd(
            self.epsilon
        )
        rate = jnp.asarray(1 - self.momentum, rstd.dtype)
        y = controlled(
            _renewed,
            x,
            axes,
            rstd,
            as_control("control", params.get("control"), axes, rstd.dtype),
            (m.var * rstd * rstd, rate),
            size=m.size,
            params=params,
            mask=mask,
            dtype=dtype,
            peers=self.peers(),
        )
        return y, m


def _renewed(
    product: Array, control: Array, power: Array, rate: Array
) -> tuple[Array, Array]:
    """The correction for this batch, and the one for the next."""
    return control, control + rate * (product - control * power)


def power_norm(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    control: ArrayLike | None = None,
    *,
    use_running_average: bool | ArrayLike,
    axis: int | Sequence[int] = -1,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    unbiased: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """Divides each feature of `x` by its running root mean square.

        z = x / sqrt(stats["var"] + epsilon)
        y = z * scale + bias
        stats = {"var": momentum * stats["var"] + (1 - momentum) * (x**2).mean()}

    A step is normalized by the statistics before it. Its gradient is not the derivative
    of that, in which the statistics would be constant, but

        g = dy * scale - control * z
        dx = g / sqrt(stats["var"] + epsilon)
        new_control = control + (1 - momentum) * (g * z).mean()

    and `control - new_control` is the gradient of `control`: see
    `jaxnorm.models.control_labels`. There is no forward mode.

    Args:
        stats: {"var"}, of the shape of the features, from `PowerNorm().init_stats`.
        control: of the shape of the features, zeros at first; None is no correction.
        momentum: weight of the old statistics.

    All else is as in `jaxnorm.batch_norm`; the mean is not subtracted.

    Source: Shen, Yao, Gholami, Mahoney and Keutzer, 2020; without their warm-up and
    layer scale.

    >>> import jax.numpy as jnp, jaxnorm, numpy as np
    >>> y, stats = jaxnorm.power_norm(
    ...     jnp.array([[1.0], [3.0]]),
    ...     jaxnorm.PowerNorm().init_stats((1,)),
    ...     use_running_average=False,
    ... )
    >>> print(np.asarray(y).round(3).ravel(), np.asarray(stats["var"]).round(3))
    [1. 3.] [1.4]
    """
    norm = PowerNorm(
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased=unbiased,
    )
    params = {"scale": scale, "bias": bias, "control": control}
    return norm(x, params, stats, use_running_average=use_running_average, mask=mask)
