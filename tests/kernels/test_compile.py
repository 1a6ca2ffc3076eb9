"""Every kernel compiles for every supported GPU, none at hand, and fits its shared memory; those that decode one token
a row fit the registers of sm_90 but for a few."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}

# The interpreter's functions do not compile, so a process without it does, one a target.
COMPILE = """
import json, re, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from pkv_hf.kernels import append, elementwise, linear, queries, rope, select
from pkv_hf.kernels.attention import split, workqueue
from pkv_hf.kernels.experts import blocks as of_experts, experts, routing
from pkv_hf.kernels.products import adapters, blocks, epilogue
from pkv_hf.kernels.quantized import blocks as blocks4, codes, linear4
from pkv_hf.kernels.launch import choose_tile, next_power_of_2, padded_queries
from pkv_hf.kernels.states import convolution, delta, norm, ssm

ELEMENT = {"fp16": 2, "bf16": 2, "fp32": 4}
POINTERS = {"table_ptr": "i32", "starts_ptr": "i32", "ends_ptr": "i32", "first_ptr": "i32", "state_ptr": "fp32",
            "k_scale_ptr": "fp32", "v_scale_ptr": "fp32", "a_log_ptr": "fp32",
            "end_tokens_ptr": "i64", "pad_ptr": "i64", "scratch_ptr": "i64", "newest_ptr": "i64", "inputs_ptr": "i64",
            "positions_ptr": "i64", "index_ptr": "i64", "chosen_ptr": "i32", "weights_ptr": "fp32"}

NEW = "new_k_ptr", "new_v_ptr", "cos_ptr", "sin_ptr", "q_norm_ptr", "k_norm_ptr", "first_ptr"
NOT_TURNED = dict(ROTARY=0, INTERLEAVED=False, PAIRED=False, NORM=False, OFFSET=0.0, WHOLE=0, LARGEST=0.0)

