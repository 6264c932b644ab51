"""Find out what serving needs before it starts: compile the engine's programs.  Before: one_mesh.py."""
import dataclasses
import re
import time
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from instruments.planning.one_mesh import MeshPlan, device_bytes, from_compiled, needed_bytes, refused, with_verdict
from instruments.tpu.chips import Chip
from model.config import Compute, LlamaConfig
from model.partition import DTYPES, check_rows
from model.weights import abstract_params
from serving.engine import BatchRows, Engine


class Vocabulary(NamedTuple):
    """Hold what the engine's programs take from a tokenizer."""

    vocab_size: int
    bos_token_id: int
    eos_token_id: int


def plan_decoding(sizes: LlamaConfig, compute: Compute, mesh: Mesh, mesh_dim: str, seq_length: int, batch_size: int,
                  chip: Chip, usable: int) -> MeshPlan:
    """Compile the engine's programs at their longest, seq_length / 2 tokens of prompt, and say what they need.

    These are prefill, grow (which holds the short cache and the long one) and decode.  Memory is that of the hungriest,
    the time that of a token of decode.
    """
    check_rows(batch_size, mesh, 'batch_size')
    dtype, spec = DTYPES[compute.dtype], jax.ShapeDtypeStruct
    weights = jax.tree.map(lambda x: spec(x.shape, dtype, sharding=x.sharding), abstract_params(sizes, mesh))
    engine = Engine(None, sizes, compute, Vocabulary(sizes.vocab_size, sizes.bos_token_id, sizes.eos_token_id), mesh,
                    batch_size=batch_size, input_length=seq_length // 2, seq_length=seq_length)
    parts = dict(parameters=device_bytes(weights))
    plan = MeshPlan(mesh_dim, batch_size, seq_length, 1, '', parts, batch_size, fits=True, usable=usable)
    rows = BatchRows(*(spec((batch_size,), x) for x in (np.int32, np.uint32, np.float32, bool)))
    began = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            prefill = engine._compile('prefill', weights, spec((batch_size, seq_length // 2), np.int32), rows)
            grow = engine._compile('grow', prefill.out_info, static=seq_length)
            decode = engine._compile('decode', weights, grow.out_info, rows, spec((), np.int32))
    except jax.errors.JaxRuntimeError as error:
        return refused(plan, error, time.perf_counter() - began)
    cache = decode.out_info.cache
    plan = dataclasses.replace(plan, parts=parts | dict(cache=device_bytes(cache)))
    # the kernel waits for the filled slots of its layer, and for little else (README, Kernels)
    seconds = device_bytes(cache) / sizes.num_hidden_layers / chip.hbm_bandwidth
    plan = from_compiled(plan, decode, mesh, chip, lambda name: seconds, 0.0, one_token(decode.as_text()))
    needed = max(needed_bytes(program.memory_analysis()) + resident
                 for program, resident in ((prefill, 0), (grow, parts['parameters']), (decode, 0)))
    return with_verdict(dataclasses.replace(plan, needed=needed, compile_seconds=time.perf_counter() - began))


def one_token(text: str) -> str:
    """Take decode's loop for one turn in its text: how many tokens there will be is not in the program."""
    return re.sub(r'( while\(.*op_name="jit\(_decode\)/shard_map/while".*)', r'\1 "known_trip_count":{"n":"1"}', text)
