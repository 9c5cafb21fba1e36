"""A page for each method, and the tables of all, written before Sphinx reads pages."""

import inspect
from pathlib import Path
from typing import Any

import axes_picture
import jax.numpy as jnp
import results
from markdown_files import table, write
from method_text import FEATURES, Method, methods, weight_transforms
from sphinx.application import Sphinx

import jaxnorm

FOLDER = Path(__file__).parents[1] / "norms"
SYMBOLS = r"""
$\gamma$ is `scale`, $\beta$ is `bias`, $\epsilon$ is `epsilon`; $\mu$ and $\sigma^2$
are mean and variance, and a hat marks running statistics.
"""


def section(title: str, *parts: str) -> str:
    text = "\n\n".join(part.strip() for part in parts if part.strip())
    return f"## {title}\n\n{text}\n" if text else ""


def api(method: Method) -> str:
    lines = [f".. autofunction:: jaxnorm.{method.name}"]
    if method.settings:
        name, members = method.settings.__name__, ["axes", *own(method.settings)]
        shown = f"   :members: {', '.join(members)}"
        lines = [f".. autoclass:: jaxnorm.{name}", shown, "", *lines]
    return "\n".join(["```{eval-rst}", *lines, "```"])


def own(settings: type) -> list[str]:
    """The methods that one class has, and those that it is made from have not."""
    found = {k for k, v in vars(settings).items() if inspect.isfunction(v)}
    known = {k for base in settings.__bases__ for k in dir(base)}
    return sorted(k for k in found - known if not k.startswith("_"))


def head(method: Method) -> str:
    names = [f"{{py:obj}}`jaxnorm.{method.name}`"]
    if method.settings:
        names = [f"{{py:obj}}`jaxnorm.{method.settings.__name__}`", *names]
    return f"{method.summary}\n\n{' and '.join(names)}. Source: {method.paper}."


def picture(method: Method) -> str:
    where = f"for `{method.example()}`" if method.settings else "for a convolution"
    when = ", in training" if method.keeps_statistics else ""
    alt = method.says("Statistics over").replace('"', "")
    return f"""```{{figure}} _pictures/{method.name}.svg
:alt: "Statistics over {alt}"
:align: center

Orange: one element of the result. Blue: what it depends on, as computed {where}{when}.
```"""


def formulas(method: Method) -> str:
    return "\n\n".join(f"$$\n{formula}\n$$" for formula in method.formulas)


def arrays(method: Method) -> str:
    body = [
        [f"`{name}`", f"`{kind}`", f"`{tuple(v.shape)}`", f"{float(v.min()):g}"]
        for kind, found in method.arrays().items()
        for name, v in found.items()
    ]
    if not body:
        return "None." if method.settings else ""
    columns = ("Name", "Collection", "Shape", "Starts at")
    for_what = f"For {FEATURES} features and `{method.example()}`:"
    return for_what + "\n\n" + table(columns, body)


def settings(method: Method) -> str:
    body = [[f"`{n}`", f"`{d}`", m] for n, d, m in method.fields()]
    return table(("Setting", "Default", "What it is"), body) if body else ""


def cost(method: Method) -> str:
    times, passes = results.times(method), results.passes(method)
    parts = []
    if times:
        parts += ["Times of others by those of jaxnorm on two CPU cores:", times]
    if passes:
        parts += ["Passes over memory, and kernels, as compiled for an H100:", passes]
    untimed = "The [benchmarks](../performance/cpu.md) do not time it."
    return "\n\n".join(parts) or untimed


def accuracy(method: Method) -> str:
    row = results.accuracy(method)
    said = (
        "On handwritten digits, in percent for each seed ([all norms](../accuracy.md)):"
    )
    return f"{said}\n\n{row}" if row else ""


def evidence(method: Method) -> str:
    found = results.experiments(method)
    return "\n".join(f"- [{title}](../evidence/{name}.md)" for name, title in found)


def page(method: Method) -> str:
    return "\n".join(
        [
            f"# {method.title}\n\n{head(method)}\n",
            section("Formula", formulas(method), SYMBOLS, method.more),
            section(
                "What shares statistics",
                f"Statistics over {method.says('Statistics over')}",
                picture(method),
            ),
            section(
                "When to take it",
                f"Take it for {method.says('Take it for')}",
                f"It is not for {method.says('Not for')}",
            ),
            section("Parameters and state", arrays(method)),
            section("Settings", settings(method)),
            section("What it costs", cost(method)),
            section("Accuracy", accuracy(method)),
            section("Evidence", evidence(method)),
            section("API", api(method)),
        ]
    )


def summary(chosen: list[Method]) -> str:
    body = []
    for method in chosen:
        kind = f"`{method.settings.__name__}`, " if method.settings else ""
        arrays = [", ".join(found) or "none" for found in method.arrays().values()]
        body.append(
            [
                f"[{method.title}]({method.name}.md)",
                f"{kind}`{method.name}`",
                f"${method.formulas[0]}$",
                method.says("Statistics over"),
                *arrays,
                method.paper,
            ]
        )
    kept = ("Parameters", "State") if chosen[0].settings else ()
    columns = ("Method", "Names", "Formula", "Statistics over", *kept, "Source")
    return table(columns, body)


def contents(chosen: list[Method]) -> str:
    names = [method.name for method in chosen]
    return "\n".join(["```{toctree}", ":hidden:", *names, "```"])


def tables() -> dict[str, list[Method]]:
    found = methods()
    return {
        "_with_state": [m for m in found if m.keeps_statistics],
        "_without_state": [m for m in found if not m.keeps_statistics],
        "_weights": weight_transforms(),
    }


def transform(method: Method) -> Any:
    """The function of a kernel alone, whatever else it takes and returns."""
    if "u" not in inspect.signature(method.function).parameters:
        return method.function
    return lambda kernel: method.function(kernel, jnp.ones(kernel.shape[-1]))[0]


def is_new(path: Path) -> bool:
    """Whether `path` is younger than all that it is drawn from."""
    sources = [
        *Path(jaxnorm.__file__).parent.rglob("*.py"),
        Path(axes_picture.__file__),
    ]
    newest = max(source.stat().st_mtime for source in sources)
    return path.exists() and path.stat().st_mtime > newest


def draw(method: Method) -> None:
    path = FOLDER / "_pictures" / f"{method.name}.svg"
    if is_new(path):
        return
    if method.settings:
        used, labels = (
            axes_picture.of_norm(method.row),
            ("examples", "space", "features"),
        )
    else:
        used = axes_picture.of_kernel(transform(method))
        labels = ("inputs", "space", "outputs")
    axes_picture.draw(used, labels, path)


def write_all(app: Sphinx) -> None:
    for name, chosen in tables().items():
        write(FOLDER / f"{name}.md", summary(chosen) + "\n\n" + contents(chosen) + "\n")
        for method in chosen:
            draw(method)
            write(FOLDER / f"{method.name}.md", page(method))


def setup(app: Sphinx) -> dict[str, bool]:
    # After the pages of the experiments, to which these link.
    app.connect("builder-inited", write_all, priority=600)
    return {"parallel_read_safe": True}
