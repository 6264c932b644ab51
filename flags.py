"""Every flag of every program, once: name, default, help.  The README's table and `--help` are printed from here.

A program's table is a tuple of `Flag`s.  `run(main, TABLE)` reads the command line into a locked ConfigDict whose
nesting follows the dots of the names (`--optimizer.adamw_optimizer.lr=1e-3` is `config.optimizer.adamw_optimizer.lr`),
calls `main(config)`, and turns a caller's mistake (ValueError, OSError) into one line and exit code 2.

`--config=FILE.py` names a recipe (configs/): plain Python whose `get_config()` returns {flag name: default}.  A flag on
the command line wins over the recipe, the recipe over the table.
"""
import difflib
import importlib.util
import inspect
import os
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags as absl_flags
from ml_collections import ConfigDict


class Flag(NamedTuple):
    """One flag.  Its type is that of `default` (bool, int, float or str), or `kind` where the default is None (the
    program fills it in); `choices` restricts a str.
    """

    name: str
    default: Any
    help: str
    choices: tuple[str, ...] | None = None
    kind: type | None = None

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
    Flag('input', '', 'labelled set: .json (list of objects), .jsonl or .txt (one object a line), .csv, .parquet, or a '
         'directory with data/train-00000-of-00001.parquet, train.parquet or train.jsonl'),
    Flag('split', '', 'the part of a directory to take: train, validation or test'),
    Flag('output', '', 'directory to write NAME.jsonl, eval_NAME.json and labels_NAME.json to'),
    Flag('text_field', 'text', 'name of the field or column that holds the text'),
    Flag('label_field', 'label', 'name of the field or column that holds the label: its number or its name'),
    Flag('labels', 'Negative,Positive', 'names of the labels 0, 1, .., as the model shall answer them'),
    Flag('sample_ratio', 1.0, 'part of the examples to take'),
    Flag('sample_size', 0, 'number of examples to take; 0: as sample_ratio says'),
    Flag('stratified', True, 'sample each label by itself, so that their proportions stay'),
    Flag('shuffle', True, 'draw at random and write in that order; False takes from the head of the file'),
    Flag('seed', 42, 'of drawing'),
    Flag('record_fields', 'text', 'keys of a record: text is prompt and answer in one, for loss on all tokens; with '
         "prompt and answer too, fields='[prompt],answer' puts the loss on the label alone",
         ('text', 'text,prompt,answer')),
)

MODEL = (  # common to every program that runs the network
    Flag('load_llama_config', '', 'sizes of the model: a name of model/config.py (3b, smollm2_135m, ...) or '
         'json::FILE; not needed when the checkpoint says them itself'),
    Flag('load_checkpoint', '', 'weights as TYPE::PATH with TYPE one of hf, gguf, params, trainstate_params, '
         'flax_params, or the bare path of a checkpoint of ours; empty for random weights'),
    Flag('tokenizer.vocab_file', '', 'tokenizer.model (sentencepiece), tokenizer.json, or a directory with one; not '
         'needed when the checkpoint holds its tokenizer'),
    Flag('mesh_dim', '1,-1,1', "sizes of the mesh axes dp,fsdp,mp: '1,4,2', or 'dp:1,fsdp:4,mp:2'; one may be -1; "
         'a leading ! keeps the devices in plain order'),
    Flag('dtype', 'fp32', 'of activations and matrix products; parameters are always float32',
         ('fp32', 'float32', 'bf16', 'bfloat16')),
    Flag('attention', 'reference', 'attention implementation, by name', ('reference',)),
    Flag('seed', 42, 'of initial weights, data order and sampling'),
)


ADD_BOS_TOKEN = Flag('add_bos_token', None, 'begin each prompt with the bos token; not given: as the checkpoint was '
                     'trained, True where it does not say', kind=bool)

