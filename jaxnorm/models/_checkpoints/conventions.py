"""What are the names, layouts and defaults of each framework?

All that the conversions know about a framework is one `Convention` of this table.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxnorm._arguments import as_epsilon, as_integer, as_share, shown

SAME = object()  # an extra that has the value of the statistic that it accompanies
LEFT = object()  # an extra that is torch's v, the singular vector that belongs to u


@dataclasses.dataclass(frozen=True)
class Convention:
    """One framework's names, layouts and defaults.

    Names are given where they differ from Flax's; those of several alternatives, in
    the order in which they are looked for, and the first is the one that is written.
    Layouts are strings of I (features in), O (features out) and S (all axes of space,
    none for a dense layer); s says that space is reversed with respect to S.

    Attributes:
        separator: between the parts of a key.
        names: of the arrays of a layer that has a kernel or an embedding.
        norm_names: of the arrays of any other layer.
        kernels: layouts of the kinds of kernels.
        epsilon: the default of each norm, under jaxnorm's name for it.
        momentum: the default of batch norm; None if it must be given.
        new_weight: the momentum is the weight of the new value, not of the old.
        unbiased: the running variance that is kept is the unbiased one.
        arguments: names of the arguments of norms.
        extras: what goes along with a statistic, and is dropped when read.
        wrappers: names of the arrays of WeightNorm, "scale", and SpectralNorm, "u" and
            "sigma", and of the kernel that has one of these beside it.
        collections: names of the two collections; None if all keys are in one.
        modules: a collection is {module: {name: array}}, however deep modules are.
        keeps_rank: the arrays of a norm may have axes of length 1, as its input has.
        numpy_only: it takes arrays of the dtypes that NumPy itself has, and no others.
    """

    separator: str
    names: Mapping[str, tuple[str, ...]]
    norm_names: Mapping[str, tuple[str, ...]]
    kernels: Mapping[str, str]
    epsilon: Mapping[str, float]
    momentum: float | None
    arguments: Mapping[str, str]
    extras: Mapping[str, Mapping[str, Any]]
    wrappers: Mapping[str, Mapping[str, tuple[str, ...]]] = dataclasses.field(
        default_factory=dict
    )
    new_weight: bool = False
    unbiased: bool = False
    collections: Mapping[str, str] | None = None
    modules: bool = False
    keeps_rank: bool = False
    numpy_only: bool = False


# "conv" is every kernel of which nothing else is said, those of dense layers included;
# "transpose_kernel" is Flax's ConvTranspose(transpose_kernel=True).
FLAX = Convention(
    separator="/",
    names={},
    norm_names={},
    kernels={
        "conv": "SIO",
        "conv_transpose": "SIO",
        "transpose_kernel": "sOI",
        "depthwise": "SIO",
    },
    epsilon={
        "BatchNorm": 1e-5,
        "GroupNorm": 1e-6,
        "InstanceNorm": 1e-6,
        "LayerNorm": 1e-6,
        "RMSNorm": 1e-6,
    },
    momentum=0.99,
    arguments={
        "epsilon": "epsilon",
        "momentum": "momentum",
        "num_groups": "num_groups",
    },
    extras={},
    collections={"params": "params", "batch_stats": "batch_stats"},
)

TORCH = Convention(
    separator=".",
    names={"kernel": ("weight",), "embedding": ("weight",)},
    norm_names={
        "scale": ("weight",),
        "mean": ("running_mean",),
        "var": ("running_var",),
        "count": ("num_batches_tracked",),
    },
    kernels={
        "conv": "OIS",
        "conv_transpose": "IOs",
        "transpose_kernel": "IOs",
        "depthwise": "OIS",
    },
    epsilon={
        "BatchNorm": 1e-5,
        "GroupNorm": 1e-5,
        "InstanceNorm": 1e-5,
        "LayerNorm": 1e-5,
        "RMSNorm": 2.0**-23,  # None, which is that of float32
        "RunningInstanceNorm": 1e-5,
    },
    momentum=0.1,
    new_weight=True,
    unbiased=True,
    arguments={"eps": "epsilon", "momentum": "momentum", "num_groups": "num_groups"},
    extras={"mean": {"num_batches_tracked": np.int64(0)}},
    wrappers={
        "scale": {
            "kernel": ("parametrizations.weight.original1", "weight_v"),
            "scale": ("parametrizations.weight.original0", "weight_g"),
        },
        "u": {
            "kernel": ("parametrizations.weight.original", "weight_orig"),
            "u": ("parametrizations.weight.0._u", "weight_u"),
        },
        # There is no sigma, which is that of the kernel.
        "sigma": dict.fromkeys(
            ("kernel", "sigma"), ("parametrizations.weight.original", "weight_orig")
        ),
    },
    numpy_only=True,
)

KERAS = Convention(
    separator="/",
    names={"embedding": ("embeddings",)},
    norm_names={
        "scale": ("gamma", "scale"),
        "bias": ("beta", "bias"),
        "mean": ("moving_mean",),
        "var": ("moving_variance",),
    },
    kernels={
        "conv": "SIO",
        "conv_transpose": "sOI",
        "transpose_kernel": "sOI",
        "depthwise": "SOI",
    },
    epsilon={
        "BatchNorm": 1e-3,
        "GroupNorm": 1e-3,
        "LayerNorm": 1e-3,
        "RMSNorm": 1e-6,
    },
    momentum=0.99,
    arguments={"epsilon": "epsilon", "momentum": "momentum", "groups": "num_groups"},
    extras={},
)

# Haiku's averages are hidden / (1 - decay_rate**counter). Beyond this counter that is
# `hidden` itself, and as many steps again are left before int32 overflows.
_SETTLED = np.int32(2**30)

HAIKU = Convention(
    separator="/",
    names={"kernel": ("w",), "bias": ("b",), "embedding": ("embeddings",)},
    norm_names={
        "bias": ("offset", "b"),
        "mean": ("~/mean_ema/average",),
        "var": ("~/var_ema/average",),
    },
    kernels={
        "conv": "SIO",
        "conv_transpose": "SOI",
        "transpose_kernel": "SOI",
        "depthwise": "SIO",
    },
    epsilon={
        "BatchNorm": 1e-5,
        "GroupNorm": 1e-5,
        "InstanceNorm": 1e-5,
        "LayerNorm": 1e-5,
        "RMSNorm": 1e-5,
    },
    momentum=None,
    arguments={"eps": "epsilon", "decay_rate": "momentum", "groups": "num_groups"},
    collections={"params": "params", "batch_stats": "state"},
    modules=True,
    extras={
        "mean": {"~/mean_ema/hidden": SAME, "~/mean_ema/counter": _SETTLED},
        "var": {"~/var_ema/hidden": SAME, "~/var_ema/counter": _SETTLED},
    },
    keeps_rank=True,
)

CONVENTIONS = {"flax": FLAX, "haiku": HAIKU, "keras": KERAS, "torch": TORCH}


def convention(framework: str) -> Convention:
    """The convention of `framework`; raises ValueError if there is none."""
    if not isinstance(framework, str) or framework not in CONVENTIONS:
        raise ValueError(
            f"framework must be one of {list(CONVENTIONS)}, got {shown(framework)}"
        )
    return CONVENTIONS[framework]


_CHECKS = {"epsilon": as_epsilon, "momentum": as_share, "num_groups": as_integer}


def norm_settings(
    framework: str, method: str = "BatchNorm", **arguments: Any
) -> dict[str, Any]:
    """Settings with which `method` computes and trains as the norm of `framework` does.

    | | epsilon | momentum is the weight of | kept variance |
    |---|---|---|---|
    | "flax" | 1e-5, others 1e-6 | the old value, 0.99 | biased |
    | "haiku" | 1e-5 | the old value, `decay_rate` | biased |
    | "keras" | 1e-3, RMSNorm 1e-6 | the old value, 0.99 | biased |
    | "torch" | 1e-5, RMSNorm 2**-23 | the new value, 0.1 | unbiased |

    Haiku also corrects its averages for having started at 0, which no setting does:
    they agree once decay_rate**steps is small.

    Args:
        framework: "flax", "haiku", "keras" or "torch".
        method: name of a class of jaxnorm.
        **arguments: those of the framework's norm, under its names: torch's `eps` and
            `momentum` (None averages all batches), Haiku's `decay_rate`. Where one is
            missing, the framework's default is taken.

    Returns:
        Arguments for the class of jaxnorm, or of `jaxnorm.linen` and `jaxnorm.nnx`.

    Raises:
        ValueError: for a framework, method or argument that is not in the table, a
            momentum that is not from 0 to 1, and an epsilon that is negative.
        TypeError: for those that are no numbers.

    >>> import jaxnorm
    >>> jaxnorm.models.norm_settings("torch", eps=1e-3, momentum=0.25)
    {'epsilon': 0.001, 'momentum': 0.75, 'unbiased': True}
    >>> jaxnorm.LayerNorm(**jaxnorm.models.norm_settings("keras", "LayerNorm")).epsilon
    0.001
    """
    table = convention(framework)
    if not isinstance(method, str) or method not in table.epsilon:
        raise ValueError(
            f"method must be one of {list(table.epsilon)}, which {framework} has, got "
            f"{shown(method)}: it is the name of a class of jaxnorm"
        )
    unknown = sorted({*arguments} - {*table.arguments})
    if unknown:
        raise ValueError(
            f"arguments of {framework} are {list(table.arguments)}, got {unknown}: "
            "leave out those that do not change how a norm computes"
        )
    settings = {
        table.arguments[k]: None if v is None else _CHECKS[table.arguments[k]](k, v)
        for k, v in arguments.items()
    }
    if settings.get("epsilon") is None:
        settings["epsilon"] = table.epsilon[method]
    if method in ("BatchNorm", "RunningInstanceNorm"):
        momentum = settings.get("momentum", table.momentum)
        settings |= _of_running_statistics(table, momentum)
        if settings["momentum"] is None and not table.new_weight:
            raise ValueError(
                f"momentum must be a number in {framework}, and has no default in "
                "Haiku: give it under the framework's name for it"
            )
    return settings


def _of_running_statistics(table: Convention, momentum: float | None) -> dict[str, Any]:
    """The settings of running statistics, with the framework's `momentum`."""
    if table.new_weight and momentum is not None:
        momentum = 1 - momentum
    return {"momentum": momentum, "unbiased": table.unbiased}
