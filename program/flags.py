"""Every flag of every program, once: name, default, help.  `--help` and docs/FLAGS.md say it again.

A program's table is a tuple of `Flag`s.  `run(main, TABLE)` reads the command line into a locked ConfigDict whose
nesting follows the dots of the names (`--optimizer.adamw_optimizer.lr=1e-3` is `config.optimizer.adamw_optimizer.lr`),
calls `main(config)`, and turns a caller's mistake (Mistake, OSError) into one line and exit code 2.

`--config=FILE.py` names a recipe (configs/): plain Python whose `get_config()` returns {flag name: default}.  A flag on
the command line wins over the recipe, the recipe over the table.
"""
import ast
import difflib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags as absl_flags
from ml_collections import ConfigDict

from mistake import Mistake


class Flag(NamedTuple):
    """One flag.  Its type is that of `default` (bool, int, float or str), or `kind` where the default is None (the
    program fills it in); `choices` restricts a str.  `only` says why no value but the default is accepted (EasyLM's
    flags that we do not follow: a command that leaves them alone runs, one that sets them is refused, never ignored).
    `recipe`: names of train.py's flags whose value in a recipe is meant; a program with such flags takes from a recipe
    what it knows, and leaves train.py's other flags be.
    """

    name: str
    default: Any
    help: str
    choices: tuple[str, ...] | None = None
    kind: type | None = None
    only: str = ''
    recipe: tuple[str, ...] = ()

    @property
    def type(self) -> type:
        return self.kind or type(self.default)


COMMON = (
    Flag('config', '', 'recipe with defaults for all flags: a file of configs/; a flag on the command line wins'),
    Flag('show_traceback', False, 'on an error print where it was raised, not only what it says'),
)

# ---------------------------------------------------------------- the programs' tables

ASSETS = (
    Flag('name', '', 'the asset to fetch (--list=True shows them)'),
    Flag('cache_dir', '', 'where fetched assets stand; else $PALLAMA_CACHE, else ~/.cache/pallama'),
    Flag('list', False, 'list the assets and stop'),
    Flag('verify', False, 'compare the SHA-256 of an asset that is already there, not only its sizes'),
)

PREPARE = (
    Flag('input', '', 'labelled set: .csv or .tsv (with a header), .json (list of objects), .jsonl or .txt (one object '
         'a line), .parquet, or a directory with data/train-00000-of-00001.parquet, train.parquet or train.jsonl'),
    Flag('split', '', 'the part of a directory to take: train, validation or test'),
    Flag('output', '', 'directory to write NAME.jsonl, eval_NAME.json and labels_NAME.json to'),
    Flag('text_field', '', 'name of the field or column that holds the text; empty: found by its name (text, review, '
         'ticket, message, ...), or the other one of two'),
    Flag('label_field', '', 'name of the field or column that holds the label, its number or its name; empty: found by '
         'its name (label, class, sentiment, team, stars, ...), or the other one of two'),
    Flag('labels', '', 'names of the labels 0, 1, .., as the model shall answer them; 1=bad,2=good where the numbers '
         'are others; "quoted, with a comma"; empty: those in the data (Negative,Positive for 0 and 1)'),
    Flag('template', '', r"the prompt, with {text} for the text and \n for a line's end: 'Ticket: {text}\nTeam:'; it "
         "is kept in the checkpoint; empty: the article's, '[Text]: {text}\\n[Sentiment]:'"),
    Flag('split_ratios', '', 'part the examples into train,test (0.8,0.2) or train,validation,test (0.8,0.1,0.1), each '
         'label in proportion, equal texts on one side; empty: one part'),
    Flag('skip_bad_rows', False, 'skip and count rows without text or label, instead of refusing the first'),
    Flag('sample_ratio', 1.0, 'part of the examples to take'),
    Flag('sample_size', 0, 'number of examples to take; 0: as sample_ratio says'),
    Flag('stratified', True, 'sample each label by itself, so that their proportions stay'),
    Flag('shuffle', True, 'draw at random and write in that order; False takes from the head of the file'),
    Flag('seed', 42, 'of drawing and parting'),
    Flag('record_fields', 'text,prompt,answer', 'keys of a record: text is prompt and answer in one, for loss on all '
         "tokens (fields=text); with prompt and answer too, fields='[prompt],answer' puts the loss on the label alone",
         ('text', 'text,prompt,answer')),
    Flag('overwrite', False, 'write over what another preparation has left in `output`'),
)

