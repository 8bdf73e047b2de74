"""Machine instructions are counted as often as they run."""

import os

import pytest

from bench.instructions import OTHER, counted, disassembled
from bench.roofline import operations

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
        /*0020*/                   FADD R1, R1, R2 ;
.L_x_1:
        /*0030*/                   LDG.E.64 R12, desc[UR8][R4.64] ;
        /*0040*/                   FFMA R1, R1, R2, R3 ;
        /*0050*/              @!P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   FMNMX.NAN R3, R1, R2, !PT ;
        /*0070*/               @P2 FADD R4, R4, -R5 ;
        /*0080*/                   MUFU.RSQ R6, R6 ;
        /*0090*/                   SHFL.BFLY PT, R7, R6, 0x1, 0x1f ;
        /*00a0*/              @!P3 BRA `(.L_x_2) ;
.L_x_3:
        /*00b0*/                   STG.E.64 desc[UR8][R4.64], R12 ;
        /*00c0*/              @!P4 BRA `(.L_x_1) ;
.L_x_0:
        /*00d0*/                   EXIT ;
.L_x_4:
        /*00e0*/                   BRA `(.L_x_4);
        /*00f0*/                   NOP;
"""


def test_what_is_in_a_loop_counts_as_often_as_it_goes_around():
    assert counted(SASS, 8) == {
        "add, multiply": 1 + 8,
        "min, max, compare, select": 8,
        "root": 8,
        "shuffle": 8,
        "load, store": 2,
        OTHER: 2 + 8,  # the branches
    }


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_a_quadrangle_is_loaded_and_stored_once():
    pytest.importorskip("triton")
    counts = counted(disassembled(4), 4)
    assert counts["load, store"] == 4 + 4 + 4  # vertices of both sides, gradients
    assert counts["shuffle"] == 0
    assert counts["add, multiply"] >= operations(4, 4, gradient=True).arithmetic
