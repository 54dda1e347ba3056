"""Each contract can fail: for each there is a mistake, of a kind that has been made before, that turns it red.

A mutation replaces a piece of one function's source; it must still be found there, so that no row of the table can die
unnoticed when the source changes.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.formats import awq as awq_format
from fewbit.formats import gptq as gptq_format
from fewbit.formats.awq import AWQFormat
from fewbit.formats.compressed_tensors import config as ct_config
from fewbit.formats.compressed_tensors import integers as ct_integers
from fewbit.formats.gptq import GPTQFormat
from fewbit.kernels.base import Kernel
from fewbit.kernels.reference import Reference
from fewbit.kernels.torch_int4 import TorchInt4
from fewbit.methods import gptq
from fewbit.methods.awq import AWQ
from fewbit.methods.base import make
from fewbit.methods.sweep import groups as group_sweep
from fewbit.methods.sweep.definition import Sweep, VectorSweep
from fewbit.methods.sweep.groups import GroupSweep
from fewbit.models import topology
from fewbit.nn import layers as quantized_nn
from fewbit.pipeline import agreed
from fewbit.pipeline import rewrite as rewriting
from fewbit.schemes import affine, bits, floats, int8, nf4, nvfp4, scaled
from fewbit.schemes.base import parse
from fewbit.schemes.ggml import codebook, layout, search, vectors
from fewbit.schemes.ggml import grids as blockwise
from tests.contract.cases import CPU, FORMATS, KERNELS, hard, ordinary
from tests.contract.test_formats import check_round_trip
from tests.contract.test_kernels import check_grouped, check_product, check_restored
from tests.contract.test_methods import check_choice
from tests.contract.test_schemes import check_grids, check_parts, check_weighted_fit
from tests.golden import test_awq_layout as awq_layout
from tests.golden.test_bnb_schemes import check_bytes
from tests.golden.test_bnb_schemes import test_4_bit_values as check_values
from tests.golden.test_bnb_schemes import test_8_bit_bytes_and_values as check_8_bit
from tests.golden.test_bnb_schemes import test_ties_and_their_neighbours as check_ties
from tests.golden.test_ggml_blocks import check_values as check_block_values
from tests.golden.test_ggml_blocks import check_written as check_blocks
from tests.golden.test_gptq_layout import check_read, check_written
from tests.unit import test_awq, test_rewrite
from tests.unit.test_affine import check_joint_search, check_range, check_refit
from tests.unit.test_affine import test_bf16_scales_are_exact_in_both_16_bit_types as check_bf16_scales
from tests.unit.test_agreed import test_linears_of_a_module_with_one_input_size_agree as check_agreed
from tests.unit.test_compressed_tensors import test_a_name_beats_a_pattern_and_a_pattern_a_class as check_ct_groups
from tests.unit.test_compressed_tensors import test_older_files_put_whole_codes_in_words as check_ct_older
from tests.unit.test_compressed_tensors import test_packed_weights_are_read_and_written_back as check_ct_packed
from tests.unit.test_floats import test_fp4_takes_the_nearest_and_even_codes_on_ties as check_fp4
from tests.unit.test_ggml import check_bytes_come_back, check_descent, check_last, check_solved
from tests.unit.test_gptq import check_definition, check_factor, check_gain, check_refinement
from tests.unit.test_group_sweep import check_descent as check_group_descent
from tests.unit.test_group_sweep import check_pass as check_group_pass
from tests.unit.test_iq import check_definition as check_vector_definition
from tests.unit.test_iq import check_descent as check_vector_descent
from tests.unit.test_iq import check_nearest
from tests.unit.test_nn import test_the_gradient_is_the_dequantized_linears as check_gradient


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in the source of `owner.name`."""

    owner: Any
    name: str
    old: str
    new: str

    def apply(self, patch: pytest.MonkeyPatch) -> None:
        found = inspect.getattr_static(self.owner, self.name)
        source = textwrap.dedent(inspect.getsource(found))
        assert self.old in source, f"{self.name} no longer has {self.old!r}: bring this table up to date"
        scope = dict(vars(sys.modules[found.__module__]))
        exec("from __future__ import annotations\n" + source.replace(self.old, self.new), scope)
        patch.setattr(self.owner, self.name, scope[self.name])


