"""Live table of all answers as they fill in. Without a terminal, one line per finished answer."""

from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vllm_dlm.client import Progress
from vllm_dlm.demo.questions import Question
from vllm_dlm.shown import printable

MASK = "░"


class Screen:
    def __init__(self, console: Console, questions: list[Question], canvas: int):
        self.console, self.questions, self.canvas = console, questions, canvas
        self.progress = [Progress() for _ in questions]

    @contextmanager
    def live(self):
        if not self.console.is_terminal:
            yield
            return
        with Live(get_renderable=self.table, console=self.console, refresh_per_second=20):
            yield

    def finished(self, index: int) -> None:
        if not self.console.is_terminal:
            question, progress = self.questions[index], self.progress[index]
            self.console.print(
                f"{question.title}: {question.summary} -> {written(progress)} [{verdict(question, progress)}]",
                markup=False,
                highlight=False,
                emoji=False,
                soft_wrap=True,
            )

    def table(self) -> Table:
        table = Table(expand=True, show_lines=True)
        table.add_column("task", no_wrap=True)
        table.add_column("question", ratio=1)
        table.add_column("answer", ratio=1)
        for question, progress in zip(self.questions, self.progress, strict=True):
            table.add_row(Text(question.title), Text(question.summary), self.answer(question, progress))
        return table

    def answer(self, question: Question, progress: Progress) -> Text:
        text = Text(written(progress))
        if progress.finish_reason:
            right = question.is_right(progress.text)
            return text.append(f"  {verdict(question, progress)}", "green" if right else "red")
        return text.append(MASK * (self.canvas - progress.tokens), "dim")


def written(progress: Progress) -> str:
    return printable(progress.text.strip())


def verdict(question: Question, progress: Progress) -> str:
    return "right" if question.is_right(progress.text) else f"wrong, expected {question.expected}"
