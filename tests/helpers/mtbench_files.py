"""Hand-made files in the forms of the MT-Bench pool and of Vicuna Bench."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

_ANSWERS = ("Yes.", "It is so, since the sum of the parts is the whole and nothing else is.", "I do not know it.")


def write_judgments(path: Path, questions: int = 24) -> None:
    """Three answers to each question, the last of turn 2; one of four scores is a mean of two judgements."""
    rows = []
    for question in range(questions):
        for number, answer in enumerate(_ANSWERS):
            score = 1.0 + (3 * question + 2 * number) % 10
            averaged = (question + number) % 4 == 0 and score < 10
            row = {
                "question_id": 81 + question,
                "turn": 1 + (number == 2),
                "model": f"m{number}",
                "instruction": f"Is the whole of number {question} the sum of its parts?",
                "response": answer,
                "score": score + 0.5 * averaged,
                "n": 1 + averaged,
                "feedback": f"The answer is {('short', 'long')[number % 2]} and says little. Rating: [[{score:g}]]",
            }
            if number == 2:
                row["context"] = "What is a whole?\n\nAll of it."
            rows.append(row)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_vicuna(path: Path, first_question: str = "How do tides come about?") -> None:
    """Four rows; their mean scores are 1, 3, 5 and 4 1/3."""
    scores = ([1, 1, 1], [3, 3, 3], [5, 5, 5], [4, 4, 5])
    questions = (first_question, "Why is the sky blue?", "What is rain?", "Who wrote it?")
    rows = [
        {
            "idx": number,
            "instruction": _PROMPT.format(question=question),
            "gpt4_score": score,
            "gpt4_feedback": ["x"] * 3,
        }
        for number, (question, score) in enumerate(zip(questions, scores))
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")


_PROMPT = """###Task Description:
An instruction, a response to evaluate, a reference answer that gets a score of 5, and a score rubric are given.

###The instruction to evaluate:
{question}

###Response to evaluate:
By the moon.

###Reference Answer (Score 5):
By the pull of the moon and the sun.

###Score Rubrics:
[Is the answer right?]
Score 1: Wrong.
Score 2: Mostly wrong.
Score 3: Half right.
Score 4: Mostly right.
Score 5: Right.

###Feedback: """