MODEL = (  # common to every program that runs the network
    Flag('load_llama_config', '', 'sizes of the model: a name of model/config.py (3b, smollm2_135m, ...) or '
         'json::FILE; empty: those that the checkpoint states'),
    Flag('load_checkpoint', '', 'weights as TYPE::PATH with TYPE one of hf, gguf, params, trainstate, '
         'trainstate_params, flax_params, or the bare path of a checkpoint of ours; empty for random weights'),
    Flag('tokenizer.vocab_file', '', 'tokenizer.model (sentencepiece), tokenizer.json, or a directory with one; not '
         'needed when the checkpoint holds its tokenizer'),
    Flag('tokenizer.add_bos_token', False, 'a second bos, by the tokenizer', only='the text processor (training) and '
         '--add_bos_token (serving) add the bos token; twice would be a mistake'),
    Flag('tokenizer.add_eos_token', False, 'a second eos, by the tokenizer', only='the text processor adds the eos '
         'token; twice would be a mistake'),
    Flag('mesh_dim', '1,-1,1', "sizes of the mesh axes dp,fsdp,mp: '1,4,2', or 'dp:1,fsdp:4,mp:2'; one may be -1; "
         'a leading ! keeps the devices in plain order'),
    Flag('dtype', 'fp32', 'of activations and matrix products; parameters in training are always float32',
         ('fp32', 'float32', 'bf16', 'bfloat16', 'fp16', 'float16')),
    Flag('attention', '', 'implementation of attention: reference (einsum and softmax), or pallas (the TPU kernels; on '
         'other platforms interpreted, for tests); empty: pallas on a TPU, reference elsewhere',
         ('', 'reference', 'pallas')),
    Flag('seed', 42, 'of initial weights, shuffling and sampling'),
    Flag('jax_distributed.initialize_jax_distributed', False, 'call jax.distributed.initialize with the values below '
         'before anything else (on a TPU pod they are found without being given)'),
    Flag('jax_distributed.coordinator_address', None, 'HOST:PORT of process 0', kind=str),
    Flag('jax_distributed.num_processes', None, 'how many processes there are', kind=int),
    Flag('jax_distributed.process_id', None, 'which of them this is, from 0', kind=int),
    Flag('jax_distributed.local_device_ids', None, "the devices of this process: '0,1,2'", kind=str),
)


ADD_BOS_TOKEN = Flag('add_bos_token', None, 'begin each prompt with the bos token; not given: as the checkpoint was '
                     'trained, True where it does not say', kind=bool)

EVALUATE = MODEL + tuple(flag for flag in PREPARE if flag.name in ('input', 'split', 'text_field', 'label_field')) + (
    Flag('labels', '', 'names of the labels 0, 1, .., as prepare_data.py takes them; empty: those of the checkpoint, '
         'or of labels_NAME.json beside a prepared NAME.jsonl, else those in the data'),
    Flag('sample_size', 0, 'reviews to evaluate, drawn with `seed`, each label in proportion; 0 for all'),
    Flag('method', 'loglikelihood', "loglikelihood: the likelier answer; generate: what greedy decoding says; or both",
         ('loglikelihood', 'generate', 'both')),
    Flag('url', '', 'ask the server that runs there, for example http://127.0.0.1:5007, instead of --load_checkpoint'),
    Flag('output_dir', '', 'for evaluation.json and confusion_matrix.png; empty for runs/evaluation-DATE-TIME'),
    Flag('before', '', 'evaluation.json of the same reviews before fine-tuning: prints what changed'),
    Flag('samples', 6, 'reviews whose generated text is kept and shown; 0 for none'),
    Flag('sample_tokens', 48, 'most tokens generated for such a sample (a server decides by itself)'),
    Flag('max_new_tokens', 8, 'most tokens of an answer, method=generate (a server decides by itself)'),
    Flag('batch_size', 16, 'rows in a batch of the engine, or texts in a request to the server'),
    ADD_BOS_TOKEN,
)


