"""The counter of `benchmarks/compiled.py` on programs whose bytes are known."""

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.optimized

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))  # as where Python runs one of them
compiled = importlib.import_module("compiled")
memory_passes = importlib.import_module("memory_passes")

X = np.ones((64, 256), np.float32)


def counted(f, *args, **options):
    return compiled.kernels(jax.jit(f, **options).lower(*args).compile())


def moved(ks):
    return sum(k.times * k.read for k in ks), sum(k.times * k.written for k in ks)


def module(entry, *computations):
    """HLO text of an ENTRY computation, with the lines given, and of others."""
    lines = entry.strip().splitlines()
    entry = "ENTRY %main (p: f32[1]) -> f32[1] {\n" + "\n".join(lines) + "\n}\n"
    return "HloModule m, is_scheduled=true\n\n" + "\n\n".join([*computations, entry])


def fused(*lines, name="fused"):
    return "\n".join([f"%{name} (p: f32[1]) -> f32[1] {{", *lines, "}"])


def only(text):
    (kernel,) = compiled.kernels(text)
    return kernel


def test_elementwise_work_is_one_kernel_that_reads_and_writes_once():
    (k,) = counted(lambda x, y: jnp.sin(x * y) + x, X, X)
    assert (k.read, k.written) == (2 * X.nbytes, X.nbytes)
    assert not k.product and "sin" in k.origin or "add" in k.origin


def test_products_are_marked():
    ks = counted(lambda x, w: jnp.tanh(x @ w), X, np.ones((256, 256), np.float32))
    assert [k.product for k in ks].count(True) == 1
    assert sum(k.written for k in ks if k.product) == X.nbytes


def test_a_loop_counts_as_often_as_it_runs():
    def f(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=7)[0]

    ks = [k for k in counted(f, X) if k.written == X.nbytes and k.op != "copy"]
    assert sum(k.times for k in ks) == 7
    assert not any(k.uncertain for k in ks)


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    def f(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1e6, lambda x: x * 2, x)

    ks = [k for k in counted(f, X) if k.written == X.nbytes and k.op != "copy"]
    assert [k.times for k in ks] == [1]
    assert all(k.uncertain for k in ks)


def test_a_condition_counts_as_its_most_expensive_branch():
    def f(p, x):
        return jax.lax.cond(p, lambda x: x * 2, lambda x: (x @ x.T) @ x, x)

    ks = [k for k in counted(f, True, X) if k.uncertain]
    assert moved(ks)[0] >= 2 * X.nbytes
    assert not any("branch_1" in k.origin for k in ks)


def test_what_is_read_by_slices_only_counts_as_the_slices():
    (k,) = counted(lambda x: jnp.sin(x[:4]) + x[8:12], X)
    assert (k.read, k.written) == (8 * X[0].nbytes, 4 * X[0].nbytes)


def test_what_is_read_whole_as_well_counts_once():
    text = module(
        """
  %p = f32[64,256]{1,0} parameter(0)
  ROOT %f = f32[64]{0} fusion(%p), kind=kInput, calls=%fused
""",
        fused(
            "  %q = f32[64,256]{1,0} parameter(0)",
            "  %s = f32[64,16]{1,0} slice(%q), slice={[0:64], [0:16]}",
            "  %a = f32[64]{0} reduce(%s), dimensions={1}",
            "  %b = f32[64]{0} reduce(%q), dimensions={1}",
            "  ROOT %c = f32[64]{0} add(%a, %b)",
        ),
    )
    k = only(text)
    assert (k.read, k.written) == (X.nbytes, 256)


def test_slices_of_slices_count_as_the_last_ones():
    text = module(
        """
  %p = f32[64,256]{1,0} parameter(0)
  ROOT %f = f32[16]{0} fusion(%p), kind=kInput, calls=%fused
""",
        fused(
            "  %q = f32[64,256]{1,0} parameter(0)",
            "  %s = f32[16,256]{1,0} slice(%q), slice={[0:16], [0:256]}",
            "  %t = f32[16,32]{1,0} slice(%s), slice={[0:16], [0:32]}",
            "  ROOT %a = f32[16]{0} reduce(%t), dimensions={1}",
        ),
    )
    k = only(text)
    assert k.read == X.nbytes / 4 / 8


