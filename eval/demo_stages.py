"""The stages of the small model's training: their lengths, rates and the questions they draw."""

from dataclasses import dataclass

from vlmq.eval.easy_vqa_data import question_kind


@dataclass(frozen=True)
class Stage:
    """A part of the training with its own warm-up and cosine.

    `shares` says how readily a question is drawn, by its `drawing_kind`.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    n_warmup_steps: int
    shares: dict[str, float]


# A yes/no answer tells one bit about the picture, the others two or three.
STAGES = (
    Stage(
        epochs=28,
        batch_size=32,
        learning_rate=1e-3,
        n_warmup_steps=150,
        shares={
            "color": 3.0,
            "shape": 3.0,
            "presence": 1.0,
            "absence": 1.0,
            "presence of a shape": 1.0,
            "absence of a shape": 1.0,
        },
    ),
    # The first stage's errors on the train split: 24 % of "is there not a circle?" and its like, 4 % of questions
    # for a shape (28 % below 100 pixels), none about colors.
    Stage(
        epochs=4,
        batch_size=16,
        learning_rate=4e-4,
        n_warmup_steps=50,
        shares={
            "color": 0.3,
            "shape": 3.0,
            "presence": 0.3,
            "absence": 0.3,
            "presence of a shape": 2.0,
            "absence of a shape": 8.0,
        },
    ),
    # What then remains: 6 % of the questions whether a shape is absent; the others stay as they are.
    Stage(
        epochs=5,
        batch_size=16,
        learning_rate=4e-4,
        n_warmup_steps=50,
        shares={
            "color": 0.2,
            "shape": 2.0,
            "presence": 0.2,
            "absence": 0.2,
            "presence of a shape": 1.0,
            "absence of a shape": 8.0,
        },
    ),
)


def drawing_kind(question: str) -> str:
    """Kind of a question, the yes/no questions that name a shape apart: they are few and the hardest."""
    kind = question_kind(question)
    names_shape = any(word in question for word in ("circle", "rectangle", "triangle"))
    return f"{kind} of a shape" if names_shape and kind in ("presence", "absence") else kind
