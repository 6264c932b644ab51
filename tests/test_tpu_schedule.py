"""The scalar program of a schedule is executed as the chip would: on small schedules written by hand."""
import textwrap

import numpy as np
import pytest

from instruments.kernel_time import schedule
from instruments.kernel_time.schedule import Program, parse, smem_words


class Recorder:
    """In the place of the DMA model: keeps what is started, and lets every wait take two cycles."""

    def __init__(self):
        self.started, self.flags = [], []

    def start(self, time, kind, source, granules, destination, flag):
        self.started.append((time, kind, granules, flag))
        if kind.endswith('_to_smem'):
            self.fill(source, destination)
        return 0.0

    def wait(self, time, flag, granules, place):
        return 2.0

    def set_flag(self, time, flag, amount):
        self.flags.append(('set', time, amount))

    def add_flag(self, time, flag, amount):
        self.flags.append(('add', time, amount))


def numbered(bundles: str) -> str:
    """Bundles, one a line, as libtpu prints them."""
    lines = textwrap.dedent(bundles).strip().splitlines()
    return '\n'.join(f'  {place:#x}   : > {line}' if place else f'     0   :  {line}'
                     for place, line in enumerate(lines))


def run(bundles: str, branch_delay: int = 1, tables=()):
    recorder = Recorder()
    program = Program(parse(numbered(bundles)), branch_delay, tables)
    return program.run(recorder), recorder, program


def sent(bundles: str, **rest) -> list[int]:
    """The granules of the DMAs that a program starts: how its registers are looked at."""
    return [granules for _, _, granules, _ in run(bundles, **rest)[1].started]


def test_bundles_are_parsed_and_comments_nest():
    text = """
    = control target key start
         0   :  { %s9_s0 = smov 5 /* a /* nested */ comment ;; } */  ;;  %10 = vsyncpa [#allocation3 + $0x1], 0 }
       0x1 LB: > > { %v4_v2 = vadd.f32 %v1_v0, %v2_v1 } /* Start region 3 */
       0x2   :  {}
    """
    first, second, third = parse(text)
    assert [operation.opcode for operation in first.operations] == ['smov', 'vsyncpa']
    assert first.operations[0] == schedule.Operation('%s9_s0', 'smov', '5')
    assert (second.depth, second.operations[0].result, third.operations) == (2, '%v4_v2', ())


def test_a_gap_in_the_numbers_is_no_schedule():
    with pytest.raises(ValueError, match='not a schedule'):
        parse('     0   :  {}\n   0x2   :  {}\n')


LOOP = """
    { %s1_s0 = smov 0  ;;  %s2_s1 = smov 0 }
    { %s3_s0 = sadd.s32 1, %s1_s0 }
    { %p4_p0 = scmp.lt.s32.totalorder %s3_s0, 5 }
    { %6 = sbr.rel (%p4_p0) target bundleno = 1 (0x1), region = 2 }
    { %s7_s1 = sadd.s32 10, %s2_s1 }
    {}
    { %8 = dma.hbm_to_vmem [thread:$0]  %s2_s5, %s7_s1, %s2_s6, %s2_s7 }
    """


@pytest.mark.parametrize(('delay', 'cycles', 'total'), [(1, 1 + 5 * 4 + 2, 50), (2, 1 + 5 * 5 + 1, 50)])
def test_a_loop_runs_to_its_bound_with_the_branch_delay_slots(delay, cycles, total):
    """Five turns; the bundles after the branch belong to each turn, as many as the chip has delay slots."""
    execution, recorder, _ = run(LOOP, branch_delay=delay)
    assert execution.cycles == cycles and execution.counts[1] == execution.counts[4] == 5
    assert execution.counts[5] == (5 if delay == 2 else 1)
    assert [granules for _, _, granules, _ in recorder.started] == [total]


def test_a_bundle_reads_what_registers_held_before_it():
    """Two registers change places in one bundle."""
    assert sent("""
        { %s1_s0 = smov 3  ;;  %s2_s1 = smov 4 }
        { %s3_s0 = smov %s2_s1  ;;  %s4_s1 = smov %s1_s0 }
        { %8 = dma.hbm_to_vmem [thread:$0]  0, %s3_s0, 0, 0 }
        { %9 = dma.hbm_to_vmem [thread:$0]  0, %s4_s1, 0, 0 }
        """) == [4, 3]


def test_predicates_decide_what_happens():
    """(!%p) is its opposite; a predicated move keeps the old value or passes the other one through."""
    assert sent("""
        { %p1_p0 = scmp.eq.s32.totalorder 1, 1  ;;  %s2_s1 = smov 7 }
        { %8 = dma.hbm_to_vmem [thread:$0]  (%p1_p0), 0, 1, 0, 0 }
        { %9 = dma.hbm_to_vmem [thread:$0]  (!%p1_p0), 0, 2, 0, 0 }
        { %s3_s2 = smov (!%p1_p0, %s2_s1), 5 }
        { %10 = dma.hbm_to_vmem [thread:$0]  0, %s3_s2, 0, 0 }
        { %s4_s3 = scalar_select /*predicate=*/%p1_p0, /*on_true=*/11, /*on_false=*/12 }
        { %11 = dma.hbm_to_vmem [thread:$0]  0, %s4_s3, 0, 0 }
        { %p5_p1 = pnand %p1_p0, !%p1_p0  ;;  %p6_p2 = por %p1_p0, %p1_p0 }
        { %12 = dma.hbm_to_vmem [thread:$0]  (%p5_p1), 0, 13, 0, 0 }
        """) == [1, 7, 11, 13]


