"""Make a small extraction set: invented notes of a ward, and what each prescribes, as JSON of three fields.

    python docs/examples/notes.py --output=runs/notes/data

writes train.jsonl and test.jsonl, one {"prompt": .., "completion": ..} a line:

    Note: Ms Okafor is to take Talobrin 40mg every 12 hours for a rash.
    JSON: {"drug": "Talobrin", "dose": "40 mg", "per_day": 2}

`drug` is to be copied, `dose` to be copied and written in one way, `per_day` to be understood.  The same seed makes the
same files.  No drug of the test part stands in the training part, so none of its records can be known by heart.  The
drugs are put together from syllables; what resembles a real one does so by chance, and nothing here is advice.
"""
import argparse
import itertools
import json
import pathlib
import random

NOTES = (
    '{who} is to take {drug} {dose} {when} for {problem}.',
    'Started {drug}, {dose} {when}; review in two weeks.',
    'Complains of {problem} for three days. Plan: {drug} {dose} {when}.',
    '{other} stopped because of nausea. Now {drug} {dose}, {when}.',
    'Seen today with {problem}. {drug} {dose} to be given {when}, no known allergies.',
    'Continue {drug}. Dose raised from {before} to {dose}, {when}.',
    'Discharge: {when} {drug} {dose}, and rest.',
    '{who}, aged {age}, {problem}: {dose} of {drug} {when}.',
    'The pharmacy has no {other}, so {drug} {dose} {when} instead.',
    'The daughter asks about {problem}. Told her to give {dose} {drug} {when}.',
    'Takes {other} already, which stays as it is. In addition {drug}: {dose}, {when}.',
    'Rx {drug} {dose} {when} x 7 days',
    'After the operation {drug} {when}, each time {dose}.',
    'No improvement on {other}. Switched to {drug} ({dose}, {when}).',
    'Pulse {age}, no fever. {who} still has {problem}; prescribe {dose} {drug}, to be taken {when}.',
    '{drug} was too strong at {before}; reduced to {dose} {when}.',
)
WHEN = {
    1: ('once a day', 'every morning', 'at bedtime', 'every 24 hours', 'once daily'),
    2: ('twice a day', 'every 12 hours', 'morning and evening', 'bid', 'two times daily'),
    3: ('three times a day', 'every 8 hours', 'at breakfast, lunch and dinner', 'tid', 'thrice daily'),
    4: ('four times a day', 'every 6 hours', 'qid', 'four times daily'),
}
UNITS = {'mg': ('mg', ' mg', ' milligrams'), 'ml': ('ml', ' ml', ' millilitres'), 'g': ('g', ' g', ' grams')}
AMOUNTS = {'mg': (5, 10, 15, 20, 25, 30, 40, 50, 75, 80, 100, 125, 150, 200, 250, 300, 400, 500), 'ml': (5, 10, 15, 20),
           'g': (2, 3)}
DOSES = [(amount, unit) for unit, amounts in AMOUNTS.items() for amount in amounts]
WHO = ('Ms Okafor', 'Mr Lindqvist', 'Mrs Tanaka', 'Mr Novak', 'Ms Haddad', 'the patient', 'Mr Silva', 'Mrs Byrne')
PROBLEMS = ('a rash', 'back pain', 'a dry cough', 'heartburn', 'poor sleep', 'a swollen knee', 'headache', 'dizziness',
            'an earache', 'hay fever', 'a sore throat', 'cramps')
SYLLABLES = (
    ('Bra', 'Cel', 'Dor', 'Gol', 'Hal', 'Jor', 'Kel', 'Lum', 'Mor', 'Nix', 'Pra', 'Ros', 'Tal', 'Vor', 'Yar', 'Zel'),
    ('a', 'e', 'i', 'o'),
    ('brin', 'dune', 'fex', 'lor', 'mide', 'nol', 'quat', 'rane', 'stim', 'vane', 'xil'))


def make_record(note: str, drugs: list[str], draw: random.Random) -> dict:
    """A record whose drugs, the one that is asked for and another, are two of `drugs`."""
    drug, other = draw.sample(drugs, 2)
    (amount, unit), (less, less_unit) = draw.sample(DOSES, 2)
    per_day = draw.choice(list(WHEN))
    write = lambda amount, unit: f'{amount}{draw.choice(UNITS[unit])}'
    text = note.format(drug=drug, other=other, dose=write(amount, unit), before=write(less, less_unit),
                       when=draw.choice(WHEN[per_day]), who=draw.choice(WHO), problem=draw.choice(PROBLEMS),
                       age=draw.randint(52, 98))
    answer = {'drug': drug, 'dose': f'{amount} {unit}', 'per_day': per_day}
    return {'prompt': f'Note: {text[0].upper()}{text[1:]}\nJSON:', 'completion': ' ' + json.dumps(answer)}


def make_parts(train: int, test: int, seed: int) -> dict[str, list[dict]]:
    """{'train': records, 'test': records}: each form of note as often as the others, the drugs of the parts apart."""
    drugs = [''.join(parts) for parts in itertools.product(*SYLLABLES)]
    random.Random(seed).shuffle(drugs)
    parts = {}
    for part, count, names in (('train', train, drugs[100:]), ('test', test, drugs[:100])):
        draw = random.Random(f'{seed} {part}')  # so that a larger training part leaves the test part as it is
        parts[part] = [make_record(NOTES[i % len(NOTES)], names, draw) for i in range(count)]
        draw.shuffle(parts[part])
    return parts


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument('--output', type=pathlib.Path, required=True, help='directory to write to')
    options.add_argument('--train', type=int, default=320, help='records to train with')
    options.add_argument('--test', type=int, default=96, help='records to evaluate with')
    options.add_argument('--seed', type=int, default=0)
    asked = options.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    for part, records in make_parts(asked.train, asked.test, asked.seed).items():
        path = asked.output / f'{part}.jsonl'
        path.write_text(''.join(json.dumps(record) + '\n' for record in records), encoding='utf-8')
        print(f'{path}: {len(records)} records; the first:\n{records[0]["prompt"]}{records[0]["completion"]}')


if __name__ == '__main__':
    main()
