"""transformers' generate behind a small HTTP server (huggingface_worker.py): batch 1, and a static batch."""
from instruments.bench.contenders.contender import ROOT, Contender, Settings, openai_protocol

WORKER = ROOT / 'instruments/bench/contenders/huggingface_worker.py'


def contender(python: str, directory: str, batch: int) -> Contender:
    """directory: of a Hugging Face checkpoint."""
    def command(port: int, settings: Settings) -> list[str]:
        return [python, str(WORKER), directory, str(port), str(batch), str(settings.threads)]

    return Contender(f'transformers batch {batch}', command, lambda settings: openai_protocol('model'), 32.0, '/ready',
                     ('M1', 'M2', 'M5', 'M9') if batch == 1 else ('M1', 'M2', 'M3', 'M9'), scores=batch == 1,
                     notes='' if batch == 1 else f'a batch of up to {batch} requests that wait, padded, run to the end '
                     'of its longest')
