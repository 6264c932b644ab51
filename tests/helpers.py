"""What several tests share: running the network on a mesh, and small configurations."""
import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from model import llama, loss
from model.cache import init_cache
from model.config import Compute, LlamaConfig
from model.lora import abstract_base
from model.partition import BATCH, DTYPES, make_mesh
from model.quantized import quantize
from model.weights import Layer, partitions
from serving.engine import make_engine
from serving.texts import Texts
from serving.work import Sampling


def compiler_knows(options: dict) -> dict:
    """Keep the options that this jaxlib's compiler has: jaxlib 0.11 has no emitters but those for fusions."""
    known = {}
    for name, value in options.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
            known[name] = value
    return known


# 8 query heads over 2 key/value heads: every mesh of 8 devices divides it, and mp = 8 shares each key/value head
TINY = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
                   num_key_value_heads=2, max_sequence_length=128)
PLAIN = Compute()
# compiles in a third of the time, and runs slower: for programs that run a few times
QUICK = compiler_knows({'xla_backend_optimization_level': 0, 'xla_cpu_use_fusion_emitters': False})
MESHES = ('8,1,1', '1,8,1', '1,1,8', '1,4,2', '2,2,2')


def one_device():
    return make_mesh('1,1,1', jax.devices()[:1])


def on_mesh(function, config, mesh, *outputs):
    """jit(shard_map) of `function(params, *arrays)`: arrays are split by row, outputs as given (default: by row)."""
    specs = partitions(config)

    def call(params, *arrays):
        mapped = jax.shard_map(function, mesh=mesh, in_specs=(specs, *[BATCH] * len(arrays)),
                               out_specs=outputs[0] if outputs else BATCH)
        return mapped(params, *arrays)

    return jax.jit(call, compiler_options=QUICK)


def freeze(params, config, mesh, dtype):
    """Float32 weights as the base that adapters train beside, by the definition; checkpoints load it in pieces."""
    like = jax.tree.map(lambda x: x.sharding, abstract_base(config, mesh, dtype))
    store = lambda params: quantize(params, config, weight_only=True) if dtype == 'int8' else jax.tree.map(
        lambda w: w.astype(DTYPES[dtype]), params)
    return jax.jit(store, out_shardings=like)(params)


def merged(base, adapters, lora):
    """Float32 weights with an adapter added: W + scale A B."""
    def merge(weight, adapter):
        if adapter is None:
            return weight
        return weight + lora.scale * jnp.einsum('nir,nro->nio', adapter.a, adapter.b, precision='highest')

    layers = Layer(**{field.name: merge(getattr(base.layers, field.name), getattr(adapters.layers, field.name))
                      for field in dataclasses.fields(Layer)})
    return dataclasses.replace(base, layers=layers)


def logits(params, config, tokens_BT, *, segments_BT=None, compute=PLAIN, mesh=None):
    """z_BTV float32 of the whole network."""
    def forward(params, tokens_BT, segments_BT):
        h_BTM, _ = llama.hidden_states(params, tokens_BT, segments_BT, config, compute)
        return loss.logits(params, h_BTM)

    segments_BT = jnp.ones_like(tokens_BT) if segments_BT is None else segments_BT
    return on_mesh(forward, config, mesh or one_device(), PartitionSpec(('dp', 'fsdp'), None, 'mp'))(
        params, tokens_BT, segments_BT)


def greedy(params, config, prompt_BT, count, mesh=None):
    """[B, count] greedy tokens: the prompt is written to the cache in one pass, then one token at a time."""
    mesh = mesh or one_device()
    mp = mesh.shape['mp']

    def decode(params, prompt_BT):
        B, T = prompt_BT.shape
        cache = init_cache(config, B, T + count, jnp.float32, mp)
        varying = functools.partial(jax.lax.pcast, axis_name=('dp', 'fsdp', 'mp'), to='varying')
        cache, tokens_BT, positions_BT, out = jax.tree.map(varying, cache), prompt_BT, jnp.arange(T)[None], []
        for step in range(count):
            h_BTM, cache = llama.hidden_states(params, tokens_BT, None, config, Compute(), cache=cache,
                                               positions_BT=jnp.broadcast_to(positions_BT, tokens_BT.shape))
            z_BV = jax.lax.all_gather(loss.logits(params, h_BTM[:, -1:])[:, 0], 'mp', axis=1, tiled=True)
            tokens_BT, positions_BT = jnp.argmax(z_BV, -1).astype(jnp.int32)[:, None], jnp.full((1, 1), T + step)
            tokens_BT = jax.lax.pmax(tokens_BT, 'mp')  # equal on every mp device; says so to the varying-axis tracking
            out.append(tokens_BT)
        return jnp.concatenate(out, axis=1)

    return on_mesh(decode, config, mesh)(params, prompt_BT)


class Asker:
    """An engine with the texts it is asked in; `params` and what follows as Engine, Programs and Texts take them."""

    def __init__(self, params, config, compute, tokenizer, mesh, *, batch_size=4, input_length=64, seq_length=128,
                 weight_dtype='', cache_dtype='', prefix_reuse=True, add_bos_token=True, seed=42, adapters=()):
        self.texts = Texts(tokenizer, config, input_length=input_length, seq_length=seq_length,
                           add_bos_token=add_bos_token)
        self.engine = make_engine(lambda: params, config, compute, mesh, tokenizer, batch_size=batch_size,
                                  length=seq_length, answer_tokens=seq_length - input_length, seed=seed,
                                  weight_dtype=weight_dtype, cache_dtype=cache_dtype, prefix_reuse=prefix_reuse,
                                  adapters=adapters)
        self.programs, self.params = self.engine.programs, self.engine._params

    def ask(self, question):
        return question.answer(self.engine.run(question.works))

    def generate(self, prompts, temperature=0.0, count=None, **fields):
        sampling = fields.pop('sampling', Sampling(temperature))
        return self.ask(self.texts.generate(prompts, sampling, count, **fields))

    def greedy_until(self, *arguments):
        return self.ask(self.texts.greedy_until(*arguments))

    def loglikelihood(self, *arguments):
        return self.ask(self.texts.loglikelihood(*arguments))

    def tokens(self, temperature, prompts, count=12, **fields):
        """The tokens of each answer, as if they were the engine's first."""
        self.engine._works = 0
        return [answer.token_ids for answer in self.generate(prompts, temperature, count, **fields)]