EVALUATE = MODEL + tuple(flag for flag in PREPARE if flag.name in ('input', 'split', 'text_field', 'label_field')) + (
    Flag('labels', '', "names of the labels 0, 1, ..; empty for the checkpoint's own, else Negative,Positive"),
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
    """The flags of train_dataset and eval_dataset (EasyLM's, and below `batching` ours)."""
    text, rows = f'{name}.text_processor.', f'{name}.json_dataset.'
    return (
        Flag(f'{name}.type', 'json', 'kind of data set', ('json',)),
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
        Flag(rows + 'skip_bad_lines', False, 'skip and count bad lines, instead of refusing the file'),
        Flag(rows + 'batching', 'stream', 'stream: one endless stream of tokens cut into rows, examples straddling '
             'them (EasyLM); rows: one example a row, rows of like length together, shuffled each epoch',
             ('stream', 'rows')),
        Flag(rows + 'too_long', 'error', 'batching=rows: what to do with an example longer than seq_length',
             ('error', 'truncate', 'drop')),
    )


TRAIN = MODEL + _dataset('train_dataset') + _dataset('eval_dataset') + (
    Flag('total_steps', 10000, 'micro-steps of the run; 0 for as many as `epochs` says'),
    Flag('epochs', 1, 'passes over the data where total_steps=0 (batching=rows only)'),
    Flag('log_freq', 50, 'steps between logged rows'),
    Flag('save_model_freq', 0, 'steps between checkpoints; the final one is always saved'),
    Flag('eval_steps', 0, 'batches of eval_dataset measured at each logged row, the same ones each time'),
    Flag('remat', '', "what the backward pass keeps of a layer; '' all it needs", (
         '', 'nothing_saveable', 'checkpoint_dots', 'checkpoint_dots_with_no_batch_dims', 'everything_saveable')),
    Flag('resume', False, 'continue the run in logger.output_dir (saved with its optimizer state); without one, begin'),
    Flag('optimizer.type', 'adamw', 'the optimizer', ('adamw',)),
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
    Flag('checkpointer.save_optimizer_state', False, 'checkpoints hold what --resume needs, not only the weights'),
    Flag('checkpointer.keep', 1, 'how many checkpoints stay; older ones are deleted when a new one is complete'),
    Flag('logger.output_dir', '/tmp/pallama', 'receives metrics.jsonl and checkpoints'),
    Flag('logger.tensorboard', False, 'also write TensorBoard events (extra: tensorboard)'),
    Flag('logger.online', False, 'also log to Weights & Biases (extra: wandb)'),
    Flag('logger.project', 'pallama', 'Weights & Biases project'),
)


SERVE = MODEL + (
    Flag('input_length', 1024, 'most tokens of a prompt, bos included; a longer one loses its beginning, and the '
         'answer says so'),
    Flag('seq_length', 2048, 'most tokens of prompt and answer; an answer has at most seq_length - input_length'),
    Flag('top_k', 50, 'sample among the k likeliest tokens; 0 for all'),
    Flag('top_p', 1.0, 'sample among the likeliest tokens whose probabilities sum to top_p (after top_k)'),
    Flag('do_sample', True, 'False makes every answer greedy, whatever its temperature'),
    ADD_BOS_TOKEN,
    Flag('lm_server.host', '127.0.0.1', 'address to listen on (not 0.0.0.0 as EasyLM had it: there is no '
         'authentication, so everyone on the network would be let in)'),
    Flag('lm_server.port', 5007, 'port to listen on; 0 for any free one'),
    Flag('lm_server.batch_size', 1, 'prompts computed together; a multiple of dp*fsdp of mesh_dim'),
    Flag('lm_server.default_temperature', 1.0, 'of requests that name none; 0 is greedy'),
    Flag('lm_server.pre_compile', 'generate', 'what to compile before /ready: a comma list of generate, loglikelihood; '
         'all; or nothing, and the first requests wait'),
    Flag('lm_server.queue_size', 32, 'requests that may wait; one more is answered 429'),
    Flag('lm_server.max_body_bytes', 4_000_000, 'largest body of a request'),
)


# ---------------------------------------------------------------- reading them


def cache_directory() -> Path:
    """Where fetched assets and compiled programs stay: environment variable PALLAMA_CACHE, else ~/.cache/pallama."""
    return Path(os.environ.get('PALLAMA_CACHE') or '~/.cache/pallama').expanduser()


def parse(argv: list[str], table: tuple[Flag, ...], doc: str) -> ConfigDict:
    """The flags of `argv` (argv[0] is the program) as a locked ConfigDict.

    Raises ValueError for an unknown flag, a value of the wrong type or outside `choices`, a stray argument, and for a
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
        raise ValueError(f'{error} (--help lists the flags)') from None
    if rest:
        raise ValueError(f'unexpected argument {rest[0]!r}: flags are written --name=value (--help lists them)')
    config = ConfigDict()
    for flag in table:
        *path, last = flag.name.split('.')
        node = config
        for part in path:
            if part not in node:
                node[part] = ConfigDict()
            node = node[part]
        node[last] = values[flag.name].value
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
    except (ValueError, OSError) as error:
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


def help_text(table: tuple[Flag, ...]) -> str:
    """The table as `--help` shows it: one flag a paragraph, with type, default and choices."""
    lines = []
    for flag in table:
        kind = '|'.join(flag.choices) if flag.choices else flag.type.__name__
        lines.append(f'  --{flag.name}={kind}  (default {flag.default!r})\n      {flag.help}')
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
        raise ValueError(f'config={path!r} must be a Python file with get_config(), for example configs/quickstart.py')
    if not Path(path).is_file():
        raise ValueError(f'config={path!r} does not exist: give a recipe of configs/, or leave --config out')
    spec = importlib.util.spec_from_file_location('recipe', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
        raise ValueError(f'config={path!r} defines no get_config()')
    types = {flag.name: flag.type for flag in table}
    for name, default in module.get_config().items():
        if name not in types:
            close = difflib.get_close_matches(name, types, n=1)
            raise ValueError(f'{path}: {name!r} is no flag of this program' +
                             (f'; did you mean {close[0]!r}?' if close else ''))
        if type(default) is not types[name]:
            raise ValueError(f'{path}: {name}={default!r} must be {types[name].__name__}')
        values.set_default(name, default)