def _dataset(name: str) -> tuple[Flag, ...]:
    """The flags of train_dataset and eval_dataset."""
    text, rows, hub = f'{name}.text_processor.', f'{name}.json_dataset.', f'{name}.huggingface_dataset.'
    ours = lambda group: (
        Flag(group + 'skip_bad_lines', False, 'skip and count bad records, instead of refusing the first'),
        Flag(group + 'batching', 'stream', 'stream: one endless stream of tokens cut into rows, examples straddling '
             'them (EasyLM); rows: one example a row, rows of like length together, shuffled each epoch',
             ('stream', 'rows')),
        Flag(group + 'too_long', 'error', 'batching=rows: what to do with an example longer than seq_length',
             ('error', 'truncate', 'drop')),
    )
    return (
        Flag(f'{name}.type', 'huggingface', 'kind of data set: a file of JSON lines (json_dataset), or one that the '
             'package `datasets` loads (huggingface_dataset)', ('huggingface', 'json')),
        Flag(text + 'fields', '', "what of a record becomes tokens: '[prompt],answer': `,` separates fields tokenized "
             'alone, `+` joins keys, '
             '[..] carries no loss, <|bos|> <|eos|> <|123|> are tokens, {key} holds base64 tokens'),
        Flag(text + 'fields_from_example', '', 'key of the record that holds its own `fields`'),
        Flag(text + 'subfield_separator', ' ', 'between keys joined by +'),
        Flag(text + 'prepend_text', '', 'put before the first field'),
        Flag(text + 'add_bos_token', True, 'begin each example with the bos token (no loss on it)'),
        Flag(text + 'add_eos_token', True, 'end each example with the eos token (loss on it)'),
        Flag(text + 'base64_token_dtype', 'i4', 'numpy dtype of {key} fields'),
        Flag(rows + 'path', '', 'JSON lines, one record a line'),
        Flag(rows + 'seq_length', 1024, 'tokens in a row of the batch; the longest row where batching=rows'),
        Flag(rows + 'batch_size', 8, 'rows in a batch, over all devices'),
        Flag(rows + 'always_start_with_bos', False, 'overwrite the first token of each packed row with bos'),
        Flag(rows + 'start_seek_loc', 0, 'byte at which to begin, where a line begins (dataset_file_loc of a log); '
             'batching=stream only'),
        Flag(rows + 'example_index_at_start', 0, 'number of that line, from 0 (dataset_example_index + 1 of a log)'),
        Flag(rows + 'tokens_count_at_start', 0, 'where dataset_total_tokens begins to count'),
        Flag(rows + 'tokenizer_processes', 1, 'processes that tokenize; records, errors and resuming are the same with '
             'any number'),
        Flag(rows + 'tokenizer_parallel_chunk_size', 32, 'lines that one process gets at a time'),
        Flag(rows + 'tokenizer_parallel_batch_size', 1024, 'most lines read ahead (or one chunk for each process, '
             'if that is more)'),
        Flag(rows + 'throughput_average_window_size', 200, 'batches over which dataset_average_tps is taken'),
        *ours(rows),
        Flag(hub + 'path', 'c4', 'data set on the hub, or a local directory of JSON lines or parquet (extra: '
             'huggingface)'),
        Flag(hub + 'name', 'en', 'its configuration; empty for a set without one, as a local directory is'),
        Flag(hub + 'split', 'train', 'its split'),
        Flag(hub + 'streaming', False, 'read it while training, instead of fetching it first'),
        Flag(hub + 'seq_length', 1024, 'tokens in a row of the batch; the longest row where batching=rows'),
        Flag(hub + 'batch_size', 8, 'rows in a batch, over all devices'),
        Flag(hub + 'always_start_with_bos', False, 'overwrite the first token of each packed row with bos'),
        Flag(hub + 'batch_token_dtype', 'i4', 'numpy dtype of tokens in a batch',
             only='token ids are int32 everywhere after the tokenizer'),
        *ours(hub),
    )


