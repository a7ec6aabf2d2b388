"""The questions of `make post-training`: four instructions whose answer the prompt determines, and greetings, which have two right answers.

A hash of the subject of a question (its word, sum or name) decides whether the question is held out. No text for training, also of the
pretraining, has a subject that is held out.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

CANVAS = 32
"""Characters of a document of a conversation: its prompt, its answer, and ends of the document as fill."""
LETTERS = "abcdefghijklmnopqrst"
SHORTEST_WORD, LONGEST_WORD = 4, 9
NUM_DIGITS = 3
"""Digits of each number of a sum."""
TITLES = ("dr", "mrs", "sir")
GREETINGS = ("hello", "howdy")
"""The two styles of a greeting. They have equally many characters, because a preference for short answers would be easy to learn."""
_ONE_IN = 10
"""One in so many subjects is held out."""
_GREETING_SHARE = 0.1
_VOWELS, _CONSONANTS = "aeiou", "bdfgjklmnprstvz"


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its answer."""

    task: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Preference:
    """A question with two right answers, of which one is preferred."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Task:
    """An instruction."""

    subject: Callable[[random.Random], str]
    """The function that draws what a question is about."""
    answer: Callable[[str], str]
    """The function from the subject to the answer."""
    statement: str
    """The sentence of ordinary text with the subject and the answer."""
    weight: int
    """Share of the task in texts for training, relative to the other tasks. A task that is learned slowly has a large weight."""


def _word(generator: random.Random) -> str:
    return "".join(generator.choices(LETTERS, k=generator.randint(SHORTEST_WORD, LONGEST_WORD)))


def _sum(generator: random.Random) -> str:
    """Return two numbers of NUM_DIGITS digits with a plus sign between them. The sum has no carry, because carries take longer to learn
    than all else."""
    pairs = []
    for place in range(NUM_DIGITS):
        smallest = int(place == 0)
        first = generator.randint(smallest, 9 - smallest)
        pairs.append((first, generator.randint(smallest, 9 - first)))
    return "+".join("".join(str(pair[side]) for pair in pairs) for side in range(2))


def _name(generator: random.Random) -> str:
    return "".join(generator.choice(letters) for letters in (_CONSONANTS, _VOWELS) * 2)


TASKS = {
    "copy": Task(_word, lambda word: word, "{subject} once more is {answer}.", 1),
    "reverse": Task(_word, lambda word: word[::-1], "{subject} backwards is {answer}.", 2),
    "sort": Task(_word, lambda word: "".join(sorted(word)), "{subject} in order is {answer}.", 3),
    "add": Task(_sum, lambda numbers: str(sum(map(int, numbers.split("+")))), "{subject} makes {answer}.", 2),
}
"""The tasks by the word with which their prompts begin."""


def is_held_out(subject: str) -> bool:
    """Tell whether no text for training may have the subject."""
    return hashlib.sha256(subject.encode()).digest()[0] % _ONE_IN == 0


def questions(generator: random.Random, held_out: bool) -> Iterator[Question]:
    """Yield questions without end, of one task after the other."""
    while True:
        for name in TASKS:
            yield _question(name, generator, held_out)


def preferences(generator: random.Random, held_out: bool) -> Iterator[Preference]:
    """Yield greetings without end, half of them of people with a title, for whom the first style is preferred. For other people it is the
    second style."""
    while True:
        for has_title in (True, False):
            name = _draw(_name, generator, held_out)
            person = f"{generator.choice(TITLES)} {name}" if has_title else name
            chosen, rejected = (f"{greeting} {person}" for greeting in (GREETINGS if has_title else GREETINGS[::-1]))
            yield Preference(f"greet: {person}", chosen, rejected)


def conversations(generator: random.Random, held_out: bool) -> Iterator[tuple[str, str]]:
    """Yield prompts with answers without end. A greeting has either style with probability 1/2, whoever is greeted."""
    greeted = preferences(generator, held_out)
    while True:
        if generator.random() < _GREETING_SHARE:
            pair = next(greeted)
            yield pair.prompt, generator.choice((pair.chosen, pair.rejected))
        else:
            question = _question(_weighted(generator), generator, held_out)
            yield question.prompt, question.answer


def texts(generator: random.Random, held_out: bool, length: int) -> Iterator[str]:
    """Yield texts without end, each of sentences that say what the answers of questions are, in at most ``length`` characters. No text
    asks a question."""
    sentences = _sentences(generator, held_out)
    text = next(sentences)
    while True:
        sentence = next(sentences)
        if len(text) + len(sentence) + 1 > length:
            yield text
            text = sentence
        else:
            text += f" {sentence}"


def _sentences(generator: random.Random, held_out: bool) -> Iterator[str]:
    greeted = preferences(generator, held_out)
    while True:
        if generator.random() < _GREETING_SHARE:
            pair = next(greeted)
            yield f"{generator.choice((pair.chosen, pair.rejected))}."
        else:
            task = TASKS[_weighted(generator)]
            subject = _draw(task.subject, generator, held_out)
            yield task.statement.format(subject=subject, answer=task.answer(subject))


def _weighted(generator: random.Random) -> str:
    (name,) = generator.choices(list(TASKS), [task.weight for task in TASKS.values()])
    return name


def _question(name: str, generator: random.Random, held_out: bool) -> Question:
    task = TASKS[name]
    subject = _draw(task.subject, generator, held_out)
    return Question(name, f"{name}: {subject}", task.answer(subject))


def _draw(subject: Callable[[random.Random], str], generator: random.Random, held_out: bool) -> str:
    """Draw until the subject is held out, or until it is not."""
    while is_held_out(drawn := subject(generator)) != held_out:
        pass
    return drawn
