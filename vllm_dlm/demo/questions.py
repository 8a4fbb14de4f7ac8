"""Questions for the bundled model, which knows a few hundred words and four kinds of task, and nothing else."""

import random
from dataclasses import dataclass


def words(text: str) -> list[str]:
    return text.split()


NAMES = ["alice", "bob", "carol", "david", "emma", "frank", "grace", "henry", "irene", "jack"]
ADJECTIVES = ["red", "green", "blue", "small", "big", "old", "quiet", "bright", "dark", "warm", "soft", "heavy"]
NOUNS = words("""
    river house garden stone tree road bird boat cloud table horse lamp bridge
""")
VERBS = ["follows", "sees", "finds", "holds", "passes", "covers", "keeps", "reaches"]


@dataclass(frozen=True)
class Question:
    title: str
    prompt: str
    expected: str

    def is_right(self, answer: str) -> bool:
        return answer.split() == self.expected.split()

    @property
    def summary(self) -> str:
        """The prompt on one line, without the middle of a long one."""
        *text, question = self.prompt.splitlines()
        words = " ".join(text).split()
        return f"{' '.join(words[:3])} … {len(words) - 3} words … {question}" if words else question


def questions(seed: int = 1) -> list[Question]:
    rng = random.Random(seed)
    letters = rng.sample("abcdefghijklmnopqrstuvwxyz", 6)
    in_order = rng.sample("abcdefghijklmnopqrstuvwxyz", 3)
    return [
        recall(rng, sentences=60, hidden=4, asked=1),
        recall(rng, sentences=60, hidden=6, asked=3),
        Question("copy", f"Copy: {' '.join(letters)}", " ".join(letters)),
        Question("reverse", f"Reverse: {' '.join(letters)}", " ".join(reversed(letters))),
        Question("sort", f"Sort: {' '.join(in_order)}", " ".join(sorted(in_order))),
    ]


def recall(rng: random.Random, sentences: int, hidden: int, asked: int) -> Question:
    """A question about some of the codes hidden in a long text."""
    codes = {name: f"{rng.randrange(100_000):05}" for name in rng.sample(NAMES, hidden)}
    text = [filler(rng) for _ in range(sentences)]
    for name, code in codes.items():
        text.insert(rng.randrange(len(text) + 1), f"The code of {name} is {code}.")
    names = list(codes)[:asked]
    listed = names[0] if asked == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    question = f"What {'is the code' if asked == 1 else 'are the codes'} of {listed}?"
    return Question(
        f"recall {asked} of {hidden}",
        f"Remember the codes. {' '.join(text)}\n{question}",
        ", ".join(f"{name} is {codes[name]}" for name in names) + ".",
    )


def filler(rng: random.Random) -> str:
    (first, second), (one, other) = rng.sample(ADJECTIVES, 2), rng.sample(NOUNS, 2)
    return f"The {first} {one} {rng.choice(VERBS)} the {second} {other}."
