"""Write 200 chats of a made-up shop, a record a line: python docs/examples/chats.py runs/chats/train.jsonl [SEED]

{"messages": [{"role": "system", ..}, {"role": "user", ..}, {"role": "assistant", ..}, ..]}: somebody orders, the shop
says the order back as `COUNT x COLOUR THING, DAY`; in half of the chats the day is then changed.  The same seed (42)
writes the same file.
"""
import json
import random
import sys
from pathlib import Path

THINGS = 'lamp', 'chair', 'kettle', 'rug', 'clock', 'shelf', 'vase', 'mirror'
COLOURS = 'red', 'green', 'blue', 'white', 'black', 'yellow'
DAYS = 'Monday', 'Tuesday', 'Wednesday', 'Thursday', 'Friday', 'Saturday'
ORDERS = ('I would like {n} {colour} {thing}s for {day}.', 'Please send me {n} {thing}s in {colour}, on {day}.',
          'On {day} I need {n} {things}. Make them {colour}.', '{day}, {n} {colour} {thing}s, please!')
CHANGES = 'Could it be {day} instead?', 'Oh, {day} is better for me.', 'Make that {day}.'
SYSTEM = 'You take orders for a shop. Say each order back in one line.'


def chats(count: int, seed: int) -> list[dict]:
    """Make `count` records of messages."""
    rng, records = random.Random(seed), []
    for _ in range(count):
        n, colour, thing, day = rng.randint(2, 9), rng.choice(COLOURS), rng.choice(THINGS), rng.choice(DAYS)
        said = rng.choice(ORDERS).format(n=n, colour=colour, thing=thing, things=f'{thing}s', day=day)
        messages = [('system', SYSTEM), ('user', said), ('assistant', f'{n} x {colour} {thing}, {day}')]
        if rng.random() < 0.5:
            day = rng.choice([other for other in DAYS if other != day])
            messages += [('user', rng.choice(CHANGES).format(day=day)),
                         ('assistant', f'{n} x {colour} {thing}, {day}')]
        records.append({'messages': [{'role': role, 'content': content} for role, content in messages]})
    return records


def main(path: str, seed: str = '42') -> None:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(''.join(json.dumps(record) + '\n' for record in chats(200, int(seed))), encoding='utf-8')
    print(f'wrote 200 chats to {file}')


if __name__ == '__main__':
    main(*sys.argv[1:])