def test_slices_are_seen_behind_conversions_views_and_nested_fusions():
    inner = fused(
        "  %q = bf16[128,128]{1,0} parameter(0)",
        "  %i = s32[]{:T(128)S(6)} parameter(1)",
        "  %c = f32[128,128]{1,0} convert(%q)",
        "  ROOT %s = f32[32,128]{1,0} dynamic-slice(%c, %i, %i), "
        "dynamic_slice_sizes={32,128}",
        name="inner",
    )
    outer = fused(
        "  %q = bf16[64,256]{1,0} parameter(0)",
        "  %i = s32[]{:T(128)S(6)} parameter(1)",
        "  %b = bf16[128,128]{1,0} bitcast(%q)",
        "  ROOT %n = f32[32,128]{1,0} fusion(%b, %i), kind=kLoop, calls=%inner",
        name="outer",
    )
    entry = """
  %p = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  ROOT %f = f32[32,128]{1,0} fusion(%p, %i), kind=kLoop, calls=%outer
"""
    k = only(module(entry, inner, outer))
    assert k.read == 64 * 256 * 2 / 4
    assert k.written == 32 * 128 * 4


def test_an_update_in_place_counts_as_the_slice():
    ks = counted(lambda x, y: x.at[3].set(y), X, X[0], donate_argnums=0)
    read, written = moved(ks)
    assert X[0].nbytes <= read < X[0].nbytes + 64
    assert X[0].nbytes <= written < X[0].nbytes + 64


def test_an_update_that_is_no_fusion_counts_as_the_slice():
    k = only(
        module("""
  %p = f32[64,256]{1,0} parameter(0)
  %u = f32[2,256]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %d = f32[64,256]{1,0} dynamic-update-slice(%p, %u, %i, %i)
""")
    )
    assert (k.read, k.written) == (2048 + 4, 2048)


@pytest.mark.parametrize(
    "root", ["parameter(0)", "parameter(0)\n  ROOT %r = f32[64,256]{0,1} copy(%q)"]
)
def test_a_result_that_is_an_operand_or_its_copy_counts_whole(root):
    line = (
        "  ROOT " if "ROOT" not in root else "  "
    ) + f"%q = f32[64,256]{{1,0}} {root}"
    entry = """
  %p = f32[64,256]{1,0} parameter(0)
  ROOT %f = f32[64,256]{0,1} fusion(%p), kind=kLoop, calls=%fused
"""
    k = only(module(entry, fused(line)))
    assert (k.read, k.written) == (X.nbytes, X.nbytes)


def test_an_update_that_is_worked_on_further_counts_whole():
    text = module(
        """
  %p = f32[64,256]{1,0} parameter(0)
  %u = f32[1,256]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = f32[64,256]{1,0} fusion(%p, %u, %i), kind=kLoop, calls=%fused
""",
        fused(
            "  %q = f32[64,256]{1,0} parameter(0)",
            "  %v = f32[1,256]{1,0} parameter(1)",
            "  %j = s32[] parameter(2)",
            "  %d = f32[64,256]{1,0} dynamic-update-slice(%q, %v, %j, %j)",
            "  ROOT %n = f32[64,256]{1,0} negate(%d)",
        ),
    )
    k = only(text)
    assert (k.read, k.written) == (X.nbytes + 1024 + 4, X.nbytes)


