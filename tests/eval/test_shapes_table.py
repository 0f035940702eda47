"""The table of saliencies: means over seeds, uniform first, nothing counted twice."""

import pytest

from vlmq.eval.shapes_table import summarise


def line(saliency, nll, seed=0, scheme="int2-g64", solver=None):
    return {
        "scheme": scheme,
        "parts": "all",
        "alpha": 0.5,
        "solver": solver,
        "saliency": saliency,
        "seed": seed,
        "nll": nll,
        "accuracy": 0.5,
        "true_bits_per_weight": 2.4,
    }


def test_uniform_comes_first_and_seeds_are_averaged():
    lines = [line("loss_grad", 0.1), line("uniform", 0.2), line("uniform", 0.4, seed=1)]
    rows = summarise([*lines, line("uniform", 0.7, solver="learned")]).rows
    assert [(row[3], row[4], round(row[5], 3), row[6], row[8]) for row in rows] == [
        ("default", "uniform", 0.3, "0.2000 to 0.4000", 2),
        ("default", "loss_grad", 0.1, "", 1),
        ("learned", "uniform", 0.7, "", 1),
    ]


def test_a_line_that_is_there_twice_is_an_error():
    with pytest.raises(ValueError, match="int2-g64 all 0.5 default uniform: seed 1 is there twice"):
        summarise([line("uniform", 0.1, seed=1), line("uniform", 0.1, seed=1)])
