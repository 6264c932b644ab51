"""Write a run of train.py as EasyLM does (`--checkpointer.format=easylm`).  Format: formats/easylm_writer.py.

    DIR/streaming_train_state or streaming_params     the next save replaces it
        metadata.json dataset.json                    as JSON what EasyLM pickles beside it
        ..._N                                         the three of a milestone, which stay; N is its step
"""
import json
from pathlib import Path

import jax

from checkpoint.source import needs_formats
from checkpoint.writing import appears_whole
from hosts import processes
from mistake import Mistake
from model.config import LlamaConfig, config_to_dict


def refuse(config: LlamaConfig, *, resume: bool, optimizer_state: bool, float_dtype: str) -> None:
    """Raise Mistake, at the start of the run, for what `save` could not write at its end.

    Warns of a float_dtype that rounds the optimizer's state.
    """
    if processes.count() > 1:
        raise Mistake('checkpointer.format=easylm is written by one process, and this run has '
                      f'{processes.count()}: leave it native, and afterwards python convert.py --format=easylm')
    try:
        from checkpoint.formats import easylm_writer
    except ModuleNotFoundError as error:
        raise needs_formats('checkpointer.format=easylm', error) from None
    easylm_writer.refuse_unsupported(config)
    if resume:
        raise Mistake('resume=True continues native checkpoints; with checkpointer.format=easylm go on with '
                      '--load_checkpoint=trainstate::FILE and --load_dataset_state=dataset.json')
    if optimizer_state and float_dtype not in ('', 'fp32', 'float32'):
        print(f'WARNING: checkpointer.{float_dtype=} rounds the train state, so a run that goes on from it differs; '
              '--checkpointer.float_dtype=fp32 keeps it', flush=True)


def save(output_dir: Path, arrays: dict[str, jax.Array], done: int, position: dict, *, config: LlamaConfig,
         flags: dict, dataset: dict, milestone: bool, optimizer_state: bool, parameter_scale: bool,
         float_dtype: str) -> Path:
    """Write the streaming file and its JSON files after `done` micro-steps; returns the streaming file's path.

    arrays: by the names of our checkpoints, 'params.*' and with optimizer_state the optimizer's.  position: the
    batches' state().  flags: all of the run; dataset: those of train_dataset.  parameter_scale, float_dtype: as
    easylm_writer.write_train_state.  Raises Mistake for values that are not finite in float_dtype.
    """
    from checkpoint.formats import easylm_writer
    suffix = f'_{done}' if milestone else ''
    metadata = dict(step=done, flags=flags, llama_config=config_to_dict(config))
    for name, content in (('metadata', metadata), ('dataset', dict(dataset=dataset, state=position))):
        with appears_whole(output_dir / f'{name}{suffix}.json', replace=True) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    path = output_dir / (file_name(optimizer_state) + suffix)
    if optimizer_state:
        easylm_writer.write_train_state(path, arrays, config, done, parameter_scale, float_dtype, replace=True)
    else:
        easylm_writer.write_params(path, easylm_writer.gathered(arrays, 'params'), config, float_dtype, replace=True)
    return path


def file_name(optimizer_state: bool) -> str:
    """Name the streaming file of a run."""
    return 'streaming_train_state' if optimizer_state else 'streaming_params'


def loading_flags(output_dir: Path, optimizer_state: bool) -> str:
    """Spell the flags that load what `save` wrote last."""
    kind = 'trainstate_params' if optimizer_state else 'params'
    return (f'--load_llama_config=json::{output_dir}/metadata.json '
            f'--load_checkpoint={kind}::{output_dir}/{file_name(optimizer_state)}')
