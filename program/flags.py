"""Every flag of every program, once: name, default, help.  `--help` and docs/FLAGS.md say it again.

A program's table is a tuple of `Flag`s; a name's dots nest (`--optimizer.adamw_optimizer.lr=1e-3`).  To add a flag,
write its line here, with its range if it is a number (`least=1`) and `path=` if it is a path, and write docs/FLAGS.md
anew (`python -m program.parse > docs/FLAGS.md`).  Next: parse.py, which reads the command line.
"""
from typing import Any, NamedTuple


class Flag(NamedTuple):
    """One flag.  Its type is that of `default` (bool, int, float or str), or `kind` where the default is None (the
    program fills it in); `choices` restricts a str.  `only` says why no value but the default is accepted (EasyLM's
    flags that we do not follow: a command that leaves them alone runs, one that sets them is refused, never ignored).
    `recipe`: names of train.py's flags whose value in a recipe is meant; a program with such flags takes from a recipe
    what it knows, and leaves train.py's other flags be.

    least, most (inclusive), above, below (exclusive): the range of a number.  path: the value is a path, or TYPE::PATH,
    and a leading `~` is expanded: 'read' or 'write' says what is done with it; 'asset' is read too, and may be the name
    of an asset (program/assets.py).
    """

    name: str
    default: Any
    help: str
    choices: tuple[str, ...] | None = None
    kind: type | None = None
    only: str = ''
    recipe: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    path: str = ''

    @property
    def type(self) -> type:
        return self.kind or type(self.default)

    @property
    def range(self) -> str:
        """The numbers that it may be, in words; '' where any number is right."""
        if None not in (self.least, self.most):
            return f'from {self.least} to {self.most}'
        words = (('at least', self.least), ('above', self.above), ('at most', self.most), ('below', self.below))
        return ' and '.join(f'{word} {bound}' for word, bound in words if bound is not None)

    def in_range(self, value: float) -> bool:
        """Whether it is such a number; NaN never is."""
        return ((self.least is None or value >= self.least) and (self.most is None or value <= self.most)
                and (self.above is None or value > self.above) and (self.below is None or value < self.below))


# what --help begins with, in this order: of these names, those that a program has
MOST_USED = (
    'config', 'name', 'list', 'topology', 'load_checkpoint', 'adapter', 'url', 'input', 'split', 'text_field',
    'label_field', 'labels', 'task', 'method', 'sample_size', 'format', 'train_dataset.type',
    'train_dataset.json_dataset.path',
    'train_dataset.text_processor.fields', 'train_dataset.json_dataset.batching',
    'train_dataset.json_dataset.seq_length', 'train_dataset.json_dataset.batch_size', 'total_steps', 'epochs',
    'optimizer.adamw_optimizer.lr', 'logger.output_dir', 'save_model_freq', 'resume', 'evaluate_every',
    'input_length', 'seq_length',
    'batch_size', 'parallel', 'lm_server.host', 'lm_server.port', 'lm_server.batch_size',
    'lm_server.default_temperature', 'serve', 'output', 'output_dir', 'before',
)
# heading of --help -> how the names of its flags begin; flags of no group come under `more`
GROUPS = {
    'the model': ('load_llama_config', 'update_llama_config', 'load_checkpoint', 'adapter', 'tokenizer.', 'mesh_dim',
                  'dtype', 'attention', 'add_bos_token', 'llama.'),
    'adapters': ('lora.',),
    'training data': ('train_dataset.', 'load_dataset_state'),
    'evaluation while training': ('eval_dataset.', 'eval_steps', 'evaluate', 'keep_best', 'patience'),
    'the optimizer': ('optimizer.', 'reduce_gradients'),
    'checkpoints': ('checkpointer.', 'save_', 'resume'),
    'logging': ('logger.', 'log_freq', 'profile_steps'),
    'serving': ('lm_server.', 'input_length', 'top_k', 'top_p', 'do_sample', 'num_beams'),
    'several hosts': ('jax_distributed.', 'initialize_jax_distributed', 'log_all_worker'),
}

COMMON = (
    Flag('config', '', 'recipe with defaults for all flags: a file of configs/; a flag on the command line wins',
         path='read'),
    Flag('show_traceback', False, 'on an error print where it was raised, not only what it says'),
)

