"""Converts a checkpoint: python convert.py --load_checkpoint=hf::DIR --format=easylm --output=NEW_DIR

Reads whatever --load_checkpoint reads, one tensor at a time, and writes the weights as a checkpoint of ours (native), a
Hugging Face directory (hf), or what EasyLM reads (easylm: streaming_params, llama_config.json and the tokenizer).
Needs no accelerator, and memory for a few tensors, not for the model.
"""
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from checkpoint import load, native
from checkpoint.writing import appears_whole
from data.tokenizer import Tokenizer, load_tokenizer
from mistake import Mistake
from model.config import LlamaConfig, config_to_dict, named_config
from program import flags, parse

UNITS = {'KB': 10**3, 'MB': 10**6, 'GB': 10**9}


def main(config) -> None:
    spec, output = config.load_checkpoint, Path(config.output)
    shard_bytes = check_flags(config)
    model = named_config(config.load_llama_config) if config.load_llama_config else load.read_config(spec)
    if model is None:
        raise Mistake(f'load_checkpoint={spec!r} does not say the sizes of the model: give them as '
                         '--load_llama_config, for example 3b')
    tokenizer = find_tokenizer(config, model)
    reader = load.open_reader(spec, model)
    with tqdm(total=len(load.tensors_of(model)), unit=' tensors', desc=f'{spec} -> {config.format}') as bar:
        def tensor(name: str, layer: int | None) -> np.ndarray:
            bar.update()
            return reader.tensor(name, layer)

        if config.format == 'native':
            write_native(output, tensor, model, tokenizer, spec)
        elif config.format == 'hf':
            from checkpoint.formats import huggingface_writer  # its libraries are extras
            huggingface_writer.write(output, tensor, model, tokenizer, load.read_add_bos_token(spec),
                                     config.float_dtype, shard_bytes)
        else:
            write_easylm(output, tensor, model, tokenizer, config.float_dtype)
    if config.format != 'native' and load.read_template(spec):
        print(f'left out: the prompt template, for which {config.format} has no place')
    print(f'wrote {output}; use it with {usage(output, config.format, tokenizer)}', flush=True)


def check_flags(config) -> int:
    """max_shard_size in bytes.  Raises Mistake, naming the flag, before anything is read."""
    for name in ('load_checkpoint', 'format', 'output'):
        if not config[name]:
            raise Mistake(f'{name} is empty: give --load_checkpoint=TYPE::PATH, --format=native, hf or easylm, and '
                             '--output=NEW_DIRECTORY')
    if Path(config.output).exists():
        raise Mistake(f'output={config.output!r} exists already: nothing is written over it; choose another path')
    if config.format == 'native' and config.float_dtype != 'fp32':
        raise Mistake(f'float_dtype={config.float_dtype!r}: our own checkpoints hold fp32; write hf or easylm')
    number, unit = config.max_shard_size[:-2], config.max_shard_size[-2:].upper()
    if unit not in UNITS or not number.isdecimal() or int(number) < 1:
        raise Mistake(f'max_shard_size={config.max_shard_size!r} must be a whole number with one of the units '
                         f'{" ".join(UNITS)}, for example 5GB')
    return int(number) * UNITS[unit]


def find_tokenizer(config, model: LlamaConfig) -> Tokenizer | None:
    """--tokenizer.vocab_file, else the one that comes with the weights; one we cannot read is left out, and said so."""
    try:
        tokenizer = load_tokenizer(config.tokenizer.vocab_file) if config.tokenizer.vocab_file else \
            load.read_tokenizer(config.load_checkpoint)
    except ValueError as error:
        if config.tokenizer.vocab_file:
            raise
        print(f'left out: the tokenizer ({error})', flush=True)
        return None
    if tokenizer and tokenizer.vocab_size > model.vocab_size:
        raise Mistake(f'the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.vocab_size}: give '
                         'the one that belongs to the model as --tokenizer.vocab_file')
    return tokenizer


def write_native(output: Path, tensor, model: LlamaConfig, tokenizer: Tokenizer | None, spec: str) -> None:
    """A checkpoint of ours at the step of the source, each stacked weight written a layer at a time."""
    arrays = {}
    for weight in load.specs_of(model):
        slices = map(lambda layer, name=weight.name: tensor(name, layer)[None], range(weight.shape[0]))
        if not weight.stacked:
            slices = map(lambda layer, name=weight.name: tensor(name, layer), [None])
        arrays[f'params.{weight.name}'] = native.Streamed(
            weight.shape, np.dtype(np.float32), 1 if weight.stacked else weight.shape[0], slices)
    meta, files = load.describe(model, tokenizer, load.read_template(spec), load.read_add_bos_token(spec))
    with appears_whole(output) as temporary:
        native.save(temporary, load.read_step(spec), arrays, meta, files, keep=1)


def write_easylm(output: Path, tensor, model: LlamaConfig, tokenizer: Tokenizer | None, float_dtype: str) -> None:
    from checkpoint.formats import (
        easylm_writer,
        huggingface_writer,  # their libraries are extras
    )
    easylm_writer.refuse_unsupported(model)
    with appears_whole(output) as temporary:
        temporary.mkdir()
        easylm_writer.write_params(temporary / 'streaming_params', tensor, model, float_dtype)
        (temporary / 'llama_config.json').write_text(json.dumps(config_to_dict(model), indent=2) + '\n')
        if tokenizer:
            huggingface_writer.write_tokenizer(temporary, tokenizer, model.max_sequence_length, None)


def usage(output: Path, kind: str, tokenizer: Tokenizer | None) -> str:
    """The flags with which train.py, serve.py and evaluate.py load what was written."""
    words = {'native': f'--load_checkpoint={output}', 'hf': f'--load_checkpoint=hf::{output}',
             'easylm': f'--load_checkpoint=params::{output}/streaming_params '
                       f'--load_llama_config=json::{output}/llama_config.json'}[kind]
    if not tokenizer:
        return words + ' --tokenizer.vocab_file=FILE'
    return words + (f' --tokenizer.vocab_file={output}/{tokenizer.file_name}' if kind == 'easylm' else '')


if __name__ == '__main__':
    parse.run(main, flags.CONVERT)