def test_results_of_several_kinds_are_told_apart():
    text = module(
        """
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[4,8,128]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %f = (f32[4,8,128]{2,1,0:T(8,128)}, /*index=1*/bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, pred[8]{0}) fusion(%p, %b, %i), kind=kLoop, calls=%fused
  %g = pred[8]{0} get-tuple-element(%f), index=2
  ROOT %t = (pred[8]{0}) tuple(%g)
""",  # noqa: E501
        fused(
            "  %q = bf16[8,128]{1,0} parameter(0)",
            "  %c = f32[4,8,128]{2,1,0} parameter(1)",
            "  %j = s32[] parameter(2)",
            "  %w = f32[8,128]{1,0} convert(%q)",
            "  %v = f32[1,8,128]{2,1,0} bitcast(%w)",
            "  %e = f32[4,1,8,128]{3,2,1,0} bitcast(%c)",
            "  %x = f32[1,1,8,128]{3,2,1,0} bitcast(%v)",
            "  %y = f32[4,1,8,128]{3,2,1,0} "
            "dynamic-update-slice(%e, %x, %j, %j, %j, %j)",
            "  %d = f32[4,8,128]{2,1,0} bitcast(%y)",
            "  %n = bf16[8,128]{1,0} negate(%q)",
            "  %l = pred[8]{0} is-finite(%q)",
            "  ROOT %t = (f32[4,8,128], bf16[8,128], pred[8]) tuple(%d, %n, %l)",
        ),
    )
    k = only(text)
    assert k.read == 8 * 128 * 2 + 4
    assert k.written == 8 * 128 * 4 + 0 + 8  # the slice, what stays on chip, the flags


def test_a_reduction_of_several_arrays_at_once_writes_each_of_its_results():
    text = module(
        """
  %p = bf16[64,256]{1,0} parameter(0)
  ROOT %f = (f32[64]{0}, s32[64]{0}) fusion(%p), kind=kInput, calls=%fused
""",
        fused(
            "  %q = bf16[64,256]{1,0} parameter(0)",
            "  %w = f32[64,256]{1,0} convert(%q)",
            "  %i = s32[64,256]{1,0} iota(), iota_dimension=1",
            "  %z = f32[] constant(0)",
            "  %n = s32[] constant(0)",
            "  ROOT %r = (f32[64]{0}, s32[64]{0}) reduce(%w, %i, %z, %n), "
            "dimensions={1}",
        ),
    )
    k = only(text)
    assert (k.read, k.written) == (64 * 256 * 2, 2 * 64 * 4)