# ---------------------------------------------------------------- the programs' tables

ASSETS = (
    Flag('name', '', 'the asset to fetch (--list=True shows them)'),
    Flag('cache_dir', '', 'where fetched assets stand; else $PALLAMA_CACHE, else ~/.cache/pallama', path='write'),
    Flag('list', False, 'list the assets and stop'),
    Flag('verify', False, 'compare the SHA-256 of an asset that is already there, not only its sizes'),
)

PREPARE = (
    Flag('input', '', 'labelled set: .csv or .tsv (with a header), .json (list of objects), .jsonl or .txt (one object '
         'a line), .parquet, or a directory with data/train-00000-of-00001.parquet, train.parquet or train.jsonl',
         path='asset'),
    Flag('split', '', 'the part of a directory to take: train, validation or test'),
    Flag('output', '', 'directory to write NAME.jsonl, eval_NAME.json and labels_NAME.json to', path='write'),
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
    Flag('sample_ratio', 1.0, 'part of the examples to take', above=0, most=1),
    Flag('sample_size', 0, 'number of examples to take; 0: as sample_ratio says', least=0),
    Flag('stratified', True, 'sample each label by itself, so that their proportions stay'),
    Flag('shuffle', True, 'draw at random and write in that order; False takes from the head of the file'),
    Flag('seed', 42, 'of drawing and parting', least=0),
    Flag('record_fields', 'text,prompt,answer', 'keys of a record: text is prompt and answer in one, for loss on all '
         "tokens (fields=text); with prompt and answer too, fields='[prompt],answer' puts the loss on the label alone",
         ('text', 'text,prompt,answer')),
    Flag('overwrite', False, 'write over what another preparation has left in `output`'),
)

MODEL = (  # common to every program that runs the network
    Flag('load_llama_config', '', 'sizes of the model: a name of model/config.py (3b, smollm2_135m, ...) or '
         'json::FILE; empty: those that the checkpoint states', path='read'),
    Flag('load_checkpoint', '', 'weights as TYPE::PATH with TYPE one of hf, gguf, params, trainstate, '
         'trainstate_params, flax_params, or the bare path of a checkpoint of ours; empty for random weights',
         path='asset'),
    Flag('tokenizer.vocab_file', '', 'tokenizer.model (sentencepiece), tokenizer.json, or a directory with one; not '
         'needed when the checkpoint holds its tokenizer', path='asset'),
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
    Flag('seed', 42, 'of initial weights, shuffling and sampling', least=0, most=2**32 - 1),
    Flag('jax_distributed.initialize_jax_distributed', False, 'call jax.distributed.initialize with the values below '
         'before anything else (on a TPU pod they are found without being given)'),
    Flag('jax_distributed.coordinator_address', None, 'HOST:PORT of process 0', kind=str),
    Flag('jax_distributed.num_processes', None, 'how many processes there are', kind=int, least=1),
    Flag('jax_distributed.process_id', None, 'which of them this is, from 0', kind=int, least=0),
    Flag('jax_distributed.local_device_ids', None, "the devices of this process: '0,1,2'", kind=str),
)


ADAPTER = Flag('adapter', '', 'adapter that is merged into the weights of --load_checkpoint: a run of train.py with '
               "--lora.rank (or one step of it), or a directory of PEFT's", path='read')
ADD_BOS_TOKEN = Flag('add_bos_token', None, 'begin each prompt with the bos token; not given: as the checkpoint was '
                     'trained, True where it does not say', kind=bool)

WEIGHT_DTYPE = ('how the weights are kept: fp32, bf16, or int8 with a factor for each output channel, which also '
                'rounds activations to int8 (model/quantized.py); empty for that of --dtype')
CACHE_DTYPE = 'how keys and values are kept: fp32, bf16, or int8 with a factor for each head; empty for that of --dtype'

