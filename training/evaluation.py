"""Loss and accuracy on held-out batches while training.  Before: training/step.py."""
from collections.abc import Callable

from jax.sharding import Mesh

from data.batches import Batch
from model.config import Compute, LlamaConfig
from model.lora import Lora
from model.weights import Llama
from training.loop import put
from training.step import make_eval_step


def evaluator(batches: list[Batch], config: LlamaConfig, compute: Compute, mesh: Mesh,
              wait_for_all: Callable[[], object], lora: Lora | None = None) -> Callable[[Llama], dict]:
    """Make the function weights -> {eval_loss, eval_accuracy}: the mean over `batches`, the same ones each time.

    wait_for_all: called between compiling a program and running it, as in CompiledStep.
    """
    held_out = [put(batch, mesh) for batch in batches]
    eval_step, programs = make_eval_step(config, compute, mesh, lora), {}

    def evaluate(params: Llama) -> dict:
        for batch in held_out:
            if (shape := batch.tokens_BT.shape) not in programs:
                programs[shape] = eval_step.lower(params, batch).compile()
                wait_for_all()
        rows = [programs[batch.tokens_BT.shape](params, batch) for batch in held_out]
        return {name: sum(float(row[name]) for row in rows) / len(rows) for name in rows[0]}

    return evaluate
