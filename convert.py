"""Converts a checkpoint: python convert.py --load_checkpoint=hf::DIR --format=easylm --output=NEW_DIR

Reads whatever --load_checkpoint reads, one tensor at a time, and writes the weights as a checkpoint of ours (native), a
Hugging Face directory (hf), or what EasyLM reads (easylm: streaming_params, llama_config.json and the tokenizer).
Needs no accelerator, and memory for a few tensors, not for the model.

  python convert.py --load_checkpoint=BASE --adapter=DIR --merge=True --format=hf --output=NEW_DIR    merged weights
  python convert.py --load_checkpoint=BASE --adapter=DIR --format=peft --output=NEW_DIR    the adapter alone, as PEFT's
"""
import json
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

import checkpoint
from checkpoint import Source, adapter, native
from checkpoint.adapter import AdaptedSource
from checkpoint.formats.reading import tensors_of
from checkpoint.source import describe
from checkpoint.writing import appears_whole
from data.tokenizer import Tokenizer, load_tokenizer
from mistake import Mistake
from model.config import LlamaConfig, config_to_dict, named_config
from model.weights import weight_specs
from program.flags import CONVERT
from program.parse import run

UNITS = {'KB': 10**3, 'MB': 10**6, 'GB': 10**9}


def main(flags: ConfigDict) -> None:
    output, shard_bytes = Path(flags.output), check_flags(flags)
    source = checkpoint.open(flags.load_checkpoint, flags.adapter)
    config = named_config(flags.load_llama_config) if flags.load_llama_config else source.config
    if config is None:
        raise Mistake(f'load_checkpoint={source.spec!r} does not say the sizes of the model: give them as '
                      '--load_llama_config, for example 3b')
    tokenizer = find_tokenizer(flags, source, config)
    if flags.adapter and not flags.merge:
        convert_adapter(output, source, config, tokenizer, flags)
        return
    reader = source.reader(config)
    with tqdm(total=len(tensors_of(config)), unit=' tensors', desc=f'{source.spec} -> {flags.format}') as bar:
        def tensor(name: str, layer: int | None) -> np.ndarray:
            bar.update()
            return reader.tensor(name, layer)

        if flags.format == 'native':
            write_native(output, tensor, config, tokenizer, source)
        elif flags.format == 'hf':
            from checkpoint.formats import huggingface_writer  # its libraries are extras
            huggingface_writer.write(output, tensor, config, tokenizer, source.add_bos_token, flags.float_dtype,
                                     shard_bytes)
        else:
            write_easylm(output, tensor, config, tokenizer, flags.float_dtype)
    if flags.format != 'native' and source.template:
        print(f'left out: the prompt template, for which {flags.format} has no place')
    if flags.format != 'native' and source.chat_template:
        print(f'left out: the chat template; write it beside the tokenizer of {output} if it shall chat')
    print(f'wrote {output}; use it with {usage(output, flags.format, tokenizer)}', flush=True)


def check_flags(flags: ConfigDict) -> int:
    """Return max_shard_size in bytes.  Raises Mistake, naming the flag, before anything is read."""
    for name in ('load_checkpoint', 'format', 'output'):
        if not flags[name]:
            raise Mistake(f'{name} is empty: give --load_checkpoint=TYPE::PATH, --format=native, hf or easylm, and '
                          '--output=NEW_DIRECTORY')
    if flags.merge and not flags.adapter:
        raise Mistake('merge=True needs an adapter to merge: give --adapter=DIR')
    if flags.format == 'peft' and (flags.merge or not flags.adapter):
        raise Mistake("format='peft' is written of an adapter alone: give --adapter=DIR, and no --merge")
    if flags.adapter and not flags.merge and flags.format not in ('native', 'peft'):
        raise Mistake(f'adapter={flags.adapter!r} alone is written as native or peft: for weights in '
                      f'format={flags.format!r} add --merge=True')
    if Path(flags.output).exists():
        raise Mistake(f'output={flags.output!r} exists already: nothing is written over it; choose another path')
    if flags.format == 'native' and flags.float_dtype != 'fp32':
        raise Mistake(f'float_dtype={flags.float_dtype!r}: our own checkpoints hold fp32; write hf or easylm')
    number, unit = flags.max_shard_size[:-2], flags.max_shard_size[-2:].upper()
    if unit not in UNITS or not number.isdecimal() or int(number) < 1:
        raise Mistake(f'max_shard_size={flags.max_shard_size!r} must be a whole number with one of the units '
                      f'{" ".join(UNITS)}, for example 5GB')
    return int(number) * UNITS[unit]