EVALUATE = MODEL + tuple(flag for flag in PREPARE if flag.name in ('input', 'split', 'text_field', 'label_field')) + (
    ADAPTER,
    Flag('task', 'label', 'label: texts with one of a few labels; text: records {"prompt": .., "completion": ..}, '
         'answered with a text, for example a JSON object', ('label', 'text')),
    Flag('labels', '', 'names of the labels 0, 1, .., as prepare_data.py takes them; empty: those of the checkpoint, '
         'or of labels_NAME.json beside a prepared NAME.jsonl, else those in the data'),
    Flag('sample_size', 0, 'reviews to evaluate, drawn with `seed`, each label in proportion; 0 for all', least=0),
    Flag('method', None, 'loglikelihood: the likelier answer; generate: what greedy decoding says; or both; not given: '
         'loglikelihood (task=label; task=text always generates)', ('loglikelihood', 'generate', 'both'), kind=str),
    Flag('stop', '', r"task=text: texts before which an answer ends, parted by commas, \n for a line's end, "
         '"quoted, with a comma"; empty: it ends at EOS or at max_new_tokens'),
    Flag('rouge', True, 'task=text: measure ROUGE-L too (extra: text)'),
    Flag('url', '', 'ask the server that runs there, for example http://127.0.0.1:5007, instead of --load_checkpoint'),
    Flag('output_dir', '', 'for evaluation.json and confusion_matrix.png (task=text: fields.png); empty for '
         'runs/evaluation-DATE-TIME',
         path='write'),
    Flag('before', '', 'evaluation.json of the same reviews before fine-tuning: prints what changed', path='read'),
    Flag('samples', 6, 'reviews whose generated text is kept and shown (task=text: how many of the worst answers are '
         'shown); 0 for none', least=0),
    Flag('calibrate', False, 'fit the temperature of the probabilities of labels on these reviews, which must neither '
         'have trained the model nor be those that test it, and keep it in the checkpoint for /classify'),
    Flag('sample_tokens', 48, 'most tokens generated for such a sample (a server decides by itself)', least=1),
    Flag('max_new_tokens', None, 'most tokens of an answer; not given: 8 with method=generate (where a server decides '
         'by itself), 256 with task=text', kind=int, least=1),
    Flag('batch_size', 16, 'texts computed together (slots of the engine), or in a request to the server', least=1),
    Flag('weight_dtype', '', WEIGHT_DTYPE, ('', 'fp32', 'bf16', 'int8')),
    Flag('cache_dtype', '', CACHE_DTYPE, ('', 'fp32', 'bf16', 'int8')),
    ADD_BOS_TOKEN,
)


