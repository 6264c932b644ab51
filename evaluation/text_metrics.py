"""Compare generated texts with the texts that were wanted: whole, by words, and by the fields of a JSON object.

  raw_match    equal, character by character, but for one blank at the beginning, which an answer is given without
  exact_match  equal after letters are small, and blanks and line ends in a row one blank, none at the ends; punctuation
               and words stay, since in SQL and JSON they mean something
  token_f1     SQuAD's (P. Rajpurkar et al., arXiv 1606.05250; evaluate-v1.1.py): 2 common / (words of both), as bags,
               of small letters without ASCII punctuation and the words a, an, the; without words on one side 1 if there
               are none on the other either, else 0 (SQuAD 2.0)
  rouge_l      F of the longest common subsequence of words (C.-Y. Lin, ROUGE, 2004), by the package rouge-score without
               stemming; it sees a-z and 0-9 alone
  json_valid   of the records whose wanted text is a JSON object, the share answered with one and nothing around it
  all_fields   of these, the share with all fields right and no others
  field_precision, field_recall, field_f1   over the fields of all these records together (micro): right / said,
               right / wanted, 2 right / (said + wanted).  A field is the keys that lead to a value that is no object,
               and it is right when the values are equal as JSON; an answer that is no object says none.

Every measure is a sum over records divided by another, so one bootstrap serves all: records are drawn with repetition,
as many as there are, and the interval goes from the 2.5th to the 97.5th percentile of the measure over the draws
(B. Efron, Annals of Statistics 7, 1979).  Where every record has the same value it has no width: it knows of nothing
that it did not see.  Neighbours: free_text.py asks for the answers.
"""
import json
import re
import string
from collections import Counter
from collections.abc import Callable

import numpy as np

from mistake import Mistake

RESAMPLES = 1000
PUNCTUATION = str.maketrans('', '', string.punctuation)
ARTICLES = re.compile(r'\b(a|an|the)\b')


# ---------------------------------------------------------------- two texts


def same_text(wanted: str, answer: str) -> bool:
    """Tell whether two texts differ in capitals and blanks alone."""
    return wanted.lower().split() == answer.lower().split()


def token_f1(wanted: str, answer: str) -> float:
    """Compute SQuAD's F1 of the words of an answer."""
    wanted_words, words = (Counter(ARTICLES.sub(' ', text.lower().translate(PUNCTUATION)).split())
                           for text in (wanted, answer))
    if not wanted_words or not words:
        return float(wanted_words == words)
    return 2 * (wanted_words & words).total() / (wanted_words.total() + words.total())


def load_rouge() -> Callable[[str, str], float]:
    """Load the package: rouge_l(wanted, answer) -> F.  Raises Mistake, naming the extra, where it is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise Mistake("rouge=True needs the extra: pip install -e '.[text]', or set --rouge=False") from None
    scorer = RougeScorer(['rougeL'])
    return lambda wanted, answer: scorer.score(wanted, answer)['rougeL'].fmeasure


# ---------------------------------------------------------------- JSON objects


def read_object(text: str) -> dict | None:
    """Read a text that is a JSON object and nothing else; None for every other text (NaN is no JSON)."""
    try:
        value = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _no_number(name: str) -> None:
    raise ValueError(name)


def fields_of(value: dict, path: str = '') -> dict[str, object]:
    """List the fields of an object: {'patient.age': 61, ..}; a list, or an object without keys, is one value."""
    found = {}
    for key, inner in value.items():
        found |= fields_of(inner, f'{path}{key}.') if isinstance(inner, dict) and inner else {path + key: inner}
    return found


def same_value(a, b) -> bool:
    """Tell whether two values are equal as JSON: 1 and 1.0 are, 1 and true are not, lists have an order."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(a[key], b[key]) for key in a)
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def compare_objects(wanted: dict, said: dict | None) -> dict:
    """Compare by fields: {'valid': bool, 'right', 'wrong', 'missing', 'surplus': names of fields}."""
    wanted_fields, fields = fields_of(wanted), fields_of(said or {})
    found = {'valid': said is not None, 'right': [], 'wrong': [], 'missing': [],
             'surplus': [name for name in fields if name not in wanted_fields]}
    for name, value in wanted_fields.items():
        right = 'missing' if name not in fields else 'right' if same_value(value, fields[name]) else 'wrong'
        found[right].append(name)
    return found