REMAT = ('', 'nothing_saveable', 'checkpoint_dots', 'checkpoint_dots_with_no_batch_dims', 'everything_saveable')
REMAT_VALUES = f'one of {", ".join(REMAT[1:])}, or save:NAME,NAME to save what model/llama.py gives these names'
NO_DROPOUT = ('there is no dropout: no LLaMA is trained with it, and it would hide in every kernel; use '
              '--optimizer.adamw_optimizer.weight_decay or fewer steps against overfitting')
NO_FCM = 'forgetful causal masking (EasyLM for pretraining) is not built'
NO_CHUNKS = 'attention and ffn are not computed in chunks; against memory use --llama.remat_block=nothing_saveable'

LLAMA = (  # sizes where neither --load_llama_config nor the checkpoint says them, and how much is kept for backward
    Flag('llama.vocab_size', 32000, 'tokens of the vocabulary'),
    Flag('llama.hidden_size', 4096, 'width of the residual stream'),
    Flag('llama.intermediate_size', 11008, 'width of the ffn'),
    Flag('llama.num_hidden_layers', 32, 'layers'),
    Flag('llama.num_attention_heads', 32, 'query heads'),
    Flag('llama.max_sequence_length', 2048, 'longest sequence that is served'),
    Flag('llama.rms_norm_eps', 1e-6, 'epsilon inside the square root of rmsnorm'),
    Flag('llama.initializer_range', 0.02, 'standard deviation of random weights'),
    Flag('llama.bos_token_id', 0, "the tokenizer's own id is taken"),
    Flag('llama.eos_token_id', 1, "the tokenizer's own id is taken"),
    Flag('llama.tie_word_embeddings', False, 'use the embedding as head too'),
    Flag('llama.remat_block', '', 'what the backward pass finds saved of a layer; the rest is computed again; empty: '
         f'all is saved; else {REMAT_VALUES}'),
    Flag('llama.remat_attention', '', 'the same of attention alone'),
    Flag('llama.remat_mlp', '', 'the same of the ffn alone'),
    Flag('llama.use_cache', True, 'a cache of keys and values in decoding',
         only='decoding always uses its cache, training never'),
    *(Flag(f'llama.{name}_pdrop', 0.0, 'probability of dropout', only=NO_DROPOUT)
      for name in ('resid', 'embd', 'attn')),
    *(Flag(f'llama.fcm_{name}_ratio', 0.0, 'part of the keys to hide at random', only=NO_FCM)
      for name in ('min', 'max')),
    *(Flag(f'llama.scan_{name}', False, 'compute it in chunks', only=NO_CHUNKS) for name in ('attention', 'mlp')),
    *(Flag(f'llama.scan_{name}_chunk_size', 1024, 'size of such a chunk', only=NO_CHUNKS)
      for name in ('query', 'key', 'mlp')),
)