def _dataset(name: str) -> tuple[Flag, ...]:
    """The flags of train_dataset and eval_dataset."""
    text, rows, hub = f'{name}.text_processor.', f'{name}.json_dataset.', f'{name}.huggingface_dataset.'
    ours = lambda group: (
        Flag(group + 'skip_bad_lines', False, 'skip and count bad records, instead of refusing the first'),
        Flag(group + 'batching', 'stream', 'stream: one endless stream of tokens cut into rows, examples straddling '
             'them (EasyLM); rows: one example a row, rows of like length together, shuffled each epoch; packed: as '
             'many whole examples in a row of seq_length as fit, which do not see each other',
             ('stream', 'rows', 'packed')),
        Flag(group + 'too_long', 'error', 'batching=rows and packed: what to do with an example longer than seq_length',
             ('error', 'truncate', 'drop')),
        Flag(group + 'loss_per', 'row', "row: the mean over examples (of a stream: over rows) of each one's mean over "
             'its tokens with loss; token: the mean over all tokens with loss of a batch', ('row', 'token')),
        Flag(group + 'weight_field', '', "key of a record's weight, a number from 0 on by which its part of the loss "
             'is multiplied; the mean is not divided by the weights'),
    )
    return (
        Flag(f'{name}.type', 'huggingface', 'kind of data set: a file of JSON lines (json_dataset), or one that the '
             'package `datasets` loads (huggingface_dataset)', ('huggingface', 'json')),
        Flag(text + 'fields', '', "what of a record becomes tokens: '[prompt],answer': `,` separates fields tokenized "
             'alone, `+` joins keys, '
             '[..] carries no loss, <|bos|> <|eos|> <|123|> are tokens, {key} holds base64 tokens; empty: by the keys '
             'of each record, "messages" (a chat, loss on what the assistant says) or "prompt" and "completion"'),
        Flag(text + 'fields_from_example', '', 'key of the record that holds its own `fields`'),
        Flag(text + 'subfield_separator', ' ', 'between keys joined by +'),
        Flag(text + 'prepend_text', '', 'put before the first field'),
        Flag(text + 'add_bos_token', True, 'begin each example with the bos token (no loss on it)'),
        Flag(text + 'add_eos_token', True, 'end each example with the eos token (loss on it)'),
        Flag(text + 'base64_token_dtype', 'i4', 'numpy dtype of {key} fields'),
        Flag(text + 'chat_template', '', "how messages are written: own (the tokenizer's), chatml, llama-3, llama-2; "
             'empty: own where there is one; none refuses them. The checkpoint keeps it, and serve.py takes it',
             ('', 'own', 'chatml', 'llama-3', 'llama-2', 'none')),
        Flag(f'{name}.class_weights', '', 'factors of the loss of labelled records, by the label of their answer: '
             "balanced (so that each label counts as much: records / labels / records of the label), or Positive=2,"
             'Negative=1, a label that is not named 1; needs labels_NAME.json beside the file'),
        Flag(rows + 'path', '', 'JSON lines, one record a line; or several files with weights, a.jsonl:0.7,'
             'b.jsonl:0.3, by which an epoch draws rows of each (batching=rows and packed)', path='asset'),
        Flag(rows + 'seq_length', 1024, 'tokens in a row of the batch; the longest row where batching=rows', least=1),
        Flag(rows + 'batch_size', 8, 'rows in a batch, over all devices', least=1),
        Flag(rows + 'always_start_with_bos', False, 'overwrite the first token of each packed row with bos'),
        Flag(rows + 'start_seek_loc', 0, 'byte at which to begin, where a line begins (dataset_file_loc of a log); '
             'batching=stream only', least=0),
        Flag(rows + 'example_index_at_start', 0, 'number of that line, from 0 (dataset_example_index + 1 of a log)',
             least=0),
        Flag(rows + 'tokens_count_at_start', 0, 'where dataset_total_tokens begins to count', least=0),
        Flag(rows + 'tokenizer_processes', 1, 'processes that tokenize; records, errors and resuming are the same with '
             'any number', least=1),
        Flag(rows + 'tokenizer_parallel_chunk_size', 32, 'lines that one process gets at a time', least=1),
        Flag(rows + 'tokenizer_parallel_batch_size', 1024, 'most lines read ahead (or one chunk for each process, '
             'if that is more)', least=1),
        Flag(rows + 'throughput_average_window_size', 200, 'batches over which dataset_average_tps is taken', least=1),
        *ours(rows),
        Flag(hub + 'path', 'c4', 'data set on the hub, or a local directory of JSON lines or parquet (extra: '
             'huggingface)', path='read'),
        Flag(hub + 'name', 'en', 'its configuration; empty for a set without one, as a local directory is'),
        Flag(hub + 'split', 'train', 'its split'),
        Flag(hub + 'streaming', False, 'read it while training, instead of fetching it first'),
        Flag(hub + 'seq_length', 1024, 'tokens in a row of the batch; the longest row where batching=rows', least=1),
        Flag(hub + 'batch_size', 8, 'rows in a batch, over all devices', least=1),
        Flag(hub + 'always_start_with_bos', False, 'overwrite the first token of each packed row with bos'),
        Flag(hub + 'batch_token_dtype', 'i4', 'numpy dtype of tokens in a batch',
             only='token ids are int32 everywhere after the tokenizer'),
        *ours(hub),
    )


def _as_train_dataset(table: tuple[Flag, ...]) -> tuple[Flag, ...]:
    """Let flags of eval_dataset that are not given be train_dataset's, but for those that say what is read."""
    own = ('.json_dataset.path', '.split', '.start_seek_loc', '.example_index_at_start', '.tokens_count_at_start',
           '.weight_field', '.class_weights')
    return tuple(flag if flag.only or flag.name.endswith(own) else
                 flag._replace(default=None, kind=flag.type, help=f'{flag.help}; not given: as train_dataset has it')
                 for flag in table)


