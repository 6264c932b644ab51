"""llama.cpp: its own llama-server, and llama-cpp-python's llama_cpp.server; both read GGUF files of one weight type.

llama-server batches continuously.  llama_cpp.server has one context behind a lock: a request waits until the one before
is done (or, by default, interrupts it: that is switched off here), so that it takes part in M1, M2 and M9 alone.  It
takes no token ids and cannot ignore EOS, so it is sent the text, with a bias against EOS.
"""
import pathlib

import gguf

from instruments.bench.contenders.contender import Contender, Settings, openai_protocol
from instruments.bench.serving_load import Ask, Piece, Protocol

TYPES = {'F32': (gguf.GGMLQuantizationType.F32, 32.0, gguf.LlamaFileType.ALL_F32),
         'F16': (gguf.GGMLQuantizationType.F16, 16.0, gguf.LlamaFileType.MOSTLY_F16),
         'Q8_0': (gguf.GGMLQuantizationType.Q8_0, 8.5, gguf.LlamaFileType.MOSTLY_Q8_0)}


def server(kind: str, binary: str, file: str) -> Contender:
    """llama-server with the weights in `file`, of type `kind`."""
    def command(port: int, settings: Settings) -> list[str]:
        return [binary, '-m', file, '--host', '127.0.0.1', '--port', str(port), '-t', str(settings.threads),
                '-tb', str(settings.threads), '-np', str(settings.slots), '-c', str(settings.slots * settings.length),
                '--threads-http', '32', '--no-webui']

    def protocol(settings: Settings) -> Protocol:
        def body(ask: Ask) -> dict:
            return {'prompt': list(ask.prompt), 'n_predict': ask.tokens, 'temperature': 0, 'stream': True,
                    'ignore_eos': True, 'cache_prompt': settings.reuse, 'top_k': 1}

        def read(event: dict) -> Piece:
            if 'error' in event:
                raise ValueError(f'{event["error"]}')
            return Piece(event.get('content') or '', event['tokens_predicted'] if event.get('stop') else None)

        return Protocol('/completion', body, read)

    return Contender(f'llama-server {kind}', command, protocol, TYPES[kind][1], '/health',
                     ('M1', 'M2', 'M3', 'M4', 'M6', 'M7', 'M8', 'M9'),
                     notes='its queue has no bound: nothing is refused in M7')


def python_server(kind: str, python: str, file: str, eos: int) -> Contender:
    """llama_cpp.server with the weights in `file`."""
    def command(port: int, settings: Settings) -> list[str]:
        return [python, '-m', 'llama_cpp.server', '--model', file, '--host', '127.0.0.1', '--port', str(port),
                '--n_threads', str(settings.threads), '--n_threads_batch', str(settings.threads),
                '--n_ctx', str(settings.length), '--interrupt_requests', 'False', '--use_mmap', 'True']

    return Contender(f'llama_cpp.server {kind}', command,
                     lambda settings: openai_protocol('model', as_text=True, logit_bias={str(eos): -100}),
                     TYPES[kind][1], '/v1/models', ('M1', 'M2', 'M9'),
                     notes='one request after the other: no continuous batching; the prompt is sent as text')


def write(source: str, kind: str, target: pathlib.Path) -> pathlib.Path:
    """Write the weights of a GGUF file once more, matrices in `kind`, vectors in float32; all else is kept."""
    if target.exists():
        return target
    reader = gguf.GGUFReader(source)
    part = target.with_suffix('.part')
    writer = gguf.GGUFWriter(part, reader.fields['general.architecture'].contents())
    for name, field in reader.fields.items():
        if name.startswith('GGUF.') or name in ('general.architecture', 'general.file_type',
                                                'general.quantization_version'):
            continue
        of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], of)
    matrices, _, file_type = TYPES[kind]
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        type_ = matrices if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(target)
    return target