def find_tokenizer(flags: ConfigDict, source: Source, config: LlamaConfig) -> Tokenizer | None:
    """Load --tokenizer.vocab_file, else what comes with the weights; one we cannot read is left out, and said so."""
    vocab_file = flags.tokenizer.vocab_file
    try:
        tokenizer = load_tokenizer(vocab_file) if vocab_file else source.tokenizer
    except Mistake as error:
        if vocab_file:
            raise
        print(f'left out: the tokenizer ({error})', flush=True)
        return None
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        raise Mistake(f'the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}: give '
                      'the one that belongs to the model as --tokenizer.vocab_file')
    return tokenizer


def convert_adapter(output: Path, source: AdaptedSource, config: LlamaConfig, tokenizer: Tokenizer | None,
                    flags: ConfigDict) -> None:
    """Write the adapter of `source` alone, as one of ours or as PEFT's."""
    if flags.format == 'native':
        with appears_whole(output) as temporary:
            adapter.write_native(temporary, source, config, tokenizer)
    else:
        from checkpoint.formats import peft  # its libraries are extras
        source.reader(config)  # refuses an adapter of another base
        peft.write(output, source.adapter.lora, source.adapter.arrays(config), config, source.path, flags.float_dtype)
        if source.adapter.template:
            print('left out: the prompt template, for which peft has no place')
    print(f'wrote {output}; use it with --load_checkpoint={source.spec} --adapter={output}', flush=True)


def write_native(output: Path, tensor, config: LlamaConfig, tokenizer: Tokenizer | None, source: Source) -> None:
    """Write a checkpoint of ours at the step of the source, each stacked weight a layer at a time."""
    arrays = {}
    for spec in jax.tree.leaves(weight_specs(config)):
        slices = map(lambda layer, name=spec.name: tensor(name, layer)[None], range(spec.shape[0]))
        if not spec.stacked:
            slices = map(lambda layer, name=spec.name: tensor(name, layer), [None])
        arrays[f'params.{spec.name}'] = native.Streamed(
            spec.shape, np.dtype(np.float32), 1 if spec.stacked else spec.shape[0], slices)
    meta, files = describe(config, tokenizer, source.template, source.add_bos_token, source.chat_template)
    with appears_whole(output) as temporary:
        native.save(temporary, source.step, arrays, meta, files, keep=1)


def write_easylm(output: Path, tensor, config: LlamaConfig, tokenizer: Tokenizer | None, float_dtype: str) -> None:
    """Write what EasyLM reads: streaming_params, llama_config.json and the tokenizer."""
    from checkpoint.formats import easylm_writer, huggingface_writer  # their libraries are extras
    easylm_writer.refuse_unsupported(config)
    with appears_whole(output) as temporary:
        temporary.mkdir()
        easylm_writer.write_params(temporary / 'streaming_params', tensor, config, float_dtype)
        (temporary / 'llama_config.json').write_text(json.dumps(config_to_dict(config), indent=2) + '\n')
        if tokenizer:
            huggingface_writer.write_tokenizer(temporary, tokenizer, config.max_sequence_length, None)


def usage(output: Path, kind: str, tokenizer: Tokenizer | None) -> str:
    """Spell the flags with which train.py, serve.py and evaluate.py load what was written."""
    words = {'native': f'--load_checkpoint={output}', 'hf': f'--load_checkpoint=hf::{output}',
             'easylm': f'--load_checkpoint=params::{output}/streaming_params '
                       f'--load_llama_config=json::{output}/llama_config.json'}[kind]
    if not tokenizer:
        return words + ' --tokenizer.vocab_file=FILE'
    return words + (f' --tokenizer.vocab_file={output}/{tokenizer.file_name}' if kind == 'easylm' else '')


if __name__ == '__main__':
    run(main, CONVERT)