def grids_(spec: str) -> Callable[[], None]:
    return lambda: check_grids(parse(spec), ordinary(6, 96))


def in_a_folder(check: Callable[[Path, str], None], family: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder) / family, family)


def parts_(spec: str) -> Callable[[], None]:
    return lambda: check_parts(parse(spec), hard(6, 96))


SWAPPED_IN = Mutation(bits, "pack", "unflatten(-1, (-1, per))", "unflatten(-1, (-1, per)).flip(-1)")
SWAPPED_OUT = Mutation(bits, "unpack", "torch.stack(lanes, dim=-1)", "torch.stack(lanes[::-1], dim=-1)")
ROLLED = Mutation(GPTQFormat, "lay_out", '["scale"].T', '["scale"].T.roll(1, 0)')
ROLLED_BACK = Mutation(GPTQFormat, "read", '["scales"].T', '["scales"].roll(-1, 0).T')
NO_OFFSET_OUT = Mutation(GPTQFormat, "lay_out", "(zero - 1)", "zero")
NO_OFFSET_IN = Mutation(gptq_format, "_zero_points", "zero + 1", "zero")
IN_TORCH = Mutation(vectors, "_compiled", "return x.is_cpu", "return False")  # without the CPU library

MUTATIONS: dict[str, tuple[list[Mutation], Callable[[], object]]] = {
    # schemes
    "nibbles swapped in pack": ([SWAPPED_IN], parts_("int4-g16")),
    "nibbles swapped in unpack": ([SWAPPED_OUT], parts_("int4-g16")),
    "a 3-bit lane shifted": ([Mutation(bits, "pack", "lane * bits", "lane * bits & 15")], parts_("int3-g16")),
    "groups off by one": (
        [Mutation(affine.AffineGrids, "_aligned", "columns // self.group", "(columns - 1) // self.group")],
        grids_("int4-g16"),
    ),
    "groups off by one for single columns": (
        [
            Mutation(
                affine.AffineGrids,
                "_aligned",
                "self.scale[:, columns // self.group]",
                "self.scale[:, (columns - 1) // self.group]",
            )
        ],
        lambda: check_definition("int4-g16", 32, False),
    ),
    "codes cut off, not rounded": (
        [Mutation(affine.AffineGrids, "encode", "round_()", "trunc_()")],
        grids_("int4-g16"),
    ),
    "one code too few": (
        [Mutation(affine.AffineGrids, "encode", "**self.bits - 1", "**self.bits - 2")],
        lambda: check_range(4),
    ),
    "scale rows swapped in pack": (
        [Mutation(affine.Affine, "pack", "grids.scale.to", "grids.scale.flip(0).to")],
        parts_("int4-g16-sym"),
    ),
    "zero points dropped in dequantize": (
        [
            Mutation(
                affine.Affine, "dequantize", "grids.zero.unsqueeze(-1)", "torch.full_like(grids.zero, 8).unsqueeze(-1)"
            )
        ],
        parts_("int4-g16"),
    ),
    "rows ignored in dequantize": (
        [
            Mutation(
                affine.Affine, "dequantize", "self._grids(parts, shape, rows)", "self._grids(parts, shape, slice(1))"
            )
        ],
        parts_("int4-g16"),
    ),
    "scales not stored before codes are chosen": (
        [Mutation(affine.Affine, "_stored", ".to(torch.float16)", "")],
        parts_("int4-g16"),
    ),
    "scales of bfloat16 not stored before codes are chosen": (
        [Mutation(affine.Affine, "_stored", ".to(torch.bfloat16)", "")],
        lambda: check_bf16_scales("int4-g32-bf16", 1.0),
    ),
    "sizes for whole bytes only": (
        [Mutation(bits, "packed_bytes", "n * bits + 7", "n * bits")],
        lambda: check_parts(parse("int3-row"), hard(6, 37)),
    ),
    "the worst candidate kept, not the best": (
        [Mutation(affine.Affine, "_fit_rows", "grid: self._error(", "grid: -self._error(")],
        lambda: check_weighted_fit(parse("int4-g16"), ordinary(6, 96), torch.linspace(0, 1, 96)),
    ),
    "a codebook's signs with the wrong parity": (
        [Mutation(vectors.Errors, "codes", "negative.gather(3, at) ^ flip", "negative.gather(3, at)"), IN_TORCH],
        lambda: check_nearest("iq2_xxs"),
    ),
    "a codebook's entries chosen without importances": (
        [Mutation(vectors.Errors, "__init__", "(h * x.abs())", "x.abs()"), IN_TORCH],
        lambda: check_nearest("iq2_s"),
    ),
    "importances that the library does not get": (
        [Mutation(vectors.Compiled, "__init__", "h.contiguous()", "torch.ones_like(h)")],
        lambda: check_nearest("iq3_s"),
    ),
    "bits of a codebook's fields in reverse": (
        [Mutation(vectors, "_joined", "<< shifts", "<< shifts.flip(0)")],
        lambda: check_blocks("iq2_s"),
    ),
    "errors of a vector fed back with the wrong sign": (
        [Mutation(VectorSweep, "feed_back", "alpha=-1", "alpha=1")],
        lambda: check_vector_definition("iq3_s"),
    ),
    "vectors that move where it costs": (
        [Mutation(VectorSweep, "descend", "gain > 0", "gain < 0")],
        lambda: check_vector_descent("iq2_xs"),
    ),
    "errors of a group that stay in their column": (
        [Mutation(group_sweep, "_rounded", "rest[i], alpha=-1", "rest[i], alpha=0")],
        lambda: check_group_pass("q2_k"),
    ),
    "a group's scales chosen without its codes": (
        [Mutation(group_sweep, "_rounded", "cost.addcmul_(rest[i], rest[i])", "pass")],
        lambda: check_group_pass("q3_k"),
    ),
    "groups that move where it costs": (
        [Mutation(GroupSweep, "descend", ".sum(0) > 0", ".sum(0) < 0")],
        lambda: check_group_descent("q2_k"),
    ),
    "zero points that do not move with their scales": (
        [Mutation(affine.Affine, "_fit_rows", "[solve, moved(1), moved(-1)]", "[solve]")],
        lambda: check_joint_search(2),
    ),
    "nibbles of FP4 swapped in pack": (
        [Mutation(floats, "pack_pairs", "(pairs >> 4).bitwise_or_(pairs)", "(pairs >> 8).bitwise_or_(pairs << 4)")],
        parts_("mxfp4"),
    ),
    "nibbles of FP4 swapped in dequantize": (
        [
            Mutation(
                floats, "_pairs", "[levels[byte & 15], levels[byte >> 4]]", "[levels[byte >> 4], levels[byte & 15]]"
            )
        ],
        parts_("mxfp4"),
    ),
    "FP4 ties away from zero": (
        [Mutation(floats, "to_e2m1", "a.round().add_(2)", "a.add(0.5).floor_().add_(2)")],
        check_fp4,
    ),
    "the global scale multiplied where it divides": (
        [Mutation(nvfp4.NVFP4, "dequantize", "numbers.div_(whole)", "numbers.mul_(whole)")],
        parts_("nvfp4"),
    ),
    "scales of FP8 blocks one row late": (
        [Mutation(scaled.ScaledGrids, "_of", "narrow(0, 0, ", "roll(1, 0).narrow(0, 0, ")],
        lambda: check_grids(parse("fp8-b128"), torch.cat([ordinary(128, 128), 9 * ordinary(6, 128)])),
    ),
    "linears that a server fuses keep their own global scale": (
        [Mutation(agreed, "agreed", "if len(names) > 1", "if len(names) > 9")],
        check_agreed,
    ),
    "nibbles of the 4-bit levels swapped": (
        [Mutation(nf4.FourBit, "pack", "(pairs >> 8).bitwise_or_(pairs << 4)", "(pairs >> 4) | pairs")],
        lambda: check_bytes("nf4-b64", ordinary(6, 96)),
    ),
    "nibbles of the 4-bit levels swapped in dequantize": (
        [Mutation(nf4, "_pairs", "[levels(kind, device)[byte >> 4]", "[levels(kind, device)[byte & 15]")],
        parts_("nf4-b64"),
    ),
    "codes chosen with the stored scale": (
        [
            Mutation(
                nf4.FourBit,
                "nearest",
                "absmax, flat = self._absmax(w).float()",
                "absmax, flat = self.fit(w).scale.abs()",
            )
        ],
        lambda: check_bytes("nf4-b64-dq", ordinary(48, 128)),
    ),
    "blocks counted from the start of each chunk of rows": (
        [Mutation(nf4.FourBit, "dequantize", "values, start, self.group", "values, 0, self.group")],
        parts_("nf4-b64"),
    ),
    "blocks taken for groups of a row": (
        [Mutation(nf4.BlockGrids, "_scale_of", "starts[:, None] + chosen", "0 * starts[:, None] + chosen")],
        grids_("nf4-b64"),
    ),
    "scales of all nested groups alike": (
        [Mutation(nf4.Nested, "_maxima", "repeat_interleave(NESTED)", "repeat(NESTED)")],
        lambda: check_bytes("nf4-b32-dq", ordinary(300, 128)),
    ),
    "the offset left out": (
        [Mutation(nf4.Nested, "decode", ".add_(self.offset)", "")],
        lambda: check_values("nf4-b64-dq", torch.float32),
    ),
    "a short last block multiplied, not divided": (
        [Mutation(nf4.FourBit, "nearest", "x[whole:] /= scale[-1]", "x[whole:] *= scale[-1].reciprocal()")],
        lambda: check_ties("nf4"),
    ),
    "the 8-bit weight not cast to half first": (
        [Mutation(int8.Int8, "nearest", ".to(torch.float16)", "")],
        lambda: check_8_bit(torch.float32),
    ),
    "8-bit codes shifted by one": (
        [Mutation(int8.Int8, "pack", "codes ^ 128", "(codes + 1) ^ 128")],
        lambda: check_8_bit(torch.float32),
    ),
    "ggml: nibbles swapped": (
        [Mutation(layout, "_unpack_plane", ">> shifts[:, None]", ">> shifts.flip(0)[:, None]")],
        lambda: check_block_values("q4_0"),
    ),
    "ggml: nibbles swapped both ways, which only the bytes tell": (
        [
            Mutation(layout, "_unpack_plane", ">> shifts[:, None]", ">> shifts.flip(0)[:, None]"),
            Mutation(
                layout,
                "_pack_plane",
                ".unflatten(1, (-1, 8 // bits, width))",
                ".unflatten(1, (-1, 8 // bits, width)).flip(2)",
            ),
        ],
        lambda: check_blocks("q4_k"),
    ),
    "ggml: a sub-block off by one": (
        [Mutation(blockwise.BlockGrids, "_aligned", "index = columns // sub", "index = (columns - 1) // sub")],
        lambda: check_grids(parse("q4_k"), ordinary(6, 512)),
    ),
    "ggml: a sub-block off by one for single columns": (
        [Mutation(blockwise.BlockGrids, "_aligned", "at = columns // sub", "at = (columns - 1) // sub")],
        lambda: check_grids(parse("q2_k"), ordinary(6, 512)),
    ),
    "ggml: the minimum forgotten": (
        [Mutation(blockwise.BlockGrids, "decode", "values.sub_(offset)", "values")],
        lambda: check_block_values("q4_k"),
    ),
    "ggml: what is added subtracted": (
        [Mutation(layout, "units", "-dmin if layout.plus", "dmin if layout.plus")],
        lambda: check_block_values("q4_1"),
    ),
    "ggml: top bits of sub-scales in the wrong place": (
        [Mutation(layout, "_pack_scales", "sc[:, 4:] >> 4 << 6", "sc[:, 4:] >> 4 << 5")],
        lambda: check_bytes_come_back("q5_k"),
    ),
    "ggml: sub-scales two by two, not four by four": (
        [Mutation(layout, "_unpack_scales", "for shift in (0, 2, 4, 6)", "for shift in (0, 4, 2, 6)")],
        lambda: check_block_values("q3_k"),
    ),
    "ggml: the eighth sign not even": (
        [Mutation(codebook, "_even_signs", "keepdim=True) % 2", "keepdim=True) * 0")],
        lambda: check_block_values("iq3_xxs"),
    ),
    "ggml: d searched as if it were stored exactly": (
        [Mutation(search, "half", ".to(torch.float16)", "")],
        lambda: check_parts(parse("q6_k"), ordinary(6, 512)),
    ),
    "ggml: a refit uphill": (
        [Mutation(blockwise._Panel, "apply", "self.gradient -= moved", "self.gradient += moved")],
        lambda: check_descent("q4_k"),
    ),
    "ggml: sub-scales refitted with the next block's d": (
        [Mutation(blockwise, "refit", "* d[:, block, None]", "* d[:, block - 1, None]")],
        lambda: check_descent("q3_k"),
    ),
    "ggml: panels blind to those before": (
        [Mutation(blockwise, "refit", "panel.stop :], alpha=-1)", "panel.stop :], alpha=0)")],
        lambda: check_last("q3_k"),
    ),
    "ggml: d not refitted": (
        [Mutation(blockwise, "_solve", "uu) > 0, a, 0.0)", "uu) > 0, 0 * a, 0.0)")],
        lambda: check_solved("q8_0"),
    ),
    # methods
    "the error taken against another column": (
        [Mutation(Sweep, "feed_back", "(panel[i] - self", "(panel[i - 1] - self")],
        lambda: check_definition("int4-g16", 32, True),
    ),
    "no update past the panel": (
        [Mutation(gptq, "feed_back", "errors, alpha=-1)", "errors, alpha=0)")],
        lambda: check_definition("int4-g16", 160, True),
    ),
    "an eager update past the panel": (
        [
            Mutation(
                gptq,
                "feed_back",
                "add_halves(rest[stop:],",
                "rest[start:].addmm_(factor.T, errors), add_halves(rest[stop:],",
            )
        ],
        lambda: check_definition("int4-g16", 160, True),
    ),
    "no update within the panel": (
        [Mutation(Sweep, "feed_back", "errors[i], alpha=-1)", "errors[i], alpha=0)")],
        lambda: check_definition("int4-g16", 32, True),
    ),
    "the wrong row of the factor": (
        [Mutation(Sweep, "feed_back", "row = factor[i, i:", "row = factor[0, i:")],
        lambda: check_definition("int4-g16", 160, True),
    ),
    "the Hessian not permuted under act-order": (
        [Mutation(gptq, "inverse_factor", "hessian[backwards[:, None], backwards]", "hessian.flip(0, 1)")],
        lambda: check_definition("int4-g16", 32, True),
    ),
    "the Hessian not permuted, seen by the gain alone": (
        [Mutation(gptq, "inverse_factor", "hessian[backwards[:, None], backwards]", "hessian.flip(0, 1)")],
        lambda: check_gain("int4-g16-sym", 64, True),
    ),
    "the factor of H, not of its inverse": (
        [Mutation(gptq, "inverse_factor", "_inverted(lower)", "lower")],
        lambda: check_definition("int4-g16", 32, False),
    ),
    "one panel of the factor not inverted": (
        [Mutation(gptq, "_inverted", "len(lower), _WIDE", "_WIDE, _WIDE")],
        lambda: check_factor(600, False),
    ),
    "damping left out": (
        [Mutation(gptq, "inverse_factor", "damped.diagonal().add_(damp * scale)", "pass")],
        lambda: check_definition("int4-g16", 32, False),
    ),
    "damping added to the caller's Hessian": (
        [Mutation(gptq, "inverse_factor", "hessian[backwards[:, None], backwards]", "hessian")],
        lambda: check_choice(make("gptq"), "int4-g32"),
    ),
    "descent uphill": (
        [Mutation(Sweep, "descend", "inner[:, i], moves[i], alpha=-1", "inner[:, i], moves[i], alpha=1")],
        lambda: check_refinement("int3-g16", 48, True),
    ),
    "descent blind to other blocks": (
        [Mutation(gptq, "descend", "moves, alpha=-1", "moves, alpha=0")],
        lambda: check_refinement("int3-g16", 160, False),
    ),
    "refit in the wrong direction": (
        [Mutation(affine, "refit_scales", "scale[:, g].add_(moved)", "scale[:, g].sub_(moved)")],
        lambda: check_refinement("int3-g16", 48, True),
    ),
    "refit blind to other groups": (
        [Mutation(affine, "refit_scales", "alpha=-1)", "alpha=1)")],
        lambda: check_refit("int3-g16"),
    ),
    # formats
    "no zero offset in writing v1": ([NO_OFFSET_OUT], lambda: check_round_trip(FORMATS["gptq"], "int4-g32-sym")),
    "no zero offset in reading v1": ([NO_OFFSET_IN], lambda: check_read(4, 16, v1=True)),
    "no zero offset either way, which only the bytes tell": (
        [NO_OFFSET_OUT, NO_OFFSET_IN],
        lambda: check_written(4, 16, symmetric=True),
    ),
    "a zero of 0 not wrapped in v1": (
        [Mutation(gptq_format, "_zero_points", "(zero + 1) & (2**width - 1)", "zero + 1")],
        lambda: check_read(2, 16, v1=True),
    ),
    "awq: words in plain order both ways, which only the bytes tell": (
        [
            Mutation(awq_format, "_interleaved", "list(_ORDER)", ":"),
            Mutation(awq_format, "_plain", "_ORDER.index(i)", "i"),
        ],
        lambda: awq_layout.check_written(32, False, "gemm"),
    ),
    "awq: the order's inverse for the order": (
        [Mutation(awq_format, "_plain", "_ORDER.index(i)", "_ORDER[i]")],
        lambda: awq_layout.check_read(32, "gemm"),
    ),
    "awq: codes in plain order both ways, which only the bytes tell": (
        [
            Mutation(awq_format, "_to_words", "_ORDER[2 * byte : 2 * byte + 2]", "(2 * byte, 2 * byte + 1)"),
            Mutation(awq_format, "_from_words", "_ORDER[2 * byte : 2 * byte + 2]", "(2 * byte, 2 * byte + 1)"),
        ],
        lambda: awq_layout.check_written(32, False, "gemm"),
    ),
    "awq: odd columns in the place of even ones": (
        [
            Mutation(
                awq_format,
                "_from_words",
                "held[:, 0::2, byte], held[:, 1::2, byte]",
                "held[:, 1::2, byte], held[:, 0::2, byte]",
            )
        ],
        lambda: awq_layout.check_read(32, "gemm"),
    ),
    "awq: zero points in plain order": (
        [Mutation(AWQFormat, "lay_out", "_interleaved(zero.T)", "zero.T.contiguous()")],
        lambda: awq_layout.check_written(32, False, "gemm"),
    ),
    "awq: gemv's zeros not padded": (
        [Mutation(awq_format, "_zero_words", "return -(-words // multiple) * multiple", "return words")],
        lambda: awq_layout.check_written(32, False, "gemv"),
    ),
    "scale rows swapped": ([ROLLED], lambda: check_round_trip(FORMATS["gptq"], "int4-g32")),
    "scale rows swapped both ways, which only the bytes tell": (
        [ROLLED, ROLLED_BACK],
        lambda: check_written(4, 16, symmetric=True),
    ),
    "nibbles swapped both ways, which only the bytes tell": (
        [SWAPPED_IN, SWAPPED_OUT],
        lambda: check_written(4, 16, symmetric=True),
    ),
    "the group of a column off by one": (
        [Mutation(GPTQFormat, "lay_out", "torch.arange(k, dtype", "torch.arange(1, k + 1, dtype")],
        lambda: check_written(4, 16, symmetric=True),
    ),
    "compressed-tensors: zero points of the groups in another order": (
        [Mutation(ct_integers, "lay_out", "bits.pack(zero.T.contiguous()", "bits.pack(zero.T.flip(0).contiguous()")],
        lambda: check_ct_packed(4, symmetric=False),
    ),
    "compressed-tensors: older words read as dense ones": (
        [Mutation(ct_integers, "_codes", "words.shape[1] == _words(count, width)", "True")],
        lambda: check_ct_older(3, symmetric=True),
    ),
    "compressed-tensors: a name counts less than a pattern": (
        [Mutation(ct_config.Group, "claim", "3 if module in self.names", "1 if module in self.names")],
        check_ct_groups,
    ),
    # rewriting a block
    "awq: any scale better than none": (
        [Mutation(AWQ, "rewrite", "errors.index(min(errors))", "len(errors) - 1")],
        test_awq.check_search,
    ),
    "awq: rows not scaled back": (
        [Mutation(rewriting.BlockFold, "apply", "/ per_channel.unsqueeze(1)", "* per_channel.unsqueeze(1)")],
        lambda: in_a_folder(test_rewrite.check_folds, "llama"),
    ),
    "awq: a norm's bias not scaled": (
        [Mutation(rewriting.BlockFold, "apply", "bias / per_channel", "bias")],
        lambda: in_a_folder(test_rewrite.check_folds, "gpt2"),
    ),
    "awq: scales that a file cannot hold": (
        [Mutation(rewriting.BlockFold, "stored", "self._as_stored(name, (before", "(lambda _, x: x)(name, (before")],
        lambda: in_a_folder(test_rewrite.check_folds, "llama"),
    ),
    "awq: Gemma's norms taken for others": (
        [Mutation(topology, "_offset", "(0.0, 1.0)", "(0.0,)")],
        lambda: in_a_folder(test_rewrite.check_folds, "gemma"),
    ),
    "awq: a bit of the row's number lost": (
        [Mutation(topology, "_channels", "(len(rows) - 1).bit_length()", "(len(rows) - 1).bit_length() - 1")],
        lambda: in_a_folder(test_rewrite.check_folds, "llama"),
    ),
    "awq: fused projections taken whole": (
        [Mutation(topology, "_fed_by_rows", "_HALVINGS if", "0 if")],
        lambda: in_a_folder(test_rewrite.check_folds, "phi3"),
    ),
    "awq: a fold that is no fold kept": (
        [
            Mutation(
                rewriting,
                "rewrite",
                "(apart := ranks.agreed(fold.apply(scales))) <= _CLOSE",
                "fold.apply(scales) < 1e9",
            )
        ],
        lambda: in_a_folder(test_rewrite.check_wrong_link, "llama"),
    ),
    # kernels and the layer
    "scales of the next row in a kernel": (
        [Mutation(TorchInt4, "prepare", "grids.scale.T", "grids.scale.roll(1, 0).T")],
        lambda: check_product(KERNELS["torch_int4"], "int4-g32-sym", torch.bfloat16),
    ),
    "codes restored off by one": (
        [Mutation(TorchInt4, "restore", "+ 8)", "+ 7)")],
        lambda: check_restored(KERNELS["torch_int4"], "int4-g32-sym", torch.bfloat16),
    ),
    "activations rounded to half precision": (
        [Mutation(Reference, "linear", "x.to(work)", "x.half().to(work)")],
        lambda: check_product(KERNELS["reference"], "int4-g32", torch.float32),
    ),
    "only the first rows multiplied": (
        [Mutation(Reference, "linear", "x.to(work)", "x.to(work).where(torch.arange(len(x))[:, None] < 16, 0)")],
        lambda: check_product(KERNELS["reference"], "int4-g32", torch.bfloat16),
    ),
    "every expert multiplied by the first one's weight": (
        [Mutation(Kernel, "of_expert", "shape[0], expert", "shape[0], 0")],
        lambda: check_grouped(KERNELS["reference"], "int4-g32", torch.float32, (48, 96), CPU),
    ),
    "the gradient not permuted back": (
        [Mutation(quantized_nn, "input_gradient", "weight.permutation is not None", "False")],
        lambda: check_gradient("int3-g16", True),
    ),
}


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_a_mistake_is_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutations, check = MUTATIONS[mistake]
    check()
    for mutation in mutations:
        mutation.apply(monkeypatch)
    with pytest.raises(AssertionError):
        check()