CLIENT = (
    Flag('input', '', 'what to ask: eval_NAME.json or NAME.jsonl of prepare_data.py, or another file like them; '
         '`client.py FILE` is the same', path='read'),
    Flag('output', '', 'file of the answers, one JSON object a line; an unfinished one is gone on with; empty: '
         'answers_NAME.jsonl (classes_NAME.jsonl with --method=classify) beside the input', path='write'),
    Flag('url', 'http://127.0.0.1:5007', 'the server: serve.py, or for --method=generate one of EasyLM'),
    Flag('method', 'generate', 'generate: continue each prompt; classify: the probability of each label',
         ('generate', 'classify')),
    Flag('temperature', 0.0, 'of generate; 0 takes the likeliest token', least=0),
    Flag('batch_size', 16, 'texts in one request', least=1),
    Flag('parallel', 4, 'requests under way at once', least=1, most=256),
    Flag('timeout', 600.0, 'seconds for the answer to one request', above=0),
    Flag('attempts', 12, 'how often a request is sent to a server that is busy (429, 503) or went away', least=1),
    Flag('api_key_file', '', "file that holds the server's API key and nothing else", path='read'),
)

REMAT = ('', 'nothing_saveable', 'checkpoint_dots', 'checkpoint_dots_with_no_batch_dims', 'everything_saveable')
REMAT_VALUES = f'one of {", ".join(REMAT[1:])}, or save:NAME,NAME to save the tensors of these names (model/remat.py)'
NO_DROPOUT = ('there is no dropout: no LLaMA is trained with it, and it would hide in every kernel; use '
              '--optimizer.adamw_optimizer.weight_decay or fewer steps against overfitting')
NO_FCM = 'forgetful causal masking (EasyLM for pretraining) is not built'
NO_CHUNKS = 'attention and ffn are not computed in chunks; against memory use --llama.remat_block=nothing_saveable'

