"""What a normalization is: settings, and the pure function that they configure."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar, cast, final

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _devices as devices
from jaxnorm import _running as running
from jaxnorm._arguments import (
    as_array,
    as_dtype,
    as_feature_shape,
    as_flag,
    check_mapping,
    check_real,
)
from jaxnorm._axes import Axes, Shape
from jaxnorm._dtypes import as_floating, out_dtype
from jaxnorm._marks import use
from jaxnorm._moments import Moments
from jaxnorm._normalize import normalize, pass_and_normalize
from jaxnorm._reduce import moments
from jaxnorm._settings import Settings
from jaxnorm._standardize import standardize

Params = Mapping[str, ArrayLike | None]  # {"scale", "bias"} for most methods
Stats = Mapping[str, ArrayLike]  # {"mean", "var"} for methods with running statistics

Init = TypeVar("Init", bound=Callable[..., dict[str, Array]])


def _initializer(init: Init) -> Init:
    """An initializer that checks its arguments before it calls `init`."""

    @functools.wraps(init)
    def checked(
        self: "Norm", feature_shape: Any, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        shape = as_feature_shape("feature_shape", feature_shape)
        return init(self, shape, as_dtype("dtype", dtype))

    return cast(Init, checked)


class Norm(Settings, abc.ABC):
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
    is_affine: ClassVar[bool] = False  # whether it is scale and bias, and nothing else
    # Names of parameters that a backward pass renews, as the gradient to subtract.
    controls: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axis_name is not None and not self.can_sync:
            raise ValueError(
                f"{type(self).__name__} shares nothing between devices, got axis_name="
                f"{self.axis_name!r}: leave it out"
            )

    def __init_subclass__(cls, **kwargs: Any) -> None:
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
        """As `__call__`, of checked arguments; a variance of one value is 0."""

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
        out as 0. Integers are read as float32. `inputs` are what `required_inputs` and
        `optional_inputs` name, such as the domain of each example; few methods have
        any.

        Raises ValueError or TypeError where shapes, dtypes or settings do not fit, and
        where each variance would be that of a single value.
        """
        x, flag = as_floating(x), as_flag(use_running_average)
        running.check_kind(stats)
        self.check_call(x, params, inputs)
        dtype = None if dtype is None else out_dtype(x, dtype)
        problem = self.single_value_problem(x.shape, use(stats, flag).by_batch)
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

    def single_value_problem(self, shape: Shape, by_batch: bool) -> str | None:
        """The message for an array of `shape` whose batch statistics would each be of a
        single value, and the variances 0; else None."""
        if not self.center or not by_batch:
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
        how = {"mask": mask, "dtype": dtype, **self._by_batch, **options}
        return normalize(x, params, self.axes(x.shape), **how)

    @final
    def pass_and_normalize_by_batch(
        self, x: Array, params: Params, **options: Any
    ) -> tuple[Array, Array]:
        """`x` as it is, and normalized by its `batch_moments`.

        `options` are the mask, dtype and implementation of `normalize`.
        """
        how = self._by_batch | options
        return pass_and_normalize(x, params, self.axes(x.shape), **how)

    @property
    def _by_batch(self) -> dict[str, Any]:
        """What `normalize` takes from the settings."""
        return {
            "epsilon": self.epsilon,
            "center": self.center,
            "axis_name": self.axis_name,
            "axis_index_groups": self.axis_index_groups,
        }

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
        axes: Axes | None = None,
    ) -> Array:
        """`x` normalized by `m`, which may vary along more axes than `axes` keeps.

        These are the method's own, unless others are given.
        """
        return standardize(
            x,
            m.mean,
            m.rstd(self.epsilon),
            self.axes(x.shape) if axes is None else axes,
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


class ActivatedNorm(Norm):
    """A norm with an activation, before which it adds the residual of the call."""

    activation: str | None = None
    optional_inputs = ("residual",)
