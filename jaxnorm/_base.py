"""What a normalization method is, and the two pipelines that most of them share."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar, cast, dataclass_transform, final

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _devices as devices
from jaxnorm import _running as running
from jaxnorm._activation import as_activation
from jaxnorm._arguments import (
    as_array,
    as_bool,
    as_dtype,
    as_epsilon,
    as_feature_shape,
    as_integer,
    as_integers,
    as_momentum,
    as_name,
    as_real,
    as_shape,
    check_mapping,
    check_real,
    optional,
)
from jaxnorm._arguments import as_flag as as_flag
from jaxnorm._axes import Axes, Shape
from jaxnorm._dtypes import as_floating, at_least_float32, out_dtype, promote
from jaxnorm._methods._control import NAMES as CONTROLS
from jaxnorm._moments import Moments, moments
from jaxnorm._normalize import as_implementation, normalize
from jaxnorm._running import as_arrays
from jaxnorm._standardize import standardize

Params = Mapping[str, ArrayLike | None]  # {"scale", "bias"} for most methods
Stats = Mapping[str, ArrayLike]  # {"mean", "var"} for methods with running statistics


Init = TypeVar("Init", bound=Callable[..., dict[str, Array]])

# By the name of a setting, or else by its type.
CHECKS: dict[Any, Callable[[str, Any], Any]] = {
    "epsilon": as_epsilon,
    "momentum": as_momentum,
    "axis_name": lambda _, value: devices.as_axis_name(value),
    "axis_index_groups": lambda _, value: devices.as_groups(value),
    "activation": as_activation,
    "implementation": as_implementation,
    bool: as_bool,
    int: as_integer,
    int | None: optional(as_integer),
    float: as_real,
    float | None: optional(as_real),
    str | None: as_name,
    tuple[int, ...]: as_shape,
    int | Sequence[int]: as_integers,
    int | Sequence[int] | None: optional(as_integers),
}


@functools.cache
def _checks(kind: type) -> list[tuple[str, Callable[[str, Any], Any]]]:
    """The settings of `kind`, and what checks each."""
    fields = dataclasses.fields(kind)
    checks = {f.name: CHECKS.get(f.name) or CHECKS.get(f.type) for f in fields}
    return [(name, check) for name, check in checks.items() if check]


@dataclass_transform(frozen_default=True, kw_only_default=True)
def method(cls):
    """A frozen dataclass: comparable, hashable, and safe as a static argument."""
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def _initializer(init: Init) -> Init:
    """`init` of arguments that have been checked, whichever method it is of."""

    @functools.wraps(init)
    def checked(self, feature_shape, dtype=jnp.float32):
        shape = as_feature_shape("feature_shape", feature_shape)
        return init(self, shape, as_dtype("dtype", dtype))

    return cast(Init, checked)


@method
class Norm(abc.ABC):
    """Settings of a normalization, and the pure function that they configure.

    `epsilon` is added to the variance. With `axis_name` (one name or several), the
    statistics are pooled over the devices along those axes of a shard_map, pmap or
    vmap; with `axis_index_groups`, within each group of their indices.
    """

    epsilon: float = 1e-6
    axis_name: str | tuple[str, ...] | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    param_names: ClassVar[tuple[str, ...]] = ("scale", "bias")  # names a call may pass
    required_inputs: ClassVar[tuple[str, ...]] = ()  # names a call must pass, beside x
    optional_inputs: ClassVar[tuple[str, ...]] = ()  # names a call may pass, beside x
    center: ClassVar[bool] = True
    can_sync: ClassVar[bool] = True  # whether devices can share statistics
    has_stats: ClassVar[bool] = True  # whether the method keeps statistics
    real_only: ClassVar[bool] = False  # whether complex numbers are refused

    def __post_init__(self):
        for name, check in _checks(type(self)):
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.axis_name is not None and not self.can_sync:
            raise ValueError(
                f"{type(self).__name__} shares nothing between devices, got axis_name="
                f"{self.axis_name!r}: leave it out"
            )

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for name in ("init_params", "init_stats"):
            if name in vars(cls):
                setattr(cls, name, _initializer(vars(cls)[name]))

    @abc.abstractmethod
    def axes(self, shape: Shape) -> Axes:
        """Which axes of an array of `shape` are reduced and which carry parameters."""

    @_initializer
    def init_params(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """Ones for the scale, zeros for the bias, in the shape of the features."""
        fill = {"scale": jnp.ones, "bias": jnp.zeros}
        return {
            k: v(feature_shape, dtype) for k, v in fill.items() if k in self.param_names
        }

    @abc.abstractmethod
    def init_stats(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """The statistics before any step; empty for a method that keeps none."""

    @abc.abstractmethod
    def apply(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        use_running_average: bool | Array,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
        **inputs: Any,
    ) -> tuple[Array, dict[str, Array]]:
        """What `__call__` does, and no error for a variance of single values."""

    @final
    def __call__(
        self,
        x: ArrayLike,
        params: Params,
        stats: Stats,
        *,
        use_running_average: bool | ArrayLike = False,
        mask: ArrayLike | None = None,
        dtype: DTypeLike | None = None,
        **inputs: Any,
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the normalized array, in `dtype` or that of `x`, and the statistics.

        With `use_running_average` (which may be traced) a method with running
        statistics normalizes by these and returns them as they are. `mask` is boolean,
        or 0 and 1, and broadcasts to `x`: what it excludes counts for nothing and comes
        out as 0. Integers are read as float32. `inputs` are what the method's `inputs`
        name, such as the domain of each example; few methods have any.

        Raises ValueError or TypeError where shapes, dtypes or settings do not fit, and
        where each variance would be that of a single value.
        """
        x, flag = as_floating(x), as_flag(use_running_average)
        running.check_kind(stats)
        self.check_call(x, params, inputs)
        dtype = None if dtype is None else out_dtype(x, dtype)
        problem = self.single_value_problem(x.shape, running.RUNNING in stats or flag)
        if problem:
            raise ValueError(problem)
        return self.apply(
            x, params, stats, use_running_average=flag, mask=mask, dtype=dtype, **inputs
        )

    def check_call(self, x: Array, params: Params, inputs: Mapping[str, Any]) -> None:
        """Raises unless `params` and `inputs` hold what the method names, and the
        method takes numbers such as `x`."""
        kind = type(self).__name__
        if self.real_only and jnp.iscomplexobj(x):
            raise TypeError(
                f"{kind} takes real numbers, got {x.dtype}: batch, group, layer and "
                "RMS norm take complex ones"
            )
        check_mapping("params", params, "init_params")
        unknown = sorted(set(params) - set(self.param_names))
        if unknown:
            raise ValueError(
                f"{kind} has no parameter {unknown}: it takes {list(self.param_names)}"
            )
        for k, v in params.items():
            if v is not None:
                check_real(k, as_array(k, v), x)
        if set(inputs) - set(self.optional_inputs) != set(self.required_inputs):
            raise TypeError(
                f"{kind} is called with the inputs {list(self.required_inputs)} beside "
                f"x, got {sorted(inputs)}: pass exactly those, by name"
            )

    def single_value_problem(self, shape: Shape, flag: bool | Array) -> str | None:
        """What to say if each statistic of an array of `shape` has a single value."""
        if not self.center or flag is True:
            return None
        size = self.axes(shape).size
        count = self.check_bound()
        if size * count != 1:
            return None
        return (
            f"{type(self).__name__} over an input of shape {shape} would take each "
            "variance of one single value, so that everything becomes 0: give it more "
            "examples or positions, pool over devices with axis_name, or, for a method "
            "with running statistics, pass use_running_average=True"
        )

    @final
    def normalize_by_batch(
        self,
        x: Array,
        params: Params,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
        **options: Any,
    ) -> tuple[Array, Moments]:
        """`x` normalized by its `batch_moments`, and these.

        `options` are the activation, residual and implementation of `normalize`.
        """
        return normalize(
            x,
            params,
            self.axes(x.shape),
            epsilon=self.epsilon,
            center=self.center,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            dtype=dtype,
            **options,
        )

    @final
    def batch_moments(self, x: Array, mask: ArrayLike | None) -> Moments:
        """The moments of `x` over `axes`, pooled over devices."""
        own = moments(x, self.axes(x.shape), mask=mask, center=self.center)
        return self.sync(own)

    @final
    def peers(self) -> devices.Peers | None:
        """The devices that share statistics; None for this device alone."""
        return devices.peers(self.axis_name, self.axis_index_groups)

    @final
    def sync(self, m: Moments) -> Moments:
        """`m`, pooled over the devices that share statistics."""
        return devices.sync(m, self.axis_name, self.axis_index_groups)

    @final
    def normalize_by(
        self,
        x: Array,
        params: Params,
        m: Moments,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> Array:
        """`x` normalized by `m`, which may vary along more axes than `axes` keeps."""
        return standardize(
            x,
            m.mean,
            m.rstd(self.epsilon),
            self.axes(x.shape),
            scale=params.get("scale"),
            bias=params.get("bias"),
            residue=m.residue,
            mask=mask,
            dtype=dtype,
        )

    @final
    def check_bound(self) -> int:
        """The least number of devices that share statistics here; raises unless they
        can, along `axis_name`."""
        groups = cast(devices.Groups | None, self.axis_index_groups)
        return devices.group_size(self.axis_name, groups)

    def without_devices(self) -> Self:
        """The same method on one device, as needed while a module initializes."""
        return dataclasses.replace(
            cast(Any, self), axis_name=None, axis_index_groups=None
        )


def on_any_mesh(apply: Callable[..., tuple[Array, dict[str, Array]]]) -> Any:
    """The `apply` of a norm, also on a mesh of explicit axes.

    The result is sharded as `x`, and the new statistics are as the old ones.
    """

    @functools.wraps(apply)
    def call(self, x, params, stats, **others):
        if getattr(self, "implementation", None) not in (None, "xla"):
            # Kernels are parted along explicit axes, so that they can be exported.
            return apply(self, x, params, stats, **others)

        def applied(settings, others, x, params, stats):
            norm = dataclasses.replace(self, **settings) if settings else self
            return apply(norm, x, params, stats, **others)

        stats = as_arrays(stats)
        settings = {k: v for k, v in vars(self).items() if isinstance(v, Array)}
        given = settings, others, x, params, stats
        return devices.automatically(applied, *given, like=(x, stats))

    return call


@method
class StatelessNorm(Norm):
    """A norm by the moments of the array at hand, at training and evaluation alike."""

    has_stats = False

    @final
    def init_stats(self, feature_shape, dtype=jnp.float32):
        """Nothing: the method keeps no statistics."""
        return {}

    def transform(
        self,
        x: Array,
        params: Params,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> Array:
        """Normalizes by the moments over `axes`, unless a method says otherwise."""
        return self.normalize_by_batch(x, params, mask=mask, dtype=dtype)[0]

    @final
    @on_any_mesh
    def apply(self, x, params, stats, *, use_running_average, mask, dtype, **inputs):
        self.check_bound()
        unknown = sorted(running.without(stats, running.MARKS))
        if unknown:
            raise ValueError(
                f"{type(self).__name__} keeps no statistics, but stats holds "
                f"{unknown}: pass {{}}"
            )
        y = self.transform(x, params, mask=mask, dtype=dtype, **inputs)
        return y, as_arrays(stats)


@method
class ReductionNorm(StatelessNorm):
    """A norm over `reduction_axes`, with parameters along `feature_axes`.

    With `zero_centered_scale` the scale is kept less 1, so that weight decay draws it
    to 1.
    """

    reduction_axes: int | Sequence[int] = -1
    feature_axes: int | Sequence[int] = -1
    zero_centered_scale: bool = False
    implementation: str | None = None

    @final
    def axes(self, shape):
        return Axes.over(shape, self.reduction_axes, self.feature_axes)

    @final
    def init_params(self, feature_shape, dtype=jnp.float32):
        params = super().init_params(feature_shape, dtype)
        if self.zero_centered_scale:
            params["scale"] = jnp.zeros(feature_shape, dtype)
        return params

    @final
    def transform(self, x, params, *, mask, dtype):
        scale = params.get("scale")
        if self.zero_centered_scale and scale is not None:
            scale = jnp.asarray(scale)
            wide = promote(at_least_float32(x.dtype), scale.dtype)
            params = {**params, "scale": scale.astype(wide) + 1}
        how = {"mask": mask, "dtype": dtype, "implementation": self.implementation}
        return self.normalize_by_batch(x, params, **how)[0]


@method
class StatefulNorm(Norm):
    """A norm that learns statistics at training and uses them at evaluation."""

    momentum: float | None = 0.99
    counts_batches: ClassVar[bool] = False  # whether momentum=None averages all batches
    keeps_moments: ClassVar[bool] = (
        False  # whether the statistics are moments of the data
    )

    def __post_init__(self):
        super().__post_init__()
        if self.momentum is None and not self.counts_batches:
            raise ValueError(
                f"{type(self).__name__} does not count batches to average over all of "
                "them, as momentum=None asks for: give a weight from 0 to 1"
            )

    @abc.abstractmethod
    def train(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> tuple[Array, dict[str, Array]]:
        """The normalized batch, and the statistics after it."""

    @abc.abstractmethod
    def evaluate(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> Array:
        """`x` normalized by `stats`."""

    @final
    def check_stats(self, stats: Stats, shape: Shape) -> None:
        """Raises unless `stats` hold what `init_stats` makes for inputs of `shape`."""
        running.require(stats, self._expected(shape))
        self._check_given(as_arrays(stats), shape)

    def _check_given(self, stats: Mapping[str, Array], shape: Shape) -> None:
        """Raises for statistics that `init_stats` makes in another way, or not."""
        expected = self._expected(shape)
        # Methods that keep but one of mean and var leave the other as it is.
        known = {"mean", "var", *expected, *running.MARKS}
        unknown = sorted(set(stats) - known)
        if unknown:
            raise ValueError(
                f"stats holds {unknown}, but {self} keeps {sorted(expected)}: start "
                "from its init_stats"
            )
        for k, (like, integer) in expected.items():
            if k in stats and jnp.shape(stats[k]) != like:
                raise ValueError(
                    f"stats[{k!r}] has shape {jnp.shape(stats[k])}, but for an input "
                    f"of shape {shape} it is {like}: start from init_stats of {self}"
                )
            if k in stats and integer == jnp.issubdtype(stats[k].dtype, jnp.inexact):
                raise TypeError(
                    f"stats[{k!r}] is {stats[k].dtype}: start from init_stats of {self}"
                )

    def _expected(self, shape: Shape) -> dict[str, tuple[Shape, bool]]:
        """The shape of each statistic for inputs of `shape`, and whether it counts."""
        features = self.axes(shape).feature_shape
        try:
            hash(self)
        except TypeError:  # as with a setting that is traced
            return _initial.__wrapped__(self, features)
        return _initial(self, features)

    @final
    @on_any_mesh
    def apply(self, x, params, stats, *, use_running_average, mask, dtype, **inputs):
        flag, args = use_running_average, {"mask": mask, "dtype": dtype, **inputs}
        by_running, held = running.RUNNING in stats, running.HELD in stats
        if running.BATCH[0] in stats and not self.keeps_moments:
            raise ValueError(
                f"the statistics of {type(self).__name__} are no moments of the data, "
                "so those of several batches cannot be pooled: leave its layers out"
            )
        same = as_arrays(stats)
        own = running.without(same, running.SWITCHES)
        self._check_given(own, x.shape)
        if flag is True or (by_running and held):
            return self.evaluate(x, params, own, **args), same
        self.check_bound()
        if flag is not False or held:
            params = _held_controls(params, held or flag)
        y, new = self.train(x, params, own, **args)
        new = same if held else same | new
        if by_running:
            y = self.evaluate(x, params, own, **args)
        if flag is False:
            return y, new
        kept = self.evaluate(x, params, own, **args), same
        return jax.tree.map(lambda a, b: jnp.where(flag, a, b), kept, (y, new))


@functools.lru_cache(256)
def _initial(norm: Norm, features: Shape) -> dict[str, tuple[Shape, bool]]:
    stats = jax.eval_shape(lambda: norm.init_stats(features))
    return {
        k: (v.shape, jnp.issubdtype(v.dtype, jnp.integer)) for k, v in stats.items()
    }


def _held_controls(params: Params, when: bool | Array) -> dict[str, ArrayLike]:
    """`params`, whose controls a backward pass does not renew `when` it must not."""
    return {
        k: jnp.where(when, lax.stop_gradient(v), v) if k in CONTROLS else v
        for k, v in params.items()
        if v is not None
    }


@method
class RunningNorm(StatefulNorm):
    """A norm by batch moments at training and by their moving average at evaluation.

    `momentum` is the weight of the old statistics at each step; None keeps the average
    over all batches instead. With `unbiased` the variance kept is the unbiased one, as
    in PyTorch; the batch is always normalized by the biased one.
    """

    unbiased: bool = False
    counts_batches = True
    keeps_moments = True
    stat_names: ClassVar[tuple[str, ...]] = ("mean", "var")

    @abc.abstractmethod
    def by_batch(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> tuple[Array, Moments]:
        """Normalizes by the batch; returns the moments that the running ones follow,
        one of each per feature."""

    def init_stats(self, feature_shape, dtype=jnp.float32):
        """Mean 0 and variance 1, and a count where `momentum` is None."""
        return running.init_stats(
            feature_shape,
            momentum=self.momentum,
            dtype=dtype,
            stat_names=self.stat_names,
        )

    def train(self, x, params, stats, *, mask, dtype, **inputs):
        y, m = self.by_batch(x, params, stats, mask=mask, dtype=dtype, **inputs)
        return y, self.updated(stats, m, x.shape)

    def stats_axes(self, shape: Shape) -> Axes:
        """Axes whose features have the shape of the running statistics."""
        return self.axes(shape)

    @final
    def updated(self, stats: Stats, m: Moments, shape: Shape) -> dict[str, Array]:
        """The statistics, moved towards those of a batch of `shape`, or with its
        moments pooled into those of batches before."""
        if running.BATCH[0] in stats:
            return running.pooled(stats, m, self.stats_axes(shape))
        return running.update_stats(
            stats,
            m,
            self.stats_axes(shape),
            momentum=self.momentum,
            unbiased=self.unbiased,
            stat_names=self.stat_names,
            least=2 if self.center else 1,
        )

    def evaluate(self, x, params, stats, *, mask, dtype):
        m = running.read(stats, self.axes(x.shape), x.dtype, stat_names=self.stat_names)
        return self.normalize_by(x, params, m, mask=mask, dtype=dtype)