def compiled(target, launcher, dtype, constants, warps, **alike):
    kernel = launcher.kernel
    constants, signature = {**constants, "PDL": target.arch >= 90}, {}
    if "sinks_ptr" in kernel.arg_names and "sinks_ptr" not in alike:
        constants["sinks_ptr"] = None
    if "SCALES" in kernel.arg_names and "SCALES" not in constants:
        scales = [name for name in kernel.arg_names if name.startswith("scale_") and name.endswith("_ptr")]
        constants.update(SCALES=0, UNIT=1.0, **dict.fromkeys(scales))
    if "new_k_ptr" in kernel.arg_names and "ROTARY" not in constants:
        constants.update(NOT_TURNED, **dict.fromkeys(NEW))
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + POINTERS.get(name, dtype)
        else:
            numbers = "scale", "limit", "alpha", "shift"
            signature[name] = "fp32" if name in numbers or name.endswith("eps") else "i32"
    signature.update(alike)
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    # as at run time: pointers are aligned; strides but for the block table's, and widths, are multiples of 16
    sizes = "stride_", "inputs", "outputs", "width"
    aligned = {(p.num,): [["tt.divisibility", 16]] for p in kernel.params if p.name not in constants
               and (p.name.endswith("_ptr") or p.name.startswith(sizes) and not p.do_not_specialize)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    kernel = triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": launcher.fp_fusion})
    assert launcher.fp_fusion or "fma.rn.f32" not in kernel.asm["ptx"], kernel.name  # rounded as transformers rounds
    if constants.get("ROTARY") and dtype == "fp32":  # turns products of float32 that are rounded before their sum
        assert "mul.rn.f32" in kernel.asm["ptx"], kernel.name
    if target.arch == 90 and (constants.get("BLOCK_M") == 16 or "TAIL" in constants):
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
            ptx.write(kernel.asm["ptx"])
            ptx.flush()
            command = [get_ptxas(target.arch).path, "-v", "--gpu-name=sm_90a", ptx.name, "-o", "/dev/null"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        stack = int(re.search(r"(\\d+) bytes stack frame", said).group(1))
        assert stack <= 512, (kernel.name, signature, constants, said)
    return kernel.metadata.shared

target, shared, cases = json.loads(sys.argv[1])
gpu, used = GPUTarget("cuda", target, 32), {}
every_form = target in (75, 90)  # elsewhere no second form of a kernel that needs no more of a GPU than the first
for at, (head_dim, value_dim, group, q_len, dtype, cap, sinks, chunked) in enumerate(cases):
    query_rows, wider = q_len * group, max(head_dim, value_dim)
    if choose_tile(wider, ELEMENT[dtype], query_rows, shared) is None:
        continue
    block_m, block_d, block_dv = padded_queries(query_rows), next_power_of_2(head_dim), next_power_of_2(value_dim)
    merged = dict(G=group, DV=value_dim, BLOCK_M=block_m, BLOCK_DV=block_dv, PARTS=32)
    case = f"D{head_dim},{value_dim} G{group} q{q_len} {dtype} cap{cap} sinks{sinks} chunked{chunked}"
    of_sinks = {"sinks_ptr": "*" + dtype} if sinks else {}

    def attend(nbytes, eight_bit):
        tile = choose_tile(wider, ELEMENT[dtype], query_rows, shared, nbytes)
        return tile.num_warps, dict(G=group, D=head_dim, DV=value_dim, PAGE=16, TOKENS=tile.tokens, BLOCK_M=block_m,
                                    BLOCK_D=block_d, BLOCK_DV=block_dv, STAGES=tile.num_stages, EIGHT_BIT=eight_bit,
                                    NATIVE=True, CAP=cap, CHUNKED=chunked)

    warps, constants = attend(None, 0)
    turned = dict(ROTARY=head_dim, INTERLEAVED=False, PAIRED=False, NORM=True, OFFSET=0.0, WHOLE=0)
    new = q_len == 1 and head_dim == value_dim  # with a new token, which adds to what the kernel does without
    for direct in (False, True) if every_form or at == 0 else (False,):
        state = {"state_ptr": "*" + dtype} if direct else {}
        form = dict(**turned, LARGEST=0.0) if new and not direct else {}
        used[f"split {case} {direct}"] = compiled(
            gpu, split._split, dtype, dict(**constants, **form, DIRECT=direct), warps, **state, **of_sinks)
    used[f"workqueue {case}"] = compiled(
        gpu, workqueue._workqueue, dtype, dict(**constants, ROWS=64), warps, **of_sinks)
    if every_form or at == 0:
        used[f"merge_splits {case}"] = compiled(gpu, split._merge, dtype, merged, 4)
        used[f"merge_items {case}"] = compiled(
            gpu, workqueue._merge, dtype, dict(**merged, TOKENS=constants["TOKENS"], CHUNKED=chunked, ROWS=64), 4)
    quantized = [("i8", 127.0), *([("fp8e4nv", 448.0)] if target >= 89 else [])] if head_dim == 128 else []
    for pages, largest in ((dtype, 0.0), *quantized):
        held = {"k_ptr": "*i16", "v_ptr": "*i16"}
        if largest:
            warps, constants = attend(1, 1 + (pages != "i8"))
            form = dict(**turned, LARGEST=largest) if new else {}
            used[f"split {case} {pages}"] = compiled(
                gpu, split._split, dtype, dict(**constants, **form, DIRECT=False), warps, **held, **of_sinks)
            used[f"workqueue {case} {pages}"] = compiled(
                gpu, workqueue._workqueue, dtype, dict(**constants, ROWS=64), warps, **held, **of_sinks)
        if not every_form and at:
            continue
        held = {"k_pages_ptr": "*" + pages, "v_pages_ptr": "*" + pages}
        used[f"append {case} {pages}"] = compiled(
            gpu, append._append, dtype,
            dict(D=head_dim, DV=value_dim, PAGE=16, BLOCK_D=block_d, BLOCK_DV=block_dv, LARGEST=largest), 1, **held)
        used[f"rope_append {case} {pages}"] = compiled(
            gpu, append._rope_append, dtype, dict(D=head_dim, PAGE=16, BLOCK_D=block_d, **turned, LARGEST=largest), 1,
            **held)
if target == 89:  # float32 that was of 8 bits, where there is least to spare
    tile = choose_tile(128, 4, 64, shared, 1)
    constants = dict(G=16, D=128, DV=128, PAGE=16, TOKENS=tile.tokens, BLOCK_M=64, BLOCK_D=128, BLOCK_DV=128,
                     STAGES=tile.num_stages, EIGHT_BIT=1, NATIVE=True, CAP=0.0, CHUNKED=False, DIRECT=False)
    used["split of 64 queries"] = compiled(
        gpu, split._split, "fp32", constants, tile.num_warps, k_ptr="*i16", v_ptr="*i16")
half = next(case[4] for case in cases if case[4] != "fp32")

def of_rows(kernel, rows, inputs, outputs, at_once, PARTS=False, ADAPTERS=0, weights=None, **form):
    block = blocks.choose_block(rows, inputs, outputs, at_once, 132, shared, blocks.MOST_PARTS)
    block_m, tail = blocks.padded(rows)
    form = dict(BLOCK_M=block_m, TAIL=tail, BLOCK_N=block.outputs, BLOCK_K=block.inputs, STAGES=block.num_stages,
                AHEAD=block.ahead, EVEN=True, NORM=rows == 1, PARTS=PARTS, ADAPTERS=ADAPTERS, **form)
    alike = {"out_ptr": "*fp32"} if PARTS else {}
    if weights:  # of 8 bits: those of bitsandbytes with scales of rows, fp8 with scales of blocks
        form.update(SCALES=1, UNIT=1 / 127) if weights == "i8" else form.update(SCALES=2, UNIT=1.0)
        for name in kernel.kernel.arg_names:
            if name in ("a_ptr", "b_ptr", "c_ptr", "gate_ptr", "up_ptr"):
                alike[name] = "*" + weights
            elif name.startswith("scale_"):
                alike[name] = "*fp32"
    return compiled(gpu, kernel, half, form, block.num_warps, **alike, **(LORA if ADAPTERS else {}))

LORA = {"table_ptr": "*i64", "h_ptr": "*fp32", "lora_ptr": "*fp32"}

def of_4_bits(kernel, rows, outputs, at_once, layout, scaled, quant_type, group=64, ADAPTERS=0, **form):
    block = blocks4.choose_block(rows, 4096, outputs, at_once, 132, shared, group, layout)
    block_m, tail = block.padded(rows, group)
    asm = codes.texts(quant_type, torch.float16 if half == "fp16" else torch.bfloat16)
    form = dict(BLOCK_M=block_m, TAIL=tail, BLOCK_N=block.outputs, BLOCK_K=block.inputs, STAGES=block.num_stages,
                EVEN=True, NORM=rows == 1, OFFSET=0.0, PARTS=False, ADAPTERS=ADAPTERS, ASM=asm, LAYOUT=layout,
                SCALES=scaled, QBLOCK=group, GROUP=group, FORM=block.form, **form)
    pointers = {"x_ptr": "*i32"}
    for name in kernel.kernel.arg_names:
        if name in ("a_ptr", "b_ptr", "c_ptr", "gate_ptr", "up_ptr"):
            pointers[name] = "*u32" if block.form == "threads" else "*u16"
        elif layout != "bytes" and name.startswith(("absmax", "code_", "offset_")):
            pointers[name] = "*i32" if name.startswith("code_") and scaled.startswith("zeros") else "*" + half
        elif name.startswith(("absmax2_", "code_", "offset_")):
            pointers[name] = "*fp32"
        elif name.startswith("absmax_"):
            pointers[name] = "*u8" if scaled == "nested" else "*fp32"
    pointers.update(LORA if ADAPTERS else {})
    return compiled(gpu, kernel, half, form, block.num_warps, **pointers)

for rows in {75: (1,), 90: (1, 8, 64, 80)}.get(target, (1, 80)):
    kind = "bytes", "nested" if rows != 8 else "blocks", "nf4" if rows > 1 else "fp4"
    residual = dict(WEIGHTS=1, BIAS=True, RESIDUAL=True, SCALED=False, ACTIVATION=None)
    used[f"linear4 {rows}"] = of_4_bits(linear4._linear4, rows, 4096, 1, *kind, **residual)
    used[f"gated4 {rows}"] = of_4_bits(linear4._gated4, rows, 14336, 2, *kind, BIAS=False, ACTIVATION="silu")
    if every_form:
        used[f"linear4 {rows} with adapters"] = of_4_bits(
            linear4._linear4, rows, 4096, 1, *kind, ADAPTERS=8, **residual)
of_int4 = {75: [(1, "words", "zeros", 64, False)],
           90: [(1, "tiles", "pairs", 64, False), (8, "tiles", "pairs", 128, True), (64, "tiles", "pairs", 32, False),
                (8, "rows", "shifted", 32, False), (4, "words", "zeros", 64, False), (80, "words", "groups", 64, True)]}
for rows, layout, scaled, group, gates in of_int4.get(target, [(80, "tiles", "pairs", 64, True)]):
    kind = layout, scaled, "int4" if layout == "rows" else "uint4", group
    form = dict(BIAS=False, ACTIVATION="silu") if gates else residual
    used[f"int4 {rows} {kind}"] = of_4_bits(
        linear4._gated4 if gates else linear4._linear4, rows, 14336 if gates else 4096, 1 + gates, *kind, **form)
plain, silu = dict(OFFSET=0.0, SCALED=False, ACTIVATION=None), dict(OFFSET=0.0, ACTIVATION="silu", BIAS=False)
for rows in {75: (1, 16), 86: (1, 80), 120: (1, 80)}.get(target, (1, 16, 64, 80)):  # 86 and 120 have 89's memory
    for weights, residual, inputs in ((1, True, 14336), (3, False, 4096)):
        form = dict(WEIGHTS=weights, BIAS=True, RESIDUAL=residual, **plain)
        used[f"linear {rows} {weights}"] = of_rows(
            linear._linear, rows, inputs, 6144 if weights == 3 else 4096, 1, **form)
    for outputs in (1536, 9728):
        used[f"gated {rows} {outputs}"] = of_rows(linear._gated, rows, 4096, outputs, 2, **silu)
of_8_bits = {75: [(1, "i8")], 89: [(80, "i8")], 90: [(1, "fp8e4nv"), (16, "i8"), (80, "fp8e4nv")]}
of_8_bits[100] = [(80, "fp8e4nv")]
for rows, weights in of_8_bits.get(target, []):
    if rows == 80:
        used[f"gated {rows} {weights}"] = of_rows(linear._gated, rows, 4096, 14336, 2, weights=weights, **silu)
    else:
        form = dict(WEIGHTS=3, BIAS=True, RESIDUAL=False, weights=weights, **plain)
        used[f"linear {rows} {weights}"] = of_rows(linear._linear, rows, 4096, 6144, 1, **form)
parts = dict(PARTS=True, BIAS=False, ACTIVATION=None, OFFSET=0.0)
used["linear in parts"] = of_rows(
    linear._linear, 80, 4096, 4096, 1, **parts, WEIGHTS=1, RESIDUAL=False, SCALED=False)
used["gated in parts"] = of_rows(linear._gated, 80, 4096, 4096, 2, **parts)
for rows, least in ((1, 4), (16 if target < 80 else 80, 16)):
    used[f"gated {rows} with adapters"] = of_rows(linear._gated, rows, 4096, 14336, 2, ADAPTERS=8, **silu)
    block_m = min(rows, 16)
    shrink = dict(NORM=rows == 1, OFFSET=1.0, LORA_ALIGNED=True, BLOCK_M=block_m, BLOCK_R=least,
                  BLOCK_K=adapters.INPUTS[block_m])
    expand = dict(PARTS=8, BLOCK_M=block_m, BLOCK_N=adapters.OUTPUTS)
    for lora in ("fp32", half) if every_form else ("fp32",):
        used[f"shrink {rows} {lora}"] = compiled(
            gpu, adapters._shrink, half, shrink, 4, **{**LORA, "lora_ptr": "*" + lora})
    if every_form:
        form = dict(WEIGHTS=3, BIAS=True, RESIDUAL=False, ADAPTERS=8, **plain)
        used[f"linear {rows} with adapters"] = of_rows(linear._linear, rows, 4096, 6144, 1, **form)
        used[f"expand {rows}"] = compiled(gpu, adapters._expand, half, expand, 4, **{**LORA, "lora_ptr": "*" + half})
for weights, gates, activation in ((3, False, None), (2, True, "silu")):
    form = dict(WEIGHTS=weights, BIAS=True, RESIDUAL=not gates, SCALED=not gates, ACTIVATION=activation, GATED=gates,
                PARTS=blocks.MOST_PARTS, BLOCK=epilogue.BLOCK)
    used[f"add_parts {gates}"] = compiled(gpu, epilogue._add_parts, half, form, 4, parts_ptr="*fp32")

def of_mixture(rows, hidden, width, form, dtype=half):
    itemsize = ELEMENT[dtype]
    outputs = width * (1 if form["LAYOUT"] == "plain" else 2)
    for kernel, inputs, count in ((experts._up, hidden, outputs), (experts._down, width, hidden)):
        block = of_experts.choose_block(rows, inputs, count, form["TRANSPOSED"], itemsize, shared)
        cut = dict(CHOICES=8, BIAS=form["TRANSPOSED"], EVEN=inputs % block.inputs == 0, BLOCK_N=block.outputs,
                   BLOCK_K=block.inputs, STAGES=block.num_stages)
        by_row = kernel is experts._down and of_experts.sums_in_launch(rows, form["TRANSPOSED"])
        kernel = experts._down_row if by_row else kernel
        cut |= {} if by_row else dict(BLOCK_CHOICES=8, TRANSPOSED=form["TRANSPOSED"], BLOCK_M=of_experts.padded(rows))
        cut |= {name: value for name, value in form.items() if kernel is experts._up}
        y = {"y_ptr": "*fp32"} if kernel is experts._down else {}
        used[f"experts {kernel.kernel.__name__} {rows} {form['LAYOUT']} {dtype}"] = compiled(
            gpu, kernel, dtype, cut, block.num_warps, **y)

clamped = dict(TRANSPOSED=True, LAYOUT="interleaved", ACTIVATION="silu", LIMIT=True, ALPHA=True, SHIFT=True)
silu_halves = dict(clamped, TRANSPOSED=False, LAYOUT="halves", LIMIT=False, ALPHA=False, SHIFT=False)
for rows in {75: (1,), 90: (1, 8, 80)}.get(target, (80,)):
    of_mixture(rows, 2048, 768, silu_halves)
for rows in {75: (1,), 90: (1, 64)}.get(target, ()):
    of_mixture(rows, 2880, 2880, clamped)
if every_form:
    of_mixture(1 if target == 75 else 8, 2048, 768, dict(silu_halves, LAYOUT="plain"), "fp32")
for scores, groups in (("softmax", 1), ("sigmoid", 8)) if every_form else (("softmax", 1),):
    used[f"route {scores}"] = compiled(
        gpu, routing._route, half, dict(SCORES=scores, CORRECTED=groups > 1, NORMALISED=True, GROUPS=groups, KEPT=4,
                                        CHOICES=8, BLOCK_CHOICES=8, BLOCK=256), 1, correction_ptr="*fp32")
used["experts chosen"] = compiled(gpu, experts._chosen, half, dict(BLOCK=1024, BINS=256), 4)
used["experts weigh"] = compiled(
    gpu, experts._weigh, half, dict(CHOICES=8, BLOCK_CHOICES=8, BLOCK=experts.WEIGHED), 4, y_ptr="*fp32")
llama = dict(RESIDUAL=True, CENTERED=False, WEIGHT=True, BIAS=False, OFFSET=0.0, BLOCK=8192)
act_mul = dict(ACTIVATION="silu", GATED=True, BLOCK=1024)
for dtype in (half, "fp32"):
    used[f"norm {dtype}"] = compiled(gpu, elementwise._norm, dtype, llama, 8)
    used[f"act_mul {dtype}"] = compiled(gpu, elementwise._act, dtype, act_mul, 4)
    used[f"select {dtype}"] = compiled(
        gpu, select._select, dtype, dict(BLOCK=select.BLOCK, BLOCK_ENDS=4), 4)
used["convolution"] = compiled(
    gpu, convolution._convolution, half,
    dict(TAPS=4, BLOCK_TAPS=4, BIAS=True, SILU=True, GATED=False, BLOCK=convolution.BLOCK), 4, state_ptr="*" + half)
used["delta_rule"] = compiled(
    gpu, delta._delta_rule, half, dict(KEY_HEADS=16, REPEATS=2, DK=128, DV=128, BETA=1.0, PAIRED=False, BLOCK_K=128,
                                       BLOCK_V=32), 4)
used["state_space"] = compiled(
    gpu, ssm._state_space, half, dict(HEADS=48, GROUPS=1, P=64, N=128, BLOCK_P=32, BLOCK_N=128), 4)
for size, first, warps in ((128, False, 1), (8192, True, 8)):
    used[f"gated_norm {size}"] = compiled(
        gpu, norm._gated_norm, half, dict(GROUPS=32, PARTS=1, SIZE=size, SHARED=not first, NORM=True, GATE_FIRST=first,
                                          BLOCK=size), warps)
if every_form:
    for rotary, interleaved, paired in ((64, True, False), (128, True, True), (32, False, False)):
        turned = dict(ROTARY=rotary, INTERLEAVED=interleaved, PAIRED=paired, NORM=True, OFFSET=1.0,
                      WHOLE=0 if paired else rope.SQUARED_AT_ONCE, LARGEST=0.0)
        angles = dict(cos_ptr="*fp32", sin_ptr="*fp32") if paired else {}
        alone = {name: constant for name, constant in turned.items() if name != "LARGEST"}
        used[f"rope {rotary}"] = compiled(
            gpu, queries._rope, half, dict(D=128, BLOCK_D=128, **alone), 1 if paired else 4, **angles)
        used[f"rope_append {rotary}"] = compiled(
            gpu, append._rope_append, half, dict(D=128, PAGE=16, BLOCK_D=128, **turned), 1 if paired else 4, **angles)
    used["angles"] = compiled(
        gpu, queries._angles, half, dict(WIDTH=96, BLOCK=128, HALVES=True, PAIRS=False), 1, frequencies_ptr="*fp32",
        factor="fp32")
    for rows in (1, 16):
        form = dict(ACTIVATION="gelu_tanh", BIAS=True, OFFSET=1.0)
        used[f"gated {rows} of Gemma"] = of_rows(linear._gated, rows, 4096, 14336, 2, **form)
        for of in (dict(RESIDUAL=True, SCALED=True), dict(RESIDUAL=False, ACTIVATION="gelu")):
            form = dict(WEIGHTS=1, BIAS=True, **{**plain, **of})
            used[f"linear {rows} {of}"] = of_rows(linear._linear, rows, 4096, 4096, 1, **form)
    both = dict(AFTER=True, AFTER_WEIGHT=True, AFTER_OFFSET=1.0, BEFORE=True, BEFORE_WEIGHT=True, BEFORE_OFFSET=0.0)
    for parts in (0, blocks.MOST_PARTS):
        form, of = dict(PARTS=parts, BIAS=parts > 0, SCALED=True, BLOCK=8192), {"y_ptr": "*fp32"} if parts else {}
        form["GAIN"] = parts > 0
        used[f"add_norms {parts}"] = compiled(gpu, elementwise._add_norms, half, dict(**both, **form), 8, **of)
    for form in (dict(OFFSET=1.0), dict(CENTERED=True, BIAS=True)):
        used[f"norm {form}"] = compiled(gpu, elementwise._norm, half, {**llama, **form}, 8)
    for activation in ("gelu", "relu2"):
        used[f"act_mul {activation}"] = compiled(gpu, elementwise._act, half, {**act_mul, "ACTIVATION": activation}, 4)
print(json.dumps(used))
"""


def plain(head_dim: int, group: int, q_len: int, dtype: str) -> tuple:
    """Heads of one size, scores as they are: head_dim, value_dim, group, q_len, dtype, cap, sinks, chunked."""
    return head_dim, head_dim, group, q_len, dtype, 0.0, False, False


@pytest.mark.parametrize("target", SHARED_KIB)
def test_every_kernel_fits(target):
    half = "fp16" if target == 75 else "bf16"  # sm_75 has no bfloat16
    cases = [plain(128, 4, 1, half), plain(256, 16, 1, "fp32")]
    if target not in (86, 120):  # which have sm_89's memory, and so its tiles
        cases.append(plain(64, 3, 8, half))
    if target in (75, 80, 89, 90):  # one of each memory's size
        cases += [plain(512, 8, 1, half), (192, 128, 8, 1, half, 30.0, True, True)]
    if target == 90:  # where the registers are looked at
        cases += [plain(64, 3, 1, "fp32"), plain(128, 4, 1, "fp32"), (480, 512, 2, 1, "fp32", 30.0, True, False)]
    wide = [plain(128, 16, 8, half), plain(256, 16, 8, half)]  # that a small shared memory has no tile for
    must = len(cases) + (len(wide) if target in (80, 90, 100) else 0)
    cases += wide if target not in (86, 120) else []
    arguments = json.dumps([target, SHARED_KIB[target] * 1024, cases])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    of_layers = {75: 25 + 21, 86: 25, 90: 44 + 21, 120: 25}.get(target, 33)
    of_layers += {75: 10, 90: 16}.get(target, 5)  # experts
    of_attention = 7 * must if target in (75, 90) else 7 + 2 * (must - 1)
    assert len(used) >= of_attention + of_layers + 4 + (4 if target < 89 else 8)
    for kernel, nbytes in used.items():
        assert nbytes <= SHARED_KIB[target] * 1024, f"{kernel} needs {nbytes} bytes on sm_{target}"
