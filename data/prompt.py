"""The one template between a text and what the network reads.

    prompt(text)         '[Text]: a fine film\\n[Sentiment]:'               what serving is asked with
    answer(1)            ' Positive'                                        what it should continue with
    record(text, 1)      '[Text]: a fine film\\n[Sentiment]: Positive'      what training reads

Training, serving and evaluation all call this, and a checkpoint carries it, so that the three cannot drift apart.
Neighbours: prepare_data.py writes records with it.
"""
import dataclasses

from mistake import Mistake


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """prompt = prefix + text + suffix;  answer = answer_prefix + the label's name;  record = prompt + answer."""

    prefix: str = '[Text]: '
    suffix: str = '\n[Sentiment]:'
    answer_prefix: str = ' '
    labels: tuple[str, ...] = ('Negative', 'Positive')

    def __post_init__(self):
        for name in ('prefix', 'suffix', 'answer_prefix'):
            if not isinstance(getattr(self, name), str):
                raise Mistake(f'template {name}={getattr(self, name)!r} must be text')
        names = self.labels if isinstance(self.labels, tuple) else ()
        different = {name.strip().lower() for name in names if isinstance(name, str)} - {''}
        if len(different) < 2 or len(different) != len(names):
            raise Mistake(f'template labels={self.labels!r} must be at least two different names')

    @classmethod
    def written(cls, template: str, labels: tuple[str, ...]) -> 'PromptTemplate':
        """The template that --template writes: 'Ticket: {text}\\nTeam:', with a literal \\n for a line's end.

        Raises Mistake unless {text} stands in it exactly once, and no blank at its end: the answer brings its own.
        """
        parts = template.replace('\\n', '\n').split('{text}')
        if len(parts) != 2:
            raise Mistake(f'{template=} must hold {{text}} exactly once, where the text goes: '
                          r"--template='Ticket: {text}\nTeam:'")
        if parts[1].endswith(' '):
            raise Mistake(f'{template=} ends in a blank: leave it off, the answer begins with one')
        return cls(*parts, labels=labels)

    def prompt(self, text: str) -> str:
        return self.prefix + text + self.suffix

    def answer(self, label: int) -> str:
        if not 0 <= label < len(self.labels):
            raise Mistake(f'{label=} must be one of 0 .. {len(self.labels) - 1}: {self.labels}')
        return self.answer_prefix + self.labels[label]

    def record(self, text: str, label: int) -> str:
        return self.prompt(text) + self.answer(label)

    def label_of(self, record: dict) -> int | None:
        """The label of a record that prepare_data.py wrote or could have: its answer (or completion) is the label's
        name, or its text ends with the question and that answer; None where neither is."""
        said, text = record.get('answer', record.get('completion')), record.get('text')
        for label, name in enumerate(self.labels):
            if isinstance(said, str):
                found = said.strip() == name.strip()
            else:
                found = isinstance(text, str) and text.endswith(self.suffix + self.answer(label))
            if found:
                return label
        return None

    def to_dict(self) -> dict:
        """The template as JSON-able values."""
        return {**dataclasses.asdict(self), 'labels': list(self.labels)}

    @classmethod
    def from_dict(cls, values: dict, source: str = 'template') -> 'PromptTemplate':
        """The template of `to_dict`.  Raises Mistake, naming `source`, unless exactly its keys are there."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != names or not isinstance(values['labels'], list | tuple):
            raise Mistake(f'{source}: a prompt template has the keys {sorted(names)}, with labels a list; '
                             f'this is {values!r:.200}')
        return cls(**{**values, 'labels': tuple(values['labels'])})