TRAIN = MODEL + LLAMA + _dataset('train_dataset') + _dataset('eval_dataset') + (
    Flag('update_llama_config', '', "changes to the model's sizes, as literals: dict(max_sequence_length=4096, "
         "remat_block='nothing_saveable')"),
    Flag('total_steps', 10000, 'micro-steps of the run; 0 for as many as `epochs` says'),
    Flag('epochs', 1, 'passes over the data where total_steps=0 (batching=rows only)'),
    Flag('load_dataset_state', '', 'dataset.json of an earlier run, or its checkpoint: go on in the data where it '
         'stood; replaces all train_dataset flags'),
    Flag('log_freq', 50, 'steps between logged rows'),
    Flag('log_all_worker', False, 'every process writes its log, not process 0 alone'),
    Flag('save_model_freq', 0, 'steps between checkpoints; the final one is always saved'),
    Flag('save_milestone_freq', 0, 'steps between checkpoints that are never deleted'),
    Flag('eval_steps', 0, 'batches of eval_dataset measured at each logged row, the same ones each time'),
    Flag('resume', False, 'continue the run in logger.output_dir (saved with its optimizer state); without one, begin'),
    Flag('reduce_gradients', '', 'dtype in which gradients are summed between devices; empty: that of --dtype',
         ('', 'fp32', 'bf16')),
    Flag('optimizer.type', 'adamw', 'the optimizer', ('adamw', 'palm')),
    Flag('optimizer.accumulate_gradient_steps', 1, 'micro-steps whose mean gradient makes one optimizer step'),
    Flag('optimizer.adamw_optimizer.init_lr', 0.0, 'learning rate at step 0 of the warmup'),
    Flag('optimizer.adamw_optimizer.lr', 0.01, 'learning rate after the warmup'),
    Flag('optimizer.adamw_optimizer.end_lr', 0.001, 'learning rate at lr_decay_steps and after'),
    Flag('optimizer.adamw_optimizer.lr_warmup_steps', 2000, 'optimizer steps of linear warmup'),
    Flag('optimizer.adamw_optimizer.lr_decay_steps', 500000, 'optimizer step at which the cosine ends, warmup '
         'included; 0 for the last step of the run'),
    Flag('optimizer.adamw_optimizer.b1', 0.9, 'decay of the first moment'),
    Flag('optimizer.adamw_optimizer.b2', 0.95, 'decay of the second moment (multiply_by_parameter_scale: an exponent)'),
    Flag('optimizer.adamw_optimizer.clip_gradient', 1.0, 'largest global norm of the gradient'),
    Flag('optimizer.adamw_optimizer.weight_decay', 1e-4, 'decoupled weight decay, on all weights'),
    Flag('optimizer.adamw_optimizer.bf16_momentum', False, 'store the first moment in bfloat16'),
    Flag('optimizer.adamw_optimizer.multiply_by_parameter_scale', False, "scale each matrix's update by its RMS: "
         'another optimizer, see training/optimizer.py'),
    Flag('optimizer.palm_optimizer.lr', 0.01, 'the learning rate is (lr / 0.01) / sqrt(max(step, lr_warmup_steps))'),
    Flag('optimizer.palm_optimizer.lr_warmup_steps', 10000, 'optimizer steps for which it stays constant'),
    Flag('optimizer.palm_optimizer.b1', 0.9, 'decay of the first moment'),
    Flag('optimizer.palm_optimizer.b2', 0.99, 'exponent of the decay of the second moment'),
    Flag('optimizer.palm_optimizer.clip_gradient', 1.0, 'largest global norm of the gradient'),
    Flag('optimizer.palm_optimizer.weight_decay', 1e-4, 'weight decay is (weight_decay / 1e-4) * learning rate ^ 2'),
    Flag('optimizer.palm_optimizer.bf16_momentum', False, 'store the first moment in bfloat16'),
    Flag('checkpointer.format', 'native', 'native: a directory step_N that holds all of it; easylm: the streaming file '
         'that EasyLM reads, overwritten by the next one', ('native', 'easylm')),
    Flag('checkpointer.float_dtype', 'bf16', 'format=easylm: dtype of the floats in the file, optimizer state '
         'included; empty: as they are.  Native checkpoints hold every array as it is',
         ('', 'fp32', 'float32', 'bf16', 'bfloat16', 'fp16', 'float16')),
    Flag('checkpointer.save_optimizer_state', False, 'checkpoints hold what is needed to go on, not only the weights'),
    Flag('checkpointer.keep', 1, 'how many native checkpoints stay; older ones are deleted when a new one is complete'),
    Flag('logger.output_dir', '/tmp/pallama', 'receives metrics.jsonl and checkpoints'),
    Flag('logger.experiment_id', None, 'a directory below output_dir, and the id of the run in Weights & Biases; not '
         'given: output_dir itself, and an id of its own', kind=str),
    Flag('logger.tensorboard', False, 'also write TensorBoard events (extra: tensorboard)'),
    Flag('logger.online', False, 'also log to Weights & Biases (extra: wandb)'),
    Flag('logger.project', 'pallama', 'Weights & Biases project'),
    Flag('logger.prefix', '', 'put before the project as PREFIX--PROJECT'),
    Flag('logger.prefix_to_id', False, 'put `prefix` before experiment_id instead'),
    Flag('logger.entity', None, 'Weights & Biases account', kind=str),
    Flag('logger.notes', None, 'Weights & Biases notes', kind=str),
    Flag('logger.anonymous', None, 'Weights & Biases: allow, must or never', kind=str),
    Flag('logger.wandb_dir', '', 'where Weights & Biases keeps its files; empty for output_dir'),
    Flag('logger.random_delay', 0.0, 'wait at random up to so many seconds before Weights & Biases is asked'),
)


