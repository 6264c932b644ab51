"""Be the other side of cpu_training.py: a plain training loop of transformers and torch, in a process of its own.

transformers' LlamaForCausalLM with random weights in float32, its default attention, its own loss; torch's fused AdamW
(the default of transformers' Trainer) and clip_grad_norm_.  It imports nothing of this project: cpu_training.py
writes JSON lines to its stdin, first the work (config, records, ..), then {"steps": n}, and reads one line for each.
"""
import json
import sys
import time


def padded(records: list[list[int]], length: int, loss: str) -> tuple[list, list, list]:
    """Pad to (input_ids, attention_mask, labels), each [B][length]; a label is the next token, or -100 without loss."""
    rows = []
    for tokens in records:
        rest = length - (len(tokens) - 1)
        labels = tokens[1:] if loss == 'all' else [-100] * (len(tokens) - 2) + tokens[-1:]
        rows.append((tokens[:-1] + [0] * rest, [1] * (length - rest) + [0] * rest, labels + [-100] * rest))
    return tuple(map(list, zip(*rows, strict=True)))


def main() -> None:
    work = json.loads(sys.stdin.readline())
    try:
        import torch
        import transformers
    except ImportError as missing:
        return answer(error=f'{missing}: --torch_python={sys.executable} must have torch and transformers (the extra '
                            'oracle: pip install -e ".[oracle]")')
    torch.set_num_threads(work['threads'])
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(model_config(transformers, work['config'])).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=work['lr'], betas=work['betas'],
                                  weight_decay=work['weight_decay'], fused=True)
    batches = [[torch.tensor(x) for x in padded(records, work['length'], work['loss'])] for records in work['records']]
    answer(versions=dict(torch=torch.__version__, transformers=transformers.__version__),
           parameters=sum(p.numel() for p in model.parameters()), tokens=[int(mask.sum()) for _, mask, _ in batches])
    for line in sys.stdin:
        began = time.perf_counter()
        for n in range(json.loads(line)['steps']):
            input_ids, attention_mask, labels = batches[n]
            # shift_labels: labels stand where their logits are already
            loss = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, shift_labels=labels,
                         use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), work['clip_gradient'])
            optimizer.step()
            optimizer.zero_grad()
        answer(seconds=time.perf_counter() - began, loss=loss.item())


def model_config(transformers, config: dict):
    """Make transformers' LlamaConfig of the sizes in model.config.LlamaConfig."""
    same = ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
            'num_key_value_heads', 'head_dim', 'rms_norm_eps', 'tie_word_embeddings', 'initializer_range',
            'bos_token_id', 'eos_token_id')
    return transformers.LlamaConfig(**{name: config[name] for name in same},
                                    max_position_embeddings=config['max_sequence_length'],
                                    rope_parameters=dict(rope_type='default', rope_theta=config['rope_theta']))


def answer(**values) -> None:
    print(json.dumps(values), flush=True)


if __name__ == '__main__':
    main()