@pytest.mark.parametrize(('operation', 'value'), [
    ('sadd.s32 2147483647, 1', -2**31), ('ssub.s32 3, 5', -2), ('smul.u32 6, 7', 42), ('sand.u32 12, 10', 8),
    ('sor.u32 12, 10', 14), ('sxor.u32 12, 10', 6), ('sshll.u32 3, 4', 48), ('sshra.s32 4294967280, 2', -4),
    ('sshrl.u32 4294967280, 28', 15), ('smin.u32 4294967295, 5', 5), ('smin.s32 4294967295, 5', -1),
    ('smulhi.u32 2863311531, 9', 6), ('scalar_lea.hbm 100, 28', 128), ('smax.s32 3, 9', 9)])
def test_scalar_arithmetic_is_that_of_32_bits(operation, value):
    assert sent(f"""
        {{ %s1_s0 = {operation} }}
        {{ %8 = dma.hbm_to_vmem [thread:$0]  0, %s1_s0, 0, 0 }}
        """) == [value]


def test_memory_holds_what_was_stored_and_waits_delay_what_follows():
    """A spilled scalar comes back; the DMA after a wait of two cycles starts two cycles later."""
    execution, recorder, program = run("""
        { %1 = sst [smem:[#allocation5_spill]] 9 }
        { %s2_s0 = sld [smem:[#allocation5_spill]] }
        { %3 = dma.done.wait [#allocation7], 64 }
        { %4 = vsyncadd [#allocation7], 4294967232 }
        { %5 = dma.hbm_to_vmem [thread:$0]  0, %s2_s0, 0, [#allocation7] }
        """)
    assert execution.cycles == 5 + 2 and recorder.flags == [('add', 5.0, -64)]
    assert recorder.started == [(6.0, 'hbm_to_vmem', 9, program.allocations['#allocation7'])]


TABLE = """
    { %s1_s0 = inlined_call_operand.hbm [shape: s32[4], index: 0, kind: input, shape index: {}] }
    { %s2_s1 = inlined_call_operand.hbm [shape: bf16[8,128], index: 1, kind: input, shape index: {}] }
    { %s3_s0 = sshll.u32 %s1_s0, 4 }
    { %4 = dma.hbm_to_smem [thread:$0]  %s3_s0, 1, [#allocation9], 0 }
    { %s5_s2 = sld [smem:[#allocation9 + $0x2]] }
    { %6 = dma.hbm_to_vmem [thread:$0]  0, %s5_s2, 0, 0 }
    """


def test_tables_are_read_where_the_kernel_copies_them():
    """Operand n holds table n; a missing one reads as zeros and is reported, one of another size is refused."""
    _, recorder, program = run(TABLE, tables=[np.array([10, 20, 30, 40], np.int32)])
    assert recorder.started[1][2] == 30 and not program.warnings
    with pytest.raises(ValueError, match=r's32\[4\], its table int32 of \(3,\)'):
        run(TABLE, tables=[np.array([10, 20, 30], np.int32)])
    _, recorder, program = run(TABLE, tables=[None])
    assert recorder.started[1][2] == 0 and list(program.warnings) == [
        'input 0 is read as scalars and not given: zeros']


def test_what_is_not_understood_is_reported():
    _, _, program = run('{ %s1_s0 = snew.s32 1, 2  ;;  %s2_s1 = vpop.sfrf %v3 }')
    assert set(program.warnings) == {'operation snew.s32', 'a vector becomes a scalar: vpop.sfrf'}


def test_a_kernel_that_does_not_end_is_reported():
    endless = '{ %1 = sbr.rel target bundleno = 0 (0x0), region = 1 }\n{}\n{}'
    with pytest.raises(ValueError, match='still runs'):
        Program(parse(numbered(endless)), 1).run(Recorder(), most_cycles=1000)


def test_integers_lie_in_smem_as_words():
    """32 bits: rows padded to 128; int8: byte n of a word is the n-th group of 128, or the n-th of four rows."""
    assert list(smem_words(np.array([5, 6], np.int32))) == [5, 6]
    table = np.arange(6, dtype=np.int32).reshape(2, 3)
    words = smem_words(table)
    assert len(words) == 256 and list(words[:4]) == [0, 1, 2, 0] and list(words[128:131]) == [3, 4, 5]
    narrow = np.zeros(512, np.int8)
    narrow[[0, 128, 256, 384]] = [1, 2, 3, 4]
    assert smem_words(narrow)[0] == 0x04030201 and len(smem_words(narrow)) == 128
    tiled = np.zeros((8, 256), np.int8)
    tiled[:4, 1], tiled[4:, 1], tiled[3, 130] = [1, 2, 3, 4], [5, 6, 7, 8], 9
    words = smem_words(tiled)
    assert (words[1], words[129], words[256 + 2]) == (0x04030201, 0x08070605, 0x09000000)