SERVE = MODEL + (
    Flag('initialize_jax_distributed', False, 'the same as jax_distributed.initialize_jax_distributed'),
    Flag('input_length', 1024, 'most tokens of a prompt, bos included; a longer one loses its beginning, and the '
         'answer says so'),
    Flag('seq_length', 2048, 'most tokens of prompt and answer; an answer has at most seq_length - input_length'),
    Flag('top_k', 50, 'sample among the k likeliest tokens; 0 for all'),
    Flag('top_p', 1.0, 'sample among the likeliest tokens whose probabilities sum to top_p (after top_k)'),
    Flag('do_sample', True, 'False makes every answer greedy, whatever its temperature'),
    Flag('num_beams', 1, 'with do_sample=False: /generate and /chat search with as many beams (serving/beams.py)'),
    ADD_BOS_TOKEN,
    Flag('lm_server.host', '127.0.0.1', 'address to listen on (not 0.0.0.0 as EasyLM had it: there is no '
         'authentication, so everyone on the network would be let in)'),
    Flag('lm_server.port', 5007, 'port to listen on; 0 for any free one'),
    Flag('lm_server.batch_size', 1, 'prompts computed together; a multiple of dp*fsdp of mesh_dim'),
    Flag('lm_server.logging', False, 'print each request and its answer; False prints nothing of them'),
    Flag('lm_server.pre_compile', 'generate', 'what to compile before /ready: a comma list of generate, greedy_until, '
         'chat, loglikelihood; all; or nothing, and the first requests wait'),
    Flag('lm_server.default_temperature', 1.0, 'of requests that name none; 0 is greedy'),
    Flag('lm_server.greedy_until_max_length', 5000, 'most tokens of an answer of /greedy-until'),
    Flag('lm_server.prepend_to_prefix', '', 'put before each prefix_text'),
    Flag('lm_server.append_to_prefix', '', 'put after each prefix_text'),
    Flag('lm_server.prepend_to_text', '', 'put before each text that is scored'),
    Flag('lm_server.append_to_text', '', 'put after each text that is scored'),
    Flag('lm_server.chat_prepend_text', '', '/chat: put before the whole conversation, and not returned with it'),
    Flag('lm_server.chat_user_prefix', '', '/chat: put before what the user says'),
    Flag('lm_server.chat_user_suffix', '', '/chat: put after what the user says'),
    Flag('lm_server.chat_lm_prefix', '', '/chat: put before what the model says'),
    Flag('lm_server.chat_lm_suffix', '', '/chat: put after what the model says'),
    Flag('lm_server.notes', '', 'text to show on the page at /'),
    Flag('lm_server.queue_size', 32, 'requests that may wait; one more is answered 429'),
    Flag('lm_server.max_body_bytes', 4_000_000, 'largest body of a request'),
)


def _reused(table: tuple[Flag, ...], **defaults) -> tuple[Flag, ...]:
    """Flags of another program's table, dots of their names written __, with defaults of their own (... keeps it)."""
    by_name = {flag.name: flag for flag in table}
    changed = {name.replace('__', '.'): default for name, default in defaults.items()}
    return tuple(by_name[name] if default is ... else by_name[name]._replace(default=default)
                 for name, default in changed.items())


PLAN = (
    Flag('topology', '', 'the slice to plan for, by the name that libtpu gives it: v5e:2x4, v5p:8x8x4, v6e:16x16'),
) + _reused(
    TRAIN, load_llama_config=..., update_llama_config=..., mesh_dim='', dtype='bf16', attention='pallas',
    reduce_gradients=..., llama__remat_block=..., llama__remat_attention=..., llama__remat_mlp=..., optimizer__type=...,
    optimizer__accumulate_gradient_steps=..., optimizer__adamw_optimizer__multiply_by_parameter_scale=...,
    optimizer__adamw_optimizer__bf16_momentum=..., optimizer__palm_optimizer__bf16_momentum=...,
) + (
    Flag('batch_size', 8, 'rows in a batch, over all devices',
         recipe=('train_dataset.json_dataset.batch_size', 'train_dataset.huggingface_dataset.batch_size')),
    Flag('seq_length', 1024, 'tokens in a row; with --serve of prompt and answer',
         recipe=('train_dataset.json_dataset.seq_length', 'train_dataset.huggingface_dataset.seq_length')),
    Flag('segments', False, 'rows have segments, as with batching=rows'),
    Flag('serve', False, "plan serve.py's decoding, a token for each of batch_size rows, instead of a training step"),
    Flag('largest_batch', False, 'find the largest batch_size that fits each mesh, instead of planning the one given'),
    Flag('output', '', 'JSON file to write; rows that it holds already of the same question are not compiled again'),
)


