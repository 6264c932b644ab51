"""serve.py of this checkout, with weights in float32, bfloat16 or int8."""
import sys

from instruments.bench.contenders.contender import Contender, Settings, openai_protocol

MIXES = ('M1', 'M2', 'M3', 'M4', 'M5', 'M6', 'M7', 'M8', 'M9')
BITS = {'f32': 32.0, 'bf16': 16.0, 'int8': 8.0}


def contender(dtype: str, checkpoint: str) -> Contender:
    weights = '' if dtype == 'f32' else dtype

    def command(port: int, settings: Settings) -> list[str]:
        return [sys.executable, 'serve.py', f'--load_checkpoint={checkpoint}', f'--lm_server.port={port}',
                '--lm_server.model_name=pallama', f'--lm_server.batch_size={settings.slots}',
                f'--lm_server.weight_dtype={weights}', f'--lm_server.queue_size={settings.queue}',
                f'--lm_server.prefix_reuse={settings.reuse}', f'--input_length={settings.input_length}',
                f'--seq_length={settings.length}']

    return Contender(f'ours {dtype}', command, lambda settings: openai_protocol('pallama', ignore_eos=True),
                     BITS[dtype], '/ready', MIXES, scores=True, metrics=True)