def test_moves_between_memories_count_on_the_side_of_the_main_memory():
    text = module("""
  %p = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
  %c = (bf16[64,256]{1,0:T(8,128)(2,1)S(1)}, bf16[64,256]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%p)
  %d = bf16[64,256]{1,0:T(8,128)(2,1)S(1)} copy-done(%c)
  %s = ((bf16[64,256]{1,0:T(8,128)(2,1)}), bf16[16,256]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:16], [0:256]}
  %e = bf16[16,256]{1,0:T(8,128)(2,1)S(1)} slice-done(%s)
  %b = bf16[64,256]{1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  %n = bf16[64,256]{1,0:T(8,128)(2,1)S(1)} negate(%d)
  %o = (bf16[64,256]{1,0:T(8,128)(2,1)}, bf16[64,256]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) copy-start(%n)
  ROOT %r = bf16[64,256]{1,0:T(8,128)(2,1)} copy-done(%o)
""")  # noqa: E501
    size = 64 * 256 * 2
    found = [(k.op, k.read, k.written) for k in compiled.kernels(text)]
    assert found == [
        ("copy-start", size, 0),
        ("slice-start", size // 4, 0),
        ("negate", 0, 0),
        ("copy-start", 0, size),
    ]


def test_loops_without_a_noted_number_are_counted_by_their_condition():
    condition = fused(
        "  %t = (s32[], f32[8]) parameter(0)",
        "  %i = s32[] get-tuple-element(%t), index=0",
        "  %n = s32[]{:T(128)} constant(5)",
        "  ROOT %c = pred[] compare(%i, %n), direction=LT",
        name="condition",
    )
    body = fused(
        "  %t = (s32[], f32[8]) parameter(0)",
        "  %x = f32[8]{0} get-tuple-element(%t), index=1",
        "  ROOT %y = f32[8]{0} sine(%x)",
        name="body",
    )
    entry = """
  %p = (s32[], f32[8]) parameter(0)
  ROOT %w = (s32[], f32[8]) while(%p), condition=%condition, body=%body
"""
    ks = compiled.kernels(module(entry, condition, body))
    assert [(k.op, k.times) for k in ks] == [("compare", 6), ("sine", 5)]
    unsure = condition.replace("LT", "NE")
    ks = compiled.kernels(module(entry, unsure, body))
    assert [(k.op, k.times, k.uncertain) for k in ks][1] == ("sine", 1, True)


def test_calls_and_asynchronous_work_count_as_what_they_run():
    inner = fused(
        "  %q = f32[64,256]{1,0} parameter(0)",
        "  ROOT %n = f32[64,256]{1,0} negate(%q)",
        name="inner",
    )
    text = module(
        """
  %p = f32[64,256]{1,0} parameter(0)
  %c = f32[64,256]{1,0} call(%p), to_apply=%inner
  %s = ((f32[64,256]), f32[64,256], u32[]) async-start(%c), calls=%inner
  ROOT %d = f32[64,256]{1,0} async-done(%s)
""",
        inner,
    )
    ks = compiled.kernels(text)
    assert [(k.op, k.read, k.written) for k in ks] == 2 * [
        ("negate", X.nbytes, X.nbytes)
    ]


@pytest.mark.parametrize(
    "target, product",
    [
        ("__gpu$xla.gpu.triton", False),
        ("mosaic_gpu_v2", False),
        ("tpu_custom_call", False),
        ("__cublas$lt$matmul", True),
        ("__cudnn$convForward", True),
    ],
)
def test_kernels_of_ones_own_count_by_operands_and_results(target, product):
    text = module(f"""
  %p = bf16[64,256]{{1,0}} parameter(0)
  %q = f32[256]{{0}} parameter(1)
  ROOT %k = (bf16[64,256]{{1,0}}, f32[64]{{0}}) custom-call(%p, %q, %p), custom_call_target="{target}", metadata={{op_name="jit(f)/norm (fused)"}}
""")  # noqa: E501
    k = only(text)
    assert (k.op, k.origin) == (target, "jit(f)/norm (fused)")
    assert (k.read, k.written) == (64 * 256 * 2 + 1024, 64 * 256 * 2 + 256)
    assert k.product == product


@pytest.mark.parametrize(
    "shape, size",
    [
        ("pred[3]{0}", 3),
        ("s4[10]{0:E(4)}", 5),
        ("f8e4m3fn[16]{0}", 16),
        ("bf16[]", 2),
        ("c64[2,3]{1,0}", 48),
        ("(f64[2]{0}, token[])", 16),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 0),
    ],
)
def test_sizes_of_shapes(shape, size):
    text = module(f"  %p = f32[] parameter(0)\n  ROOT %k = {shape} negate(%p)")
    assert only(text).written == size


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        compiled.kernels("nothing")


def test_growth_is_found_and_shrinking_is_not():
    known = {"a": {"jaxnorm": 8.0}, "b": {"jaxnorm": 5.0}, "c": {"jaxnorm": 3.0}}
    found = {"a": {"jaxnorm": 8.2}, "b": {"jaxnorm": 4.0}, "c": {"jaxnorm": 3.4}}
    problems = memory_passes.grown("h100", found, known)
    assert problems == ["c, jaxnorm: 3.400 times x, recorded 3.000"]
    problems = memory_passes.grown("v5e", found, known)
    assert [p.split(",")[0] for p in problems] == ["a", "c"]
    assert memory_passes.grown("h100", {}, {"a": known["a"]}) == [
        "a, jaxnorm: is counted no more"
    ]
    assert memory_passes.grown("h100", {"a": known["a"]}, {}) == [
        "a, jaxnorm: is not recorded"
    ]


def test_every_case_has_a_name_of_its_own_and_a_number():
    recorded = json.loads(memory_passes.RECORD.read_text())
    for target in compiled.TARGETS:
        keys = [case.key for case in memory_passes.cases(target)]
        assert len(set(keys)) == len(keys)
        assert list(recorded[target]["numbers"]) == keys