# ---------------------------------------------------------------- an answer, and all of them


def compare(wanted: str, answer: str, rouge_l: Callable[[str, str], float] | None = None) -> dict:
    """Measure one answer; JSON-able.

    'raw_match', 'exact_match': bool; 'token_f1' and, with rouge_l (load_rouge), 'rouge_l': from 0 to 1; 'fields': as
    compare_objects, where the wanted text is a JSON object.
    """
    row = {'raw_match': wanted.removeprefix(' ') == answer.removeprefix(' '), 'exact_match': same_text(wanted, answer),
           'token_f1': token_f1(wanted, answer)}
    if rouge_l:
        row['rouge_l'] = rouge_l(wanted, answer)
    if (value := read_object(wanted)) is not None:
        row['fields'] = compare_objects(value, read_object(answer))
    return row


def errors(row: dict) -> int:
    """Count the fields of a compared answer that are not right, those of no object one more; 0 where none is wanted."""
    fields = row.get('fields')
    return sum(len(fields[kind]) for kind in ('wrong', 'missing', 'surplus')) + (not fields['valid']) if fields else 0


def sums(rows: list[dict]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write every measure as two columns, float64 [records], whose sums' quotient it is.

    rows: of `compare`.  rouge_l, and the measures of fields, are there where a row has them.
    """
    one = np.ones(len(rows))
    found = {name: (np.array([row[name] for row in rows], float), one)
             for name in ('exact_match', 'raw_match', 'token_f1', 'rouge_l') if name in rows[0]}
    if any('fields' in row for row in rows):
        none = {'valid': False, 'right': (), 'wrong': (), 'missing': (), 'surplus': ()}
        fields = [row.get('fields', none) for row in rows]
        asked = np.array(['fields' in row for row in rows], float)
        valid = np.array([row['valid'] for row in fields], float)
        right, wrong, missing, surplus = (np.array([len(row[kind]) for row in fields], float)
                                          for kind in ('right', 'wrong', 'missing', 'surplus'))
        said, wanted = right + wrong + surplus, right + wrong + missing
        found |= {'json_valid': (valid, asked), 'all_fields': (valid * (right == said) * (right == wanted), asked),
                  'field_precision': (right, said), 'field_recall': (right, wanted),
                  'field_f1': (2 * right, said + wanted)}
    return found


def measure(rows: list[dict]) -> dict[str, float]:
    """Compute every measure of `rows` (of `compare`, at least one); precision is 0 where no answer says a field."""
    return {name: float(above.sum() / max(below.sum(), 1)) for name, (above, below) in sums(rows).items()}


def intervals(rows: list[dict], seed: int, resamples: int = RESAMPLES) -> dict[str, tuple[float, float]]:
    """Find the 95 % interval of every measure by bootstrap over the records."""
    columns = sums(rows)
    both = np.stack([column for pair in columns.values() for column in pair], axis=1)
    rng, count = np.random.default_rng(seed), len(rows)
    drawn = np.stack([both[rng.integers(count, size=count)].sum(axis=0) for _ in range(resamples)])
    ratios = drawn[:, ::2] / np.maximum(drawn[:, 1::2], 1)
    low, high = np.percentile(ratios, (2.5, 97.5), axis=0)
    return {name: (float(low[n]), float(high[n])) for n, name in enumerate(columns)}


def field_shares(rows: list[dict]) -> dict[str, dict[str, int]]:
    """Count, for each wanted field in order of appearance, {'right': .., 'records': that want it}."""
    shares = {}
    for fields in (row['fields'] for row in rows if 'fields' in row):
        for kind in ('right', 'wrong', 'missing'):
            for name in fields[kind]:
                share = shares.setdefault(name, {'right': 0, 'records': 0})
                share['records'] += 1
                share['right'] += kind == 'right'
    return shares
