"""Find out what serving needs before it starts: compile the server's programs.  Before: one_mesh.py."""
import dataclasses
import time

import jax
from jax.sharding import Mesh

from instruments.planning.one_mesh import MeshPlan, device_bytes, from_compiled, needed_bytes, refused, with_verdict
from instruments.tpu.chips import Chip
from model.config import Compute, LlamaConfig
from model.partition import DTYPES, check_rows, rows_unit
from model.weights import abstract_params
from serving.programs import Programs


def plan_decoding(sizes: LlamaConfig, compute: Compute, mesh: Mesh, mesh_dim: str, seq_length: int, batch_size: int,
                  chip: Chip, usable: int) -> MeshPlan:
    """Compile the server's programs for batch_size slots of seq_length tokens, and say what they need.

    These are the largest prefill and decode of every slot.  Memory is that of the hungrier, the time that of decode.
    """
    check_rows(batch_size, mesh, 'batch_size')
    dtype, spec = DTYPES[compute.dtype], jax.ShapeDtypeStruct
    weights = jax.tree.map(lambda x: spec(x.shape, dtype, sharding=x.sharding), abstract_params(sizes, mesh))
    programs = Programs(sizes, compute, mesh, slots=batch_size // rows_unit(mesh), length=seq_length,
                        vocabulary=sizes.vocab_size)
    parts = dict(parameters=device_bytes(weights))
    plan = MeshPlan(mesh_dim, batch_size, seq_length, 1, '', parts, batch_size, fits=True, usable=usable)
    began = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            cache = programs.compile('new_cache').out_info
            prefill = programs.compile('prefill', weights, cache, *programs.shapes('prefill')[-1])
            decode = programs.compile('decode', weights, cache, *programs.shapes('decode')[-1])
    except jax.errors.JaxRuntimeError as error:
        return refused(plan, error, time.perf_counter() - began)
    plan = dataclasses.replace(plan, parts=parts | dict(cache=device_bytes(cache)))
    # the kernel waits for the filled slots of its layer, and for little else (README, Kernels)
    seconds = device_bytes(cache) / sizes.num_hidden_layers / chip.hbm_bandwidth
    plan = from_compiled(plan, decode, mesh, chip, lambda name: seconds, 0.0, decode.as_text())
    needed = max(needed_bytes(program.memory_analysis()) for program in (prefill, decode))
    return with_verdict(dataclasses.replace(plan, needed=needed, compile_seconds=time.perf_counter() - began))