CONVERT = tuple(flag for flag in MODEL if flag.name in ('load_llama_config', 'load_checkpoint', 'tokenizer.vocab_file')
                ) + (
    Flag('format', '', 'what to write: native (a checkpoint of ours), hf (Hugging Face directory with safetensors), or '
         "easylm (EasyLM's streaming_params)", ('', 'native', 'hf', 'easylm')),
    Flag('output', '', 'directory to write; it must not exist yet'),
    Flag('float_dtype', 'fp32', 'of the weights written; native is always fp32', ('fp32', 'bf16', 'fp16')),
    Flag('max_shard_size', '5GB', 'format=hf: largest size of one safetensors file, as a number with KB, MB or GB'),
)


# ---------------------------------------------------------------- reading them


def cache_directory() -> Path:
    """Where fetched assets and compiled programs stay: environment variable PALLAMA_CACHE, else ~/.cache/pallama."""
    return Path(os.environ.get('PALLAMA_CACHE') or '~/.cache/pallama').expanduser()


def parse(argv: list[str], table: tuple[Flag, ...], doc: str) -> ConfigDict:
    """The flags of `argv` (argv[0] is the program) as a locked ConfigDict.

    Raises Mistake for an unknown flag, a value of the wrong type or outside `choices`, a stray argument, and for a
    recipe with a key that is no flag.  `--help` prints `doc` and the table, and exits with 0.
    """
    table = COMMON + table
    if '--help' in argv[1:] or '-h' in argv[1:]:
        print(inspect.cleandoc(doc) + '\n\n' + help_text(table))
        raise SystemExit(0)
    values = _absl_flags(table)
    try:
        values(argv, known_only=True)  # a first look, only to learn --config
        if values['config'].value:
            _apply_recipe(values, table, values['config'].value)
        values.unparse_flags()
        rest = values(argv)[1:]
    except absl_flags.Error as error:
        raise Mistake(f'{error} (--help lists the flags)') from None
    if rest:
        raise Mistake(f'unexpected argument {rest[0]!r}: flags are written --name=value (--help lists them)')
    config = ConfigDict()
    for flag in table:
        *path, last = flag.name.split('.')
        node = config
        for part in path:
            if part not in node:
                node[part] = ConfigDict()
            node = node[part]
        node[last] = values[flag.name].value
        if isinstance(node[last], str) and re.search('(^|::)gs://', node[last]):
            url = node[last].rpartition('::')[2]
            raise Mistake(f'{flag.name}={node[last]!r}: cloud storage is not read or written; copy it first (gcloud '
                             f'storage cp -r {url} .) and give the local path')
        if flag.only and node[last] != flag.default:
            raise Mistake(f'{flag.name}={node[last]!r} must stay {flag.default!r}: {flag.only}')
    config.lock()
    return config


def run(main, table: tuple[Flag, ...]) -> None:
    """The body of every program's `if __name__ == '__main__'`: parse, call `main(config)`, exit.

    Exit code 0 when main returns, 2 after a caller's mistake (one line on standard error), 1 after numbers that are not
    finite, 130 after Ctrl-C.  Other exceptions are faults of ours and keep their traceback.
    """
    program = sys.argv[0].rsplit('/', 1)[-1]
    try:
        main(parse(sys.argv, table, sys.modules['__main__'].__doc__))
    except (Mistake, OSError) as error:
        if '--show_traceback' in sys.argv or '--show_traceback=True' in sys.argv:
            traceback.print_exc()
        print(f'{program}: {" ".join(str(error).split())}', file=sys.stderr)
        raise SystemExit(2) from None
    except FloatingPointError as error:
        print(f'{program}: {error}', file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f'{program}: interrupted', file=sys.stderr)
        raise SystemExit(130) from None


