"""Read and write a directory of an adapter as PEFT has it.  Neighbours: ../adapter.py, huggingface.py.

Format facts (PEFT's LoraConfig and save_pretrained):
  - adapter_config.json has r, lora_alpha, use_rslora, target_modules and the name of the base;
  - adapter_model.safetensors has for each adapted matrix, 'base_model.model.' before the name of its module,
    lora_A.weight [R, in] and lora_B.weight [out, R], so transposed to ours: W + scale (B A);
  - scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
Which matrices are adapted is read from the tensors; target_modules may be a pattern.  Whatever else would change the
mathematics is refused by name.
"""
from pathlib import Path

import numpy as np

from checkpoint.formats.huggingface import DTYPES, NAMES, refuse_placeholder, tensors_in
from checkpoint.formats.huggingface_writer import write_json, write_safetensors
from checkpoint.formats.reading import read_part
from checkpoint.writing import appears_whole
from data.tokenizer import read_object
from mistake import Mistake
from model.config import LlamaConfig
from model.lora import TARGETS, Lora

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
# what a key must be; a list of values where several are as good
SUPPORTED = {'peft_type': ['LORA'], 'task_type': ['CAUSAL_LM', None], 'bias': ['none'],
             'init_lora_weights': [True, False, 'gaussian', 'eva', 'orthogonal']}  # pissa, olora, .. change the base
# keys that say nothing of what is computed with the tensors that are stored
IGNORED = {'r', 'lora_alpha', 'use_rslora', 'lora_dropout', 'target_modules', 'exclude_modules', 'auto_mapping',
           'peft_version', 'base_model_name_or_path', 'revision', 'inference_mode', 'layers_to_transform',
           'layers_pattern', 'megatron_core', 'eva_config', 'qalora_group_size', 'ensure_weight_tying'}
Sources = dict[tuple[str, int, str], str]  # (target, layer, 'A' or 'B') -> the file's name of the tensor


def source(target: str, layer: int, half: str) -> str:
    """Spell the file's name of half 'A' or 'B' of an adapter."""
    module = NAMES[f'layers.{target}'][0].format(layer).removesuffix('.weight')
    return f'base_model.model.{module}.lora_{half}.weight'


class Reader:
    """A directory of PEFT's opened for reading.

    lora: what it says of itself.  base: the name of its base, '' where none stands there.  shapes: of all tensors.
    Raises Mistake for a broken file and for whatever would change the mathematics and is not implemented.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        config, file = self.path / CONFIG, self.path / WEIGHTS
        values = read_object(config)
        for key, value in (dict(peft_type=None) | values).items():
            allowed = SUPPORTED.get(key, [value] if key in IGNORED or not value else [])
            if value not in allowed:
                wanted = ' or '.join(map(repr, allowed)) or 'to leave it out'
                raise Mistake(f'{config}: {key}={value!r} is not supported; supported: {wanted}')
        if (self.path / 'adapter_model.bin').exists() and not file.exists():
            raise Mistake(f'{self.path} holds its tensors in a pickle file (adapter_model.bin), which is never read '
                          f'(unpickling runs code): take {WEIGHTS}')
        refuse_placeholder(file)
        self._tensors = tensors_in(file)
        self.shapes = {name: shape for name, (_, _, shape, _) in self._tensors.items()}
        modules = {NAMES[f'layers.{target}'][0].split('.')[-2]: target for target in TARGETS}
        found = {name: name.split('.')[-3] for name in self.shapes if name.count('.') >= 3}
        if unknown := sorted(set(self.shapes) - {name for name, module in found.items() if module in modules}):
            raise Mistake(f'{file}: tensor {unknown[0]!r} adapts no matrix that can be adapted here; those are '
                          f'{" ".join(modules)}')
        rank, alpha = values.get('r'), values.get('lora_alpha')
        if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
            raise Mistake(f'{config}: r={rank!r} and lora_alpha={alpha!r} must be a whole number above 0 and a number')
        targets = tuple(target for module, target in modules.items() if module in found.values())
        self.lora = Lora(rank, float(alpha), targets, values.get('lora_dropout') or 0.0,
                         bool(values.get('use_rslora')))
        self.base = values.get('base_model_name_or_path') or ''

    def array(self, name: str) -> np.ndarray:
        """Read a tensor as float32."""
        file, dtype, shape, offset = self._tensors[name]
        if dtype not in DTYPES:
            raise Mistake(f'{file}: {name!r} has dtype {dtype}; supported: {" ".join(DTYPES)}')
        return read_part(file, DTYPES[dtype], shape, offset, None).astype(np.float32, copy=False)


def write(path: Path, lora: Lora, arrays: dict[str, np.ndarray], config: LlamaConfig, base: str,
          float_dtype: str) -> None:
    """Write the directory `path` from 'layers.w_q.a' [N, in, R], 'layers.w_q.b' [N, R, out] and so on.

    base: how others name it, a path or a name of the hub.  Raises Mistake for values that are no finite numbers in
    float_dtype.
    """
    tensors = {source(target, layer, half): arrays[f'layers.{target}.{half.lower()}'][layer].T
               for layer in range(config.num_hidden_layers) for target in lora.targets for half in 'AB'}
    whole = lora.alpha == int(lora.alpha)  # as PEFT itself has it
    with appears_whole(Path(path)) as temporary:
        temporary.mkdir()
        write_safetensors(temporary / WEIGHTS, [(name, array.shape, lambda array=array: array)
                                                for name, array in tensors.items()], float_dtype)
        write_json(temporary / CONFIG, dict(
            peft_type='LORA', task_type='CAUSAL_LM', base_model_name_or_path=base, inference_mode=True, r=lora.rank,
            lora_alpha=int(lora.alpha) if whole else lora.alpha, lora_dropout=lora.dropout, use_rslora=lora.rslora,
            target_modules=[NAMES[f'layers.{target}'][0].split('.')[-2] for target in lora.targets], bias='none',
            fan_in_fan_out=False, modules_to_save=None, init_lora_weights=True))


def sources(config: LlamaConfig, lora: Lora) -> Sources:
    """Name every tensor of an adapter."""
    return {(target, layer, half): source(target, layer, half) for target in lora.targets
            for layer in range(config.num_hidden_layers) for half in 'AB'}
