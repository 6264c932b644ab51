"""Be a server of transformers' generate, in a process of its own; it imports nothing of this project.

    python huggingface_worker.py DIRECTORY PORT BATCH THREADS

GET /ready; POST /v1/completions {"prompt": [ids], "max_tokens": n}: greedy, EOS is ignored, a stream of pieces and at
its end the usage.  Up to BATCH requests that wait together are one call of generate, padded on the left and run to the
longest answer.  POST /loglikelihood {"prefix_text": [..], "text": [..]}: one forward pass a pair, for the comparison
of scores.
"""
import http.server
import json
import queue
import sys
import threading


class Streams:
    """A streamer of generate: hands the tokens of each step to their requests."""

    def __init__(self, requests):
        self.requests, self.prompt = requests, True

    def put(self, value):
        if self.prompt:
            self.prompt = False
            return
        for request, token in zip(self.requests, value.reshape(-1).tolist(), strict=True):
            if request['sent'] < request['max_tokens']:
                request['sent'] += 1
                request['answer'].put(token)

    def end(self):
        pass


def main() -> None:
    directory, port, batch, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    import torch
    import transformers
    torch.set_num_threads(threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)
    waiting = queue.Queue()

    @torch.inference_mode()
    def score(prefix: str, text: str) -> tuple[float, bool]:
        before, after = (tokenizer(part, add_special_tokens=False)['input_ids'] for part in (prefix, text))
        logits = model(torch.tensor([before + after])).logits[0, len(before) - 1:-1]
        found = torch.log_softmax(logits, -1)[range(len(after)), after]
        return found.sum().item(), logits.argmax(-1).tolist() == after

    def work() -> None:
        while True:
            requests = [waiting.get()]
            while 'score' not in requests[0] and len(requests) < batch:
                try:
                    requests.append(waiting.get(timeout=0.02))
                except queue.Empty:
                    break
            for request in [request for request in requests if 'score' in request]:
                request['answer'].put([score(*pair) for pair in request['score']])
            requests = [request for request in requests if 'score' not in request]
            if not requests:
                continue
            width = max(len(request['prompt']) for request in requests)
            pad = [width - len(request['prompt']) for request in requests]
            ids = torch.tensor([[0] * n + request['prompt'] for n, request in zip(pad, requests, strict=True)])
            mask = torch.tensor([[0] * n + [1] * (width - n) for n in pad])
            with torch.inference_mode():
                model.generate(input_ids=ids, attention_mask=mask, streamer=Streams(requests),
                               max_new_tokens=max(request['max_tokens'] for request in requests))
            for request in requests:
                request['answer'].put(None)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.0'  # the answer ends where the connection does

        def log_message(self, *arguments):
            pass

        def head(self, kind: str) -> None:
            self.send_response(200)
            self.send_header('Content-Type', kind)
            self.end_headers()

        def do_GET(self):
            self.head('text/plain')
            self.wfile.write(b'Ready!\n')

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            answer = queue.SimpleQueue()
            if self.path == '/loglikelihood':
                waiting.put({'score': list(zip(body['prefix_text'], body['text'], strict=True)), 'answer': answer})
                found = answer.get()
                self.head('application/json')
                self.wfile.write(json.dumps({'log_likelihood': [nats for nats, _ in found],
                                             'is_greedy': [greedy for _, greedy in found]}).encode())
                return
            waiting.put({'prompt': body['prompt'], 'max_tokens': body['max_tokens'], 'sent': 0, 'answer': answer})
            self.head('text/event-stream')
            tokens, told = [], ''
            while (token := answer.get()) is not None:
                tokens.append(token)
                text = tokenizer.decode(tokens)
                piece, told = text[len(told):], text
                self.tell({'choices': [{'text': piece}]})
            self.tell({'choices': [], 'usage': {'completion_tokens': len(tokens)}})

        def tell(self, event: dict) -> None:
            self.wfile.write(f'data: {json.dumps(event)}\n\n'.encode())
            self.wfile.flush()

    threading.Thread(target=work, daemon=True).start()
    server = http.server.ThreadingHTTPServer(('127.0.0.1', port), Handler)
    server.daemon_threads = True
    server.request_queue_size = 128
    server.serve_forever()


if __name__ == '__main__':
    main()