def literals(name: str, text: str) -> dict:
    """`dict(a=1, b='x')` or `{'a': 1, 'b': 'x'}` as a dict; the text is parsed, never evaluated.

    Raises Mistake, naming flag `name`, for anything that is not keys with literal values.
    """
    try:
        node = ast.parse(text.strip() or '{}', mode='eval').body
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict' and not node.args:
            node = ast.Dict([ast.Constant(pair.arg) for pair in node.keywords], [pair.value for pair in node.keywords])
        values = ast.literal_eval(node)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        values = None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise Mistake(f"{name}={text!r} must be names with literal values: dict(max_sequence_length=4096)")
    return values


def help_text(table: tuple[Flag, ...]) -> str:
    """The table as `--help` shows it: one flag a paragraph, with type, default and choices."""
    lines = []
    for flag in table:
        kind = '|'.join(flag.choices) if flag.choices else flag.type.__name__
        only = f' (only {flag.default!r}: {flag.only})' if flag.only else ''
        lines.append(f'  --{flag.name}={kind}  (default {flag.default!r})\n      {flag.help}{only}')
    return '\n'.join(lines)


def _absl_flags(table) -> absl_flags.FlagValues:
    values = absl_flags.FlagValues()
    for flag in table:
        common = dict(name=flag.name, default=flag.default, help=flag.help, flag_values=values)
        if flag.choices:
            absl_flags.DEFINE_enum(enum_values=list(flag.choices), **common)
        else:
            define = {bool: absl_flags.DEFINE_boolean, int: absl_flags.DEFINE_integer, float: absl_flags.DEFINE_float,
                      str: absl_flags.DEFINE_string}[flag.type]
            define(**common)
    return values


def _apply_recipe(values: absl_flags.FlagValues, table, path: str) -> None:
    if not path.endswith('.py'):
        raise Mistake(f'config={path!r} must be a Python file with get_config(), for example configs/quickstart.py')
    if not Path(path).is_file():
        raise Mistake(f'config={path!r} does not exist: give a recipe of configs/, or leave --config out')
    spec = importlib.util.spec_from_file_location('recipe', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
        raise Mistake(f'config={path!r} defines no get_config()')
    types = {flag.name: flag.type for flag in table}
    means = {name: flag.name for flag in table for name in flag.recipe}
    elsewhere = {flag.name for flag in TRAIN} if means else set()
    for name, default in module.get_config().items():
        name = means.get(name, name)
        if name in elsewhere - set(types):
            continue
        if name not in types:
            close = difflib.get_close_matches(name, types, n=1)
            raise Mistake(f'{path}: {name!r} is no flag of this program' +
                             (f'; did you mean {close[0]!r}?' if close else ''))
        if type(default) is not types[name]:
            raise Mistake(f'{path}: {name}={default!r} must be {types[name].__name__}')
        values.set_default(name, default)


def reference() -> str:
    """docs/FLAGS.md: the flags of all programs as Markdown tables."""
    lines = ['# Flags', '', 'Written by `python -m program.flags > docs/FLAGS.md`. Every program understands '
             '`--config=FILE.py` and `--show_traceback` too.', '']
    tables = {'train.py': TRAIN, 'plan.py': PLAN, 'serve.py': SERVE, 'evaluate.py': EVALUATE,
              'prepare_data.py': PREPARE, 'convert.py': CONVERT, 'fetch.py': ASSETS}
    for program, table in tables.items():
        lines += [f'## {program}', '| flag | default | meaning |', '|---|---|---|']
        for flag in table:
            choices = f' ({", ".join(repr(choice) for choice in flag.choices)})' if flag.choices else ''
            only = f' **Only this value**: {flag.only}.' if flag.only else ''
            text = f'{flag.help}{choices}{only}'.replace('|', '\\|')
            lines.append(f'| `--{flag.name}` | `{flag.default!r}` | {text} |')
        lines.append('')
    return '\n'.join(lines)


if __name__ == '__main__':
    print(reference(), end='')
