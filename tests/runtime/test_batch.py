import numpy as np
import pytest

from llmc.artifact import CacheGroup
from llmc.runtime.batch import build_batch
from llmc.runtime.block_manager import BlockManager
from llmc.runtime.scheduler import Chunk
from llmc.runtime.sequence import Sequence

PAGE = 4


def batch_of(*chunks):
    """The arrays of chunks, each (tokens known before, new tokens, rows of logits)."""
    group = CacheGroup(name="g", window=None, page_size=PAGE)
    blocks = BlockManager([group], [32], max_rows=8, max_length=64)
    made = []
    for arrival, (start, count, rows) in enumerate(chunks):
        tokens = np.arange(start + count, dtype=np.int32) + 100 * arrival
        sequence = Sequence(tokens, arrival=arrival)
        sequence.row = blocks.open()
        blocks.extend(sequence.row, start + count)
        made.append(Chunk(sequence, start, count, rows))
    return build_batch(made, blocks)


@pytest.mark.parametrize(
    "chunks",
    [
        [(5, 1, 1)],
        [(5, 1, 1), (9, 1, 1), (0, 1, 1)],
        [(5, 1, 1), (0, 3, 1), (4, 6, 0)],
        [(0, 7, 7)],
        [(4, 6, 0)],
    ],
    ids=["a decode", "decodes", "decode and prompts", "a scored prompt", "part of a prompt"],
)
def test_every_token_has_its_position_slot_and_row(chunks):
    inputs = batch_of(*chunks)
    positions, ids, wanted, ends, first = [], [], [], [], 0
    for number, (start, count, rows) in enumerate(chunks):
        positions += range(start, start + count)
        ids += [100 * number + p for p in range(start, start + count)]
        first += count
        wanted += range(first - rows, first)
        ends.append(start + count)
    assert inputs.positions.tolist() == positions
    assert inputs.input_ids.tolist() == ids
    assert inputs.logits_rows.tolist() == (wanted or [0])
    assert inputs.q_starts.tolist() == [0, *np.cumsum([c for _, c, _ in chunks])]
    assert inputs.kv_lens.tolist() == ends
    assert inputs.num_decodes == sum(count == 1 for _, count, _ in chunks)
    assert (inputs.max_q_len, inputs.max_kv_len) == (max(c for _, c, _ in chunks), max(ends))
    sequence = np.repeat(np.arange(len(chunks)), [c for _, c, _ in chunks])
    pages = inputs.block_tables[0, sequence, np.array(positions) // PAGE]
    assert inputs.slots[0].tolist() == (pages * PAGE + np.array(positions) % PAGE).tolist()
    arrays = [getattr(inputs, name) for name in ("input_ids", "positions", "slots", "logits_rows")]
    assert all(a.dtype == np.int32 and a.flags.c_contiguous for a in arrays)