LLAMA = (  # sizes where neither --load_llama_config nor the checkpoint says them, and how much is kept for backward
    Flag('llama.vocab_size', 32000, 'tokens of the vocabulary', least=1),
    Flag('llama.hidden_size', 4096, 'width of the residual stream', least=1),
    Flag('llama.intermediate_size', 11008, 'width of the ffn', least=1),
    Flag('llama.num_hidden_layers', 32, 'layers', least=1),
    Flag('llama.num_attention_heads', 32, 'query heads', least=1),
    Flag('llama.max_sequence_length', 2048, 'longest sequence that is served', least=1),
    Flag('llama.rms_norm_eps', 1e-6, 'epsilon inside the square root of rmsnorm', least=0),
    Flag('llama.initializer_range', 0.02, 'standard deviation of random weights', least=0),
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


LORA = (  # adapters of a low rank beside frozen weights (model/lora.py)
    Flag('lora.rank', 0, 'train adapters of this rank beside the frozen weights (LoRA); 0 trains all weights', least=0),
    Flag('lora.alpha', 0.0, 'what the adapters give is multiplied by alpha / rank; 0 for twice the rank', least=0),
    Flag('lora.targets', 'w_q,w_v', 'matrices of a layer that are adapted: any of w_q, w_k, w_v, w_o, w_gate, w_up, '
         'w_down'),
    Flag('lora.dropout', 0.0, "part of the adapters' inputs that is left out in training", least=0, below=1),
    Flag('lora.rslora', False, 'multiply by alpha / sqrt(rank) instead (rsLoRA)'),
    Flag('lora.base_dtype', '', 'how the frozen weights are kept: fp32, bf16, or int8 with a factor for each output '
         'channel of the matrices of layers; empty for that of --dtype', ('', 'fp32', 'bf16', 'int8')),
)


TRAIN = MODEL + LLAMA + LORA + _dataset('train_dataset') + _as_train_dataset(_dataset('eval_dataset')) + (
    Flag('update_llama_config', '', "changes to the model's sizes, as literals: dict(max_sequence_length=4096, "
         "remat_block='nothing_saveable')"),
    Flag('total_steps', 10000, 'micro-steps of the run; 0 for as many as `epochs` says', least=0),
    Flag('epochs', 1, 'passes over the data where total_steps=0; of batching=stream the tokens of one pass are counted '
         'first', least=1),
    Flag('load_dataset_state', '', 'dataset.json of an earlier run, or its checkpoint: go on in the data where it '
         'stood; replaces all train_dataset flags', path='read'),
    Flag('log_freq', 50, 'steps between logged rows', least=1),
    Flag('log_all_worker', False, 'every process writes its log, not process 0 alone'),
    Flag('save_model_freq', 0, 'steps between checkpoints; the final one is always saved', least=0),
    Flag('save_milestone_freq', 0, 'steps between checkpoints that are never deleted', least=0),
    Flag('eval_steps', 0, 'batches of eval_dataset measured at each logged row, the same ones each time', least=0),
    Flag('evaluate_every', '', 'evaluate the labels or texts of evaluate.input, by the code of evaluate.py, every so '
         'many micro-steps (200) or parts of an epoch (0.5epoch), and at the end; empty: never'),
    Flag('evaluate.input', '', 'labelled set to evaluate, as evaluate.py takes it', path='asset'),
    *(flag._replace(name=f'evaluate.{flag.name}') for flag in PREPARE
      if flag.name in ('split', 'text_field', 'label_field')),
    *(flag._replace(name=f'evaluate.{flag.name}') for flag in EVALUATE if flag.name == 'sample_size'),
    *(flag._replace(name=f'evaluate.{flag.name}') for flag in EVALUATE if flag.name == 'task'),
    Flag('evaluate.batch_size', 16, 'texts computed together', least=1),
    Flag('evaluate.max_new_tokens', 128, 'most tokens of an answer, evaluate.task=text', least=1),
    Flag('keep_best', '', 'save the evaluation with the best accuracy, macro F1 or loss of the labels (of texts: exact '
         'match, token F1, F1 of fields), and keep it whatever checkpointer.keep says until a better one is saved; '
         'empty: none', ('', 'accuracy', 'f1', 'loss', 'exact_match', 'token_f1', 'field_f1')),
    Flag('patience', 0, 'with keep_best: stop after so many evaluations that were no better; 0: never', least=0),
    Flag('profile_steps', '', "10:15 writes a trace of micro-steps 10 to 14 to DIR/profile for TensorBoard's profiler; "
         'empty: none'),
    Flag('resume', False, 'continue the run in logger.output_dir (saved with its optimizer state); without one, begin'),
    Flag('reduce_gradients', '', 'dtype in which gradients are summed between devices; empty: that of --dtype',
         ('', 'fp32', 'bf16')),
    Flag('label_smoothing', 0.0, 'part of each target that is spread over the whole vocabulary; not where eval_dataset '
         'is measured', least=0, below=1),
    Flag('optimizer.type', 'adamw', 'the optimizer', ('adamw', 'palm')),
    Flag('optimizer.accumulate_gradient_steps', 1, 'micro-steps whose mean gradient makes one optimizer step', least=1),
    Flag('optimizer.adamw_optimizer.init_lr', 0.0, 'learning rate at step 0 of the warmup', least=0),
    Flag('optimizer.adamw_optimizer.lr', 0.01, 'learning rate after the warmup', above=0),
    Flag('optimizer.adamw_optimizer.end_lr', 0.001, 'learning rate at lr_decay_steps and after', least=0),
    Flag('optimizer.adamw_optimizer.lr_warmup_steps', 2000, 'optimizer steps of linear warmup', least=0),
    Flag('optimizer.adamw_optimizer.lr_warmup_ratio', 0.0, "linear warmup as a part of the run's optimizer steps, "
         'in the place of lr_warmup_steps; 0: lr_warmup_steps counts', least=0, below=1),
    Flag('optimizer.adamw_optimizer.lr_decay_steps', 500000, 'optimizer step at which the cosine ends, warmup '
         'included; 0 for the last step of the run', least=0),
    Flag('optimizer.adamw_optimizer.b1', 0.9, 'decay of the first moment', least=0, below=1),
    Flag('optimizer.adamw_optimizer.b2', 0.95, 'decay of the second moment (multiply_by_parameter_scale: an exponent)',
         above=0, below=1),
    Flag('optimizer.adamw_optimizer.clip_gradient', 1.0, 'largest global norm of the gradient', above=0),
    Flag('optimizer.adamw_optimizer.weight_decay', 1e-4, 'decoupled weight decay, on all weights', least=0),
    Flag('optimizer.adamw_optimizer.layerwise_decay', 1.0, 'each layer learns at this part of the rate of the layer '
         'above it: layer i of N at d^(N-1-i), the embedding at d^N, final norm and head at 1', above=0, most=1),
    Flag('optimizer.adamw_optimizer.bf16_momentum', False, 'store the first moment in bfloat16'),
    Flag('optimizer.adamw_optimizer.multiply_by_parameter_scale', False, "scale each matrix's update by its RMS: "
         'another optimizer, see training/optimizer.py'),
    Flag('optimizer.palm_optimizer.lr', 0.01, 'the learning rate is (lr / 0.01) / sqrt(max(step, lr_warmup_steps))',
         above=0),
    Flag('optimizer.palm_optimizer.lr_warmup_steps', 10000, 'optimizer steps for which it stays constant', least=1),
    Flag('optimizer.palm_optimizer.b1', 0.9, 'decay of the first moment', least=0, below=1),
    Flag('optimizer.palm_optimizer.b2', 0.99, 'exponent of the decay of the second moment', above=0, below=1),
    Flag('optimizer.palm_optimizer.clip_gradient', 1.0, 'largest global norm of the gradient', above=0),
    Flag('optimizer.palm_optimizer.weight_decay', 1e-4, 'weight decay is (weight_decay / 1e-4) * learning rate ^ 2',
         least=0),
    Flag('optimizer.palm_optimizer.bf16_momentum', False, 'store the first moment in bfloat16'),
    Flag('checkpointer.format', 'native', 'native: a directory step_N that holds all of it; easylm: the streaming file '
         'that EasyLM reads, overwritten by the next one', ('native', 'easylm')),
    Flag('checkpointer.float_dtype', 'bf16', 'format=easylm: dtype of the floats in the file, optimizer state '
         'included; empty: as they are.  Native checkpoints hold every array as it is',
         ('', 'fp32', 'float32', 'bf16', 'bfloat16', 'fp16', 'float16')),
    Flag('checkpointer.save_optimizer_state', False, 'checkpoints hold what is needed to go on, not only the weights'),
    Flag('checkpointer.keep', 1, 'how many native checkpoints stay; older ones are deleted when a new one is complete',
         least=1),
    Flag('logger.output_dir', '/tmp/pallama', 'receives metrics.jsonl and checkpoints', path='write'),
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
    Flag('logger.wandb_dir', '', 'where Weights & Biases keeps its files; empty for output_dir', path='write'),
    Flag('logger.random_delay', 0.0, 'wait at random up to so many seconds before Weights & Biases is asked', least=0),
)


SERVE = MODEL + (
    ADAPTER,
    Flag('initialize_jax_distributed', False, 'the same as jax_distributed.initialize_jax_distributed'),
    Flag('input_length', 1024, 'most tokens of a prompt, bos included; a longer one loses its beginning, and the '
         'answer says so', least=2),
    Flag('seq_length', 2048, 'most tokens of prompt and answer; an answer has at most seq_length - input_length',
         least=1),
    Flag('top_k', 50, 'sample among the k likeliest tokens; 0 for all', least=0),
    Flag('top_p', 1.0, 'sample among the likeliest tokens whose probabilities sum to top_p (after top_k)',
         above=0, most=1),
    Flag('do_sample', True, 'False makes every answer greedy, whatever its temperature'),
    Flag('num_beams', 1, 'with do_sample=False: /generate and /chat search with as many beams (serving/beams.py)',
         least=1),
    ADD_BOS_TOKEN,
    Flag('lm_server.host', '127.0.0.1', 'address to listen on; one that others can reach (0.0.0.0, as EasyLM had it) '
         'needs lm_server.api_key_file'),
    Flag('lm_server.port', 5007, 'port to listen on; 0 for any free one', least=0, most=65535),
    Flag('lm_server.batch_size', 16, "prompts computed together, whoever sent them: slots of the cache; a multiple of "
         "dp*fsdp of mesh_dim (EasyLM's default is 1)", least=1),
    Flag('lm_server.weight_dtype', '', WEIGHT_DTYPE, ('', 'fp32', 'bf16', 'int8')),
    Flag('lm_server.cache_dtype', '', CACHE_DTYPE, ('', 'fp32', 'bf16', 'int8')),
    Flag('lm_server.prefix_reuse', True, "do not compute the beginning of a prompt again that a slot still holds"),
    Flag('lm_server.logging', False, 'print each request and its answer; False prints nothing of them'),
    Flag('lm_server.pre_compile', 'all', 'what to compile before /ready: a comma list of generate, greedy_until, '
         "chat, loglikelihood; all; or nothing, and the first requests wait (EasyLM's default is generate)"),
    Flag('lm_server.default_temperature', 1.0, 'of requests that name none; 0 is greedy', least=0, most=100),
    Flag('lm_server.greedy_until_max_length', 5000, 'most tokens of an answer of /greedy-until', least=1),
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
    Flag('lm_server.queue_size', 32, 'requests that may wait; one more is answered 429', least=0),
    Flag('lm_server.api_key_file', '', 'a file with the API key, which every request but /health, /ready and the page '
         'must bring as the header Authorization: Bearer KEY', path='read'),
    Flag('lm_server.insecure', False, 'serve without an API key on an address that others can reach'),
    Flag('lm_server.adapters', '', 'adapters of the weights that are served beside them, each under its name, which a '
         'request gives as `model`: tickets=DIR,reviews=DIR; batched together (DIR as of --adapter)'),
    Flag('lm_server.model_name', '', 'the name of the model in /v1/models; empty: the last part of the checkpoint'),
    Flag('lm_server.chat_template', '', "how /v1/chat/completions writes a conversation: own (the tokenizer's, or "
         "the one that training used), "
         'chatml, llama-3, llama-2, plain (the flags lm_server.chat_*), none; empty: own where there is one, else '
         'plain where one of those flags is given', ('', 'own', 'chatml', 'llama-3', 'llama-2', 'plain', 'none')),
    Flag('lm_server.request_seconds', 0.0, 'longest time that an answer may take; 0 for no limit', least=0),
    Flag('lm_server.drain_seconds', 30.0, 'after SIGTERM: how long running requests may take to end', least=0),
    Flag('lm_server.max_body_bytes', 4_000_000, 'largest body of a request', least=1),
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
    train_dataset__type=...,
) + LORA + (
    Flag('batch_size', 8, 'rows in a batch, over all devices',
         recipe=('train_dataset.json_dataset.batch_size', 'train_dataset.huggingface_dataset.batch_size'), least=1),
    Flag('seq_length', 1024, 'tokens in a row; with --serve of prompt and answer',
         recipe=('train_dataset.json_dataset.seq_length', 'train_dataset.huggingface_dataset.seq_length'), least=1),
    Flag('segments', False, 'rows have segments, as with batching=rows'),
    Flag('serve', False, "plan serve.py's decoding, a token for each of batch_size rows, instead of a training step"),
    Flag('largest_batch', False, 'find the largest batch_size that fits each mesh, instead of planning the one given'),
    Flag('output', '', 'JSON file to write; rows that it holds already of the same question are not compiled again',
         path='write'),
)


CONVERT = tuple(flag for flag in MODEL if flag.name in ('load_llama_config', 'load_checkpoint', 'tokenizer.vocab_file')
                ) + (
    ADAPTER,
    Flag('merge', False, 'write the weights of --load_checkpoint with --adapter merged in, instead of the adapter'),
    Flag('format', '', 'what to write: native (a checkpoint of ours), hf (Hugging Face directory with safetensors), '
         "easylm (EasyLM's streaming_params), or of an adapter peft (PEFT's directory)",
         ('', 'native', 'hf', 'easylm', 'peft')),
    Flag('output', '', 'directory to write; it must not exist yet', path='write'),
    Flag('float_dtype', 'fp32', 'of the weights written; native is always fp32', ('fp32', 'bf16', 'fp16')),
    Flag('max_shard_size', '5GB', 'format=hf: largest size of one safetensors file, as a number with KB, MB or GB'),
)
