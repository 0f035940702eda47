"""The table of results: seeds are averaged, settings are told apart, a seed that is there twice is an error."""

import pytest

from vlmq.eval.smollm2_table import settings_of, summarise


def line(perplexity, seed=0, scheme="int2-g64", options=None, n_calib=64, **settings):
    given = {"alpha": 0.5, "saliency": "uniform", "solver": ["gptq+cd"], "seed": seed} | settings
    return {
        "scheme": scheme,
        "seed": seed,
        "perplexity": perplexity,
        "true_bits_per_weight": 2.375,
        "bytes_on_disk": 88_000_000,
        "settings": given,
        "options": options or {},
        "n_calib": n_calib,
        "cpu_seconds": 100.0,
    }


def test_seeds_are_averaged_and_settings_told_apart():
    lines = [line(30.0), line(36.0, seed=1), line(70.0, alpha=0.0), line(50.0, scheme="ternary-g64")]
    rows = summarise(lines).rows
    assert [row[:5] for row in rows] == [
        ("int2-g64", "-", 33.0, "30.00 to 36.00", 2),
        ("int2-g64", "alpha=0.0", 70.0, "", 1),
        ("ternary-g64", "-", 50.0, "", 1),
    ]


def test_what_differs_from_the_defaults_is_named():
    assert settings_of(line(1.0)) == ""
    assert settings_of(line(1.0, n_calib=16)) == "n_calib=16"
    changed = line(1.0, solver=["gptq"], saliency="loss_grad", options={"act_order": False})
    assert settings_of(changed) == "saliency=loss_grad, solver=gptq, act_order=false"


def test_a_seed_that_is_there_twice_is_an_error():
    with pytest.raises(ValueError, match=r"int2-g64 alpha=0.0: seed 1 is there twice"):
        summarise([line(1.0, seed=1, alpha=0.0), line(2.0, seed=1, alpha=0.0)])
